"""Task vectors: what they are means of, what they depend on, and the cache."""

import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from lightning_modules.building import ConfigError
from lightning_modules.config import TaskMoEConfig, TrialConfig
from lightning_modules.data.batches import Part, chosen_rows, collate
from lightning_modules.data.prepared import open_tasks, prepare
from lightning_modules.data.tasks import TaskSpec, load_catalogues
from lightning_modules.network.backbones import load_backbone
from lightning_modules.network.experts import Bottleneck
from lightning_modules.router_config import COMPUTED
from lightning_modules.task_encoding import Effort, TaskEncoder, adapter_fisher, limited, mean_state, pooled, train_alone
from lightning_modules.task_vectors import _cached, task_vectors

Make = Callable[..., TrialConfig]
QUICK = Effort(examples=6, steps=3)
TEXTS = {"toy/sentiment": "Is the day good or bad?", "toy/count": "How many words are good?", "toy/pos": "Name each word."}


def router(source: str, **settings: Any) -> dict[str, Any]:
    given = {"descriptions": TEXTS} if source == "description" else {}
    return {"family": "task_moe", "router": {"network": "linear", "task_vectors": source, **given, **settings}}


def vectors(config: TrialConfig, root: Path, effort: Effort = QUICK) -> Tensor:
    found = task_vectors(config, open_tasks(config, root), root, effort=effort)
    assert found is not None
    return found


def stored(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (root / "vectors").glob("*.npz")}


@pytest.fixture
def root(prepared: Path, tmp_path: Path) -> Path:
    """The prepared data with no vectors yet."""
    for folder in prepared.iterdir():
        if folder.name != "vectors":
            (tmp_path / folder.name).symlink_to(folder)
    return tmp_path


@pytest.mark.parametrize("source", COMPUTED)
def test_standardised_deterministic_and_read_back_to_the_bit(
    source: str, make_trial: Make, root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_trial(model=router(source))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = vectors(config, root)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (3, 2 if source == "fisher" else 16) and first.dtype == torch.float32
    assert first.mean(0).abs().max() < 1e-6
    assert first.square().mean().item() == pytest.approx(1)

    elsewhere = tmp_path_factory.mktemp("again")
    for folder in root.iterdir():
        if folder.name != "vectors":
            (elsewhere / folder.name).symlink_to(folder)
    assert torch.equal(vectors(config, elsewhere), first)

    monkeypatch.setattr(TaskEncoder, "raw", lambda *_: pytest.fail("computed twice"))
    assert torch.equal(vectors(config, root), first)


def test_none_where_the_router_reads_none_or_makes_its_own(make_trial: Make, prepared: Path) -> None:
    plain = {"family": "task_moe", "router": {"kind": "task"}}
    for model in ({"family": "dense"}, plain, router("id"), router("onehot"), router("random")):
        assert task_vectors(make_trial(model=model), [], prepared) is None


def test_pooling_sees_no_padding(make_trial: Make, prepared: Path) -> None:
    config = make_trial()
    task = open_tasks(config, prepared)[0]
    rows = np.arange(7)
    batch = collate([Part(0, task, "train", rows)])
    assert (batch.attention_mask == 0).any()
    hidden = torch.randn(*batch.input_ids.shape, 5)
    lengths = batch.attention_mask.sum(1).tolist()
    by_hand = torch.stack([hidden[i, :n].mean(0) for i, n in enumerate(lengths)])
    torch.testing.assert_close(pooled(hidden, batch, first=False), by_hand)
    torch.testing.assert_close(pooled(hidden, batch, first=True), hidden[:, 0])


def test_every_example_counts_once_whatever_the_batches(make_trial: Make, prepared: Path) -> None:
    config = make_trial(train={"eval_batch_size": 7})
    task = open_tasks(config, prepared)[0]
    backbone = load_backbone(config.backbone, task.vocab_size, config.seed).eval()
    alone = []
    for row in range(task.size("train")):
        batch = collate([Part(0, task, "train", np.array([row]))])
        with torch.no_grad():
            alone.append(backbone.encode(batch.input_ids, batch.attention_mask, batch.token_type_ids, {})[0])
    by_hand = torch.stack([states.mean(0) for states in alone]).mean(0)
    torch.testing.assert_close(mean_state(backbone, config, task, first=False).float(), by_hand)
    torch.testing.assert_close(
        mean_state(backbone, config, task, first=True).float(), torch.stack([states[0] for states in alone]).mean(0)
    )
    some = limited(config, 5)
    assert not torch.allclose(mean_state(backbone, some, task, first=False).float(), by_hand)


def test_windows_and_options(every_kind: Path, make_trial: Make, tmp_path: Path) -> None:
    specs = load_catalogues([every_kind], Path())
    config = make_trial(("kind/choice", "kind/spans"), backbone={"max_length": 8}, digests={})
    size = replace(config.backbone.size, tokenizer_tasks=())
    config = replace(config, backbone=replace(config.backbone, size=size))
    prepare([config], specs, tmp_path)
    choice, spans = open_tasks(config, tmp_path)
    batch = collate([Part(0, choice, "train", np.arange(3))])
    hidden = torch.randn(*batch.input_ids.shape, 4)
    assert pooled(hidden, batch, first=False).shape == (3, 4)

    batch = collate([Part(0, spans, "train", np.arange(6))])
    assert batch.stitch is not None and batch.starts is not None
    hidden = torch.randn(*batch.input_ids.shape, 4)
    flat = hidden.flatten(0, 1)
    for mine, heads, tokens, starts in zip(
        pooled(hidden, batch, first=False), pooled(hidden, batch, first=True), batch.stitch, batch.starts, strict=True
    ):
        torch.testing.assert_close(mine, flat[tokens[tokens >= 0]].mean(0))
        torch.testing.assert_close(heads, flat[tokens[starts]].mean(0))


def test_what_names_the_files(make_trial: Make, root: Path) -> None:
    """Other data, seeds and settings have vectors of their own; what they do not depend on shares them."""
    base = make_trial(model=router("text_embedding"))
    first = vectors(base, root)
    files = stored(root)
    assert len(files) == 4  # the tasks' and the mixture's
    same = [
        make_trial(model=router("text_embedding", network="lstm"), train={"lr": 1e-4, "steps": 3}),
        make_trial(model=router("text_embedding"), mixture={"batch_size": 4}, data={"max_eval": 3}),
        make_trial(model={"family": "adapter_moe", "router": router("text_embedding")["router"]}),
    ]
    for config in same:
        assert torch.equal(vectors(config, root), first)
    assert stored(root) == files
    other = [
        (make_trial(model=router("text_embedding"), seed=1), QUICK, 4),
        (make_trial(model=router("text_embedding"), data={"max_train": 3}), QUICK, 4),
        (make_trial(model=router("text_embedding"), mixture={"low_resource": {"toy/pos": 4}}), QUICK, 2),
        (make_trial(model=router("centroid")), QUICK, 4),
        (base, replace(QUICK, examples=5), 4),
    ]
    for config, effort, new in other:
        before = stored(root)
        assert not torch.equal(vectors(config, root, effort), first)
        assert len(stored(root)) - len(before) == new


def test_training_settings_name_the_files_of_trained_sources(make_trial: Make, root: Path) -> None:
    lists = []
    for train in ({}, {"lr": 1e-2}, {"log_every": 5}):
        vectors(make_trial(("toy/sentiment", "toy/count"), model=router("fine_tuned"), train=train), root)
        lists.append(len(stored(root)))
    assert lists == [3, 6, 6]


def test_training_moves_the_backbone_and_leaves_its_mark(make_trial: Make, prepared: Path) -> None:
    before = vectors(make_trial(model=router("text_embedding")), prepared)
    after = vectors(make_trial(model=router("fine_tuned")), prepared)
    frozen = vectors(make_trial(model=router("fine_tuned"), backbone={"frozen": True}), prepared)
    assert not torch.allclose(before, after)
    assert torch.equal(frozen, after)


def test_fisher_is_the_mean_square_of_single_gradients(make_trial: Make, prepared: Path) -> None:
    adapter = {"family": "adapter_moe", "num_experts": 1, "bottleneck": 8, "router": {"kind": "uniform", "selection": "soft"}}
    config = make_trial(("toy/sentiment",), model=adapter, backbone={"frozen": True}, data={"max_train": 4}, train={"steps": 3})
    task = open_tasks(config, prepared)[0]
    network = train_alone(config, task, torch.device("cpu"))
    adapters = [module for module in network.modules() if isinstance(module, Bottleneck)]
    assert len(adapters) == 2 and all(adapter.up.weight.any() for adapter in adapters), "they have not trained"
    fisher = adapter_fisher(network, config, task)
    assert fisher.shape == (2 * 2 * 8 * 16,)
    weights = [adapters[0].down.weight, adapters[0].up.weight]
    squares = torch.zeros(2 * 8 * 16)
    rows = chosen_rows(config, task, "train")
    for row in rows:
        network.zero_grad()
        network.losses(collate([Part(0, task, "train", np.array([row]))]))[0].sum().backward()
        squares += torch.cat([w.grad.flatten() for w in weights if w.grad is not None]) ** 2
    torch.testing.assert_close(fisher[: 2 * 8 * 16].float(), squares / 4, rtol=1e-3, atol=0)  # they are tiny
    assert len(rows) == 4 and squares.any()


# -- mixtures with planted relations -----------------------------------------------------------------------------------


WORDS = {"a": "good fine bright bad dull grim", "b": "seven nine eleven forty sixty twelve"}


@pytest.fixture(scope="module")
def related(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, TaskSpec], Path]:
    """text2text tasks ``rel/a1 a2 b1 b2``: those of a letter share their words, and prepared data for tiny-t5."""
    folder, rng, entries = tmp_path_factory.mktemp("related"), random.Random(0), []
    for name in ("a1", "a2", "b1", "b2"):
        words, files = WORDS[name[0]].split(), {}
        for split in ("train", "dev", "test"):
            lines = [[rng.choice(words) for _ in range(rng.randint(3, 9))] for _ in range(20)]
            rows = [{"text": " ".join(line), "target": line[0 if name[1] == "1" else -1]} for line in lines]
            files[split] = f"{name}.{split}.jsonl"
            (folder / files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append(
            {"name": f"rel/{name}", "kind": "text2text", "metric": "exact_match", "category": "rel/x", "files": files}
        )
    (folder / "related.yaml").write_text(yaml.safe_dump({"tasks": entries}))
    return load_catalogues([folder / "related.yaml"], Path()), tmp_path_factory.mktemp("related_prepared")


@pytest.fixture
def relations(related: tuple[dict[str, TaskSpec], Path], make_trial: Make) -> Callable[..., tuple[TrialConfig, Path]]:
    """``relations(source, tasks, held_out)``: a trial on the tasks and its prepared data."""
    specs, root = related

    def make(source: str, names: tuple[str, ...], held_out: tuple[str, ...] = ()) -> tuple[TrialConfig, Path]:
        config = make_trial(
            tuple(f"rel/{name}" for name in names),
            backbone={"name": "tiny-t5", "size": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 32,
                      "vocab_size": 320, "tokenizer_tasks": sorted(specs)}},
            model=router(source),
            mixture={"held_out": [f"rel/{name}" for name in held_out]},
            digests={name: specs[name].digest() for name in specs},
        )  # fmt: skip
        prepare([config], specs, root)
        return config, root

    return make


def test_related_tasks_are_near_each_other(relations: Callable[..., tuple[TrialConfig, Path]]) -> None:
    found = vectors(*relations("text_embedding", ("a1", "b1", "a2", "b2")), effort=Effort(examples=20))
    cosine = torch.nn.functional.cosine_similarity(found[:, None], found[None], dim=-1)
    assert min(cosine[0, 2], cosine[1, 3]) > 0.5
    assert cosine[:2, 2:].fliplr().diagonal().max() < -0.5


@pytest.mark.parametrize("source", ["text_embedding", "fisher"])
def test_a_held_out_task_changes_nothing_for_the_others(
    source: str, relations: Callable[..., tuple[TrialConfig, Path]]
) -> None:
    without, root = relations(source, ("a1", "a2", "b1"))
    config, _ = relations(source, ("a1", "a2", "b1", "b2"), ("b2",))
    found = vectors(config, root)
    assert torch.equal(found[:3], vectors(without, root))
    assert found[3].isfinite().all() and found[3].any()

    assert isinstance(config.model, TaskMoEConfig)
    encoder = TaskEncoder(config, config.model.router, root, torch.device("cpu"), QUICK)
    raw = encoder.raw(open_tasks(config, root)[3])
    files = [dict(np.load(path)) for path in (root / "vectors").glob("*.npz")]
    (mine,) = [f for f in files if "vectors" in f and np.array_equal(f["vectors"], found.numpy())]
    moved = raw - mine["mean"]
    if source == "fisher":
        assert mine["components"].shape == (2, len(raw))
        np.testing.assert_allclose(mine["components"] @ mine["components"].T, np.eye(2), atol=1e-9)
        assert (mine["components"].max(1) == np.abs(mine["components"]).max(1)).all()
        moved = mine["components"] @ moved
    np.testing.assert_allclose(moved / mine["scale"], found[3], rtol=1e-5)


def test_one_computes_and_the_others_wait(tmp_path: Path) -> None:
    calls, both = [], threading.Barrier(2)

    def compute() -> dict[str, np.ndarray]:
        calls.append(1)
        time.sleep(0.2)
        return {"x": np.arange(3)}

    def read(_: int) -> list[int]:
        both.wait()
        return _cached(tmp_path, {"a": 1}, compute)["x"].tolist()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(read, range(2))) == [[0, 1, 2]] * 2
    assert len(calls) == 1


def test_unusable_mixtures_are_refused(make_trial: Make, root: Path) -> None:
    with pytest.raises(ConfigError, match="one trained task"):
        vectors(make_trial(("toy/pos",), model=router("fisher")), root)
    assert not vectors(make_trial(("toy/pos",), model=router("centroid")), root).any()
    same = {name: "A task." for name in TEXTS}
    with pytest.raises(ConfigError, match="tell the trained tasks apart"):
        vectors(make_trial(model=router("description", descriptions=same)), root)
    with pytest.raises(ConfigError, match="must have a text for task toy/pos"):
        vectors(make_trial(model=router("description", descriptions={**TEXTS, "toy/pos": " "})), root)
