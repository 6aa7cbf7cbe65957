"""Mixtures through whole trials: rules that learn resume to the bit, steps weigh what they should, roles and samples hold."""

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_trial import Stopped, curve, final_weights, finish, gang_jobs, stop_at

from lightning_modules.building import build
from lightning_modules.checkpoints import load_newest
from lightning_modules.config import TrialConfig
from lightning_modules.data.batches import Batch, Part, StepBatches, chosen_rows, collate
from lightning_modules.data.posing import pose
from lightning_modules.data.prepared import open_tasks, prepare
from lightning_modules.data.tasks import TaskSpec, load_catalogues
from lightning_modules.multitask import MultiTaskModule
from pipelines.store import TrialFolder, TrialResult
from pipelines.trial import run_trial
from pipelines.workers import Job, WorkerPool

Make = Callable[..., TrialConfig]
SIZE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_size": 32, "vocab_size": 320}
ADAPTIVE = {"sampling": "adaptive", "adapt_every": 4}


def train(config: TrialConfig, folder: Path, prepared: Path) -> tuple[TrialFolder, TrialResult]:
    trial = TrialFolder(folder, config.trial_id)
    result = run_trial(config, trial, prepared)
    assert result is not None
    return trial, result


def last_state(folder: TrialFolder) -> dict[str, Any]:
    state, refused = load_newest(folder.checkpoints, folder.trial_id)
    assert state is not None and not refused
    return state


def shares(folder: TrialFolder) -> list[tuple[int, dict[str, float]]]:
    """(step, task -> share) of every change of the shares."""
    rows = [(step, {k: v for k, v in values.items() if k.startswith("mixture/share/")}) for step, values in curve(folder)]
    return [(step, values) for step, values in rows if values]


def assert_same_weights(one: TrialFolder, two: TrialFolder) -> None:
    for name, weight in final_weights(one).items():
        assert torch.equal(weight, final_weights(two)[name]), name


def assert_close(one: TrialFolder, two: TrialFolder) -> None:
    for (step, a), (_, b) in zip(curve(one), curve(two), strict=True):
        assert a == pytest.approx(b, rel=2e-4), step
    for name, weight in final_weights(one).items():
        torch.testing.assert_close(weight, final_weights(two)[name], rtol=1e-3, atol=2e-4, msg=name)


# Resuming

RULES: dict[str, dict[str, Any]] = {
    "adaptive": {"mixture": ADAPTIVE},
    "balance": {"train": {"loss_weighting": "balance"}},
    "uncertainty": {"train": {"loss_weighting": "uncertainty"}},
    "adaptive_balance": {"mixture": {**ADAPTIVE, "batching": "mixed"}, "train": {"loss_weighting": "balance"}},
    "tokens": {"mixture": {"batch_tokens": 48}},
    "adaptive_tokens": {"mixture": {**ADAPTIVE, "batch_tokens": 48}, "train": {"loss_weighting": "uncertainty"}},
}


@pytest.mark.parametrize(
    ("rule", "stop"),
    # Of a segment of 4 steps: in its middle, before the checkpoint of its end, exactly at its end.
    [(rule, stop) for rule in RULES for stop in ((7, 8, 9) if "adaptive" in rule else (7,))],
)
def test_what_a_trial_learns_about_its_mixture_survives_a_stop(
    rule: str, stop: int, make_trial: Make, prepared: Path, tmp_path: Path
) -> None:
    """Stopped while step ``stop`` is logged, a trial goes on from the checkpoint of the step before."""
    settings = RULES[rule]
    config = make_trial(
        mixture=settings.get("mixture", {}),
        train={"steps": 14, "log_every": 1, "checkpoint_every": 1, **settings.get("train", {})},
    )
    whole, expected = train(config, tmp_path / "whole", prepared)
    broken = TrialFolder(tmp_path / "broken", config.trial_id)
    with pytest.raises(Stopped):
        run_trial(config, broken, prepared, report=stop_at(stop))
    assert last_state(broken)["step"] == stop - 1
    broken, result = train(config, tmp_path / "broken", prepared)
    assert result.resume == {"count": 1, "exact": True, "differences": []}
    assert result.scores == expected.scores and curve(broken) == curve(whole)
    assert_same_weights(whole, broken)
    states = last_state(whole), last_state(broken)
    for name in ("mixing", "segments"):
        assert states[0][name] == states[1][name]
    assert states[0]["weights"].keys() == states[1]["weights"].keys()
    for name, value in states[0]["weights"].items():
        assert torch.equal(value, states[1]["weights"][name]), name
    if "adaptive" in rule:
        assert [step for step, _ in shares(broken)] == [4, 8, 12]
        assert len({tuple(values.values()) for _, values in shares(broken)}) == 3
        assert all(sum(values.values()) == pytest.approx(1) for _, values in shares(broken))


@pytest.mark.parametrize("rule", ["balance", "uncertainty", "size"])
def test_a_loss_weighting_changes_what_is_learned(rule: str, make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    low = {"low_resource": {"toy/pos": 8}}
    plain, weighted = (
        train(make_trial(mixture=low, train={"loss_weighting": each, "log_every": 1}), tmp_path / each, prepared)[0]
        for each in ("uniform", rule)
    )
    losses = [[values["train/loss"] for _, values in curve(folder)] for folder in (plain, weighted)]
    assert losses[0][0] == losses[1][0], "what is logged is not weighted"
    assert losses[0][-1] != losses[1][-1]


# The loss of a step


@pytest.mark.parametrize("batching", ["single_task", "mixed"])
@pytest.mark.parametrize(
    "mixture", [{"batch_tokens": 240}, {"batch_tokens": 120}, {}], ids=["tokens", "few_tokens", "examples"]
)
def test_a_steps_loss_is_the_mean_over_groups_of_the_mean_over_their_examples(
    mixture: dict[str, Any],
    batching: str,
    make_trial: Make,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every example of every step alone through the network of that moment, against what is differentiated."""
    config = make_trial(
        mixture={**mixture, "batching": batching, "tasks_per_step": 4}, backbone={"dropout": 0.0}, train={"steps": 5}
    )
    tasks = open_tasks(config, prepared)
    batches = StepBatches(config, tasks)
    expected: list[float] = []
    found: list[float] = []
    sizes: list[int] = []
    real_step, real_backward = MultiTaskModule.training_step, MultiTaskModule.manual_backward

    def step(self: MultiTaskModule, forwards: list[Batch], batch_idx: int) -> None:
        means = []
        for group in batches.schedule.groups(self.completed):
            rows = batches.rows[group.task][group.rows]
            with torch.no_grad():
                alone = [
                    self.network.losses(collate([Part(group.task, tasks[group.task], "train", rows[i : i + 1])]))
                    for i in range(len(rows))
                ]
            means.append(sum(float(losses.item()) for [losses] in alone) / len(alone))
            sizes.append(len(rows))
        expected.append(sum(means) / len(means))
        found.append(0.0)
        real_step(self, forwards, batch_idx)

    def backward(self: MultiTaskModule, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        found[-1] += float(loss.detach())
        real_backward(self, loss, *args, **kwargs)

    monkeypatch.setattr(MultiTaskModule, "training_step", step)
    monkeypatch.setattr(MultiTaskModule, "manual_backward", backward)
    train(config, tmp_path, prepared)
    assert len(found) == 5 and found == pytest.approx(expected, rel=1e-5)
    assert (len(set(sizes)) > 1) == ("batch_tokens" in mixture)
    if mixture.get("batch_tokens") == 120:
        assert min(sizes) == 1
    for group in (group for number in range(5) for group in batches.schedule.groups(number)):
        lengths = tasks[group.task].lengths("train")[batches.rows[group.task][group.rows]]
        if config.mixture.group_tokens is not None:
            assert len(lengths) == 1 or len(lengths) * max(lengths) <= config.mixture.group_tokens


def test_the_logged_pace_counts_the_examples_of_the_step(make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    config = make_trial(mixture={"batch_tokens": 48}, train={"steps": 3, "log_every": 1})
    folder, _ = train(config, tmp_path, prepared)
    schedule = StepBatches(config, open_tasks(config, prepared)).schedule
    examples = [sum(len(group.rows) for group in schedule.groups(step)) for step in range(3)]
    assert set(examples) != {config.mixture.batch_size}
    logged = [row["values"]["time/examples_per_s"] * row["values"]["time/step_s"] for row in folder.rows()]
    assert logged == pytest.approx(examples)


@pytest.mark.parametrize("tokens", [120, 240])
def test_mixed_batches_of_tokens_train_as_single_task_groups_do(
    tokens: int, model: dict[str, Any], make_trial: Make, prepared: Path, tmp_path: Path
) -> None:
    one, two = (
        train(
            make_trial(
                model=model,
                backbone={"dropout": 0.0},
                mixture={"batch_tokens": tokens, "batching": batching, "tasks_per_step": 4},
                train={"log_every": 1},
            ),
            tmp_path / batching,
            prepared,
        )[0]
        for batching in ("single_task", "mixed")
    )
    assert_close(one, two)


@pytest.mark.parametrize("rule", ["adaptive", "balance", "uncertainty"])
def test_mixed_batches_follow_the_same_rules(rule: str, make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    settings = RULES[rule]
    one, two = (
        train(
            make_trial(
                backbone={"dropout": 0.0},
                mixture={**settings.get("mixture", {}), "batching": batching, "tasks_per_step": 4},
                train={"log_every": 1, **settings.get("train", {})},
            ),
            tmp_path / batching,
            prepared,
        )[0]
        for batching in ("single_task", "mixed")
    )
    assert_close(one, two)
    assert [step for step, _ in shares(one)] == ([4, 8, 12] if rule == "adaptive" else [])


@pytest.mark.parametrize("backbone", ["tiny-encoder", "tiny-bart", "tiny-t5"])
def test_activations_that_are_computed_again_give_the_same_losses(
    backbone: str, model: dict[str, Any], make_trial: Make, specs: dict[str, TaskSpec], tmp_path: Path
) -> None:
    """With dropout: the second computation drops what the first one dropped."""
    root = tmp_path / "prepared"
    folders = []
    for again in (False, True):
        config = make_trial(
            model=model, backbone={"name": backbone, "gradient_checkpointing": again}, train={"log_every": 1, "steps": 6}
        )
        prepare([config], specs, root)
        folders.append(train(config, tmp_path / str(again), root)[0])
    plain, again = folders
    assert plain.trial_id != again.trial_id
    for (_, a), (_, b) in zip(curve(plain), curve(again), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_groups_of_examples_as_they_come_train_too(make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"backbone": {"dropout": 0.0}, "train": {"steps": 100, "log_every": 50}}
    config = make_trial(mixture={"bucketing": False}, **settings)
    _, result = train(config, tmp_path / "loose", prepared)
    accuracy, floor = (table["test"]["toy/pos"]["accuracy"] for table in (result.scores, result.floors))
    assert accuracy is not None and floor is not None and accuracy > floor + 0.2
    loose, sorted_ = (StepBatches(c, open_tasks(c, prepared)) for c in (config, make_trial(**settings)))
    spread = [
        np.mean([np.ptp(b.tasks[part.task].lengths("train")[part.rows]) for step in range(40) for part in b._parts(step)])
        for b in (loose, sorted_)
    ]
    assert spread[0] > 2 * spread[1], "sorted groups hold examples of similar length, the others do not"


# Several workers

WORKERS: dict[str, dict[str, Any]] = {
    "tokens": {"mixture": {"batch_tokens": 32}},
    "tokens_mixed": {"mixture": {"batch_tokens": 32, "batching": "mixed"}, "model": {"family": "task_moe", "num_experts": 3}},
    "balance": {"train": {"loss_weighting": "balance"}},
    "uncertainty": {"train": {"loss_weighting": "uncertainty"}, "mixture": {"batch_tokens": 32}},
    "adaptive": {"mixture": ADAPTIVE},
    "adaptive_tokens_balance": {"mixture": {**ADAPTIVE, "batch_tokens": 32}, "train": {"loss_weighting": "balance"}},
}


@pytest.fixture(scope="module")
def pool() -> WorkerPool:
    pool = WorkerPool()
    pool.warm()
    return pool


@pytest.mark.slow
@pytest.mark.parametrize("rule", WORKERS)
def test_two_workers_train_as_one_does(rule: str, make_trial: Make, prepared: Path, tmp_path: Path, pool: WorkerPool) -> None:
    settings = WORKERS[rule]
    config = make_trial(
        model=settings.get("model", {"family": "dense"}),
        backbone={"dropout": 0.0},
        mixture=settings.get("mixture", {}),
        train={"log_every": 1, **settings.get("train", {})},
    )
    one, alone = train(config, tmp_path / "one", prepared)
    two = TrialFolder(tmp_path / "two", config.trial_id)
    two.write_config(config)
    job = Job(storage=tmp_path / "two", trial_id=config.trial_id, prepared=prepared)
    workers = [pool.start(each) for each in gang_jobs(job, 2)]
    assert [finish(worker)[0] for worker in workers] == ["done", "done"], two.log.read_text()
    result = two.result()
    assert result is not None and (alone.workers, result.workers) == (1, 2)
    assert_close(one, two)
    if config.mixture.batch_tokens is not None:
        batches = StepBatches(config, open_tasks(config, prepared))
        smallest = min(len(group.rows) for step in range(4) for group in batches.schedule.groups(step))
        assert smallest == 1, "some group must leave a worker without an example"


# Few examples

FEW = {"data": {"few_shot": 3}, "train": {"steps": 2}}


def seen(batches: StepBatches, steps: int) -> dict[int, set[int]]:
    """Task number -> numbers of the examples that the steps hold."""
    found: dict[int, set[int]] = {}
    for step in range(steps):
        for group in batches.schedule.groups(step):
            found.setdefault(group.task, set()).update(batches.rows[group.task][group.rows].tolist())
    return found


def test_a_few_shot_trial_uses_k_per_class_of_train_and_dev_and_all_of_test(
    make_trial: Make, prepared: Path, tmp_path: Path
) -> None:
    config = make_trial(**FEW)
    _, result = train(config, tmp_path, prepared)
    tasks = open_tasks(config, prepared)
    batches = StepBatches(config, tasks)
    for number, task in enumerate(tasks):
        used = {split: result.data[task.name][split] for split in ("train", "dev", "test")}
        assert used == {"train": 6, "dev": 6, "test": 24}
        assert seen(batches, 200)[number] == set(chosen_rows(config, task, "train").tolist())
        for split in ("train", "dev"):
            if task.kind == "classification":
                labels = task.targets(split, chosen_rows(config, task, split))
                assert Counter(labels) == {0: 3, 1: 3}
    accuracy = result.scores["dev"]["toy/sentiment"]["accuracy"]
    assert accuracy is not None and accuracy * 6 == pytest.approx(round(accuracy * 6)), "scored on six examples"


def test_draws_differ_and_a_smaller_k_is_part_of_a_larger_one(make_trial: Make, prepared: Path) -> None:
    tasks = open_tasks(make_trial(), prepared)

    def sample(k: int, draw: int, split: Any = "train") -> list[tuple[int, ...]]:
        config = make_trial(data={"few_shot": k, "draw": draw})
        return [tuple(chosen_rows(config, task, split).tolist()) for task in tasks]

    for split in ("train", "dev"):
        draws = [sample(3, draw, split) for draw in range(5)]
        for number in range(len(tasks)):
            assert len({rows[number] for rows in draws}) == 5
        for draw in range(5):
            for small, large in zip(sample(2, draw, split), sample(5, draw, split), strict=True):
                assert set(small) < set(large)
    assert make_trial(data={"few_shot": 3}).trial_id != make_trial(data={"few_shot": 3, "draw": 1}).trial_id


def test_low_resource_leaves_a_part_of_the_few_shot_sample(make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    config = make_trial(mixture={"low_resource": {"toy/pos": 4}}, **FEW)
    _, result = train(config, tmp_path, prepared)
    assert [result.data[name]["train"] for name in config.mixture.tasks] == [6, 6, 4]
    assert result.data["toy/pos"]["dev"] == 6
    pos = open_tasks(config, prepared)[2]
    sample = chosen_rows(make_trial(**FEW), pos, "train")
    assert set(chosen_rows(config, pos, "train").tolist()) < set(sample.tolist())


# Held-out tasks

TEXT = ("toy/sentiment", "kind/classification", "kind/text2text")


@pytest.fixture(scope="module")
def make_text(
    catalogue: Path, every_kind: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Callable[..., TrialConfig], Path]:
    """``make(names, mixture, train)``: a tiny text-to-text trial, and the folder of its data."""
    tasks = load_catalogues([catalogue, every_kind], Path())
    root = tmp_path_factory.mktemp("text")

    def make(names: tuple[str, ...], mixture: Mapping[str, Any], **train: Any) -> TrialConfig:
        plain = {
            "backbone": {"name": "tiny-t5", "max_length": 48, "max_target_length": 8,
                         "size": {**SIZE, "tokenizer_tasks": sorted(TEXT)}},
            "mixture": {"tasks": names, "batch_size": 8, "tasks_per_step": 2, **mixture},
            "data": {"form": "text2text", "max_train": 50, "max_eval": 4},
            "generation": {"beams": 1},
            "train": {"steps": 10, "lr": 3e-3, "log_every": 1, "checkpoint_every": 5, **train},
            "digests": {name: pose(tasks[name]).digest() for name in TEXT},
        }  # fmt: skip
        config = build(TrialConfig, plain, "trial")
        prepare([config], tasks, root)
        return config

    return make, root


WITHOUT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "uniform": ({}, {}),
    "adaptive": (ADAPTIVE, {}),
    "balance": ({}, {"loss_weighting": "balance"}),
    "uncertainty": ({"low_resource": {"toy/sentiment": 10}}, {"loss_weighting": "uncertainty"}),
    "size": ({"low_resource": {"toy/sentiment": 10}}, {"loss_weighting": "size"}),
}


@pytest.mark.parametrize("rule", WITHOUT)
@pytest.mark.parametrize("first", [True, False], ids=["held_out_first", "held_out_last"])
def test_a_held_out_task_is_scored_and_changes_nothing_of_the_training(
    first: bool, rule: str, make_text: tuple[Callable[..., TrialConfig], Path], tmp_path: Path
) -> None:
    make, root = make_text
    mixture, settings = WITHOUT[rule]
    trained = TEXT[:2]
    names = (TEXT[2], *trained) if first else TEXT
    without, alone = train(make(trained, mixture, clip=None, **settings), tmp_path / "without", root)
    config = make(names, {**mixture, "held_out": (TEXT[2],)}, clip=None, **settings)
    holding, result = train(config, tmp_path / "with", root)
    for split in ("dev", "test"):
        scored = {task: result.scores[split][task] for task in trained}
        assert scored == alone.scores[split]
        assert result.scores[split][TEXT[2]]["exact_match"] is not None
        assert result.floors[split][TEXT[2]]["exact_match"] is not None
    assert (result.data[TEXT[2]]["train"], result.data[TEXT[2]]["test"]) == (0, 4)
    logged = {name for _, values in curve(holding) for name in values}
    assert {f"train/loss/{task}" for task in trained} <= logged
    assert not {name for name in logged if TEXT[2] in name}
    assert curve(holding) == curve(without)
    assert_same_weights(without, holding)


# Regression


@pytest.mark.parametrize("form", ["centred", "raw"])
def test_labels_far_from_zero_are_learned_on_their_own_scale(form: str, tmp_path: Path) -> None:
    """Labels of 1000 +- 1 (``raw``) or 0 +- 1: the same task, so the same correlation, and errors of the same size."""
    rng = random.Random(5)
    level = 1000.0 if form == "raw" else 0.0
    words = {"up": 1, "down": -1, "road": 0, "song": 0}
    for split, n in (("train", 120), ("dev", 10), ("test", 40)):
        texts = [[rng.choice(list(words)) for _ in range(rng.randint(2, 6))] for _ in range(n)]
        rows = [{"text": " ".join(text), "label": level + sum(words[w] for w in text) / 1.3} for text in texts]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"name": "level", "kind": "regression", "files": {s: f"{s}.jsonl" for s in ("train", "dev", "test")}}
    (tmp_path / "level.yaml").write_text(yaml.safe_dump({"tasks": [entry]}))
    tasks = load_catalogues([tmp_path / "level.yaml"], Path())
    plain = {
        "backbone": {"max_length": 32, "dropout": 0.0, "size": {**SIZE, "tokenizer_tasks": ["level"]}},
        "mixture": {"tasks": ["level"], "batch_size": 16, "tasks_per_step": 1},
        "train": {"steps": 150, "lr": 3e-3, "log_every": 150},
        "digests": {"level": tasks["level"].digest()},
    }
    config = build(TrialConfig, plain, "trial")
    prepare([config], tasks, tmp_path / "prepared")
    _, result = train(config, tmp_path / "runs", tmp_path / "prepared")
    scores, floor = result.scores["test"]["level"], result.floors["test"]["level"]["mse"]
    assert scores["pearson"] is not None and scores["pearson"] > 0.5
    assert floor is not None and 0.5 < floor < 5 and scores["mse"] is not None and scores["mse"] < 0.75 * floor
