"""Experts start as promised, alone and where ``task_moe`` puts them."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import TINY, losses, tiny_batch, tiny_network
from torch import Tensor, nn

from lightning_modules import task_moe
from lightning_modules.building import ConfigError
from lightning_modules.config import DenseConfig, RouterConfig, TaskMoEConfig, TrialConfig
from lightning_modules.network.backbones import Backbone, load_backbone
from lightning_modules.network.experts import Bottleneck, drawn_from, scaled, split, upcycle, widen
from lightning_modules.network.seams import FeedForward, Layer
from lightning_modules.seeds import derive

D, F = 6, 10
KINDS: dict[str, dict[str, Any]] = {
    "ffn": {"num_experts": 3},
    "ffn_several_numbers": {"num_experts": (3, 4)},
    "ffn_shared": {"num_experts": 3, "shared_experts": 1},
    "ffn_2_shared": {"num_experts": 3, "shared_experts": 2},
    "layer": {"num_experts": 3, "expert": "layer"},
}
SIMPLEX = {
    f"{name}-{combine}": RouterConfig(init_std=1.0, combine=combine, **settings)
    for name, settings in {"top_1": {}, "top_2": {"top_k": 2}, "soft": {"selection": "soft"}}.items()
    for combine in ("outputs", "parameters")
}
BATCH = tiny_batch([0, 2, 3, 1])


def feed_forward(seed: int = 0) -> FeedForward:
    torch.manual_seed(seed)
    return FeedForward(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))


def states(rows: int = 7) -> Tensor:
    return torch.randn(rows, 3, D, generator=torch.Generator().manual_seed(2))


def test_upcycled_experts_differ_from_their_origin_by_the_noise_and_from_each_other() -> None:
    origin = feed_forward()
    first, second = upcycle(origin, 0.1, seed=1), upcycle(origin, 0.1, seed=2)
    for name, parameter in origin.named_parameters():
        difference = first.get_parameter(name) - parameter
        assert 0.4 < (difference.std() / parameter.std() / 0.1).item() < 1.6
        assert not torch.equal(first.get_parameter(name), second.get_parameter(name))
    exact = upcycle(origin.requires_grad_(False), 0.0, seed=1)
    assert torch.equal(exact(states()), origin(states()))
    assert all(p.requires_grad for p in exact.parameters())


def test_an_adapter_starts_as_zero_and_its_down_projection_gets_a_gradient_once_up_has_moved() -> None:
    adapter = Bottleneck(200, 50, seed=0)
    hidden = torch.randn(4, 200)
    assert torch.equal(adapter(hidden), torch.zeros(4, 200))
    assert adapter.down.weight.std().item() == pytest.approx(0.02, rel=0.05)
    adapter(hidden).sum().backward()
    assert adapter.up.weight.grad is not None and adapter.up.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("multiple", [1, 2, 5])
def test_widening_keeps_the_function(multiple: int, gated: bool) -> None:
    ffn = feed_forward()
    if gated:
        ffn.gate = nn.Linear(D, F, bias=False)
    exact, noisy = copy.deepcopy(ffn), copy.deepcopy(ffn)
    exact.up, exact.gate, exact.down = widen(ffn.up, ffn.gate, ffn.down, multiple, 0.0, seed=0)
    torch.testing.assert_close(exact(states()), ffn(states()), atol=1e-6, rtol=0)
    assert exact.up.out_features == exact.down.in_features == multiple * F
    noisy.up, noisy.gate, noisy.down = widen(ffn.up, ffn.gate, ffn.down, multiple, 0.01, seed=0)
    distance = (noisy(states()) - ffn(states())).norm() / ffn(states()).norm()
    assert 0 < distance < 0.03
    for linear in (noisy.up, noisy.gate):
        if linear is not None:
            copies = linear.weight.reshape(multiple, F, D)
            assert all(not torch.equal(copies[0], copies[i]) for i in range(1, multiple))


def test_a_widened_ffn_trains_as_the_experts_do_for_which_it_is_the_control() -> None:
    ffn = feed_forward()
    ffn.gate = nn.Linear(D, F)
    ffn.requires_grad_(False)
    for linear in widen(ffn.up, ffn.gate, ffn.down, 2, 0.01, seed=0):
        assert linear is not None and all(p.requires_grad for p in linear.parameters())


def installed(seed: int = 0, backbone: str = "tiny-encoder", frozen: bool = False, **settings: Any) -> tuple[Backbone, Any]:
    """A backbone with experts, and their numbers by block."""
    model = load_backbone(replace(TINY, name=backbone, frozen=frozen), None, seed=0)
    return model, task_moe.install(model, TaskMoEConfig(**settings), seed)


def experts_at(backbone: Backbone, block: int, shared: bool = False) -> Sequence[nn.Module]:
    found = {module.block: module for module in backbone.modules() if hasattr(module, "experts") and hasattr(module, "block")}
    return list(found[block].shared if shared else found[block].experts)  # pyright: ignore[reportArgumentType]


def weights_of(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_the_mean_of_all_parts_of_an_ffn_is_the_whole(parts: int, gated: bool) -> None:
    ffn = feed_forward()
    ffn.gate = nn.Linear(D, F) if gated else None
    outputs = []
    for which in range(parts):
        part = copy.deepcopy(ffn)
        part.up, part.gate, part.down = split(ffn.up, ffn.gate, ffn.down, which, parts)
        assert part.up.out_features == part.down.in_features == F // parts
        outputs.append(part(states()))
    torch.testing.assert_close(torch.stack(outputs).mean(0), ffn(states()), atol=1e-6, rtol=1e-5)
    assert parts == 1 or not torch.allclose(outputs[0], outputs[1])


def test_a_scaled_last_layer_scales_the_output() -> None:
    ffn = feed_forward()
    expected = ffn(states()) / 3
    ffn.down = scaled(ffn.down, 1 / 3)
    torch.testing.assert_close(ffn(states()), expected)


def test_numbers_drawn_from_a_seed_leave_the_global_stream_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with drawn_from(5):
        first = torch.rand(3)
    with drawn_from(5):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", SIMPLEX.values(), ids=SIMPLEX.keys())
def test_identical_copies_are_the_dense_network_under_weights_that_sum_to_one(router: RouterConfig, kind: str) -> None:
    network = tiny_network(TaskMoEConfig(expert_noise=0.0, router=router, **KINDS[kind])).eval()
    expected = losses(tiny_network(DenseConfig()).eval(), BATCH)
    torch.testing.assert_close(losses(network, BATCH), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [{}, {"expert": "layer"}, {"expert": "ffn_split"}])
def test_a_single_expert_is_the_dense_network(kind: dict[str, Any]) -> None:
    network = tiny_network(TaskMoEConfig(num_experts=1, expert_noise=0.0, **kind)).eval()
    assert torch.equal(losses(network, BATCH), losses(tiny_network(DenseConfig()).eval(), BATCH))


@pytest.mark.parametrize("shared", [0, 2])
def test_split_experts_are_the_dense_network_where_the_choice_covers_all_parts(shared: int) -> None:
    router = RouterConfig(top_k=2, init_std=1e-9)
    config = TaskMoEConfig(num_experts=4, expert="ffn_split", shared_experts=shared, expert_noise=0.0, router=router)
    expected = losses(tiny_network(DenseConfig()).eval(), BATCH)
    for chosen, covers in (([0, 1], True), ([2, 1], True), ([3, 2], True), ([0, 2], False), ([1, 3], False)):
        network = tiny_network(config).eval()
        assert network.routers is not None
        network.routers.masked = {block: set(range(4)) - set(chosen) for block in (0, 1)}
        assert torch.allclose(losses(network, BATCH), expected, atol=1e-5) == covers
    sizes = {expert.up.out_features for expert in network.routed()[0].experts if isinstance(expert, FeedForward)}
    assert sizes == {16}


def test_upcycled_experts_are_the_same_to_the_bit_whatever_stands_beside_them() -> None:
    plain = load_backbone(TINY, None, seed=0)
    backbone, _ = installed(seed=5, num_experts=3)
    for block, seam in enumerate(plain.seams()):
        for e, expert in enumerate(experts_at(backbone, block)):
            expected = upcycle(seam.take_ffn(), 0.01, derive(5, "expert", block, e))
            assert torch.equal(weights_of(expert), weights_of(expected))


def test_shared_experts_have_a_share_of_the_output_and_noise_of_their_own() -> None:
    backbone, numbers = installed(num_experts=2, shared_experts=2, expert_noise=0.1)
    assert numbers == {0: 2, 1: 2}
    plain = load_backbone(TINY, None, seed=0)
    for block in numbers:
        parts = [*experts_at(backbone, block), *experts_at(backbone, block, shared=True)]
        flat = [weights_of(part) for part in parts]
        assert len({tuple(one.tolist()) for one in flat}) == 4
        down = plain.seams()[block].take_ffn().down.weight
        for part in parts:
            assert isinstance(part, FeedForward)
            assert ((part.down.weight * 3 - down).std() / down.std()).item() == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize("kind", [{}, {"expert": "layer"}, {"expert": "ffn_split", "router": RouterConfig(top_k=2)}])
@pytest.mark.parametrize("name", ["tiny-encoder", "tiny-bart", "tiny-t5"])
def test_fresh_experts_are_drawn_from_the_seed_and_are_no_copies(name: str, kind: dict[str, Any]) -> None:
    torch.manual_seed(2)
    state = torch.get_rng_state()
    (first, numbers), (again, _), (other, _) = (
        installed(seed, name, frozen=True, num_experts=2, init="fresh", **kind) for seed in (1, 1, 2)
    )
    copies, _ = installed(1, name, num_experts=2, expert_noise=0.0, **kind)
    assert torch.equal(torch.get_rng_state(), state)
    for block in numbers:
        experts = [experts_at(each, block) for each in (first, again, other, copies)]
        a, same, different, own = (weights_of(each[0]) for each in experts)
        assert torch.equal(a, same)
        assert not torch.equal(a, different) and not torch.equal(a, own) and not torch.equal(a, weights_of(experts[0][1]))
        assert a.std().item() == pytest.approx(own.std().item(), rel=0.2)
        assert all(p.requires_grad for p in experts[0][0].parameters())
    assert not any(p.requires_grad for n, p in first.named_parameters() if "experts" not in n)


def test_fresh_networks_learn_from_all_experts() -> None:
    config = TaskMoEConfig(num_experts=2, init="fresh", shared_experts=1, router=RouterConfig(selection="soft"))
    network = tiny_network(config)
    losses(network, BATCH).sum().backward()
    grads = [p.grad for module in network.routed().values() for p in module.parameters()]
    assert len(grads) == 2 * 3 * 4 and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("name", ["tiny-bart", "tiny-t5"])
def test_whole_layers_of_a_decoder_keep_their_keys_apart(name: str) -> None:
    backbone, numbers = installed(0, name, num_experts=(1, 2, 3, 2), expert="layer")
    places = []
    for block in numbers:
        for expert in experts_at(backbone, block):
            assert isinstance(expert, Layer)
            found = {module.layer_idx for module in expert.modules() if isinstance(getattr(module, "layer_idx", None), int)}
            assert len(found) == 1
            if block >= backbone.num_encoder_blocks:
                places.append((block, *found))
    assert places == [(2, 0), (2, 2), (2, 4), (3, 1), (3, 3)]


def test_only_task_level_routes_let_whole_layers_keep_their_keys() -> None:
    for router, caches in ((RouterConfig(), True), (RouterConfig(kind="random"), True), (RouterConfig(kind="example"), False)):
        backbone, _ = installed(0, "tiny-bart", num_experts=2, expert="layer", router=router)
        assert [seam.caches for seam in backbone.seams("layer")] == [caches] * 4


@pytest.mark.parametrize(
    ("name", "layers", "numbers", "expected"),
    [
        ("tiny-encoder", (), 3, {0: 3, 1: 3}),
        ("tiny-encoder", (), (2, 5), {0: 2, 1: 5}),
        ("tiny-encoder", (1, 0), (2, 5), {0: 5, 1: 2}),
        ("tiny-encoder", "every_other", 4, {1: 4}),
        ("tiny-bart", "every_other", (4, 2), {1: 4, 3: 2}),
        ("tiny-t5", "last:1", 2, {1: 2, 3: 2}),
        ("tiny-t5", "last:2", 2, {0: 2, 1: 2, 2: 2, 3: 2}),
    ],
)
@pytest.mark.parametrize("expert", ["ffn", "layer"])
def test_layers_and_numbers_of_experts(expert: Any, name: str, layers: Any, numbers: Any, expected: dict[int, int]) -> None:
    backbone, found = installed(0, name, layers=layers, num_experts=numbers, expert=expert)
    assert found == expected
    assert {block: len(experts_at(backbone, block)) for block in expected} == expected
    assert sum(p.numel() for p in backbone.parameters()) > sum(
        p.numel() for p in load_backbone(replace(TINY, name=name), None, seed=0).parameters()
    )


@pytest.mark.parametrize(
    ("settings", "law"),
    [
        ({"num_experts": 3, "expert": "ffn_split", "router": RouterConfig(top_k=3)}, r"model\.expert: .* got 32 and 3"),
        ({"num_experts": (2, 3), "layers": "last:1"}, r"model\.num_experts: .* routed blocks \[1\], got \[2, 3\]"),
        ({"num_experts": (2, 3, 4)}, r"model\.num_experts: .* routed blocks \[0, 1\], got \[2, 3, 4\]"),
        ({"layers": (2,)}, r"model\.layers: must be below the backbone's 2 blocks, got \[2\]"),
        ({"layers": "last:3"}, r"model\.layers: must be at most the 2 blocks"),
        ({"expert": "layer", "dispatch": "grouped"}, r"dispatch: must be auto or loop with expert: layer"),
    ],
)
def test_what_does_not_fit_the_backbone_is_refused(settings: dict[str, Any], law: str) -> None:
    with pytest.raises(ConfigError, match=law):
        installed(**settings)


def test_merged_layers_can_not_be_computed_again() -> None:
    model = TaskMoEConfig(expert="layer", router=RouterConfig(selection="soft", combine="parameters"))
    law = r"backbone\.gradient_checkpointing: cannot compute whole layers of merged parameters again"
    with pytest.raises(ConfigError, match=law):
        TrialConfig(backbone=replace(TINY, gradient_checkpointing=True), model=model)
