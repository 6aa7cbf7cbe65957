"""A router's own losses: balance over experts, information about tasks, calm logits (specs/task_aware_gating.md 3).

Legend: U units of a forward, T tasks, R tasks of a step, E experts, K experts chosen per unit, f shares of assignments, P mean
probabilities. A step is all forwards of all workers between two updates; ``units.weight`` sums to 1 over it.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.network.routers.record import Routing, Units
from lightning_modules.router_config import RouterConfig

Scope = Literal["microbatch", "global", "per_task", "task_balanced"]


def load_balance(shares: Tensor, probabilities: Tensor) -> Tensor:
    """E sum_e f_e P_e of (E,) shares and (E,) mean probabilities (Switch, Fedus et al. 2021); 1 when balanced, E collapsed.

    Shares sum to 1 whatever K is, so a weight means the same for every K.
    """
    return len(shares) * (shares * probabilities).sum()


def cv_squared(importance: Tensor) -> Tensor:
    """(std / mean)^2 of the (E,) importance, over all experts (Shazeer et al. 2017): 0 when balanced, E - 1 collapsed."""
    return importance.var(correction=0) / importance.mean().square()


def z_loss(logits: Tensor, weight: Tensor) -> Tensor:
    """sum_u weight_u logsumexp(z_u)^2 of (U, E) logits (ST-MoE, Zoph et al. 2022)."""
    return (weight * logits.logsumexp(-1).square()).sum()


def entropy(probabilities: Tensor, weight: Tensor) -> Tensor:
    """sum_u weight_u H(p_u) in nats of (U, E) probabilities."""
    return -(weight * (probabilities * _log(probabilities)).sum(-1)).sum()


def mutual_information(table: Tensor) -> Tensor:
    """I(task; expert) in nats of the (T, E) mean probabilities of tasks that count 1/T each: mean_t KL(P_t || mean P).

    0 when all rows agree, at most ln min(T, E): experts balanced over the tasks, each task sharp (Mod-Squad, Chen et al. 2023).
    """
    return (table * (_log(table) - _log(table.mean(0)))).sum(-1).mean()


def shares_of(routing: Routing, units: Units, num_experts: int) -> Tensor:
    """(E,) share of each expert in the assignments, every unit counting its weight; sums to 1 for any K.

    Assignments are those before capacity took any away: what the router asks for is what it has to balance.
    """
    counts = (units.weight.unsqueeze(-1) * _assigned(routing, num_experts)).sum(0)
    return counts / counts.sum().clamp_min(_TINY)


class RunningTables(nn.Module):
    """How one block's units of each task were routed in the last steps, over all workers, and the bias against the load.

    :meth:`observe` adds a forward, :meth:`update` ends the step. All buffers are the same on all workers and in the checkpoint.
    """

    share: Tensor
    """(T, E) shares of each task's assignments; 0 for a task not yet seen."""
    mass: Tensor
    """(T, E) mean probabilities of each task; 0 for a task not yet seen."""
    seen: Tensor
    """(T,) steps that held the task."""
    weight: Tensor
    """(T,) running weight of the task in a step, up to a factor common to all."""
    bias: Tensor
    """(E,) added to the scores that selection sees (``balance: bias``); its mean is 0."""

    def __init__(self, num_tasks: int, num_experts: int, window: int) -> None:
        super().__init__()
        self._keep = 1 - 1 / window
        self._step: Tensor | None = None
        for name in ("share", "mass"):
            self.register_buffer(name, torch.zeros(num_tasks, num_experts))
        for name in ("seen", "weight"):
            self.register_buffer(name, torch.zeros(num_tasks))
        self.register_buffer("bias", torch.zeros(num_experts))

    @torch.no_grad()
    def observe(self, units: Units, routing: Routing) -> None:
        """Add one forward of this worker to the step. Nothing that a loss reads changes before :meth:`update`."""
        experts = len(self.bias)
        weight = units.weight.unsqueeze(-1)
        values = weight * torch.cat([_assigned(routing, experts), routing.probabilities, torch.ones_like(weight)], dim=-1)
        if self._step is None:
            self._step = self._empty_step()
        for task, start, stop in units.groups:
            self._step[task] += values[start:stop].sum(0)

    @torch.no_grad()
    def update(self, reduce: Callable[[Tensor], Tensor], rate: float = 0.0, scope: Scope = "task_balanced") -> None:
        """End the step: move the tables towards it, and with a ``rate`` the bias against its load.

        The row of a task moves only in steps that hold it, by the bias-corrected rate of an average with decay 1 - 1/window:
        the first observation sets it. The bias moves by ``rate`` sign(mean c - c) less its mean (Wang et al. 2024), c being the
        load of this step: the mean of its tasks' shares (``task_balanced``), or the shares of all its assignments (``global``).

        Args:
            reduce: sums a tensor over the workers. Called once, on every worker, also when this one observed nothing.
        """
        step = reduce(self._empty_step() if self._step is None else self._step)
        self._step = None
        experts = len(self.bias)
        counts, probabilities, weight = step.split([experts, experts, 1], dim=-1)
        share = counts / counts.sum(-1, keepdim=True).clamp_min(_TINY)
        held = weight > 0
        self.seen += held.squeeze(-1)
        rate_of_row = (1 - self._keep) / (1 - self._keep ** self.seen.clamp_min(1)).unsqueeze(-1)
        self.share += held * rate_of_row * (share - self.share)
        self.mass += held * rate_of_row * (probabilities / weight.clamp_min(_TINY) - self.mass)
        self.weight.mul_(self._keep).add_(weight.squeeze(-1), alpha=1 - self._keep)
        if rate > 0:
            load = counts.sum(0) if scope == "global" else share.sum(0)
            move = (load.mean() - load).sign()
            self.bias += rate * (move - move.mean())

    def _empty_step(self) -> Tensor:
        """(T, 2 E + 1): weighted assignments, weighted probabilities and weight of each task."""
        return self.share.new_zeros(len(self.seen), 2 * len(self.bias) + 1)


def auxiliary_loss(
    config: RouterConfig, units: Units, routing: Routing, tables: RunningTables | None, totals: Tensor, own: Tensor
) -> Tensor:
    """One forward's part of the router's losses at one block, a scalar times the config's weights.

    Summed over all forwards and workers of a step it is the step's loss, and its gradient is the same however the step is cut
    (``balance_scope: microbatch`` excepted, which is what that scope means). For that, balance and information are linear in
    this forward's probabilities, with coefficients from the running tables:

    * ``load``: the running f, and the P of the step. Before anything was seen f is uniform.
    * ``cv`` and ``mutual_information``: the function's tangent at the running P; where the step's P is the running one, value
      and gradient are the function's own. A task not yet seen has no say.

    Args:
        units: who the routed units are; ``weight`` sums to 1 over the step.
        tables: the block's; read by ``load`` and ``cv`` of any scope but ``microbatch`` and by ``mutual_information``.
        totals: (T,) weight of each task in the step, over all forwards and workers; 0: not in the step.
        own: (T,) int64, the expert of each task that ``supervision`` asks for.

    Raises:
        ValueError: the tables are read and None.
    """
    probabilities, weight = routing.probabilities, units.weight
    loss = probabilities.new_zeros(())
    if config.balance in ("load", "cv"):
        if config.balance_scope == "microbatch":
            part = weight.sum()
            mean = (weight.unsqueeze(-1) * probabilities).sum(0) / part.clamp_min(_TINY)
            shares = shares_of(routing, units, len(mean))
            value = part * (load_balance(shares, mean) if config.balance == "load" else cv_squared(mean))
        else:
            per_unit = _equal_tasks(units, totals) if config.balance_scope == "task_balanced" else weight
            tangent = _load_slope if config.balance == "load" else _cv_slope
            slope, offset = tangent(_given(tables), config.balance_scope)
            value = _linear(units, probabilities, per_unit, slope, offset)
        loss = loss + config.balance_weight * value
    if config.mutual_information:
        slope = _information_slope(_given(tables))
        per_unit = _equal_tasks(units, totals)
        loss = loss - config.mutual_information * _linear(units, probabilities, per_unit, slope, slope.new_zeros(len(slope)))
    return loss + _direct(config, routing, weight, own[units.task])


def exact_loss(config: RouterConfig, routing: Routing, own: Tensor) -> Tensor:
    """The router's losses at one block where ``routing`` holds the R tasks that are trained, each counting 1/R.

    Nothing is averaged over steps: f (without gradient), P and the information are those of the R tasks. These must be all that
    share the experts: over the few tasks of one step, fewer than the experts, a balanced load would forbid each task an expert
    of its own.

    Args:
        own: (R,) int64, the expert of each of the tasks that ``supervision`` asks for.
    """
    probabilities = routing.probabilities
    rows, experts = probabilities.shape
    loss = probabilities.new_zeros(())
    mean = probabilities.mean(0)
    if config.balance == "load":
        assigned = _assigned(routing, experts)
        shares = (assigned / assigned.sum(-1, keepdim=True).clamp_min(_TINY)).mean(0)
        loss = loss + config.balance_weight * load_balance(shares, mean)
    if config.balance == "cv":
        loss = loss + config.balance_weight * cv_squared(mean)
    if config.mutual_information:
        loss = loss - config.mutual_information * mutual_information(probabilities)
    return loss + _direct(config, routing, probabilities.new_full((rows,), 1 / rows), own)


def diversity(deltas: Sequence[Sequence[Tensor]]) -> Tensor:
    """Mean squared cosine between what two of E experts have learned, a scalar; 0 for one expert.

    Args:
        deltas: for each expert its parameters minus the common start, in the same order. An expert that has not moved is
            orthogonal to all, and pulls at none.
    """
    experts = len(deltas)
    with torch.autocast(deltas[0][0].device.type, enabled=False):
        stacked = [torch.stack([part.flatten() for part in parts]).float() for parts in zip(*deltas, strict=True)]
        products = torch.stack([each @ each.T for each in stacked]).sum(0)
    if experts == 1:
        return products.sum() * 0
    squares = products.diagonal()
    length = torch.where(squares > 0, squares, 1).rsqrt()
    cosines = (products * length).T * length
    return cosines.triu(1).square().sum() / (experts * (experts - 1) / 2)


def _assigned(routing: Routing, num_experts: int) -> Tensor:
    """(U, E) one where the unit asked for the expert; of units that all experts serve, what each contributes."""
    wanted = routing.chosen if routing.wanted is None else routing.wanted
    if routing.wanted is None and wanted.shape[1] == num_experts:
        # Counted, all experts would always be used alike and the load would be balanced by definition.
        weights = routing.weights.detach()
        return weights / weights.sum(-1, keepdim=True).clamp_min(_TINY)
    spare = wanted.masked_fill(wanted < 0, num_experts)
    return routing.weights.new_zeros(len(wanted), num_experts + 1).scatter(-1, spare, 1.0)[:, :num_experts]


def _direct(config: RouterConfig, routing: Routing, weight: Tensor, own: Tensor) -> Tensor:
    """The losses that are means over units: (U,) ``weight`` and (U,) own experts."""
    loss = routing.probabilities.new_zeros(())
    if config.z_loss:
        loss = loss + config.z_loss * z_loss(routing.logits, weight)
    if config.entropy:
        loss = loss + config.entropy * entropy(routing.probabilities, weight)
    if config.supervision:
        right = routing.probabilities.gather(-1, own.unsqueeze(-1)).squeeze(-1)
        loss = loss - config.supervision * (weight * _log(right)).sum()
    return loss


def _equal_tasks(units: Units, totals: Tensor) -> Tensor:
    """(U,) weights under which every task of the step counts the same; they sum to 1 over the step."""
    return units.weight / ((totals > 0).sum() * totals)[units.task]


def _linear(units: Units, probabilities: Tensor, per_unit: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """sum_u per_unit_u (slope[task] . p_u + offset[task]) with (T, E) slopes and (T,) offsets."""
    return (per_unit * ((slope[units.task] * probabilities).sum(-1) + offset[units.task])).sum()


def _given(tables: RunningTables | None) -> RunningTables:
    if tables is None:
        raise ValueError("the router's losses need running tables, got None")
    return tables


def _scoped(rows: Tensor, tables: RunningTables, scope: Scope) -> Tensor:
    """(T, E): for each task the running row that its units are held against; uniform where nothing was seen."""
    seen = (tables.seen > 0).to(rows.dtype)
    uniform = torch.full_like(rows, 1 / rows.shape[1])
    if scope == "per_task":
        return torch.where(seen.unsqueeze(-1) > 0, rows, uniform)
    counts = tables.weight if scope == "global" else seen
    total = counts.sum()
    mean = (counts.unsqueeze(-1) * rows).sum(0) / total.clamp_min(_TINY)
    return torch.where(total > 0, mean.expand_as(rows), uniform)


def _load_slope(tables: RunningTables, scope: Scope) -> tuple[Tensor, Tensor]:
    shares = _scoped(tables.share, tables, scope)
    return shares.shape[1] * shares, shares.new_zeros(len(shares))


def _cv_slope(tables: RunningTables, scope: Scope) -> tuple[Tensor, Tensor]:
    """Of E sum_e P_e^2 - 1, which is the squared coefficient of variation of a P that sums to 1."""
    mass = _scoped(tables.mass, tables, scope)
    experts = mass.shape[1]
    return 2 * experts * mass, -experts * mass.square().sum(-1) - 1


def _information_slope(tables: RunningTables) -> Tensor:
    """ln(P_t / mean P): T times the gradient of the information by row t, which by Euler's theorem also gives its value."""
    centre = _scoped(tables.mass, tables, "task_balanced")
    rows = torch.where((tables.seen > 0).unsqueeze(-1), tables.mass, centre)
    return _log(rows) - _log(centre)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(_TINY).log()


_TINY = torch.finfo(torch.float32).tiny
