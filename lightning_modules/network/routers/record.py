"""The routing record: what every router returns, and all that dispatch, losses and measurements read.

Legend: U units routed (tasks, examples or tokens), E experts, K experts chosen per unit, B rows, S positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Unit = Literal["task", "example", "token"]
"""What is routed: one task of the batch, one row of it, or one real token (padding never is)."""

Rows = tuple[tuple[int, int, int], ...]
"""(task, start, stop) for each group: rows ``start:stop`` of the batch are examples of task number ``task``. Groups follow
each other without gaps and cover the batch."""


@dataclass(frozen=True)
class Routing:
    """The decision of one router for U units, in float32."""

    weights: Tensor
    """(U, E) combine weights, zero where an expert is not chosen."""
    chosen: Tensor
    """(U, K) int64 numbers of the experts that run, most probable first; -1: none (no room was left)."""
    probabilities: Tensor
    """(U, E), each row sums to 1: over all experts, before selection."""
    logits: Tensor
    """(U, E); of a fixed router, logits whose softmax gives its probabilities."""
    wanted: Tensor | None = None
    """(U, K) what would have been chosen without a capacity; None: the same."""
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    """What one strategy alone has: ``log_probability`` and ``value`` (U,) of ``sampled``; ``second`` (U, E) of
    ``random_example`` in training, the weights of the experts' last projection where it has a draw of its own; ``dispatch``
    and ``combine`` (B, S, P) of ``slots``, P = E times slots, expert by expert."""

    def rows(self, index: Tensor) -> "Routing":
        """The routing of the units ``index`` (V,) alone; of routers without terms."""
        wanted = None if self.wanted is None else self.wanted[index]
        return Routing(self.weights[index], self.chosen[index], self.probabilities[index], self.logits[index], wanted)


@dataclass(frozen=True)
class Units:
    """Who the U units of a routing are."""

    kind: Unit
    task: Tensor
    """(U,) int64 task numbers."""
    example: Tensor
    """(U,) int64 rows of the batch; of tasks the first row of the group."""
    weight: Tensor
    """(U,) float32: what the unit counts in the step's means. A row's weight is shared equally by its units."""
    index: Tensor | None = None
    """Of tokens: (U,) int64, place in the flattened (B S) positions, ascending."""
    groups: Rows = ()
    """(task, start, stop) on the host: units ``start:stop`` belong to ``task``; they cover the U units in order."""


@dataclass(frozen=True)
class Route:
    """One block's routing of a batch, and what dispatch must know of it."""

    rows: Rows
    units: Units
    routing: Routing
    chosen: list[list[int]] | None = None
    """Of tasks: ``routing.chosen`` on the host, one list for each group of ``rows``."""
    merged: bool = False
    """Combine the experts' parameters whatever the rule of the experts is (``random_example`` when scoring)."""


@dataclass(frozen=True)
class Record:
    """What was routed at one block in one forward."""

    block: int
    units: Units
    routing: Routing
    part: int | None = None
    """Of a decoder: which part of the batch (entry of its ``tasks``) went through it; the units' examples are those of the
    part. None: an encoder, all of them."""
