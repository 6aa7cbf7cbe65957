"""Tasks and catalogues: what a task is, where its examples are, and whether they can be read. No torch here.

A catalogue is a YAML file with ``tasks:``, a list of entries; ``defaults:`` is merged under every entry, and ``root:`` is the
folder, relative to the catalogue, that relative file paths start from. An entry names its data by ``files`` (local),
``hub`` (a data set of the Hugging Face Hub, pinned to a commit) or ``planted`` (generated, see
:mod:`lightning_modules.data.planted`)::

    - name: glue/sst2
      kind: classification
      category: classification/sentiment
      metric: accuracy
      labels: [negative, positive]     # numbers in the data count into it; omitted: taken from the data
      hub: {path: nyu-mll/glue, config: sst2, revision: <commit>}   # or files: {train: a.jsonl, validation: b.csv}
      columns: {text: sentence}        # our field -> a column, a dotted path, a "{template}", a list of those, or
                                       # {column: input, regex: "..."}: what the expression (its group) finds there
      where: {language: en}            # only rows whose column has this value (or one of a list)
      splits: {dev: {from: train, share: 0.1}, test: validation}    # ours -> the source's; a share is carved by content
      prompt: "sst2 sentence: {text}"  # the input where the task is posed as text to text
      description: Is a sentence from a film review positive or negative?    # for routers that read descriptions

The fields of each kind are in :mod:`lightning_modules.data.forms`, the file formats in :mod:`lightning_modules.data.sources`.
"""

import difflib
import fnmatch
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_modules.building import ConfigError
from lightning_modules.data import catalogues, forms, hub, kinds, planted, posing, sources, splits

Split = Literal["train", "dev", "test"]
KINDS = kinds.KINDS
SPLITS: tuple[Split, ...] = get_args(Split)

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "micro_f1", "mcc", "f1_positive"),
    "regression": ("pearson", "spearman", "mse"),
    "choice": ("accuracy", "macro_f1", "micro_f1", "mcc"),
    "tagging": ("accuracy", "span_f1"),
    "spans": ("span_f1",),
    "dependency": ("las", "uas"),
    "constituency": ("bracket_f1",),
    "srl": ("srl_f1",),
    "text2text": (
        "exact_match", "token_f1", "rouge_l", "accuracy", "macro_f1", "micro_f1", "mcc", "f1_positive", "pearson", "spearman",
        "mse",
    ),
}  # fmt: skip
"""Scores that a kind can be compared by, its default first. ``f1_positive(LABEL)`` and ``macro_f1(without LABEL)`` take a
label, ``exact_match(number after MARK)`` a mark."""

CLOSED_SET = ("accuracy", "macro_f1", "micro_f1", "mcc", "f1_positive")
"""Scores of text2text tasks whose answers are a closed set of labels."""

_ARGUMENTS = {"f1_positive": "LABEL", "macro_f1": "without LABEL", "exact_match": "number after MARK"}
_PLANTED_SAMPLE = 50


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
    """Closed label set of the kinds that have one (text2text: of its answers); () where the catalogue leaves it to the data,
    see :meth:`complete`."""
    keys: tuple[str, ...] = ()
    """What numbers in the data stand for: the labels, their BIO tags, or (choice) the options' keys."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """source -> absolute path; empty for tasks that are not in files."""
    hub: Mapping[str, Any] = field(default_factory=dict)
    """``path``, ``config`` and ``revision`` of a Hub data set, whose splits are the sources."""
    format: str = ""
    """Format of the files where their extension does not say it."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Field -> column, path, template, or list of those; a field that is not named is the column of its name."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Column -> its value, or a list of its values, in the rows that belong to the task; empty: all rows."""
    recipe: Mapping[str, tuple[splits.Part, ...]] = field(default_factory=dict)
    """split -> the parts of sources that make it; empty: the sources are the splits."""
    planted: Mapping[str, Any] = field(default_factory=dict)
    """Parameters for the generator; empty for tasks that are not generated."""
    low_resource: int | None = None
    """Training examples that the catalogue leaves the task; None: all."""
    prompt: str = ""
    """Template of the input in text2text form; "": the one of the kind."""
    answers: Mapping[str, Any] = field(default_factory=dict)
    """Answers in text2text form: label -> text where it is not the label, or (regression) ``decimals``."""
    description: str = ""
    """What the task asks, in words, for routers that read it (``router.task_vectors: description``). Not part of the digest: a
    trial that reads it has it in its settings."""
    native: "TaskSpec | None" = None
    """The task that this one poses as text2text, see :func:`lightning_modules.data.posing.pose`."""
    ignored: tuple[str, ...] = ()
    """Keys of its entry that nothing reads."""
    catalogue: str = ""
    """The catalogue file it was read from, for messages."""

    def read(self, split: Split) -> Iterator[dict[str, Any]]:
        """The examples of a split in the sources' order, checked, in the form of :mod:`lightning_modules.data.kinds`.

        Raises:
            ConfigError: with file and line number, when a line is torn or an example breaks its kind's form.
        """
        if self.native is not None:
            yield from (posing.render(self.native, row) for row in self.native.read(split))
        elif self.planted:
            try:
                yield from planted.generate(self.planted, split)
            except ValueError as error:
                raise ConfigError(f"{self.catalogue}: task {self.name}", str(error)) from None
        else:
            spec = self._numbered()
            for part in self.parts(split):
                rows = sources.source_rows(self, part.source)
                if self.where:
                    rows = sources.filtered(rows, self.where, f"{self.catalogue}: task {self.name}: {part.source}")
                yield from (row for row, _ in forms.examples(spec, rows) if part.holds(row))

    def parts(self, split: Split) -> tuple[splits.Part, ...]:
        """The parts of sources that make a split."""
        return self.recipe.get(split) or (splits.Part(split),)

    def _numbered(self) -> "TaskSpec":
        """With the label names of the Hub's data set, where the catalogue lists none."""
        name = forms.LABEL_FIELD.get(self.kind)
        if self.labels or self.keys or not self.hub or name is None:
            return self
        labels, keys = forms.listed(self.kind, hub.class_names(self, self.parts("train")[0].source, name))
        return replace(self, labels=labels, keys=keys)

    def complete(self) -> "TaskSpec":
        """The task with its label set: as listed, else as the data has it: train's labels, sorted, then those that only other
        splits have.

        Raises:
            ConfigError: as :meth:`read`.
        """
        if self.labels or self.planted or self.kind not in kinds.LABELLED:
            return self
        spec = self._numbered()
        if spec.labels:
            return spec
        found: dict[str, None] = {}
        for split in SPLITS:
            new = {label for row in spec.read(split) for label in kinds.labels_of(self.kind, row)} - set(found)
            numbers = all(re.fullmatch(r"-?\d+", label) for label in new)
            found |= dict.fromkeys(sorted(new, key=int) if numbers else sorted(new))
        return replace(spec, labels=tuple(found))

    def digest(self) -> str:
        """16 hex digits of everything about the task that can change a trial's numbers: its form and its data's content.

        Raises:
            ConfigError: as :meth:`complete`.
        """
        spec = self.complete()
        head: dict[str, Any] = {
            "kind": self.kind,
            "metric": self.metric,
            "labels": spec.labels,
            "low_resource": self.low_resource,
        }
        if self.native is not None:
            names = "{name}" in (self.prompt or "{name}")
            head["posed"] = [self.native.digest(), self.prompt, dict(self.answers), self.name if names else ""]
        elif self.planted:
            head |= {"planted": dict(self.planted), "version": planted.VERSION}
        else:
            head |= {name: value for name in ("columns", "where", "format", "hub") if (value := getattr(self, name))}
            if spec.keys not in (spec.labels, ()):
                head["keys"] = spec.keys
            if self.recipe:
                head["splits"] = {split: [[p.source, p.start, p.end] for p in self.parts(split)] for split in SPLITS}
        content = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        used = dict.fromkeys(part.source for split in SPLITS for part in self.parts(split))
        if self.native is None:
            for source in used:
                if source in self.files:
                    with self.files[source].open("rb") as file:
                        content.update(hashlib.file_digest(file, "sha256").digest())
        return content.hexdigest()[:16]


# -- catalogues ----------------------------------------------------------------------------------------------------------


def load_catalogues(paths: Sequence[str | Path], base: Path) -> dict[str, TaskSpec]:
    """All tasks of the catalogues by name, in file order. Relative paths are looked up from ``base``.

    Entries of unknown kinds are kept (so that patterns can say why they cannot be used). No data is read.

    Raises:
        ConfigError: a catalogue is missing or malformed, or two catalogues define the same task.
    """
    tasks: dict[str, TaskSpec] = {}
    for path in paths:
        file = (base / path).resolve()
        for entry in catalogues.read_catalogue(file, str(path)):
            spec = _read_entry(entry, str(path))
            if spec.name in tasks:
                raise ConfigError(
                    "catalogues", f"{path} defines task {spec.name!r}, which {tasks[spec.name].catalogue} has defined"
                )
            tasks[spec.name] = spec
    return tasks


def _read_entry(entry: catalogues.Entry, shown: str) -> TaskSpec:
    values, kind = entry.values, entry.values["kind"]
    spec = TaskSpec(
        name=values["name"],
        kind=kind,
        metric=str(values.get("metric") or METRICS.get(kind, ("accuracy",))[0]),
        category=str(values.get("category") or ""),
        low_resource=values.get("low_resource"),
        prompt=values.get("prompt") or "",
        answers=values.get("answers") or {},
        description=" ".join((values.get("description") or "").split()),
        ignored=tuple(key for key in map(str, values) if key not in (*catalogues.ENTRY_KEYS, *catalogues.NOTES)),
        catalogue=shown,
    )
    try:
        if values.get("planted") is not None:
            generator = {**entry.suite, **values["planted"], "name": spec.name, "kind": kind}
            return replace(spec, planted=generator, labels=planted.labels(generator))
        recipe = splits.parts(values["splits"], SPLITS) if values.get("splits") else {}
    except ValueError as error:
        raise ConfigError("catalogues", f"{entry.where}: {error}") from None
    labels, keys = forms.listed(kind, [str(label) for label in values.get("labels") or ()])
    return replace(
        spec,
        labels=labels,
        keys=keys,
        files={source: entry.root / path for source, path in (values.get("files") or {}).items()},
        hub=values.get("hub") or {},
        format=values.get("format") or "",
        columns=values.get("columns") or {},
        where=values.get("where") or {},
        recipe=recipe,
    )


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


# -- checks --------------------------------------------------------------------------------------------------------------


def metric_parts(metric: str) -> tuple[str, str]:
    """``"macro_f1(without Other)"`` -> ``("macro_f1", "without Other")``; no argument -> ``""``."""
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", metric)
    return (match[1], match[2] or "") if match else (metric, "")


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found in a task's data."""

    spec: TaskSpec
    """The task with its label set."""
    sizes: Mapping[str, int]
    """split -> examples."""
    warnings: tuple[str, ...]
    """What is doubtful but can be used, one sentence each, with counts."""
    words: Counter[int]
    """Words of an example's input -> examples with as many, over all splits (choice: with the longest option). Of planted tasks
    the first 50 examples of each split count."""


def check(spec: TaskSpec) -> Checked:
    """Read the whole task.

    Raises:
        ConfigError: the kind, metric, labels or a file is unusable, or an example is malformed (file and line are named).
    """
    key = f"{spec.catalogue}: task {spec.name}"
    if spec.kind not in KINDS:
        raise ConfigError(key, f"kind must be one of {', '.join(KINDS)}, got {spec.kind!r}")
    _check_metric(spec, key)
    if spec.low_resource is not None and (type(spec.low_resource) is not int or spec.low_resource < 1):
        raise ConfigError(key, f"low_resource must be a whole number of examples, at least 1, got {spec.low_resource!r}")
    _check_sources(spec.native or spec, key)
    spec = spec.complete()
    _check_labels(spec, key)
    words: Counter[int] = Counter()
    if (spec.native or spec).planted:
        sizes = {split: planted.count((spec.native or spec).planted, split) for split in SPLITS}
        for split in SPLITS:
            words.update(_words(row) for row in islice(spec.read(split), _PLANTED_SAMPLE))
        return Checked(spec, sizes, (), words)
    census, classes = splits.Census(), Counter[Any]()
    sizes: dict[str, int] = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        for row in spec.read(split):
            sizes[split] += 1
            census.add(split, row)
            words[_words(row)] += 1
            if split == "train" and (spec.labels or spec.kind == "regression"):
                classes.update([row["label"]] if spec.kind == "regression" else kinds.labels_of(spec.kind, row))
            _check_numeric(spec, row, key)
        if not sizes[split]:
            raise ConfigError(key, f"{split} has no examples ({', '.join(part.source for part in spec.parts(split))})")
    ignored = [f"keys of its entry that mean nothing: {', '.join(spec.ignored)}"] if spec.ignored else []
    return Checked(spec, sizes, (*ignored, *_class_warnings(spec, classes, key), *census.warnings()), words)


def _words(row: Mapping[str, Any]) -> int:
    if "tokens" in row:
        return len(row["tokens"])
    lengths = [len(option.split()) for option in row.get("options", ())]
    return len(row["text"].split()) + len(row.get("text_pair", "").split()) + max(lengths, default=0)


def _check_metric(spec: TaskSpec, key: str) -> None:
    name, argument = metric_parts(spec.metric)
    if name not in METRICS[spec.kind]:
        raise ConfigError(key, f"metric must be one of {', '.join(METRICS[spec.kind])} for {spec.kind}, got {spec.metric!r}")
    form = _ARGUMENTS.get(name, "")
    prefix = form.rpartition(" ")[0]
    if argument and not (form and re.fullmatch(f"{prefix} ?.+" if prefix else ".+", argument)):
        raise ConfigError(key, f"metric must be {name}{f'({form})' if form else ''}, got {spec.metric!r}")
    if name == "f1_positive" and not argument:
        raise ConfigError(key, "metric f1_positive must name its label: f1_positive(LABEL)")


def _check_sources(spec: TaskSpec, key: str) -> None:
    if not spec.files:
        if not spec.planted and not spec.hub:
            raise ConfigError(key, "files must have train, dev and test, got none")
        return
    for source in dict.fromkeys(part.source for split in SPLITS for part in spec.parts(split)):
        if source not in spec.files:
            law = "files must have train, dev and test (or splits: that says where each comes from)"
            if spec.recipe:
                law = f"files must have {source}, which splits: uses"
            raise ConfigError(key, f"{law}, got {', '.join(spec.files)}")
        if not spec.files[source].is_file():
            raise ConfigError(key, f"no such file: {spec.files[source]}")
        sources.file_format(spec, spec.files[source])


def _check_labels(spec: TaskSpec, key: str) -> None:
    name, argument = metric_parts(spec.metric)
    least = 2 if spec.kind in ("classification", "tagging") else 1
    if spec.kind in kinds.LABELLED and len(spec.labels) < least:
        raise ConfigError(key, f"must list at least {'two labels' if least == 2 else 'one label'}, got {list(spec.labels)}")
    if len(set(spec.labels)) < len(spec.labels):
        raise ConfigError(key, f"labels must differ, got {', '.join(spec.labels)}")
    label = argument.removeprefix("without ") if name in ("macro_f1", "f1_positive") else ""
    if label and label not in spec.labels:
        raise ConfigError(key, f"metric {spec.metric!r} names a label that is not in labels {list(spec.labels)}")
    options = spec.native is not None and spec.native.kind == "choice"
    if spec.kind == "text2text" and name in CLOSED_SET and not spec.labels and not options:
        raise ConfigError(key, f"metric {spec.metric!r} needs labels, the closed set of answers")


def _check_numeric(spec: TaskSpec, row: Mapping[str, Any], key: str) -> None:
    if spec.kind == "text2text" and spec.metric in METRICS["regression"] and not forms.is_number(row["target"]):
        raise ConfigError(key, f"metric {spec.metric} needs numbers as targets, got {row['target']!r}")


def _class_warnings(spec: TaskSpec, seen: Counter[Any], key: str) -> Iterator[str]:
    """Doubts about train's labels. Raises ConfigError where nothing can be learned from them."""
    closed = spec.kind in ("classification", "tagging") or (spec.kind == "text2text" and spec.labels)
    if len(seen) < 2 and (closed or spec.kind == "regression"):
        what = "label" if spec.kind == "regression" else "class"
        raise ConfigError(key, f"train must have more than one {what}, got {next(iter(seen))!r} for all examples")
    missing = [label for label in spec.labels if label not in seen]
    if missing:
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        yield f"{len(missing)} of {len(spec.labels)} labels are not in train: {shown}"
