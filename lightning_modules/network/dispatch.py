"""Sending the rows of a batch through the experts that their tasks chose, and mixing what comes back.

Legend: B rows of the batch, S positions, d hidden width, R groups of rows (one task each), E experts, K chosen per group.
An expert that no group chose is not computed and gets no gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lightning_modules.network.experts import Bottleneck
from lightning_modules.network.routers import Router, Routing

Combine = Literal["outputs", "parameters"]

Rows = tuple[tuple[int, int, int], ...]
"""(task, start, stop) for each group: rows ``start:stop`` of the batch are examples of task number ``task``. Groups follow
each other without gaps and cover the batch."""


@dataclass(frozen=True)
class Route:
    """One block's routing of a batch, and what the host must know of it."""

    rows: Rows
    routing: Routing
    """One row per group of ``rows``."""
    chosen: list[list[int]]
    """``routing.chosen`` on the host: which experts are called."""


def plan_routes(routers: Mapping[int, Router], rows: Rows, device: torch.device) -> dict[int, Route]:
    """Block number -> route of a batch for the routers of all blocks.

    A task-level router needs no hidden states, so all blocks are planned first: one copy to ``device`` and at most one back
    per forward, where asking at each block would make the device wait for the host as many times as there are blocks.
    """
    if not routers:
        return {}
    task_ids = torch.tensor([task for task, _, _ in rows], device=device)
    routings = {layer: router(task_ids) for layer, router in routers.items()}
    partial = [layer for layer, routing in routings.items() if routing.chosen.shape[1] < routing.weights.shape[1]]
    asked = torch.stack([routings[layer].chosen for layer in partial]).tolist() if partial else []
    on_host = dict(zip(partial, asked, strict=True))
    return {
        layer: Route(rows, routing, on_host.get(layer) or [list(range(routing.weights.shape[1]))] * len(rows))
        for layer, routing in routings.items()
    }


class RoutedExperts(nn.Module):
    """Experts of one block and the router that chooses among them; called at a seam as ``module(hidden, route)``."""

    def __init__(self, experts: Sequence[nn.Module], router: Router, combine: Combine) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = router
        self.combine: Combine = combine

    def forward(self, hidden: Tensor, route: Route) -> Tensor:
        """(B, S, d) -> (B, S, d)."""
        return mix(self.experts, route, hidden, self.combine)


def mix(experts: nn.ModuleList, route: Route, hidden: Tensor, combine: Combine) -> Tensor:
    """The routed experts' mixture for every row, (B, S, d) -> (B, S, d).

    ``outputs``: the chosen experts' outputs, summed by weight. ``parameters``: one expert whose parameters are that
    weighted sum, merged once per group (SMEAR, Muqeeth et al. 2023).
    """
    if len(experts) == 1:
        return experts[0](hidden)
    weights, rows = route.routing.weights, route.rows
    everyone = route.routing.chosen.shape[1] == len(experts)
    if combine == "outputs" and everyone and len(rows) > 1 and _are_bottlenecks(experts):
        per_row = torch.cat([weights[r].expand(stop - start, 1, -1) for r, (_, start, stop) in enumerate(rows)])
        return _wide(list(experts), per_row, hidden)
    apply = _merged if combine == "parameters" else _summed
    parts = []
    for (_, start, stop), chosen, scales in zip(rows, route.chosen, weights.unbind(), strict=True):
        each = scales.unbind()
        parts.append(apply([experts[e] for e in chosen], [each[e] for e in chosen], hidden[start:stop]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _summed(experts: list[nn.Module], weights: list[Tensor], hidden: Tensor) -> Tensor:
    """``experts`` and the scalar weight of each for the rows of one task, (n, S, d) -> (n, S, d)."""
    if len(experts) > 1 and _are_bottlenecks(experts):
        return _wide(experts, torch.stack(weights), hidden)
    return _weighted_sum(weights, [expert(hidden) for expert in experts])


def _merged(experts: list[nn.Module], weights: list[Tensor], hidden: Tensor) -> Tensor:
    """As :func:`_summed`, but with one expert whose parameters are the weighted sum of the experts' parameters."""
    named = [dict(expert.named_parameters()) for expert in experts]
    merged = {name: _weighted_sum(weights, [own[name] for own in named]) for name in named[0]}
    return functional_call(experts[0], merged, (hidden,))


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
    return out + (weights @ biases).to(out.dtype)


def _cat(adapters: list[Bottleneck], tensor: Callable[[Bottleneck], Tensor], dim: int) -> Tensor:
    return torch.cat([tensor(adapter) for adapter in adapters], dim)


def _are_bottlenecks(experts: Sequence[nn.Module] | nn.ModuleList) -> bool:
    return all(isinstance(expert, Bottleneck) for expert in experts)
