"""Experts start as promised, and dispatch computes the definition for every way of routing and mixing."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import BOTH_WAYS, ROUTERS, mix_reference
from torch import Tensor, nn

from lightning_modules.config import RouterConfig
from lightning_modules.network.dispatch import RoutedExperts, Rows, plan_routes
from lightning_modules.network.experts import Bottleneck, upcycle, widen
from lightning_modules.network.routers import build_router
from lightning_modules.network.seams import FeedForward

D, F, E, TASKS = 6, 10, 4, 5
MIXED = ((0, 0, 2), (1, 2, 3), (4, 3, 7))
SINGLE = ((3, 0, 7),)


def feed_forward(seed: int = 0) -> FeedForward:
    torch.manual_seed(seed)
    return FeedForward(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))


def experts_of(kind: str) -> list[nn.Module]:
    if kind == "ffn":
        return [upcycle(feed_forward(), 1.0, seed=e) for e in range(E)]
    adapters = [Bottleneck(D, 3, seed=e) for e in range(E)]
    for e, adapter in enumerate(adapters):
        for parameter in adapter.parameters():
            parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(e))
    return list(adapters)


def states(rows: int = 7) -> Tensor:
    return torch.randn(rows, 3, D, generator=torch.Generator().manual_seed(2))


def run(module: RoutedExperts, rows: Rows, hidden: Tensor) -> Tensor:
    """The module's output for a batch of these rows."""
    return module(hidden, plan_routes({0: module.router}, rows, hidden.device)[0])


def run_reference(module: RoutedExperts, rows: Rows, hidden: Tensor) -> Tensor:
    """What it should be."""
    routing = module.router(torch.tensor([task for task, _, _ in rows]))
    return mix_reference(module.experts, routing, hidden, rows, module.combine)


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("rows", [MIXED, SINGLE], ids=["mixed", "single_task"])
@pytest.mark.parametrize("kind", ["ffn", "adapter"])
@pytest.mark.parametrize("config", BOTH_WAYS.values(), ids=BOTH_WAYS.keys())
def test_dispatch_equals_the_reference_forward_and_backward(config: RouterConfig, kind: str, rows: Rows) -> None:
    results = []
    for compute in (run, run_reference):
        module = RoutedExperts(experts_of(kind), build_router(config, TASKS, E, 0, seed=1), config.combine)
        hidden = states().requires_grad_()
        out = compute(module, rows, hidden)
        (out.sin() * torch.arange(out.numel()).reshape(out.shape).cos()).sum().backward()
        results.append((out, hidden.grad, gradients(module)))
    (out, to_hidden, grads), (expected, expected_to_hidden, expected_grads) = results
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(to_hidden, expected_to_hidden, atol=1e-5, rtol=1e-5)
    for name, grad in grads.items():
        reference = expected_grads[name]
        assert reference is not None
        torch.testing.assert_close(torch.zeros_like(reference) if grad is None else grad, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ffn", "adapter"])
@pytest.mark.parametrize("config", BOTH_WAYS.values(), ids=BOTH_WAYS.keys())
def test_experts_that_nobody_chose_are_not_run_and_get_no_gradient(config: RouterConfig, kind: str) -> None:
    module = RoutedExperts(experts_of(kind), build_router(config, TASKS, E, 0, seed=1), config.combine)
    chosen = set(module.router(torch.tensor([3])).chosen[0].tolist())
    idle = [expert for e, expert in enumerate(module.experts) if e not in chosen]
    for expert in idle:
        for parameter in expert.parameters():
            parameter.data.fill_(float("nan"))
    out = run(module, SINGLE, states())
    out.sum().backward()
    assert out.isfinite().all()
    for e, expert in enumerate(module.experts):
        assert all((p.grad is not None) == (e in chosen) for p in expert.parameters())


@pytest.mark.parametrize("config", BOTH_WAYS.values(), ids=BOTH_WAYS.keys())
def test_a_single_expert_is_called_plainly(config: RouterConfig) -> None:
    expert = feed_forward()
    module = RoutedExperts([expert], build_router(replace(config, top_k=1), TASKS, 1, 0, seed=0), config.combine)
    assert torch.equal(run(module, MIXED, states()), expert(states()))


@pytest.mark.parametrize("kind", ["ffn", "adapter"])
@pytest.mark.parametrize("config", BOTH_WAYS.values(), ids=BOTH_WAYS.keys())
def test_dispatch_under_autocast_is_near_the_full_precision_result(config: RouterConfig, kind: str) -> None:
    module = RoutedExperts(experts_of(kind), build_router(config, TASKS, E, 0, seed=1), config.combine)
    exact = run(module, MIXED, states())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = run(module, MIXED, states())
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()


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


def test_every_router_of_the_helpers_is_covered() -> None:
    kinds = {(c.kind, c.selection if c.kind == "task" else None) for c in ROUTERS.values()}
    assert kinds == {("task", "top_k"), ("task", "soft"), ("random", None), ("uniform", None)}
