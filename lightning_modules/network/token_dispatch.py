"""Rows on their way through the experts that each of them chose: sorted by expert once, computed slice by slice, put back.

Legend: U rows to send (tokens, or whole examples), E experts, K experts chosen per row, M assignments that are kept (at most
U K), d hidden width. An expert without rows is not computed and gets no gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from lightning_modules.building import ConfigError
from lightning_modules.network.experts import Bottleneck
from lightning_modules.network.seams import FeedForward

Dispatch = Literal["auto", "loop", "grouped"]
"""``loop``: one call of each expert's module on its slice. ``grouped``: one matrix product over the slices of all experts.
``auto``: ``grouped`` in bfloat16 on a GPU, which has a kernel for it, where the widths allow it; else ``loop``: on a CPU
stacking the experts' weights costs more than the calls it saves (tests/benchmarks/moe_step.py)."""


class Anatomy(NamedTuple):
    """An expert ``last(dropout(activation(first(x)) * gate(x)))``, taken apart."""

    first: nn.Linear
    gate: nn.Linear | None
    activation: Callable[[Tensor], Tensor]
    dropout: Callable[[Tensor], Tensor] | None
    last: nn.Linear

    def inner(self, hidden: Tensor, first: Callable[[str, Tensor], Tensor] | None = None) -> Tensor:
        """What ``last`` reads, (..., d) -> (..., inner width). ``first(name, hidden)`` stands in for the projections."""
        project = first or (lambda name, x: getattr(self, name)(x))
        units = self.activation(project("first", hidden))
        if self.gate is not None:
            units = units * project("gate", hidden)
        return units if self.dropout is None else self.dropout(units)


def anatomy(expert: nn.Module) -> Anatomy | None:
    """The parts of a feed-forward or bottleneck expert; None of any other."""
    match expert:
        case FeedForward():
            return Anatomy(expert.up, expert.gate, expert.activation, expert.dropout, expert.down)
        case Bottleneck():
            return Anatomy(expert.down, None, functional.gelu, None, expert.up)
    return None


def anatomies(experts: Sequence[nn.Module]) -> list[Anatomy] | None:
    """The parts of all experts; None where one has none, or they differ in shape."""
    parts = [found for expert in experts if (found := anatomy(expert))]
    alike = len(parts) == len(experts) and len({_shape(part) for part in parts}) == 1
    return parts if alike else None


def _shape(part: Anatomy) -> tuple[Any, ...]:
    return tuple(
        layer and (layer.in_features, layer.out_features, layer.bias is not None)
        for layer in (part.first, part.gate, part.last)
    )


@dataclass(frozen=True)
class Order:
    """The kept assignments of rows to experts, sorted by expert and within an expert by row."""

    row: Tensor
    """(M,) the row of each assignment."""
    expert: Tensor
    """(M,) its expert."""
    places: Tensor
    """(M,) where the assignments of row 0 stand, then those of row 1, and so on."""
    starts: Tensor
    """(U,) where each row's part of ``places`` begins."""
    counts: list[int]
    """Assignments of each expert, on the host."""


def sort_by_expert(chosen: Tensor, num_experts: int) -> Order:
    """(U, K) experts' numbers, -1 for none -> the order in which they are computed. The device is waited for once."""
    keys, order = chosen.flatten().remainder(num_experts + 1).sort(stable=True)  # -1 becomes E, the last
    ends = torch.searchsorted(keys, torch.arange(num_experts, device=keys.device), right=True).tolist()
    counts = [stop - start for start, stop in zip([0, *ends], ends, strict=False)]
    row = order[: ends[-1]] // chosen.shape[1]
    sorted_rows, places = row.sort(stable=True)
    starts = torch.searchsorted(sorted_rows, torch.arange(len(chosen), device=keys.device))
    return Order(row, keys[: ends[-1]], places, starts, counts)


class _Spread(Function):
    """A copy of each row for each of its assignments. The backward, as :class:`_Collect`'s, is a gather like the forward: sums
    by atomic additions would differ from run to run."""

    @staticmethod
    def forward(hidden: Tensor, row: Tensor, places: Tensor, starts: Tensor) -> Tensor:
        return hidden.index_select(0, row)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _sum_by_row(grads[0], *ctx.saved_tensors), None, None, None


class _Collect(Function):
    """The sum over a row's assignments of what came back, times its weight."""

    @staticmethod
    def forward(out: Tensor, weights: Tensor, row: Tensor, places: Tensor, starts: Tensor) -> Tensor:
        return _sum_by_row(out, places, starts, weights.index_select(0, places))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, weights, row = ctx.saved_tensors
        grad = grads[0].index_select(0, row)
        to_weights = (grad * out).flatten(1).sum(1, dtype=weights.dtype) if ctx.needs_input_grad[1] else None
        return grad.mul_(weights.view(-1, *[1] * (out.dim() - 1))), to_weights, None, None, None


def _sum_by_row(values: Tensor, places: Tensor, starts: Tensor, weights: Tensor | None = None) -> Tensor:
    """(M, ...) -> (U, ...), zero for rows without an assignment. Gathers, weighs and adds in one pass."""
    summed = functional.embedding_bag(places, values.flatten(1), starts, mode="sum", per_sample_weights=weights)
    return summed.view(len(starts), *values.shape[1:])


def through(order: Order, hidden: Tensor, weights: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """``compute``, which gets the M assignments' rows in ``order``, summed by ``weights`` (U, E): (U, ...) -> (U, ...)."""
    if not len(order.row):
        return torch.zeros_like(hidden)
    out = compute(_Spread.apply(hidden, order.row, order.places, order.starts))
    kept = weights.flatten().index_select(0, order.row * weights.shape[1] + order.expert)
    return _Collect.apply(out, kept.to(out.dtype), order.row, order.places, order.starts)


def by_loop(order: Order, rows: Tensor, call: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """``call(expert, slice, its row numbers)`` for every expert that has a slice of ``rows`` (M, ...)."""
    slices = zip(rows.split(order.counts), order.row.split(order.counts), strict=True)
    return torch.cat([call(e, own, numbers) for e, (own, numbers) in enumerate(slices) if len(own)])


def compute_rows(experts: Sequence[nn.Module], counts: list[int], rows: Tensor, dispatch: Dispatch) -> Tensor:
    """Rows (M, d) sorted by expert, ``counts`` for each -> what the experts make of them.

    Raises:
        ConfigError: ``dispatch`` is ``grouped``, which these experts, their widths or the dtype do not allow.
    """
    busy = [(expert, count) for expert, count in zip(experts, counts, strict=True) if count]
    if _is_grouped([expert for expert, _ in busy], rows, dispatch):
        return _grouped([expert for expert, _ in busy], [count for _, count in busy], rows)
    parts = rows.split([count for _, count in busy])
    return torch.cat([expert(part) for (expert, _), part in zip(busy, parts, strict=True)])


def _is_grouped(experts: Sequence[nn.Module], rows: Tensor, dispatch: Dispatch) -> bool:
    dtype = _compute_dtype(rows)
    if dispatch == "loop" or (dispatch == "auto" and not (rows.is_cuda and dtype == torch.bfloat16)):
        return False
    law = _obstacle(experts, dtype)
    if dispatch == "grouped" and law:
        raise ConfigError("model.dispatch", law)
    return law is None


def _obstacle(experts: Sequence[nn.Module], dtype: torch.dtype) -> str | None:
    """The law of ``grouped_mm`` that is broken: rows of every matrix must start at multiples of 16 bytes."""
    parts = anatomies(experts)
    if parts is None:
        return "grouped applies to feed-forward and bottleneck experts of one shape, got others"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped computes in float32, bfloat16 and float16, got {dtype}"
    widths, multiple = (parts[0].first.in_features, parts[0].last.in_features), 16 // dtype.itemsize
    if any(width % multiple for width in widths):
        return f"grouped in {dtype} needs widths that are multiples of {multiple}, got {widths[0]} and {widths[1]} (inner)"
    return None


def _compute_dtype(rows: Tensor) -> torch.dtype:
    kind = rows.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype


def _grouped(experts: Sequence[nn.Module], counts: list[int], rows: Tensor) -> Tensor:
    """All experts at once. Only those with rows are stacked; the gradients reach each one's own parameters."""
    parts = anatomies(experts)
    assert parts is not None
    dtype = _compute_dtype(rows)
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=rows.device)
    # As a product with one-hot rows the sum that is a bias's gradient is one matrix product, too.
    owner = torch.arange(len(counts), device=rows.device) == torch.searchsorted(
        ends, torch.arange(len(rows), dtype=torch.int32, device=rows.device), right=True
    ).unsqueeze(1)

    def project(name: str, hidden: Tensor) -> Tensor:
        linears: list[nn.Linear] = [getattr(part, name) for part in parts]
        weights = torch.stack([linear.weight for linear in linears]).to(dtype)
        out = functional.grouped_mm(hidden.to(dtype), weights.transpose(1, 2), offs=ends)
        if linears[0].bias is None:
            return out
        return torch.addmm(out, owner.to(dtype), torch.stack([linear.bias for linear in linears]).to(dtype))

    return project("last", parts[0].inner(rows, project))
