"""Sampling: exact shares, pure functions of (seed, record, step), nothing lost, lengths grouped, budgets kept."""

import json
import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from lightning_modules.building import build
from lightning_modules.config import MixtureConfig
from lightning_modules.data.mixtures import POOL, SMOOTHING, OnlineMixing, Schedule, _hash01, subset, task_shares, unimax
from lightning_modules.seeds import derive

SIZES = [2000, 900, 300, 40, 7]
NAMES = ["a", "b", "c", "d", "e"]
KINDS: list[dict[str, Any]] = [
    {"sampling": "proportional"},
    {"sampling": "temperature", "temperature": 2.0},
    {"sampling": "uniform"},
    {"sampling": "capped", "cap": 300},
    {"sampling": "weights", "weights": {"a": 1.0, "b": 5.0, "c": 0.5, "d": 2.0, "e": 0.1}},
    {"sampling": "unimax", "max_epochs": 3.0},
    {"batch_tokens": 600},
    {"batch_tokens": 600, "bucketing": False},
    {"bucketing": False},
]
IDS = [str(i) + "-" + "-".join(map(str, settings.values()))[:24] for i, settings in enumerate(KINDS)]
BUDGET = 300 * 32


def mixture(**settings: Any) -> MixtureConfig:
    return build(MixtureConfig, {"batch_size": 32, "tasks_per_step": 4, **settings})


def token_lengths(sizes: list[int]) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(3, 60, size=n) for i, n in enumerate(sizes)]


def schedule(seed: int = 0, names: list[str] = NAMES, sizes: list[int] = SIZES, **settings: Any) -> Schedule:
    return Schedule(mixture(**settings), names, token_lengths(sizes), seed, budget=BUDGET)


def flat(plan: Schedule, step: int) -> list[tuple[int, list[int]]]:
    return [(group.task, group.rows.tolist()) for group in plan.groups(step)]


def epoch_of(plan: Schedule, sizes: list[int], steps: int) -> None:
    """Whatever the groups are, each task's examples come in whole epochs: every one once before any comes again."""
    seen: list[list[int]] = [[] for _ in sizes]
    for step in range(steps):
        for group in plan.groups(step):
            seen[group.task] += group.rows.tolist()
    for rows, size in zip(seen, sizes, strict=True):
        assert len(rows) > 2 * size, "the test is too short for this task"
        for start in range(0, len(rows) - size, size):
            assert sorted(rows[start : start + size]) == list(range(size))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sampling": "proportional"}, [0.8, 0.16, 0.04]),
        ({"sampling": "temperature", "temperature": 2.0}, [20 / 33.4164, 8.9443 / 33.4164, 4.4721 / 33.4164]),
        ({"sampling": "uniform"}, [1 / 3] * 3),
        ({"sampling": "capped", "cap": 40}, [0.4, 0.4, 0.2]),
        ({"sampling": "weights", "weights": {"z": 1.0, "y": 5.0, "x": 2.0}}, [0.25, 0.625, 0.125]),
        ({"sampling": "adaptive", "adapt_every": 10}, [1 / 3] * 3),
        ({"sampling": "unimax", "max_epochs": 2.0}, [240 / 440, 160 / 440, 40 / 440]),
        ({"sampling": "unimax", "max_epochs": 10.0}, [1 / 3] * 3),
        ({"sampling": "unimax", "max_epochs": 0.5}, [0.8, 0.16, 0.04]),
    ],
)
def test_shares_follow_their_formula(settings: dict[str, Any], expected: list[float]) -> None:
    shares = task_shares(mixture(**settings), [400, 80, 20], names=["x", "y", "z"], budget=440)
    assert shares == pytest.approx(expected, rel=1e-3)


def test_unimax_keeps_its_caps_and_is_uniform_where_none_binds() -> None:
    rng = np.random.default_rng(0)
    bound = 0
    for _ in range(300):
        caps = rng.lognormal(5, 2, size=rng.integers(1, 12))
        budget = rng.uniform(0.01, 1.5) * caps.sum()
        given = unimax(caps, budget)
        assert np.all(given <= caps * (1 + 1e-12)) and np.all(given > 0)
        assert given.sum() == pytest.approx(min(budget, caps.sum()))
        free = given < caps * (1 - 1e-9)
        if free.any():
            assert given[free] == pytest.approx(np.full(free.sum(), given.max()))
            assert np.all(given[~free] <= given.max() * (1 + 1e-9))
        if np.all(caps >= budget / len(caps)):
            assert given == pytest.approx(np.full(len(caps), budget / len(caps)))
        bound += 0 < free.sum() < len(caps)
    assert bound > 50


def test_no_task_is_repeated_more_often_than_unimax_allows() -> None:
    plan = schedule(sampling="unimax", max_epochs=4.0)
    examples = plan.drawn(BUDGET // 32) * 8
    assert examples.sum() == BUDGET
    assert np.all(examples <= 4 * np.array(SIZES) + 8)
    assert examples[3] == pytest.approx(160, abs=8) and examples[4] == pytest.approx(28, abs=8)
    assert examples[1] == pytest.approx(3600, abs=8) and examples[2] == pytest.approx(1200, abs=8)


@pytest.mark.parametrize(
    ("settings", "budget"),
    [({"max_epochs": 2.0}, None), ({"max_epochs": 2.0, "batch_tokens": 512}, 600)],
    ids=["no budget", "token groups"],
)
def test_unimax_needs_to_know_how_many_examples_are_drawn(settings: dict[str, Any], budget: int | None) -> None:
    # Without the constructor's checks: they may refuse the same combination earlier.
    config = mixture(sampling="unimax", max_epochs=2.0)
    for name, value in settings.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match="needs max_epochs, batch_size"):
        task_shares(config, [10, 20], budget=budget)


def test_every_task_needs_its_weight() -> None:
    config = mixture(sampling="weights", weights={"a": 1.0})
    with pytest.raises(KeyError, match="b"):
        task_shares(config, [10, 20], names=["a", "b"])
    with pytest.raises(ValueError, match="zip"):
        task_shares(config, [10, 20], names=["a"])


@pytest.mark.parametrize("size", [1, 8])
def test_groups_are_those_of_a_slow_reference(size: int) -> None:
    """All occurrences up to the horizon in order of time, and epochs as one array: the form in which this was first written,
    whose numbers the golden losses hold."""
    config, seed, steps = mixture(batch_size=4 * size), 3, 60
    lengths = token_lengths(SIZES)
    plan = Schedule(config, NAMES, lengths, seed)
    events = []
    for task, (name, share) in enumerate(zip(NAMES, task_shares(config, SIZES), strict=True)):
        u = _hash01(derive(seed, "slot", name), np.arange(4 * steps + 10))
        events += [((j + u[j]) / share, task, j) for j in range(len(u))]
    slots = [(task, j) for _, task, j in sorted(events)]
    for step in range(steps):
        expected = []
        for task, j in sorted(slots[4 * step : 4 * step + 4]):
            epoch, position = divmod(j, math.ceil(SIZES[task] / size))
            rng = np.random.Generator(np.random.Philox(key=derive(seed, "order", NAMES[task], epoch)))
            rows = np.resize(rng.permutation(SIZES[task]), math.ceil(SIZES[task] / size) * size)
            for start in range(0, len(rows), POOL * size):
                chunk = rows[start : start + POOL * size]
                rows[start : start + POOL * size] = chunk[np.argsort(lengths[task][chunk], kind="stable")]
            expected.append((task, rng.permutation(rows.reshape(-1, size), axis=0)[position].tolist()))
        assert flat(plan, step) == expected


@pytest.mark.parametrize("settings", KINDS, ids=IDS)
def test_counts_keep_to_the_shares_over_any_stretch(settings: dict[str, Any]) -> None:
    plan = schedule(**settings)
    counts = np.zeros(len(SIZES))
    for step in range(300):
        for group in plan.groups(step):
            counts[group.task] += 1
        assert np.all(np.abs(counts - plan.shares * (step + 1) * 4) <= len(SIZES) + 1)


@pytest.mark.parametrize("settings", KINDS, ids=IDS)
def test_a_step_does_not_depend_on_the_steps_before(settings: dict[str, Any]) -> None:
    one, other = schedule(**settings), schedule(**settings)
    forward = {step: flat(one, step) for step in range(40)}
    for step in np.random.default_rng(0).permutation(40).tolist():
        assert flat(other, step) == forward[step]


@pytest.mark.parametrize("settings", KINDS, ids=IDS)
def test_groups_drawn_are_counted(settings: dict[str, Any]) -> None:
    plan, counts = schedule(**settings), Counter()
    for step in range(30):
        assert plan.drawn(step).tolist() == [counts[task] for task in range(len(SIZES))]
        counts.update(group.task for group in plan.groups(step))


def test_every_example_is_seen_once_an_epoch() -> None:
    plan = schedule(names=["a"], sizes=[160])
    for epoch in range(3):
        seen = Counter(int(i) for step in range(5) for g in plan.groups(epoch * 5 + step) for i in g.rows)
        assert seen == Counter(range(160))


def test_without_bucketing_groups_come_as_the_epoch_is_shuffled() -> None:
    lengths = token_lengths([160])
    for settings in ({}, {"batch_tokens": 640}):
        plan = Schedule(mixture(bucketing=False, **settings), ["a"], lengths, seed=4)
        rows = np.concatenate([group.rows for step in range(60) for group in plan.groups(step)])
        for epoch in range(2):
            rng = np.random.Generator(np.random.Philox(key=derive(4, "order", "a", epoch)))
            assert np.array_equal(rows[160 * epoch : 160 * (epoch + 1)], rng.permutation(160))


@pytest.mark.parametrize("bucketing", [True, False])
@pytest.mark.parametrize("tokens", [20, 64, 400, 3000])
def test_a_token_budget_is_kept_and_no_example_lost(tokens: int, bucketing: bool) -> None:
    sizes = [500, 40, 7]
    lengths = token_lengths(sizes)
    config = mixture(batch_tokens=4 * tokens, bucketing=bucketing, sampling="uniform")
    plan = Schedule(config, NAMES[:3], lengths, seed=1)
    epoch_of(plan, sizes, steps=1200)
    several = 0
    for step in range(1200):
        for task, rows in flat(plan, step):
            assert len(rows) == 1 or len(rows) * max(lengths[task][rows]) <= tokens
            several += len(rows) > 1
    assert several or tokens == 20


@pytest.mark.parametrize("bucketing", [True, False])
def test_groups_hold_as_many_examples_as_fit(bucketing: bool) -> None:
    """Not even the first example of the group that was cut next would have."""
    lengths = token_lengths([4000])
    plan = Schedule(mixture(batch_tokens=4 * 500, bucketing=bucketing), ["a"], lengths, seed=2)
    cut = plan._cut_epoch(0, 0)
    groups = [cut.rows[a:b] for a, b in pairwise(cut.bounds)]
    for group, following in pairwise(groups):
        both = np.append(group, following[0])
        assert len(both) * lengths[0][both].max() > 500
    assert sorted(cut.order) == list(range(len(groups)))


def test_bucketing_saves_padding_under_a_token_budget() -> None:
    lengths = np.random.default_rng(0).lognormal(3, 0.8, size=6000).astype(int) + 2
    padding = {}
    for bucketing in (True, False):
        plan = Schedule(mixture(batch_tokens=4 * 1024, bucketing=bucketing), ["a"], [lengths], seed=0)
        rows = [group.rows for step in range(40) for group in plan.groups(step)]
        padding[bucketing] = 1 - sum(lengths[r].sum() for r in rows) / sum(lengths[r].max() * len(r) for r in rows)
    assert padding[True] < 0.07 < 0.5 < padding[False], padding


def test_an_example_longer_than_the_budget_stands_alone() -> None:
    lengths = np.array([5, 200, 5, 5, 300, 5])
    plan = Schedule(mixture(batch_tokens=40), ["a"], [lengths], seed=0)
    groups = [sorted(rows) for step in range(8) for _, rows in flat(plan, step)]
    assert [1] in groups and [4] in groups
    assert all(rows in ([1], [4]) or not {1, 4} & set(rows) for rows in groups)


def test_a_single_task_trial_cuts_the_same_token_groups_as_the_mixture() -> None:
    mixed = schedule(sampling="uniform", batch_tokens=800)
    alone = Schedule(mixture(batch_tokens=800), ["c"], [token_lengths(SIZES)[2]], seed=0)
    rows_mixed = [rows for step in range(150) for task, rows in flat(mixed, step) if task == 2]
    rows_alone = [rows for step in range(30) for _, rows in flat(alone, step)]
    assert len(rows_mixed) > 110 and rows_mixed[:110] == rows_alone[:110]


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


def adaptive(every: int = 10, segments: int = 1, **settings: Any) -> Schedule:
    """A schedule whose shares swing from segment to segment."""
    plan = schedule(sampling="adaptive", adapt_every=every, **settings)
    rng = np.random.default_rng(5)
    for _ in range(segments - 1):
        plan.extend(rng.dirichlet(np.full(len(plan.names), 2.0)).tolist())
    return plan


@pytest.mark.parametrize("settings", [{}, {"batch_tokens": 600}], ids=["examples", "tokens"])
def test_adaptive_groups_depend_on_the_recorded_segments_and_the_step_only(settings: dict[str, Any]) -> None:
    whole, grown = adaptive(segments=6, **settings), adaptive(**settings)
    expected = [flat(whole, step) for step in range(60)]
    for number, shares in enumerate(whole.segments):
        if number:
            grown.extend(shares)
        assert [flat(grown, step) for step in range(10 * number, 10 * number + 10)] == expected[10 * number : 10 * number + 10]
    resumed = adaptive(**settings)
    resumed.load(json.loads(json.dumps(whole.segments)))
    for step in np.random.default_rng(1).permutation(60).tolist():
        assert flat(resumed, step) == flat(grown, step) == expected[step]
    assert not np.array_equal(whole.drawn(60), 5 * whole.drawn(12))


def test_adaptive_shares_hold_in_each_segment() -> None:
    plan = adaptive(every=50, segments=8)
    for number, shares in enumerate(plan.segments):
        drawn = plan.drawn(50 * number + 50) - plan.drawn(50 * number)
        assert drawn.sum() == 200
        assert np.all(np.abs(drawn - 200 * np.array(shares)) <= len(SIZES) + 1)


def test_every_task_goes_on_in_its_epoch_across_segments() -> None:
    sizes = [160, 80, 24]
    plan = adaptive(every=3, segments=60, names=["a", "b", "c"], sizes=sizes)
    epoch_of(plan, sizes, steps=180)
    alone = Schedule(mixture(), ["a"], [token_lengths(sizes)[0]], seed=0)
    in_mixture = [rows for step in range(180) for task, rows in flat(plan, step) if task == 0]
    assert in_mixture[:80] == [rows for step in range(20) for _, rows in flat(alone, step)]


def test_a_task_that_a_segment_is_too_short_for_is_still_drawn_by_its_share() -> None:
    plan = schedule(sampling="adaptive", adapt_every=2, names=["a", "b"], sizes=[50, 50])
    for _ in range(999):
        plan.extend([0.97, 0.03])
    assert plan.drawn(2000)[1] == pytest.approx(0.03 * 8000, rel=0.15)


def test_steps_beyond_the_known_segments_are_refused() -> None:
    plan = adaptive(every=10, segments=2)
    plan.groups(19)
    for ask in (plan.groups, lambda step: plan.drawn(step + 1)):
        with pytest.raises(RuntimeError, match="step 20 is in segment 2, but the shares of 2 segments"):
            ask(20)
    assert plan.drawn(20).sum() == 80


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.2] * 4 + [0.3], [0.5, 0.5, 0.1, -0.1, 0.0], [math.nan] * 5])
def test_wrong_shares_are_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="5 positive numbers that sum to 1"):
        adaptive().extend(shares)


def test_fixed_shares_cannot_change() -> None:
    with pytest.raises(ValueError, match="sampling: adaptive only, got sampling='temperature'"):
        schedule().extend([0.2] * 5)


def test_online_mixing_at_every_step_is_the_algorithm_of_the_paper() -> None:
    """Written out once more, turn by turn, with plain numbers."""
    tasks, mixing = 4, OnlineMixing(4, adapt_every=1)
    rewards, shares = [0.0] * tasks, [1 / tasks] * tasks
    rng = np.random.default_rng(0)
    assert mixing.shares.tolist() == shares
    for turn in range(1, 60):
        losses = [float(x) if rng.random() < 0.7 else None for x in rng.lognormal(0, 0.5, size=tasks)]
        for i, loss in enumerate(losses):
            if loss is not None:
                rewards[i] = SMOOTHING * rewards[i] + (1 - SMOOTHING) * loss / shares[i]
        now, before = (min(1 / tasks, math.sqrt(math.log(tasks) / (tasks * t))) for t in (turn + 1, turn))
        total = sum(math.exp(before * r) for r in rewards)
        shares = [(1 - tasks * now) * math.exp(before * r) / total + now for r in rewards]
        assert mixing.observe(losses) == pytest.approx(shares)


def test_a_segment_counts_as_its_steps() -> None:
    """One update of a segment of n steps is what n steps with the same loss and share do to the reward."""
    losses: list[float | None] = [0.7, 2.0, None]
    segment = OnlineMixing(3, adapt_every=25)
    segment.observe(losses)
    rewards = np.zeros(3)
    for _ in range(25):
        rewards[:2] = SMOOTHING * rewards[:2] + (1 - SMOOTHING) * np.array([0.7, 2.0]) * 3
    assert segment.rewards == pytest.approx(rewards)


@pytest.mark.parametrize("tasks", [1, 2, 3, 12])
@pytest.mark.parametrize("every", [1, 20])
def test_online_mixing_gives_the_higher_loss_more_and_every_task_a_floor(tasks: int, every: int) -> None:
    mixing = OnlineMixing(tasks, every)
    losses = np.linspace(0.2, 3.0, tasks).tolist()
    for update in range(1, 80):
        shares = mixing.observe(losses)
        step = update * every + 1
        floor = min(1 / tasks, math.sqrt(math.log(tasks) / (tasks * step)))
        assert sum(shares) == pytest.approx(1.0) and min(shares) >= floor * (1 - 1e-12)
        if step > 1 + tasks * math.log(tasks):  # before, exploration takes all
            assert all(a < b for a, b in pairwise(shares))


def test_a_huge_loss_leaves_the_others_their_floor() -> None:
    mixing = OnlineMixing(3, adapt_every=100)
    shares = mixing.observe([1e6, 1.0, 1.0])
    floor = math.sqrt(math.log(3) / (3 * 101))
    assert shares == pytest.approx([1 - 2 * floor, floor, floor])


def test_online_mixing_goes_on_from_its_state_to_the_bit() -> None:
    one, other = OnlineMixing(3, 7), OnlineMixing(3, 7)
    for i in range(5):
        one.observe([1.0 / (i + 1), 0.3, None])
    other.load(json.loads(json.dumps(one.state())))
    for i in range(5):
        losses = [0.1 * i, 0.5, 1.0 / (i + 3)]
        assert one.observe(losses) == other.observe(losses)
    assert one.state() == other.state()


def test_online_mixing_refuses_losses_that_are_not_numbers() -> None:
    mixing = OnlineMixing(2, 5)
    before = mixing.state()
    with pytest.raises(ValueError, match=r"losses\[1\] must be finite, got nan"):
        mixing.observe([1.0, math.nan])
    with pytest.raises(ValueError, match="zip"):
        mixing.observe([1.0])
    assert mixing.state() == before


def test_adaptive_sampling_end_to_end_follows_the_losses() -> None:
    """The losses are known numbers; a trial that stops after any segment and goes on from its record ends the same."""
    level = np.array([0.2, 0.5, 1.0, 2.0, 4.0])

    def train(plan: Schedule, mixing: OnlineMixing, start: int, stop: int) -> None:
        for step in range(start, stop):
            if step and step % 10 == 0:
                drawn = plan.drawn(step) - plan.drawn(step - 10)
                plan.extend(mixing.observe([float(x) if n else None for x, n in zip(level, drawn, strict=True)]))
            plan.groups(step)

    whole, bandit = adaptive(), OnlineMixing(5, 10)
    train(whole, bandit, 0, 200)
    assert np.all(np.diff(whole.drawn(200)) > 0)
    for stop in (1, 10, 11, 95):
        before, state = adaptive(), OnlineMixing(5, 10)
        train(before, state, 0, stop)
        after, resumed = adaptive(), OnlineMixing(5, 10)
        after.load(before.segments)
        resumed.load(state.state())
        train(after, resumed, stop, 200)
        assert after.segments == whole.segments and resumed.state() == bandit.state()
        assert all(flat(after, step) == flat(whole, step) for step in range(stop, 200))
