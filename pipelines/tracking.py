"""MLflow, the only file that imports it. The trials' own files are the truth, MLflow is a view of them.

The driver is the only writer. A sweep is an experiment of its name with one parent run; a trial is one child run, found again
by its tag ``trial_id``. Every journal row is sent once, with the time it was written at. How many rows of the journal have been
sent is kept in the run's tag ``tracked_rows``; the store itself drops points that are identical in key, step, time and value,
so a driver that dies between sending rows and noting it does no harm. Only rows that a checkpoint covers are sent: a trial that
is resumed writes the later ones again.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from lightning_modules.config import flatten, to_plain
from pipelines.routes import read_arrays, routing_files, snapshot
from pipelines.store import TrialFolder, TrialResult
from pipelines.transfer import Planned

METRICS = (
    "train/loss", "train/loss/{task}", "train/lr", "train/grad_norm", "mixture/share/{task}",
    "time/step_s", "time/examples_per_s", "time/seconds", "cost/gpu_hours", "cost/worker_hours",
    "params/total", "params/active", "params/trainable", "flops/example",
    "score/{split}/{task}/{metric}", "gain_abs/{task}", "gain_rel/{task}", "delta_m", "neg_count", "worst_gain", "arg",
    "mean_gain/{configuration}", "delta_m/{configuration}", "neg_count/{configuration}", "worst_gain/{configuration}",
    "cos/{group}/mean", "conflict_rate/{group}", "tag/neg_share", "route/{layer}/{name}", "route/nmi",
    "route/task/{task}/eff_experts", "route/task/{task}/dropped", "claims/{name}",
)  # fmt: skip
"""Every metric name there is. Extend the list, never rename: old runs must stay comparable. Those per ``{configuration}``
belong to the sweep's parent run. ``{task}`` and ``{configuration}`` may hold slashes."""

_WIDE = {"task", "configuration", "metric", "group"}
_PATTERN = re.compile(
    "|".join(re.sub(r"\\\{(\w+)\\\}", lambda m: ".+" if m[1] in _WIDE else "[^/]+", re.escape(name)) for name in METRICS),
    re.DOTALL,
)

METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
MAX_NAME = 250
MAX_PARAM = 6000
MAX_TAG = 8000


class TrackingError(RuntimeError):
    """MLflow could not be reached or refused what it was sent. Nothing is lost: the trial's files are the truth, and the next
    call, or ``--track-again``, sends what is missing."""


def metric_name(name: str) -> str:
    """A metric's name as MLflow allows it (letters, digits, ``_ - . / : space``, a clean path), different for different names.

    A last part with an argument is written with a colon: ``macro_f1(without Other)`` -> ``macro_f1:without Other``. Any other
    character that MLflow refuses, and the colon itself, becomes its code between colons: ``a(b`` -> ``a:28:b``. Names over
    250 characters end in a hash.

    Raises:
        TrackingError: the name is none of :data:`METRICS`.
    """
    if not _PATTERN.fullmatch(name):
        raise TrackingError(f"metric {name!r} is none of the names in pipelines.tracking.METRICS; add it there")
    return _allowed(name)


def _allowed(name: str) -> str:
    match = re.fullmatch(r"((?:.*/)?)(\w+)\((.*)\)", name, re.DOTALL)
    if match:
        safe = "".join(f"{_escape_part(part)}/" for part in match[1].split("/")[:-1]) + f"{match[2]}:{_escape(match[3], '/')}"
    else:
        safe = "/".join(_escape_part(part) for part in name.split("/"))
    if len(safe) <= MAX_NAME:
        return safe
    return f"{safe[: MAX_NAME - 17]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _escape_part(part: str) -> str:
    if part in ("", ".", ".."):  # MLflow reads names as paths; "::" stands for nothing at all
        return "".join(f":{ord(c):x}:" for c in part) or "::"
    return _escape(part)


def _escape(text: str, also: str = "") -> str:
    return "".join(c if re.match(r"[\w.\- ]|/", c) and c not in also else f":{ord(c):x}:" for c in text)


def params_of(trial: Planned) -> dict[str, str]:
    """The flattened ``TrialConfig`` as MLflow params. A value over 6000 characters is cut and ends in its length and hash."""
    flat = flatten(to_plain(trial.config))
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in flat.items()}
    return {_allowed(name): _shorten(value, MAX_PARAM) for name, value in text.items()}


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    end = f"... ({len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"
    return text[: limit - len(end)] + end


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def final_values(result: TrialResult) -> tuple[dict[str, float], dict[str, str]]:
    """A result's figures by metric name, and those that are undefined with their reason."""
    values: dict[str, float] = {"time/seconds": result.seconds, "cost/worker_hours": result.seconds * result.workers / 3600}
    values |= {f"params/{k}": float(v) for k, v in result.params.items() if k in ("total", "active", "trainable")}
    undefined = {name: "no finite value" for name, value in result.measurements.items() if not math.isfinite(value)}
    values |= {name: value for name, value in result.measurements.items() if name not in undefined}
    for split, tasks in result.scores.items():
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                if value is None or not math.isfinite(value):
                    undefined[f"score/{split}/{task}/{metric}"] = result.undefined.get(
                        f"{split}/{task}/{metric}", "no finite value"
                    )
                else:
                    values[f"score/{split}/{task}/{metric}"] = value
    return values, undefined


def default_uri(storage: Path) -> str:
    """``$MLFLOW_TRACKING_URI``, else an SQLite file beside the storage folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.resolve().parent / 'mlflow.db'}"


class _Child:
    """A trial's run: what the store holds of it."""

    def __init__(self, run_id: str, status: str, tags: dict[str, str]) -> None:
        self.run_id = run_id
        self.status = status
        self.tags = tags

    @property
    def sent(self) -> int:
        return int(self.tags.get("tracked_rows", "0"))


class Tracker:
    """The MLflow runs of one sweep. Methods may be called from any thread; each raises :class:`TrackingError`, after which the
    same call can be made again."""

    def __init__(
        self, uri: str | None, storage: Path, sweep_name: str, question: str = "", *, notes: Mapping[str, str] | None = None
    ) -> None:
        """Remember what to track; nothing is imported or opened before the first call.

        Args:
            uri: MLflow store; None: :func:`default_uri`.
            storage: folder that holds ``trials/``.
            sweep_name: name of the experiment and of its parent run.
            question: shown as the description of the parent run.
            notes: further tags for the parent run.
        """
        self.uri = uri or default_uri(storage)
        self.storage = storage
        self.sweep_name = sweep_name
        self.question = question
        self.notes = dict(notes or {})
        self._own_store = uri is None and not os.environ.get("MLFLOW_TRACKING_URI")
        self._lock = threading.RLock()
        self._trials: dict[str, Planned] = {}
        self._children: dict[str, _Child] = {}
        self._client: Any = None
        self._experiment = ""
        self._parent = ""
        self._parent_open = False
        self._again = False

    def start(self, trials: Iterable[Planned]) -> None:
        """Open the store (the database is made if need be), find or make the experiment and the parent run, and close the runs
        that a driver which died has left open. A trial's run is made when there is something to say about it."""
        with self._lock:
            self._trials = {trial.trial_id: trial for trial in trials}
            self._connect()

    def update(self, trial_id: str, upto_step: int | None, state: str = "running") -> None:
        """Send the journal rows up to the last checkpointed step (None: no row), and say where the trial stands."""
        with self._lock, self._reach(f"update of {trial_id}"):
            self._connect()
            child = self._open(trial_id, state)
            if upto_step is not None:
                self._push(child, TrialFolder(self.storage, trial_id), upto_step)

    def finish_trial(self, trial_id: str, result: TrialResult, gains: Mapping[str, float]) -> None:
        """Send what is left of the journal and the final figures, and close the run. Costs nothing when that has been done.

        A trial that another sweep has trained gets its final figures only. Gains that appear later (a baseline finished) are
        added by calling this again.
        """
        with self._lock, self._reach(f"result of {trial_id}"):
            self._connect()
            plain = asdict(result)
            tracked = _digest([plain, dict(gains)])
            child = self._children.get(trial_id)
            same = child is not None and child.tags.get("result") == _digest(plain) and child.status == "FINISHED"
            if child and same and not self._again:
                if child.tags.get("tracked") != tracked:
                    self._send_figures(child, result, gains, {"tracked": tracked})
                return
            if child and child.tags.get("result", _digest(plain)) != _digest(plain):
                self._replace(trial_id)  # trained anew: the old figures are no part of the new run
            self._send_result(trial_id, result, gains, {"result": _digest(plain), "tracked": tracked})

    def fail_trial(self, trial_id: str, error: str) -> None:
        """Send the rows up to the trial's last checkpoint, tag the reason and close the run as FAILED."""
        with self._lock, self._reach(f"failure of {trial_id}"):
            self._connect()
            child = self._children.get(trial_id)
            tags = {"status": "failed", "error": _shorten(error, MAX_TAG)}
            if child and child.status == "FAILED" and all(child.tags.get(k) == v for k, v in tags.items()):
                return
            child = self._open(trial_id, "failed")
            folder = TrialFolder(self.storage, trial_id)
            self._push(child, folder, int(folder.status().get("checkpoint", 0)))
            self._close_run(child, "FAILED", None)
            self._tag(child, tags)

    def finish_sweep(self, folder: Path, ok: bool, figures: Mapping[str, float] | None = None) -> None:
        """Attach comparison.csv, the report and plan.json to the parent run and close it, FINISHED or FAILED.

        Args:
            folder: the sweep's folder; what it does not hold is left out.
            ok: whether every trial finished.
            figures: headline numbers for the parent run (``Comparison.figures()``); only those that changed are sent.
        """
        with self._lock, self._reach("end of the sweep"):
            self._connect()
            self._leave_none_open()
            now = self._client.get_run(self._parent).data.metrics
            named = {metric_name(name): value for name, value in (figures or {}).items() if math.isfinite(value)}
            stamp = int(time.time() * 1000)
            self._log(self._parent, [(k, v, stamp, 0) for k, v in named.items() if now.get(k) != v])
            for name in ("comparison.csv", "plan.json", "report"):
                self._attach(self._parent, folder / name)
            self._log(self._parent, tags={"status": "finished" if ok else "failed"})
            self._client.set_terminated(self._parent, "FINISHED" if ok else "FAILED")
            self._parent_open = False

    def track_again(self, gains: Mapping[str, Mapping[str, float]]) -> int:
        """Rebuild the runs of all trials of the plan from their own files, whatever the store holds of them, and return how
        many runs were written. Nothing is stored twice; runs keep their ids.

        Args:
            gains: trial id -> its gains.
        """
        done = 0
        with self._lock:
            self._again = True
            try:
                for trial_id in self._trials:
                    done += self._rebuild(trial_id, gains.get(trial_id, {}))
            finally:
                self._again = False
        return done

    def close(self) -> None:
        """Close what is still open, as KILLED (an interrupted sweep can be continued); nothing after :meth:`finish_sweep`."""
        with self._lock:
            if self._client is None:
                return
            with self._reach("close"):
                self._leave_none_open()
                if self._parent_open:
                    self._log(self._parent, tags={"status": "interrupted"})
                    self._client.set_terminated(self._parent, "KILLED")
            self._client, self._parent, self._parent_open = None, "", False

    # -- connection ----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reach(self, what: str) -> Iterator[None]:
        """Turn what MLflow, its database and the network raise into one error."""
        try:
            errors = _mlflow_errors()
        except ImportError as error:
            raise TrackingError(f"MLflow cannot be imported: {error}") from error
        try:
            yield
        except errors as error:
            raise TrackingError(f"MLflow at {_without_password(self.uri)}: {what}: {_first_line(error)}") from error

    def _connect(self) -> None:
        if self._parent:
            return
        with self._reach("connect"):
            self._client = _open_client(self.uri)
            self._experiment = self._find_experiment()
            self._parent, self._children = self._find_runs()
            if not self._parent:
                tags = {"crosstalk.kind": "sweep", "sweep": self.sweep_name, "mlflow.runName": self.sweep_name}
                self._parent = self._client.create_run(self._experiment, tags=tags).info.run_id
            else:
                self._client.update_run(self._parent, status="RUNNING")
            self._parent_open = True
            note = {"mlflow.note.content": self.question} if self.question else {}
            self._log(self._parent, tags={"status": "running", **note, **self.notes})
            self._leave_none_open()

    def _find_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.sweep_name)
        if found is None:
            location = (self.storage.resolve().parent / "mlartifacts").as_uri() if self._own_store else None
            return self._client.create_experiment(self.sweep_name, artifact_location=location)
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _find_runs(self) -> tuple[str, dict[str, _Child]]:
        parent, children, token = "", {}, None
        while True:
            page = self._client.search_runs(
                [self._experiment], max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
            )
            for run in page:
                tags = dict(run.data.tags)
                if tags.get("crosstalk.kind") == "sweep" and tags.get("sweep") == self.sweep_name:
                    parent = parent or run.info.run_id
                elif "trial_id" in tags:
                    children.setdefault(tags["trial_id"], _Child(run.info.run_id, run.info.status, tags))
            token = page.token
            if not token:
                return parent, children

    def _leave_none_open(self) -> None:
        for child in self._children.values():
            if child.status == "RUNNING":
                self._tag(child, {"status": "interrupted"})
                self._close_run(child, "KILLED", None)

    # -- one run -------------------------------------------------------------------------------------------------------------

    def _open(self, trial_id: str, state: str) -> _Child:
        """The trial's run, open, with its params and tags; made when there is none."""
        journal = self._journal_stamp(trial_id)
        child = self._children.get(trial_id)
        if child and child.sent and journal and child.tags.get("journal", journal) != journal:
            self._replace(trial_id)  # started over (--fresh): the old curve is no part of the new one
            child = None
        if child is None:
            child = self._create(trial_id)
        elif child.status != "RUNNING":
            self._client.update_run(child.run_id, status="RUNNING")
            child.status = "RUNNING"
        tags = {"status": state} | ({"journal": journal} if journal else {})
        self._tag(child, tags)
        return child

    def _create(self, trial_id: str) -> _Child:
        trial = self._trials[trial_id]
        tags = {
            "crosstalk.kind": "trial",
            "mlflow.parentRunId": self._parent,
            "mlflow.runName": _shorten(f"{trial.configuration} seed={trial.seed}", MAX_NAME),
            "trial_id": trial_id,
            "family": trial.config.model.family,
            "role": trial.role,
            "seed": str(trial.seed),
            "configuration": _shorten(trial.configuration, MAX_TAG),
            "data_digest": _digest(dict(trial.config.digests)),
            **({"task": trial.task} if trial.task else {}),
        }
        run = self._client.create_run(self._experiment, start_time=self._started_ms(trial_id), tags=tags)
        child = self._children[trial_id] = _Child(run.info.run_id, "RUNNING", tags)
        params = params_of(trial)
        for names in _chunks(list(params), PARAMS_PER_BATCH):
            self._log(child.run_id, params={name: params[name] for name in names})
        return child

    def _replace(self, trial_id: str) -> None:
        self._client.delete_run(self._children.pop(trial_id).run_id)

    def _started_ms(self, trial_id: str) -> int | None:
        first = next(TrialFolder(self.storage, trial_id).rows(), None)
        return int(first["t"]) if first else None

    def _journal_stamp(self, trial_id: str) -> str:
        """What tells a trial's journal from the one of an earlier start: the time of its first row; empty without rows."""
        started = self._started_ms(trial_id)
        return "" if started is None else str(started)

    def _push(self, child: _Child, folder: TrialFolder, upto_step: int | None) -> None:
        """Send the journal's rows that have not been sent, up to a step (None: all)."""
        rows = list(takewhile(lambda row: upto_step is None or row["step"] <= upto_step, folder.rows()))
        start = 0 if self._again else child.sent
        batch: list[tuple[str, float, int, int]] = []
        for number, row in enumerate(islice(rows, start, None), start + 1):
            points = [
                (metric_name(k), float(v), int(row["t"]), int(row["step"])) for k, v in row["values"].items() if _finite(v)
            ]
            if batch and len(batch) + len(points) > METRICS_PER_BATCH:
                self._note_sent(child, batch, number - 1)
                batch = []
            batch += points
        if len(rows) > start:
            self._note_sent(child, batch, len(rows))

    def _note_sent(self, child: _Child, points: Sequence[tuple[str, float, int, int]], rows: int) -> None:
        tags = {"tracked_rows": str(max(rows, child.sent))}
        self._log(child.run_id, points, tags=tags)
        child.tags |= tags

    def _send_result(self, trial_id: str, result: TrialResult, gains: Mapping[str, float], digests: dict[str, str]) -> None:
        folder = TrialFolder(self.storage, trial_id)
        foreign = bool(result.sweep) and result.sweep != self.sweep_name
        child = self._open(trial_id, "finished")
        values, undefined = final_values(result)
        if not foreign:
            self._push(child, folder, None)
            values = {k: v for k, v in values.items() if k not in _keys_at(folder, result.steps)}
        self._send_figures(child, result, values | dict(gains), {})
        self._attach(child.run_id, folder.measurements)
        self._attach_routes(child.run_id, folder)
        tags = {
            **digests,
            "git_sha": result.git_sha,
            "host": result.host,
            "resumes": str(result.resume.get("count", 0)),
            **({"reused_from": result.sweep} if foreign else {}),
            **({"undefined": _shorten(json.dumps(undefined), MAX_TAG)} if undefined else {}),
        }
        self._close_run(child, "FINISHED", result.finished_ms)
        self._tag(child, tags)  # last: a run that has the digests needs nothing more

    def _send_figures(self, child: _Child, result: TrialResult, values: Mapping[str, float], tags: dict[str, str]) -> None:
        """Send final values, at the last step and with the time the trial finished at: the same points whenever sent."""
        points = [(metric_name(k), v, result.finished_ms, result.steps) for k, v in values.items() if math.isfinite(v)]
        self._log(child.run_id, points, tags=tags)
        child.tags |= tags

    def _tag(self, child: _Child, tags: Mapping[str, str]) -> None:
        changed = {name: value for name, value in tags.items() if child.tags.get(name) != value}
        self._log(child.run_id, tags=changed)
        child.tags |= changed

    def _rebuild(self, trial_id: str, gains: Mapping[str, float]) -> int:
        folder = TrialFolder(self.storage, trial_id)
        result, status = folder.result(), folder.status()
        if result is not None:
            self.finish_trial(trial_id, result, gains)
        elif status.get("state") == "failed":
            error = status.get("error") or {"type": "Error", "message": "no reason was written"}
            self.fail_trial(trial_id, f"{error['type']}: {_first_line(error['message'])}")
        else:
            return 0
        return 1

    def _close_run(self, child: _Child, status: str, end_ms: int | None) -> None:
        self._client.set_terminated(child.run_id, status, end_ms)
        child.status = status

    def _attach(self, run_id: str, path: Path) -> None:
        """Upload a file, or a folder under its own name; nothing where there is none."""
        try:
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), path.name)
            elif path.is_file():
                self._client.log_artifact(run_id, str(path))
        except Exception as error:  # each artifact store raises its own library's classes, which share no base
            raise TrackingError(f"MLflow cannot store {path}: {_first_line(error)}") from error

    def _attach_routes(self, run_id: str, folder: TrialFolder) -> None:
        """Upload a picture of how the finished trial routes its tasks; nothing for a trial that routes none."""
        files = routing_files(folder.measurements)
        if not files:
            return
        from pipelines.plots import route_map
        from pipelines.report import png_of

        picture = png_of(route_map(snapshot(read_arrays(files[max(files)])), {}))
        with tempfile.TemporaryDirectory() as aside:
            path = Path(aside, "routes.png")
            path.write_bytes(picture)
            self._attach(run_id, path)

    def _log(
        self,
        run_id: str,
        points: Sequence[tuple[str, float, int, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Send points (name, value, unix ms, step), params and tags; the tags with the last batch of points."""
        from mlflow.entities import Metric, Param, RunTag

        batches = list(_chunks(points, METRICS_PER_BATCH)) or [()]
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            metrics = [Metric(key, value, stamp, step) for key, value, stamp, step in batch]
            named = [Param(k, v) for k, v in (params or {}).items()] if last else []
            labels = [RunTag(k, v) for k, v in (tags or {}).items()] if last else []
            if metrics or named or labels:
                self._client.log_batch(run_id, metrics, named, labels)


def _open_client(uri: str) -> Any:
    mlflow = _import_mlflow()
    litter = Path("mlruns")  # MLflow makes this folder in the working directory for any SQL store, and we never use it
    existed = litter.exists()
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///"))
        if not database.exists():
            _make_database(mlflow, database)
        with contextlib.closing(sqlite3.connect(database, timeout=20)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    client = mlflow.MlflowClient(tracking_uri=uri)
    client.search_experiments(max_results=1)
    if not existed:
        with contextlib.suppress(OSError):
            litter.rmdir()
    return client


def _make_database(mlflow: Any, database: Path) -> None:
    """Make the tables aside and put the file in place whole: MLflow makes them one by one, and a process that is killed
    meanwhile would leave a database that no version can open. Where another process was faster, its file stays."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=database.parent, prefix=f".{database.name}.", ignore_cleanup_errors=True) as folder:
        draft, whole = Path(folder, "draft.db"), Path(folder, "whole.db")
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{draft}").search_experiments(max_results=1)
        with contextlib.closing(sqlite3.connect(draft)) as connection:
            connection.execute("VACUUM INTO ?", (str(whole),))
        with contextlib.suppress(FileExistsError):
            os.link(whole, database)


def _import_mlflow() -> Any:
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),  # its own 7 retries with back-off keep a sweep waiting for minutes
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("GIT_PYTHON_REFRESH", "quiet"),
    ):
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def _mlflow_errors() -> tuple[type[Exception], ...]:
    _import_mlflow()
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    return (MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError)


def _keys_at(folder: TrialFolder, step: int) -> set[str]:
    """Names that the journal holds at a step: their final value is there already."""
    return {key for row in folder.rows() if row["step"] == step for key, value in row["values"].items() if _finite(value)}


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _without_password(uri: str) -> str:
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)
