"""Means with their uncertainty over seeds. numpy and scipy only."""

import math
from collections.abc import Sequence
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
