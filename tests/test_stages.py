"""Stages: what is frozen stays, what is loaded is the earlier trial's, and a later stage resumes as any other trial."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HEADS, LEARNED, TINY, tiny_batch, tiny_network
from torch import Tensor

from lightning_modules.building import ConfigError
from lightning_modules.checkpoints import list_checkpoints, load_newest
from lightning_modules.config import (
    AdapterMoEConfig,
    BackboneConfig,
    DenseConfig,
    ModelConfig,
    RouterConfig,
    TaskMoEConfig,
    TrialConfig,
)
from lightning_modules.network.model import build_network
from lightning_modules.network.task_heads.base import HeadSpec
from lightning_modules.stages import PARTS, check_optimiser, freeze, load_parts, part_of, trainable_parts
from pipelines.runner import _can_start, waves
from pipelines.store import TrialFolder
from pipelines.trial import run_trial

Make = Callable[..., TrialConfig]
NAMES = [head.name for head in HEADS]
SOFT = RouterConfig(selection="soft", init_std=1.0)
MODELS: dict[str, ModelConfig] = {
    "ffn": TaskMoEConfig(num_experts=3, router=SOFT, shared_experts=1),
    "layer": TaskMoEConfig(num_experts=3, router=SOFT, expert="layer"),
    "adapters": AdapterMoEConfig(num_experts=3, bottleneck=4, router=SOFT),
    "gates": TaskMoEConfig(num_experts=3, router=RouterConfig(kind="example", conditioning="per_task")),
    "vectors": TaskMoEConfig(num_experts=3, router=RouterConfig(network="lstm")),
    "tables": TaskMoEConfig(num_experts=3, router=RouterConfig(kind="example", balance="load")),
    "fixed": TaskMoEConfig(num_experts=3, router=RouterConfig(kind="random")),
}


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_tensor_belongs_to_one_part(model: ModelConfig) -> None:
    network = tiny_network(model)
    sizes = dict.fromkeys(PARTS, 0)
    for name, tensor in network.state_dict().items():
        sizes[part_of(name)] += tensor.numel()
    assert all(sizes.values())
    experts = {id(p) for module in network.routed().values() for e in (*module.experts, *module.shared) for p in e.parameters()}
    found = {id(p) for name, p in network.named_parameters() if part_of(name) == "experts"}
    assert found == experts
    assert {n for n, _ in network.named_parameters() if part_of(n) == "heads"} == {
        f"heads.{n}" for n, _ in network.heads.named_parameters()
    }


@pytest.mark.parametrize("name", ["tiny-bart", "tiny-t5"])
def test_shared_embeddings_are_no_experts(name: Any) -> None:
    config = TrialConfig(backbone=BackboneConfig(name=name, size=TINY.size), model=TaskMoEConfig(layers=(0,)))
    network = build_network(config, [HeadSpec("q", "text2text", 1)], 320)
    assert any(".shared." in n for n in network.state_dict())
    assert all(part_of(n) == "backbone" for n in network.state_dict() if ".model.shared." in n)


def test_what_is_frozen_is_not_counted_and_not_optimised() -> None:
    network = tiny_network(MODELS["ffn"])
    before = trainable_parts(network)
    freeze(network, ("router", "backbone"))
    assert trainable_parts(network) == {**before, "router": 0, "backbone": 0}
    trains = [p for p in network.parameters() if p.requires_grad]
    check_optimiser(network, torch.optim.SGD(trains), ("router", "backbone"))
    with pytest.raises(RuntimeError, match=r"the optimiser lacks .*, which is to train"):
        check_optimiser(network, torch.optim.SGD(trains[1:]), ("router", "backbone"))
    with pytest.raises(RuntimeError, match=r"the optimiser holds backbone.*, which is not to train"):
        check_optimiser(network, torch.optim.SGD(network.parameters()), ("router", "backbone"))
    with pytest.raises(RuntimeError, match=r"the optimiser holds 1 parameters, 0 are to train|holds \d+ parameters"):
        check_optimiser(network, torch.optim.SGD([*trains, torch.zeros(1)]), ("router", "backbone"))


@pytest.mark.parametrize(
    ("model", "parts", "expected"),
    [
        (DenseConfig(), ("router",), "must name parts that train"),
        (MODELS["fixed"], ("router",), "got router, which has nothing that does"),
        (DenseConfig(), ("heads", "backbone"), "must leave something to train"),
    ],
)
def test_freezing_nothing_or_everything_is_refused(model: ModelConfig, parts: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        freeze(tiny_network(model), parts)


@pytest.mark.parametrize("parts", [("router",), ("experts",), ("backbone", "heads"), PARTS], ids="-".join)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_loaded_parts_are_the_others_and_the_rest_is_fresh(model: ModelConfig, parts: Any) -> None:
    earlier, network = tiny_network(model, seed=1), tiny_network(model, seed=0)
    state, before = weights(earlier), weights(network)
    load_parts(network, state, parts, NAMES, NAMES)
    for name, tensor in network.state_dict().items():
        of_trial = name.startswith(("routers.tables.", "routers.step"))
        source = state if part_of(name) in parts and not of_trial else before
        assert torch.equal(tensor, source[name]), name


@pytest.mark.parametrize("name", ["ffn", "gates", "vectors", "fixed"])
def test_tasks_are_matched_by_name(name: str) -> None:
    model = MODELS[name]
    fewer = [HEADS[3], HEADS[0], HeadSpec("new", "classification", 2)]
    earlier, network = tiny_network(model, seed=1), tiny_network(model, fewer)
    before, there = weights(network), weights(earlier)
    load_parts(network, there, ("router", "heads"), [h.name for h in fewer], NAMES)
    now = network.state_dict()
    for key in before:
        if key.startswith("heads."):
            _, number, rest = key.split(".", 2)
            was = {"0": "3", "1": "0"}.get(number)
            assert torch.equal(now[key], there[f"heads.{was}.{rest}"] if was else before[key])
        elif key.startswith(("routers.network.logits.", "routers.vectors.rows")):
            assert torch.equal(now[key], torch.stack([there[key][3], there[key][0], before[key][2]]))
        elif key == "routers.network.expert":
            assert torch.equal(now[key], torch.stack([there[key][:, 3], there[key][:, 0], before[key][:, 2]], 1))
        elif ".weights." in key or ".biases." in key:
            prefix, number = key.rsplit(".", 1)
            was = {"0": "3", "1": "0"}.get(number)
            assert torch.equal(now[key], there[f"{prefix}.{was}"] if was else before[key])


def test_weights_that_do_not_fit_are_refused_and_change_nothing() -> None:
    network = tiny_network(MODELS["ffn"])
    before = weights(network)

    def refused(model: ModelConfig, parts: Any, expected: str, names: list[str] = NAMES) -> None:
        heads = HEADS[: len(names)]
        with pytest.raises(ConfigError, match=expected):
            load_parts(network, weights(tiny_network(model, heads)), parts, NAMES, names)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    refused(
        TaskMoEConfig(num_experts=4, router=SOFT, shared_experts=1),
        ("router",),
        r"has shape \[4, 4\] there and|has shape \[4\]",
    )
    refused(TaskMoEConfig(num_experts=4, router=SOFT, shared_experts=1), ("experts",), r"experts\.3\..* has no place here")
    refused(TaskMoEConfig(num_experts=3, router=SOFT), ("experts",), r"which lack .*shared\.0\.")
    refused(DenseConfig(), ("router",), "which lack routers")
    refused(MODELS["vectors"], ("router",), r"which lack routers\.network\.logits")
    with pytest.raises(ConfigError, match="must name parts that both trials have, got heads"):
        load_parts(network, {}, ("heads",), NAMES, ["others"])


@pytest.mark.parametrize(("temperature", "alike"), [(1e6, "average"), (1e-3, "argmax")])
def test_a_hot_router_averages_and_a_cold_one_chooses(temperature: float, alike: str) -> None:
    """specs/task_moe.md 7: stage 2 at a high temperature is average routing, at a low one the most probable expert."""
    learned = tiny_network(TaskMoEConfig(num_experts=3, expert_noise=1.0, router=LEARNED["top_1"]), seed=3)
    router = RouterConfig(selection="soft", temperature=temperature)
    network = tiny_network(TaskMoEConfig(num_experts=3, expert_noise=1.0, router=router))
    load_parts(network, weights(learned), ("router",), NAMES, NAMES)
    other = RouterConfig(kind="uniform") if alike == "average" else LEARNED["top_1"]
    reference = tiny_network(TaskMoEConfig(num_experts=3, expert_noise=1.0, router=other))
    if alike == "argmax":
        load_parts(reference, weights(learned), ("router",), NAMES, NAMES)
    batch = tiny_batch(range(len(HEADS)))
    with torch.no_grad():
        ours, theirs = network.eval().encode(batch), reference.eval().encode(batch)
        others = tiny_network(TaskMoEConfig(num_experts=3, expert_noise=1.0, router=SOFT)).eval().encode(batch)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, others, atol=1e-3)


# Trials

EARLIER = {"family": "task_moe", "num_experts": 3, "router": {"selection": "gumbel_st", "temperature": 2.0}}
LATER = {
    "family": "task_moe",
    "num_experts": 3,
    "router": {"selection": "soft", "temperature": 300.0, "temperature_min": 1.0, "temperature_decay": 0.5},
}


@pytest.fixture
def both(make_trial: Make, prepared: Path, tmp_path: Path) -> tuple[TrialConfig, TrialConfig]:
    """An earlier trial, which has been trained, and a later one that starts from it."""
    first = make_trial(model=EARLIER)
    folder = TrialFolder(tmp_path, first.trial_id)
    folder.write_config(first)
    assert run_trial(first, folder, prepared) is not None
    start = {"load": ["router"], "trial": first.trial_id}
    return first, make_trial(model=LATER, train={"freeze": ["router"]}, start=start)


def final(storage: Path, config: TrialConfig) -> Mapping[str, Tensor]:
    state, _ = load_newest(TrialFolder(storage, config.trial_id).checkpoints, config.trial_id)
    assert state is not None and state["step"] == config.train.steps
    return state["network"]


def test_a_later_stage_keeps_the_routes_it_was_given(
    both: tuple[TrialConfig, TrialConfig], prepared: Path, tmp_path: Path
) -> None:
    first, second = both
    result = run_trial(second, TrialFolder(tmp_path, second.trial_id), prepared)
    assert result is not None
    assert result.params["trainable/router"] == 0 < result.params["trainable/experts"]
    assert sum(count for name, count in result.params.items() if name.startswith("trainable/")) == result.params["trainable"]
    routes, kept = final(tmp_path, first), final(tmp_path, second)
    logits = [name for name in kept if name.startswith("routers.network.")]
    assert logits and all(torch.equal(kept[name], routes[name]) for name in logits)
    assert all(not torch.equal(kept[n], routes[n]) for n in kept if part_of(n) == "experts" and n.endswith("weight"))


@pytest.mark.parametrize("part", ["experts", "backbone", "heads"])
def test_frozen_parts_do_not_change_and_all_others_do(
    part: str, both: tuple[TrialConfig, TrialConfig], make_trial: Make, prepared: Path, tmp_path: Path
) -> None:
    first, _ = both
    start = {"load": PARTS, "trial": first.trial_id}
    second = make_trial(model=LATER, train={"freeze": [part]}, start=start)
    assert run_trial(second, TrialFolder(tmp_path, second.trial_id), prepared) is not None
    before, after = final(tmp_path, first), final(tmp_path, second)
    changed = {p: [not torch.equal(after[n], before[n]) for n in after if part_of(n) == p and ".step" not in n] for p in PARTS}
    assert not any(changed.pop(part))  # type: ignore[call-overload]
    assert all(any(of_part) for of_part in changed.values())


class Stopped(Exception):
    pass


def test_a_later_stage_goes_on_where_it_stopped(both: tuple[TrialConfig, TrialConfig], prepared: Path, tmp_path: Path) -> None:
    first, second = both
    whole, broken = TrialFolder(tmp_path, second.trial_id), TrialFolder(tmp_path / "again", second.trial_id)
    run_trial(second, whole, prepared)
    (tmp_path / "again" / "trials").mkdir(parents=True)
    TrialFolder(tmp_path, first.trial_id).path.rename(TrialFolder(tmp_path / "again", first.trial_id).path)

    def stop(event: Mapping[str, Any]) -> None:
        if event["step"] >= 9:
            raise Stopped

    with pytest.raises(Stopped):
        run_trial(second, broken, prepared, report=stop)
    for path in list_checkpoints(TrialFolder(tmp_path / "again", first.trial_id).checkpoints):
        path.unlink()  # it is only needed to start
    result = run_trial(second, broken, prepared)
    assert result is not None and result.resume["count"] == 1 and result.resume["exact"]
    expected = final(tmp_path, second)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final(tmp_path / "again", second).items())


def test_a_stage_without_its_earlier_trials_weights_says_so(
    both: tuple[TrialConfig, TrialConfig], prepared: Path, tmp_path: Path
) -> None:
    first, second = both
    newest, before = list_checkpoints(TrialFolder(tmp_path, first.trial_id).checkpoints)
    newest.unlink()
    law = f"start.trial: must be a trial with its final weights .step 12., got {first.trial_id}: its newest .* is of step 8"
    with pytest.raises(ConfigError, match=law):
        run_trial(second, TrialFolder(tmp_path, second.trial_id), prepared)
    before.unlink()
    with pytest.raises(ConfigError, match="it has no checkpoint"):
        run_trial(second, TrialFolder(tmp_path, second.trial_id), prepared)


# The runner


def test_waves_follow_what_trials_start_from() -> None:
    assert waves({"c": "b", "x": "", "b": "a", "a": "", "y": "trained before"}) == [["x", "a", "y"], ["b"], ["c"]]


def test_a_trial_is_not_attempted_after_its_earlier_one_failed(tmp_path: Path) -> None:
    TrialFolder(tmp_path, "a").write_status(state="failed", error={"type": "DivergedError", "message": "loss is nan\nmore"})
    assert _can_start("x", "", tmp_path)
    assert not _can_start("b", "a", tmp_path)
    assert not _can_start("c", "b", tmp_path)
    status = TrialFolder(tmp_path, "c").status()
    assert status["state"] == "failed" and status["error"]["type"] == "EarlierTrialFailed"
    assert status["error"]["message"] == (
        "not attempted: the trial that it starts from, b, has no result: "
        "not attempted: the trial that it starts from, a, has no result: loss is nan"
    )
