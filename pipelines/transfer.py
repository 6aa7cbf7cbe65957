"""Transfer and interference: how much each task gains or loses in a shared model, over one model per task.

Definitions (specs/interference.md B and C0). For task t, configuration c and seed s, m_t(c, s) is the task's score, higher is
better (scores where lower is better are negated). The baseline B is a model of that task alone which makes as many updates on
the task, from the same seed. The gain is g_t = m_t(c, s) - m_t(B, s). Nothing is dropped silently: what cannot be computed is
``pending``, with its reason, and a mean that needs it is too. numpy only.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from lightning_modules.config import TrialConfig
from pipelines.stats import Interval, sd, t_interval
from pipelines.store import TrialResult, write_text

Verdict = Literal["helped", "hurt", "unclear", "pending"]
SINGLE_TASK = "single_task"
"""The role of a baseline that trains one task alone."""
STAGE = "stage"
"""The role of a trial that is there for others to start from: it is compared with nothing."""

LOWER_IS_BETTER = frozenset({"mse"})
"""Metrics whose values are negated before they are compared."""

METRIC_RANGE = {"mcc": 2.0, "pearson": 2.0, "spearman": 2.0}
"""Width of a metric's range where it is not 1. A metric in :data:`LOWER_IS_BETTER` has no bound and so no floor."""

UNRELATED = "unrelated (control)"
"""Category of tasks with the role ``unrelated``: a group of their own, not part of the means over tasks."""

FLOOR = 0.01
"""Relative gains divide by at least this share of the metric's range."""


class Planned(Protocol):
    """What a comparison needs to know of a planned trial (``pipelines.plan.PlannedTrial``)."""

    @property
    def trial_id(self) -> str: ...  # noqa: D102
    @property
    def config(self) -> TrialConfig: ...  # noqa: D102
    @property
    def role(self) -> str:
        """``candidate`` or the kind of baseline it is."""
        ...

    @property
    def configuration(self) -> str:
        """Label that all seeds of a configuration share."""
        ...

    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def task(self) -> str | None:
        """The task of a ``single_task`` baseline."""
        ...

    @property
    def baselines(self) -> Mapping[str, Any]:
        """``{"single_task": {task: trial_id}, other kind: trial_id}``."""
        ...


class Task(Protocol):
    """What a comparison needs to know of a task (``lightning_modules.data.tasks.TaskSpec``)."""

    @property
    def category(self) -> str: ...  # noqa: D102
    @property
    def metric(self) -> str: ...  # noqa: D102


class Row(NamedTuple):
    """One score in the long table."""

    trial_id: str
    task: str
    split: str
    metric: str
    step: int
    value: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A difference to a baseline over seeds, or the reason why there is none."""

    interval: Interval | None
    """Over the seeds for which it could be computed; None when there is no such seed."""
    reason: str = ""
    """What is missing or special: failed or unfinished trials, undefined scores, one seed only."""

    @property
    def verdict(self) -> Verdict:
        """``helped`` or ``hurt`` when the interval lies above or below 0, ``unclear`` when it holds 0 or there is only one
        seed, ``pending`` without any value."""
        if self.interval is None:
            return "pending"
        if not self.interval.excludes_zero:
            return "unclear"
        return "helped" if self.interval.mean > 0 else "hurt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One task in one configuration."""

    configuration: str
    role: str
    task: str
    category: str
    metric: str
    """The primary metric, as the catalogue writes it; scores of a metric in :data:`LOWER_IS_BETTER` are negated here."""
    scores: Mapping[int, float]
    """seed -> score."""
    baseline: Mapping[int, float]
    """seed -> score of the single-task baseline."""
    floor: float | None
    """The score without looking at the input (majority class and the like); None where it is undefined."""
    gain: Estimate
    """g_t over seeds."""
    gain_rel: Estimate
    """g_t / max(\\|m_t(B)\\|, :data:`FLOOR` x range) over seeds."""
    floored: bool
    """Whether the floor was used for some seed: the relative gain then says little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One configuration over its tasks."""

    configuration: str
    role: str
    config: TrialConfig
    """Of one of its seeds."""
    seeds: tuple[int, ...]
    """Planned."""
    mean_gain: Estimate
    """Mean over tasks within a seed, then over seeds."""
    delta_m: Estimate
    """The same of the relative gains."""
    categories: Mapping[str, Estimate]
    """category -> mean gain over its tasks."""
    versus: Mapping[str, Estimate]
    """Baseline kind other than single_task -> difference of the mean score over tasks."""
    helped: tuple[str, ...]
    hurt: tuple[str, ...]
    """Tasks whose interval lies below 0: their number is ``neg_count``."""
    below: tuple[str, ...]
    """Tasks whose mean gain is below 0, whatever the interval."""
    pending: tuple[str, ...]
    worst: tuple[str, float] | None
    """Task with the lowest mean gain among those that have one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """A trial without a result."""

    trial_id: str
    role: str
    configuration: str
    task: str | None
    seed: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Everything a report says about a sweep."""

    split: str
    tasks: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    """(configuration, task) -> cell; absent where the configuration does not train the task."""
    summaries: tuple[Summary, ...]
    missing: tuple[Missing, ...] = ()
    trial_gains: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def gains(self, trial: Planned) -> Mapping[str, float]:
        """One trial's gains over its single-task baselines, for its MLflow run: ``gain_abs/{task}``, ``gain_rel/{task}`` and,
        when every task has one, ``delta_m``, ``worst_gain`` and ``neg_count`` (tasks whose gain is below 0; one trial has no
        interval). Empty for a single-task trial. What has no value yet is left out; a value, once there, stays.
        """
        return self.trial_gains.get(trial.trial_id, {})

    def figures(self) -> dict[str, float]:
        """Headline numbers for the sweep's MLflow run: ``mean_gain/{configuration}`` and the like, without what is pending."""
        found: dict[str, float] = {}
        for s in self.summaries:
            for name, estimate in (("mean_gain", s.mean_gain), ("delta_m", s.delta_m)):
                if estimate.interval is not None:
                    found[f"{name}/{s.configuration}"] = estimate.interval.mean
            if not s.pending:
                found[f"neg_count/{s.configuration}"] = float(len(s.hurt))
            if s.worst and not s.pending:
                found[f"worst_gain/{s.configuration}"] = s.worst[1]
        return found


def long_table(results: Iterable[TrialResult]) -> list[Row]:
    """Every final score of every trial, undefined ones included (``value`` None); values as the metric defines them."""
    return [
        Row(result.trial_id, task, split, metric, result.steps, value)
        for result in results
        for split, tasks in result.scores.items()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
    ]


def metric_range(metric: str) -> float | None:
    """Width of the values a metric can take; None when it has no bound."""
    name = metric.partition("(")[0]
    return None if name in LOWER_IS_BETTER else METRIC_RANGE.get(name, 1.0)


@dataclass(frozen=True, slots=True)
class _Value:
    """A number, or why there is none."""

    number: float | None
    reason: str = ""


class _Scores:
    """Scores of trials, higher is better, each with its reason when there is none."""

    def __init__(self, results: Mapping[str, TrialResult], split: str, failures: Mapping[str, str]) -> None:
        self.results = results
        self.split = split
        self.failures = failures

    def missing(self, trial_id: str) -> str:
        return f"failed: {self.failures[trial_id]}" if trial_id in self.failures else "has not finished"

    def get(self, trial_id: str, task: str, whose: str) -> _Value:
        result = self.results.get(trial_id)
        if result is None:
            return _Value(None, f"{whose} {self.missing(trial_id)} ({trial_id})")
        metric = result.primary.get(task)
        value = result.scores.get(self.split, {}).get(task, {}).get(metric) if metric else None
        if metric is None or value is None or value != value or abs(value) == float("inf"):
            why = result.undefined.get(f"{self.split}/{task}/{metric}", "the trial wrote no finite value")
            return _Value(None, f"{whose} has no {self.split} score for {task}: {why} ({trial_id})")
        return _Value(-value if metric.partition("(")[0] in LOWER_IS_BETTER else value)

    def floor(self, trial_ids: Iterable[str], task: str, metric: str) -> float | None:
        """The trivial answer's score as the first of the trials that has finished wrote it."""
        results = [self.results[i] for i in trial_ids if i in self.results]
        value = results[0].floors.get(self.split, {}).get(task, {}).get(metric) if results else None
        return -value if value is not None and metric.partition("(")[0] in LOWER_IS_BETTER else value

    def mean(self, trial_id: str, tasks: Sequence[str], whose: str) -> _Value:
        values = [self.get(trial_id, task, whose) for task in tasks]
        return _mean(values)


def _mean(values: Sequence[_Value]) -> _Value:
    """Mean of numbers; without a single one of them there is none, for the first reason given."""
    reasons = list(dict.fromkeys(value.reason for value in values if value.number is None))
    if reasons or not values:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        return _Value(None, (reasons[0] if reasons else "no task") + more)
    return _Value(sum(value.number or 0.0 for value in values) / len(values))


def _minus(a: _Value, b: _Value) -> _Value:
    if a.number is None or b.number is None:
        return _Value(None, a.reason or b.reason)
    return _Value(a.number - b.number)


def _relative(gain: _Value, baseline: _Value, metric: str) -> tuple[_Value, bool]:
    """Relative gain and whether its denominator was floored."""
    if gain.number is None or baseline.number is None:
        return gain, False
    span = metric_range(metric)
    floor = FLOOR * span if span is not None else 0.0
    if abs(baseline.number) < floor:
        return _Value(gain.number / floor), True
    if baseline.number == 0:
        return _Value(None, f"the baseline's {metric} is 0 and has no bound, so there is no relative gain"), False
    return _Value(gain.number / abs(baseline.number)), False


def _over_seeds(values: Mapping[int, _Value], note: str = "") -> Estimate:
    """Student's interval over the seeds that have a value; the reason names those that have none."""
    numbers = [value.number for value in values.values() if value.number is not None]
    reasons = [f"seed {seed}: {value.reason}" for seed, value in values.items() if value.number is None]
    if len(numbers) == 1:
        reasons.insert(0, "one seed: no interval")
    return Estimate(interval=t_interval(numbers) if numbers else None, reason="; ".join(filter(None, [note, *reasons])))


@dataclass(frozen=True, slots=True)
class _Gain:
    """One task of one trial against its baseline."""

    score: _Value
    baseline: _Value
    absolute: _Value
    relative: _Value
    floored: bool
    metric: str


def _gain(trial: Planned, single: Mapping[str, str], task: str, metric: str, scores: _Scores) -> _Gain:
    score = scores.get(trial.trial_id, task, "the trial")
    held_out = task in trial.config.mixture.held_out
    why = f"{task} is held out: no gain" if held_out else f"the plan has no single-task baseline for {task}"
    baseline = _Value(None, why)
    if task in single:
        baseline = scores.get(single[task], task, f"the single-task baseline of {task}")
    known = [scores.results[i].primary.get(task) for i in (trial.trial_id, single.get(task, "")) if i in scores.results]
    metric = next((name for name in known if name), metric)
    if len({name for name in known if name}) > 1:
        baseline = _Value(None, f"trial and baseline are scored by different metrics: {known[0]} and {known[1]}")
    absolute = _minus(score, baseline)
    relative, floored = _relative(absolute, baseline, metric)
    return _Gain(score, baseline, absolute, relative, floored, metric)


def _counted(trial: Planned, tasks: Iterable[str]) -> list[str]:
    """The tasks that means and counts over tasks are made of: neither held out nor unrelated."""
    mixture = trial.config.mixture
    return [task for task in tasks if task not in mixture.held_out and task not in mixture.unrelated]


def _trial_gains(each: Mapping[str, _Gain], counted: Sequence[str]) -> dict[str, float]:
    """One trial's gains by metric name; the three over all counted tasks only when every one of them has a gain."""
    found = {f"gain_abs/{task}": gain.absolute.number for task, gain in each.items()}
    found |= {f"gain_rel/{task}": gain.relative.number for task, gain in each.items()}
    absolute = [n for task in counted if (n := each[task].absolute.number) is not None]
    found["delta_m"] = _mean([each[task].relative for task in counted]).number
    if absolute and len(absolute) == len(counted):
        found["worst_gain"] = min(absolute)
        found["neg_count"] = float(sum(gain < 0 for gain in absolute))
    return {name: value for name, value in found.items() if value is not None}


def compare(
    trials: Iterable[Planned],
    results: Mapping[str, TrialResult],
    tasks: Mapping[str, Task],
    *,
    failures: Mapping[str, str] | None = None,
    split: str = "test",
) -> Comparison:
    """Gains of every configuration over one model per task, paired by seed.

    Baselines that train several tasks (random routing...) are configurations too: without single-task baselines of their own
    they are held against those of the candidate that names them.

    Args:
        trials: the plan, baselines included.
        results: trial id -> result of the trials that have finished.
        tasks: name -> category and metric, in the order in which tasks are shown.
        failures: trial id -> why it failed.
        split: ``test`` or ``dev``.
    """
    trials = list(trials)
    scores = _Scores(results, split, failures or {})
    single = _single_task_baselines(trials)
    groups: dict[str, list[Planned]] = {}
    for trial in trials:
        if trial.role not in (SINGLE_TASK, STAGE):
            groups.setdefault(trial.configuration, []).append(trial)
    cells: dict[tuple[str, str], Cell] = {}
    summaries = []
    each_trial: dict[str, dict[str, float]] = {}
    for configuration, members in groups.items():
        members = sorted(members, key=lambda trial: trial.seed)
        table = {t.seed: _gains_of(t, single.get(t.trial_id, {}), tasks, scores) for t in members}
        own = {
            task: _cell(members, task, tasks, {s: row[task] for s, row in table.items()}, scores)
            for task in table[members[0].seed]
        }
        cells |= {(configuration, task): cell for task, cell in own.items()}
        summaries.append(_summarise(members, own, table, scores))
        each_trial |= {t.trial_id: _trial_gains(table[t.seed], _counted(t, table[t.seed])) for t in members}
    shown = [task for task in tasks if any(task == name for _, name in cells)]
    missing = tuple(
        Missing(
            trial_id=t.trial_id,
            role=t.role,
            configuration=t.configuration,
            task=t.task,
            seed=t.seed,
            reason=scores.missing(t.trial_id).removeprefix("has "),
        )
        for t in trials
        if t.trial_id not in results
    )
    return Comparison(
        split=split, tasks=tuple(shown), cells=cells, summaries=tuple(summaries), missing=missing, trial_gains=each_trial
    )


def _single_task_baselines(trials: Sequence[Planned]) -> dict[str, Mapping[str, str]]:
    """trial id -> task -> trial id of its single-task baseline; :func:`compare` says what baselines themselves get."""
    found: dict[str, Mapping[str, str]] = {}
    for trial in trials:
        own = trial.baselines.get(SINGLE_TASK, {})
        if own:
            found[trial.trial_id] = own
            for kind, other in trial.baselines.items():
                if kind != SINGLE_TASK:
                    found.setdefault(other, own)
    return found


def _gains_of(trial: Planned, single: Mapping[str, str], tasks: Mapping[str, Task], scores: _Scores) -> dict[str, _Gain]:
    names = [name for name in tasks if name in trial.config.mixture.tasks]
    return {name: _gain(trial, single, name, tasks[name].metric, scores) for name in names}


def _cell(
    members: Sequence[Planned], task: str, tasks: Mapping[str, Task], seeds: Mapping[int, _Gain], scores: _Scores
) -> Cell:
    trial = members[0]
    floored = any(gain.floored for gain in seeds.values())
    note = f"|baseline| is below {FLOOR:.0%} of the metric's range, which divides instead" if floored else ""
    mixture, metric = trial.config.mixture, next(gain.metric for gain in seeds.values())
    role = "held out" if task in mixture.held_out else UNRELATED if task in mixture.unrelated else None
    return Cell(
        configuration=trial.configuration,
        role=trial.role,
        task=task,
        category=role or tasks[task].category,
        metric=metric,
        scores={seed: gain.score.number for seed, gain in seeds.items() if gain.score.number is not None},
        baseline={seed: gain.baseline.number for seed, gain in seeds.items() if gain.baseline.number is not None},
        floor=scores.floor([member.trial_id for member in members], task, metric),
        gain=_over_seeds({seed: gain.absolute for seed, gain in seeds.items()}),
        gain_rel=_over_seeds({seed: gain.relative for seed, gain in seeds.items()}, note),
        floored=floored,
    )


def _summarise(
    members: Sequence[Planned], cells: Mapping[str, Cell], table: Mapping[int, Mapping[str, _Gain]], scores: _Scores
) -> Summary:
    counted = _counted(members[0], cells)
    means = {task: interval.mean for task in counted if (interval := cells[task].gain.interval) is not None}
    by_category: dict[str, list[str]] = {}
    for task, cell in cells.items():
        if task not in members[0].config.mixture.held_out:
            by_category.setdefault(cell.category, []).append(task)
    worst = min(means, key=means.__getitem__, default=None)

    def verdict(name: Verdict) -> tuple[str, ...]:
        return tuple(task for task in counted if cells[task].gain.verdict == name)

    return Summary(
        configuration=members[0].configuration,
        role=members[0].role,
        config=members[0].config,
        seeds=tuple(trial.seed for trial in members),
        mean_gain=_over_seeds({seed: _mean([row[t].absolute for t in counted]) for seed, row in table.items()}),
        delta_m=_over_seeds({seed: _mean([row[t].relative for t in counted]) for seed, row in table.items()}),
        categories={
            name: _over_seeds({seed: _mean([row[task].absolute for task in group]) for seed, row in table.items()})
            for name, group in by_category.items()
        },
        versus=_versus(members, counted, scores),
        helped=verdict("helped"),
        hurt=verdict("hurt"),
        below=tuple(task for task, mean in means.items() if mean < 0),
        pending=verdict("pending"),
        worst=(worst, means[worst]) if worst is not None else None,
    )


def _versus(members: Sequence[Planned], tasks: Sequence[str], scores: _Scores) -> dict[str, Estimate]:
    kinds = dict.fromkeys(kind for trial in members for kind in trial.baselines if kind != SINGLE_TASK)
    found = {}
    for kind in kinds:
        seeds = {}
        for trial in members:
            other = trial.baselines.get(kind)
            theirs = (
                scores.mean(other, tasks, f"the {kind} baseline") if other else _Value(None, f"the plan has no {kind} baseline")
            )
            seeds[trial.seed] = _minus(scores.mean(trial.trial_id, tasks, "the trial"), theirs)
        found[kind] = _over_seeds(seeds)
    return found


COLUMNS: tuple[str, ...] = (
    "configuration", "role", "row", "task", "category", "metric", "n_seeds", "score_mean", "score_sd", "baseline_mean", "floor",
    "gain_mean", "gain_low", "gain_high", "gain_rel_mean", "verdict", "reason",
)  # fmt: skip
"""Columns of ``comparison.csv``. ``row`` says what a line is about: ``task``; ``category``, ``mean`` (over all tasks),
``delta_m`` (mean relative gain); ``versus <baseline>`` (difference of mean scores); ``neg_count`` and ``worst`` (one value, in
``gain_mean``). Scores where lower is better are negated. An empty field is a value that does not exist; ``reason`` says why."""


def to_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The comparison as flat rows with the keys :data:`COLUMNS`; None where there is no value."""
    rows: list[dict[str, Any]] = []
    for summary in comparison.summaries:
        head = {"configuration": summary.configuration, "role": summary.role}
        own = [
            comparison.cells[key] for key in ((summary.configuration, t) for t in comparison.tasks) if key in comparison.cells
        ]
        rows += [_row(head, "task", cell.gain, **_cell_fields(cell)) for cell in own]
        rows += [_row(head, "category", e, category=name) for name, e in summary.categories.items()]
        rows += [_row(head, "mean", summary.mean_gain), _row(head, "delta_m", summary.delta_m)]
        rows += [_row(head, f"versus {kind}", e) for kind, e in summary.versus.items()]
        waiting = f"pending: {', '.join(summary.pending)}" if summary.pending else ""
        nothing = Estimate(interval=None, reason=waiting)
        rows.append(_row(head, "neg_count", nothing, gain_mean=None if summary.pending else len(summary.hurt), verdict=""))
        task, gain = summary.worst or (None, None)
        rows.append(_row(head, "worst", nothing, task=task, gain_mean=gain, verdict=""))
    return rows


def _cell_fields(cell: Cell) -> dict[str, Any]:
    scores, baseline = list(cell.scores.values()), list(cell.baseline.values())
    relative = cell.gain_rel.interval
    return {
        "task": cell.task,
        "category": cell.category,
        "metric": cell.metric,
        "score_mean": sum(scores) / len(scores) if scores else None,
        "score_sd": sd(scores) if scores else None,
        "baseline_mean": sum(baseline) / len(baseline) if baseline else None,
        "floor": cell.floor,
        "gain_rel_mean": relative.mean if relative else None,
        "reason": "; ".join(filter(None, [cell.gain.reason, "relative gain floored" if cell.floored else ""])),
    }


def _row(head: Mapping[str, str], kind: str, estimate: Estimate, **values: Any) -> dict[str, Any]:
    interval = estimate.interval
    row: dict[str, Any] = (
        dict.fromkeys(COLUMNS) | dict(head) | {"row": kind, "verdict": estimate.verdict, "reason": estimate.reason}
    )
    if interval is not None:
        row |= {"n_seeds": interval.n, "gain_mean": interval.mean, "gain_low": interval.low, "gain_high": interval.high}
    return row | values


def write_csv(path: Path, comparison: Comparison) -> None:
    """Write ``comparison.csv`` (:data:`COLUMNS`), atomically; numbers with 10 significant digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in to_rows(comparison):
        writer.writerow({key: format(value, ".10g") if isinstance(value, float) else value for key, value in row.items()})
    write_text(path, text.getvalue())


def write_scores(path: Path, results: Iterable[TrialResult]) -> None:
    """Write ``scores.csv``, the long table: every score of every finished trial, empty where it is undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(long_table(results))
    write_text(path, text.getvalue())
