"""Whole networks: families agree with dense where they must, groups with mixed batches, and seeds with themselves."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    BOTH_WAYS,
    HEADS,
    LEARNED,
    TINY,
    VOCAB,
    assert_only_trains,
    losses,
    one_group,
    shake,
    tiny_batch,
    tiny_network,
)

from lightning_modules.config import AdapterMoEConfig, DenseConfig, ModelConfig, RouterConfig, TaskMoEConfig, TrialConfig
from lightning_modules.network.model import MultiTaskNetwork, build_network, count_parameters
from lightning_modules.network.task_heads.base import HeadSpec

ROUTED: dict[str, ModelConfig] = {
    f"{family}-{name}": config(router=router, **sizes)
    for family, config, sizes in (("task_moe", TaskMoEConfig, {}), ("adapter_moe", AdapterMoEConfig, {"bottleneck": 3}))
    for name, router in BOTH_WAYS.items()
}
ALL: dict[str, ModelConfig] = {"dense": DenseConfig(), "dense-wide": DenseConfig(ffn_multiple=2)} | ROUTED
LEARNS = [name for name in ROUTED if name.split("-")[1] in LEARNED]
FIXED = [name for name in ROUTED if name not in LEARNS]
TASKS = [0, 1, 2, 3]


def outputs(network: MultiTaskNetwork) -> list[torch.Tensor]:
    batch = tiny_batch(TASKS)
    return [network.encode(batch)[batch.attention_mask.bool()], *network.losses(batch)]


def assert_same_outputs(network: MultiTaskNetwork, reference: MultiTaskNetwork, atol: float = 1e-6) -> None:
    for one, other in zip(outputs(network), outputs(reference), strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


@pytest.mark.parametrize("router", BOTH_WAYS.values(), ids=BOTH_WAYS.keys())
def test_one_expert_without_noise_is_dense(router: RouterConfig) -> None:
    model = TaskMoEConfig(num_experts=1, expert_noise=0.0, router=replace(router, top_k=1))
    assert_same_outputs(tiny_network(model), tiny_network(DenseConfig()))


@pytest.mark.parametrize("router", BOTH_WAYS.values(), ids=BOTH_WAYS.keys())
def test_equal_experts_compute_what_dense_computes(router: RouterConfig) -> None:
    assert_same_outputs(tiny_network(TaskMoEConfig(expert_noise=0.0, router=router)), tiny_network(DenseConfig()))


@pytest.mark.parametrize("router", BOTH_WAYS.values(), ids=BOTH_WAYS.keys())
def test_fresh_adapters_change_nothing(router: RouterConfig) -> None:
    assert_same_outputs(tiny_network(AdapterMoEConfig(router=router)), tiny_network(DenseConfig()))


def test_a_widened_network_starts_as_dense_up_to_the_noise() -> None:
    wide, dense = tiny_network(DenseConfig(ffn_multiple=3)), tiny_network(DenseConfig())
    assert_same_outputs(wide, dense, atol=0.01)
    extra = 2 * (2 * 16 * 32 + 32) * 2
    assert count_parameters(wide, len(HEADS))["total"] == count_parameters(dense, len(HEADS))["total"] + extra


@pytest.mark.parametrize("model", ALL.values(), ids=ALL.keys())
def test_groups_and_one_mixed_batch_give_the_same_outputs_and_gradients(model: ModelConfig) -> None:
    mixed, grouped = tiny_network(model), tiny_network(model)
    shake(mixed)
    shake(grouped)
    batch = tiny_batch(TASKS)
    together = losses(mixed, batch)
    together.sum().backward()
    apart = [losses(grouped, one_group(batch, i)) for i in range(len(TASKS))]
    for loss in apart:
        loss.sum().backward()
    torch.testing.assert_close(torch.cat(apart), together, atol=1e-5, rtol=1e-5)
    for (name, one), other in zip(mixed.named_parameters(), grouped.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", LEARNS)
def test_learned_routers_get_a_gradient(name: str) -> None:
    network = tiny_network(ROUTED[name])
    shake(network)
    losses(network, tiny_batch([1])).sum().backward()
    logits = [p for key, p in network.named_parameters() if key.startswith("routers.")]
    assert len(logits) == 2
    for parameter in logits:
        assert parameter.grad is not None
        assert parameter.grad[1].abs().sum() > 0 and parameter.grad[[0, 2, 3]].abs().sum() == 0


@pytest.mark.parametrize("name", FIXED)
def test_fixed_routers_have_nothing_to_learn(name: str) -> None:
    assert not [key for key, _ in tiny_network(ROUTED[name]).named_parameters() if key.startswith("routers.")]


@pytest.mark.parametrize("name", ROUTED)
def test_one_tasks_batch_trains_its_experts_and_its_head_only(name: str) -> None:
    network = tiny_network(ROUTED[name])
    shake(network)
    losses(network, tiny_batch([2])).sum().backward()
    idle = {f"heads.{i}." for i in (0, 1, 3)}
    assert network.routers is not None
    for layer, routing in network.routers.of_tasks(torch.tensor([2])).items():
        for e in set(range(4)) - set(routing.chosen[0].tolist()):
            idle.add(f"layer.{layer}.intermediate.{'replacement' if 'task' in name else 'follower'}.experts.{e}.")
    expected = {key for key, _ in network.named_parameters() if not any(part in key for part in idle)}
    assert_only_trains(network, expected)


@pytest.mark.parametrize("model", ALL.values(), ids=ALL.keys())
def test_the_seed_decides_the_start_and_other_tasks_do_not_matter(model: ModelConfig) -> None:
    crowd = [*(HeadSpec(f"other{i}", "classification", 2) for i in range(7)), HEADS[0]]
    alone, again, many = (tiny_network(model, heads) for heads in ([HEADS[0]], [HEADS[0]], crowd))
    torch.testing.assert_close(alone.state_dict(), again.state_dict(), atol=0, rtol=0)
    for name, value in alone.backbone.state_dict().items():
        torch.testing.assert_close(many.backbone.state_dict()[name][: len(value)], value, atol=0, rtol=0)
    torch.testing.assert_close(alone.heads["0"].state_dict(), many.heads["7"].state_dict(), atol=0, rtol=0)


def test_families_share_the_encoder_and_heads_of_a_seed() -> None:
    dense = tiny_network(DenseConfig()).state_dict()
    for name, model in ROUTED.items():
        routed = tiny_network(model).state_dict()
        shared = [key for key in routed if key in dense]
        assert len(shared) == len(dense) - (0 if "adapter" in name else 8)
        assert all(torch.equal(routed[key], dense[key]) for key in shared)


@pytest.mark.parametrize("model", ALL.values(), ids=ALL.keys())
def test_building_leaves_the_global_stream_alone(model: ModelConfig) -> None:
    state = torch.get_rng_state()
    tiny_network(model)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("model", ALL.values(), ids=ALL.keys())
def test_a_saved_network_comes_back(model: ModelConfig) -> None:
    network, other = tiny_network(model), tiny_network(model, seed=5)
    shake(network)
    other.load_state_dict(network.state_dict())
    assert_same_outputs(other, network, atol=0)


@pytest.mark.parametrize("name", ROUTED)
def test_only_chosen_layers_are_routed(name: str) -> None:
    network = tiny_network(replace(ROUTED[name], layers=(1,)))
    assert network.routers is not None and list(network.routers.of_tasks(torch.arange(4))) == [1]


def test_dense_routes_nothing() -> None:
    assert tiny_network(DenseConfig()).routers is None


@pytest.mark.parametrize("name", ROUTED)
def test_a_frozen_encoder_leaves_heads_experts_and_routers(name: str) -> None:
    config = TrialConfig(backbone=replace(TINY, frozen=True), model=ROUTED[name])
    network = build_network(config, HEADS, VOCAB)
    trainable = {key for key, p in network.named_parameters() if p.requires_grad}
    assert trainable == {key for key, _ in network.named_parameters() if any(p in key for p in ("heads", "experts", "router"))}


def test_parameter_counts() -> None:
    ffn, adapter, head = 2 * 16 * 32 + 32 + 16, 2 * 16 * 3 + 3 + 16, 17
    dense = count_parameters(tiny_network(DenseConfig()), len(HEADS))
    heads = head * (3 + 1 + 5 + 2)
    encoder = dense["total"] - heads
    assert dense["active"] == round(encoder + heads / 4) and dense["trainable"] == dense["total"]
    top_2 = count_parameters(tiny_network(TaskMoEConfig(router=LEARNED["top_2"])), len(HEADS))
    assert top_2["total"] == dense["total"] + 2 * (3 * ffn + 4 * 4)
    assert top_2["active"] == dense["active"] + 2 * (ffn + 4)
    soft = count_parameters(tiny_network(AdapterMoEConfig(bottleneck=3, router=LEARNED["soft"])), len(HEADS))
    assert soft["active"] == dense["active"] + 2 * (4 * adapter + 4)
    frozen = TrialConfig(backbone=replace(TINY, frozen=True), model=AdapterMoEConfig(bottleneck=3))
    assert count_parameters(build_network(frozen, HEADS, VOCAB), len(HEADS))["trainable"] == heads + 2 * (4 * adapter + 4 * 4)
