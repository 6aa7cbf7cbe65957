"""Sending the rows of a batch through the experts that a router chose for them, and mixing what comes back.

Legend: B rows of the batch, S positions, d hidden width, E experts, U units routed, K experts chosen per unit.
An expert that no unit chose is not computed and gets no gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lightning_modules.network.experts import Bottleneck
from lightning_modules.network.routers.record import Route, Rows
from lightning_modules.network.token_dispatch import (
    Dispatch,
    anatomies,
    by_loop,
    compute_rows,
    sort_by_expert,
    through,
)

Combine = Literal["outputs", "parameters"]


class Traffic(Protocol):
    """What a forward hands to the experts: who routes."""

    def route(self, block: int, hidden: Tensor) -> Route:
        """The route of one block's input (B, S, d)."""
        ...


@dataclass(frozen=True)
class Others:
    """A whole block's other arguments (masks, biases, encoder states, caches)."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def of(self, size: int, take: Callable[[Tensor], Tensor]) -> "Others":
        """Those of some rows: ``take`` picks them from every tensor of at least two dimensions whose first is the batch
        (``size``), also within tuples and lists; the rest belongs to all rows."""
        if not self:
            return self
        args = tuple(_rows_of(value, size, take) for value in self.args)
        return Others(args, {name: _rows_of(value, size, take) for name, value in (self.kwargs or {}).items()})

    def call(self, expert: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        """The expert's output."""
        return expert(hidden, *self.args, **(self.kwargs or {}))

    def __bool__(self) -> bool:
        return bool(self.args or self.kwargs)


class RoutedExperts(nn.Module):
    """The experts of one block, called at a seam as ``module(hidden, traffic)``; the router lives with the network's others."""

    def __init__(
        self,
        block: int,
        experts: Sequence[nn.Module],
        combine: Combine,
        shared: Sequence[nn.Module] = (),
        dispatch: Dispatch = "auto",
    ) -> None:
        super().__init__()
        self.block = block
        self.experts = nn.ModuleList(experts)
        self.shared = nn.ModuleList(shared)
        self.combine: Combine = combine
        self.dispatch: Dispatch = dispatch

    def forward(self, hidden: Tensor, traffic: Traffic, *args: Any, **kwargs: Any) -> Tensor:
        """(B, S, d) -> (B, S, d), the routed mixture plus the shared experts. Whole-block experts get the block's other
        arguments. A single expert is called without asking the router."""
        if len(self.experts) == 1 and not self.shared:
            return self.experts[0](hidden, *args, **kwargs)
        route = traffic.route(self.block, hidden)
        out = mix(self.experts, route, hidden, self.combine, self.dispatch, args, kwargs)
        for expert in self.shared:
            out = out + expert(hidden)
        return out


def mix(
    experts: nn.ModuleList,
    route: Route,
    hidden: Tensor,
    combine: Combine,
    dispatch: Dispatch = "auto",
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """The routed experts' mixture for every row, (B, S, d) -> (B, S, d); zero at positions that are not routed.

    ``outputs``: the chosen experts' outputs, summed by weight. ``parameters``: one expert whose parameters are that
    weighted sum (SMEAR, Muqeeth et al. 2023), merged once per task, or once per example.

    Raises:
        ValueError: the route is of other rows than ``hidden`` has, or asks for halves of experts that have none.
        ConfigError: ``dispatch`` is ``grouped``, which the experts, their widths or the dtype do not allow.
    """
    others = Others(args, kwargs)
    if len(experts) == 1:
        return others.call(experts[0], hidden)
    if "dispatch" in route.routing.terms:
        return _through_slots(experts, route, hidden, dispatch)
    match route.units.kind:
        case "task":
            return _by_task(experts, route, hidden, combine, others)
        case "example":
            return _by_example(experts, route, hidden, "parameters" if route.merged else combine, others)
        case "token":
            return _by_token(experts, route, hidden, dispatch)


def _by_task(experts: nn.ModuleList, route: Route, hidden: Tensor, combine: Combine, others: Others) -> Tensor:
    """Contiguous slices of the batch, one per group; ``parameters`` are merged once per group."""
    weights, rows = route.routing.weights, route.rows
    _check_cover(rows, len(hidden))
    assert route.chosen is not None
    everyone = route.routing.chosen.shape[1] == len(experts)
    if combine == "outputs" and everyone and len(rows) > 1 and _are_bottlenecks(experts):
        per_row = torch.cat([weights[r].expand(stop - start, 1, -1) for r, (_, start, stop) in enumerate(rows)])
        return _wide(list(experts), per_row, hidden)
    apply = _merged if combine == "parameters" else _summed
    parts = []
    # One split: the backward of a slice would fill the whole batch's gradient with zeros, once per group.
    slices = hidden.split([stop - start for _, start, stop in rows]) if len(rows) > 1 else [hidden]
    for (_, start, stop), states, chosen, scales in zip(rows, slices, route.chosen, weights.unbind(), strict=True):
        each = scales.unbind()
        own = others if len(rows) == 1 else others.of(len(hidden), lambda value, of=slice(start, stop): value[of])
        parts.append(apply([experts[e] for e in chosen], [each[e] for e in chosen], states, own))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _check_cover(rows: Rows, size: int) -> None:
    ends = [0, *(stop for _, _, stop in rows)]
    if [start for _, start, _ in rows] != ends[:-1] or ends[-1] != size:
        raise ValueError(f"the route must cover the batch's {size} rows one after the other, got groups {rows}")


def _by_example(experts: nn.ModuleList, route: Route, hidden: Tensor, combine: Combine, others: Others) -> Tensor:
    """Rows sorted by expert, and put back."""
    routing = route.routing
    weights, size = routing.weights, len(hidden)
    if len(weights) != size:
        raise ValueError(f"the route must have one row for each of the batch's {size}, got {len(weights)}")
    if "second" in routing.terms:
        return _in_halves(experts, routing.chosen[:, :1], weights, routing.terms["second"], hidden)
    if combine == "parameters":
        return _merged_by_example(experts, route, hidden, others)
    if _all_run(routing.chosen, len(experts)):
        return _summed_by_row(experts, weights, hidden, others)
    order = sort_by_expert(routing.chosen, len(experts))

    def call(e: int, part: Tensor, numbers: Tensor) -> Tensor:
        return others.of(size, lambda value: value.index_select(0, numbers)).call(experts[e], part)

    return through(order, hidden, weights, lambda rows: by_loop(order, rows, call))


def _by_token(experts: nn.ModuleList, route: Route, hidden: Tensor, dispatch: Dispatch) -> Tensor:
    """The real tokens, sorted by expert, and put back; zeros at padding."""
    routing, index = route.routing, route.units.index
    assert index is not None
    flat = hidden.flatten(0, 1)
    padded = len(index) < len(flat)
    tokens = flat.index_select(0, index) if padded else flat
    if _all_run(routing.chosen, len(experts)):
        out = _summed_by_row(experts, routing.weights, tokens, Others())
    else:
        order = sort_by_expert(routing.chosen, len(experts))
        out = through(order, tokens, routing.weights, lambda rows: compute_rows(list(experts), order.counts, rows, dispatch))
    if padded:
        out = out.new_zeros(len(flat), out.shape[-1]).index_copy(0, index, out)
    return out.view(*hidden.shape[:-1], -1)


def _all_run(chosen: Tensor, num_experts: int) -> bool:
    """Whether every unit runs every expert: then nothing needs sorting."""
    return chosen.shape[1] == num_experts and bool((chosen >= 0).all())


def _summed_by_row(experts: nn.ModuleList, weights: Tensor, hidden: Tensor, others: Others) -> Tensor:
    """Every expert on all rows (U, ..., d), each row by its own ``weights`` (U, E)."""
    weights = weights.view(len(hidden), *[1] * (hidden.dim() - 2), len(experts))
    if _are_bottlenecks(experts):
        return _wide(list(experts), weights, hidden)
    outputs = [others.call(expert, hidden) for expert in experts]
    return _weighted_sum(list(weights.to(outputs[0].dtype).split(1, -1)), outputs)


def _in_halves(experts: nn.ModuleList, chosen: Tensor, weights: Tensor, second: Tensor, hidden: Tensor) -> Tensor:
    """The first projections of one expert and the last of another, each drawn on its own (AdaMix, Wang et al. 2022)."""
    parts = anatomies(list(experts))
    if parts is None:
        raise ValueError("a draw for each projection needs feed-forward or bottleneck experts of one shape, got others")
    first, last = (sort_by_expert(numbers, len(experts)) for numbers in (chosen, second.argmax(1, keepdim=True)))
    inner = through(first, hidden, weights, lambda rows: by_loop(first, rows, lambda e, part, _: parts[e].inner(part)))
    return through(last, inner, second, lambda rows: by_loop(last, rows, lambda e, part, _: parts[e].last(part)))


def _through_slots(experts: nn.ModuleList, route: Route, hidden: Tensor, dispatch: Dispatch) -> Tensor:
    """Each expert on its own slots, weighted means of a row's tokens; P slots in all (Soft MoE, Puigcerver et al. 2023)."""
    terms, count = route.routing.terms, len(experts)
    slots = terms["dispatch"].to(hidden.dtype).transpose(1, 2) @ hidden
    each = slots.unflatten(1, (count, -1)).transpose(0, 1)
    out = compute_rows(list(experts), [each[0].shape[:-1].numel()] * count, each.flatten(0, 2), dispatch)
    out = out.view(*each.shape[:-1], -1).transpose(0, 1).flatten(1, 2)
    return terms["combine"].to(out.dtype) @ out


def _merged_by_example(experts: nn.ModuleList, route: Route, hidden: Tensor, others: Others) -> Tensor:
    """One merged expert for every row, or for all rows where they share their weights."""
    weights, active = route.routing.weights, range(len(experts))
    if route.routing.chosen.shape[1] < len(experts):
        active = sorted({e for row in route.routing.chosen.tolist() for e in row})
        weights = weights[:, active]
    chosen = [experts[e] for e in active]
    # Rows of equal weights still have a gradient each.
    alike = route.merged or len(weights) == 1 or (not weights.requires_grad and bool((weights == weights[:1]).all()))
    if alike:
        return _merged(chosen, list(weights[0].unbind()), hidden, others)
    if parts := anatomies(chosen):
        inner = parts[0].inner(hidden, lambda name, x: _linear_by_row([getattr(part, name) for part in parts], weights, x))
        return _linear_by_row([part.last for part in parts], weights, inner)
    rows = []
    for number, scales in enumerate(weights.unbind()):
        of = slice(number, number + 1)
        own = others.of(len(hidden), lambda value, of=of: value[of])
        rows.append(_merged(chosen, list(scales.unbind()), hidden[of], own))
    return torch.cat(rows)


def _linear_by_row(linears: list[nn.Linear], weights: Tensor, hidden: Tensor) -> Tensor:
    """One merged layer per row: ``weights`` (B, E), (B, S, in) -> (B, S, out). The merge itself is not autocast."""
    with torch.autocast(hidden.device.type, enabled=False):
        own = torch.stack([linear.weight for linear in linears])
        scales = weights.to(own.dtype)
        merged = (scales @ own.flatten(1)).unflatten(1, own.shape[1:])
        bias = None if linears[0].bias is None else scales @ torch.stack([linear.bias for linear in linears])
    out = hidden @ merged.transpose(1, 2)
    return out if bias is None else out + bias.unsqueeze(1).to(out.dtype)


def _summed(experts: list[nn.Module], weights: list[Tensor], hidden: Tensor, others: Others) -> Tensor:
    """``experts`` and the scalar weight of each for the rows of one task, (n, S, d) -> (n, S, d)."""
    if len(experts) > 1 and _are_bottlenecks(experts):
        return _wide(experts, torch.stack(weights), hidden)
    return _weighted_sum(weights, [others.call(expert, hidden) for expert in experts])


def _merged(experts: list[nn.Module], weights: list[Tensor], hidden: Tensor, others: Others) -> Tensor:
    """As :func:`_summed`, but with one expert whose parameters are the weighted sum of the experts' parameters."""
    named = [dict(expert.named_parameters()) for expert in experts]
    merged = {name: _weighted_sum(weights, [own[name] for own in named]) for name in named[0]}
    return functional_call(experts[0], merged, (hidden, *others.args), dict(others.kwargs or {}))


def _weighted_sum(weights: list[Tensor], terms: list[Tensor]) -> Tensor:
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = total + weight * term
    return total


def _wide(bottlenecks: list[nn.Module], weights: Tensor, hidden: Tensor) -> Tensor:
    """The weighted sum of K bottlenecks as one of width K m: all side by side, activations scaled by ``weights`` (..., K)."""
    adapters = [module for module in bottlenecks if isinstance(module, Bottleneck)]
    down = functional.linear(hidden, _cat(adapters, lambda a: a.down.weight, 0), _cat(adapters, lambda a: a.down.bias, 0))
    width = adapters[0].down.out_features
    scale = weights.repeat_interleave(width, -1, output_size=weights.shape[-1] * width)
    scaled = functional.gelu(down) * scale.to(down.dtype)
    biases = torch.stack([adapter.up.bias for adapter in adapters])
    out = functional.linear(scaled, _cat(adapters, lambda a: a.up.weight, 1))
    return out + (weights.to(biases.dtype) @ biases).to(out.dtype)


def _cat(adapters: list[Bottleneck], tensor: Callable[[Bottleneck], Tensor], dim: int) -> Tensor:
    return torch.cat([tensor(adapter) for adapter in adapters], dim)


def _are_bottlenecks(experts: Sequence[nn.Module] | nn.ModuleList) -> bool:
    return all(isinstance(expert, Bottleneck) for expert in experts)


def _rows_of(value: Any, size: int, take: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return take(value) if value.dim() >= 2 and len(value) == size else value
    if type(value) in (tuple, list):
        return type(value)(_rows_of(item, size, take) for item in value)
    return value
