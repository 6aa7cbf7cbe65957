"""From a source's columns to the rows of a kind: numbers to labels, BIO tags to spans, one row per predicate to frames. No
torch here."""

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lightning_modules.building import ConfigError
from lightning_modules.data.kinds import check_row, is_index, is_spans, is_texts
from lightning_modules.data.sources import Rows, pick

if TYPE_CHECKING:
    from lightning_modules.data.tasks import TaskSpec

FIELDS: dict[str, tuple[str, ...]] = {
    "classification": ("text", "text_pair", "label"),
    "regression": ("text", "text_pair", "label"),
    "choice": ("text", "options", "label", "keys"),
    "tagging": ("tokens", "tags", "predicate_index"),
    "spans": ("tokens", "spans", "tags"),
    "dependency": ("tokens", "heads", "deprels"),
    "constituency": ("tokens", "spans"),
    "srl": ("tokens", "frames", "predicate_index", "tags"),
    "text2text": ("text", "target", "targets", "input"),
}
"""kind -> the fields that are read. ``keys``: names of the options, of which ``label`` is one; spans may be given as BIO
``tags``, frames as one row per predicate (``predicate_index``, BIO ``tags``), and text2text's ``text`` may be called
``input``."""

NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "classification": (("text",), ("label",)),
    "regression": (("text",), ("label",)),
    "choice": (("text",), ("options",), ("label",)),
    "tagging": (("tokens",), ("tags",)),
    "spans": (("tokens",), ("spans", "tags")),
    "dependency": (("tokens",), ("heads",), ("deprels",)),
    "constituency": (("tokens",), ("spans",)),
    "srl": (("tokens",), ("frames", "predicate_index")),
    "text2text": (("text", "input"), ("target", "targets")),
}
"""kind -> what a row must have, each with its alternatives."""

LABEL_FIELD = {"classification": "label", "tagging": "tags", "spans": "tags", "srl": "tags"}
"""kind -> the field that may hold numbers of labels, or of their BIO tags, in place of names."""

_VERBS = ("V", "C-V")
"""Roles of BIO tags that mark the predicate itself."""


def listed(kind: str, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The label set, and what numbers in the data stand for, from the names that a catalogue lists. They differ where the names
    are BIO tags of spans or roles, and for choice, which has no label set: there they are the options' keys (A, B, ...)."""
    if kind == "choice":
        return (), tuple(names)
    if kind in ("spans", "srl") and names and all(_tag_type(name) is not None for name in names):
        types = dict.fromkeys(t for name in names if (t := _tag_type(name)) and t not in (_VERBS if kind == "srl" else ()))
        return tuple(types), tuple(names)
    return tuple(names), tuple(names)


def examples(spec: "TaskSpec", rows: Rows) -> Rows:
    """The rows of a source in their kind's form, checked.

    Raises:
        ConfigError: with the row's place: a column is not there, or as :func:`check_row`.
    """
    rows = ((_fields(spec, row, place), place) for row, place in rows)
    if spec.kind == "srl":
        rows = _joined(spec, rows)
    for row, place in rows:
        row = _formed(spec, row, place)
        check_row(spec, row, place)
        yield row, place


def _fields(spec: "TaskSpec", row: Mapping[str, Any], place: str) -> dict[str, Any]:
    picked = pick(row, spec.columns, FIELDS[spec.kind], place)
    for alternatives in NEEDED[spec.kind]:
        if not any(name in picked for name in alternatives):
            names = " or ".join(alternatives)
            law = f"{spec.kind} needs {names}, which columns: does not name and the row lacks or leaves empty"
            raise ConfigError(place, f"{law}; the row has {', '.join(map(str, row)) or 'no columns'}")
    return picked


def _formed(spec: "TaskSpec", row: dict[str, Any], place: str) -> dict[str, Any]:
    match spec.kind:
        case "classification" if "label" in row:
            row["label"] = _name(row["label"], spec.keys or spec.labels)
        case "regression" if isinstance(row.get("label"), str):
            row["label"] = _to_number(row["label"])
        case "choice" if "label" in row:
            row["label"] = _option(row.pop("keys", spec.keys), row["label"])
        case "tagging" if isinstance(row.get("tags"), list):
            row["tags"] = [_name(tag, spec.keys or spec.labels) for tag in row["tags"]]
        case "spans" if "spans" not in row and _aligned(row, "tags"):
            row["spans"] = [list(span) for span in bio_spans(_bio(spec, row["tags"], place))]
        case "constituency" if is_spans(row.get("spans")):
            row["spans"] = sorted(row["spans"], key=lambda span: (span[0], -span[1]))
        case "text2text":
            if "input" in row:
                row.setdefault("text", row["input"])
            if "target" not in row and row.get("targets"):
                row["target"] = row["targets"][0]
    if spec.kind != "tagging":  # kind tagging refuses the fields of its neighbours
        for name in ("tags", "predicate_index", "input", "keys"):
            row.pop(name, None)
    return row


def _name(value: Any, names: Sequence[str]) -> Any:
    """The label that ``value`` stands for: itself, or where it is a number its place in ``names``, unless those are numbers."""
    if isinstance(value, bool):
        value = str(value).lower() if not names or str(value).lower() in names else int(value)
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    elif isinstance(value, str) and names and value not in names and re.fullmatch(r"-?\d+", value):
        value = int(value)
    if not isinstance(value, int):
        return value
    if not names or _has_numbers(tuple(names)):
        return str(value)
    return names[value] if 0 <= value < len(names) else value


@lru_cache(maxsize=64)
def _has_numbers(names: tuple[str, ...]) -> bool:
    return any(re.fullmatch(r"-?\d+", name) for name in names)


def _to_number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _option(keys: Any, label: Any) -> Any:
    if isinstance(keys, (list, tuple)) and keys and str(label) in map(str, keys):
        return [str(key) for key in keys].index(str(label))
    if isinstance(label, str) and re.fullmatch(r"\d+", label) and not keys:
        return int(label)
    return label


def _tag_type(tag: Any) -> str | None:
    """``B-PER`` and ``I-PER`` -> ``PER``, ``O`` -> "", anything else -> None."""
    if tag == "O":
        return ""
    return tag[2:] if isinstance(tag, str) and tag[:2] in ("B-", "I-") and len(tag) > 2 else None


def _bio(spec: "TaskSpec", tags: list[Any], place: str) -> list[str]:
    named = [_name(tag, spec.keys) for tag in tags]
    for tag in named:
        if _tag_type(tag) is None:
            raise ConfigError(place, f"tag must be O, B-... or I-..., got {tag!r}")
    return named


def bio_spans(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """(start, end, type) of each span in BIO tags, end exclusive. As conlleval and seqeval's default mode have it, an I- that
    follows O or another type begins a span."""
    found: list[tuple[int, int, str]] = []
    previous, start = "O", 0
    for i, tag in enumerate([*tags, "O"]):
        inside = tag.startswith("I-") and previous[1:] == tag[1:]
        if previous != "O" and not inside:
            found.append((start, i, previous[2:]))
        if tag != "O" and not inside:
            start = i
        previous = tag
    return found


def _joined(spec: "TaskSpec", rows: Rows) -> Rows:
    """Rows of one predicate each as one row per sentence with all its frames, in the order of the sentences' first rows. A
    sentence that stands in the data n times gives n rows: a predicate that it has already begins its next occurrence."""
    sentences: dict[tuple[str, ...], list[tuple[dict[str, Any], str]]] = {}
    order: list[tuple[dict[str, Any], str]] = []
    for row, place in rows:
        if "frames" in row or not _aligned(row, "tags") or not is_index(row.get("predicate_index"), row["tokens"]):
            order.append((row, place))
            continue
        spans = bio_spans(_bio(spec, row["tags"], place))
        arguments = [list(span) for span in spans if span[2] not in _VERBS]
        frame = {"predicate": row["predicate_index"], "arguments": arguments}
        occurrences = sentences.setdefault(tuple(row["tokens"]), [])
        for sentence, _ in occurrences:
            if all(other["predicate"] != frame["predicate"] for other in sentence["frames"]):
                sentence["frames"].append(frame)
                break
        else:
            occurrences.append(({"tokens": row["tokens"], "frames": [frame]}, place))
            order.append(occurrences[-1])
    yield from order


def _aligned(row: Mapping[str, Any], column: str) -> bool:
    tokens, values = row.get("tokens"), row.get(column)
    return is_texts(tokens) and isinstance(values, list) and isinstance(tokens, list) and len(tokens) == len(values)


def is_number(text: str) -> bool:
    """Whether a text is a finite number."""
    value = _to_number(text)
    return isinstance(value, float) and math.isfinite(value)
