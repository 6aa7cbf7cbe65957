"""Dispatch computes the definition, every expert on everything times its weight, for every way of routing and mixing."""

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import MixtralConfig, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from lightning_modules.building import ConfigError
from lightning_modules.network.dispatch import Combine, RoutedExperts, mix
from lightning_modules.network.experts import Bottleneck, upcycle
from lightning_modules.network.routers.record import Route, Routing, Rows, Unit, Units
from lightning_modules.network.seams import FeedForward, Layer, RowFree
from lightning_modules.network.token_dispatch import Dispatch

D, F, E, B, S = 8, 12, 5, 7, 3
MIXED: Rows = ((0, 0, 2), (1, 2, 3), (4, 3, 7))
SINGLE: Rows = ((3, 0, 7),)
LENGTHS = (3, 1, 2, 3, 2, 3, 1)
KINDS = ("ffn", "gated", "adapter")
BACKENDS: tuple[Dispatch, ...] = ("loop", "grouped")
UNITS: tuple[Unit, ...] = ("task", "example", "token")
COMBINES: tuple[Combine, ...] = ("outputs", "parameters")


class Attending(nn.Module):
    """A whole block, of which every part of the arguments decides something."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.ffn = nn.Linear(D, D), feed_forward(True)

    def forward(self, hidden: Tensor, mask: Tensor, biases: Tensor, *, pair: tuple[Tensor, list[Any]]) -> tuple[Tensor]:
        crossed, (scale, name) = pair
        assert name == "as it is" and len(mask) == len(crossed) == len(hidden)
        scores = hidden @ hidden.transpose(1, 2) + biases + mask.squeeze(1)
        hidden = hidden + scores.softmax(-1) @ self.values(hidden) + crossed.mean(1, keepdim=True) * scale
        return (hidden + self.ffn(hidden),)


def feed_forward(gated: bool = False, width: int = F) -> FeedForward:
    gate = nn.Linear(D, width, bias=False) if gated else None
    return FeedForward(nn.Linear(D, width), nn.GELU(), nn.Linear(width, D), gate)


def experts_of(kind: str, count: int = E) -> nn.ModuleList:
    torch.manual_seed(0)
    if kind == "layer":
        layer = Layer(Attending())
        return nn.ModuleList(upcycle(layer, 0.5, seed=e) for e in range(count))
    if kind != "adapter":
        return nn.ModuleList(upcycle(feed_forward(kind == "gated"), 1.0, seed=e) for e in range(count))
    adapters = nn.ModuleList(Bottleneck(D, 4, seed=e) for e in range(count))
    for parameter in adapters.parameters():
        parameter.data.normal_(0, 0.5)
    return adapters


def states(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(2), dtype=dtype)


def real() -> Tensor:
    return torch.arange(S) < torch.tensor(LENGTHS).unsqueeze(1)


def block_arguments(size: int = B) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The other arguments of :class:`Attending` for a batch of that many rows; the biases have as many heads as it has rows."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.randn(B, 1, 1, S, generator=generator)[:size]
    crossed, biases = torch.randn(B, 4, D, generator=generator)[:size], torch.randn(1, S, S, generator=generator)
    return (mask, biases), {"pair": (crossed, [torch.tensor(0.5), "as it is"])}


def units_of(kind: Unit, rows: Rows) -> Units:
    tasks = torch.tensor([task for task, start, stop in rows for _ in range(start, stop)])
    if kind == "task":
        tasks, example = torch.tensor([task for task, _, _ in rows]), torch.tensor([start for _, start, _ in rows])
        return Units(kind, tasks, example, torch.ones(len(rows)))
    if kind == "example":
        return Units(kind, tasks, torch.arange(B), torch.ones(B))
    index = real().flatten().nonzero().squeeze(1)
    return Units(kind, tasks[index // S], index // S, torch.ones(len(index)), index)


def route_of(kind: Unit, k: int, rows: Rows = MIXED, dropped: float = 0.0, experts: int = E, seed: int = 0) -> Route:
    """Random experts with random weights that need a gradient; some choices find no room. ``experts`` of E are ever chosen."""
    units, generator = units_of(kind, rows), torch.Generator().manual_seed(seed)
    count = len(units.task)
    probabilities = torch.randn(count, E, generator=generator).softmax(-1)
    chosen = probabilities[:, :experts].topk(k).indices
    lost = torch.rand(count, k, generator=generator) < dropped
    spread = torch.zeros(count, E).scatter(1, chosen, (~lost).float())
    chosen = chosen.masked_fill(lost, -1)
    weights = (probabilities * spread).requires_grad_()
    on_host = chosen.tolist() if kind == "task" else None
    return Route(rows, units, Routing(weights, chosen, probabilities, probabilities.log()), on_host)


def per_row(route: Route) -> Tensor:
    """The weights of each row or token, (B, 1, E) or (B, S, E), zero at padding."""
    weights, units = route.routing.weights, route.units
    if units.kind == "example":
        return weights.unsqueeze(1)
    if units.kind == "task":
        return torch.cat([weights[r].expand(stop - start, 1, -1) for r, (_, start, stop) in enumerate(route.rows)])
    assert units.index is not None
    return torch.zeros(B * S, E).index_copy(0, units.index, weights).view(B, S, E)


def merged(experts: nn.ModuleList, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    named = [dict(expert.named_parameters()) for expert in experts]
    return functional_call(
        experts[0], {k: sum(weights[e] * own[k] for e, own in enumerate(named)) for k in named[0]}, args, kwargs
    )


def naive(experts: nn.ModuleList, route: Route, hidden: Tensor, combine: Combine, args: Any = (), kwargs: Any = None) -> Tensor:
    """What :func:`mix` means, slowly: every expert takes part in everything, with its weight or zero."""
    weights, kwargs = per_row(route), kwargs or {}
    if combine == "outputs":
        return torch.stack([weights[..., e, None] * expert(hidden, *args, **kwargs) for e, expert in enumerate(experts)]).sum(0)
    parts = []
    for b in range(B):
        own = [value if value.shape[0] != B else value[b : b + 1] for value in args]
        named = {k: (pair[0][b : b + 1], pair[1]) for k, pair in kwargs.items()}
        parts.append(merged(experts, weights[b, 0], hidden[b : b + 1], *own, **named))
    return torch.cat(parts)


def gradients(out: Tensor, experts: nn.ModuleList, route: Route, hidden: Tensor) -> list[Tensor | None]:
    """Gradients of a loss that weighs every number of the output differently."""
    for tensor in (*experts.parameters(), route.routing.weights, hidden):
        tensor.grad = None
    (out.sin() * torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).cos()).sum().backward()
    taken = per_row(route).flatten(0, 1).ne(0).any(0)
    to_weights = route.routing.weights.grad
    assert to_weights is not None
    # The weight of an expert that was not chosen is no variable: only the reference, which runs it, has a gradient there.
    to_weights = to_weights * route.routing.weights.ne(0)
    ours: list[Tensor | None] = [hidden.grad, to_weights]
    for e, expert in enumerate(experts):
        ours += [parameter.grad if taken[e] else None for parameter in expert.parameters()]
    return ours


def assert_equals_the_reference(
    kind: str, route: Route, combine: Combine = "outputs", dispatch: Dispatch = "loop", others: tuple[Any, Any] = ((), {})
) -> None:
    experts, hidden = experts_of(kind), states().requires_grad_()
    out = mix(experts, route, hidden, combine, dispatch, *others)
    found = gradients(out, experts, route, hidden)
    reference = naive(experts, route, hidden, combine, *others)
    torch.testing.assert_close(out, reference, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found, gradients(reference, experts, route, hidden), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [MIXED, SINGLE], ids=["mixed", "single_task"])
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("kind", KINDS)
def test_tasks_equal_the_reference(kind: str, k: int, combine: Combine, rows: Rows) -> None:
    assert_equals_the_reference(kind, route_of("task", k, rows), combine)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, E])
@pytest.mark.parametrize("kind", KINDS)
def test_examples_equal_the_reference(kind: str, k: int, combine: Combine) -> None:
    assert_equals_the_reference(kind, route_of("example", k), combine)


@pytest.mark.parametrize("dispatch", BACKENDS)
@pytest.mark.parametrize("dropped", [0.0, 0.4], ids=["dropless", "dropping"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, E])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_the_reference(kind: str, k: int, dropped: float, dispatch: Dispatch) -> None:
    assert_equals_the_reference(kind, route_of("token", k, dropped=dropped), "outputs", dispatch)


@pytest.mark.parametrize("dispatch", BACKENDS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_experts_without_tokens_are_left_out(k: int, dispatch: Dispatch) -> None:
    assert_equals_the_reference("ffn", route_of("token", k, experts=3), "outputs", dispatch)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("unit", ["task", "example"])
def test_whole_blocks_get_their_rows_of_the_other_arguments(unit: Unit, k: int, combine: Combine) -> None:
    assert_equals_the_reference("layer", route_of(unit, k), combine, others=block_arguments())


def test_an_argument_without_rows_reaches_every_slice_whole() -> None:
    class Biased(nn.Module):
        def forward(self, hidden: Tensor, biases: RowFree) -> Tensor:
            assert biases.value.shape == (B, S)
            return hidden + biases.value.sum()

    experts, biases = nn.ModuleList([Biased(), Biased()]), RowFree(torch.ones(B, S))
    route = route_of("task", 1, experts=2)
    out = mix(experts, route, states(), "outputs", args=(biases,))
    expected = (states() + B * S) * route.routing.weights.amax(1).repeat_interleave(torch.tensor([2, 1, 4])).view(B, 1, 1)
    torch.testing.assert_close(out, expected)


def test_a_route_of_other_rows_is_refused() -> None:
    for rows in (((0, 0, 2), (1, 2, 6)), ((0, 0, 3), (1, 2, 7)), ((0, 1, 7),)):
        with pytest.raises(ValueError, match="must cover the batch's 7 rows"):
            mix(experts_of("ffn"), route_of("task", 1, rows), states(), "outputs")
    with pytest.raises(ValueError, match="one row for each of the batch's 6"):
        mix(experts_of("ffn"), route_of("example", 1), states()[:6], "outputs")


@pytest.mark.parametrize("dispatch", BACKENDS)
@pytest.mark.parametrize("kind", ["ffn", "adapter"])
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("unit", UNITS)
def test_idle_experts_are_not_run_get_no_gradient_and_stand_still(
    unit: Unit, combine: Combine, kind: str, dispatch: Dispatch
) -> None:
    experts = experts_of(kind)
    route = route_of(unit, 2, experts=3)
    for expert in experts[3:]:
        for parameter in expert.parameters():
            parameter.data.fill_(float("nan"))
    before = copy.deepcopy(experts)
    optimizer = torch.optim.AdamW(experts.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    out = mix(experts, route, states(), combine, dispatch)
    out.square().sum().backward()
    optimizer.step()
    used = set(route.routing.chosen.flatten().tolist())
    assert out.isfinite().all()
    for e, (expert, old) in enumerate(zip(experts, before, strict=True)):
        for parameter, value in zip(expert.parameters(), old.parameters(), strict=True):
            assert (parameter.grad is not None) == (e in used)
            assert torch.equal(parameter.nan_to_num(), value.nan_to_num()) == (e not in used)


def test_tokens_that_find_no_room_anywhere_are_zero() -> None:
    route = route_of("token", 2, dropped=2.0)
    for dispatch in BACKENDS:
        out = mix(experts_of("ffn"), route, states(), "outputs", dispatch)
        assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("k", [1, 3, E])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_experts_under_any_weights_that_sum_to_one_are_the_dense_layer(
    kind: str, unit: Unit, k: int, combine: Combine
) -> None:
    expert = experts_of(kind)[0]
    experts, route = nn.ModuleList(copy.deepcopy(expert) for _ in range(E)), route_of(unit, k)
    weights = route.routing.weights / route.routing.weights.sum(1, keepdim=True)
    route = Route(route.rows, route.units, Routing(weights, route.routing.chosen, weights, weights), route.chosen)
    for dispatch in BACKENDS:
        out = mix(experts, route, states(), combine, dispatch)
        torch.testing.assert_close(out[real()], expert(states())[real()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dispatch", BACKENDS)
def test_padding_is_not_computed_and_changes_nothing(dispatch: Dispatch) -> None:
    experts, route, hidden = experts_of("ffn"), route_of("token", 2), states()
    out = mix(experts, route, hidden, "outputs", dispatch)
    assert torch.equal(out[~real()], torch.zeros_like(out[~real()]))
    wider = torch.cat([hidden.masked_fill(~real().unsqueeze(-1), float("nan")), torch.full((B, 2, D), float("nan"))], 1)
    assert route.units.index is not None
    index = route.units.index // S * (S + 2) + route.units.index % S
    units = Units("token", route.units.task, route.units.example, route.units.weight, index)
    again = mix(experts, Route(route.rows, units, route.routing), wider, "outputs", dispatch)
    torch.testing.assert_close(again[:, :S], out, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("unit", ["example", "token"])
@pytest.mark.parametrize("kind", ["ffn", "adapter"])
def test_a_row_does_not_depend_on_its_batch_mates(kind: str, unit: Unit) -> None:
    experts, route, hidden = experts_of(kind), route_of(unit, 2), states()
    out, units = mix(experts, route, hidden, "outputs"), route.units
    for b in range(B):
        of = (units.example == b).nonzero().squeeze(1)
        index = None if units.index is None else units.index[of] - b * S
        alone = Units(unit, units.task[of], torch.zeros_like(of), units.weight[of], index)
        routing = Routing(route.routing.weights[of], route.routing.chosen[of], route.routing.weights, route.routing.weights)
        own = mix(experts, Route(((0, 0, 1),), alone, routing), hidden[b : b + 1], "outputs")
        torch.testing.assert_close(own[0], out[b], atol=1e-6, rtol=1e-6)


def asked(route: Route, blocks: list[int]) -> Any:
    def answer(block: int, hidden: Tensor) -> Route:
        blocks.append(block)
        return route

    return SimpleNamespace(route=answer)


def test_a_module_asks_for_the_route_of_its_block_and_adds_shared_experts() -> None:
    experts, shared, blocks = experts_of("ffn"), experts_of("gated", 2), []
    route = route_of("token", 2)
    module = RoutedExperts(6, list(experts), "outputs", list(shared))
    expected = mix(experts, route, states(), "outputs") + shared[0](states()) + shared[1](states())
    torch.testing.assert_close(module(states(), asked(route, blocks)), expected)
    assert blocks == [6]


@pytest.mark.parametrize("combine", COMBINES)
def test_a_single_expert_is_called_plainly(combine: Combine) -> None:
    expert, blocks = feed_forward(), []
    module = RoutedExperts(0, [expert], combine)
    assert torch.equal(module(states(), asked(route_of("task", 1), blocks)), expert(states()))
    assert blocks == []
    layer, (args, kwargs) = experts_of("layer", 1)[0], block_arguments()
    module = RoutedExperts(0, [layer], combine)
    assert torch.equal(module(states(), asked(route_of("task", 1), blocks), *args, **kwargs), layer(states(), *args, **kwargs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("unit", UNITS)
def test_under_autocast_the_result_is_near_that_of_full_precision(unit: Unit, k: int, combine: Combine, kind: str) -> None:
    experts, route = experts_of(kind), route_of(unit, k)
    exact = mix(experts, route, states(), combine)
    for dispatch in BACKENDS:
        if dispatch == "grouped" and unit == "token":
            experts = nn.ModuleList(feed_forward(kind == "gated", 16) for _ in range(E))
            exact = mix(experts, route, states(), combine, "loop")
        hidden = states().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = mix(experts, route, hidden, combine, dispatch)
        assert rough.dtype == torch.bfloat16
        assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()
        rough.float().square().sum().backward()
        assert hidden.grad is not None and hidden.grad.dtype == torch.float32
        assert all(p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in experts.parameters())


@pytest.mark.parametrize("unit", ["example", "token"])
@pytest.mark.parametrize("kind", ["gated", "adapter"])
@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_gradients_are_exact_in_float64(kind: str, unit: Unit, dropped: float) -> None:
    experts, route = experts_of(kind).double(), route_of(unit, 2, dropped=dropped if unit == "token" else 0.0)
    weights = route.routing.weights.detach().double().requires_grad_()
    inputs = (states(torch.float64).requires_grad_(), weights, *experts.parameters())

    def compute(hidden: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        kept = weights * route.routing.weights.ne(0)
        routing = Routing(kept, route.routing.chosen, weights, weights)
        return mix(experts, Route(route.rows, route.units, routing), hidden, "outputs")

    assert torch.autograd.gradcheck(compute, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", ["ffn", "adapter", "layer"])
def test_rows_that_share_their_weights_are_merged_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, route = experts_of(kind), route_of("example", E)
    even = torch.full((B, E), 1 / E)
    routing = Routing(even, route.routing.chosen, even, even)
    calls: list[int] = []
    monkeypatch.setattr(type(experts[0]), "forward", counted(type(experts[0]).forward, calls))
    args, kwargs = block_arguments() if kind == "layer" else ((), {})
    for combine, forced in (("outputs", True), ("parameters", False)):
        calls.clear()
        out = mix(experts, Route(route.rows, route.units, routing, merged=forced), states(), combine, "auto", args, kwargs)
        assert calls == [B]
        torch.testing.assert_close(out, merged(experts, even[0], states(), *args, **kwargs))


def counted(forward: Callable[..., Tensor], calls: list[int]) -> Callable[..., Tensor]:
    def wrapper(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(hidden))
        return forward(self, hidden, *args, **kwargs)

    return wrapper


def test_rows_of_equal_weights_keep_a_gradient_each() -> None:
    experts, route = experts_of("ffn"), route_of("example", E)
    even = torch.full((B, E), 1 / E, requires_grad=True)
    route = Route(route.rows, route.units, Routing(even, route.routing.chosen, even, even))
    (to_ours,) = torch.autograd.grad(mix(experts, route, states(), "parameters").sin().sum(), even)
    (expected,) = torch.autograd.grad(naive(experts, route, states(), "parameters").sin().sum(), even)
    torch.testing.assert_close(to_ours, expected)
    assert not torch.allclose(to_ours, to_ours[:1])


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_projection_can_have_a_draw_of_its_own(kind: str, combine: Combine) -> None:
    experts, units = experts_of(kind), units_of("example", MIXED)
    draws = torch.randint(4, (2, B), generator=torch.Generator().manual_seed(5))
    first, second = (functional.one_hot(draw, E).float() for draw in draws)
    routing = Routing(first, draws[0].unsqueeze(1), first, first, terms={"second": second})
    out = mix(experts, Route(MIXED, units, routing), states(), combine)
    for b, (a, z) in enumerate(draws.T.tolist()):
        inner, outer = ("down", "up") if kind == "adapter" else ("up", "down")
        crossed = copy.deepcopy(experts[a])
        setattr(crossed, outer, getattr(experts[z], outer))
        torch.testing.assert_close(out[b], crossed(states()[b]))
        assert getattr(crossed, inner) is not getattr(experts[a], inner)
    out.sum().backward()
    used = set(draws.flatten().tolist())
    assert all(any(p.grad is not None for p in expert.parameters()) == (e in used) for e, expert in enumerate(experts))
    args, kwargs = block_arguments()
    with pytest.raises(ValueError, match="a draw for each projection"):
        mix(experts_of("layer"), Route(MIXED, units, routing), states(), combine, "auto", args, kwargs)


@pytest.mark.parametrize("dispatch", BACKENDS)
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_slots_follow_the_formula(kind: str, slots: int, dispatch: Dispatch) -> None:
    experts, hidden, mask = experts_of(kind), states(), real().unsqueeze(-1)
    logits = torch.randn(B, S, E * slots, generator=torch.Generator().manual_seed(4))
    terms = {"dispatch": logits.masked_fill(~mask, -1e9).softmax(1) * mask, "combine": logits.softmax(-1) * mask}
    routing = Routing(logits[..., 0], logits[..., 0].long(), logits, logits, terms=terms)
    out = mix(experts, Route(MIXED, units_of("token", MIXED), routing), hidden, "outputs", dispatch)
    expected = torch.zeros_like(hidden)
    for b in range(B):
        for p in range(E * slots):
            slot = sum(terms["dispatch"][b, s, p] * hidden[b, s] for s in range(S))
            expected[b] += terms["combine"][b, :, p, None] * experts[p // slots](slot)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def swiglu(gate_up: Tensor, down: Tensor) -> FeedForward:
    """A gated FFN of one expert's rows of a stacked public block: SwiGLU, the activation on the first half."""
    gate, up = gate_up.chunk(2)
    linears = [nn.Linear(weight.shape[1], weight.shape[0], bias=False) for weight in (gate, up, down)]
    for linear, weight in zip(linears, (gate, up, down), strict=True):
        linear.weight.data.copy_(weight)
    return FeedForward(linears[0], nn.SiLU(), linears[2], linears[1])


@pytest.mark.parametrize("dispatch", BACKENDS)
@pytest.mark.parametrize("block", ["mixtral", "olmoe"])
def test_a_public_token_block_with_the_same_weights_and_logits_agrees(block: str, dispatch: Dispatch) -> None:
    sizes: dict[str, Any] = {"hidden_size": D, "intermediate_size": F, "num_experts_per_tok": 2}
    if block == "mixtral":
        public: Any = MixtralSparseMoeBlock(MixtralConfig(num_local_experts=E, **sizes)).eval()
    else:
        public = OlmoeSparseMoeBlock(OlmoeConfig(num_experts=E, norm_topk_prob=True, **sizes)).eval()
    for parameter in public.parameters():
        parameter.data.normal_(0, 0.4, generator=torch.Generator().manual_seed(parameter.numel()))
    hidden = states()
    probabilities = functional.linear(hidden.flatten(0, 1), public.gate.weight).softmax(-1)
    values, chosen = probabilities.topk(2)
    weights = torch.zeros_like(probabilities).scatter(1, chosen, values / values.sum(1, keepdim=True))
    every = torch.arange(B * S)
    units = Units("token", torch.zeros_like(every), every // S, torch.ones(B * S), every)
    experts = nn.ModuleList(swiglu(a, b) for a, b in zip(public.experts.gate_up_proj, public.experts.down_proj, strict=True))
    out = mix(
        experts, Route(SINGLE, units, Routing(weights, chosen, probabilities, probabilities)), hidden, "outputs", dispatch
    )
    expected = public(hidden)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    for e, expert in enumerate(experts):
        assert isinstance(expert, FeedForward) and expert.gate is not None
        ours = torch.cat([expert.up.weight.grad, expert.gate.weight.grad])  # type: ignore[list-item]
        torch.testing.assert_close(ours, public.experts.gate_up_proj.grad[e], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(expert.down.weight.grad, public.experts.down_proj.grad[e], atol=1e-4, rtol=1e-4)


def several(make: Callable[[], nn.Module]) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in range(E))


@pytest.mark.parametrize(
    "experts, dtype, law",
    [
        (several(lambda: feed_forward(width=10)), torch.float32, "multiples of 4, got 8 and 10"),
        (several(lambda: feed_forward(width=12)), torch.bfloat16, "multiples of 8, got 8 and 12"),
        (several(feed_forward), torch.float64, "got torch.float64"),
        (several(lambda: nn.Linear(D, D)), torch.float32, "feed-forward and bottleneck experts"),
        (nn.ModuleList(feed_forward(width=4 * (e + 1)) for e in range(E)), torch.float32, "of one shape"),
    ],
    ids=["float32", "bfloat16", "float64", "others", "shapes"],
)
def test_grouped_says_what_it_cannot_compute(experts: nn.ModuleList, dtype: torch.dtype, law: str) -> None:
    experts = experts.to(dtype)
    with pytest.raises(ConfigError, match=law) as raised:
        mix(experts, route_of("token", 2), states(dtype), "outputs", "grouped")
    assert raised.value.key == "model.dispatch"
    for dispatch in ("auto", "loop"):
        assert mix(experts, route_of("token", 2), states(dtype), "outputs", dispatch).dtype == dtype


def test_dropout_stays_within_the_experts() -> None:
    experts = experts_of("ffn")
    for expert in experts:
        assert isinstance(expert, FeedForward)
        expert.dropout = nn.Dropout(0.5)
    route: Sequence[Route] = [route_of(unit, 2) for unit in UNITS]
    exact = [mix(experts.eval(), each, states(), "outputs") for each in route]
    for dispatch in BACKENDS:
        for each, out in zip(route, exact, strict=True):
            assert not torch.allclose(mix(experts.train(), each, states(), "outputs", dispatch), out)
            torch.testing.assert_close(mix(experts.eval(), each, states(), "outputs", dispatch), out)
