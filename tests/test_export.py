"""A task's path through a mixture, saved as a plain Hugging Face model, answers as the mixture does."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, VOCAB, one_group, shake, tiny_batch, tiny_network
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

from lightning_modules.checkpoints import list_checkpoints
from lightning_modules.config import DenseConfig, RouterConfig, TaskMoEConfig, TrialConfig
from lightning_modules.data.batches import Batch, StepBatches
from lightning_modules.data.posing import formed
from lightning_modules.data.prepared import open_tasks, prepare
from lightning_modules.data.tasks import TaskSpec, load_catalogues
from lightning_modules.multitask import MultiTaskModule
from lightning_modules.network.backbones import NotPlainError, load_backbone
from lightning_modules.network.model import HEADS, MultiTaskNetwork, build_network
from lightning_modules.network.task_heads.base import HeadSpec, States
from lightning_modules.network.task_heads.text2text import sequence_loss
from pipelines.export import main, straighten
from pipelines.store import TrialFolder
from pipelines.trial import run_trial

SOFT = RouterConfig(init_std=1.0, selection="soft")
TOP_1 = RouterConfig(init_std=1.0)
MERGED = replace(SOFT, combine="parameters")
DENSE_SIZE: dict[str, TaskMoEConfig] = {
    "top_1": TaskMoEConfig(num_experts=3, router=TOP_1),
    "top_1_raw": TaskMoEConfig(num_experts=3, router=replace(TOP_1, weighting="raw")),
    "top_1_of_some": TaskMoEConfig(num_experts=3, router=TOP_1, layers=(1,)),
    "top_1_of_a_network": TaskMoEConfig(num_experts=3, router=RouterConfig(network="lstm", init_std=1.0)),
    "merged": TaskMoEConfig(num_experts=3, router=MERGED),
    "merged_top_2": TaskMoEConfig(num_experts=3, router=RouterConfig(init_std=1.0, top_k=2, combine="parameters")),
    "random": TaskMoEConfig(num_experts=3, router=RouterConfig(kind="random")),
    "split": TaskMoEConfig(num_experts=4, expert="ffn_split", router=RouterConfig(init_std=1.0, top_k=2)),
    "layer": TaskMoEConfig(num_experts=3, expert="layer", router=TOP_1),
    "layer_merged": TaskMoEConfig(num_experts=2, expert="layer", router=MERGED, layers=(0,)),
    "single": TaskMoEConfig(num_experts=1),
    "single_layer": TaskMoEConfig(num_experts=1, expert="layer"),
}
WIDER: dict[str, tuple[TaskMoEConfig, int]] = {
    "soft": (TaskMoEConfig(num_experts=3, router=SOFT), 3),
    "uniform": (TaskMoEConfig(num_experts=4, router=RouterConfig(kind="uniform")), 4),
    "shared": (TaskMoEConfig(num_experts=3, router=TOP_1, shared_experts=1), 2),
    "shared_merged": (TaskMoEConfig(num_experts=3, router=MERGED, shared_experts=2), 3),
}
SEQ2SEQ_HEADS = (HeadSpec("say", "text2text", 1), HeadSpec("tell", "text2text", 1), HeadSpec("pets", "classification", 3))


def straightened(network: MultiTaskNetwork, task: int) -> MultiTaskNetwork:
    """A copy of the network with the path of one task."""
    alone = copy.deepcopy(network)
    straighten(alone, task)
    return alone


def dense_size(backbone: str = "tiny-encoder") -> int:
    return sum(p.numel() for p in load_backbone(replace(TINY, name=backbone), VOCAB, 0).parameters())


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "token_type_ids": batch.token_type_ids}


@pytest.mark.parametrize("name", [*DENSE_SIZE, *WIDER])
def test_the_plain_models_states_are_the_mixtures(name: str) -> None:
    config, times = WIDER[name] if name in WIDER else (DENSE_SIZE[name], 1)
    network = tiny_network(config).eval()
    shake(network)
    batch, different = tiny_batch(range(4)), []
    for task in range(4):
        group = one_group(batch, task)
        plain: Any = straightened(network, task).backbone.plain()
        found = plain(**inputs_of(group)).last_hidden_state
        real = group.attention_mask.bool()
        torch.testing.assert_close(found[real], network.encode(group)[real], atol=1e-5, rtol=1e-5)
        different.append(found[0, 0])
        assert plain.config.intermediate_size == times * 32
        size = sum(p.numel() for p in plain.parameters())
        assert size == dense_size() if times == 1 else dense_size() < size
    uniform = name == "uniform" or name.startswith("single")
    assert uniform or not torch.allclose(different[0], different[3], atol=1e-3)


@pytest.mark.parametrize("backbone", ["tiny-bart", "tiny-t5"])
@pytest.mark.parametrize("name", ["top_1", "merged", "split", "layer", "layer_merged", "soft", "shared"])
def test_a_plain_encoder_decoder_scores_and_generates_as_the_mixture(name: str, backbone: str) -> None:
    config, times = WIDER[name] if name in WIDER else (DENSE_SIZE[name], 1)
    trial = TrialConfig(backbone=replace(TINY, name=backbone), model=config)
    network = build_network(trial, SEQ2SEQ_HEADS, VOCAB).eval()
    shake(network)
    heads = (HeadSpec("a", "tagging", 50), HeadSpec("b", "tagging", 50))
    batch = tiny_batch(range(2), rows=3, heads=heads)
    for task in range(2):
        group = one_group(batch, task)
        rows = group.tasks[0]
        plain: Any = straightened(network, task).backbone.plain()
        assert times > 1 or sum(p.numel() for p in plain.parameters()) == dense_size(backbone)
        logits = plain(input_ids=group.input_ids, attention_mask=group.attention_mask, labels=rows.labels).logits
        torch.testing.assert_close(sequence_loss(logits, rows.labels), network.losses(group)[0], atol=1e-5, rtol=1e-5)
        generation = replace(trial.generation, beams=3)
        ids = plain.generate(
            input_ids=group.input_ids,
            attention_mask=group.attention_mask,
            num_beams=3,
            max_new_tokens=6,
            length_penalty=generation.length_penalty,
        )[:, 1:].tolist()
        assert [until_end(row) for row in ids] == [until_end(row) for row in network.answers(group, generation, 6)[0]]


def until_end(row: list[int]) -> list[int]:
    return row[: row.index(3) + 1] if 3 in row else row


@pytest.mark.parametrize(
    ("config", "law"),
    [
        (TaskMoEConfig(num_experts=3, router=SOFT, layers=(1,)), r"one intermediate_size for all blocks, but here block 0: 32"),
        (TaskMoEConfig(num_experts=(2, 3), router=SOFT), r"block 0: 64, block 1: 96"),
        (TaskMoEConfig(num_experts=3, router=SOFT, expert="layer"), r"block 0 mixes the outputs of 3 whole layers"),
        (
            TaskMoEConfig(num_experts=3, router=replace(TOP_1, weighting="raw"), expert="layer"),
            r"block 0 weights its layer's output by 0\.\d+",
        ),
    ],
)
def test_what_is_no_plain_model_is_refused(config: TaskMoEConfig, law: str) -> None:
    network = tiny_network(config).eval()
    with pytest.raises(NotPlainError, match=law):
        straightened(network, 0).backbone.plain()


def test_a_dense_network_is_plain_as_it_is() -> None:
    for multiple in (1, 2):
        network = tiny_network(DenseConfig(ffn_multiple=multiple)).eval()
        batch = tiny_batch([1])
        plain: Any = straightened(network, 1).backbone.plain()
        real = batch.attention_mask.bool()
        torch.testing.assert_close(plain(**inputs_of(batch)).last_hidden_state[real], network.encode(batch)[real])


# -- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def storage(
    make_trial: Callable[..., TrialConfig],
    prepared: Path,
    catalogue: Path,
    every_kind: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, TrialConfig]]:
    """A storage folder with trained trials, by name."""
    root = tmp_path_factory.mktemp("storage")
    (root / "prepared").symlink_to(prepared)
    train = {"steps": 6, "checkpoint_every": 6}
    moe: dict[str, Any] = {"family": "task_moe", "num_experts": 3}
    configs = {
        "ffn": make_trial(model=moe | {"router": {"init_std": 1.0}}, train=train),
        "layer": make_trial(model=moe | {"expert": "layer", "router": {"init_std": 1.0}}, train=train),
        "soft_layer": make_trial(model=moe | {"expert": "layer", "router": {"selection": "soft"}}, train=train),
        "token": make_trial(model=moe | {"router": {"kind": "token"}}, train=train),
        "adapters": make_trial(model={"family": "adapter_moe"}, train=train),
    }
    tasks = load_catalogues([catalogue, every_kind], Path())
    configs["bart"] = _text_trial(make_trial, tasks)
    prepare([configs["bart"]], tasks, root / "prepared")
    for config in configs.values():
        folder = TrialFolder(root, config.trial_id)
        folder.write_config(config)
        assert run_trial(config, folder, root / "prepared") is not None
    return root, configs


def _text_trial(make_trial: Callable[..., TrialConfig], tasks: dict[str, TaskSpec]) -> TrialConfig:
    names = ("kind/text2text", "kind/classification")
    model = {"family": "task_moe", "num_experts": 2, "expert": "layer", "router": {"init_std": 1.0}}
    size = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_size": 32, "vocab_size": 320, "tokenizer_tasks": names}
    return make_trial(
        names=names,
        backbone={"name": "tiny-bart", "max_length": 32, "max_target_length": 8, "size": size},
        model=model,
        train={"steps": 6, "checkpoint_every": 6},
        digests={name: formed(tasks[name], "native").digest() for name in names},
    )


def trained(root: Path, config: TrialConfig) -> tuple[MultiTaskNetwork, StepBatches]:
    tasks = open_tasks(config, root / "prepared")
    batches = StepBatches(config, tasks)
    network = MultiTaskModule(config, tasks, batches).network.eval()
    newest = list_checkpoints(TrialFolder(root, config.trial_id).checkpoints)[0]
    network.load_state_dict(torch.load(newest, weights_only=True)["network"])
    return network, batches


def groups_of(batches: StepBatches, task: int) -> list[Batch]:
    return [b for step in range(6) for b in batches.batches(step) if b.tasks[0].task == task]


@pytest.mark.parametrize("name", ["ffn", "layer"])
def test_an_exported_encoder_and_its_head_give_the_mixtures_logits(
    name: str, storage: tuple[Path, dict[str, TrialConfig]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, configs = storage
    config = configs[name]
    network, batches = trained(root, config)
    seen = []
    for task, task_name in enumerate(config.mixture.tasks):
        to = tmp_path / str(task)
        assert main([config.trial_id, task_name, "--storage", str(root), "--to", str(to)]) == 0
        capsys.readouterr()
        model: Any = AutoModel.from_pretrained(to, add_pooling_layer=False).eval()
        assert sum(p.numel() for p in model.parameters()) == sum(
            p.numel() for p in load_backbone(config.backbone, model.config.vocab_size, 0).parameters()
        )
        about = json.loads((to / "head.json").read_text())
        spec = HeadSpec(about["task"], about["kind"], about["num_labels"], about["facts"], pooling=about["pooling"])
        head = HEADS[about["kind"]](about["hidden_size"], spec).eval()
        head.load_state_dict(load_file(to / "head.safetensors"))
        own = network.head(task)
        assert own is not None
        for group in groups_of(batches, task):
            inputs = inputs_of(group)
            mask = group.attention_mask.bool()
            starts = torch.zeros_like(mask)
            starts[:, 0] = True
            results = [
                decode(States(states, mask, group.word_index, starts))
                for states, decode in ((model(**inputs).last_hidden_state, head), (network.encode(group), own))
            ]
            torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
            if about["kind"] == "classification":
                weight, bias = (load_file(to / "head.safetensors")[f"linear.{part}"] for part in ("weight", "bias"))
                torch.testing.assert_close(results[0], model(**inputs).last_hidden_state[:, 0] @ weight.T + bias)
        ids = AutoTokenizer.from_pretrained(to)("good day")["input_ids"]
        seen.append(model(input_ids=torch.tensor([ids])).last_hidden_state)
    assert not torch.allclose(seen[0], seen[1], atol=1e-4), "two tasks have two models"
    assert json.loads((tmp_path / "0" / "head.json").read_text())["labels"] == ["neg", "pos"]


def test_an_exported_encoder_decoder_gives_the_mixtures_logits_and_texts(
    storage: tuple[Path, dict[str, TrialConfig]], tmp_path: Path
) -> None:
    root, configs = storage
    config = configs["bart"]
    network, batches = trained(root, config)
    to = tmp_path / "model"
    assert main([config.trial_id, "kind/text2text", "--storage", str(root), "--to", str(to)]) == 0
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(to).eval()
    assert not (to / "head.safetensors").exists()
    for group in groups_of(batches, 0):
        labels = group.tasks[0].labels
        logits = model(input_ids=group.input_ids, attention_mask=group.attention_mask, labels=labels).logits
        torch.testing.assert_close(sequence_loss(logits, labels), network.losses(group)[0], atol=1e-5, rtol=1e-5)
        ids = model.generate(input_ids=group.input_ids, attention_mask=group.attention_mask, num_beams=1, max_new_tokens=8)
        expected = network.answers(group, replace(config.generation, beams=1), 8)[0]
        assert [until_end(row) for row in ids[:, 1:].tolist()] == [until_end(row) for row in expected]


def test_every_mistake_ends_with_status_2_and_one_line(
    storage: tuple[Path, dict[str, TrialConfig]],
    make_trial: Callable[..., TrialConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, configs = storage
    taken = tmp_path / "taken"
    taken.mkdir()
    waiting = make_trial(train={"steps": 9})
    TrialFolder(root, waiting.trial_id).write_config(waiting)
    sentiment = "toy/sentiment"
    cases = [
        ("task_moe-000000000000", sentiment, "task_moe-000000000000: there is no such trial"),
        (waiting.trial_id, sentiment, "must have finished"),
        (configs["ffn"].trial_id, "toy/none", "TASK must be one of the trial's (toy/sentiment, toy/count, toy/pos), got"),
        (configs["token"].trial_id, sentiment, "the router decides by more than the task (kind: token)"),
        (configs["adapters"].trial_id, sentiment, "an adapter_moe has no plain model"),
        (configs["soft_layer"].trial_id, sentiment, "block 0 mixes the outputs of 3 whole layers"),
    ]
    for trial, task, line in cases:
        assert main([trial, task, "--storage", str(root), "--to", str(tmp_path / "new")]) == 2
        error = capsys.readouterr().err
        assert line in error and error.startswith("export.py: ") and error.count("\n") == 1
        assert not (tmp_path / "new").exists()
    assert main([configs["ffn"].trial_id, sentiment, "--storage", str(root), "--to", str(taken)]) == 2
    assert "--to must be a new folder" in capsys.readouterr().err


def test_a_trial_without_its_last_checkpoint_or_its_data_is_told(
    storage: tuple[Path, dict[str, TrialConfig]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, configs = storage
    config = configs["ffn"]
    source, folder = TrialFolder(root, config.trial_id), TrialFolder(tmp_path, config.trial_id)
    folder.write_config(config)
    result = source.result()
    assert result is not None
    folder.write_result(result)
    command = [config.trial_id, "toy/count", "--storage", str(tmp_path), "--to", str(tmp_path / "new")]
    assert main(command) == 2
    assert "its prepared data are gone" in capsys.readouterr().err
    (tmp_path / "prepared").symlink_to(root / "prepared")
    assert main(command) == 2
    assert "needs the checkpoint of its last step, 6" in capsys.readouterr().err
