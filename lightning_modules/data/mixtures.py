"""Which task, and which of its examples, each group of each optimiser step holds: pure functions of (seed, step). No torch.

A step has ``tasks_per_step`` groups; a group holds examples of one task. Nothing depends on what was drawn before, so a
resumed trial needs its step number and no sampler state, and a single-task trial of the same seed sees the examples of
its task in the same order as the mixture does. The one exception is ``sampling: adaptive``, whose shares follow the losses:
there the shares of the past segments of the trial are recorded, and the groups are a pure function of (seed, record, step).
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lightning_modules.config import MixtureConfig
from lightning_modules.seeds import derive

POOL = 64
"""Groups of similar length are cut from chunks of this many groups of the shuffled epoch (PERFORMANCE F: 2-7 % padding)."""

SMOOTHING = 0.9
"""Weight per optimiser step of the past in the moving averages of :class:`OnlineMixing`."""


def task_shares(
    config: MixtureConfig, sizes: Sequence[int], *, names: Sequence[str] = (), budget: int | None = None
) -> list[float]:
    """Share p_t of the groups that each task gets, in the order of ``sizes`` (training examples per task); sums to 1.

    p_t is proportional to n_t (proportional), n_t^(1/temperature) (temperature), 1 (uniform, and adaptive at the start),
    min(n_t, cap) (capped; the examples-proportional mixing of T5, Raffel et al. 2020), ``config.weights`` (weights; needs the
    ``names`` of the tasks, each of which must have a weight), or :func:`unimax`'s part of the ``budget``: the examples drawn
    in the whole trial, ``steps * batch_size``.

    Raises:
        ValueError: ``sampling: unimax`` without a budget, or with groups of a number of tokens (how many examples those draw
            depends on the tokenizer), or ``sampling: weights`` without one name per size.
        KeyError: a name has no weight.
    """
    n = np.asarray(sizes, dtype=np.float64)
    relative = n / n.max()  # so that a low temperature does not overflow
    weights = {
        "proportional": lambda: n,
        "temperature": lambda: relative ** (1.0 / config.temperature),
        "uniform": lambda: np.ones_like(n),
        "adaptive": lambda: np.ones_like(n),
        "capped": lambda: np.minimum(n, config.cap or np.inf),
        "weights": lambda: np.array([config.weights[name] for name, _ in zip(names, sizes, strict=True)]),
        "unimax": lambda: _unimax_of(config, n, budget),
    }[config.sampling]()
    return [float(p) for p in weights / weights.sum()]


def _unimax_of(config: MixtureConfig, sizes: np.ndarray, budget: int | None) -> np.ndarray:
    if budget is None or config.max_epochs is None or config.batch_tokens is not None:
        raise ValueError(
            "sampling: unimax needs max_epochs, batch_size rather than batch_tokens, and the examples of the whole trial, "
            f"got max_epochs={config.max_epochs}, batch_tokens={config.batch_tokens}, budget={budget}"
        )
    return unimax(config.max_epochs * sizes, budget)


def unimax(caps: np.ndarray, budget: float) -> np.ndarray:
    """(T,) examples of each task, by UniMax (Chung et al. 2023, algorithm 1): from the smallest task to the largest, each
    gets an equal part of what is left of ``budget``, but no more than its cap.

    They add up to ``budget`` unless all the caps together are smaller: then every task gets its cap, and shares that are
    proportional to them repeat every task equally often, more often than the caps allow.
    """
    given = np.zeros(len(caps))
    left = float(budget)
    for i, task in enumerate(np.argsort(caps, kind="stable")):
        given[task] = min(caps[task], left / (len(caps) - i))
        left -= given[task]
    return given


class OnlineMixing:
    """The bandit of ``sampling: adaptive``: EXP3 with the loss as the reward (online data mixing, Albalak et al. 2023).

    With K tasks, the exploration rate of optimiser step t (from 1) is E_t = min(1/K, sqrt(ln K / (K t))), E_0 = 1/K. When a
    segment of n = ``adapt_every`` steps ends, each task i that it drew, with mean loss L_i and share p_i, updates its
    importance-weighted reward, R_i <- a^n R_i + (1 - a^n) L_i / p_i (a: :data:`SMOOTHING`, R_i = 0 at first), and the shares
    of the next segment, whose first step is t, are

        p_i = (1 - K E_t) exp(E_{t-1} R_i) / sum_k exp(E_{t-1} R_k) + E_t.

    So no task falls below E_t. At n = 1 this is the paper's algorithm. Departures for n > 1: the shares stand still for n
    steps, t goes on counting steps, and the smoothing is what n steps with the segment's mean loss would have done. E_t also
    scales the rewards, so the shares tend back to equal ones as training goes on (as the paper's do), and the loss is used
    as it is, so tasks whose losses have different units are drawn by their units as well.
    """

    def __init__(self, num_tasks: int, adapt_every: int) -> None:
        self.adapt_every = adapt_every
        self.updates = 0
        self.rewards = np.zeros(num_tasks)
        self.shares = np.full(num_tasks, 1.0 / num_tasks)

    def observe(self, losses: Sequence[float | None]) -> list[float]:
        """The shares of the next segment. ``losses``: each task's mean loss over the examples of the segment that ends, before
        any loss weighting and over all workers; None for a task that was not drawn, whose reward stays as it is.

        Raises:
            ValueError: a loss is not finite, or there is not one entry per task.
        """
        keep = SMOOTHING**self.adapt_every
        updated = self.rewards.copy()
        for task, (loss, share) in enumerate(zip(losses, self.shares, strict=True)):
            if loss is not None:
                if not math.isfinite(loss):
                    raise ValueError(f"losses[{task}] must be finite, got {loss}")
                updated[task] = keep * self.rewards[task] + (1.0 - keep) * loss / share
        self.rewards = updated
        self.updates += 1
        before = self.updates * self.adapt_every
        floor, rate = self._exploration(before + 1), self._exploration(before)
        scores = np.exp(rate * (updated - updated.max()))
        self.shares = (1.0 - len(updated) * floor) * scores / scores.sum() + floor
        return self.shares.tolist()

    def _exploration(self, step: int) -> float:
        """E_t of the class's formula."""
        tasks = len(self.rewards)
        return min(1.0 / tasks, math.sqrt(math.log(tasks) / (tasks * step)))

    def state(self) -> dict[str, Any]:
        """Everything it has learned, as plain values for a checkpoint."""
        return {"updates": self.updates, "rewards": self.rewards.tolist(), "shares": self.shares.tolist()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.updates = state["updates"]
        self.rewards, self.shares = np.array(state["rewards"]), np.array(state["shares"])


def _hash01(key: int, counters: np.ndarray) -> np.ndarray:
    """Counter-based uniforms in [0, 1): SplitMix64 (Steele et al. 2014) of ``key + counter``, element by element."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def subset(name: str, size: int, keep: int | None) -> np.ndarray:
    """Row numbers, ascending, of a fixed subset of ``keep`` of ``size`` rows (all for None). A smaller subset of the same
    task is part of a larger one."""
    if keep is None or keep >= size:
        return np.arange(size)
    order = np.argsort(_hash01(derive(0, "subset", name), np.arange(size)), kind="stable")
    return np.sort(order[:keep])


@dataclass(frozen=True, slots=True)
class Group:
    """One group of a step."""

    task: int
    """Position of the task in the mixture."""
    rows: np.ndarray
    """Row numbers (b,) into the task's training subset, of all workers; b differs between groups of a number of tokens."""


@dataclass(frozen=True, slots=True)
class _Segment:
    """A stretch of steps with the same shares."""

    number: int
    shares: np.ndarray
    """(T,) share of the groups of each task."""
    drawn: np.ndarray
    """(T,) groups of each task before the segment."""


@dataclass(frozen=True, slots=True)
class _Epoch:
    """One pass over a task's examples, cut into G groups."""

    rows: np.ndarray
    """Row numbers, group after group."""
    bounds: np.ndarray
    """(G + 1,) where in ``rows`` each group starts, and the end."""
    order: np.ndarray
    """(G,) numbers of the groups in the order in which they are drawn."""

    def group(self, position: int) -> np.ndarray:
        """Row numbers of the ``position``-th group drawn."""
        number = self.order[position]
        return self.rows[self.bounds[number] : self.bounds[number + 1]]


class Schedule:
    """The groups of every step of a trial.

    Slots (groups in order of time) are filled by jittered sampling: occurrence j of task t stands at time
    (j + u_tj) / p_t with u_tj uniform from (seed, task name, j), and slot g is the g-th occurrence in time. So every task
    gets its share almost exactly over any stretch (at most one occurrence off), and the company it keeps varies.

    With ``sampling: adaptive`` the trial is cut into segments of ``adapt_every`` steps, each with shares of its own and a new
    jitter; every task goes on in its epoch where the segment before has left it. The trainer appends a segment's shares with
    :meth:`extend` before its first step, and a resumed one puts back :attr:`segments`. Otherwise there is one endless segment.
    """

    def __init__(
        self,
        config: MixtureConfig,
        names: Sequence[str],
        lengths: Sequence[np.ndarray],
        seed: int,
        *,
        budget: int | None = None,
    ) -> None:
        """``lengths[t]``: tokens of each training example of task t, after subsetting; used to group similar lengths and to
        keep to a token budget. ``budget``: examples drawn in the whole trial (see :func:`task_shares`)."""
        self.config = config
        self.names = tuple(names)
        self.seed = seed
        self._lengths = lengths
        self._keys = [derive(seed, "slot", name) for name in names]
        self._epoch = lru_cache(maxsize=4 * len(names))(self._cut_epoch)
        self._epoch_starts = [[0] for _ in names]
        self.load([task_shares(config, [len(n) for n in lengths], names=names, budget=budget)])

    @property
    def shares(self) -> np.ndarray:
        """(T,) share of each task in the newest segment."""
        return self._segments[-1].shares

    @property
    def segments(self) -> list[list[float]]:
        """The shares of all segments so far, for a checkpoint."""
        return [segment.shares.tolist() for segment in self._segments]

    def load(self, segments: Sequence[Sequence[float]]) -> None:
        """Go on from :attr:`segments`."""
        self._segments: list[_Segment] = []
        for shares in segments:
            self._append(shares)

    def extend(self, shares: Sequence[float]) -> None:
        """Fix the shares of the next ``adapt_every`` steps.

        Raises:
            ValueError: the sampling is not adaptive, or the shares are not one positive number per task that sum to 1.
        """
        if self.config.adapt_every is None:
            raise ValueError(f"shares change with sampling: adaptive only, got sampling={self.config.sampling!r}")
        if len(shares) != len(self.names) or min(shares) <= 0 or not math.isclose(sum(shares), 1.0, rel_tol=1e-6):
            raise ValueError(f"shares must be {len(self.names)} positive numbers that sum to 1, got {list(shares)}")
        self._append(shares)

    def _append(self, shares: Sequence[float]) -> None:
        number = len(self._segments)
        drawn = self.drawn(number * (self.config.adapt_every or 0))
        self._segments.append(_Segment(number, np.array(shares), drawn))

    def drawn(self, step: int) -> np.ndarray:
        """(T,) groups of each task in all steps before ``step``.

        Raises:
            RuntimeError: the shares of one of these steps are not known yet.
        """
        if step == 0:
            return np.zeros(len(self.names), dtype=np.int64)
        segment, first = self._locate(step - 1)
        tasks = [task for task, _ in self._occurrences(segment, 0, first + self.config.tasks_per_step)]
        return segment.drawn + np.bincount(tasks, minlength=len(self.names))

    def groups(self, step: int) -> list[Group]:
        """The groups of optimiser step ``step`` (from 0), in task order.

        Raises:
            RuntimeError: the shares of this step are not known yet (``sampling: adaptive``).
        """
        segment, first = self._locate(step)
        return [
            Group(task, self._rows(task, j))
            for task, j in sorted(self._occurrences(segment, first, self.config.tasks_per_step))
        ]

    def _locate(self, step: int) -> tuple[_Segment, int]:
        """The segment that ``step`` is in, and its first slot there."""
        every = self.config.adapt_every
        number, within = (0, step) if every is None else divmod(step, every)
        if number >= len(self._segments):
            raise RuntimeError(
                f"step {step} is in segment {number}, but the shares of {len(self._segments)} segments are known"
            )
        return self._segments[number], within * self.config.tasks_per_step

    def _occurrences(self, segment: _Segment, first: int, count: int) -> list[tuple[int, int]]:
        """(task, occurrence since the trial's start) of slots ``first .. first + count - 1`` of the segment."""
        drawn = segment.drawn.tolist()
        if len(self.names) == 1:
            return [(0, drawn[0] + j) for j in range(first, first + count)]
        margin = len(self.names) + 1
        low, high = max(0.0, first - margin), first + count + margin
        earlier, events = 0, []
        for task, share in enumerate(segment.shares):
            start, stop = int(low * share), int(high * share) + 1
            j = np.arange(start, stop + 1)
            times = (j + _hash01(self._keys[task], j + (segment.number << 32))) / share
            earlier += start + int(np.count_nonzero(times < low))
            events += [(time, task, int(i)) for time, i in zip(times, j, strict=True) if time >= low]
        events.sort()
        return [(task, drawn[task] + j) for _, task, j in events[first - earlier : first - earlier + count]]

    def _rows(self, task: int, occurrence: int) -> np.ndarray:
        if self.config.group_tokens is None:
            epoch, position = divmod(occurrence, -(-len(self._lengths[task]) // self.config.group_size))
            return self._epoch(task, epoch).group(position)
        starts = self._epoch_starts[task]
        while starts[-1] <= occurrence:
            starts.append(starts[-1] + len(self._epoch(task, len(starts) - 1).order))
        epoch = bisect_right(starts, occurrence) - 1
        return self._epoch(task, epoch).group(occurrence - starts[epoch])

    def _cut_epoch(self, task: int, epoch: int) -> _Epoch:
        """The epoch's shuffled rows, cut into groups of similar length, groups shuffled; without ``bucketing``, cut as they
        come."""
        lengths, bucketing = self._lengths[task], self.config.bucketing
        rng = np.random.Generator(np.random.Philox(key=derive(self.seed, "order", self.names[task], epoch)))
        rows = rng.permutation(len(lengths))
        if self.config.group_tokens is None:
            rows, bounds = _cut_by_examples(rows, lengths, self.config.group_size, bucketing)
        else:
            rows, bounds = _cut_by_tokens(rows, lengths, self.config.group_tokens, bucketing)
        count = len(bounds) - 1
        return _Epoch(rows, bounds, rng.permutation(count) if bucketing else np.arange(count))


def _cut_by_examples(rows: np.ndarray, lengths: np.ndarray, size: int, bucketing: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows and bounds of groups of ``size`` rows. The last group is filled up from the epoch's start."""
    rows = np.resize(rows, -(-len(rows) // size) * size)
    if bucketing:
        _sort_chunks(rows, lengths, POOL * size)
    return rows, np.arange(0, len(rows) + 1, size)


def _cut_by_tokens(rows: np.ndarray, lengths: np.ndarray, tokens: int, bucketing: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows and bounds of groups of as many rows as fit into ``tokens`` when padded to the longest. A longer row stands alone;
    the last group is what is left."""
    if bucketing:
        _sort_chunks(rows, lengths, POOL * max(1, int(tokens / lengths.mean())))
    bounds, longest = [0], 0
    for i, length in enumerate(lengths[rows].tolist()):
        longest = max(longest, length)
        if i > bounds[-1] and longest * (i + 1 - bounds[-1]) > tokens:
            bounds.append(i)
            longest = length
    return rows, np.array([*bounds, len(rows)])


def _sort_chunks(rows: np.ndarray, lengths: np.ndarray, size: int) -> None:
    """Sort each ``size`` rows by length, in place."""
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        rows[start : start + size] = chunk[np.argsort(lengths[chunk], kind="stable")]
