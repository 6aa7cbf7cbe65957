import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from standins import Planned, Task

from lightning_modules.config import MixtureConfig, TaskMoEConfig, TrialConfig
from pipelines.store import TrialResult
from pipelines.transfer import COLUMNS, Comparison, Row, compare, long_table, metric_range, to_rows, write_csv, write_scores

TASKS = {"a": Task("near", "accuracy"), "b": Task("near", "accuracy"), "c": Task("far", "pearson")}


class Sweep:
    """A fake sweep: every multi-task trial is compared with one model per task and seed."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self.tasks = tasks
        self.trials: list[Planned] = []
        self.results: dict[str, TrialResult] = {}

    def alone(self, seed: int, **scores: float | None) -> None:
        for task, score in scores.items():
            trial = Planned(f"alone-{task}-{seed}", "single_task", f"single_task {task}", seed, _config((task,)), task=task)
            self.add(trial, {task: score})

    def together(
        self, configuration: str, seed: int, scores: Mapping[str, float | None] | None, role: str = "candidate", **others: str
    ) -> str:
        single = {task: f"alone-{task}-{seed}" for task in self.tasks} if role == "candidate" else {}
        trial_id = f"{configuration}-{seed}"
        baselines = ({"single_task": single} if single else {}) | others
        self.add(Planned(trial_id, role, configuration, seed, _config(tuple(self.tasks)), baselines=baselines), scores)
        return trial_id

    def add(self, trial: Planned, scores: Mapping[str, float | None] | None) -> None:
        self.trials.append(trial)
        if scores is not None:
            self.results[trial.trial_id] = result(trial.trial_id, scores, self.tasks)

    def compare(self, **options: Any) -> Comparison:
        return compare(self.trials, self.results, self.tasks, **options)


def _config(tasks: tuple[str, ...]) -> TrialConfig:
    return TrialConfig(mixture=MixtureConfig(tasks=tasks), model=TaskMoEConfig())


def result(trial_id: str, scores: Mapping[str, float | None], tasks: Mapping[str, Task]) -> TrialResult:
    metrics = {task: {tasks[task].metric: value, "other": 0.123} for task, value in scores.items()}
    undefined = {f"test/{t}/{tasks[t].metric}": "constant predictions" for t, value in scores.items() if value is None}
    return TrialResult(
        trial_id=trial_id, status="finished", scores={"test": metrics, "dev": metrics}, undefined=undefined, steps=10,
        primary={task: tasks[task].metric for task in scores}, seconds=1.0, started_ms=1, finished_ms=2,
        floors={"test": {task: {tasks[task].metric: 0.25} for task in scores}},
    )  # fmt: skip


@pytest.fixture
def sweep() -> Sweep:
    """Three seeds. Gains: a +.1 +.1 +.1; b -.2 -.1 0; c -.1 -.12 -.11."""
    made = Sweep(TASKS)
    for seed, b, c in ((0, 0.3, 0.4), (1, 0.4, 0.38), (2, 0.5, 0.39)):
        made.alone(seed, a=0.5, b=0.5, c=0.5)
        made.together("moe", seed, {"a": 0.6, "b": b, "c": c})
    return made


def test_gains_by_hand(sweep: Sweep) -> None:
    comparison = sweep.compare()
    a, b, c = (comparison.cells["moe", task] for task in "abc")
    assert [cell.gain.verdict for cell in (a, b, c)] == ["helped", "unclear", "hurt"]
    assert a.gain.interval is not None and a.gain.interval.mean == pytest.approx(0.1)
    assert b.gain.interval is not None and b.gain.interval.mean == pytest.approx(-0.1)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert b.gain.interval.high == pytest.approx(-0.1 + half)
    assert c.gain_rel.interval is not None and c.gain_rel.interval.mean == pytest.approx(-0.22)


def test_summary_by_hand(sweep: Sweep) -> None:
    (summary,) = sweep.compare().summaries
    means = [(0.1 - 0.2 - 0.1) / 3, (0.1 - 0.1 - 0.12) / 3, (0.1 - 0.11) / 3]
    assert summary.mean_gain.interval is not None and summary.delta_m.interval is not None
    assert summary.mean_gain.interval.mean == pytest.approx(sum(means) / 3)
    assert summary.mean_gain.interval.n == 3
    assert summary.delta_m.interval.mean == pytest.approx(2 * sum(means) / 3)
    assert (summary.helped, summary.hurt, summary.below, summary.pending) == (("a",), ("c",), ("b", "c"), ())
    assert summary.worst == ("c", pytest.approx(-0.11))
    near, far = summary.categories["near"].interval, summary.categories["far"].interval
    assert near is not None and far is not None
    assert near.mean == pytest.approx(0.0)
    assert far.mean == pytest.approx(-0.11)


def test_one_trials_gains(sweep: Sweep) -> None:
    comparison = sweep.compare()
    moe = next(trial for trial in sweep.trials if trial.trial_id == "moe-1")
    assert comparison.gains(moe) == pytest.approx(
        {
            "gain_abs/a": 0.1, "gain_abs/b": -0.1, "gain_abs/c": -0.12,
            "gain_rel/a": 0.2, "gain_rel/b": -0.2, "gain_rel/c": -0.24,
            "delta_m": -0.08, "worst_gain": -0.12, "neg_count": 2.0,
        }
    )  # fmt: skip
    assert comparison.gains(sweep.trials[0]) == {}


def test_seeds_are_paired() -> None:
    """Scores vary by 0.3 between seeds, the gain does not."""
    made = Sweep({"a": TASKS["a"]})
    for seed, level in enumerate((0.2, 0.5, 0.35)):
        made.alone(seed, a=level)
        made.together("dense", seed, {"a": level + 0.01 + 0.0001 * seed})
    assert made.compare().cells["dense", "a"].gain.verdict == "helped"


def test_missing_baseline_is_pending_with_its_reason(sweep: Sweep) -> None:
    for seed in range(3):
        del sweep.results[f"alone-b-{seed}"]
    comparison = sweep.compare(failures={"alone-b-0": "out of memory"})
    (summary,) = comparison.summaries
    cell = comparison.cells["moe", "b"]
    assert (cell.gain.verdict, cell.gain.interval) == ("pending", None)
    assert "seed 0: the single-task baseline of b failed: out of memory" in cell.gain.reason
    assert "seed 1: the single-task baseline of b has not finished" in cell.gain.reason
    assert len(cell.scores) == 3
    assert (summary.mean_gain.verdict, summary.delta_m.verdict, summary.pending) == ("pending", "pending", ("b",))
    assert summary.categories["far"].verdict == "hurt"
    assert {missing.trial_id: missing.reason for missing in comparison.missing} == {
        "alone-b-0": "failed: out of memory", "alone-b-1": "not finished", "alone-b-2": "not finished",
    }  # fmt: skip
    gains = comparison.gains(sweep.trials[3])
    assert set(gains) == {"gain_abs/a", "gain_rel/a", "gain_abs/c", "gain_rel/c"}
    assert not {"neg_count/moe", "worst_gain/moe", "mean_gain/moe"} & set(comparison.figures())


def test_failed_seed_is_named_and_the_rest_counts(sweep: Sweep) -> None:
    del sweep.results["moe-0"]
    comparison = sweep.compare(failures={"moe-0": "diverged"})
    interval = comparison.cells["moe", "a"].gain.interval
    assert interval is not None and interval.n == 2
    assert comparison.cells["moe", "a"].gain.reason == "seed 0: the trial failed: diverged (moe-0)"
    assert comparison.summaries[0].mean_gain.reason == "seed 0: the trial failed: diverged (moe-0)"


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_undefined_score_is_no_zero(value: float | None) -> None:
    made = Sweep(TASKS)
    made.alone(0, a=0.5, b=0.5, c=0.5)
    made.together("moe", 0, {"a": 0.6, "b": 0.5, "c": value})
    comparison = made.compare()
    assert comparison.cells["moe", "c"].gain.interval is None
    assert "c" in comparison.cells["moe", "c"].gain.reason
    assert comparison.summaries[0].mean_gain.verdict == "pending"
    if value is None:
        assert "constant predictions" in comparison.cells["moe", "c"].gain.reason


def test_one_seed_is_unclear() -> None:
    made = Sweep(TASKS)
    made.alone(0, a=0.5, b=0.5, c=0.5)
    made.together("moe", 0, {"a": 0.9, "b": 0.5, "c": 0.1})
    cell = made.compare().cells["moe", "a"]
    assert cell.gain.verdict == "unclear"
    assert cell.gain.reason == "one seed: no interval"
    assert cell.gain.interval is not None and cell.gain.interval.low is None


def test_lower_is_better_is_negated() -> None:
    tasks = {"r": Task("regression", "mse")}
    made = Sweep(tasks)
    for seed in range(3):
        made.alone(seed, r=2.0)
        made.together("dense", seed, {"r": 1.5 + 0.01 * seed})
    cell = made.compare().cells["dense", "r"]
    assert cell.scores[0] == -1.5
    assert cell.gain.verdict == "helped"
    assert cell.gain.interval is not None and cell.gain.interval.mean == pytest.approx(0.49)
    assert cell.gain_rel.interval is not None and cell.gain_rel.interval.mean == pytest.approx(0.245)


def test_relative_gain_floors_and_says_so() -> None:
    made = Sweep({"a": TASKS["a"], "c": TASKS["c"]})
    made.alone(0, a=0.001, c=0.0)
    made.together("dense", 0, {"a": 0.101, "c": 0.1})
    comparison = made.compare()
    for task, expected in (("a", 0.1 / 0.01), ("c", 0.1 / 0.02)):  # 1 % of a range of 1, and of [-1, 1]
        cell = comparison.cells["dense", task]
        assert cell.floored
        assert cell.gain_rel.interval is not None and cell.gain_rel.interval.mean == pytest.approx(expected)


def test_relative_gain_over_zero_without_bound_is_undefined() -> None:
    made = Sweep({"r": Task("regression", "mse")})
    made.alone(0, r=0.0)
    made.together("dense", 0, {"r": 1.0})
    cell = made.compare().cells["dense", "r"]
    assert cell.gain.interval is not None and cell.gain.interval.mean == -1.0
    assert cell.gain_rel.interval is None
    assert "has no bound" in cell.gain_rel.reason


def test_other_baselines_by_hand(sweep: Sweep) -> None:
    made = Sweep(TASKS)
    made.trials = [t for t in sweep.trials if t.role == "single_task"]
    made.results = dict(sweep.results)
    for seed in range(3):
        random = made.together("random", seed, {"a": 0.5, "b": 0.5, "c": 0.2 + 0.01 * seed}, role="random_routing")
        made.together("moe", seed, {"a": 0.6, "b": 0.5, "c": 0.3}, random_routing=random)
    random, moe = made.compare().summaries
    interval = moe.versus["random_routing"].interval
    assert interval is not None and interval.mean == pytest.approx((0.2 + 0.19 + 0.18) / 9)
    assert moe.versus["random_routing"].verdict == "helped"
    assert random.role == "random_routing"
    gain = random.categories["far"].interval
    assert gain is not None and gain.mean == pytest.approx(-0.29)  # held against its candidate's single-task baselines


def test_plan_without_single_task_baselines(sweep: Sweep) -> None:
    made = Sweep(TASKS)
    made.together("dense", 0, {"a": 0.6, "b": 0.5, "c": 0.3}, role="parameter_matched")
    cell = made.compare().cells["dense", "a"]
    assert cell.gain.verdict == "pending"
    assert "the plan has no single-task baseline for a" in cell.gain.reason


def test_configuration_that_trains_some_tasks_only(sweep: Sweep) -> None:
    for seed in range(3):
        sweep.add(
            Planned(f"pair-{seed}", "candidate", "pair", seed, _config(("a", "b")), baselines=sweep.trials[3].baselines),
            {"a": 0.5, "b": 0.5},
        )
    comparison = sweep.compare()
    assert ("pair", "c") not in comparison.cells
    assert comparison.summaries[1].pending == ()


def test_dev_split(sweep: Sweep) -> None:
    assert sweep.compare(split="dev").cells["moe", "a"].gain.verdict == "helped"


def test_different_metrics_are_not_compared() -> None:
    made = Sweep({"a": TASKS["a"]})
    made.alone(0, a=0.5)
    made.together("dense", 0, None)
    made.results["dense-0"] = result("dense-0", {"a": 0.6}, {"a": Task("near", "macro_f1")})
    assert "different metrics: macro_f1 and accuracy" in made.compare().cells["dense", "a"].gain.reason


def test_scores_are_written_as_a_long_table(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores.csv", [result("x-1", {"a": 0.5, "b": None}, {name: TASKS[name] for name in ("a", "b")})])
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert set(rows[0]) == {"trial_id", "task", "split", "metric", "step", "value"}
    assert {(row["task"], row["value"]) for row in rows if row["metric"] == "accuracy"} == {("a", "0.5"), ("b", "")}


def test_long_table_keeps_undefined_scores() -> None:
    rows = long_table([result("x-1", {"a": None}, TASKS)])
    assert Row("x-1", "a", "test", "accuracy", 10, None) in rows
    assert len(rows) == 4


@pytest.mark.parametrize(("metric", "width"), [("accuracy", 1.0), ("mcc", 2.0), ("macro_f1(without O)", 1.0), ("mse", None)])
def test_metric_range(metric: str, width: float | None) -> None:
    assert metric_range(metric) == width


def test_csv(sweep: Sweep, tmp_path: Path) -> None:
    del sweep.results["moe-2"]
    comparison = sweep.compare()
    write_csv(tmp_path / "comparison.csv", comparison)
    with (tmp_path / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [(row["row"], row["task"]) for row in rows] == [
        ("task", "a"), ("task", "b"), ("task", "c"), ("category", ""), ("category", ""), ("mean", ""), ("delta_m", ""),
        ("neg_count", ""), ("worst", "b"),
    ]  # fmt: skip
    assert ",".join(rows[1].values()) == (
        "moe,candidate,task,b,near,accuracy,2,0.35,0.07071067812,0.5,0.25,-0.15,-0.7853102368,0.4853102368,-0.3,unclear,"
        "seed 2: the trial has not finished (moe-2)"
    )


def test_rows_never_show_zero_for_what_is_missing(sweep: Sweep) -> None:
    sweep.results.clear()
    for row in to_rows(sweep.compare()):
        assert row["verdict"] in ("pending", "")
        assert all(row[name] is None for name in COLUMNS if name.startswith(("gain", "score", "baseline")))
