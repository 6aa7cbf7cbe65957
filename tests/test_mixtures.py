"""Sampling: exact shares, pure functions of (seed, step), nothing lost, lengths grouped."""

from collections import Counter

import numpy as np
import pytest

from lightning_modules.config import MixtureConfig, build
from lightning_modules.data.mixtures import Schedule, subset, task_shares

SIZES = [2000, 900, 300, 40, 7]
NAMES = ["a", "b", "c", "d", "e"]
KINDS = [
    {"sampling": "proportional"},
    {"sampling": "temperature", "temperature": 2.0},
    {"sampling": "uniform"},
    {"sampling": "capped", "cap": 300},
]


def mixture(**settings: object) -> MixtureConfig:
    return build(MixtureConfig, {"batch_size": 32, "tasks_per_step": 4, **settings})


def schedule(seed: int = 0, names: list[str] = NAMES, sizes: list[int] = SIZES, **settings: object) -> Schedule:
    lengths = [np.random.default_rng(i).integers(3, 60, size=n) for i, n in enumerate(sizes)]
    return Schedule(mixture(**settings), names, lengths, seed)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sampling": "proportional"}, [0.8, 0.16, 0.04]),
        ({"sampling": "temperature", "temperature": 2.0}, [20 / 33.4164, 8.9443 / 33.4164, 4.4721 / 33.4164]),
        ({"sampling": "uniform"}, [1 / 3] * 3),
        ({"sampling": "capped", "cap": 40}, [0.4, 0.4, 0.2]),
    ],
)
def test_shares_follow_their_formula(settings: dict[str, object], expected: list[float]) -> None:
    assert task_shares(mixture(**settings), [400, 80, 20]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: str(s["sampling"]))
def test_counts_keep_to_the_shares_over_any_stretch(settings: dict[str, object]) -> None:
    plan = schedule(**settings)
    counts = np.zeros(len(SIZES))
    for step in range(300):
        for group in plan.groups(step):
            counts[group.task] += 1
        assert np.all(np.abs(counts - plan.shares * (step + 1) * 4) <= len(SIZES) + 1)


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: str(s["sampling"]))
def test_a_step_does_not_depend_on_the_steps_before(settings: dict[str, object]) -> None:
    one, other = schedule(**settings), schedule(**settings)
    for step in range(40):
        one.groups(step)
    for a, b in zip(one.groups(40), other.groups(40), strict=True):
        assert a.task == b.task and np.array_equal(a.rows, b.rows)


def test_every_example_is_seen_once_an_epoch() -> None:
    plan = schedule(names=["a"], sizes=[160])
    for epoch in range(3):
        seen = Counter(int(i) for step in range(5) for g in plan.groups(epoch * 5 + step) for i in g.rows)
        assert seen == Counter(range(160))


def test_a_task_smaller_than_a_group_fills_it_by_repeating() -> None:
    counts = Counter(schedule(names=["a"], sizes=[3]).groups(0)[0].rows.tolist())
    assert sum(counts.values()) == 8 and set(counts) == {0, 1, 2} and max(counts.values()) <= 3


def test_a_single_task_trial_sees_its_task_in_the_order_of_the_mixture() -> None:
    lengths = np.random.default_rng(7).integers(3, 60, size=300)
    others = [np.full(n, 9) for n in (500, 90)]
    mixed = Schedule(mixture(sampling="uniform"), ["x", "c", "y"], [others[0], lengths, others[1]], seed=5)
    alone = Schedule(mixture(sampling="uniform"), ["c"], [lengths], seed=5)
    rows_mixed = [g.rows for step in range(60) for g in mixed.groups(step) if g.task == 1]
    rows_alone = [g.rows for step in range(60) for g in alone.groups(step)]
    for a, b in zip(rows_mixed, rows_alone, strict=False):
        assert np.array_equal(a, b)


def test_seeds_and_tasks_have_their_own_order() -> None:
    a, b = schedule(seed=0, names=["a"], sizes=[500]), schedule(seed=1, names=["a"], sizes=[500])
    c = schedule(seed=0, names=["c"], sizes=[500])
    assert not np.array_equal(a.groups(0)[0].rows, b.groups(0)[0].rows)
    assert not np.array_equal(a.groups(0)[0].rows, c.groups(0)[0].rows)


def test_groups_hold_examples_of_similar_length() -> None:
    lengths = np.random.default_rng(0).lognormal(3, 0.8, size=4000).astype(int) + 2
    plan = Schedule(mixture(), ["a"], [lengths], seed=0)
    rows = [g.rows for step in range(100) for g in plan.groups(step)]
    useful = sum(lengths[r].sum() for r in rows) / sum(lengths[r].max() * len(r) for r in rows)
    chance = np.mean([lengths[r].mean() / lengths[r].max() for r in np.random.default_rng(1).permutation(4000).reshape(-1, 8)])
    assert useful > 0.93 > 0.6 > chance


def test_subsets_are_nested_and_fixed() -> None:
    small, large = subset("t", 1000, 50), subset("t", 1000, 200)
    assert len(small) == 50 and set(small) <= set(large) and len(set(large)) == 200
    assert np.array_equal(subset("t", 30, None), np.arange(30))
    assert not np.array_equal(small, subset("other", 1000, 50))
