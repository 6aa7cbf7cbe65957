"""Run, resume, plan or report a sweep: ``python pipelines/sweep.py SWEEP.yaml [key=value ...] [options]``.

The same command again finishes the sweep: what is finished stays, what was interrupted goes on from its last checkpoint.
Exit status: 0 every trial finished, 1 some failed (the rest is compared all the same), 2 the sweep file or an option is
wrong, 130 interrupted.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lightning_modules.building import ConfigError
from lightning_modules.config import flatten
from pipelines.cost import check_resources, local_resources
from pipelines.plan import Plan, PlannedTrial, describe, make_plan
from pipelines.spec import SweepConfig, SweepError, load_sweep
from pipelines.store import TrialFolder, TrialResult, write_text

if TYPE_CHECKING:
    from pipelines.tracking import Tracker
    from pipelines.transfer import Comparison

LOG_WIDTH = 140
"""Width of tables where the output is not a terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    options = _parse(arguments)
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)
    try:
        sweep, plan, storage = _load(options)
        if options.plan:
            _print_lines(console, describe(plan))
            return 0
        if options.status:
            _print_lines(console, _status_lines(plan, storage))
            return 0
        return _Command(sweep, plan, storage, options, console).run()
    except ConfigError as error:
        print(f"sweep.py: {options.sweep}: {error}", file=sys.stderr)
        return 2
    except SweepError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False  # --fres must not delete
    parser.add_argument("sweep", metavar="SWEEP.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="the file's own keys: trial.train.steps=50 seeds=1")
    parser.add_argument("--plan", action="store_true", help="print the trials, what is finished, and the cost; run nothing")
    parser.add_argument("--status", action="store_true", help="where every trial stands; run nothing")
    parser.add_argument(
        "--report", action="store_true", help="rebuild comparison and report from what is finished; run nothing"
    )
    parser.add_argument(
        "--track-again", action="store_true", help="rebuild the MLflow runs from the trials' own files; run nothing"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the sweep's finished trials and checkpoints")
    parser.add_argument("--storage", default="runs", metavar="DIR", help="where trials and reports live (default: ./runs)")
    parser.add_argument(
        "--address", default=os.environ.get("RAY_ADDRESS"), help="Ray cluster (default: $RAY_ADDRESS, else a local one)"
    )
    return parser.parse_intermixed_args(arguments)


def _load(options: argparse.Namespace) -> tuple[SweepConfig, Plan, Path]:
    if "://" in options.storage:
        raise ConfigError(
            "--storage", f"must be a folder that all workers see; object stores are not supported yet, got {options.storage}"
        )
    storage = Path(options.storage).resolve()
    existing = next(path for path in (storage, *storage.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError("--storage", f"must be a folder that can be written to, got {options.storage} ({existing})")
    sweep = load_sweep(Path(options.sweep), options.overrides)
    if not options.address:
        check_resources(sweep, local_resources())
    return sweep, make_plan(sweep, storage, fresh=options.fresh), storage


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _status_lines(plan: Plan, storage: Path) -> list[str]:
    lines = []
    for trial in plan.trials:
        folder = TrialFolder(storage, trial.trial_id)
        result, status = folder.result(), folder.status()
        state = "finished" if result else status.get("state", "new")
        step = result.steps if result else status.get("checkpoint", 0)
        error = status.get("error")
        reason = f"  {error['type']}: {error['message'].splitlines()[0]} (log: {folder.log})" if error and not result else ""
        where = f"{trial.configuration} seed={trial.seed}"
        lines.append(f"{trial.trial_id:<26} {state:<12} step {step}/{trial.config.train.steps}  {where}{reason}")
    return lines


class _Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM."""


class _Command:
    """One run of the command on a plan that is right."""

    def __init__(self, sweep: SweepConfig, plan: Plan, storage: Path, options: argparse.Namespace, console: Console) -> None:
        self.sweep, self.plan, self.storage = sweep, plan, storage
        self.options, self.console = options, console
        self.folder = storage / "sweeps" / sweep.name
        self.folders = {trial.trial_id: TrialFolder(storage, trial.trial_id) for trial in plan.trials}

    def run(self) -> int:
        """Train what is missing, then compare, report and track."""
        from pipelines.tracking import Tracker, default_uri

        runs_nothing = self.options.report or self.options.track_again
        if not runs_nothing:
            self._write_plan()
        pending = [] if runs_nothing else [t for t in self.plan.trials if t.state != "finished"]
        tracker = Tracker(None, self.storage, self.sweep.name, self.sweep.question)
        try:
            with _stop_signals():
                if pending:
                    self._train(pending, tracker)
                elif not runs_nothing:
                    self._say(f"all {len(self.plan.trials)} trials are finished; nothing to train")
                return self._conclude(tracker, default_uri(self.storage))
        except KeyboardInterrupt:
            return self._interrupted(tracker)

    def _say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False)

    def _write_plan(self) -> None:
        if self.options.fresh:
            for folder in self.folders.values():
                if folder.path.exists():
                    shutil.rmtree(folder.path)
        write_text(self.folder / "plan.json", self.plan.to_json())

    # -- training ------------------------------------------------------------------------------------------------------

    def _train(self, pending: Sequence[PlannedTrial], tracker: "Tracker") -> None:
        from pipelines.monitor import LiveView, Monitor, PlainView

        _print_lines(self.console, describe(self.plan, trials=False))
        if not any(digest.startswith("hub:") for t in self.plan.trials for digest in t.config.digests.values()):
            os.environ["HF_HUB_OFFLINE"] = "1"  # a stray look-up hangs for 23 s where there is no network
        prepared = self._prepare(pending)
        for trial in pending:
            folder = self.folders[trial.trial_id]
            folder.write_config(trial.config)
            if folder.status().get("state") not in ("running", "retrying"):  # else another sweep may be training it now
                folder.write_status(state="new", error=None)
        from pipelines.runner import Launch, run_trials

        launch = Launch(
            sweep=self.sweep.name,
            storage=self.storage,
            prepared=prepared,
            resources=self.sweep.resources,
            retries=self.sweep.retries,
            address=self.options.address,
            provenance={"sweep": self.sweep.name, "git_sha": _git_sha()},
        )
        view = LiveView(self.console, len(pending)) if self.console.is_terminal else PlainView(self.console, len(pending))
        live = view.live if isinstance(view, LiveView) else contextlib.nullcontext()
        with live, Monitor(pending, [self.folders[t.trial_id] for t in pending], tracker, view):
            run_trials([trial.trial_id for trial in pending], launch)

    def _prepare(self, pending: Sequence[PlannedTrial]) -> Path:
        from lightning_modules.data.prepared import cut_lines, prepare

        root = self.storage / "prepared"
        prepare([trial.config for trial in pending], self.plan.specs, root)
        for line in dict.fromkeys(line for trial in pending for line in cut_lines(trial.config, root)):
            self._say(f"warning: {line}")
        return root

    def _interrupted(self, tracker: "Tracker") -> int:
        from pipelines.tracking import TrackingError

        for folder in self.folders.values():
            if folder.result() is None and folder.status().get("state") in ("running", "retrying"):
                folder.write_status(state="interrupted")
        with contextlib.suppress(TrackingError):  # the runs stay open until the next launch closes them
            tracker.close()
        print(f"interrupted; the same command goes on where it stopped:\n  {self._command_line()}", file=sys.stderr)
        return 130

    # -- comparing -----------------------------------------------------------------------------------------------------

    def _conclude(self, tracker: "Tracker", uri: str) -> int:
        from pipelines import report, routes, transfer, wording

        results = {t: r for t, folder in self.folders.items() if (r := folder.result()) is not None}
        failures = self._failures(results)
        comparison = transfer.compare(self.plan.trials, results, self.plan.tasks, failures=failures)
        transfer.write_scores(self.folder / "scores.csv", results.values())
        facts = report.SweepFacts(
            name=self.sweep.name,
            question=self.sweep.question,
            settings=flatten(dict(self.sweep.trial)),
            command=self._command_line(),
            notes=self._notes(results.values()),
            routes=tuple(routes.collect(self.plan.trials, self.storage)),
        )
        page = report.write_report(self.folder, comparison, facts)
        wording.print_comparison(self.console, comparison)
        tracked = self._track(tracker, comparison, results, failures)
        missing = [t for t in self.plan.trials if t.trial_id not in results]
        self._say(f"report: {page}")
        self._say(f"MLflow: mlflow ui --backend-store-uri {uri}")
        if missing:
            self._say(f"{len(missing)} of {len(self.plan.trials)} trials have no result:")
            for trial in missing:
                why = failures.get(trial.trial_id, "not finished")
                self._say(f"  {trial.trial_id}: {why} (log: {self.folders[trial.trial_id].log})")
        if self.options.track_again:
            return 0 if tracked else 1
        return 1 if missing and not self.options.report else 0

    def _notes(self, results: Iterable[TrialResult]) -> tuple[str, ...]:
        """What the reader of the report should know of the data."""
        cut = {
            f"{task}: {facts[what]} {words}"
            for result in results
            for task, facts in result.data.items()
            for what, words in (
                ("cut_tokens", "tokens lie beyond backbone.max_windows and were not read; their words count as wrong"),
                ("cut_target_tokens", "tokens of targets lie beyond backbone.max_target_length"),
            )
            if facts.get(what)
        }
        return (*self.plan.warnings, *sorted(cut))

    def _failures(self, results: Mapping[str, TrialResult]) -> dict[str, str]:
        reasons = {}
        for trial_id, folder in self.folders.items():
            error = folder.status().get("error")
            if trial_id not in results and error:
                first = (error["message"].splitlines() or [""])[0]
                reasons[trial_id] = f"{error['type']}: {first}"
        return reasons

    def _command_line(self) -> str:
        words = ["python", "pipelines/sweep.py", self.options.sweep, *self.options.overrides]
        return shlex.join(words if self.options.storage == "runs" else [*words, "--storage", self.options.storage])

    def _track(
        self, tracker: "Tracker", comparison: "Comparison", results: Mapping[str, TrialResult], failures: Mapping[str, str]
    ) -> bool:
        """Bring MLflow up to date; False, with a warning, where it could not be reached."""
        from pipelines.tracking import TrackingError

        try:
            tracker.start(self.plan.trials)
            gains = {t.trial_id: comparison.gains(t) for t in self.plan.trials if t.trial_id in results}
            if self.options.track_again:
                tracker.track_again(gains)
            for trial_id, result in results.items():
                tracker.finish_trial(trial_id, result, gains[trial_id])
            for trial_id, reason in failures.items():
                tracker.fail_trial(trial_id, reason)
            tracker.finish_sweep(self.folder, len(results) == len(self.plan.trials), comparison.figures())
        except TrackingError as error:
            self._say(
                f"warning: MLflow: {error}; nothing is lost: run the command again, or with --track-again, when it is back"
            )
            return False
        return True


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM stops the sweep as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise _Interrupted

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _git_sha() -> str:
    """The commit of the code that runs, with ``-dirty`` when it has been changed; empty outside a checkout."""
    try:
        here = Path(__file__).resolve().parent
        sha = subprocess.run(
            ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", here, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return sha + ("-dirty" if changed.strip() else "")


if __name__ == "__main__":
    sys.exit(main())
