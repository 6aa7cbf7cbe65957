import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.config import MixtureConfig, TrialConfig
from pipelines.store import TrialFolder, TrialResult
from pipelines.tracking import METRICS, Tracker, TrackingError, default_uri, metric_name, params_of

START = 1_700_000_000_000
TASKS = ("qa/yes (no)", "plain")


@dataclass(frozen=True)
class Planned:
    seed: int
    role: str = "candidate"
    configuration: str = "dense"
    task: str | None = None
    baselines: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> TrialConfig:
        return TrialConfig(mixture=MixtureConfig(tasks=TASKS), seed=self.seed, digests={name: "0" * 16 for name in TASKS})

    @property
    def trial_id(self) -> str:
        return self.config.trial_id


TRIALS = [Planned(0), Planned(1)]


def rows(first: int, last: int, clock: int = START) -> list[dict[str, Any]]:
    """One row per step; every fifth step has a second row with scores."""
    found = []
    for step in range(first, last + 1):
        found.append({"t": clock + step, "step": step, "values": {"train/loss": 1 / step, f"train/loss/{TASKS[0]}": 0.5}})
        if step % 5 == 0:
            found.append({"t": clock + step, "step": step, "values": {f"score/dev/{TASKS[1]}/accuracy": step / 100}})
    return found


def finished(trial: Planned, **changes: Any) -> TrialResult:
    scores = {"test": {TASKS[0]: {"macro_f1(without No)": 0.25}, TASKS[1]: {"accuracy": 0.75, "pearson": None}}}
    scores["dev"] = {TASKS[1]: {"accuracy": 0.2}}
    result = TrialResult(
        trial_id=trial.trial_id, status="finished", scores=scores, undefined={"test/plain/pearson": "constant"}, steps=20,
        seconds=36.0, started_ms=START, finished_ms=START + 1000, sweep="s", params={"total": 10, "active": 5}, git_sha="abc",
        measurements={"route/0/nmi": 0.5},
    )  # fmt: skip
    return replace(result, **changes)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with tables: making one costs seconds, copying one nothing."""
    storage = tmp_path_factory.mktemp("store") / "runs"
    Tracker(f"sqlite:///{storage.parent / 'mlflow.db'}", storage, "other").start([])
    return storage.parent / "mlflow.db"


@pytest.fixture
def storage(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for suffix in ("", "-wal", "-shm"):
        if Path(f"{empty_store}{suffix}").exists():
            shutil.copy(f"{empty_store}{suffix}", tmp_path / f"mlflow.db{suffix}")
    return tmp_path / "runs"


@pytest.fixture
def launch(storage: Path) -> Iterator[Callable[..., Tracker]]:
    """A started tracker of the sweep ``s``: what a launch of the command makes."""
    made: list[Tracker] = []

    def start(name: str = "s") -> Tracker:
        tracker = Tracker(None, storage, name, "Who helps whom?")
        tracker.start(TRIALS)
        made.append(tracker)
        return tracker

    yield start


def runs_of(storage: Path, name: str = "s") -> dict[str, Any]:
    """Active runs of a sweep by trial id, the parent as ``parent``; fails on a second run for one of them."""
    import mlflow

    client = mlflow.MlflowClient(default_uri(storage))
    found: dict[str, Any] = {}
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    for run in client.search_runs([experiment.experiment_id]):
        key = run.data.tags.get("trial_id", "parent")
        assert key not in found, f"two runs for {key}"
        found[key] = run
    return found


def points_of(storage: Path, run: Any) -> dict[str, list[tuple[int, int, float]]]:
    """Metric -> every stored (step, unix ms, value), in order."""
    import mlflow

    client = mlflow.MlflowClient(default_uri(storage))
    history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {key: sorted((p.step, p.timestamp, p.value) for p in points) for key, points in history.items()}


def assert_one_point_per_step(points: Mapping[str, list[tuple[int, int, float]]]) -> None:
    for key, values in points.items():
        steps = [step for step, _, _ in values]
        assert len(steps) == len(set(steps)), f"{key} has several points at a step: {values}"


def test_a_trial_from_start_to_end(launch: Callable[..., Tracker], storage: Path) -> None:
    trial, folder = TRIALS[0], TrialFolder(storage, TRIALS[0].trial_id)
    tracker = launch()
    folder.append(rows(1, 12))
    tracker.update(trial.trial_id, 10)
    child = runs_of(storage)[trial.trial_id]
    assert child.info.status == "RUNNING"
    assert [step for step, _, _ in points_of(storage, child)["train/loss"]] == list(range(1, 11))
    folder.append(rows(13, 20))
    tracker.finish_trial(trial.trial_id, finished(trial), {"gain_abs/plain": 0.1, "delta_m": 0.2})
    found = runs_of(storage)
    child = found[trial.trial_id]
    points = points_of(storage, child)
    assert_one_point_per_step(points)
    assert points["train/loss"] == [(s, START + s, 1 / s) for s in range(1, 21)]
    assert points["score/dev/plain/accuracy"] == [(s, START + s, s / 100) for s in (5, 10, 15, 20)]
    assert points["gain_abs/plain"] == [(20, START + 1000, 0.1)]
    assert child.data.metrics["score/test/qa/yes :28:no:29:/macro_f1:without No"] == 0.25
    assert child.data.metrics["route/0/nmi"] == 0.5
    assert child.data.metrics["params/active"] == 5
    assert "score/test/plain/pearson" not in child.data.metrics
    assert json.loads(child.data.tags["undefined"]) == {"score/test/plain/pearson": "constant"}
    assert (child.info.status, child.info.end_time, child.info.start_time) == ("FINISHED", START + 1000, START + 1)
    assert child.data.tags["mlflow.parentRunId"] == found["parent"].info.run_id
    expected = {
        "family": "dense",
        "role": "candidate",
        "seed": "0",
        "status": "finished",
        "git_sha": "abc",
        "configuration": "dense",
    }
    assert expected.items() <= child.data.tags.items()
    assert child.data.params["mixture.tasks"] == json.dumps(list(TASKS))
    assert child.data.params["train.lr"] == "0.0003" or float(child.data.params["train.lr"]) == trial.config.train.lr


def test_a_second_launch_writes_nothing(launch: Callable[..., Tracker], storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for trial in TRIALS:
        TrialFolder(storage, trial.trial_id).append(rows(1, 20))
    first = launch()
    for trial in TRIALS:
        first.finish_trial(trial.trial_id, finished(trial), {"delta_m": 0.1})
    first.finish_sweep(storage, True)
    before = {key: points_of(storage, run) for key, run in runs_of(storage).items()}
    second = launch()
    monkeypatch.setattr(second, "_log", lambda *_, **__: pytest.fail("sent something"))
    for trial in TRIALS:
        second.finish_trial(trial.trial_id, finished(trial), {"delta_m": 0.1})
    assert {key: points_of(storage, run) for key, run in runs_of(storage).items()} == before


@pytest.mark.parametrize("forget", [False, True])
def test_driver_dies_in_the_middle(launch: Callable[..., Tracker], storage: Path, forget: bool) -> None:
    """The next driver goes on with the same run; also when the last one died between sending rows and noting that."""
    trial, folder = TRIALS[0], TrialFolder(storage, TRIALS[0].trial_id)
    folder.append(rows(1, 20))
    launch().update(trial.trial_id, 10)
    first = runs_of(storage)[trial.trial_id]
    if forget:
        import mlflow

        mlflow.MlflowClient(default_uri(storage)).set_tag(first.info.run_id, "tracked_rows", "3")
    second = launch()
    assert runs_of(storage)[trial.trial_id].info.status == "KILLED"
    second.update(trial.trial_id, 15)
    again = runs_of(storage)[trial.trial_id]
    assert (again.info.run_id, again.info.status) == (first.info.run_id, "RUNNING")
    second.finish_trial(trial.trial_id, finished(trial), {})
    child = runs_of(storage)[trial.trial_id]
    points = points_of(storage, child)
    assert_one_point_per_step(points)
    assert len(points["train/loss"]) == 20
    assert child.info.status == "FINISHED"


def test_rows_that_a_resume_writes_again_are_stored_once(launch: Callable[..., Tracker], storage: Path) -> None:
    """Killed at step 14 after the checkpoint at 10, resumed an hour later; then the checkpoint at 10 turns out to be torn."""
    trial, folder = TRIALS[0], TrialFolder(storage, TRIALS[0].trial_id)
    tracker = launch()
    folder.append(rows(1, 14))
    tracker.update(trial.trial_id, 10)
    first = runs_of(storage)[trial.trial_id].info.run_id
    for resumed_from in (10, 5):
        folder.rewind(resumed_from)
        folder.append(rows(resumed_from + 1, 12, START + 3_600_000))
        tracker.update(trial.trial_id, 10)
    folder.append(rows(13, 20, START + 3_600_000))
    tracker.finish_trial(trial.trial_id, finished(trial), {})
    child = runs_of(storage)[trial.trial_id]
    points = points_of(storage, child)
    assert child.info.run_id == first
    assert_one_point_per_step(points)
    assert [step for step, _, _ in points["train/loss"]] == list(range(1, 21))


def test_restart_before_the_first_checkpoint_keeps_the_run(launch: Callable[..., Tracker], storage: Path) -> None:
    trial, folder = TRIALS[0], TrialFolder(storage, TRIALS[0].trial_id)
    tracker = launch()
    folder.append(rows(1, 4))
    tracker.update(trial.trial_id, 0)
    first = runs_of(storage)[trial.trial_id].info.run_id
    folder.rewind(0)
    folder.append(rows(1, 20, START + 60_000))
    tracker.finish_trial(trial.trial_id, finished(trial), {})
    child = runs_of(storage)[trial.trial_id]
    assert child.info.run_id == first
    assert_one_point_per_step(points_of(storage, child))


def test_trial_that_was_started_over_gets_a_new_run(launch: Callable[..., Tracker], storage: Path) -> None:
    trial, folder = TRIALS[0], TrialFolder(storage, TRIALS[0].trial_id)
    folder.append(rows(1, 20))
    launch().finish_trial(trial.trial_id, finished(trial), {})
    shutil.rmtree(folder.path)
    folder.append(rows(1, 20, START + 7_200_000))
    tracker = launch()
    tracker.update(trial.trial_id, 10)
    tracker.finish_trial(trial.trial_id, finished(trial, finished_ms=START + 9_000_000), {})
    points = points_of(storage, runs_of(storage)[trial.trial_id])
    assert_one_point_per_step(points)
    assert points["train/loss"][0] == (1, START + 7_200_001, 1.0)


def test_deleted_database_is_rebuilt_identically(launch: Callable[..., Tracker], storage: Path) -> None:
    for trial in TRIALS:
        folder = TrialFolder(storage, trial.trial_id)
        folder.append(rows(1, 20))
    TrialFolder(storage, TRIALS[0].trial_id).write_result(finished(TRIALS[0]))
    TrialFolder(storage, TRIALS[1].trial_id).write_status(
        state="failed", error={"type": "E", "message": "out of memory"}, checkpoint=10
    )
    gains = {TRIALS[0].trial_id: {"delta_m": 0.5}}
    tracker = launch()
    tracker.update(TRIALS[0].trial_id, 10)
    tracker.finish_trial(TRIALS[0].trial_id, finished(TRIALS[0]), {})
    tracker.finish_trial(TRIALS[0].trial_id, finished(TRIALS[0]), gains[TRIALS[0].trial_id])
    tracker.fail_trial(TRIALS[1].trial_id, "E: out of memory")
    tracker.close()

    def content() -> dict[str, Any]:
        found = {key: run for key, run in runs_of(storage).items() if key != "parent"}
        tags = {key: {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"} for key, run in found.items()}
        return {key: (run.info.status, run.data.params, tags[key], points_of(storage, run)) for key, run in found.items()}

    before = content()
    assert len(before[TRIALS[1].trial_id][3]["train/loss"]) == 10
    for file in storage.parent.glob("mlflow.db*"):
        file.unlink()
    tracker = launch()
    assert tracker.track_again(gains) == 2
    assert content() == before
    assert tracker.track_again(gains) == 2
    assert content() == before


def test_gains_that_come_later_are_added(launch: Callable[..., Tracker], storage: Path) -> None:
    trial = TRIALS[0]
    TrialFolder(storage, trial.trial_id).append(rows(1, 20))
    tracker = launch()
    for gains in ({}, {"gain_abs/plain": 0.1}, {"gain_abs/plain": 0.1, "delta_m": 0.3}, {}, {"gain_abs/plain": 0.1}):
        tracker.finish_trial(trial.trial_id, finished(trial), gains)
    child = runs_of(storage)[trial.trial_id]
    points = points_of(storage, child)
    assert_one_point_per_step(points)
    assert points["delta_m"] == [(20, START + 1000, 0.3)]
    assert child.info.status == "FINISHED"


def test_trial_of_another_sweep_gets_its_final_figures_only(launch: Callable[..., Tracker], storage: Path) -> None:
    trial = TRIALS[0]
    TrialFolder(storage, trial.trial_id).append(rows(1, 20))
    launch("t").finish_trial(trial.trial_id, finished(trial), {})
    child = runs_of(storage, "t")[trial.trial_id]
    assert child.data.tags["reused_from"] == "s"
    assert not [key for key in child.data.metrics if key.startswith(("train", "time/step"))]
    assert child.data.metrics["score/dev/plain/accuracy"] == 0.2
    launch("s").finish_trial(trial.trial_id, finished(trial), {})
    own = runs_of(storage, "s")[trial.trial_id]
    assert "reused_from" not in own.data.tags
    assert own.info.run_id != child.info.run_id


def test_failed_trial_goes_on_in_the_same_run(launch: Callable[..., Tracker], storage: Path) -> None:
    trial, folder = TRIALS[0], TrialFolder(storage, TRIALS[0].trial_id)
    folder.append(rows(1, 12))
    folder.write_status(state="failed", checkpoint=10)
    tracker = launch()
    tracker.fail_trial(trial.trial_id, "worker lost\ntrace")
    failed = runs_of(storage)[trial.trial_id]
    assert (failed.info.status, failed.data.tags["status"]) == ("FAILED", "failed")
    assert failed.data.tags["error"] == "worker lost\ntrace"
    assert len(points_of(storage, failed)["train/loss"]) == 10
    tracker.update(trial.trial_id, 10)
    running = runs_of(storage)[trial.trial_id]
    assert (running.info.run_id, running.info.status) == (failed.info.run_id, "RUNNING")


def test_parent_run(launch: Callable[..., Tracker], storage: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs/sweeps/s"
    (folder / "report").mkdir(parents=True)
    for name in ("comparison.csv", "plan.json", "report/index.html"):
        (folder / name).write_text("x")
    for value in (0.1, 0.1, 0.2):
        launch().finish_sweep(folder, ok=value == 0.2, figures={"mean_gain/moe (4)": value, "delta_m/dense": float("nan")})
    import mlflow

    parent = runs_of(storage)["parent"]
    client = mlflow.MlflowClient(default_uri(storage))
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {"comparison.csv", "plan.json", "report"}
    assert (parent.info.status, parent.data.tags["status"]) == ("FINISHED", "finished")
    assert [value for _, _, value in points_of(storage, parent)["mean_gain/moe :28:4:29:"]] == [0.1, 0.2]
    assert parent.data.tags["mlflow.note.content"] == "Who helps whom?"
    assert (tmp_path / "mlartifacts").is_dir()


def test_measurements_are_attached_and_a_store_that_refuses_them_says_so(
    launch: Callable[..., Tracker], storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, folder = TRIALS[0], TrialFolder(storage, TRIALS[0].trial_id)
    folder.measurements.mkdir(parents=True)
    (folder.measurements / "routing.npz").write_bytes(b"x")
    tracker = launch()

    class NoCredentials(Exception):
        """What a cloud library raises."""

    def refuse(*_: Any) -> None:
        raise NoCredentials("no credentials")

    with monkeypatch.context() as patch:
        patch.setattr(tracker._client, "log_artifacts", refuse)
        with pytest.raises(TrackingError, match="no credentials"):
            tracker.finish_trial(trial.trial_id, finished(trial), {})
    tracker.finish_trial(trial.trial_id, finished(trial), {})
    import mlflow

    run = runs_of(storage)[trial.trial_id]
    files = mlflow.MlflowClient(default_uri(storage)).list_artifacts(run.info.run_id, "measurements")
    assert [file.path for file in files] == ["measurements/routing.npz"]
    assert_one_point_per_step(points_of(storage, run))


def test_close_leaves_no_run_open(launch: Callable[..., Tracker], storage: Path) -> None:
    tracker = launch()
    tracker.update(TRIALS[0].trial_id, None)
    tracker.close()
    tracker.close()
    assert {run.info.status for run in runs_of(storage).values()} == {"KILLED"}


def test_mlflow_down_then_back(tmp_path: Path) -> None:
    trial, storage = TRIALS[0], tmp_path / "runs"
    TrialFolder(storage, trial.trial_id).append(rows(1, 20))
    (tmp_path / "db").write_text("in the way")
    tracker = Tracker(f"sqlite:///{tmp_path}/db/mlflow.db", storage, "s")
    for _ in range(2):
        with pytest.raises(TrackingError, match=r"MLflow at sqlite"):
            tracker.start(TRIALS)
        with pytest.raises(TrackingError):
            tracker.update(trial.trial_id, 10)
    (tmp_path / "db").unlink()
    tracker.update(trial.trial_id, 10)
    tracker.close()
    assert (tmp_path / "db/mlflow.db").is_file()


def test_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = Tracker("http://user:secret@127.0.0.1:9", tmp_path / "runs", "s")
    with pytest.raises(TrackingError) as caught:
        tracker.start(TRIALS)
    assert "secret" not in str(caught.value).split(": ")[0]
    tracker.close()


def test_store_that_fails_in_the_middle_loses_nothing(
    launch: Callable[..., Tracker], storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = TRIALS[0]
    TrialFolder(storage, trial.trial_id).append(rows(1, 20))
    tracker = launch()
    tracker.update(trial.trial_id, 5)
    with monkeypatch.context() as patch:

        def away(*_: Any) -> None:
            raise ConnectionError("gone")

        patch.setattr(tracker._client, "log_batch", away)
        with pytest.raises(TrackingError, match="gone"):
            tracker.finish_trial(trial.trial_id, finished(trial), {})
    tracker.finish_trial(trial.trial_id, finished(trial), {})
    points = points_of(storage, runs_of(storage)[trial.trial_id])
    assert_one_point_per_step(points)
    assert len(points["train/loss"]) == 20


def test_calls_from_several_threads(launch: Callable[..., Tracker], storage: Path) -> None:
    tracker = launch()
    for trial in TRIALS:
        TrialFolder(storage, trial.trial_id).append(rows(1, 20))
    calls = [threading.Thread(target=tracker.update, args=(trial.trial_id, step)) for step in (5, 10) for trial in TRIALS]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    found = runs_of(storage)
    for trial in TRIALS:
        points = points_of(storage, found[trial.trial_id])
        assert_one_point_per_step(points)
        assert len(points["train/loss"]) == 10


def test_long_journals_go_in_batches(launch: Callable[..., Tracker], storage: Path) -> None:
    trial = TRIALS[0]
    values = {f"train/loss/t{i}": 0.5 for i in range(300)}
    TrialFolder(storage, trial.trial_id).append([{"t": START + s, "step": s, "values": values} for s in range(1, 8)])
    launch().update(trial.trial_id, 7)
    child = runs_of(storage)[trial.trial_id]
    assert len(child.data.metrics) == 300
    assert child.data.tags["tracked_rows"] == "7"


def test_non_finite_points_are_not_sent(launch: Callable[..., Tracker], storage: Path) -> None:
    trial = TRIALS[0]
    values = {"train/loss": float("nan"), "train/lr": 0.1, "train/grad_norm": float("inf")}
    TrialFolder(storage, trial.trial_id).append([{"t": START, "step": 1, "values": values}])
    launch().update(trial.trial_id, 1)
    assert runs_of(storage)[trial.trial_id].data.metrics == {"train/lr": 0.1}


def test_unknown_metric_is_an_error(launch: Callable[..., Tracker], storage: Path) -> None:
    TrialFolder(storage, TRIALS[0].trial_id).append([{"t": START, "step": 1, "values": {"train/lozz": 1.0}}])
    with pytest.raises(TrackingError, match="train/lozz"):
        launch().update(TRIALS[0].trial_id, 1)


NASTY = [
    "a", "a/b", "a//b", "a/../b", "a/./b", "/a", "a/", "", "..", "a b", "a(b", "a(b)", "a:b", "a:28:b", "a:28:b:29:", "a%b",
    "a<b>", "a\nb", "é", "中", "a(b)c", "f(x)", "f:x", "f(without x)", "f(a/b)", "f(a)/b", "f(:)", "f(", "a.b", ".a", "::",
    "x" * 300, "x" * 301,
]  # fmt: skip


def test_metric_names_are_allowed_and_different(launch: Callable[..., Tracker], storage: Path) -> None:
    raw = [
        f"score/test/{task}/{metric}"
        for task in NASTY
        if task
        for metric in ("accuracy", "f1(x)", "f1(a/b)", "f1(without (x))")
    ]
    raw += [f"train/loss/{task}" for task in NASTY if task]
    names = [metric_name(name) for name in raw]
    assert len(set(names)) == len(set(raw))
    assert max(map(len, names)) <= 250
    values = {name: 0.5 for name in raw}
    TrialFolder(storage, TRIALS[0].trial_id).append([{"t": START, "step": 1, "values": values}])
    launch().update(TRIALS[0].trial_id, 1)
    assert set(runs_of(storage)[TRIALS[0].trial_id].data.metrics) == set(names)


def test_plain_names_stay_as_they_are() -> None:
    for name in (
        "train/loss",
        "score/test/glue/sst2/accuracy",
        "gain_abs/a b",
        "route/3/entropy",
        "cos/layer.0/mean",
        "delta_m",
    ):
        assert metric_name(name) == name
    assert metric_name("score/dev/t/macro_f1(without Other)") == "score/dev/t/macro_f1:without Other"


@pytest.mark.parametrize("name", METRICS)
def test_every_listed_name_is_known(name: str) -> None:
    assert metric_name(name.replace("{", "").replace("}", "")) == name.replace("{", "").replace("}", "")


@pytest.mark.parametrize(
    "name", ["", "loss", "train/", "score/test/accuracy", "gain_abs/", "time/step", "xtrain/loss", "route/nmi/x/y"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(TrackingError, match="METRICS"):
        metric_name(name)


def test_long_params_are_cut_and_stay_different(launch: Callable[..., Tracker], storage: Path) -> None:
    names = tuple(f"task-{i:04d}" for i in range(1200))
    other = (*names[:-1], "task-x")
    long = [
        replace(TrialConfig(), mixture=MixtureConfig(tasks=tasks), digests={t: "0" for t in tasks[:150]})
        for tasks in (names, other)
    ]
    params = [params_of(_Fixed(config)) for config in long]
    assert {len(p["mixture.tasks"]) for p in params} == {6000}
    assert params[0]["mixture.tasks"] != params[1]["mixture.tasks"]
    tracker = Tracker(None, storage, "s")
    tracker.start([_Fixed(long[0])])
    tracker.update(long[0].trial_id, None)
    assert runs_of(storage)[long[0].trial_id].data.params == params[0]


@dataclass(frozen=True)
class _Fixed:
    config: TrialConfig
    role: str = "candidate"
    configuration: str = "c" * 9000
    seed: int = 0
    task: str | None = None
    baselines: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trial_id(self) -> str:
        return self.config.trial_id


def test_default_store_and_its_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri(tmp_path / "runs") == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert default_uri(tmp_path / "runs") == "http://tracker:5000"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert default_uri(Path("runs")) == f"sqlite:///{Path(os.getcwd()).resolve()}/mlflow.db"
