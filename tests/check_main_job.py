"""After the README's main command: are its files and MLflow runs there, and does it find what was planted?

``python tests/check_main_job.py [STORAGE]`` computes the gains anew from the trials' own files, prints them as the README's
table, and ends with exit status 1 at the first thing that is missing or not as planted.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow

from pipelines.stats import Interval, t_interval

GROUPS = {
    "shares, low-resource (2 tasks)": ("colour-score", "light-or-dark"),
    "shares (4 tasks)": ("tag-colours", "most-colour", "colour-score", "light-or-dark"),
    "independent (2 tasks)": ("tag-sounds", "cheap-or-dear"),
    "competes (3 tasks)": ("tag-oaths", "tag-feuds", "tag-debts"),
}
COLUMNS = {
    "dense": "dense",
    "task_moe num_experts=8": "task_moe, 8 experts",
    "adapter_moe num_experts=8": "adapter_moe, 8 experts",
    "parameter_matched dense ffn_multiple=8": "dense with the parameters of 8 experts",
}


def check_files_and_runs(storage: Path, trials: Mapping[str, Any]) -> None:
    """Report, one FINISHED run per trial and one for the sweep, with scores and gains."""
    folder = storage / "sweeps" / "num_experts"
    assert (folder / "comparison.csv").stat().st_size > 1000, "comparison.csv is empty"
    assert (folder / "report" / "index.html").stat().st_size > 10_000, "the report is empty"
    client = mlflow.MlflowClient(f"sqlite:///{storage.resolve().parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("num_experts")
    assert experiment is not None, "no MLflow experiment num_experts"
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert len(runs) == len(trials) + 1, f"{len(runs)} runs for {len(trials)} trials and their parent"
    assert all(run.info.status == "FINISHED" for run in runs), "a run is not FINISHED"
    children = {run.data.tags["trial_id"]: run for run in runs if "trial_id" in run.data.tags}
    assert children.keys() == trials.keys(), "a trial has no run of its own"
    for trial_id, run in children.items():
        assert any(name.startswith("score/test/") for name in run.data.metrics), f"{trial_id} has no score/test/..."
        if trials[trial_id]["role"] == "candidate":
            assert any(name.startswith("gain_abs/") for name in run.data.metrics), f"{trial_id} has no gain_abs/..."
    print(f"{len(trials)} trials, {len(runs)} MLflow runs, comparison and report: all there")


def gains(storage: Path, trials: Mapping[str, Any], configuration: str, tasks: tuple[str, ...]) -> Interval:
    """Mean gain of a group of tasks in points, interval over seeds."""
    alone = {(trial["task"], trial["seed"]): trial_id for trial_id, trial in trials.items() if trial["task"]}
    differences = []
    for trial_id, trial in trials.items():
        if trial["configuration"] == configuration:
            names = [f"planted/{task}" for task in tasks]
            pairs = [(score(storage, trial_id, t), score(storage, alone[t, trial["seed"]], t)) for t in names]
            differences.append(100 * sum(shared - single for shared, single in pairs) / len(pairs))
    return t_interval(differences)


def score(storage: Path, trial_id: str, task: str) -> float:
    """The trial's test score of a task."""
    result = json.loads((storage / "trials" / trial_id / "result.json").read_text())
    return result["scores"]["test"][task][result["primary"][task]]


def show(interval: Interval) -> str:
    """``+1.2 [+0.3, +2.1]``."""
    return f"{interval.mean:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]".replace("-", "\N{MINUS SIGN}")


def main(storage: Path) -> None:
    """Check everything and print the table."""
    plan = json.loads((storage / "sweeps" / "num_experts" / "plan.json").read_text())
    trials = {trial["trial_id"]: trial for trial in plan["trials"]}
    check_files_and_runs(storage, trials)
    table = {group: {c: gains(storage, trials, c, tasks) for c in COLUMNS} for group, tasks in GROUPS.items()}
    print("| planted relation | " + " | ".join(COLUMNS.values()) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for group, row in table.items():
        print(f"| {group} | " + " | ".join(map(show, row.values())) + " |")
    low_resource, independent, competes = (table[group]["dense"] for group in GROUPS if group != "shares (4 tasks)")
    assert low_resource.low is not None and low_resource.low > 0, "low-resource tasks that share skills must gain"
    assert competes.high is not None and competes.high < 0, "competing tasks must lose in the dense family"
    assert independent.low is not None and independent.high is not None
    assert -1 < independent.low and independent.high < 1, "independent tasks must stay within a point"
    routed = table["competes (3 tasks)"]["task_moe num_experts=8"]
    assert routed.mean > competes.mean, "experts must relieve the competing tasks"
    print(
        "low-resource sharers gain, independent tasks stay within a point, competing ones lose in the dense family: as planted"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
