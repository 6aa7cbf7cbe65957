"""What a trial costs beyond its training: ours, and a fresh process per trial, in one run.

``python tests/benchmarks/sweep_overhead.py [--quick] [--trials N]``

A trial's own figure (``result.seconds``) covers training and scoring. The rest (starting a process, importing, building the
network, opening data, reporting) is overhead. Trials run one at a time, so the overhead of a warm trial is the time from one
trial's end to the next one's, less the latter's own seconds. The first trial also pays for Ray and the imports.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

os.environ["HF_HUB_OFFLINE"] = "1"
REPOSITORY = Path(__file__).resolve().parents[2]

from lightning_modules.data.prepared import prepare
from pipelines.plan import Plan, make_plan
from pipelines.runner import Launch, run_trials
from pipelines.spec import load_sweep
from pipelines.store import TrialFolder

ONE_TRIAL = """
import sys
from pathlib import Path
from pipelines.store import TrialFolder
from pipelines.trial import run_trial
folder = TrialFolder(Path(sys.argv[1]), sys.argv[2])
run_trial(folder.read_config(), folder, Path(sys.argv[3]))
"""


def make_sweep(folder: Path, trials: int) -> Plan:
    """A sweep of short dense trials on one planted task, one per seed."""
    content = {
        "name": "overhead",
        "catalogues": [str(REPOSITORY / "sweeps" / "tasks" / "planted.yaml")],
        "trial": {
            "backbone": {"max_length": 32, "size": {"hidden_size": 16, "num_heads": 2, "ffn_size": 32, "vocab_size": 800}},
            "mixture": {"tasks": ["planted/most-colour"], "batch_size": 16, "tasks_per_step": 1},
            "train": {"steps": 100},
        },
        "seeds": trials,
        "baselines": [],
        "resources": {"max_concurrent": 1},
    }
    file = folder / "overhead.yaml"
    file.write_text(yaml.safe_dump(content))
    return make_plan(load_sweep(file), folder)


def folders(plan: Plan, storage: Path) -> list[TrialFolder]:
    """The trials' folders, ready to train."""
    found = [TrialFolder(storage, trial.trial_id) for trial in plan.trials]
    for folder, trial in zip(found, plan.trials, strict=True):
        folder.write_config(trial.config)
    return found


def ours(plan: Plan, storage: Path, prepared: Path) -> tuple[float, list[float]]:
    """Seconds beyond training of the first trial, and of each later one."""
    trials = folders(plan, storage)
    launch = Launch(sweep="overhead", storage=storage, prepared=prepared, resources=plan.sweep.resources, retries=0)
    begun = time.time()
    run_trials([folder.trial_id for folder in trials], launch)
    results = sorted((result for folder in trials if (result := folder.result())), key=lambda r: r.finished_ms)
    assert len(results) == len(trials), "a trial failed"
    first = results[0].finished_ms / 1000 - begun - results[0].seconds
    return first, [(b.finished_ms - a.finished_ms) / 1000 - b.seconds for a, b in itertools.pairwise(results)]


def fresh_processes(plan: Plan, storage: Path, prepared: Path) -> list[float]:
    """Seconds beyond training of each trial in a Python process of its own."""
    extra = []
    for folder in folders(plan, storage):
        begun = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", ONE_TRIAL, str(storage), folder.trial_id, str(prepared)], check=True, cwd=REPOSITORY
        )
        result = folder.result()
        assert result is not None, "a trial failed"
        extra.append(time.perf_counter() - begun - result.seconds)
    return extra


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--trials", type=int, help="trials of ours (default 16; 6 with --quick)")
    options = parser.parse_args(arguments)
    count = options.trials or (6 if options.quick else 16)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan = make_sweep(folder, count)
        for trial in plan.trials:
            prepare([trial.config], plan.specs, folder / "prepared")
        processes = fresh_processes(make_sweep(folder, 2 if options.quick else 5), folder / "processes", folder / "prepared")
        first, later = ours(plan, folder / "ours", folder / "prepared")
    ratios = {
        "ours_s": {"median": statistics.median(later), "min": min(later), "max": max(later), "n": len(later)},
        "first_trial_s": {"median": first, "min": first, "max": first, "n": 1},
        "process_s": {
            "median": statistics.median(processes),
            "min": min(processes),
            "max": max(processes),
            "n": len(processes),
        },
    }
    for name, row in ratios.items():
        print(f"{name:<15} median {row['median']:.2f} s  (min {row['min']:.2f}, max {row['max']:.2f}, n={row['n']})")
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    print(json.dumps({"bench": "sweep_overhead", "machine": machine, "ratios": ratios}))


if __name__ == "__main__":
    main()
