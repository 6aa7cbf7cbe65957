"""Where examples are read from: files of several formats and data sets of the Hugging Face Hub. No torch here.

Every reader yields ``(row, place)``: a plain dict of the source's own columns, and ``file:line`` for messages.
"""

import csv
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.building import ConfigError
from lightning_modules.data import hub

if TYPE_CHECKING:
    from lightning_modules.data.tasks import TaskSpec

Rows = Iterator[tuple[dict[str, Any], str]]

FORMATS: dict[str, str] = {
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".conllu": "conllu",
    ".mrg": "brackets",
    ".ptb": "brackets",
}
"""File name extension -> format; an entry's ``format`` says it where the extension does not."""


def source_rows(spec: "TaskSpec", source: str) -> Rows:
    """The rows of one source of a task (a key of its ``files``, or a split of its Hub data set) in their order.

    Raises:
        ConfigError: no such source, a torn or foreign row (with file and line), or the Hub cannot be read.
    """
    if spec.hub:
        yield from read_jsonl(hub.folder(spec, source) / hub.ROWS, hub.shown(spec.hub, source))
        return
    path = spec.files[source]
    if not path.is_file():
        raise ConfigError(f"{spec.catalogue}: task {spec.name}", f"no such file: {path}")
    read = _READERS[file_format(spec, path)]
    try:
        yield from read(path)
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"must be UTF-8: {error}") from None


def file_format(spec: "TaskSpec", path: Path) -> str:
    """The format of a file. Raises ConfigError where neither ``format`` nor the extension says one."""
    form = spec.format or FORMATS.get(path.suffix)
    if form not in _READERS:
        law = f"format must be one of {', '.join(_READERS)}, got {spec.format or path.name!r}"
        raise ConfigError(f"{spec.catalogue}: task {spec.name}", law)
    return form


# -- columns -------------------------------------------------------------------------------------------------------------


def placeholders(template: str) -> list[str]:
    """The names in a template's braces. Raises ValueError for unpaired or empty braces, or conversions and formats."""
    names = []
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or form or conversion:
            raise ValueError(f"placeholders must be {{name}}, got {template!r}")
        names.append(name)
    return names


def fill(template: str, values: Mapping[str, str]) -> str:
    """``template`` with its placeholders replaced. Raises KeyError for a name that ``values`` lacks."""
    parts = string.Formatter().parse(template)
    return "".join(text + (values[name] if name is not None else "") for text, name, _, _ in parts)


def pick(row: Mapping[str, Any], columns: Mapping[str, Any], fields: Sequence[str], place: str) -> dict[str, Any]:
    """The ``fields`` of a row: what ``columns`` says for them, else the column of the same name where there is one.

    Raises:
        ConfigError: ``columns`` names a column that is not there (the message names those that are).
    """
    picked = {name: row[name] for name in fields if name not in columns and row.get(name) is not None}
    for name, column in columns.items():
        value = _value(row, column, place, name)
        if value is not None:
            picked[name] = value
    return picked


def filtered(rows: Rows, where: Mapping[str, Any], key: str) -> Rows:
    """The rows in which each column of ``where`` (a name or a dotted path) has its value, or one of its values. Values are
    compared as text (``true`` and ``false`` as YAML writes them): the cells of a CSV file are nothing else.

    Raises:
        ConfigError: a column is not there, or no row is left.
    """
    wanted = {column: {_as_text(v) for v in (value if isinstance(value, list) else [value])} for column, value in where.items()}
    read, kept = 0, 0
    for row, place in rows:
        read += 1
        if all(_as_text(_follow(row, column, place, "where")) in values for column, values in wanted.items()):
            kept += 1
            yield row, place
    if read and not kept:
        raise ConfigError(key, f"where must leave some rows, {dict(where)!r} leaves none of {read}")


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(row: Mapping[str, Any], column: Any, place: str, field: str) -> Any:
    if isinstance(column, (list, tuple)):
        return [_value(row, part, place, field) for part in column]
    if isinstance(column, Mapping):
        return _found(_value(row, column["column"], place, field), column["regex"], place, field)
    if column in row:
        return row[column]
    if "{" not in column:
        return _follow(row, column, place, field)
    values = {}
    for name in placeholders(column):
        value = _follow(row, name, place, field)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ConfigError(place, f"columns.{field}: {{{name}}} must be text or a number, got {shorten(value)}")
        values[name] = str(value)
    return fill(column, values)


def _found(value: Any, regex: str, place: str, field: str) -> Any:
    """All matches of ``regex`` in a text (a field that is a list), or the first one; its group where it has one."""
    found = re.findall(regex, value, re.DOTALL) if isinstance(value, str) else []
    if not found:
        raise ConfigError(place, f"columns.{field}: must match the regular expression {regex!r}, got {shorten(value)}")
    return found if field in ("options", "keys", "targets", "tokens") else found[0]


def _follow(row: Mapping[str, Any], path: str, place: str, field: str) -> Any:
    """A column by its name, or a part of it by a dotted path (``answers.text``, ``answers.text.0``)."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        try:
            value = _part(value, part)
        except (KeyError, IndexError, TypeError):
            have = ", ".join(map(str, row)) or "no columns"
            raise ConfigError(place, f"columns.{field} names {path!r}, which is not there; the row has {have}") from None
    return value


def _part(value: Any, part: str) -> Any:
    if isinstance(value, list):
        return value[int(part)] if part.isdecimal() else [_part(one, part) for one in value]
    return value[part]


def shorten(value: Any) -> str:
    """``value`` as JSON, cut to 80 characters, for messages."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


# -- file formats --------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    """Lines without their end, and their numbers from 1."""
    with path.open(encoding="utf-8-sig", errors="strict", newline="\n") as file:
        for number, line in enumerate(file, 1):
            yield line.rstrip("\r\n"), number


def read_jsonl(path: Path, name: str | None = None) -> Rows:
    """The rows of a file with one JSON object per line, empty lines left out; ``name`` stands for it in messages."""
    for line, number in _lines(path):
        if not line.strip():
            continue
        place = f"{name or path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(place, f"must be one JSON object per line, got {line.strip()[:60]!r} ({error})") from None
        if not isinstance(row, dict):
            raise ConfigError(place, f"must be one JSON object per line, got {line.strip()[:60]!r}")
        yield row, place


def _json(path: Path) -> Rows:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise ConfigError(str(path), f"must be a JSON list of objects ({error})") from None
    if not isinstance(content, list):
        raise ConfigError(str(path), f"must be a JSON list of objects, got {shorten(content)}")
    for i, row in enumerate(content):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}[{i}]", f"must be a JSON object, got {shorten(row)}")
        yield row, f"{path}[{i}]"


def _csv(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default refuses long documents
    with path.open(encoding="utf-8-sig", errors="strict", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            yield from _table(path, ((values, reader.line_num) for values in reader))
        except csv.Error as error:
            raise ConfigError(f"{path}:{reader.line_num}", f"must be CSV: {error}") from None


def _tsv(path: Path) -> Rows:
    """Tab-separated without quoting: a quotation mark is a character like any other."""
    yield from _table(path, ((line.split("\t"), number) for line, number in _lines(path)))


def _table(path: Path, records: Iterator[tuple[list[str], int]]) -> Rows:
    names, _ = next(records, ([], 0))
    if len(set(names)) != len(names):
        raise ConfigError(f"{path}:1", f"must have a header of different names, got {shorten(names)}")
    for values, number in records:
        if values in ([], [""]):
            continue
        if len(values) != len(names):
            law = f"must have {len(names)} fields as the header has ({', '.join(names)}), got {len(values)}"
            raise ConfigError(f"{path}:{number}", law)
        yield dict(zip(names, values, strict=True)), f"{path}:{number}"


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}:{number}"
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(str(path), f"must be Parquet: {' '.join(str(error).split())}") from None


CONLLU_COLUMNS = ("id", "tokens", "lemma", "upos", "xpos", "feats", "heads", "deprels", "deps", "misc")
"""What CoNLL-U's ten columns are called here (https://universaldependencies.org/format.html)."""


def _conllu(path: Path) -> Rows:
    """One row per sentence: a list per column. Multiword tokens (``1-2``) and empty nodes (``1.1``) are left out."""
    words: list[list[str]] = []
    start = 0
    for line, number in _lines(path):
        if not line.strip():
            if words:
                yield _sentence(words, start, path)
            words = []
        elif not line.startswith("#"):
            start = start if words else number
            fields = line.split("\t")
            place = f"{path}:{number}"
            if len(fields) != len(CONLLU_COLUMNS):
                raise ConfigError(place, f"CoNLL-U has {len(CONLLU_COLUMNS)} tab-separated columns, got {len(fields)}")
            if re.fullmatch(r"\d+[-.]\d+", fields[0]):
                continue
            if fields[0] != str(len(words) + 1):
                raise ConfigError(place, f"word must have the number {len(words) + 1}, got {fields[0]!r}")
            words.append(fields)
    if words:
        yield _sentence(words, start, path)


def _sentence(words: list[list[str]], start: int, path: Path) -> tuple[dict[str, Any], str]:
    columns: dict[str, list[Any]] = dict(zip(CONLLU_COLUMNS, map(list, zip(*words, strict=True)), strict=True))
    columns["heads"] = [int(head) if head.isdecimal() else head for head in columns["heads"]]
    return columns, f"{path}:{start}"


_ESCAPES = {
    "-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}",
}  # fmt: skip
_WRAPPERS = ("", "TOP", "ROOT", "S1")


def _brackets(path: Path) -> Rows:
    """One row per bracketed tree of the Penn Treebank's form; a tree may span lines, a line may hold several trees.

    Words are given as they are written in text (``-LRB-`` is a bracket), part-of-speech tags as ``pos``, constituents as
    ``spans`` in pre-order, so that the outer one of a unary chain comes first. Empty elements (``-NONE-``) are removed with the
    constituents that hold nothing else, function tags and indices are cut off (``NP-SBJ-1`` is ``NP``), and so is a wrapper
    around the whole tree (``TOP``, ``ROOT``, ``S1`` or no label).
    """
    tree = _Tree()
    for line, number in _lines(path):
        for symbol in re.findall(r"[()]|[^\s()]+", line):
            try:
                done = tree.read(symbol, number)
            except ValueError as error:
                raise ConfigError(f"{path}:{number}", f"must be bracketed trees: {error}") from None
            if done:
                yield tree.row(), f"{path}:{tree.start}"
                tree = _Tree()
    if tree.open:
        raise ConfigError(f"{path}:{tree.start}", f"tree must close its brackets, {len(tree.open)} are open at the end")


class _Tree:
    """A tree as its symbols are read."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.pos: list[str] = []
        self.spans: list[tuple[int, int, str] | None] = []
        """In pre-order; None: a part of speech, a wrapper, or nothing in it."""
        self.open: list[tuple[int, int, list[str]]] = []
        """Brackets that are open: number in ``spans``, first word, the symbols read in it."""
        self.start = 0
        """Line of the first bracket."""

    def read(self, symbol: str, line: int) -> bool:
        """Take the next symbol; whether it closed the tree. Raises ValueError where it cannot stand here."""
        if symbol == "(":
            self.start = self.start or line
            self.open.append((len(self.spans), len(self.tokens), []))
            self.spans.append(None)
            return False
        if not self.open:
            raise ValueError(f"expected '(', got {symbol!r}")
        if symbol == ")":
            self._close()
            return not self.open
        self.open[-1][2].append(symbol)
        return False

    def _close(self) -> None:
        number, first, symbols = self.open.pop()
        leaf = number + 1 == len(self.spans)
        if leaf and len(symbols) == 2:
            tag, word = symbols
            if tag != "-NONE-":
                self.tokens.append(_ESCAPES.get(word, re.sub(r"\\([/*])", r"\1", word)))
                self.pos.append(tag)
            return
        if leaf or len(symbols) > 1:
            raise ValueError(f"expected (TAG word) or (LABEL tree ...), got ({' '.join(symbols)} ...)")
        label = re.split(r"[-=]", symbols[0])[0] if symbols else ""
        wrapper = number == 0 and label in _WRAPPERS
        if not label and not wrapper:
            raise ValueError("only the outermost bracket may have no label")
        if not wrapper and len(self.tokens) > first:
            self.spans[number] = (first, len(self.tokens), label)

    def row(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "pos": self.pos, "spans": [list(span) for span in self.spans if span]}


_READERS = {
    "jsonl": read_jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
    "conllu": _conllu,
    "brackets": _brackets,
}
