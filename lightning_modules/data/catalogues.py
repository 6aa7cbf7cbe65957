"""Catalogue files: YAML -> the entries of tasks, checked as far as that goes without their data. No torch here."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_modules.building import ConfigError
from lightning_modules.data import hub, posing
from lightning_modules.data.forms import FIELDS
from lightning_modules.data.kinds import KINDS
from lightning_modules.data.sources import placeholders

ENTRY_KEYS = (
    "name", "kind", "type", "category", "metric", "labels", "files", "hub", "planted", "format", "columns", "splits", "prompt",
    "answers", "low_resource", "where", "description",
)  # fmt: skip
"""What is read of a catalogue's entry."""

NOTES = (
    "licence", "license", "source", "redistribution", "notes", "note", "homepage", "citation", "url", "counts",
    "split_policy", "tag_vocabulary", "test_tag_coverage", "constituents", "label_range",
)  # fmt: skip
"""Keys of an entry that say something to people. Any other key is not read either, but the plan warns of it."""

_TYPES = {"parsing": "dependency"}
_FORMS: dict[str, type] = {
    "labels": list, "files": dict, "planted": dict, "format": str, "columns": dict, "splits": dict, "prompt": str,
    "answers": dict, "where": dict, "description": str,
}  # fmt: skip


class Entry(NamedTuple):
    """One task of a catalogue as it is written there, ``defaults`` merged."""

    values: dict[str, Any]
    """``kind`` is there in any case."""
    suite: dict[str, Any]
    """Parameters that all planted tasks of the catalogue share."""
    root: Path
    """Folder that relative file paths start from."""
    where: str
    """Place for messages."""


def read_catalogue(file: Path, shown: str) -> Iterator[Entry]:
    """The entries of a catalogue, called ``shown`` in messages.

    Raises:
        ConfigError: the file is missing or no YAML, or an entry is malformed.
    """
    if not file.is_file():
        raise ConfigError("catalogues", f"no such file: {shown} (looked for {file})")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("catalogues", f"{shown} is not valid YAML: {' '.join(str(error).split())}") from None
    entries = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ConfigError("catalogues", f"{shown} must have a list under 'tasks'")
    _check_keys(content, ("tasks", "planted", "defaults", "root"), shown)
    suite, defaults, root = content.get("planted", {}), content.get("defaults", {}), content.get("root", "")
    for name, value in (("planted", suite), ("defaults", defaults)):
        if not isinstance(value, dict):
            raise ConfigError("catalogues", f"{shown}: {name} must be a mapping, got {value!r}")
    if not isinstance(root, str):
        raise ConfigError("catalogues", f"{shown}: root must be text, got {root!r}")
    for i, entry in enumerate(entries):
        where = f"{shown}: tasks[{i}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ConfigError("catalogues", f"{where} must be a mapping with a name")
        values = _merged(defaults, entry)
        kind = values.get("kind", values.get("type"))
        values["kind"] = _TYPES.get(kind, kind) if isinstance(kind, str) else kind
        where = f"{where} ({entry['name']})"
        _check_keys(values, ENTRY_KEYS, where)
        try:
            _check_entry(values)
        except ValueError as error:
            raise ConfigError("catalogues", f"{where} {error}") from None
        yield Entry(values, suite, file.parent / root, where)


def _merged(defaults: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**defaults, **entry}
    for name, value in entry.items():
        if isinstance(value, dict) and isinstance(defaults.get(name), dict):
            merged[name] = _merged(defaults[name], value)
    return merged


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        near = difflib.get_close_matches(str(key), known, 1, 0.8)
        if key not in known and near:
            raise ConfigError("catalogues", f"{where} has an unknown key {key!r}; did you mean {near[0]}?")


def _check_entry(entry: Mapping[str, Any]) -> None:
    """Raise ValueError with the law that the entry breaks."""
    name, kind = entry["name"], entry["kind"]
    named = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./-]*", name) is not None
    _require(named, f"must have a name of letters, digits and _ . / -, got {name!r}")
    _require(isinstance(kind, str), f"must have a kind (or type), one of {', '.join(KINDS)}")
    for key, form in _FORMS.items():
        words = {list: "a list", dict: "a mapping", str: "text"}[form]
        _require(isinstance(entry.get(key), (form, type(None))), f"must have {key} as {words}, got {entry.get(key)!r}")
    data = [key for key in ("files", "hub", "planted") if entry.get(key) is not None]
    law = "must have files: {train, dev, test}, hub: {path, config, revision} or planted: {...}"
    _require(len(data) == 1, f"{law}, got {' and '.join(data) or 'none of them'}")
    if "hub" in data:
        hub.check(entry["hub"])
    for source, path in (entry.get("files") or {}).items():
        _require(isinstance(path, str), f"must have text under files.{source}, got {path!r}")
    for field, column in (entry.get("columns") or {}).items():
        _check_column(kind, field, column)
    if entry.get("prompt"):
        posing.check_prompt(kind, entry["prompt"])
    if entry.get("answers"):
        posing.check_answers(kind, entry["answers"])


def _check_column(kind: str, field: str, column: Any) -> None:
    known = FIELDS.get(kind, ())
    _require(not known or field in known, f"must have columns of {kind} ({', '.join(known)}), got {field!r}")
    if isinstance(column, dict):
        law = f"must have columns.{field} as a column, template, list or {{column, regex}}, got {column!r}"
        _require(set(column) == {"column", "regex"} and all(isinstance(part, str) for part in column.values()), law)
        try:
            groups = re.compile(column["regex"]).groups
        except re.error as error:
            raise ValueError(f"must have a regular expression under columns.{field}.regex: {error}") from None
        _require(groups <= 1, f"must have at most one group in columns.{field}.regex, got {column['regex']!r}")
        column = column["column"]
    names = column if isinstance(column, list) else [column]
    texts = bool(names) and all(isinstance(name, str) for name in names)
    _require(texts, f"must have text under columns.{field}, got {column!r}")
    for name in names:
        placeholders(name)


def _require(condition: bool, law: str) -> None:
    if not condition:
        raise ValueError(law)
