"""Tasks as memory-mapped arrays: tokenised once, named by their content, opened by every trial.

An example is one input sequence (choice: one per option); a sequence that is longer than ``backbone.max_length`` is several
windows. A row is one window.
"""

import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_modules.building import ConfigError
from lightning_modules.config import BackboneConfig, TrialConfig
from lightning_modules.data import kinds
from lightning_modules.data.posing import formed
from lightning_modules.data.tasks import SPLITS, Split, TaskSpec
from lightning_modules.data.tokenizer import load_tokenizer, prepare_tokenizer, tokenizer_key
from lightning_modules.data.windows import Row, offsets_of, tokenise
from lightning_modules.files import atomic_folder
from lightning_modules.measure.floors import floor

VERSION = 4
"""Raise when the arrays' form or content changes."""

PARALLEL_FROM = 4_000_000
"""Bytes left to prepare from which on several processes share the work: starting one costs seconds."""


def prepared_folder(config: TrialConfig, task: str, root: Path) -> Path:
    """Where the arrays of ``task`` stand, named by everything that decides their content."""
    backbone = config.backbone
    lengths = [backbone.max_length, backbone.window_overlap, backbone.max_windows, backbone.max_target_length]
    content = [VERSION, task, config.digests.get(task), config.data.form, tokenizer_key(config), *lengths]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return root / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', task)[:80]}-{digest}"


def prepare(configs: Sequence[TrialConfig], specs: Mapping[str, TaskSpec], root: Path, processes: int | None = None) -> None:
    """Write the arrays of the trials' tasks into ``root``, those that are not there yet. Safe to call from several processes
    and sweeps at the same time: a folder is written under another name and then renamed.

    ``processes``: at most so many share the work where there is much of it; None: one per CPU core.

    Raises:
        ConfigError: an example is malformed (with file and line), or a task's data have changed since the trials were planned.
    """
    jobs: dict[Path, _Job] = {}
    for config in configs:
        missing = [name for name in config.mixture.tasks if not prepared_folder(config, name, root).exists()]
        tokenizer = prepare_tokenizer(config, specs, root) if missing else None
        for name in missing:
            assert tokenizer is not None
            digest = config.digests.get(name)
            folder = prepared_folder(config, name, root)
            jobs.setdefault(folder, _Job(specs[name], config.data.form, digest, tokenizer, config.backbone, folder))
    workers = min(len(jobs), processes or len(os.sched_getaffinity(0)))
    if workers < 2 or sum(_bytes(job.spec) for job in jobs.values()) < PARALLEL_FROM:
        for job in jobs.values():
            _prepare_task(job)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for done in [pool.submit(_prepare_task, job) for job in jobs.values()]:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Job(NamedTuple):
    """One task to be prepared."""

    spec: TaskSpec
    form: str
    digest: str | None
    tokenizer: Path
    backbone: BackboneConfig
    folder: Path


def _bytes(spec: TaskSpec) -> int:
    """How much there is to read; what is not in files (the Hub's data) counts as much."""
    return PARALLEL_FROM if spec.hub else sum(path.stat().st_size for path in spec.files.values() if path.is_file())


def _prepare_task(job: _Job) -> None:
    spec = formed(job.spec, job.form)
    with atomic_folder(job.folder) as temporary:
        _write_task(spec, job.tokenizer, job.backbone, temporary)
        if job.digest is not None and spec.digest() != job.digest:
            law = "the data have changed since the trials were planned; run the command again"
            raise ConfigError(f"{spec.catalogue}: task {spec.name}", law)


def _write_task(spec: TaskSpec, tokenizer_folder: Path, backbone: BackboneConfig, folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    rows = {split: list(spec.read(split)) for split in SPLITS}
    meta: dict[str, Any] = {"name": spec.name, "kind": spec.kind, "metric": spec.metric, "labels": spec.labels, "splits": {}}
    meta |= {"vocab_size": len(tokenizer), "pad": tokenizer.pad_token_id, "tokenizer": tokenizer_folder.name}
    meta["facts"] = facts = kinds.facts(spec, rows)
    pairs = any("text_pair" in row for of_split in rows.values() for row in of_split)
    for split in SPLITS:
        tokens = tokenise(spec.kind, rows[split], tokenizer, backbone, pairs)
        arrays, counts = tokens.arrays(), {"examples": len(rows[split]), "windowed": tokens.windowed, "cut_tokens": tokens.cut}
        if spec.kind == "text2text":
            targets, counts["cut_target_tokens"] = _targets(rows[split], tokenizer, backbone.max_target_length)
            arrays |= _ragged("labels", targets, np.int32)
            gold = [row.get("targets") or [row["target"]] for row in rows[split]]
            (folder / f"{split}.references.json").write_text(json.dumps(gold))
        else:
            items = [np.array(kinds.label_items(spec, row, facts)) for row in rows[split]]
            shaped = [item.reshape(-1, kinds.width(spec.kind)) for item in items]
            arrays |= _ragged("labels", shaped, np.float32 if spec.kind == "regression" else np.int32)
        arrays["word_counts"] = np.array([len(row.get("tokens", ())) for row in rows[split]], dtype=np.int32)
        meta["splits"][split] = counts
        for name, array in arrays.items():
            np.save(folder / f"{split}.{name}.npy", array)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    data = TaskData(folder)
    floors = {split: data.compute_floor(split, np.arange(data.size(split))) for split in ("dev", "test")}
    (folder / "floors.json").write_text(json.dumps(floors, indent=1))


def _ragged(name: str, items: Sequence[np.ndarray], dtype: type) -> dict[str, np.ndarray]:
    flat = np.concatenate(items) if items else np.zeros((0, 1))
    return {name: flat.astype(dtype), f"{name}_offsets": offsets_of(map(len, items))}


def _targets(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, longest: int) -> tuple[list[np.ndarray], int]:
    """The first reference's token ids of each example, end mark included, and the number of tokens that were cut."""
    whole = tokenizer(text_target=[row["target"] for row in rows], verbose=False)["input_ids"] if rows else []
    cut = sum(max(0, len(ids) - longest) for ids in whole)
    # What is cut keeps its end mark: a model that has never seen it would not learn to stop.
    kept = [ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]] for ids in whole]
    return [np.array(ids) for ids in kept], cut


@dataclass(frozen=True, slots=True)
class Windows:
    """The rows of some examples."""

    rows: list[Row]
    rows_per_sequence: list[int]
    options: np.ndarray | None
    """(n,) int64 sequences per example (choice); None: one each."""


class TaskData:
    """The memory-mapped arrays of one task."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        FileNotFoundError: the task has not been prepared.
        """
        self._folder = folder
        self._meta = json.loads((folder / "meta.json").read_text())
        self._arrays = {
            path.name.removesuffix(".npy"): np.asarray(np.load(path, mmap_mode="r")) for path in sorted(folder.glob("*.npy"))
        }
        self._texts: dict[str, list[list[str]]] = {}
        self.name: str = self._meta["name"]
        self.kind: str = self._meta["kind"]
        self.metric: str = self._meta["metric"]
        self.labels: tuple[str, ...] = tuple(self._meta["labels"])
        self.facts: dict[str, Any] = self._meta["facts"]
        self.vocab_size: int = self._meta["vocab_size"]
        self.pad: int = self._meta["pad"]

    @property
    def scalar(self) -> bool:
        """Whether an example has one label rather than a list of items."""
        return self.kind in ("classification", "regression", "choice")

    def floor(self, split: Split, examples: np.ndarray) -> dict[str, float | None]:
        """Metric -> score of the given examples without looking at the input, from all of train (``measure.floors``)."""
        if len(examples) == self.size(split):
            return json.loads((self._folder / "floors.json").read_text())[split]
        return self.compute_floor(split, examples)

    def compute_floor(self, split: Split, examples: np.ndarray) -> dict[str, float | None]:
        """As :meth:`floor`, computed anew."""
        words = self._arrays[f"{split}.word_counts"][examples].tolist()
        return floor(self.kind, self.metric, self.labels, self._train_targets, self.targets(split, examples), words).values

    @cached_property
    def _train_targets(self) -> list[Any]:
        return self.targets("train", range(self.size("train")))

    def size(self, split: Split) -> int:
        """Number of examples."""
        return self._meta["splits"][split]["examples"]

    def count(self, what: str) -> int:
        """``windowed`` sequences, ``cut_tokens`` or ``cut_target_tokens`` over all splits."""
        return sum(self._meta["splits"][split].get(what, 0) for split in SPLITS)

    def row_counts(self, split: Split) -> np.ndarray:
        """(n,) rows per example."""
        return np.diff(self._arrays[f"{split}.sequence_rows"][self._arrays[f"{split}.example_sequences"]])

    def lengths(self, split: Split) -> np.ndarray:
        """(n,) tokens per example: its rows times its longest row (text2text: and the target's)."""
        longest = np.maximum.reduceat(np.diff(self._arrays[f"{split}.offsets"]), self._first_rows(split)[:-1])
        lengths = longest * self.row_counts(split)
        if self.kind == "text2text":
            lengths = lengths + np.diff(self._arrays[f"{split}.labels_offsets"])
        return lengths

    def _first_rows(self, split: Split) -> np.ndarray:
        return self._arrays[f"{split}.sequence_rows"][self._arrays[f"{split}.example_sequences"]]

    def windows(self, split: Split, examples: np.ndarray | Sequence[int]) -> Windows:
        """All rows of the given examples, in order."""
        sequences, per_sequence = self._arrays[f"{split}.example_sequences"], self._arrays[f"{split}.sequence_rows"]
        rows: list[Row] = []
        counts: list[int] = []
        for i in examples:
            first, last = sequences[i], sequences[i + 1]
            counts += np.diff(per_sequence[first : last + 1]).tolist()
            rows += [self._row(split, r) for r in range(per_sequence[first], per_sequence[last])]
        options = np.diff(sequences)[examples] if self.kind == "choice" else None
        return Windows(rows, counts, options)

    def _row(self, split: Split, row: int) -> Row:
        start, stop = self._arrays[f"{split}.offsets"][row : row + 2]
        return Row(*(self._arrays[f"{split}.{name}"][start:stop] for name in Row._fields))

    def labels_of(self, split: Split, examples: np.ndarray | Sequence[int]) -> list[np.ndarray]:
        """The label items of each example as ``kinds.label_items`` gives them: (items,) where an item is one number, else
        (items, width)."""
        labels, offsets = self._arrays[f"{split}.labels"], self._arrays[f"{split}.labels_offsets"]
        flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
        return [flat[offsets[i] : offsets[i + 1]] for i in examples]

    def class_of_each(self, split: Split) -> list[Any] | None:
        """The label of each example where it is one of a closed set of classes, else None."""
        if self.kind == "classification":
            return self._arrays[f"{split}.labels"][:, 0].tolist()
        if self.kind == "text2text" and self.labels:
            return [references[0] for references in self._references(split)]
        return None

    def _references(self, split: Split) -> list[list[str]]:
        if split not in self._texts:
            self._texts[split] = json.loads((self._folder / f"{split}.references.json").read_text())
        return self._texts[split]

    def targets(self, split: Split, examples: np.ndarray | Sequence[int]) -> list[Any]:
        """Gold answers in the form that scores read, all words of an example included (what the model does not see counts as
        wrong)."""
        if self.kind == "text2text":
            return [self._references(split)[i] for i in examples]
        items = [item.reshape(-1, kinds.width(self.kind)).tolist() for item in self.labels_of(split, examples)]
        return [kinds.gold(self.kind, [tuple(one) for one in item], self.facts) for item in items]

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._folder.parent / self._meta["tokenizer"])

    def decode(self, ids: Iterable[Sequence[int]]) -> Iterator[str]:
        """Token ids of generated answers as text, special tokens left out."""
        for one in ids:
            text = self._tokenizer.decode(list(one), skip_special_tokens=True)
            assert isinstance(text, str)
            yield text.strip()


def cut_lines(config: TrialConfig, root: Path) -> list[str]:
    """A sentence for each task of a prepared trial of which the model will not read everything."""
    backbone = config.backbone
    limits = {
        "cut_tokens": ("inputs", f"max_windows={backbone.max_windows}"),
        "cut_target_tokens": ("targets", f"max_target_length={backbone.max_target_length}"),
    }
    return [
        f"{task.name}: {task.count(what)} tokens of {of} lie beyond backbone.{limit} and are cut"
        for task in open_tasks(config, root)
        for what, (of, limit) in limits.items()
        if task.count(what)
    ]


def open_tasks(config: TrialConfig, root: Path) -> list[TaskData]:
    """The tasks of the mixture in its order.

    Raises:
        FileNotFoundError: one of them has not been prepared (see :func:`prepare`).
    """
    return [TaskData(prepared_folder(config, name, root)) for name in config.mixture.tasks]
