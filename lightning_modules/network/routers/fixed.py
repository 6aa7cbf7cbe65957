"""Routers that learn nothing: tables, hashes, draws and centroids. What they hold are buffers, never parameters.

Catalogue: specs/task_aware_gating.md 8, rows 1-6, 25 and 27. Legend: U units, T tasks, E experts, B rows, S positions, d width.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_modules.building import require
from lightning_modules.network.routers.record import Routing
from lightning_modules.router_config import RouterConfig
from lightning_modules.seeds import derive

_MOMENTUM = 0.99
"""Share of a centroid that a step leaves in place."""
_SHARPNESS = 200.0
"""How clearly the farthest row wins when centroids are spread: a row that is nearer by 0.1 (of at most 2) counts e^-20."""
_TIE_NOISE = 1e-3
"""Seeded noise on the first centroids relative to the length of the rows' mean, so that no two are equal."""


class FixedTaskRouter(nn.Module):
    """Routes of tasks at all blocks that never change: ``uniform``, ``random``, ``task_id`` or ``category``.

    ``random`` draws a task's expert from the stream ("router", block, task) of the seed, whatever the number of tasks. The
    last two read ``config.experts_of`` by task name; a task without an entry gets the expert of its own number.

    Raises:
        ConfigError: ``task_id`` and ``category``: a task's expert is beyond a block's experts.
    """

    expert: Tensor

    def __init__(self, config: RouterConfig, names: Sequence[str], experts: Mapping[int, int], seed: int) -> None:
        super().__init__()
        self._experts = dict(experts)
        self._uniform = config.kind == "uniform"
        if not self._uniform:
            rows = [_task_table(config, names, block, count, seed) for block, count in self._experts.items()]
            self.register_buffer("expert", torch.stack(rows))  # (blocks, T)

    def forward(self, task_ids: Tensor) -> dict[int, Routing]:
        """(R,) int64 task numbers -> routing of R tasks for every block."""
        if self._uniform:
            return {block: _uniform(len(task_ids), count, task_ids.device) for block, count in self._experts.items()}
        chosen = self.expert[:, task_ids].unbind()
        return {block: _certain(row, count) for row, (block, count) in zip(chosen, self._experts.items(), strict=True)}


class HashTokenRouter(nn.Module):
    """A frozen random expert for every token of the vocabulary (Roller et al. 2021).

    The table is balanced over token ids, not over how often they occur: experts hold equally many ids, give or take one.
    """

    table: Tensor

    def __init__(self, vocab_size: int, num_experts: int, block: int, seed: int) -> None:
        super().__init__()
        self._num_experts = num_experts
        self.register_buffer("table", torch.randperm(vocab_size, generator=_stream(seed, block)) % num_experts)

    def forward(self, token_ids: Tensor) -> Routing:
        """(U,) int64 ids of real tokens -> routing of U tokens."""
        return _certain(self.table[token_ids], self._num_experts)


class HashExampleRouter(nn.Module):
    """A frozen random expert for every row by its content: the same tokens in the same order always go to the same expert.

    A real token's id and its place among the row's real tokens are mixed with the block's salt (the finaliser of splitmix64),
    summed over the row and mixed again, all in 64-bit integers that wrap around. Padding, on either side, does not count.
    """

    salt: Tensor

    def __init__(self, num_experts: int, block: int, seed: int) -> None:
        super().__init__()
        self._num_experts = num_experts
        self.register_buffer("salt", torch.tensor(derive(seed, "router", block)))

    def forward(self, input_ids: Tensor, mask: Tensor) -> Routing:
        """(B, S) int64 token ids and (B, S) bool, true for real tokens -> routing of B rows."""
        place = mask.cumsum(-1)
        mixed = _splitmix(input_ids + place * _signed(0x9E3779B97F4A7C15) + self.salt)
        row = _splitmix((mixed * mask).sum(-1) + self.salt)
        return _certain((row & torch.iinfo(torch.int64).max) % self._num_experts, self._num_experts)


class RandomExampleRouter(nn.Module):
    """A fresh random expert per row in training; 1/E of each when scoring (AdaMix, Wang et al. 2022)."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self._num_experts = num_experts

    def forward(self, num_rows: int, device: torch.device) -> Routing:
        """Routing of ``num_rows`` rows.

        In training ``weights`` and ``terms["second"]`` are two independent draws from the global random state; the
        probabilities are what both are drawn from, 1/E.
        """
        even = _uniform(num_rows, self._num_experts, device)
        if not self.training:
            return even
        first, second = torch.randint(self._num_experts, (2, num_rows), device=device).unbind()
        weights, other = (functional.one_hot(draw, self._num_experts).float() for draw in (first, second))
        return Routing(weights, first.unsqueeze(-1), even.probabilities, even.logits, terms={"second": other})


class ClusterRouter(nn.Module):
    """The expert whose centroid has the largest cosine with the row's mean state; centroids follow the rows they win.

    After each training step c_e <- 0.99 c_e + 0.01 (mean of the step's rows that chose e), over all workers; a centroid that
    won nothing stays. Until the first step ends the centroids are random directions of the seed. Mean states point nearly
    the same way, so one random direction wins them all, and of centroids close to the rows' mean some would never win; the
    first update therefore spreads them over that step's rows by farthest-first traversal (Gonzalez 1985): as seen from the
    rows' mean, centroid 0 is the row furthest along its random direction, each later one the row whose largest cosine with
    the earlier ones is smallest. "The row" is a mean with weights exp(200 distance), which sums over workers can compute:
    the result does not depend on how the rows were dealt out. A little seeded noise keeps centroids apart where rows are equal.
    Centroids and the flag are buffers; a step's sums are not, so checkpoints belong between steps.
    """

    centroids: Tensor
    initialised: Tensor

    def __init__(self, num_experts: int, hidden_size: int, block: int, seed: int) -> None:
        super().__init__()
        directions = torch.randn(num_experts, hidden_size, generator=_stream(seed, block))
        self.register_buffer("centroids", functional.normalize(directions, dim=-1))  # (E, d)
        self.register_buffer("initialised", torch.tensor(False))
        self._spread = False
        """``initialised`` on the host: asking the buffer would make a device wait at every block."""
        self._first_rows: list[Tensor] = []
        self._sums: Tensor | None = None

    def forward(self, x: Tensor, banned: Collection[int] = ()) -> Routing:
        """(U, d) mean states of any dtype -> routing of U rows, to none of the experts ``banned``."""
        cosines = self._cosines(x.detach())
        if banned:
            cosines = cosines.index_fill(-1, torch.tensor(sorted(banned), device=cosines.device), -torch.inf)
        return _certain(cosines.argmax(-1), len(self.centroids))

    def observe(self, x: Tensor) -> None:
        """Add (U, d) mean states to this step's sums; nothing when scoring."""
        if not self.training:
            return
        x = x.detach().float()
        if not self._spread:
            self._first_rows.append(x)
            return
        winners = functional.one_hot(self._cosines(x).argmax(-1), len(self.centroids)).float()
        with torch.autocast(x.device.type, enabled=False):
            sums = winners.T @ _with_ones(x)
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def update(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """End of a step: move the centroids. Every worker calls it; ``reduce`` sums a tensor over the workers."""
        if not self._spread:
            rows = torch.cat([self.centroids.new_empty(0, self.centroids.shape[1]), *self._first_rows])
            self._first_rows = []
            self._initialise(rows, reduce)
            return
        experts, width = self.centroids.shape
        own = self.centroids.new_zeros(experts, width + 1) if self._sums is None else self._sums
        self._sums = None
        sums, counts = reduce(own).split([width, 1], dim=-1)
        moved = _MOMENTUM * self.centroids + (1 - _MOMENTUM) * sums / counts.clamp_min(1)
        self.centroids.copy_(torch.where(counts > 0, moved, self.centroids))

    def _initialise(self, rows: Tensor, reduce: Callable[[Tensor], Tensor]) -> None:
        """Spread the centroids over (N, d) ``rows`` of this worker and those of the others; without any row, wait for some."""
        extended = _with_ones(rows.double())
        total = reduce(extended.sum(0))
        if total[-1] == 0:
            return
        mean = total[:-1] / total[-1]
        directions = functional.normalize(extended[:, :-1] - mean, dim=-1)
        distance = directions @ self.centroids[0].double() + 1
        chosen: list[Tensor] = []
        for _ in range(len(self.centroids)):
            weights = torch.exp(_SHARPNESS * (distance - 2))  # at most 1; 2 is the largest distance, so no maximum is needed
            share = reduce(weights @ extended)
            chosen.append(share[:-1] / share[-1])
            nearness = directions @ functional.normalize(chosen[-1] - mean, dim=-1)
            distance = 1 - nearness if len(chosen) == 1 else torch.minimum(distance, 1 - nearness)
        noise = _TIE_NOISE * mean.norm() * self.centroids
        self.centroids.copy_(torch.stack(chosen) + noise)
        self.initialised.fill_(True)
        self._spread = True

    def _cosines(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return functional.normalize(x.float(), dim=-1) @ functional.normalize(self.centroids, dim=-1).T

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._spread = bool(self.initialised)


def _task_table(config: RouterConfig, names: Sequence[str], block: int, num_experts: int, seed: int) -> Tensor:
    """(T,) int64: the expert of every task at one block."""
    if config.kind == "random":
        draws = [torch.randint(num_experts, (), generator=_stream(seed, block, task)) for task in range(len(names))]
        return torch.stack(draws)
    numbers = [config.experts_of.get(name, task) for task, name in enumerate(names)]
    for name, number in zip(names, numbers, strict=True):
        law = (
            f"must give every task an expert below the {num_experts} of block {block} (without an entry: task t has expert t), "
        )
        require(number < num_experts, "model.router.experts_of", f"{law}got {name}: {number}")
    return torch.tensor(numbers)


def _certain(expert: Tensor, num_experts: int) -> Routing:
    """(U,) expert numbers -> all of the weight and of the probability on that expert."""
    chosen = expert.unsqueeze(-1)
    weights = torch.zeros(len(chosen), num_experts, device=chosen.device).scatter(-1, chosen, 1.0)
    logits = torch.zeros_like(weights).masked_fill(weights == 0, torch.finfo(weights.dtype).min)
    return Routing(weights, chosen, weights, logits)


def _uniform(units: int, num_experts: int, device: torch.device) -> Routing:
    """1/E of every expert for each of ``units``."""
    logits = torch.zeros(units, num_experts, device=device)
    weights = torch.full_like(logits, 1 / num_experts)
    chosen = torch.arange(num_experts, device=device).expand(units, -1)
    return Routing(weights, chosen, weights, logits)


def _with_ones(x: Tensor) -> Tensor:
    """(U, d) -> (U, d + 1), a column of ones last: sums then carry their count."""
    return torch.cat([x, x.new_ones(len(x), 1)], dim=-1)


def _splitmix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), a bijection of int64 in which every bit of x moves every bit."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # `>>` alone repeats the sign bit


def _signed(word: int) -> int:
    """An unsigned 64-bit constant as the int64 with the same bits."""
    return word - (1 << 64) if word >> 63 else word


def _stream(seed: int, *stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, "router", *stream))
