"""Data sets of the Hugging Face Hub as rows on disk: downloaded once, then read without a network. No torch here."""

import datetime
import decimal
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.building import ConfigError
from lightning_modules.files import atomic_folder

if TYPE_CHECKING:
    from lightning_modules.data.tasks import TaskSpec

KEYS = ("path", "config", "revision")
ROWS, CLASSES = "rows.jsonl", "classes.json"


def check(hub: Any) -> None:
    """Raise ValueError with the law that an entry's ``hub`` breaks. A missing revision is refused where the task is used."""
    if not isinstance(hub, dict) or not isinstance(hub.get("path"), str) or set(hub) - set(KEYS):
        raise ValueError(f"must have hub: {{path, config, revision}}, got {hub!r}")
    if not isinstance(hub.get("config"), (str, type(None))):
        raise ValueError(f"must have hub.config as text, got {hub['config']!r}")
    revision = hub.get("revision")
    if revision is not None and (not isinstance(revision, str) or re.fullmatch(r"[0-9a-f]{40}", revision) is None):
        raise ValueError(f"must have hub.revision as a commit, 40 hex digits (a branch can change), got {revision!r}")


def folder(spec: "TaskSpec", split: str) -> Path:
    """The folder with one split of the task's Hub data set (:data:`ROWS`, :data:`CLASSES`), downloaded where it is not
    there yet: under ``$CROSSTALK_CACHE``, or ``~/.cache/crosstalk``. With it there, ``datasets`` is not even imported.

    Raises:
        ConfigError: its revision is not pinned, or it cannot be downloaded; the message says what to do.
    """
    key = f"{spec.catalogue}: task {spec.name}"
    if spec.hub.get("revision") is None:
        law = f"hub.revision must be pinned to a commit of {spec.hub['path']}, 40 hex digits (its page lists them), got null"
        raise ConfigError(key, law)
    root = Path(os.environ.get("CROSSTALK_CACHE") or "~/.cache/crosstalk").expanduser()
    content = json.dumps([spec.hub.get(key) for key in KEYS] + [split])
    found = root / "hub" / hashlib.sha256(content.encode()).hexdigest()[:24]
    if not found.is_dir():
        if Path(spec.hub["path"]).exists():
            law = f"hub.path {spec.hub['path']!r} is a local folder here, which would be read in place of the Hub"
            raise ConfigError(key, law)
        rows = _download(spec.hub, split, key, found)
        with atomic_folder(found) as temporary:
            _store(rows, temporary, key, split)
    return found


def shown(hub: Mapping[str, Any], split: str) -> str:
    """A split for messages, e.g. ``nyu-mll/glue/sst2@1234abcd train``."""
    return f"{'/'.join(part for part in (hub['path'], hub.get('config')) if part)}@{hub['revision'][:8]} {split}"


def _download(hub: Mapping[str, Any], split: str, key: str, folder: Path) -> Any:
    import datasets

    try:
        return datasets.load_dataset(hub["path"], hub.get("config"), revision=hub["revision"], split=split)
    # The errors of the Hub's clients have no common base (OSError, httpx, ValueError for a wrong configuration or split, ...).
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        law = (
            f"cannot read {shown(hub, split)} from the Hub ({type(error).__name__}: {reason}). Check path, config, revision "
            f"and split; the first read needs the network, later ones only {folder}"
        )
        raise ConfigError(key, law) from error


def _store(rows: Any, folder: Path, key: str, split: str) -> None:
    # A class that is called by a number would be taken for the place of another one.
    numbers = {
        column: feature.names
        for column, feature in rows.features.items()
        if any(re.fullmatch(r"-?\d+", name) for name in getattr(feature, "names", ()))
    }
    with (folder / ROWS).open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            named = {c: names[row[c]] for c, names in numbers.items() if row[c] is not None and 0 <= row[c] < len(names)}
            try:
                file.write(json.dumps({**row, **named}, default=_as_text) + "\n")
            except TypeError as error:
                raise ConfigError(key, f"{split}: example {i} is not made of text, numbers and lists: {error}") from None
    (folder / CLASSES).write_text(json.dumps(dict(_classes(rows.features, ""))))


def _as_text(value: Any) -> str:
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)):
        return str(value)
    raise TypeError(f"got {type(value).__name__}")


def _classes(feature: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    """Dotted path -> names, for every class label in a data set's features (a column, or a list of them)."""
    if isinstance(feature, Mapping):
        for name, inner in feature.items():
            yield from _classes(inner, f"{path}.{name}" if path else name)
    elif hasattr(feature, "names"):
        yield path, feature.names
    elif isinstance(feature, list):
        yield from _classes(feature[0], path)
    elif hasattr(feature, "feature"):
        yield from _classes(feature.feature, path)


def class_names(spec: "TaskSpec", source: str, field: str) -> tuple[str, ...]:
    """The names that the Hub's data set gives the numbers in the column of ``field``; () where it gives none."""
    if not spec.hub:
        return ()
    column = spec.columns.get(field, field)
    classes = json.loads((folder(spec, source) / CLASSES).read_text())
    return tuple(classes.get(column, ())) if isinstance(column, str) else ()
