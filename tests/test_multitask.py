"""The training step: golden loss curves, idle experts, learning rates, and the auxiliary loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.config import NUMERICS_VERSION, TrainConfig, TrialConfig
from lightning_modules.data.batches import StepBatches
from lightning_modules.data.prepared import open_tasks
from lightning_modules.multitask import LossMeans, MultiTaskModule, lr_factor, parameter_groups
from pipelines.store import TrialFolder
from pipelines.trial import run_trial

Make = Callable[..., TrialConfig]
GOLDEN = Path(__file__).parent / "golden"
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {"family": "dense"},
    "task_moe": {"family": "task_moe", "num_experts": 3, "router": {"mutual_information": 0.1}},
    "adapter_moe": {"family": "adapter_moe", "num_experts": 3, "bottleneck": 4},
}


def train(config: TrialConfig, prepared: Path, folder: Path) -> TrialFolder:
    trial = TrialFolder(folder, config.trial_id)
    run_trial(config, trial, prepared)
    return trial


def new_module(config: TrialConfig, prepared: Path) -> MultiTaskModule:
    tasks = open_tasks(config, prepared)
    return MultiTaskModule(config, tasks, StepBatches(config, tasks))


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_losses(family: str, make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    """20 steps must give the losses that are on file. Where a change of the code is meant to alter numbers, raise
    ``NUMERICS_VERSION`` and accept the new curve by deleting the file and running this test twice."""
    config = make_trial(model=FAMILIES[family], train={"steps": 20, "log_every": 1})
    rows = train(config, prepared, tmp_path).rows()
    losses = [row["values"]["train/loss"] for row in rows]
    file = GOLDEN / f"losses_{family}.txt"
    head = f"numerics {NUMERICS_VERSION}"
    if not file.exists():
        file.write_text("\n".join([head, *(f"{loss:.9g}" for loss in losses)]) + "\n")
        pytest.fail(f"{file.name} was missing and has been written; run again to compare with it")
    first, *expected = file.read_text().splitlines()
    assert first == head, f"NUMERICS_VERSION has been raised: delete tests/golden/{file.name} to accept the new curve"
    # Not to the bit: other CPUs sum in other orders. What a real change moves is orders of magnitude larger.
    assert losses == pytest.approx([float(line) for line in expected], rel=2e-5)


def test_the_same_trial_twice_is_the_same_to_the_bit(
    model: dict[str, Any], make_trial: Make, prepared: Path, tmp_path: Path
) -> None:
    config = make_trial(model=model)
    one, two = (train(config, prepared, tmp_path / name) for name in ("one", "two"))
    assert [r["values"]["train/loss"] for r in one.rows()] == [r["values"]["train/loss"] for r in two.rows()]


def test_mixed_batches_train_as_single_task_groups_do(
    model: dict[str, Any], make_trial: Make, prepared: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"model": model, "backbone": {"dropout": 0.0}, "train": {"log_every": 1}}
    curves = []
    for batching in ("single_task", "mixed"):
        config = make_trial(**settings, mixture={"batching": batching, "tasks_per_step": 4})
        curves.append([row["values"]["train/loss"] for row in train(config, prepared, tmp_path / batching).rows()])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_experts_that_no_task_uses_stand_still(make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    model = {"family": "task_moe", "num_experts": 8, "router": {"kind": "random"}}
    config = make_trial(model=model, train={"weight_decay": 0.1})
    before = new_module(config, prepared).network.state_dict()
    trial = train(config, prepared, tmp_path)
    state = torch.load(sorted(trial.checkpoints.iterdir())[-1], weights_only=True)["network"]
    routers = new_module(config, prepared).network.routers
    assert routers is not None
    used = {block: set(r.chosen.flatten().tolist()) for block, r in routers.of_tasks(torch.arange(3)).items()}
    moved = {True: 0, False: 0}
    for name, weight in state.items():
        if ".experts." not in name:
            continue
        layer, expert = int(name.split(".layer.")[1].split(".")[0]), int(name.split(".experts.")[1].split(".")[0])
        same = torch.equal(weight, before[name])
        assert same != (expert in used[layer]), name
        moved[same] += 1
    assert moved[True] and moved[False]


def test_learning_rate_schedules() -> None:
    linear = TrainConfig(steps=100, warmup=0.1, schedule="linear")
    assert lr_factor(linear, 0) == pytest.approx(1 / 11) and lr_factor(linear, 9) == pytest.approx(10 / 11)
    assert lr_factor(linear, 10) == 1.0 and lr_factor(linear, 55) == pytest.approx(0.5) and lr_factor(linear, 100) == 0.0
    cosine = TrainConfig(steps=100, warmup=0.0, schedule="cosine")
    assert lr_factor(cosine, 0) == 1.0 and lr_factor(cosine, 50) == pytest.approx(0.5) and lr_factor(cosine, 100) < 1e-9
    assert lr_factor(TrainConfig(steps=10, warmup=0.0, schedule="constant"), 9) == 1.0


def test_routers_have_their_own_rate_and_vectors_no_decay(make_trial: Make, prepared: Path) -> None:
    config = make_trial(model={"family": "task_moe", "num_experts": 2, "router": {"lr_scale": 7.0}})
    network = new_module(config, prepared).network
    groups = parameter_groups(network, config)
    names = {id(p): name for name, p in network.named_parameters()}
    listed = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(names.values())
    for group in groups:
        for parameter in group["params"]:
            router = "router" in names[id(parameter)]
            assert group["lr"] == pytest.approx(config.train.lr * (7.0 if router else 1.0))
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1 and not router)


def test_a_frozen_backbone_trains_only_what_was_added(make_trial: Make, prepared: Path) -> None:
    config = make_trial(model=FAMILIES["adapter_moe"], backbone={"frozen": True})
    network = new_module(config, prepared).network
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained and all("experts" in n or "router" in n or n.startswith("heads") for n in trained)


def test_mutual_information_separates_tasks(make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 1.0):
        router = {"selection": "soft", "mutual_information": weight}
        config = make_trial(
            model={"family": "task_moe", "num_experts": 3, "router": router}, train={"steps": 120, "log_every": 60}
        )
        trial = train(config, prepared, tmp_path)
        result = trial.result()
        assert result is not None
        found[weight] = result.measurements["route/nmi"]
    assert found[1.0] > found[0.0] + 0.1, found


def test_loss_means_are_per_task_and_start_anew() -> None:
    means = LossMeans(2)
    means.add(0, torch.tensor([1.0, 3.0]))
    means.add(1, torch.tensor([8.0]))
    assert means.read(["a", "b"]) == ({"train/loss": 4.0, "train/loss/a": 2.0, "train/loss/b": 8.0}, 3)
    means.add(1, torch.tensor([1.0]))
    state = means.state()
    other = LossMeans(2)
    other.load(state)
    assert other.read(["a", "b"]) == means.read(["a", "b"]) == ({"train/loss": 1.0, "train/loss/b": 1.0}, 1)
