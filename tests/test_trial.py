"""run_trial without Ray: it learns, resumes to the bit, survives torn files, and tells when a resume was not exact."""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.checkpoints import list_checkpoints, load_newest, save_checkpoint
from lightning_modules.config import TrialConfig
from lightning_modules.data.prepared import open_tasks, prepare
from lightning_modules.data.tasks import TaskSpec
from pipelines.store import TrialFolder
from pipelines.trial import DivergedError, run_trial
from pipelines.workers import Job, Worker, WorkerPool

Make = Callable[..., TrialConfig]


class Stopped(Exception):
    """Raised in the middle of a trial."""


def stop_at(step: int) -> Callable[[Mapping[str, Any]], None]:
    def report(event: Mapping[str, Any]) -> None:
        if event["step"] >= step:
            raise Stopped

    return report


def curve(folder: TrialFolder) -> list[tuple[int, dict[str, float]]]:
    return [(row["step"], {k: v for k, v in row["values"].items() if not k.startswith("time/")}) for row in folder.rows()]


def final_weights(folder: TrialFolder) -> dict[str, torch.Tensor]:
    state, refused = load_newest(folder.checkpoints, folder.trial_id)
    assert state is not None and not refused
    return state["network"]


def test_a_trial_learns_and_writes_its_files(make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    config = make_trial(
        train={"steps": 150, "log_every": 50, "checkpoint_every": 100, "eval_every": 50}, backbone={"dropout": 0.0}
    )
    folder = TrialFolder(tmp_path, config.trial_id)
    result = run_trial(config, folder, prepared)
    assert result is not None and folder.result() == result
    assert result.scores["test"]["toy/pos"]["accuracy"] > 0.9  # type: ignore[operator]
    assert result.scores["test"]["toy/count"]["pearson"] > 0.5  # type: ignore[operator]
    assert [step for step, _ in curve(folder)] == [50, 50, 100, 100, 150]
    assert curve(folder)[-1][1]["train/loss"] < curve(folder)[0][1]["train/loss"]
    assert "score/dev/toy/pos/accuracy" in curve(folder)[1][1]
    assert result.resume == {"count": 0, "exact": True, "differences": []}
    assert result.data["toy/pos"] == {
        "train": 60,
        "dev": 24,
        "test": 24,
        "windowed": 0,
        "cut_tokens": 0,
        "cut_target_tokens": 0,
    }


@pytest.mark.parametrize("step", [3, 6, 9, 12])
def test_a_resumed_trial_ends_as_one_that_was_never_stopped(
    step: int, model: dict[str, Any], make_trial: Make, prepared: Path, tmp_path: Path
) -> None:
    config = make_trial(model=model)
    whole, broken = (TrialFolder(tmp_path / name, config.trial_id) for name in ("whole", "broken"))
    expected = run_trial(config, whole, prepared)
    with pytest.raises(Stopped):
        run_trial(config, broken, prepared, report=stop_at(step))
    result = run_trial(config, broken, prepared)
    assert expected is not None and result is not None
    assert result.scores == expected.scores
    assert curve(broken) == curve(whole)
    assert result.resume["count"] == (1 if step > 4 else 0) and result.resume["exact"]
    for name, weight in final_weights(whole).items():
        assert torch.equal(weight, final_weights(broken)[name]), name


def test_a_finished_trial_is_not_trained_again(make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    config = make_trial()
    folder = TrialFolder(tmp_path, config.trial_id)
    first = run_trial(config, folder, prepared)
    before = folder.journal.stat().st_mtime_ns
    assert run_trial(config, folder, prepared, report=stop_at(0)) == first
    assert folder.journal.stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["torn", "empty", "foreign", "result"])
def test_damaged_files_cost_no_more_than_one_checkpoint(damage: str, make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    config = make_trial()
    whole, broken = (TrialFolder(tmp_path / name, config.trial_id) for name in ("whole", "broken"))
    expected = run_trial(config, whole, prepared)
    with pytest.raises(Stopped):
        run_trial(config, broken, prepared, report=stop_at(9))
    newest = list_checkpoints(broken.checkpoints)[0]
    assert newest.name == "step_000000008.pt"
    if damage == "torn":
        newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "foreign":
        save_checkpoint(broken.checkpoints, "dense-000000000000", 11, {})
    else:
        (broken.path / "result.json").write_text('{"trial_id": "' + config.trial_id)
        with broken.journal.open("a") as file:
            file.write('{"t": 1, "step": 9, "val')
    result = run_trial(config, broken, prepared)
    assert expected is not None and result is not None and result.scores == expected.scores
    assert curve(broken) == curve(whole)
    assert bool(broken.status().get("passed_over")) == (damage != "result")


def test_a_resume_under_other_conditions_says_so(make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    config = make_trial()
    folder = TrialFolder(tmp_path, config.trial_id)
    with pytest.raises(Stopped):
        run_trial(config, folder, prepared, report=stop_at(9))
    result = run_trial(config, folder, prepared, threads=2)
    torch.set_num_threads(1)
    assert result is not None and not result.resume["exact"]
    assert result.resume["differences"] == ["threads: 1 before, 2 now"]


def test_a_diverging_trial_fails_with_the_reason(make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    config = make_trial(train={"lr": 1e30, "clip": None, "steps": 60})
    with pytest.raises(DivergedError, match=r"train/loss is (nan|inf) at step \d+; a smaller train\.lr"):
        run_trial(config, TrialFolder(tmp_path, config.trial_id), prepared)


def test_words_beyond_the_longest_input_count_as_wrong(
    make_trial: Make, prepared: Path, specs: dict[str, TaskSpec], tmp_path: Path
) -> None:
    config = make_trial(backbone={"max_length": 8, "max_windows": 1}, names=("toy/pos",), train={"steps": 60, "log_every": 60})
    prepare([config], specs, tmp_path / "prepared")
    result = run_trial(config, TrialFolder(tmp_path, config.trial_id), tmp_path / "prepared")
    task = open_tasks(config, tmp_path / "prepared")[0]
    seen = sum(int(row.words.max()) + 1 for row in task.windows("test", range(24)).rows)
    words = sum(len(row["tags"]) for row in specs["toy/pos"].read("test"))
    assert result is not None and seen < words
    assert 0.9 * seen / words < result.scores["test"]["toy/pos"]["accuracy"] <= seen / words  # type: ignore[operator]
    assert result.data["toy/pos"]["cut_tokens"] > 0


def test_only_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, "t", step, {"x": torch.ones(2)})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000000003.pt", "step_000000002.pt"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# -- in processes of their own -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> WorkerPool:
    pool = WorkerPool()
    pool.warm()
    return pool


def finish(worker: Worker) -> tuple[str, Mapping[str, Any]]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        event = worker.next_event(5)
        if event is not None and event.kind != "report":
            worker.stop()
            return event.kind, event.values
    raise AssertionError("the worker did not end")


def gang_jobs(job: Job, size: int) -> list[Job]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [dataclasses.replace(job, rank=rank, world_size=size, port=port) for rank in range(size)]


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["single_task", "mixed"])
def test_two_workers_give_the_result_of_one(
    batching: str, model: dict[str, Any], make_trial: Make, prepared: Path, tmp_path: Path, pool: WorkerPool
) -> None:
    config = make_trial(model=model, backbone={"dropout": 0.0}, mixture={"batching": batching})
    one, two = (TrialFolder(tmp_path / name, config.trial_id) for name in ("one", "two"))
    alone = run_trial(config, one, prepared)
    two.write_config(config)
    job = Job(storage=tmp_path / "two", trial_id=config.trial_id, prepared=prepared)
    workers = [pool.start(j) for j in gang_jobs(job, 2)]
    assert [finish(worker)[0] for worker in workers] == ["done", "done"], two.log.read_text()
    result = two.result()
    assert alone is not None and result is not None and result.workers == 2
    for (step, a), (_, b) in zip(curve(one), curve(two), strict=True):
        assert a == pytest.approx(b, rel=2e-4), step
    for name, weight in final_weights(one).items():
        torch.testing.assert_close(weight, final_weights(two)[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.slow
def test_a_killed_worker_resumes_to_the_bit(make_trial: Make, prepared: Path, tmp_path: Path, pool: WorkerPool) -> None:
    config = make_trial(train={"steps": 400, "log_every": 10, "checkpoint_every": 40})
    whole, broken = (TrialFolder(tmp_path / name, config.trial_id) for name in ("whole", "broken"))
    expected = run_trial(config, whole, prepared)
    broken.write_config(config)
    job = Job(storage=tmp_path / "broken", trial_id=config.trial_id, prepared=prepared)
    for kill_at in (60, 200):
        worker = pool.start(job)
        while not (event := worker.next_event(30)) or event.kind != "report" or event.values["step"] < kill_at:
            assert event is not None and event.kind == "report", event
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        kind, values = finish(worker)
        assert kind == "failed" and "SIGKILL" in values["message"] and values["retry"]
    assert finish(pool.start(job))[0] == "done"
    result = broken.result()
    assert expected is not None and result is not None
    assert result.scores == expected.scores and curve(broken) == curve(whole)
    assert result.resume["count"] == 2 and result.resume["exact"]


@pytest.mark.slow
def test_a_trial_that_another_process_trains_is_waited_for(
    make_trial: Make, prepared: Path, tmp_path: Path, pool: WorkerPool
) -> None:
    config = make_trial(train={"steps": 300, "log_every": 10, "checkpoint_every": 100})
    folder = TrialFolder(tmp_path, config.trial_id)
    folder.write_config(config)
    job = Job(storage=tmp_path, trial_id=config.trial_id, prepared=prepared)
    first, second = pool.start(job), pool.start(job)
    assert finish(first)[0] == finish(second)[0] == "done"
    result = folder.result()
    assert result is not None and result.resume["count"] == 0
    assert "waiting for it" in folder.log.read_text()
    assert [step for step, _ in curve(folder)] == list(range(10, 301, 10))


@pytest.mark.slow
def test_a_worker_tells_why_it_failed(make_trial: Make, prepared: Path, tmp_path: Path, pool: WorkerPool) -> None:
    config = make_trial(train={"lr": 1e30, "clip": None, "steps": 60})
    folder = TrialFolder(tmp_path, config.trial_id)
    folder.write_config(config)
    kind, values = finish(pool.start(Job(storage=tmp_path, trial_id=config.trial_id, prepared=prepared)))
    assert kind == "failed" and values["type"] == "DivergedError" and not values["retry"]
    assert "run_trial" in values["traceback"] and "DivergedError" in folder.log.read_text()


def test_results_are_plain_json(make_trial: Make, prepared: Path, tmp_path: Path) -> None:
    config = make_trial(model={"family": "task_moe", "num_experts": 2})
    folder = TrialFolder(tmp_path, config.trial_id)
    run_trial(config, folder, prepared, provenance={"sweep": "s", "git_sha": "abc"})
    plain = json.loads((folder.path / "result.json").read_text())
    assert plain["sweep"] == "s" and plain["git_sha"] == "abc" and "route/0/nmi" in plain["measurements"]
    assert plain["scores"]["test"]["toy/pos"]["span_f1"] is None
    assert "test/toy/pos/span_f1" in plain["undefined"]
