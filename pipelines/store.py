"""A trial's folder: what is written where, atomically, and read back. Knows files only (no torch, Ray or MLflow).

``<storage>/trials/<trial_id>/`` holds ``config.yaml``, ``status.json`` (where the trial stands), ``result.json`` (only
when it has finished), ``metrics.jsonl`` (the journal: one line per logged step), ``checkpoints/`` and ``measurements/``.
These files are the truth; MLflow is a view of them.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.building import build
from lightning_modules.config import TrialConfig, to_plain
from lightning_modules.files import atomic_file


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """What a finished trial says. Written once, as ``result.json``, after everything else of the trial is on disk."""

    trial_id: str
    status: str
    """``finished``."""
    scores: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    """split -> task -> metric -> value; None where a score is undefined (the reason stands in ``undefined``)."""
    undefined: Mapping[str, str] = field(default_factory=dict)
    """``split/task/metric`` -> why the score is undefined."""
    primary: Mapping[str, str] = field(default_factory=dict)
    """task -> the metric that its comparison uses."""
    steps: int
    seconds: float
    """Wall seconds of training and scoring that led to the result, start-up excluded: over all attempts, without what an
    attempt did after its last checkpoint and lost."""
    started_ms: int
    finished_ms: int
    """Unix milliseconds; the finish time stamps the final points in MLflow."""
    resume: Mapping[str, Any] = field(default_factory=lambda: {"count": 0, "exact": True})
    """``count``: how often the trial went on from a checkpoint. ``exact``: whether each resume met the state it had left."""
    floors: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    """split -> task -> metric -> score of the trivial answer (majority class and the like) on the same examples."""
    params: Mapping[str, int] = field(default_factory=dict)
    """``total``, ``trainable`` (and ``trainable/PART``, see ``config.Part``) and ``active`` (what one example of one task
    touches) parameter counts."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """task -> ``{train, dev, test: examples used, windowed: inputs read in several windows, cut_tokens: tokens beyond
    ``max_windows``, cut_target_tokens: beyond ``max_target_length``}``, the last three over all of the task's examples."""
    measurements: Mapping[str, float] = field(default_factory=dict)
    """Single numbers measured at the end, by their metric name (``route/0/nmi``); arrays stand in ``measurements/*.npz``."""
    workers: int = 1
    sweep: str = ""
    """Name of the sweep that trained it."""
    host: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    git_sha: str = ""


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with atomic_file(path) as file:
        file.write(text)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return None  # a torn file of a writer that is not ours: as good as absent, the trial writes it again
    return value if isinstance(value, dict) else None


class TrialFolder:
    """The files of one trial under a storage folder."""

    def __init__(self, storage: Path, trial_id: str) -> None:
        self.trial_id = trial_id
        self.path = storage / "trials" / trial_id

    @property
    def checkpoints(self) -> Path:
        """Folder of the trial's checkpoints."""
        return self.path / "checkpoints"

    @property
    def measurements(self) -> Path:
        """Folder of measured arrays (``.npz``)."""
        return self.path / "measurements"

    @property
    def journal(self) -> Path:
        """The journal of logged values."""
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """What the trial's processes print."""
        return self.path / "log.txt"

    def write_config(self, config: TrialConfig) -> None:
        """Write ``config.yaml``, from which workers read what they are to train."""
        write_text(self.path / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))

    def read_config(self) -> TrialConfig:
        """The configuration that :meth:`write_config` wrote.

        Raises:
            ConfigError: the file was written by another version and no longer fits.
        """
        return build(TrialConfig, yaml.safe_load((self.path / "config.yaml").read_text()), str(self.path / "config.yaml"))

    def result(self) -> TrialResult | None:
        """The result, or None while there is none (or one of another trial or version of the file)."""
        plain = _read_json(self.path / "result.json")
        if plain is None or plain.get("trial_id") != self.trial_id or plain.get("status") != "finished":
            return None
        known = {f.name for f in fields(TrialResult)}
        return TrialResult(**{k: v for k, v in plain.items() if k in known})

    def write_result(self, result: TrialResult) -> None:
        """Write ``result.json``: the trial is finished when it is there."""
        write_text(self.path / "result.json", json.dumps(asdict(result), indent=1, sort_keys=True, allow_nan=False))

    def status(self) -> dict[str, Any]:
        """``state`` (new / running / retrying / interrupted / failed / finished), ``checkpoint`` (its step), ``error``...;
        {} when the trial was never started."""
        return _read_json(self.path / "status.json") or {}

    def write_status(self, **changes: Any) -> None:
        """Change some entries of ``status.json``; only one process at a time writes a trial's status."""
        write_text(self.path / "status.json", json.dumps({**self.status(), **changes}, indent=1))

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Append journal rows ``{"t": unix ms, "step": int, "values": {metric: float}}``."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.journal.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> Iterator[dict[str, Any]]:
        """The journal's rows in order; a torn last line (a writer that died in it) ends the reading."""
        try:
            file = self.journal.open()
        except FileNotFoundError:
            return
        with file:
            for line in file:
                if not line.endswith("\n"):
                    return
                yield json.loads(line)

    def rewind(self, step: int) -> None:
        """Drop the journal's rows after ``step``: a resumed trial writes them again."""
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        if self.journal.exists():
            write_text(self.journal, "".join(kept))
