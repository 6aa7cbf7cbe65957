"""What one forward hands to its seams so that they can ask the routers, and who the units of a routing are.

Legend: B rows, S positions, d hidden width, U units routed (tasks, examples or tokens), R groups of rows of one task.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from lightning_modules.network.routers.record import Record, Route, Rows, Units


class Asked(Protocol):
    """The routers, as a forward sees them."""

    def plan(self, rows: Rows, device: torch.device) -> Mapping[int, Route]:
        """Block -> route, where the task alone decides."""
        ...

    def logits_of(self, rows: Rows, device: torch.device) -> Mapping[int, Tensor]:
        """Block -> logits of the groups' tasks, where each example draws from them."""
        ...

    def at(self, block: int, hidden: Tensor, traffic: Traffic) -> Route:
        """The route at a block where more than the task decides."""
        ...


class Traffic:
    """What one forward of a stack hands to its seams. It collects what was routed in ``records`` until it is closed."""

    def __init__(
        self,
        routers: Asked,
        rows: Rows,
        device: torch.device,
        *,
        mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        summary: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """
        Args:
            routers: asked at each block.
            rows: which rows belong to which task.
            device: where the states are.
            mask: (B, S), 1 at real tokens; None: all are real (generation).
            input_ids: (B, S), of an encoder.
            summary: (B, d) of a decoder: the mean encoder state of each row, which stands for the example (its own states are
                not all known yet while it generates).
            weights: (B,) float32, what each row counts in the step's loss; None: equal shares of 1.
        """
        self.rows, self.closed = rows, False
        self.records: list[Record] = []
        self._routers, self._device = routers, device
        self._mask = None if mask is None else mask.bool()
        self._input_ids, self._summary = input_ids, summary
        self._weights = weights
        self._planned = routers.plan(rows, device)
        self.task_logits: Mapping[int, Tensor] = {} if self._planned else routers.logits_of(rows, device)
        """Block -> (R, E) logits of each group's task, where every example draws a route of its own from them."""
        self._units: dict[tuple[object, ...], Units] = {}
        self._lengths: dict[tuple[int, int], list[int]] = {}
        self._shape = (0, 0)

    def route(self, block: int, hidden: Tensor) -> Route:
        """The route of this forward at a block where (B, S, d) ``hidden`` comes in."""
        route = self._planned.get(block)
        if route is None:
            self._shape = (hidden.shape[0], hidden.shape[1])
            route = self._routers.at(block, hidden, self)
        if not self.closed:
            self.records.append(Record(block, route.units, route.routing))
        return route

    def close(self) -> list[Record]:
        """The records; what is computed again in the backward (gradient checkpointing) is no longer recorded."""
        self.closed = True
        return self.records

    @property
    def token_ids(self) -> Tensor:
        """(B, S) ids of the encoder's input."""
        if self._input_ids is None:
            raise RuntimeError("only an encoder's blocks can be routed by token ids")
        return self._input_ids

    @cached_property
    def group_of_row(self) -> Tensor:
        """(B,) int64 the group of ``rows`` that each row belongs to."""
        sizes = torch.tensor([stop - start for _, start, stop in self.rows], device=self._device)
        return torch.arange(len(self.rows), device=self._device).repeat_interleave(sizes)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64 real tokens of each row."""
        return torch.tensor(self._lengths[self._shape], device=self._device)

    def mask_of(self, hidden: Tensor) -> Tensor:
        """(B, S) bool, True at real tokens."""
        if self._mask is None or self._mask.shape != hidden.shape[:2]:
            return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return self._mask

    def means(self, hidden: Tensor) -> Tensor:
        """(B, d) float32: what stands for each row, the mean over its real tokens."""
        if self._summary is not None:
            return self._summary.float()
        mask = self.mask_of(hidden).unsqueeze(-1)
        return (hidden.float() * mask).sum(1) / mask.sum(1)

    def examples(self, hidden: Tensor) -> Units:
        """The rows as units."""
        key = ("example", len(hidden))
        if key not in self._units:
            device, size = hidden.device, len(hidden)
            task = torch.tensor([task for task, _, _ in self.rows], device=device)[self.group_of_row]
            weight = torch.full((size,), 1 / size, device=device) if self._weights is None else self._weights
            self._units[key] = Units("example", task, torch.arange(size, device=device), weight, groups=self.rows)
        return self._units[key]

    def tokens(self, hidden: Tensor) -> Units:
        """The real tokens as units."""
        shape = (hidden.shape[0], hidden.shape[1])
        key = ("token", *shape)
        if key not in self._units:
            examples, mask = self.examples(hidden), self.mask_of(hidden)
            index = mask.flatten().nonzero().squeeze(1)
            lengths = mask.sum(1).tolist()
            row = index // shape[1]
            each = examples.weight / mask.sum(1).clamp_min(1)
            groups, start = [], 0
            for task, first, last in self.rows:
                stop = start + sum(lengths[first:last])
                groups.append((task, start, stop))
                start = stop
            self._units[key] = Units("token", examples.task[row], row, each[row], index, tuple(groups))
            self._lengths[shape] = lengths
        return self._units[key]
