import math

import numpy as np
import pytest
import scipy.stats

from pipelines.stats import Interval, sd, t_interval


def test_t_interval_by_hand() -> None:
    interval = t_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2 degrees of freedom) * sd 1 / sqrt(3)
    assert interval.mean == 2.0
    assert interval.n == 3
    assert interval.low == pytest.approx(2 - half)
    assert interval.high == pytest.approx(2 + half)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_t_interval_equals_scipy(level: float) -> None:
    values = np.random.default_rng(1).normal(3, 2, 7).tolist()
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(level)
    interval = t_interval(values, level)
    assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))


def test_t_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(1, 3, (2000, 4))
    covered = [i.low <= 1 <= i.high for i in map(t_interval, draws.tolist()) if i.low is not None and i.high is not None]
    assert 0.935 < np.mean(covered) < 0.965


def test_one_value_has_no_interval() -> None:
    assert t_interval([4.0]) == Interval(4.0, None, None, 1)
    assert not t_interval([4.0]).excludes_zero
    assert sd([4.0]) is None


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_undefined_values_are_refused(values: list[float]) -> None:
    for function in (t_interval, sd):
        with pytest.raises(ValueError, match="needs"):
            function(values)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 0.0, False), (1e-17, 1e-17, False)],
)
def test_excludes_zero(low: float, high: float, expected: bool) -> None:
    assert Interval((low + high) / 2, low, high, 3).excludes_zero is expected
