"""How tasks use experts, from routing records alone (specs/task_aware_gating.md section 9). No torch is imported here.

Legend: T tasks, E experts, U units routed (tasks, examples or tokens; padding is never one), p a unit's probabilities over
experts, z its logits. A table is (T, E): row t is how task t uses the experts and sums to 1. Every task counts 1/T, whatever
the size of its split. Entropies and informations are in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lightning_modules.network.routers.record import Record

EXAMPLES_KEPT = 512
"""Examples of each task at most, the first ones met, that the permutation null shuffles."""
ALL_KEPT = 20_000
"""Examples of all tasks at most that it shuffles, as many of each: its time grows with their number."""
PROBE = 500
"""Units of each task, the first ones met, whose most used expert :func:`churn` follows."""
DRAWS = 200
"""Permutations of the null."""
MASKED = -1e30
"""A logit below this stands for an expert that cannot be chosen; it is no measure of the router's size."""


def utilisation(table: np.ndarray) -> np.ndarray:
    """(E,) share of the tasks' weight that each expert carries; sums to 1."""
    return table.mean(0)


def routing_entropy(table: np.ndarray) -> float:
    """Mean over tasks of H(weights) / ln E: 0 one expert each, 1 all experts alike. 0 for a single expert."""
    experts = table.shape[1]
    return float(_entropies(table).mean() / np.log(experts)) if experts > 1 else 0.0


def mutual_information(table: np.ndarray) -> float:
    """I(task; expert) in nats of the task-uniform joint J = table / T, in [0, ln min(T, E)]."""
    return max(0.0, _entropy(table.mean(0)) - float(_entropies(table).mean()))


def normalised_mutual_information(table: np.ndarray) -> float:
    """I / min(H(task), H(expert)), in [0, 1]; 0 when one of the entropies is 0 (one task, or one expert for all)."""
    least = min(float(np.log(table.shape[0])), _entropy(table.mean(0)))
    return min(1.0, mutual_information(table) / least) if least > 1e-12 else 0.0


def dead_experts(table: np.ndarray) -> int:
    """Experts that carry less than 0.01 / E of the weight."""
    return int(dead(table).sum())


def dead(table: np.ndarray) -> np.ndarray:
    """(E,) bool: which experts carry less than 0.01 / E of the weight."""
    return utilisation(table) < 0.01 / table.shape[1]


def max_violation(table: np.ndarray) -> float:
    """(largest - mean) / mean utilisation: 0 balanced, E - 1 collapsed."""
    share = utilisation(table)
    return float(share.max() / share.mean() - 1)


def variation(table: np.ndarray) -> float:
    """Standard deviation of the utilisation over its mean: 0 balanced, sqrt(E - 1) collapsed."""
    share = utilisation(table)
    return float(share.std() / share.mean())


def effective_experts(shares: np.ndarray) -> float:
    """exp H(shares) of an (E,) distribution: 1 one expert, E all alike."""
    return float(np.exp(_entropy(shares)))


def decompose(table: np.ndarray, entropies: np.ndarray) -> dict[str, float]:
    """H(E) = I(T; E) + I(X; E | T) + H(E | X, T), exactly, of the probabilities before selection.

    Args:
        table: (T, E) mean probabilities of each task.
        entropies: (T,) mean of H(p) over each task's units.

    Returns:
        ``h_expert`` H(E), ``i_task`` I(T; E): what the task decides, ``i_input`` I(X; E | T): what the input decides beyond
        the task, ``h_residual`` H(E | X, T): what stays undecided.
    """
    within = float(_entropies(table).mean())
    expert, residual = _entropy(table.mean(0)), float(entropies.mean())
    return {"h_expert": expert, "i_task": expert - within, "i_input": within - residual, "h_residual": residual}


def measure_table(table: np.ndarray) -> dict[str, float]:
    """All measurements of one block's table by name: ``entropy``, ``nmi``, ``mi``, ``dead_experts``, ``max_violation``, ``cv``,
    ``effective_experts`` (exp of the entropy of the utilisation) and ``utilisation_{e}``."""
    share = utilisation(table)
    return {
        "entropy": routing_entropy(table),
        "nmi": normalised_mutual_information(table),
        "mi": mutual_information(table),
        "dead_experts": float(dead_experts(table)),
        "max_violation": max_violation(table),
        "cv": variation(table),
        "effective_experts": effective_experts(share),
        **{f"utilisation_{e}": float(value) for e, value in enumerate(share)},
    }


@dataclass
class _Block:
    """Sums over one block's units. (T, E) unless said otherwise, float64."""

    n: np.ndarray
    """Assignments: how often an expert ran for the task's units."""
    q: np.ndarray
    """Probabilities."""
    w: np.ndarray
    """Combine weights, each unit's scaled to sum to 1."""
    units: np.ndarray
    """(T,) units routed."""
    entropy: np.ndarray
    """(T,) H(p)."""
    margin: np.ndarray
    """(T,) probability of the first expert minus that of the second."""
    z: np.ndarray
    """(T,) logsumexp(z)^2."""
    wanted: np.ndarray
    """(T,) slots (unit, choice) that a capacity could have dropped, the kept ones included; all slots without one."""
    dropped: np.ndarray
    """(T,) of these, the dropped ones."""
    unrouted: np.ndarray
    """(T,) units that no expert took."""
    squares: np.ndarray
    """Sums over examples of c^2, c (E,) the weights of the example's units added up."""
    products: np.ndarray
    """Sums over examples of c L, L the sum of c: with the next, what the variance between examples needs."""
    lengths: np.ndarray
    """(T,) sums over examples of L^2."""
    examples: np.ndarray
    """(T,) examples."""
    room: int
    """Examples of each task to be kept."""
    z_max: float = 0.0
    exact: bool = True
    """Whether tasks were routed as a whole: the table has no sampling error."""
    kept: list[list[np.ndarray]] = field(default_factory=list)
    """For each task, c of its first ``room`` examples."""
    probe: list[list[np.ndarray]] = field(default_factory=list)
    """For each task, the most used expert of its first :data:`PROBE` units, -1: none."""

    @classmethod
    def empty(cls, tasks: int, experts: int) -> "_Block":
        sums: dict[str, Any] = {name: np.zeros((tasks, experts)) for name in _WIDE}
        sums |= {name: np.zeros(tasks) for name in _NARROW}
        room = max(2, min(EXAMPLES_KEPT, ALL_KEPT // max(1, tasks)))
        return cls(**sums, room=room, kept=[[] for _ in range(tasks)], probe=[[] for _ in range(tasks)])

    def add(self, other: "_Block") -> None:
        for name in (*_WIDE, *_NARROW):
            getattr(self, name).__iadd__(getattr(other, name))
        self.z_max, self.exact = max(self.z_max, other.z_max), self.exact and other.exact
        for task, (kept, probe) in enumerate(zip(other.kept, other.probe, strict=True)):
            for c in kept:
                _extend(self.kept[task], c, self.room)
            for top in probe:
                _extend(self.probe[task], top, PROBE)


_WIDE = ("n", "q", "w", "squares", "products")
_NARROW = ("units", "entropy", "margin", "z", "wanted", "dropped", "unrouted", "lengths", "examples")
_SAVED = ("n", "q", "w", "units", "entropy", "margin", "z", "wanted", "dropped", "unrouted")


class RoutingTally:
    """The sums over an evaluation pass from which every routing measurement follows.

    Give it every record of the pass (:meth:`add`), put the workers' tallies together (:func:`merge`), then read
    :meth:`measure` and :meth:`arrays`. Rows of a batch count as independent examples; a long input read in several windows, a
    choice between options, and a decoder that generates token by token have several.
    """

    def __init__(self, num_tasks: int, experts: Mapping[int, int]) -> None:
        """``experts``: routed block -> E."""
        self.num_tasks = num_tasks
        self.experts = dict(experts)
        self._blocks = {block: _Block.empty(num_tasks, count) for block, count in self.experts.items()}

    def add(self, record: "Record") -> None:
        """Count one block's routing in one forward. Works where the tensors are; only sums leave the device."""
        units, routing, block = record.units, record.routing, self._blocks[record.block]
        block.exact = block.exact and units.kind == "task"
        weights, p, z = (x.detach().double() for x in (routing.weights, routing.probabilities, routing.logits))
        total = weights.sum(-1, keepdim=True)
        use = weights / total.where(total > 0, 1.0)
        ran = routing.chosen >= 0
        counted = use.new_zeros(use.shape).scatter_add_(1, routing.chosen.clamp_min(0), ran.double())
        wanted = ran if routing.wanted is None else routing.wanted >= 0
        first = p.topk(min(2, p.shape[1]), -1).values
        top = use.argmax(-1).where(total.squeeze(-1) > 0, -1)
        allowed = z > MASKED
        if bool(allowed.any()):
            block.z_max = max(block.z_max, float(z[allowed].abs().max()))
        per_unit = {
            "entropy": -(p * p.clamp_min(1e-300).log()).sum(-1),
            "margin": first[:, 0] - first[:, 1] if p.shape[1] > 1 else first[:, 0],
            "z": z.logsumexp(-1).square(),
            "wanted": wanted.sum(-1),
            "dropped": wanted.sum(-1) - ran.sum(-1),
            "unrouted": (~ran).all(-1),
        }
        for task in units.task.unique().tolist():
            own = units.task == task
            block.units[task] += int(own.sum())
            for name, values in (("n", counted), ("q", p), ("w", use)):
                getattr(block, name)[task] += values[own].sum(0).cpu().numpy()
            for name, values in per_unit.items():
                getattr(block, name)[task] += float(values[own].sum())
            _extend(block.probe[task], top[own].cpu().numpy().astype(np.int16), PROBE)
            if units.kind != "task":
                rows, of = units.example[own].unique(return_inverse=True)
                examples = use.new_zeros(len(rows), use.shape[1]).index_add_(0, of, use[own]).cpu().numpy()
                _count_examples(block, task, examples)

    def tables(self) -> dict[int, np.ndarray]:
        """Block -> (T, E) how each task uses the experts (combine weights); zero rows for tasks without a routed unit."""
        return {block: _rows(sums.w, sums.w.sum(1)) for block, sums in self._blocks.items()}

    def arrays(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """What one ``.npz`` holds, for tasks called ``names``: ``tasks`` (T,), ``blocks`` (L,), and per block

        * ``weights/{block}`` (T, E): :meth:`tables`;
        * sums over units, in float64: ``n`` assignments, ``q`` probabilities, ``w`` combine weights (T, E); ``units``,
          ``entropy``, ``margin``, ``z``, ``wanted``, ``dropped``, ``unrouted`` (T,);
        * ``probe`` (T, at most :data:`PROBE`): the most used expert of the first units, -1: none.
        """
        arrays: dict[str, np.ndarray] = {"tasks": np.array(list(names)), "blocks": np.array(sorted(self._blocks))}
        for block, table in self.tables().items():
            sums = self._blocks[block]
            arrays[f"weights/{block}"] = table
            arrays |= {f"{name}/{block}": getattr(sums, name) for name in _SAVED}
            tops = [np.concatenate([*own, np.zeros(0, np.int16)]) for own in sums.probe]
            width = max(map(len, tops), default=0)
            arrays[f"probe/{block}"] = np.stack([np.pad(own, (0, width - len(own)), constant_values=-1) for own in tops])
        return arrays

    def measure(self, names: Sequence[str], draws: int = DRAWS, seed: int = 0) -> dict[str, float]:
        """Every measurement by its metric name, over the tasks that were met; {} when none was.

        ``route/{block}/``: what :func:`measure_table` and :func:`decompose` say, and

        * ``entropy``: mean of H(p) / ln E. Of routed tasks that of the weights, as in :func:`measure_table`.
        * ``mi_bias``: what ``mi`` is by chance, because a task is known from finitely many examples (:func:`information_bias`;
          0 for routed tasks, whose table is exact), ``mi_corrected``: ``mi - mi_bias``.
        * ``mi_null_p``: share of ``draws`` permutations of the examples' task labels with an ``mi`` as high (Phipson & Smyth's
          (1 + hits) / (1 + draws)), over the first examples of each task (:data:`EXAMPLES_KEPT`). Not for routed tasks.
        * ``margin``: mean probability of the first expert minus that of the second, ``z_mean``: mean logsumexp(z)^2, ``z_max``:
          largest abs(z), ``dropped``: share of the slots that a capacity dropped, ``unrouted``: share of the units without
          any expert.

        ``route/task/{task}/eff_experts``: exp of the entropy of the task's row, mean over blocks;
        ``route/task/{task}/dropped``: its share of dropped slots, over all blocks; ``route/nmi``: mean over blocks.
        ``dropped`` counts slots, everything else is a mean over tasks.
        """
        values: dict[str, float] = {}
        for block, sums in self._blocks.items():
            if sums.w.sum() > 0:
                found = _measure_block(sums, draws, seed + block)
                values |= {f"route/{block}/{name}": value for name, value in found.items()}
        if not values:
            return {}
        values["route/nmi"] = float(np.mean([v for k, v in values.items() if k.endswith("/nmi")]))
        tables = list(self.tables().values())
        for task, name in enumerate(names):
            rows = [table[task] for table in tables if table[task].sum() > 0]
            wanted, dropped = (sum(getattr(s, kind)[task] for s in self._blocks.values()) for kind in ("wanted", "dropped"))
            if rows:
                values[f"route/task/{name}/eff_experts"] = float(np.mean([effective_experts(row) for row in rows]))
                values[f"route/task/{name}/dropped"] = float(dropped / wanted) if wanted else 0.0
        return values


def merge(tallies: Sequence[RoutingTally]) -> RoutingTally:
    """One tally of what several workers have counted, in their order."""
    merged = RoutingTally(tallies[0].num_tasks, tallies[0].experts)
    for tally in tallies:
        for block, sums in tally._blocks.items():
            merged._blocks[block].add(sums)
    return merged


def churn(before: Mapping[str, np.ndarray], now: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``route/{block}/churn``: share of the probed units whose most used expert differs between two evaluations of one split
    (:meth:`RoutingTally.arrays`), mean over tasks. Blocks that only one has are left out."""
    values = {}
    for block in now["blocks"].tolist():
        old, new = before.get(f"probe/{block}"), now[f"probe/{block}"]
        if old is None or old.shape != new.shape:
            continue
        seen = (old >= 0) & (new >= 0)
        changed = ((old != new) & seen).sum(1)[seen.any(1)] / seen.sum(1)[seen.any(1)]
        if len(changed):
            values[f"route/{block}/churn"] = float(changed.mean())
    return values


def information_bias(variances: np.ndarray, table: np.ndarray) -> float:
    """How much the plug-in I(task; expert) exceeds the true one on average, to first order in the number of examples.

    The delta method: 1/2 (1/T sum_te V_te / J(e|t) - 1/T^2 sum_te V_te / J(e)), V the variance of the estimated table. For
    n_t independent assignments per task, N in all, and no dependence it is (T - 1)(E - 1) / (2 N) (Miller 1955); the variance
    between examples makes it right for the tokens of an example, which depend on each other.

    Args:
        variances: (T, E) V.
        table: (T, E) the estimated table.
    """
    tasks, marginal = len(table), table.mean(0)
    within = np.divide(variances, table, out=np.zeros_like(table), where=table > 0).sum() / tasks
    between = np.divide(variances, marginal, out=np.zeros_like(table), where=marginal > 0).sum() / tasks**2
    return float(0.5 * (within - between))


def permutation_p(examples: Sequence[np.ndarray], draws: int, seed: int) -> float:
    """(1 + permutations with as high an I(task; expert)) / (1 + ``draws``), the labels shuffled by example.

    Args:
        examples: for each task (n, E) weights of its examples.
        draws: number of permutations.
        seed: of the permutations.
    """
    generator = np.random.default_rng(seed)
    every = np.concatenate(examples)
    starts = np.cumsum([0, *(len(own) for own in examples[:-1])])

    def information(rows: np.ndarray) -> float:
        sums = np.add.reduceat(rows, starts, axis=0)
        return mutual_information(_rows(sums, sums.sum(1)))

    found = information(every) - 1e-12
    return (1 + sum(information(every[generator.permutation(len(every))]) >= found for _ in range(draws))) / (1 + draws)


def _measure_block(sums: _Block, draws: int, seed: int) -> dict[str, float]:
    met = sums.w.sum(1) > 0
    units = sums.units[met]
    table = _rows(sums.w, sums.w.sum(1))[met]
    probabilities, entropies = sums.q[met] / units[:, None], sums.entropy[met] / units
    values = measure_table(table) | decompose(probabilities, entropies)
    values["mi_bias"] = 0.0
    if not sums.exact:
        experts = table.shape[1]
        values["entropy"] = float(entropies.mean() / np.log(experts)) if experts > 1 else 0.0
        values["mi_bias"] = information_bias(_variances(sums)[met], table)
        kept = [np.concatenate(own) for own in sums.kept if own]
        values["mi_null_p"] = permutation_p(kept, draws, seed)
    wanted = sums.wanted.sum()
    return values | {
        "mi_corrected": values["mi"] - values["mi_bias"],
        "margin": float((sums.margin[met] / units).mean()),
        "z_mean": float((sums.z[met] / units).mean()),
        "z_max": sums.z_max,
        "dropped": float(sums.dropped.sum() / wanted) if wanted else 0.0,
        "unrouted": float((sums.unrouted[met] / units).mean()),
    }


def _variances(sums: _Block) -> np.ndarray:
    """(T, E) variance of the rows of the table, examples being independent (the ratio estimator's); zero where a task has
    fewer than two examples."""
    total = sums.w.sum(1)
    table = _rows(sums.w, total)
    spread = sums.squares - 2 * table * sums.products + table**2 * sums.lengths[:, None]
    known = (sums.examples > 1) & (total > 0)
    scale = np.divide(sums.examples, (sums.examples - 1) * total**2, out=np.zeros_like(total), where=known)
    return np.maximum(spread, 0.0) * scale[:, None]


def _count_examples(block: _Block, task: int, examples: np.ndarray) -> None:
    """Add (n, E) weights of a task's examples; those that no expert took say nothing about a choice."""
    examples = examples[examples.sum(1) > 0]
    length = examples.sum(1, keepdims=True)
    block.squares[task] += (examples**2).sum(0)
    block.products[task] += (examples * length).sum(0)
    block.lengths[task] += float((length**2).sum())
    block.examples[task] += len(examples)
    _extend(block.kept[task], examples, block.room)


def _extend(parts: list[np.ndarray], more: np.ndarray, limit: int) -> None:
    room = limit - sum(map(len, parts))
    if room > 0 and len(more):
        parts.append(more[:room])


def _rows(sums: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Each row over its total; zero rows stay."""
    return np.divide(sums, totals[:, None], out=np.zeros_like(sums), where=totals[:, None] > 0)


def _entropies(table: np.ndarray) -> np.ndarray:
    """Entropy of each row."""
    return -(table * np.log(np.where(table > 0, table, 1.0))).sum(-1)


def _entropy(distribution: np.ndarray) -> float:
    return float(_entropies(distribution))
