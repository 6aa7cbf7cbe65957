"""The routers of one network: the module that owns all that learns, counts and remembers.

Legend: B rows, S positions, d hidden width, U units routed (tasks, examples or tokens), R groups of rows of one task, T tasks,
E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_modules.network.routers.balance import RunningTables, auxiliary_loss, entropy, exact_loss
from lightning_modules.network.routers.fixed import (
    ClusterRouter,
    FixedTaskRouter,
    HashExampleRouter,
    HashTokenRouter,
    RandomExampleRouter,
)
from lightning_modules.network.routers.gates import Gate
from lightning_modules.network.routers.record import Record, Route, Routing, Rows, Units
from lightning_modules.network.routers.seeding import donor_shares, seed_rows
from lightning_modules.network.routers.selection import choose, expert_choice, limit, slots
from lightning_modules.network.routers.task_networks import build_task_network
from lightning_modules.network.routers.traffic import Traffic
from lightning_modules.network.routers.vectors import TaskVectors
from lightning_modules.router_config import BY_EXPERTS, RouterConfig
from lightning_modules.seeds import derive


@dataclass(frozen=True)
class Sites:
    """Where experts stand, and what their routers see there."""

    experts: Mapping[int, int]
    """Routed block -> number of experts."""
    hidden_size: int
    vocab_size: int
    steps: int
    """Optimiser steps of the trial."""
    encoder_blocks: int
    """Blocks of the encoder; those after it are the decoder's."""


class Routers(nn.Module):
    """All routers of a network. ``training`` decides whether noise is drawn; scoring is deterministic."""

    step: Tensor

    def __init__(
        self,
        config: RouterConfig,
        sites: Sites,
        names: Sequence[str],
        vectors: Tensor | None,
        seed: int,
        decoded: Collection[int] = (),
    ) -> None:
        """``names``: of the T tasks in order; ``vectors`` (T, width): task vectors that were computed, see
        :mod:`lightning_modules.task_vectors`; ``decoded``: the tasks that the decoder answers, which alone pass its blocks."""
        super().__init__()
        self.config, self.experts, self.names = config, dict(sites.experts), list(names)
        self.masked: dict[int, set[int]] = {}
        """Block -> experts that nobody may choose (knock-out)."""
        self.swapped: dict[int, int] = {}
        """Task -> the task whose route it takes (swap)."""
        self._seed, self._steps, self._at = seed, sites.steps, 0
        self._encoder_blocks, self._decoded = sites.encoder_blocks, frozenset(decoded)
        self._given = vectors
        self._drawn: dict[tuple[int, str], Tensor] = {}
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_reread_step)
        self.vectors: TaskVectors | None = None
        if config.reads_vectors:
            self.vectors = TaskVectors(config, len(names), vectors, seed)
        self.network: nn.Module | None = None
        if config.kind == "task":
            self.network = build_task_network(config, len(names), self.experts, self.vectors, seed)
        elif config.per_task:
            self.network = FixedTaskRouter(config, names, self.experts, seed)
        self.blocks = nn.ModuleDict()
        self.slots = nn.ModuleDict()
        self.tables = nn.ModuleDict()
        if not config.per_task:
            for block, count in self.experts.items():
                self._add_block(block, count, sites)
        own = [config.experts_of.get(name, task) for task, name in enumerate(names)]
        self.register_buffer("own", torch.tensor(own), persistent=False)

    own: Tensor

    def _add_block(self, block: int, count: int, sites: Sites) -> None:
        config, key = self.config, str(block)
        match config.kind:
            case "hash_token":
                self.blocks[key] = HashTokenRouter(sites.vocab_size, count, block, self._seed)
            case "hash_example":
                self.blocks[key] = HashExampleRouter(count, block, self._seed)
            case "random_example":
                self.blocks[key] = RandomExampleRouter(count)
            case "cluster":
                self.blocks[key] = ClusterRouter(count, sites.hidden_size, block, self._seed)
            case _ if config.selection == "slots":
                self.slots[key] = _SlotKeys(count * config.slots, sites.hidden_size, derive(self._seed, "slots", block))
            case _:
                width = self.vectors.width if self.vectors is not None else 0
                self.blocks[key] = Gate(config, sites.hidden_size, count, len(self.names), width, block, self._seed)
        balances = config.balance != "none" and config.balance_scope != "microbatch"
        if config.learned and (balances or config.mutual_information):
            self.tables[key] = RunningTables(len(self.names), count, config.balance_window)

    # -- the course of training ----------------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Optimiser step ``step`` (from 0) is next: its temperature, its draws for tasks. Scoring uses the last one begun."""
        self.step.fill_(step)
        self._at = step
        self._drawn.clear()

    @property
    def temperature(self) -> float:
        """The temperature of the step that was begun."""
        return self.config.temperature_at(self._at)

    def observe(self, records: Sequence[Record]) -> None:
        """Count a forward of a step in the running tables. No loss sees it before the step is finished."""
        for record in records:
            if (table := self._table(record.block)) is not None:
                table.observe(record.units, record.routing)

    def finish(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """After a step: update the running tables, selection biases and centroids; ``reduce`` sums over all workers."""
        rate = self.config.bias_rate if self.config.balance == "bias" else 0.0
        rate *= 1.0 - 0.9 * self._at / max(1, self._steps)
        for block in self.experts:
            if (table := self._table(block)) is not None:
                table.update(reduce, rate, self.config.balance_scope)
            router = self.blocks[str(block)] if str(block) in self.blocks else None
            if isinstance(router, ClusterRouter):
                router.update(reduce)

    def seed_unseen(self, trained: Sequence[int], unseen: Sequence[int]) -> None:
        """Give the tasks ``unseen`` the routes that ``config.unseen`` derives from those of the tasks ``trained``."""
        kind = self.config.unseen
        if kind in ("none", "random") or not unseen:
            return
        numbers = {name: task for task, name in enumerate(self.names)}
        donors = {numbers[name]: numbers[donor] for name, donor in self.config.donors.items()}
        shares = donor_shares(kind, trained, unseen, vectors=self._given, donors=donors)
        for rows in self._rows_of_tasks():
            seed_rows(rows, trained, unseen, shares)

    def _rows_of_tasks(self) -> list[Tensor | list[Tensor]]:
        """Everything that has a row for each task."""
        if self.vectors is not None:
            return [self.vectors.rows]
        if self.network is not None:
            return [parameter for parameter in self.network.parameters()]
        return [rows for gate in self.blocks.values() if isinstance(gate, Gate) for rows in gate.rows_of_tasks()]

    # -- routes of tasks -----------------------------------------------------------------------------------------------

    def of_tasks(self, task_ids: Tensor) -> dict[int, Routing]:
        """Block -> routing of the tasks (R,) int64; {} if a route depends on more than the task."""
        if self.network is None:
            return {}
        if isinstance(self.network, FixedTaskRouter):
            return {block: self._masked_fixed(block, routing) for block, routing in self.network(task_ids).items()}
        logits = self.network(task_ids)
        return {block: self._of_task(block, task_ids, of_block) for block, of_block in logits.items()}

    def plan(self, rows: Rows, device: torch.device) -> dict[int, Route]:
        """Block -> route of a batch, where the task alone decides.

        Such a router needs no hidden states, so all blocks are planned first: one copy to ``device`` and at most one back per
        forward, where asking at each block would make the device wait for the host as many times as there are blocks.
        """
        if self.network is None or self._draws_examples:
            return {}
        task_ids = torch.tensor([self.swapped.get(task, task) for task, _, _ in rows], device=device)
        units = _units_of_rows(rows, device)
        routings = self.of_tasks(task_ids)
        partial = [block for block, routing in routings.items() if routing.chosen.shape[1] < routing.weights.shape[1]]
        # Blocks may have different numbers of experts, but all choose as many.
        asked = torch.stack([routings[block].chosen for block in partial]).tolist() if partial else []
        on_host = dict(zip(partial, asked, strict=True))
        return {
            block: Route(rows, units, routing, on_host.get(block) or [list(range(routing.weights.shape[1]))] * len(rows))
            for block, routing in routings.items()
        }

    def logits_of(self, rows: Rows, device: torch.device) -> dict[int, Tensor]:
        """Block -> (R, E) logits of the groups' tasks; {} if a route depends on more than the task."""
        if self.network is None:
            return {}
        task_ids = torch.tensor([self.swapped.get(task, task) for task, _, _ in rows], device=device)
        return self.network(task_ids)

    def records_of_tasks(self) -> list[Record]:
        """A record of every block for all T tasks that pass it, as scoring would route them; [] if a route depends on more than
        the task."""
        device = self.step.device
        training = self.training
        self.eval()
        records = []
        with torch.no_grad():
            asked = torch.tensor([self.swapped.get(task, task) for task in range(len(self.names))], device=device)
            for block, routing in self.of_tasks(asked).items():
                passing = [task for task in range(len(self.names)) if self._passes(task, block)]
                if passing:
                    units = _units_of_rows(tuple((task, i, i + 1) for i, task in enumerate(passing)), device)
                    records.append(Record(block, units, routing.rows(units.task)))
        self.train(training)
        return records

    @property
    def _draws_examples(self) -> bool:
        """Whether tasks route example by example now: draws of their own in training (Ye et al.)."""
        return self.training and self.config.draw == "example"

    def _of_task(self, block: int, task_ids: Tensor, logits: Tensor) -> Routing:
        drawing = self.config.selection in ("gumbel", "gumbel_st", "skills")
        return choose(
            self.config,
            self._allowed(block, logits),
            temperature=self.temperature,
            training=self.training,
            uniform=self._task_draw(block, "noise", logits.device)[task_ids] if self.training and drawing else None,
            bias=None,
            drop=self._task_dropout(block, logits.device, task_ids),
            value=None,
        )

    def _task_dropout(self, block: int, device: torch.device, task_ids: Tensor) -> Tensor | None:
        if not self.training or self.config.expert_dropout == 0:
            return None
        return self._task_draw(block, "dropout", device)[task_ids] < self.config.expert_dropout

    def _task_draw(self, block: int, what: str, device: torch.device) -> Tensor:
        """(T, E) uniform numbers of this step: a function of (seed, step, block), the same on every worker and in every forward
        of the step, so that all rows of a task take one route."""
        if (block, what) not in self._drawn:
            generator = torch.Generator().manual_seed(derive(self._seed, "route", what, self._at, block))
            drawn = torch.rand(len(self.names), self.experts[block], generator=generator)
            self._drawn[block, what] = drawn.to(device)
        return self._drawn[block, what]

    def _allowed(self, block: int, logits: Tensor) -> Tensor:
        """``logits`` without the experts that are masked."""
        banned = self._banned(block)
        return logits if not banned else logits.index_fill(-1, torch.tensor(banned, device=logits.device), -torch.inf)

    def _banned(self, block: int) -> list[int]:
        banned = sorted(self.masked.get(block, ()))
        if len(banned) == self.experts[block]:
            raise ValueError(f"block {block}: every expert is masked")
        return banned

    def _masked_fixed(self, block: int, routing: Routing) -> Routing:
        """A fixed routing without the masked experts: who has others keeps those, who had none but masked ones gets all others
        alike."""
        banned = self.masked.get(block)
        if not banned:
            return routing
        logits = self._allowed(block, routing.logits)
        left = routing.weights.index_fill(-1, torch.tensor(sorted(banned), device=logits.device), 0.0)
        total = left.sum(-1, keepdim=True)
        weights = torch.where(total > 0, left / total.clamp_min(torch.finfo(left.dtype).tiny), logits.softmax(-1))
        return replace(
            routing, weights=weights, chosen=weights.argsort(-1, descending=True), probabilities=weights, logits=logits
        )

    # -- routes of examples and tokens ---------------------------------------------------------------------------------

    def at(self, block: int, hidden: Tensor, traffic: Traffic) -> Route:
        """The route of a forward at a block where more than the task decides; ``hidden`` (B, S, d)."""
        config = self.config
        if config.kind == "task":
            units = traffic.examples(hidden)
            return Route(
                traffic.rows, units, self._choose(block, traffic.task_logits[block][traffic.group_of_row], units, None, traffic)
            )
        if config.kind in ("token", "hash_token"):
            units = traffic.tokens(hidden)
            assert units.index is not None
            if config.kind == "hash_token":
                routing = self.blocks[str(block)](traffic.token_ids.flatten()[units.index])
                return Route(traffic.rows, units, self._masked_fixed(block, routing))
            if config.selection == "slots":
                keys = self.slots[str(block)]
                assert isinstance(keys, _SlotKeys)
                mask = traffic.mask_of(hidden)
                routing = slots(config, hidden, mask, keys.keys, keys.scale, units, temperature=self.temperature)
                return Route(traffic.rows, units, routing)
            return Route(
                traffic.rows, units, self._gated(block, hidden.flatten(0, 1).index_select(0, units.index), units, traffic)
            )
        units = traffic.examples(hidden)
        router = self.blocks[str(block)]
        if isinstance(router, HashExampleRouter):
            routing = router(traffic.token_ids, traffic.mask_of(hidden))
        elif isinstance(router, RandomExampleRouter):
            merged = not self.training
            routing = router(len(units.task), hidden.device)
            return Route(traffic.rows, units, self._masked_fixed(block, routing), merged=merged)
        elif isinstance(router, ClusterRouter):
            states = traffic.means(hidden)
            if self.training and not traffic.closed:
                router.observe(states)
            return Route(traffic.rows, units, router(states, self._banned(block)))
        else:
            return Route(traffic.rows, units, self._gated(block, traffic.means(hidden), units, traffic))
        return Route(traffic.rows, units, self._masked_fixed(block, routing))

    def _gated(self, block: int, states: Tensor, units: Units, traffic: Traffic) -> Routing:
        gate = self.blocks[str(block)]
        assert isinstance(gate, Gate)
        groups = tuple((self.swapped.get(task, task), start, stop) for task, start, stop in units.groups)
        logits = gate(states, groups, self.vectors)
        value = gate.value(states) if self.config.selection == "sampled" else None
        return self._choose(block, logits, units, value, traffic)

    def _choose(self, block: int, logits: Tensor, units: Units, value: Tensor | None, traffic: Traffic) -> Routing:
        config = self.config
        logits = self._allowed(block, logits)
        dropping = self.training and config.expert_dropout > 0
        drop = torch.rand_like(logits) < config.expert_dropout if dropping else None
        if config.selection in BY_EXPERTS:
            # A score must not depend on which rows are scored together.
            by_row = not self.training
            return expert_choice(config, logits, units, traffic.lengths, temperature=self.temperature, drop=drop, by_row=by_row)
        drawing = self.training and config.selection in ("gumbel", "gumbel_st", "skills", "sampled")
        table = self._table(block)
        routing = choose(
            config,
            logits,
            temperature=self.temperature,
            training=self.training,
            uniform=torch.rand_like(logits) if drawing else None,
            bias=table.bias if config.balance == "bias" and table is not None else None,
            drop=drop,
            value=value,
        )
        return routing if config.capacity is None else limit(config, routing, units, None if self.training else traffic.lengths)

    def _table(self, block: int) -> RunningTables | None:
        table = self.tables[str(block)] if str(block) in self.tables else None
        assert table is None or isinstance(table, RunningTables)
        return table

    # -- losses --------------------------------------------------------------------------------------------------------

    def loss(self, records: Sequence[Record], totals: Tensor) -> Tensor | None:
        """What the routers add to the loss of the forward that made ``records``, mean over the routed blocks; None: nothing.

        ``totals`` (T,): the weight of each task in the step. Over all forwards and workers it sums to the step's loss.
        """
        if self.config.per_task or not self.config.auxiliary or not records:
            return None
        losses = [
            auxiliary_loss(self.config, record.units, record.routing, self._table(record.block), totals, self.own)
            for record in records
        ]
        return torch.stack(losses).sum() / len(self.experts)

    def step_loss(self, tasks: Sequence[int]) -> Tensor | None:
        """What task-level routers add to the loss of a step, mean over the routed blocks; ``tasks``: all that are trained."""
        if self.config.kind != "task" or not self.config.auxiliary:
            return None
        task_ids = torch.tensor(tasks, device=self.step.device)
        losses = []
        for block, routing in self.of_tasks(task_ids).items():
            passing = [row for row, task in enumerate(tasks) if self._passes(task, block)]
            if passing:
                of_block = (
                    routing if len(passing) == len(tasks) else routing.rows(torch.tensor(passing, device=task_ids.device))
                )
                losses.append(exact_loss(self.config, of_block, self.own[task_ids[passing]]))
        return torch.stack(losses).mean() if losses else None

    def _passes(self, task: int, block: int) -> bool:
        """Whether examples of the task pass the block: a decoder's only if the decoder answers the task."""
        return block < self._encoder_blocks or task in self._decoded

    def policy_loss(self, record: Record, losses: Tensor) -> Tensor:
        """REINFORCE for one record: ``losses`` (U,) are those of the units' examples (specs/task_aware_gating.md 8, row 21).

        (L - b) log p(e) with the learned baseline b, Huber(b, L), and minus the entropy; units count as in the step's loss.
        """
        config, weight, terms = self.config, record.units.weight, record.routing.terms
        losses = losses.detach()
        advantage = (losses - terms["value"]).detach()
        policy = (weight * advantage * terms["log_probability"]).sum()
        value = (weight * functional.huber_loss(terms["value"], losses, reduction="none")).sum()
        spread = entropy(record.routing.probabilities, weight)
        return (config.policy * policy + config.value * value - config.policy_entropy * spread) / len(self.experts)

    def active_size(self, block: int) -> int:
        """Parameters that one example uses of the block's router."""
        if self.network is not None:
            return self.experts[block] if self.config.learned else 0
        parts = [group[str(block)] for group in (self.blocks, self.slots) if str(block) in group]
        size = sum(parameter.numel() for part in parts for parameter in part.parameters())
        others = [rows for part in parts if isinstance(part, Gate) for rows in part.rows_of_tasks()]
        return size - sum(parameter.numel() for rows in others for parameter in rows[1:])

    def active_experts(self, block: int, task: int) -> list[int]:
        """Experts of a block that one example of ``task`` uses; of equal ones that depend on the example, as many."""
        count, config = self.experts[block], self.config
        if self.network is not None:
            # Without draws: what scoring would use.
            training = self.training
            self.eval()
            chosen = self.of_tasks(torch.tensor([task], device=self.step.device))[block].chosen[0].tolist()
            self.train(training)
            return chosen
        match config.selection:
            case "top_k" if config.kind != "random_example":
                used = config.top_k
            case "gumbel_st" | "sampled":
                used = 1
            case "expert_choice" | "task_expert_choice":
                used = max(1, round(config.capacity or 1))
            case _:
                used = count
        return list(range(min(count, used)))


class _SlotKeys(nn.Module):
    """The keys of Soft MoE's slots, (P, d), and their scale."""

    def __init__(self, num_slots: int, hidden_size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.keys = nn.Parameter(torch.randn(num_slots, hidden_size, generator=generator) * hidden_size**-0.5)
        self.scale = nn.Parameter(torch.ones(()))


def _units_of_rows(rows: Rows, device: torch.device) -> Units:
    task, first = torch.tensor([(task, start) for task, start, _ in rows], device=device).unbind(1)
    weight = torch.full((len(rows),), 1 / len(rows), device=device)
    return Units("task", task, first, weight, groups=tuple((task, i, i + 1) for i, (task, _, _) in enumerate(rows)))


def _reread_step(routers: nn.Module, _: object) -> None:
    assert isinstance(routers, Routers)
    routers.begin(int(routers.step))
