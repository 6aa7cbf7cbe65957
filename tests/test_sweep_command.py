"""The command as a user runs it: start to comparison, the same command again, real kills, and mistakes that cost one line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
SWEEP = {
    "name": "toy",
    "question": "Does it survive?",
    "trial": {
        "backbone": {
            "max_length": 32,
            "size": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_size": 32, "vocab_size": 320},
        },
        "mixture": {"tasks": ["toy/*"], "batch_size": 8, "tasks_per_step": 2},
        "train": {"steps": 300, "lr": 3e-3, "log_every": 10, "checkpoint_every": 25},
    },
    "axes": {
        "model": [{"family": "dense"}, {"family": "task_moe", "num_experts": 2}, {"family": "adapter_moe", "num_experts": 2}]
    },
    "baselines": ["single_task"],
}


def write_sweep(folder: Path, catalogue: Path, **changes: Any) -> Path:
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "catalogues": [str(catalogue)], **changes}))
    return path


class Command:
    """``sweep.py`` in a process tree of its own, which can be killed whole."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, "CROSSTALK_TEST_MARK": self.mark, "MLFLOW_TRACKING_URI": ""}
        command = [sys.executable, str(REPOSITORY / "pipelines" / "sweep.py"), *arguments, "--storage", str(folder / "runs")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]

    def finish(self, timeout: float = 300) -> tuple[int, str, str]:
        output, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, output, errors

    def kill(self) -> None:
        """SIGKILL to every process that came from the command: driver, Ray's daemons, actors, fork servers, workers."""
        for _ in range(3):
            for process in self.processes():
                os.kill(int(process.name), signal.SIGKILL)
        self.process.communicate()

    def processes(self) -> list[Path]:
        """``/proc`` folders of everything that came from the command."""
        return [path for path in Path("/proc").iterdir() if path.name.isdigit() and self._is_ours(path)]

    def _is_ours(self, process: Path) -> bool:
        try:
            return self.mark.encode() in (process / "environ").read_bytes() and int(process.name) != os.getpid()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False


def scores(storage: Path) -> dict[str, Any]:
    return {path.parent.name: json.loads(path.read_text())["scores"] for path in storage.glob("trials/*/result.json")}


def points(database: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """trial id -> metric -> [(step, value)] as MLflow holds them, without times."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{database}")
    [experiment] = client.search_experiments(filter_string="name = 'toy'")
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for run in client.search_runs([experiment.experiment_id]):
        assert run.info.status == "FINISHED", (run.data.tags, run.info.status)
        trial = run.data.tags.get("trial_id", "parent")
        assert trial not in found, f"two runs for {trial}"
        found[trial] = {
            name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
            if not name.startswith(("time/", "cost/"))
        }
    return found


def assert_same_points(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    assert a.keys() == b.keys()
    for trial in a:
        assert a[trial].keys() == b[trial].keys(), trial
        for name in a[trial]:
            assert sorted(a[trial][name]) == sorted(b[trial][name]), (trial, name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, catalogue: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, output, errors = Command(folder, str(write_sweep(folder, catalogue))).finish()
    assert code == 0, output + errors
    return folder


@pytest.mark.slow
def test_one_command_ends_in_a_comparison(undisturbed: Path, catalogue: Path) -> None:
    sweep = undisturbed / "runs" / "sweeps" / "toy"
    assert {"plan.json", "comparison.csv"} <= {path.name for path in sweep.iterdir()}
    page = (sweep / "report" / "index.html").read_text()
    assert "Does it survive?" in page and "data:image/png;base64" in page and "<script" not in page
    tracked = points(undisturbed / "mlflow.db")
    assert len(tracked) == 7  # 3 candidates, 3 single-task baselines, 1 parent
    dense = next(metrics for trial, metrics in tracked.items() if "gain_abs/toy/pos" in metrics and trial.startswith("dense"))
    assert "score/test/toy/pos/accuracy" in dense
    assert [step for step, _ in sorted(dense["train/loss"])] == list(range(10, 301, 10))


@pytest.mark.slow
def test_the_same_command_again_trains_nothing(undisturbed: Path, catalogue: Path) -> None:
    before, begun = points(undisturbed / "mlflow.db"), time.monotonic()
    code, output, errors = Command(undisturbed, str(write_sweep(undisturbed, catalogue))).finish()
    assert code == 0 and "nothing to train" in output, output + errors
    assert time.monotonic() - begun < 30
    assert_same_points(before, points(undisturbed / "mlflow.db"))


@pytest.mark.slow
def test_a_deleted_database_is_rebuilt_from_the_files(undisturbed: Path, catalogue: Path) -> None:
    before = points(undisturbed / "mlflow.db")
    for path in undisturbed.glob("mlflow.db*"):
        path.unlink()
    code, output, errors = Command(undisturbed, str(write_sweep(undisturbed, catalogue)), "--track-again").finish()
    assert code == 0, output + errors
    assert_same_points(before, points(undisturbed / "mlflow.db"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_sweep_ends_as_if_it_had_not_been(seed: int, undisturbed: Path, catalogue: Path, tmp_path: Path) -> None:
    rng = random.Random(seed)
    sweep = str(write_sweep(tmp_path, catalogue))
    kills = 0
    while kills < 2:
        command = Command(tmp_path, sweep)
        trained = len(list(tmp_path.glob("runs/trials/*/metrics.jsonl")))
        while len(list(tmp_path.glob("runs/trials/*/metrics.jsonl"))) <= trained and command.process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 4))
        ended = command.process.poll() is not None
        command.kill()
        kills += 1
        print(
            f"kill {kills} (seed {seed}): {len(scores(tmp_path / 'runs'))} trials had finished, the command had ended: {ended}"
        )
    code, output, errors = Command(tmp_path, sweep).finish()
    assert code == 0, output + errors
    assert scores(tmp_path / "runs") == scores(undisturbed / "runs")
    assert_same_points(points(undisturbed / "mlflow.db"), points(tmp_path / "mlflow.db"))
    counts = [json.loads(path.read_text())["resume"] for path in tmp_path.glob("runs/trials/*/result.json")]
    assert all(count["exact"] for count in counts)


@pytest.mark.slow
def test_two_workers_per_trial_and_an_interruption(catalogue: Path, tmp_path: Path) -> None:
    sweep = str(write_sweep(tmp_path, catalogue, resources={"workers": 2, "cpus": 1}))
    command = Command(tmp_path, sweep, "trial.train.steps=600")
    while not list(tmp_path.glob("runs/trials/*/checkpoints/step_*.pt")):
        assert command.process.poll() is None, command.finish()
        time.sleep(0.1)
    command.process.send_signal(signal.SIGTERM)
    code, output, errors = command.finish()
    assert code == 130 and "the same command goes on" in errors, output + errors
    code, output, errors = Command(tmp_path, sweep, "trial.train.steps=600").finish()
    assert code == 0, output + errors
    results = [json.loads(path.read_text()) for path in tmp_path.glob("runs/trials/*/result.json")]
    assert len(results) == 6 and {r["workers"] for r in results} == {2}
    assert sum(r["resume"]["count"] for r in results) >= 1 and all(r["resume"]["exact"] for r in results)


@pytest.mark.slow
def test_a_failed_trial_is_told_and_the_rest_is_compared(catalogue: Path, tmp_path: Path) -> None:
    models = {"axes": {"train.lr": [3e-3, 1e30]}, "baselines": [], "retries": 0}
    sweep = str(write_sweep(tmp_path, catalogue, **models))
    code, output, errors = Command(tmp_path, sweep, "trial.train.clip=null", "trial.train.steps=60").finish()
    assert code == 1, output + errors
    assert "1 of 2 trials have no result" in output and "DivergedError: train/loss is" in output and "log.txt" in output
    code, output, _ = Command(tmp_path, sweep, "trial.train.clip=null", "trial.train.steps=60", "--status").finish()
    assert code == 0 and " failed " in output and " finished " in output


@pytest.mark.slow
def test_a_trial_whose_actor_is_killed_says_so(catalogue: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"axes": {}, "baselines": [], "retries": 0}
    command = Command(tmp_path, str(write_sweep(tmp_path, catalogue, **changes)), "trial.train.steps=3000")
    while not list(tmp_path.glob("runs/trials/*/metrics.jsonl")):
        assert command.process.poll() is None, command.finish()
        time.sleep(0.1)
    actors = [process for process in command.processes() if b"Trainable" in (process / "cmdline").read_bytes()]
    assert actors
    for actor in actors:
        os.kill(int(actor.name), signal.SIGKILL)
    code, output, errors = command.finish()
    assert code == 1, output + errors
    assert "1 of 1 trials have no result" in output and "actor" in output.lower(), output
    status = json.loads(next(tmp_path.glob("runs/trials/*/status.json")).read_text())
    assert status["state"] == "failed" and status["error"]["message"]


def test_status_and_plan_start_nothing(catalogue: Path, tmp_path: Path) -> None:
    sweep = str(write_sweep(tmp_path, catalogue))
    for option in ("--plan", "--status"):
        code, output, errors = Command(tmp_path, sweep, option).finish()
        assert code == 0 and "dense-" in output, output + errors
    assert not (tmp_path / "runs").exists()


def mistakes(catalogue: Path, folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    torn = folder / "torn"
    torn.mkdir()
    content = yaml.safe_load(catalogue.read_text())
    for file in catalogue.parent.glob("*.jsonl"):
        (torn / file.name).write_text(file.read_text())
    lines = (torn / "tagging.train.jsonl").read_text().splitlines()
    lines[6] = lines[6][:20]
    (torn / "tagging.train.jsonl").write_text("\n".join(lines))
    (torn / "toy.yaml").write_text(yaml.safe_dump(content))
    return {
        "unknown key": (["trial.train.stepz=3"], ["trial.train.stepz", "unknown key", "steps"]),
        "wrong type": (["trial.train.steps=many"], ["trial.train.steps", "must be a whole number", "'many'"]),
        "top_k": (
            ['axes={"model": [{"family": "task_moe", "num_experts": 2, "router": {"top_k": 3}}]}'],
            ["model.router.top_k", "must be in 1..num_experts", "top_k=3", "num_experts=2"],
        ),
        "unknown task": (["trial.mixture.tasks=[toy/poss]"], ["trial.mixture.tasks", "no task matches 'toy/poss'", "toy/pos"]),
        "missing catalogue": (["catalogues=[nowhere.yaml]"], ["catalogues", "no such file", "nowhere.yaml"]),
        "torn line": ([f"catalogues=[{torn / 'toy.yaml'}]"], ["tagging.train.jsonl:7", "one JSON object per line"]),
        "no GPU": (["resources.gpus=1"], ["resources.gpus", "gpus=1"]),
        "too many CPUs": (["resources.workers=4000"], ["resources", "4000"]),
        "infinite": (["trial.train.lr=.inf"], ["trial.train.lr", "must be finite"]),
        "family": (['axes={"model": [{"family": ["x"]}]}'], ["model.family", "must be one of dense"]),
        "ignored setting": (
            ["trial.mixture.sampling=uniform", "trial.mixture.temperature=3"],
            ["mixture.temperature", "applies to"],
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        "unknown key",
        "wrong type",
        "top_k",
        "unknown task",
        "missing catalogue",
        "torn line",
        "no GPU",
        "too many CPUs",
        "infinite",
        "family",
        "ignored setting",
    ],
)
def test_a_mistake_costs_one_line_and_nothing_starts(name: str, catalogue: Path, tmp_path: Path) -> None:
    if name == "no GPU" and list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    overrides, expected = mistakes(catalogue, tmp_path)[name]
    sweep = write_sweep(tmp_path, catalogue)
    code, output, errors = Command(tmp_path, str(sweep), *overrides).finish(60)
    assert code == 2 and output == "" and len(errors.splitlines()) == 1, (code, output, errors)
    for part in (sweep.name, *expected):
        assert part in errors, errors
    assert not (tmp_path / "runs").exists() and not (tmp_path / "mlflow.db").exists()


def test_a_storage_that_is_no_folder_costs_one_line(catalogue: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    code, output, errors = Command(tmp_path, str(write_sweep(tmp_path, catalogue)), "--plan").finish(60)
    assert code == 2 and output == "" and len(errors.splitlines()) == 1 and "--storage" in errors


def test_a_missing_sweep_file_costs_one_line(tmp_path: Path) -> None:
    code, _, errors = Command(tmp_path, str(tmp_path / "none.yaml")).finish(60)
    assert code == 2 and len(errors.splitlines()) == 1 and "none.yaml" in errors
