"""Means with their uncertainty over seeds. numpy and scipy only."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special

ROUNDING = 1e-12
"""Differences of scores up to this size are rounding of sums, not effects."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over ``n`` values and its confidence interval, in the unit of the values."""

    mean: float
    low: float | None
    high: float | None
    """None for both bounds when ``n`` is 1: one value says nothing about its spread."""
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether both bounds are on the same side of 0, by more than rounding; False without bounds."""
        return self.low is not None and self.high is not None and (self.low > ROUNDING or self.high < -ROUNDING)


def _checked(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"needs a list of at least one number, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"needs finite numbers (take out undefined ones and say so), got {array.tolist()}")
    return array


def sd(values: Sequence[float]) -> float | None:
    """Sample standard deviation sqrt(sum (x - mean)^2 / (n - 1)); None for n = 1.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    array = _checked(values)
    return float(array.std(ddof=1)) if array.size > 1 else None


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's interval mean +- t_{(1 + level)/2, n - 1} * sd / sqrt(n) (Student 1908).

    It assumes roughly normal values; with fewer than six seeds take it as indicative.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    array = _checked(values)
    mean, spread = float(array.mean()), sd(values)
    if spread is None:
        return Interval(mean, None, None, 1)
    half = float(scipy.special.stdtrit(array.size - 1, (1 + level) / 2)) * spread / math.sqrt(array.size)
    return Interval(mean, mean - half, mean + half, array.size)


def paired_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Student's interval of the mean of ``a[i] - b[i]``: what both members of a pair share (the seed) cancels.

    Raises:
        ValueError: different lengths, no values, or one that is not finite.
    """
    if len(a) != len(b):
        raise ValueError(f"pairs need lists of the same length, got {len(a)} and {len(b)}")
    return t_interval(_checked(a) - _checked(b), level)  # pyright: ignore[reportArgumentType]


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap (Efron 1979): resample the n values with replacement ``draws`` times.

    Args:
        values: the n observations, e.g. one score per test example.
        statistic: (draws, n) resampled values -> (draws,); None: the mean.
        level: the bounds are the (1 - level)/2 and (1 + level)/2 quantiles of the statistic's draws.
        draws: number of resamples.
        seed: same seed, same interval.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    array = _checked(values)
    function = statistic or (lambda sample: sample.mean(axis=1))
    point = float(function(array[None, :])[0])
    if array.size == 1:
        return Interval(point, None, None, 1)
    chosen = np.random.default_rng(seed).integers(0, array.size, (draws, array.size))
    low, high = np.quantile(function(array[chosen]), [(1 - level) / 2, (1 + level) / 2])
    return Interval(point, float(low), float(high), array.size)
