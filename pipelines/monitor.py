"""While a sweep runs: follow the trials' own files, show where they stand, and keep MLflow up to date. No Ray here."""

import threading
import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipelines.store import TrialFolder, TrialResult
from pipelines.tracking import Tracker, TrackingError
from pipelines.transfer import Planned

POLL_S = 1.0
PATIENCE_S = 30.0
"""After MLflow has failed, it is left alone for this long."""


class View(Protocol):
    """Something that shows a sweep's progress."""

    def changed(self, trial: Planned, state: str, step: int, result: TrialResult | None, error: str) -> None:
        """A trial has moved."""
        ...

    def warn(self, message: str) -> None:
        """Something that the user should know and that stops nothing."""
        ...


class Monitor:
    """A background thread that watches the trials of a plan until it is closed.

    MLflow being slow or away never touches a trial: what could not be sent is sent later, from the trials' files.
    """

    def __init__(self, trials: Sequence[Planned], folders: Sequence[TrialFolder], tracker: Tracker, view: View) -> None:
        self._trials = list(zip(trials, folders, strict=True))
        self._tracker, self._view = tracker, view
        self._seen: dict[str, tuple[str, int]] = {}
        self._sent: dict[str, tuple[str, int]] = {}
        self._quiet_until = 0.0
        self._started = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._failure: BaseException | None = None

    def __enter__(self) -> "Monitor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise RuntimeError("the monitor thread failed") from self._failure

    def _run(self) -> None:
        try:
            while True:
                last = self._stop.is_set()
                self._look()
                if last:
                    return
                self._stop.wait(POLL_S)
        except BaseException as error:  # raised again in __exit__, on the main thread
            self._failure = error

    def _look(self) -> None:
        for trial, folder in self._trials:
            if self._seen.get(trial.trial_id, ("", 0))[0] in ("finished", "failed") and self._is_sent(trial.trial_id):
                continue
            status = folder.status()
            state, step = status.get("state", "new"), int(status.get("checkpoint", 0))
            if self._seen.get(trial.trial_id) != (state, step):
                self._seen[trial.trial_id] = (state, step)
                error = (status.get("error") or {}).get("message", "")
                self._view.changed(trial, state, step, folder.result() if state == "finished" else None, error)
            if not self._is_sent(trial.trial_id) and state != "new":
                self._send(trial.trial_id, folder, state, step, status)

    def _is_sent(self, trial_id: str) -> bool:
        return self._sent.get(trial_id) == self._seen.get(trial_id)

    def _send(self, trial_id: str, folder: TrialFolder, state: str, step: int, status: dict[str, object]) -> None:
        if time.monotonic() < self._quiet_until:
            return
        try:
            if not self._started:
                self._tracker.start([trial for trial, _ in self._trials])
                self._started = True
            result = folder.result()
            if result is not None:
                self._tracker.finish_trial(trial_id, result, {})
            elif state == "failed":
                error = status.get("error")
                self._tracker.fail_trial(trial_id, str(error.get("message")) if isinstance(error, dict) else "failed")
            else:
                self._tracker.update(trial_id, step, "running")
            self._sent[trial_id] = (state, step)
        except TrackingError as error:
            self._quiet_until = time.monotonic() + PATIENCE_S
            self._view.warn(f"MLflow: {error}; training goes on, tracking is tried again in {PATIENCE_S:.0f} s")


class PlainView:
    """One line for every trial that ends: for logs."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total = console, total
        self.ended = 0

    def changed(self, trial: Planned, state: str, step: int, result: TrialResult | None, error: str) -> None:
        """Print the end of a trial."""
        if state not in ("finished", "failed", "retrying"):
            return
        self.ended += state != "retrying"
        what = f"{result.steps} steps in {result.seconds:.1f} s" if result else error
        self.console.print(f"[{self.ended}/{self.total}] {state}: {describe(trial)}: {what}", markup=False, highlight=False)

    def warn(self, message: str) -> None:
        """Print it."""
        self.console.print(f"warning: {message}", markup=False, highlight=False)


class LiveView:
    """A table of what runs now and a line of counts, for a terminal."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total = console, total
        self.running: dict[str, tuple[Planned, int, float]] = {}
        self.ended = {"finished": 0, "failed": 0}
        self.begun = time.monotonic()
        self.live = Live(console=console, refresh_per_second=2, transient=True, get_renderable=self._render)

    def changed(self, trial: Planned, state: str, step: int, result: TrialResult | None, error: str) -> None:
        """Note a trial's state; its end is also printed above the table."""
        if state in self.ended:
            self.running.pop(trial.trial_id, None)
            self.ended[state] += 1
            what = f"{result.steps} steps in {result.seconds:.1f} s" if result else error
            self.console.print(f"{state}: {describe(trial)}: {what}", markup=False, highlight=False)
        elif state != "new":
            since = self.running.get(trial.trial_id, (trial, 0, time.monotonic()))[2]
            self.running[trial.trial_id] = (trial, step, since)

    def warn(self, message: str) -> None:
        """Print it above the table."""
        self.console.print(f"warning: {message}", markup=False, highlight=False)

    def _render(self) -> Table:
        done = sum(self.ended.values())
        spent = time.monotonic() - self.begun
        left = f", about {spent / done * (self.total - done) / 60:.1f} min left" if done else ""
        counts = f"{self.ended['finished']} finished, {self.ended['failed']} failed, {len(self.running)} running"
        title = f"{counts} of {self.total}{left}"
        table = Table(title=title, title_justify="left", box=None, show_header=False)
        for trial, step, since in list(self.running.values()):
            table.add_row(
                describe(trial), f"checkpoint at step {step} of {trial.config.train.steps}", f"{time.monotonic() - since:.0f} s"
            )
        return table


def describe(trial: Planned) -> str:
    """A trial in a few words."""
    return f"{trial.configuration} seed={trial.seed}"
