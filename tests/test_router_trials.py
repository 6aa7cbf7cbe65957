"""Routers through whole trials: what they learn and count resumes to the bit, and no cut of a step changes it."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CATALOGUE, HEADS, losses, shake, tiny_batch, tiny_network
from test_every_router import MODELS, REFORMS, name_of
from test_mixture_trials import SIZE, assert_close, assert_same_weights, last_state, train
from test_trial import Stopped, curve, final_weights, finish, gang_jobs, stop_at
from torch.nn import functional

from lightning_modules.building import ConfigError, build
from lightning_modules.config import TaskMoEConfig, TrialConfig
from lightning_modules.data.batches import Batch, StepBatches, chosen_rows
from lightning_modules.data.posing import pose
from lightning_modules.data.prepared import open_tasks, prepare
from lightning_modules.data.tasks import TaskSpec, load_catalogues
from lightning_modules.gang import Gang
from lightning_modules.measure.evaluation import evaluate
from lightning_modules.measure.routing import RoutingTally
from lightning_modules.multitask import MultiTaskModule
from lightning_modules.network.routers.record import Record
from lightning_modules.network.routers.routers import Routers
from lightning_modules.task_vectors import task_vectors
from pipelines.store import TrialFolder
from pipelines.trial import run_trial
from pipelines.workers import Job, WorkerPool

Make = Callable[..., TrialConfig]
Settings = dict[str, Any]
TOKEN: Settings = {"kind": "token", "init_std": 1.0}
EXAMPLE: Settings = {"kind": "example", "init_std": 1.0}
STRONG: Settings = {"balance_weight": 1.0, "balance_window": 4}


def moe(router: Settings, **model: Any) -> Settings:
    return {"family": "task_moe", "num_experts": 4, "router": router, **model}


def new_module(config: TrialConfig, prepared: Path) -> MultiTaskModule:
    tasks = open_tasks(config, prepared)
    return MultiTaskModule(config, tasks, StepBatches(config, tasks), vectors=task_vectors(config, tasks, prepared))


def arrays(folder: TrialFolder) -> dict[str, dict[str, np.ndarray]]:
    """File name -> what it holds, of every routing that was measured."""
    found = {}
    for file in sorted((folder.measurements / "routing").iterdir()):
        with np.load(file, allow_pickle=False) as read:
            found[file.name] = dict(read)
    return found


# Resuming

STATEFUL: dict[str, Settings] = {
    "token_bias": {**TOKEN, "balance": "bias", "score": "sigmoid"},
    "token_per_task_load": {**TOKEN, "conditioning": "per_task", "balance": "load", "balance_scope": "global", **STRONG},
    "token_jitter_cv": {**TOKEN, "noise": "jitter", "balance": "cv", **STRONG},
    "mod_squad": {**TOKEN, "conditioning": "per_task", "top_k": 2, "weighting": "raw", "mutual_information": 0.5},
    "cluster": {"kind": "cluster"},
    "gumbel_st": {"selection": "gumbel_st", "temperature": 5.0, "temperature_decay": 0.2, "temperature_min": 0.5},
    "gumbel_by_example": {"selection": "gumbel", "draw": "example", "temperature_decay": 0.2, "temperature_min": 0.5},
    "skills": {"selection": "skills", "combine": "parameters"},
    "adamix": {"kind": "random_example", "consistency": 1.0},
    "reinforce": {**EXAMPLE, "selection": "sampled", "policy": 1.0},
    "task_dropout": {"top_k": 2, "expert_dropout": 0.4},
    "smear": {**EXAMPLE, "selection": "soft", "combine": "parameters", "normalise": True, "expert_dropout": 0.3},
    "diversity": {"selection": "soft", "diversity": 1.0, "entropy": 0.1},
}
"""What holds something from one step to the next, or draws."""


@pytest.mark.parametrize("router", STATEFUL)
def test_what_a_router_holds_survives_a_stop(router: str, make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    config = make_trial(model=moe(STATEFUL[router]), train={"steps": 9, "log_every": 1, "checkpoint_every": 2, "eval_every": 3})
    whole, expected = train(config, tmp_path / "whole", prepared)
    broken = TrialFolder(tmp_path / "broken", config.trial_id)
    with pytest.raises(Stopped):
        run_trial(config, broken, prepared, report=stop_at(6))
    assert last_state(broken)["step"] == 4
    broken, result = train(config, tmp_path / "broken", prepared)
    assert result.resume == {"count": 1, "exact": True, "differences": []}
    assert curve(broken) == curve(whole)
    assert result.scores == expected.scores and result.measurements == expected.measurements
    assert_same_weights(whole, broken)
    for name, before in arrays(whole).items():
        after = arrays(broken)[name]
        assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before), name


def test_a_running_router_is_in_the_checkpoint(make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    router = STATEFUL["token_bias"] | {"temperature": 4.0, "temperature_decay": 0.1, "temperature_min": 1.0}
    folder, _ = train(make_trial(model=moe(router)), tmp_path, prepared)
    state = final_weights(folder)
    assert state["routers.step"] == 12
    for block in ("0", "1"):
        bias, share = state[f"routers.tables.{block}.bias"], state[f"routers.tables.{block}.share"]
        assert bias.abs().max() > 0 and bias.sum().abs() < 1e-6
        torch.testing.assert_close(share.sum(-1), torch.ones(3))


# The cut of a step

DETERMINISTIC: dict[str, Settings] = {
    "token_load": {**TOKEN, "balance": "load", **STRONG},
    "token_load_global": {**TOKEN, "balance": "load", "balance_scope": "global", **STRONG},
    "token_load_per_task": {**TOKEN, "conditioning": "per_task", "balance": "load", "balance_scope": "per_task", **STRONG},
    "token_cv": {**TOKEN, "top_k": 2, "balance": "cv", **STRONG},
    "token_information": {**TOKEN, "conditioning": "film", "mutual_information": 1.0, "z_loss": 0.1, "entropy": 0.1},
    "token_bias": {**TOKEN, "balance": "bias", "balance_scope": "global"},
    "example_per_task": {**EXAMPLE, "conditioning": "per_task", "balance": "load", **STRONG},
    "cluster": {"kind": "cluster"},
    "task_exact": {"selection": "soft", "init_std": 1.0, "mutual_information": 1.0, "balance": "load", "balance_weight": 1.0},
    "diversity": {**EXAMPLE, "diversity": 1.0},
}
"""Routers without draws, with every loss and every running table."""


def cut(make: Make, router: str, **mixture: Any) -> TrialConfig:
    return make(
        model=moe(DETERMINISTIC[router]),
        backbone={"dropout": 0.0},
        mixture={"tasks_per_step": 4, **mixture},
        train={"steps": 8, "log_every": 1},
    )


@pytest.mark.parametrize("router", DETERMINISTIC)
@pytest.mark.parametrize("tokens", [None, 120], ids=["examples", "tokens"])
def test_mixed_batches_train_as_single_task_groups_do(
    tokens: int | None, router: str, make_trial: Make, prepared: Path, tmp_path: Path
) -> None:
    one, two = (
        train(cut(make_trial, router, batching=batching, batch_tokens=tokens), tmp_path / batching, prepared)[0]
        for batching in ("single_task", "mixed")
    )
    assert_close(one, two)


def test_the_scope_of_one_forward_depends_on_the_cut(make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    router = {**TOKEN, "balance": "load", "balance_scope": "microbatch", "balance_weight": 1.0}
    one, two = (
        final_weights(
            train(
                make_trial(
                    model=moe(router),
                    backbone={"dropout": 0.0},
                    mixture={"batching": batching, "tasks_per_step": 4},
                    train={"steps": 8, "log_every": 1},
                ),
                tmp_path / batching,
                prepared,
            )[0]
        )
        for batching in ("single_task", "mixed")
    )
    gates = [name for name in one if name.startswith("routers.blocks.")]
    assert gates and all((one[name] - two[name]).abs().max() > 1e-3 for name in gates)


def test_a_row_counts_its_share_of_its_example(make_trial: Make, specs: dict[str, TaskSpec], tmp_path: Path) -> None:
    """Inputs of several windows: each example counts the same, however many rows it has and whatever stands beside it."""
    curves = []
    for batching in ("single_task", "mixed"):
        config = make_trial(
            model=moe(DETERMINISTIC["token_load"]),
            backbone={"dropout": 0.0, "max_length": 8},
            mixture={"batching": batching, "tasks_per_step": 4},
            train={"steps": 8, "log_every": 1},
        )
        prepare([config], specs, tmp_path / "prepared")
        batches = [
            batch for step in range(8) for batch in StepBatches(config, open_tasks(config, tmp_path / "prepared")).batches(step)
        ]
        assert any(rows.owner is not None and len(rows.owner) > len(rows.weights) for b in batches for rows in b.tasks)
        curves.append(train(config, tmp_path / batching, tmp_path / "prepared")[0])
    assert_close(*curves)


@pytest.fixture(scope="module")
def pool() -> WorkerPool:
    pool = WorkerPool()
    pool.warm()
    return pool


def by_two(config: TrialConfig, folder: Path, prepared: Path, pool: WorkerPool) -> TrialFolder:
    """The trial, trained by two workers."""
    two = TrialFolder(folder, config.trial_id)
    two.write_config(config)
    job = Job(storage=folder, trial_id=config.trial_id, prepared=prepared)
    workers = [pool.start(each) for each in gang_jobs(job, 2)]
    assert [finish(worker)[0] for worker in workers] == ["done", "done"], two.log.read_text()
    return two


@pytest.mark.slow
@pytest.mark.parametrize("router", DETERMINISTIC)
def test_two_workers_train_as_one_does(router: str, make_trial: Make, prepared: Path, tmp_path: Path, pool: WorkerPool) -> None:
    config = cut(make_trial, router, batch_size=16)
    one, alone = train(config, tmp_path / "one", prepared)
    two = by_two(config, tmp_path / "two", prepared, pool)
    result = two.result()
    assert result is not None and (alone.workers, result.workers) == (1, 2)
    assert_close(one, two)
    for name, value in arrays(one).items():
        for key in (key for key in value if key.startswith(("weights/", "n/", "q/"))):
            np.testing.assert_allclose(value[key], arrays(two)[name][key], rtol=1e-3, atol=1e-3, err_msg=f"{name} {key}")


@pytest.mark.slow
@pytest.mark.parametrize("router", ["example", "token"])
def test_idle_experts_stand_still_under_two_workers(
    router: str, make_trial: Make, prepared: Path, tmp_path: Path, pool: WorkerPool
) -> None:
    config = make_trial(
        model=moe({"kind": router, "init_std": 1.0}, num_experts=24),
        backbone={"dropout": 0.0},
        mixture={"tasks_per_step": 4, "batch_size": 16},
        train={"steps": 4, "log_every": 1, "checkpoint_every": 4, "weight_decay": 0.1},
    )
    before = new_module(config, prepared).network.state_dict()
    one, two = train(config, tmp_path / "one", prepared)[0], by_two(config, tmp_path / "two", prepared, pool)
    idle = [
        {n for n, weight in final_weights(folder).items() if ".experts." in n and torch.equal(weight, before[n])}
        for folder in (one, two)
    ]
    assert idle[0] == idle[1] and 0 < len(idle[0]) < sum(".experts." in name for name in before)
    assert_close(one, two)


# Other ways to compute the same

AGAIN: dict[str, Settings] = {
    "token": DETERMINISTIC["token_load"],
    "token_noisy": {**TOKEN, "noise": "gaussian", "top_k": 2, "expert_dropout": 0.2, "balance": "cv", **STRONG},
    "example": {**EXAMPLE, "conditioning": "film", "mutual_information": 0.5},
    "example_smear": STATEFUL["smear"],
    "cluster": {"kind": "cluster"},
    "gumbel_by_example": STATEFUL["gumbel_by_example"],
}


@pytest.mark.parametrize("router", AGAIN)
def test_activations_that_are_computed_again_are_routed_as_they_were(
    router: str, make_trial: Make, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[list[int]] = []
    observed = Routers.observe

    def observe(self: Routers, records: Sequence[Record]) -> None:
        counted.append([record.block for record in records])
        observed(self, records)

    monkeypatch.setattr(Routers, "observe", observe)
    plain, again = (
        train(
            make_trial(model=moe(AGAIN[router]), backbone={"gradient_checkpointing": each}, train={"steps": 6, "log_every": 1}),
            tmp_path / str(each),
            prepared,
        )[0]
        for each in (False, True)
    )
    assert counted == [[0, 1]] * 24, "two trials of six steps of two groups: each forward routes two blocks, each once"
    for (step, a), (_, b) in zip(curve(plain), curve(again), strict=True):
        assert a == pytest.approx(b, rel=1e-5), step
    for name, value in final_weights(plain).items():
        torch.testing.assert_close(value, final_weights(again)[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("router", ["token", "example"])
def test_compiled_blocks_are_routed_as_they_were(router: str, make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    plain, compiled = (
        train(
            make_trial(
                model=moe(AGAIN[router]),
                backbone={"dropout": 0.0},
                train={"steps": 4, "log_every": 1, "compile": each},
            ),
            tmp_path / str(each),
            prepared,
        )[0]
        for each in (False, True)
    )
    for (step, a), (_, b) in zip(curve(plain), curve(compiled), strict=True):
        assert a == pytest.approx(b, rel=1e-3), step


# Interventions


@pytest.mark.parametrize("model", MODELS)
def test_a_swapped_task_takes_the_others_route(model: str) -> None:
    network = tiny_network(MODELS[model]).eval()
    shake(network)
    assert network.routers is not None
    batch, routers = tiny_batch([0]), network.routers
    as_other = replace(batch, tasks=(replace(batch.tasks[0], task=3),))

    def routed(of: Batch) -> tuple[torch.Tensor, list[Record]]:
        records: list[Record] = []
        return network.encode(of, records), records

    own, other = routed(batch), routed(as_other)
    routers.swapped = {0: 3}
    swapped = routed(batch)
    assert torch.equal(swapped[0], other[0])
    for a, b in zip(swapped[1], other[1], strict=True):
        assert torch.equal(a.routing.weights, b.routing.weights) and torch.equal(a.routing.chosen, b.routing.chosen)
        assert (a.units.task == 0).all(), "it is still the first task that is routed"
    config = CATALOGUE[name_of(model)]
    if config.kind == "task" or config.conditioning != "none":
        assert not torch.equal(own[1][0].routing.logits, other[1][0].routing.logits), "the tasks have routes of their own"
    if config.per_task:
        rows = [record.routing.weights for record in routers.records_of_tasks()]
        assert all(torch.equal(of_block[0], of_block[3]) for of_block in rows)


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in REFORMS])
def test_when_all_but_one_are_masked_that_one_does_everything(name: str) -> None:
    network, alone = (tiny_network(TaskMoEConfig(router=CATALOGUE[name])).eval() for _ in range(2))
    for each in (network, alone):
        shake(each)
    for module in alone.routed().values():
        for expert in module.experts:
            expert.load_state_dict(module.experts[2].state_dict())
    assert network.routers is not None
    network.routers.masked = {0: {0, 1, 3}, 1: {0, 1, 3}}
    batch = tiny_batch(range(len(HEADS)))
    torch.testing.assert_close(losses(network, batch), losses(alone, batch), atol=1e-5, rtol=1e-5)
    network.routers.masked = {1: {0, 1, 2, 3}}
    with pytest.raises(ValueError, match="block 1: every expert is masked"):
        losses(network, batch)


# Scoring


@pytest.mark.parametrize("router", ["token_bias", "cluster", "gumbel_st", "adamix", "reinforce"])
def test_scoring_twice_gives_the_same(router: str, make_trial: Make, prepared: Path) -> None:
    config = make_trial(model=moe(STATEFUL[router]))
    module, tasks = new_module(config, prepared), open_tasks(config, prepared)
    routers = module.network.routers
    assert routers is not None
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    found = []
    for _ in range(2):
        tally = RoutingTally(len(tasks), routers.experts)
        result = evaluate(module.network, config, tasks, "dev", Gang(), torch.device("cpu"), tally)
        found.append((result.scores, tally.measure([task.name for task in tasks])))
    assert found[0] == found[1]
    for name, value in module.network.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("router", [DETERMINISTIC["token_load"], {"selection": "soft"}], ids=["token", "task"])
def test_routes_are_measured_whenever_a_trial_is_scored(
    router: Settings, make_trial: Make, prepared: Path, tmp_path: Path
) -> None:
    config = make_trial(model=moe(router), train={"eval_every": 4})
    folder, result = train(config, tmp_path, prepared)
    assert list(arrays(folder)) == ["dev_000000004.npz", "dev_000000008.npz", "dev_000000012.npz", "test_000000012.npz"]
    for held in arrays(folder).values():
        assert held["tasks"].tolist() == list(config.mixture.tasks) and held["blocks"].tolist() == [0, 1]
        np.testing.assert_allclose(held["weights/0"].sum(1), 1)
    names = {"route/nmi", "route/0/churn", "route/0/mi_corrected", "route/1/dropped", "route/task/toy/pos/eff_experts"}
    assert names <= result.measurements.keys()
    scored = [(step, values) for step, values in curve(folder) if "route/nmi" in values]
    assert [step for step, _ in scored] == [4, 8]
    assert ["route/0/churn" in values for _, values in scored] == [False, True]
    assert "score/dev/toy/pos/accuracy" in scored[0][1]


# Two passes


def test_passes_with_routes_of_their_own_are_drawn_together(make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    """AdaMix: its loss changes what is learned, and what is logged is the loss of the first pass alone."""
    found = []
    for weight in (0.0, 5.0):
        config = make_trial(
            model=moe({"kind": "random_example", "consistency": weight}),
            backbone={"dropout": 0.0},
            mixture={"batching": "mixed"},
            train={"steps": 6, "log_every": 1},
        )
        found.append([values["train/loss"] for _, values in curve(train(config, tmp_path / str(weight), prepared)[0])])
    assert found[0][0] == found[1][0] and found[0][1:] != found[1][1:]


@pytest.fixture(scope="module")
def every_task(catalogue: Path, every_kind: Path) -> dict[str, TaskSpec]:
    return load_catalogues([catalogue, every_kind], Path())


def encoder_trial(names: Sequence[str], tasks: dict[str, TaskSpec], root: Path, **settings: Any) -> TrialConfig:
    plain = {
        "backbone": {"max_length": 48, "size": {**SIZE, "tokenizer_tasks": sorted(names)}},
        "mixture": {"tasks": names, "batch_size": 4 * len(names), "tasks_per_step": len(names), "sampling": "uniform"},
        "data": {"max_train": 40, "max_eval": 8},
        "train": {"steps": 4, "lr": 3e-3, "log_every": 1},
        "digests": {name: tasks[name].digest() for name in names},
        **settings,
    }
    config = build(TrialConfig, plain, "trial")
    prepare([config], tasks, root)
    return config


def test_answers_with_a_distribution_are_compared(every_task: dict[str, TaskSpec], tmp_path: Path) -> None:
    names = ("toy/sentiment", "toy/count", "toy/pos", "kind/choice")
    for batching in ("single_task", "mixed"):
        mixture = {"tasks": names, "batch_size": 16, "tasks_per_step": 4, "sampling": "uniform", "batching": batching}
        config = encoder_trial(
            names, every_task, tmp_path / "data", mixture=mixture, model=moe({"kind": "random_example", "consistency": 1.0})
        )
        _, result = train(config, tmp_path / batching, tmp_path / "data")
        assert result.scores["test"].keys() == set(names)


@pytest.mark.parametrize("kind", ["spans", "dependency", "constituency", "srl"])
def test_trees_cannot_be_compared(kind: str, every_task: dict[str, TaskSpec], tmp_path: Path) -> None:
    model = moe({"kind": "random_example", "consistency": 1.0})
    config = encoder_trial((f"kind/{kind}",), every_task, tmp_path / "data", model=model)
    law = rf"model\.router\.consistency: must be 0 with {kind} tasks \(kind/{kind}\), whose answers it cannot compare"
    with pytest.raises(ConfigError, match=law):
        run_trial(config, TrialFolder(tmp_path, config.trial_id), tmp_path / "data")


# What experts learn


def alike(folder: TrialFolder, before: dict[str, torch.Tensor]) -> float:
    """Mean squared cosine between what two experts of a block have learned."""
    deltas: dict[tuple[str, str], list[torch.Tensor]] = {}
    for name, weight in final_weights(folder).items():
        block, found, inside = name.partition(".experts.")
        if found:
            deltas.setdefault((block, inside.split(".")[0]), []).append((weight - before[name]).flatten())
    flat = {key: torch.cat(parts) for key, parts in deltas.items()}
    pairs = [(a, b) for a in flat for b in flat if a[0] == b[0] and a[1] < b[1]]
    return float(np.mean([functional.cosine_similarity(flat[a], flat[b], dim=0).square().item() for a, b in pairs]))


@pytest.mark.slow
@pytest.mark.parametrize("router", [{"selection": "soft"}, {**TOKEN, "top_k": 2}], ids=["task", "token"])
def test_experts_that_shall_differ_drift_apart(router: Settings, make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 1.0):
        config = make_trial(model=moe({**router, "diversity": weight}), train={"steps": 40, "log_every": 40})
        before = new_module(config, prepared).network.state_dict()
        found[weight] = alike(train(config, tmp_path / str(weight), prepared)[0], before)
    assert found[1.0] < 0.5 * found[0.0], found


# Tasks that are never trained

TEXT = ("toy/sentiment", "kind/classification", "kind/text2text")
UNSEEN = TEXT[2]
PER_TASK: Settings = {**TOKEN, "conditioning": "per_task"}
DESCRIBED: Settings = {
    "task_vectors": "description",
    "descriptions": {
        TEXT[0]: "good or bad day", TEXT[1]: "adjective or noun first", TEXT[2]: "repeat the first word, adjective or noun"
    },
}  # fmt: skip
UNSEEN_ROUTES: dict[str, Settings] = {
    "uniform": {"unseen": "uniform", "init_std": 1.0},
    "uniform_vectors": {"unseen": "uniform", "network": "lstm", "init_std": 1.0},
    "uniform_gates": {"unseen": "uniform", **PER_TASK},
    "nearest_category": {"unseen": "nearest_category", "donors": {UNSEEN: TEXT[1]}, "init_std": 1.0},
    "nearest_category_gates": {"unseen": "nearest_category", "donors": {UNSEEN: TEXT[1]}, **PER_TASK},
    "nearest_description": {"unseen": "nearest_vector", **DESCRIBED, "init_std": 1.0},
    "soft_text_embedding": {"unseen": "soft_vector", "task_vectors": "text_embedding", "init_std": 1.0},
    "soft_gates": {"unseen": "soft_vector", **DESCRIBED, **PER_TASK},
    "random": {"unseen": "random", "init_std": 1.0},
    "random_gates": {"unseen": "random", **PER_TASK},
}


def text_trial(router: Settings, tasks: dict[str, TaskSpec], root: Path, **settings: Any) -> TrialConfig:
    plain = {
        "backbone": {"name": "tiny-bart", "max_length": 48, "max_target_length": 8,
                     "size": {**SIZE, "tokenizer_tasks": sorted(TEXT)}},
        "model": moe(router),
        "mixture": {"tasks": TEXT, "batch_size": 8, "tasks_per_step": 2, "held_out": (UNSEEN,)},
        "data": {"form": "text2text", "max_train": 50, "max_eval": 4},
        "generation": {"beams": 2},
        "train": {"steps": 6, "lr": 3e-3, "log_every": 1, "eval_every": 3},
        "digests": {name: pose(tasks[name]).digest() for name in TEXT},
    }  # fmt: skip
    for key, value in settings.items():
        plain[key] = {**plain[key], **value}
    config = build(TrialConfig, plain, "trial")
    prepare([config], tasks, root)
    return config


def rows_of_tasks(state: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """What has a row for each task, by name: its three rows."""
    found = {}
    for name, value in state.items():
        if name == "routers.vectors.rows" or name.startswith("routers.network.logits."):
            found[name] = list(value)
        elif name.endswith((".weights.0", ".biases.0")):
            found[name] = [state[f"{name[:-1]}{task}"] for task in range(len(TEXT))]
    return found


@pytest.mark.parametrize("unseen", UNSEEN_ROUTES)
def test_a_task_that_is_never_trained_gets_the_route_that_its_seeding_says(
    unseen: str, every_task: dict[str, TaskSpec], tmp_path: Path
) -> None:
    config = text_trial(UNSEEN_ROUTES[unseen], every_task, tmp_path / "data")
    root = tmp_path / "data"
    before = rows_of_tasks(new_module(config, root).network.state_dict())
    modules: list[MultiTaskModule] = []
    real = MultiTaskModule.__init__

    def keep(self: MultiTaskModule, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        modules.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiTaskModule, "__init__", keep)
        folder, result = train(config, tmp_path / "runs", root)
    after = rows_of_tasks(modules[0].network.state_dict())
    assert result.scores["test"][UNSEEN]["exact_match"] is not None
    assert {key.split("/")[0] for key in result.measurements} == {"route"}
    assert any("route/task/" + UNSEEN in key for key in result.measurements)
    vectors = task_vectors(config, open_tasks(config, root), root)
    for name, (first, second, own) in after.items():
        start = before[name]
        match unseen.split("_")[0]:
            case "uniform":
                expected = (first + second) / 2
            case "random":
                expected = start[2]
            case "soft":
                assert vectors is not None
                cosines = functional.cosine_similarity(vectors[2], vectors[:2], dim=-1)
                share = (cosines / 0.1).softmax(-1)
                expected = share[0] * first + share[1] * second
            case _ if "category" in unseen:
                expected = second
            case _:
                assert vectors is not None
                nearest = functional.cosine_similarity(vectors[2], vectors[:2], dim=-1).argmax()
                expected = (first, second)[int(nearest)]
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6, msg=name)
        if ".biases" not in name:
            assert not torch.equal(first, start[0]), "the trained rows have moved"
    assert len(arrays(folder)) == 3


# Text


def test_a_decoders_routes_are_counted_at_the_gold_targets(every_task: dict[str, TaskSpec], tmp_path: Path) -> None:
    root = tmp_path / "data"
    config = text_trial(PER_TASK, every_task, root, mixture={"held_out": ()})
    module, tasks = new_module(config, root), open_tasks(config, root)
    routers = module.network.routers
    assert routers is not None
    names = [task.name for task in tasks]
    tally = RoutingTally(len(tasks), routers.experts)
    found, plain = (
        evaluate(module.network, config, tasks, "test", Gang(), torch.device("cpu"), each) for each in (tally, None)
    )
    assert found.scores == plain.scores
    held = tally.arrays(names)
    for number, task in enumerate(tasks):
        rows = chosen_rows(config, task, "test")
        inputs = sum(len(row.tokens) for row in task.windows("test", rows).rows)
        targets = sum(map(len, task.labels_of("test", rows)))
        assert held["units/0"][number] == held["units/1"][number] == inputs
        assert held["units/2"][number] == held["units/3"][number] == targets


def test_a_decoder_that_a_step_does_not_use_is_left_alone(every_task: dict[str, TaskSpec], tmp_path: Path) -> None:
    """A mixture of labels and text, where most steps have no text: no loss of a router needs the decoder's blocks."""
    names = ("kind/text2text", "toy/sentiment")
    router = {**TOKEN, "balance": "load", "diversity": 0.1, "mutual_information": 0.1}
    config = encoder_trial(
        names,
        every_task,
        tmp_path / "data",
        model=moe(router),
        backbone={
            "name": "tiny-t5",
            "max_length": 48,
            "max_target_length": 8,
            "size": {**SIZE, "tokenizer_tasks": sorted(names)},
        },
        mixture={"tasks": names, "batch_size": 4, "tasks_per_step": 1, "sampling": "uniform"},
        generation={"beams": 1},
    )
    batches = StepBatches(config, open_tasks(config, tmp_path / "data"))
    assert 1.0 in [batches.totals(step)[1] for step in range(4)], "some step holds the second task alone"
    _, result = train(config, tmp_path / "runs", tmp_path / "data")
    assert {"route/0/nmi", "route/3/nmi"} <= result.measurements.keys()


WITHOUT_BIASES = {"name": "tiny-t5", "dropout": 0.0}
"""The bias of an attention's keys changes nothing, so that its gradient is rounding errors, which AdamW blows up."""


@pytest.mark.parametrize("router", ["token_load_per_task", "example_per_task", "cluster", "diversity"])
def test_mixed_batches_of_text_train_as_single_task_groups_do(
    router: str, every_task: dict[str, TaskSpec], tmp_path: Path
) -> None:
    one, two = (
        train(
            text_trial(
                DETERMINISTIC[router],
                every_task,
                tmp_path / "data",
                backbone=WITHOUT_BIASES,
                mixture={"held_out": (), "batching": batching, "tasks_per_step": 4, "batch_tokens": 200},
                generation={"beams": 1},
            ),
            tmp_path / batching,
            tmp_path / "data",
        )[0]
        for batching in ("single_task", "mixed")
    )
    assert_close(one, two)


@pytest.mark.slow
def test_two_workers_train_text_as_one_does(every_task: dict[str, TaskSpec], tmp_path: Path, pool: WorkerPool) -> None:
    root = tmp_path / "data"
    config = text_trial(
        DETERMINISTIC["token_load_per_task"],
        every_task,
        root,
        backbone=WITHOUT_BIASES,
        mixture={"held_out": (UNSEEN,), "batch_tokens": 200},
        generation={"beams": 1},
    )
    one, _ = train(config, tmp_path / "one", root)
    assert_close(one, by_two(config, tmp_path / "two", root, pool))
