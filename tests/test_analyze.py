"""Finished trials come back as they were, and knock-outs and swaps find what was planted."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_modules.building import ConfigError
from lightning_modules.checkpoints import list_checkpoints
from lightning_modules.config import TrialConfig
from lightning_modules.data.prepared import prepare
from lightning_modules.data.tasks import TaskSpec
from lightning_modules.gang import Gang
from lightning_modules.measure.evaluation import evaluate
from pipelines.analyze import Knockout, Probe, Swap, _alike, _mass, knockout, main, swap
from pipelines.restore import restore
from pipelines.store import TrialFolder
from pipelines.trial import run_trial

Train = Callable[..., str]
OWN = {"family": "task_moe", "num_experts": 4, "expert": "layer", "init": "fresh", "router": {"kind": "task_id"}}
"""Every task has an expert of its own, which nothing else can stand in for, and one is nobody's."""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(make_trial: Callable[..., TrialConfig], specs: dict[str, TaskSpec], storage: Path) -> Train:
    """``trained(model, ...)``: the id of a finished trial in ``storage``."""

    def train(model: dict[str, object], steps: int = 12, lr: float = 3e-3, **settings: object) -> str:
        config = make_trial(
            model=model, train={"steps": steps, "log_every": steps, "checkpoint_every": steps, "lr": lr}, **settings
        )
        folder = TrialFolder(storage, config.trial_id)
        prepare([config], specs, storage / "prepared")
        folder.write_config(config)
        run_trial(config, folder, storage / "prepared")
        return config.trial_id

    return train


@pytest.fixture(scope="module")
def own(trained: Train) -> str:
    return trained(OWN, steps=200, lr=1e-2, backbone={"dropout": 0.0})


@pytest.mark.parametrize(
    "model",
    [
        {"family": "dense"},
        OWN,
        {"family": "task_moe", "num_experts": 3, "router": {"kind": "token", "conditioning": "per_task"}},
        {
            "family": "task_moe",
            "num_experts": 3,
            "router": {"temperature": 2.0, "temperature_decay": 0.1, "temperature_min": 0.5},
        },
        {"family": "adapter_moe", "num_experts": 3, "bottleneck": 4},
    ],
    ids=["dense", "task_id", "token", "annealed", "adapter"],
)
def test_a_restored_network_scores_as_the_trial_did(model: dict[str, object], trained: Train, storage: Path) -> None:
    restored = restore(storage, trained(model))
    scores = evaluate(restored.network, restored.config, restored.tasks, "test", Gang(), torch.device("cpu")).scores
    for task, metrics in restored.result.scores["test"].items():
        for metric, value in metrics.items():
            assert scores[task][metric] == (value if value is None else pytest.approx(value, abs=1e-6)), (task, metric)
    assert not restored.network.training


def test_what_cannot_be_restored_says_why(
    trained: Train, storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="there is no such trial"):
        restore(storage, "task_moe-00000000")
    trial_id = trained({"family": "task_moe", "num_experts": 2}, steps=3)
    folder = TrialFolder(storage, trial_id)
    kept = [(path, path.read_bytes()) for path in list_checkpoints(folder.checkpoints)]
    for path, _ in kept:
        path.unlink()
    with pytest.raises(ConfigError, match=r"needs the checkpoint of its last step, 3, .* got none"):
        restore(storage, trial_id)
    for path, content in kept:
        path.write_bytes(content)
    (storage / "prepared").rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(ConfigError, match="prepared data are gone"):
            restore(storage, trial_id)
    finally:
        (tmp_path / "elsewhere").rename(storage / "prepared")
    result = (folder.path / "result.json").read_bytes()
    (folder.path / "result.json").unlink()
    with pytest.raises(ConfigError, match="must have finished"):
        restore(storage, trial_id)
    assert main(["knockout", trial_id, "--storage", str(storage)]) == 2
    assert capsys.readouterr().err.startswith(f"analyze.py: {trial_id}: must have finished")
    (folder.path / "result.json").write_bytes(result)


def test_a_knocked_out_expert_hurts_the_task_that_uses_it(own: str, storage: Path) -> None:
    found = knockout(Probe(restore(storage, own), "test"), draws=8)
    assert found.usage.shape == found.loss.shape == (3, 2, 4)
    for task in range(3):
        for block in range(2):
            others = [e for e in range(4) if e != task]
            assert found.usage[task, block, task] == 1
            np.testing.assert_allclose(found.loss[task, block, others], 0, atol=1e-9)
    assert (found.route == np.arange(3)[:, None]).all()
    assert found.difference.mean() > 0.03, (found.own, found.random)
    assert all(found.own[t] > found.random[t].mean() + 0.03 for t in (0, 2)), (found.own, found.random)
    interval = found.interval()
    assert interval is not None and interval.n == 3 and interval.mean == pytest.approx(found.difference.mean())


def test_a_swapped_route_hurts_and_the_own_one_does_not(own: str, storage: Path) -> None:
    probe = Probe(restore(storage, own), "dev")
    found = swap(probe)
    np.testing.assert_allclose(np.diag(found.loss), 0, atol=1e-9)
    assert found.mean.mean() > 0.05, found.loss
    np.testing.assert_allclose(probe._scores(None), probe.base)  # nothing stays tampered with


def test_the_commands_write_their_files(own: str, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knockout", own, "--storage", str(storage), "--draws", "3"]) == 0
    assert main(["swap", own, "--storage", str(storage), "--split", "dev"]) == 0
    text = capsys.readouterr().out
    assert "more to it than random routes of like mass" in text and "more to it than another task's" in text
    folder = TrialFolder(storage, own).measurements
    with np.load(folder / "knockout.npz") as arrays:
        assert arrays["loss"].shape == (3, 2, 4) and arrays["random"].shape == (3, 3)
    with (folder / "knockout.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [sum(row["without"] == what for row in rows) for what in ("expert", "own route", "random route")] == [24, 3, 9]
    with (folder / "swap.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6


def test_a_knockout_is_the_same_again(own: str, storage: Path) -> None:
    first, second = (knockout(Probe(restore(storage, own), "dev"), draws=4) for _ in range(2))
    np.testing.assert_array_equal(first.random, second.random)
    np.testing.assert_array_equal(first.loss, second.loss)


@pytest.mark.parametrize(
    "model, check, law",
    [
        ({"family": "dense"}, knockout, "must have a mixture of experts"),
        ({"family": "task_moe", "num_experts": 1}, knockout, "more than one expert"),
        ({"family": "task_moe", "num_experts": 2, "router": {"kind": "token", "selection": "slots"}}, knockout, "must choose"),
        ({"family": "task_moe", "num_experts": 2, "router": {"kind": "token"}}, swap, "must depend on the task"),
        ({"family": "task_moe", "num_experts": 2, "router": {"kind": "uniform"}}, swap, "must depend on the task"),
    ],
    ids=["dense", "one_expert", "slots", "task_agnostic", "uniform"],
)
def test_what_cannot_be_asked_is_refused(
    model: dict[str, object], check: Callable[[Probe], object], law: str, trained: Train, storage: Path
) -> None:
    trial_id = trained(model, steps=3)
    with pytest.raises(ConfigError, match=law):
        check(Probe(restore(storage, trial_id), "dev"))


def test_a_mask_must_leave_an_expert(own: str, storage: Path) -> None:
    with pytest.raises(ConfigError, match="block 1 must keep an expert"):
        Probe(restore(storage, own), "dev").without({1: range(4)})


def test_random_routes_have_the_mass_of_the_own_one() -> None:
    generator = np.random.default_rng(0)
    shares = generator.dirichlet(np.full(8, 0.5), size=4)
    own = np.array([0, 3, 5, 7])
    drawn = _alike(shares, [8] * 4, own, 20, generator)
    assert drawn.shape == (20, 4) and len(np.unique(drawn, axis=0)) == 20 and not (drawn == own).all(1).any()
    everyone = np.stack([generator.integers(8, size=2000) for _ in range(4)], axis=1)
    spread = np.abs(_mass(shares, everyone) - _mass(shares, own)).mean()
    assert np.abs(_mass(shares, drawn) - _mass(shares, own)).max() < spread / 5
    assert _alike(shares[:1, :2], [2], np.array([1]), 20, generator).tolist() == [[0]]


def knocked(own: list[float], random: list[list[float]]) -> Knockout:
    tasks = len(own)
    return Knockout(
        tasks=[f"t{i}" for i in range(tasks)], metrics=["accuracy"] * tasks, blocks=[0], base=np.full(tasks, 0.8),
        usage=np.full((tasks, 1, 2), 0.5), loss=np.zeros((tasks, 1, 2)), route=np.zeros((tasks, 1), dtype=int),
        own=np.array(own), own_mass=np.full(tasks, 0.5), random=np.array(random), random_mass=np.full((tasks, 2), 0.5),
    )  # fmt: skip


def test_verdicts() -> None:
    even = [[0.0, 0.02], [0.01, 0.01], [0.0, 0.0]]
    assert knocked([0.2, 0.25, 0.22], even).lines()[0].startswith("routes matter: a task's own route is worth +21.7 [")
    assert knocked([0.2, -0.2, 0.01], even).lines()[0].startswith("not shown that routes matter")
    assert knocked([-0.2, -0.25, -0.22], even).lines()[0].startswith("routes hurt their own tasks")
    undefined = knocked([0.2, np.nan, 0.2], even)
    assert "2 tasks" in undefined.lines()[0] and undefined.table().row_count == 3
    assert knocked([np.nan], [[np.nan, np.nan]]).lines() == [
        "no verdict: no task has a random route of another kind to compare with"
    ]
    lonely = Swap(tasks=["a"], metrics=["mse"], base=np.array([-1.0]), loss=np.array([[0.0]]))
    assert lonely.lines() == ["no verdict: no task has a score"]
    assert replace(lonely, tasks=["a", "b"], metrics=["mse"] * 2, base=np.zeros(2), loss=np.array([[0, 2.0], [3.0, 0]])).lines()
