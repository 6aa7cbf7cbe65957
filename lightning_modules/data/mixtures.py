"""Which task, and which of its examples, each group of each optimiser step holds: pure functions of (seed, step). No torch.

A step has ``tasks_per_step`` groups; a group holds examples of one task. Nothing depends on what was drawn before, so a
resumed trial needs its step number and no sampler state, and a single-task trial of the same seed sees the examples of
its task in the same order as the mixture does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lightning_modules.config import MixtureConfig
from lightning_modules.seeds import derive

POOL = 64
"""Groups of similar length are cut from chunks of this many groups of the shuffled epoch (PERFORMANCE F: 2-7 % padding)."""


def task_shares(config: MixtureConfig, sizes: Sequence[int]) -> list[float]:
    """Share p_t of the groups that each task gets, in the order of ``sizes`` (training examples per task); sums to 1.

    p_t is proportional to n_t (proportional), n_t^(1/temperature) (temperature), 1 (uniform) or min(n_t, cap) (capped;
    the examples-proportional mixing of T5, Raffel et al. 2020).
    """
    n = np.asarray(sizes, dtype=np.float64)
    relative = n / n.max()  # so that a low temperature does not overflow
    weights = {
        "proportional": lambda: n,
        "temperature": lambda: relative ** (1.0 / config.temperature),
        "uniform": lambda: np.ones_like(n),
        "capped": lambda: np.minimum(n, config.cap or np.inf),
    }[config.sampling]()
    return [float(p) for p in weights / weights.sum()]


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
    """Row numbers (b,) into the task's training subset."""


class Schedule:
    """The groups of every step of a trial.

    Slots (groups in order of time) are filled by jittered sampling: occurrence j of task t stands at time
    (j + u_tj) / p_t with u_tj uniform from (seed, task name, j), and slot g is the g-th occurrence in time. So every task
    gets its share almost exactly over any stretch (at most one occurrence off), and the company it keeps varies.
    """

    def __init__(self, config: MixtureConfig, names: Sequence[str], lengths: Sequence[np.ndarray], seed: int) -> None:
        """``lengths[t]``: tokens of each training example of task t, after subsetting; used to group similar lengths."""
        self.config = config
        self.names = tuple(names)
        self.seed = seed
        self.shares = np.array(task_shares(config, [len(n) for n in lengths]))
        self._lengths = lengths
        self._keys = [derive(seed, "slot", name) for name in names]
        self._epoch = lru_cache(maxsize=4 * len(names))(self._epoch_groups)

    def groups(self, step: int) -> list[Group]:
        """The groups of optimiser step ``step`` (from 0), in task order."""
        per_step = self.config.tasks_per_step
        slots = self._occurrences(step * per_step, per_step)
        return [Group(task, self._rows(task, j)) for task, j in sorted(slots)]

    def _occurrences(self, first: int, count: int) -> list[tuple[int, int]]:
        """(task, occurrence) of slots ``first .. first + count - 1``."""
        if len(self.names) == 1:
            return [(0, j) for j in range(first, first + count)]
        margin = len(self.names) + 1
        low, high = max(0.0, first - margin), first + count + margin
        earlier, events = 0, []
        for task, share in enumerate(self.shares):
            start, stop = int(low * share), int(high * share) + 1
            j = np.arange(start, stop + 1)
            times = (j + _hash01(self._keys[task], j)) / share
            earlier += start + int(np.count_nonzero(times < low))
            events += [(time, task, int(i)) for time, i in zip(times, j, strict=True) if time >= low]
        events.sort()
        return [(task, j) for _, task, j in events[first - earlier : first - earlier + count]]

    def _rows(self, task: int, occurrence: int) -> np.ndarray:
        size = len(self._lengths[task])
        per_epoch = -(-size // self.config.group_size)
        epoch, position = divmod(occurrence, per_epoch)
        return self._epoch(task, epoch)[position]

    def _epoch_groups(self, task: int, epoch: int) -> np.ndarray:
        """(groups, b) row numbers: the epoch's shuffled rows, cut into groups of similar length, groups shuffled. The last
        group is filled up from the epoch's start."""
        size, b = len(self._lengths[task]), self.config.group_size
        rng = np.random.Generator(np.random.Philox(key=derive(self.seed, "order", self.names[task], epoch)))
        rows = np.resize(rng.permutation(size), -(-size // b) * b)
        for start in range(0, len(rows), POOL * b):
            chunk = rows[start : start + POOL * b]
            rows[start : start + POOL * b] = chunk[np.argsort(self._lengths[task][chunk], kind="stable")]
        return rng.permutation(rows.reshape(-1, b), axis=0)
