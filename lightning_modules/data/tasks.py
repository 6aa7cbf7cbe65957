"""Tasks and catalogues: what a task is, where its examples are, and whether they can be read. No torch here.

A catalogue is a YAML file with ``tasks:``, a list of entries. An entry names its data by ``files`` (local JSONL) or by
``planted`` (generated, see :mod:`lightning_modules.data.planted`).
"""

import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from lightning_modules.config import ConfigError
from lightning_modules.data import planted

Kind = Literal["classification", "regression", "tagging"]
Split = Literal["train", "dev", "test"]
KINDS: tuple[str, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "mcc", "f1_positive"),
    "regression": ("pearson", "spearman", "mse"),
    "tagging": ("accuracy", "span_f1"),
}
"""Scores that a kind can be compared by. ``f1_positive(LABEL)`` and ``macro_f1(without LABEL)`` take a label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSpec:
    """One task of a catalogue."""

    name: str
    kind: str
    """What the output looks like: one of :data:`KINDS`."""
    metric: str
    """The score that comparisons use, as the catalogue writes it."""
    category: str = ""
    """Human category, e.g. ``classification/sentiment``."""
    labels: tuple[str, ...] = ()
    """Closed label set of classification and tagging."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """split -> absolute path of a JSONL file; empty for planted tasks."""
    planted: Mapping[str, Any] = field(default_factory=dict)
    """Parameters for the generator; empty for tasks in files."""
    low_resource: int | None = None
    """Training examples that the catalogue leaves the task; None: all."""
    catalogue: str = ""
    """The catalogue file it was read from, for messages."""

    def read(self, split: Split) -> Iterator[dict[str, Any]]:
        """The examples of a split in file order, checked: classification and regression ``{text, text_pair?, label}``,
        tagging ``{tokens, tags}``.

        Raises:
            ConfigError: with file and line number, when a line is torn or an example breaks its kind's form.
        """
        if self.planted:
            try:
                yield from planted.generate(self.planted, split)
            except ValueError as error:
                raise ConfigError(f"{self.catalogue}: task {self.name}", str(error)) from None
            return
        for row, place in _json_lines(self.files[split]):
            _check_row(self, row, place)
            yield row

    def digest(self) -> str:
        """16 hex digits of everything about the task that can change a trial's numbers: its form and its data's content."""
        head = {"kind": self.kind, "metric": self.metric, "labels": self.labels, "low_resource": self.low_resource}
        if self.planted:
            head["planted"] = dict(self.planted)
            head["version"] = planted.VERSION
        content = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        for split in SPLITS:
            if split in self.files:
                content.update(hashlib.sha256(self.files[split].read_bytes()).digest())
        return content.hexdigest()[:16]


def load_catalogues(paths: Sequence[str | Path], base: Path) -> dict[str, TaskSpec]:
    """All tasks of the catalogues by name, in file order. Relative paths are looked up from ``base``.

    Entries of kinds that are not supported yet are kept (so that patterns can say why they cannot be used).

    Raises:
        ConfigError: a catalogue is missing or malformed, or two catalogues define the same task.
    """
    tasks: dict[str, TaskSpec] = {}
    for path in paths:
        file = (base / path).resolve()
        for spec in _load_catalogue(file, str(path)):
            if spec.name in tasks:
                raise ConfigError(
                    "catalogues", f"{path} defines task {spec.name!r}, which {tasks[spec.name].catalogue} has defined"
                )
            tasks[spec.name] = spec
    return tasks


def _load_catalogue(file: Path, shown: str) -> Iterator[TaskSpec]:
    if not file.is_file():
        raise ConfigError("catalogues", f"no such file: {shown} (looked for {file})")
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("catalogues", f"{shown} is not valid YAML: {' '.join(str(error).split())}") from None
    entries = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ConfigError("catalogues", f"{shown} must have a list under 'tasks'")
    suite = content.get("planted", {})
    if not isinstance(suite, dict):
        raise ConfigError("catalogues", f"{shown}: planted must be a mapping, got {suite!r}")
    for i, entry in enumerate(entries):
        where = f"{shown}: tasks[{i}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ConfigError("catalogues", f"{where} must be a mapping with a name")
        yield _read_entry(entry, suite, file, shown, f"{where} ({entry['name']})")


ENTRY_KEYS = ("name", "kind", "type", "category", "metric", "labels", "files", "planted", "low_resource")
"""What is read of a catalogue's entry; others are notes (licence, source...) unless they look like a slip of these."""


def _read_entry(entry: dict[str, Any], suite: dict[str, Any], file: Path, shown: str, where: str) -> TaskSpec:
    _check_entry(entry, where)
    name, kind = entry["name"], str(entry.get("kind", entry.get("type")))
    labels, generator = entry.get("labels") or (), {}
    if "planted" in entry:
        generator = {**suite, **entry["planted"], "name": name, "kind": kind}
        try:
            labels = planted.labels(generator)
        except ValueError as error:
            raise ConfigError("catalogues", f"{where}: {error}") from None
    return TaskSpec(
        name=name,
        kind=kind,
        metric=str(entry.get("metric", "accuracy")),
        category=str(entry.get("category", "")),
        labels=tuple(str(label) for label in labels),
        files={split: file.parent / path for split, path in (entry.get("files") or {}).items()},
        planted=generator,
        low_resource=entry.get("low_resource"),
        catalogue=shown,
    )


def _check_entry(entry: dict[str, Any], where: str) -> None:
    def require(condition: bool, law: str) -> None:
        if not condition:
            raise ConfigError("catalogues", f"{where} {law}")

    name = entry["name"]
    require(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./-]*", name) is not None,
        f"must have a name of letters, digits and _ . / -, got {name!r}",
    )
    for key in entry:
        near = difflib.get_close_matches(str(key), [k for k in ENTRY_KEYS if k not in entry], 1, 0.8)
        require(key in ENTRY_KEYS or not near, f"has an unknown key {key!r}; did you mean {''.join(near)}?")
    kind = entry.get("kind", entry.get("type"))
    require(isinstance(kind, str), f"must have a kind (or type), one of {', '.join(KINDS)}")
    require(isinstance(entry.get("labels") or [], list), f"must have labels as a list, got {entry.get('labels')!r}")
    if "planted" in entry:
        require(isinstance(entry["planted"], dict), f"must have planted as a mapping, got {entry['planted']!r}")
        return
    files = entry.get("files")
    require(isinstance(files, dict), "must have files: {train, dev, test} or planted: {...}")
    for split, path in (files or {}).items():
        require(isinstance(path, str), f"must have text under files.{split}, got {path!r}")


def select(tasks: Mapping[str, TaskSpec], patterns: Sequence[str], key: str) -> list[str]:
    """The names that ``patterns`` stand for, in catalogue order.

    A pattern is a name with ``*`` and ``?``, ``category:PATTERN`` or ``kind:PATTERN``; a leading ``!`` removes its matches.

    Raises:
        ConfigError: a pattern matches nothing (with the nearest names and the catalogues), or nothing is left.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        matches = {name for name, spec in tasks.items() if _matches(spec, pattern.removeprefix("!"))}
        if not matches:
            near = difflib.get_close_matches(pattern, list(tasks), 3, 0.4)
            catalogues = ", ".join(sorted({spec.catalogue for spec in tasks.values()})) or "no catalogue"
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(key, f"no task matches {pattern!r} in {catalogues}{hint}")
        chosen = chosen - matches if pattern.startswith("!") else chosen | matches
    if not chosen:
        raise ConfigError(key, f"must name at least one task, got {list(patterns)}")
    return [name for name in tasks if name in chosen]


def _matches(spec: TaskSpec, pattern: str) -> bool:
    if pattern.startswith("category:"):
        return fnmatch.fnmatchcase(spec.category, pattern.removeprefix("category:"))
    if pattern.startswith("kind:"):
        return fnmatch.fnmatchcase(spec.kind, pattern.removeprefix("kind:"))
    return fnmatch.fnmatchcase(spec.name, pattern)


def metric_parts(metric: str) -> tuple[str, str]:
    """``"macro_f1(without Other)"`` -> ``("macro_f1", "without Other")``; no argument -> ``""``."""
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", metric)
    return (match[1], match[2] or "") if match else (metric, "")


def check(spec: TaskSpec) -> dict[str, int]:
    """Read the whole task and return the number of examples per split.

    Raises:
        ConfigError: the kind, metric, labels or a file is unusable, or an example is malformed (file and line are named).
    """
    key = f"{spec.catalogue}: task {spec.name}"
    if spec.kind not in KINDS:
        raise ConfigError(key, f"kind must be one of {', '.join(KINDS)}, got {spec.kind!r}")
    name, argument = metric_parts(spec.metric)
    if name not in METRICS[spec.kind]:
        raise ConfigError(key, f"metric must be one of {', '.join(METRICS[spec.kind])} for {spec.kind}, got {spec.metric!r}")
    form = {"f1_positive": "LABEL", "macro_f1": "without LABEL"}.get(name, "")
    label = argument.removeprefix("without ") if name == "macro_f1" else argument
    if argument and (not form or (name == "macro_f1" and label == argument)):
        raise ConfigError(key, f"metric must be {name}{f'({form})' if form else ''}, got {spec.metric!r}")
    if label and label not in spec.labels:
        raise ConfigError(key, f"metric {spec.metric!r} names a label that is not in labels {list(spec.labels)}")
    if name == "f1_positive" and not argument:
        raise ConfigError(key, "metric f1_positive must name its label: f1_positive(LABEL)")
    if spec.kind != "regression" and len(spec.labels) < 2:
        raise ConfigError(key, f"must list at least two labels, got {list(spec.labels)}")
    if spec.low_resource is not None and (type(spec.low_resource) is not int or spec.low_resource < 1):
        raise ConfigError(key, f"low_resource must be a whole number of examples, at least 1, got {spec.low_resource!r}")
    if not spec.planted:
        for split in SPLITS:
            if split not in spec.files:
                raise ConfigError(key, f"files must have train, dev and test, got {sorted(spec.files)}")
            if not spec.files[split].is_file():
                raise ConfigError(key, f"no such file: {spec.files[split]}")
    counts = {
        split: planted.count(spec.planted, split) if spec.planted else sum(1 for _ in spec.read(split)) for split in SPLITS
    }
    for split, n in counts.items():
        if n == 0:
            raise ConfigError(key, f"{split} has no examples ({spec.files.get(split, 'planted')})")
    return counts


def _json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    with path.open(encoding="utf-8", errors="strict") as file:
        try:
            for number, line in enumerate(file, 1):
                place = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ConfigError(place, f"must be one JSON object per line, got {line.strip()[:60]!r} ({error})") from None
                if not isinstance(row, dict):
                    raise ConfigError(place, f"must be one JSON object per line, got {line.strip()[:60]!r}")
                yield row, place
        except UnicodeDecodeError as error:
            raise ConfigError(str(path), f"must be UTF-8: {error}") from None


def _check_row(spec: TaskSpec, row: dict[str, Any], place: str) -> None:
    if spec.kind == "tagging":
        if "predicate_index" in row:
            raise ConfigError(
                place, "column predicate_index belongs to kind srl, which is not supported yet; tagging would ignore it"
            )
        tokens, tags = row.get("tokens"), row.get("tags")
        if not isinstance(tokens, list) or not isinstance(tags, list) or not all(isinstance(t, str) for t in tokens):
            raise ConfigError(place, f"tagging needs tokens and tags, two lists of text, got {_shorten(row)}")
        _check_text(place, *tokens)
        if len(tokens) != len(tags) or not tokens:
            raise ConfigError(
                place, f"tokens and tags must have the same length, at least 1, got {len(tokens)} and {len(tags)}"
            )
        unknown = [tag for tag in tags if tag not in spec.labels]
        if unknown:
            raise ConfigError(place, f"tag must be one of the task's {len(spec.labels)} labels, got {unknown[0]!r}")
        return
    if not isinstance(row.get("text"), str) or not isinstance(row.get("text_pair", ""), str):
        raise ConfigError(place, f"{spec.kind} needs text (and text_pair) to be text, got {_shorten(row)}")
    _check_text(place, row["text"], row.get("text_pair", ""))
    label = row.get("label")
    if spec.kind == "regression":
        if isinstance(label, bool) or not isinstance(label, (int, float)) or not -1e30 < label < 1e30:
            raise ConfigError(place, f"label must be a finite number, got {label!r}")
    elif label not in spec.labels:
        raise ConfigError(place, f"label must be one of {', '.join(spec.labels[:12])}, got {label!r}")


def _check_text(place: str, *texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(place, f"text must be valid Unicode: {error}") from None


def _shorten(row: dict[str, Any]) -> str:
    text = json.dumps(row)
    return text if len(text) <= 80 else text[:77] + "..."
