"""From examples to batches: tokenised once per sweep into memory-mapped arrays, then sliced by step and rank.

Shapes: B rows of a forward, S tokens of its longest row, W words of its longest row.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_modules.config import TrialConfig
from lightning_modules.data.mixtures import Group, Schedule, subset
from lightning_modules.data.tasks import SPLITS, Split, TaskSpec
from lightning_modules.data.tokenizer import load_tokenizer, prepare_tokenizer, tokenizer_key
from lightning_modules.files import atomic_folder

VERSION = 2
"""Raise when the arrays' form or content changes."""

IGNORE = -100
"""Label of words that are padding."""


@dataclass(frozen=True, slots=True)
class TaskRows:
    """Rows ``start:stop`` of a batch belong to task number ``task``."""

    task: int
    start: int
    stop: int
    labels: Tensor
    """classification (n,) int64; regression (n,) float32; tagging (n, W) int64, padded with :data:`IGNORE`."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: rows of one task, or of several, sorted by task."""

    input_ids: Tensor
    """(B, S) int64."""
    attention_mask: Tensor
    """(B, S) int64, 1 for tokens, 0 for padding."""
    token_type_ids: Tensor
    """(B, S) int64, 1 in the second text of a pair."""
    word_index: Tensor
    """(B, S) int64, the word that a token belongs to (tagging), -1 for special tokens and padding."""
    tasks: tuple[TaskRows, ...]

    @property
    def task_ids(self) -> Tensor:
        """(B,) int64, the task number of every row."""
        numbers = torch.tensor([rows.task for rows in self.tasks], device=self.input_ids.device)
        return numbers.repeat_interleave(torch.tensor([r.stop - r.start for r in self.tasks], device=numbers.device))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``."""
        rows = tuple(replace(r, labels=r.labels.to(device)) for r in self.tasks)
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.token_type_ids.to(device),
            self.word_index.to(device),
            rows,
        )


def prepared_folder(config: TrialConfig, task: str, root: Path) -> Path:
    """Where the arrays of ``task`` stand, named by everything that decides their content."""
    content = [VERSION, task, config.digests.get(task), tokenizer_key(config), config.backbone.max_length]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return root / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', task)[:80]}-{digest}"


def prepare(config: TrialConfig, specs: Mapping[str, TaskSpec], root: Path) -> None:
    """Tokenise the tasks of ``config`` into ``root``, those that are not there yet. Safe to call from several processes.

    Raises:
        ConfigError: an example is malformed (with file and line).
    """
    folder = prepare_tokenizer(config, specs, root)
    missing = [name for name in config.mixture.tasks if not prepared_folder(config, name, root).exists()]
    if not missing:
        return
    tokenizer = load_tokenizer(folder)
    for name in missing:
        with atomic_folder(prepared_folder(config, name, root)) as temporary:
            _write_task(specs[name], tokenizer, config.backbone.max_length, temporary)


def _write_task(spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, max_length: int, folder: Path) -> None:
    meta: dict[str, Any] = {"name": spec.name, "kind": spec.kind, "metric": spec.metric, "labels": spec.labels, "splits": {}}
    meta |= {"vocab_size": len(tokenizer), "pad": tokenizer.pad_token_id}
    rows = {split: list(spec.read(split)) for split in SPLITS}
    pairs = any("text_pair" in row for of_split in rows.values() for row in of_split)
    for split in SPLITS:
        arrays = _tokenise(spec, rows[split], tokenizer, max_length, pairs)
        meta["splits"][split] = {"examples": len(arrays["offsets"]) - 1, "cut_tokens": arrays.pop("cut")}
        for name, array in arrays.items():
            np.save(folder / f"{split}.{name}.npy", array)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _tokenise(
    spec: TaskSpec, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, pairs: bool
) -> dict[str, Any]:
    """Flat token arrays with offsets, labels in their kind's form, and the number of tokens beyond ``max_length``. In a task
    with pairs (``pairs``) an example without a second text has an empty one."""
    ids: list[list[int]] = []
    types: list[list[int]] = []
    words: list[list[int]] = []
    cut = 0
    tagging = spec.kind == "tagging"
    options: dict[str, Any] = {"is_split_into_words": tagging, "return_token_type_ids": True}
    for chunk in _inputs(rows, tagging).iter(batch_size=1000):
        assert isinstance(chunk, dict)
        texts, seconds = (chunk["tokens"], None) if tagging else (chunk["text"], chunk["text_pair"] if pairs else None)
        encoded = tokenizer(texts, seconds, truncation="longest_first", max_length=max_length, **options)
        whole = tokenizer(texts, seconds, verbose=False, **options)["input_ids"]
        cut += sum(len(a) - len(b) for a, b in zip(whole, encoded["input_ids"], strict=True))
        ids += encoded["input_ids"]
        types += encoded["token_type_ids"]
        for i, row in enumerate(encoded["input_ids"]):
            words.append([-1 if w is None else w for w in encoded.word_ids(i)] if tagging else [-1] * len(row))
    arrays: dict[str, Any] = {
        "tokens": np.array([t for row in ids for t in row], dtype=np.int32),
        "types": np.array([t for row in types for t in row], dtype=np.int8),
        "words": np.array([w for row in words for w in row], dtype=np.int32),
        "offsets": np.cumsum([0, *map(len, ids)]),
        "cut": cut,
    }
    return arrays | _labels(spec, rows)


def _inputs(rows: list[dict[str, Any]], tagging: bool) -> Dataset:
    """The input columns as a typed table; whatever else the rows hold is none of the model's business."""
    if tagging:
        columns = Features({"tokens": List(Value("string"))})
        return Dataset.from_dict({"tokens": [row["tokens"] for row in rows]}, features=columns)
    columns = Features({"text": Value("string"), "text_pair": Value("string")})
    texts = {"text": [row["text"] for row in rows], "text_pair": [row.get("text_pair", "") for row in rows]}
    return Dataset.from_dict(texts, features=columns)


def _labels(spec: TaskSpec, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    number = {label: i for i, label in enumerate(spec.labels)}
    if spec.kind == "regression":
        return {"labels": np.array([row["label"] for row in rows], dtype=np.float32)}
    if spec.kind == "classification":
        return {"labels": np.array([number[row["label"]] for row in rows], dtype=np.int64)}
    return {
        "labels": np.array([number[tag] for row in rows for tag in row["tags"]], dtype=np.int64),
        "label_offsets": np.cumsum([0, *(len(row["tags"]) for row in rows)]),
    }


class TaskData:
    """The memory-mapped arrays of one task."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        FileNotFoundError: the task has not been prepared.
        """
        self._meta = json.loads((folder / "meta.json").read_text())
        self._arrays = {path.name.removesuffix(".npy"): np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
        self.name: str = self._meta["name"]
        self.kind: str = self._meta["kind"]
        self.metric: str = self._meta["metric"]
        self.labels: tuple[str, ...] = tuple(self._meta["labels"])
        self.vocab_size: int = self._meta["vocab_size"]
        self.pad: int = self._meta["pad"]

    def size(self, split: Split) -> int:
        """Number of examples."""
        return self._meta["splits"][split]["examples"]

    def cut_tokens(self, split: Split) -> int:
        """Tokens beyond ``max_length`` that the arrays do not hold."""
        return self._meta["splits"][split]["cut_tokens"]

    def lengths(self, split: Split) -> np.ndarray:
        """(n,) tokens per example."""
        return np.diff(self._arrays[f"{split}.offsets"])

    def row(self, split: Split, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids, token types and word indices of one example, each (tokens,)."""
        start, stop = self._arrays[f"{split}.offsets"][i : i + 2]
        return tuple(self._arrays[f"{split}.{name}"][start:stop] for name in ("tokens", "types", "words"))  # type: ignore[return-value]

    def targets(self, split: Split, rows: np.ndarray | list[int]) -> list[Any]:
        """Gold answers as Python values: label number, number, or list of label numbers, one for every word of the example
        (words beyond ``max_length`` included: what the model does not see counts as wrong)."""
        labels = self._arrays[f"{split}.labels"]
        if self.kind != "tagging":
            return labels[rows].tolist()
        offsets = self._arrays[f"{split}.label_offsets"]
        return [labels[offsets[i] : offsets[i + 1]].tolist() for i in rows]


def open_tasks(config: TrialConfig, root: Path) -> list[TaskData]:
    """The tasks of the mixture in its order.

    Raises:
        FileNotFoundError: one of them has not been prepared (see :func:`prepare`).
    """
    return [TaskData(prepared_folder(config, name, root)) for name in config.mixture.tasks]


def collate(parts: Sequence[tuple[int, TaskData, Split, np.ndarray]]) -> Batch:
    """One batch of the given (task number, data, split, row numbers), in that order, padded to the longest row."""
    rows = [data.row(split, int(i)) for _, data, split, numbers in parts for i in numbers]
    width = max(len(tokens) for tokens, _, _ in rows)
    arrays = [np.full((len(rows), width), fill, dtype=np.int64) for fill in (parts[0][1].pad, 0, -1, 0)]
    for i, values in enumerate(rows):
        for array, value in zip(arrays, values, strict=False):
            array[i, : len(value)] = value
        arrays[3][i, : len(values[0])] = 1
    tokens, types, words, mask = map(torch.from_numpy, arrays)
    tasks, start = [], 0
    for task, data, split, numbers in parts:
        tasks.append(TaskRows(task, start, start + len(numbers), _label_tensor(data, split, numbers)))
        start += len(numbers)
    return Batch(tokens, mask, types, words, tuple(tasks))


def _label_tensor(data: TaskData, split: Split, rows: np.ndarray) -> Tensor:
    values = data.targets(split, rows)
    if data.kind == "regression":
        return torch.tensor(values, dtype=torch.float32)
    if data.kind == "classification":
        return torch.tensor(values, dtype=torch.int64)
    seen = [int(data.row(split, int(i))[2].max(initial=-1)) + 1 for i in rows]  # words that have a token
    width = max(1, *seen)
    padded = [tags[:n] + [IGNORE] * (width - n) for tags, n in zip(values, seen, strict=True)]
    return torch.tensor(padded, dtype=torch.int64)


class StepBatches:
    """The training batches of every step: ``batches(step)`` is a pure function of (config, step) for each rank."""

    def __init__(self, config: TrialConfig, tasks: Sequence[TaskData], rank: int = 0, world_size: int = 1) -> None:
        """Each rank gets every ``world_size``-th row of every group of the one global step."""
        self.config, self.tasks = config, tasks
        self.rank, self.world_size = rank, world_size
        mixture = config.mixture
        keep = [min((n for n in (mixture.low_resource.get(t.name), config.data.max_train) if n), default=None) for t in tasks]
        self.rows = [subset(t.name, t.size("train"), n) for t, n in zip(tasks, keep, strict=True)]
        lengths = [t.lengths("train")[rows] for t, rows in zip(tasks, self.rows, strict=True)]
        self.schedule = Schedule(mixture, [t.name for t in tasks], lengths, config.seed)

    def batches(self, step: int) -> list[Batch]:
        """The step's forwards, in order: one per group (``single_task``) or one for all (``mixed``)."""
        groups = self.schedule.groups(step)
        if self.config.mixture.batching == "single_task":
            return [collate([self._part(group)]) for group in groups]
        merged: list[Group] = []
        for group in groups:
            if merged and merged[-1].task == group.task:
                merged[-1] = Group(group.task, np.concatenate([merged[-1].rows, group.rows]))
            else:
                merged.append(group)
        return [collate([self._part(group) for group in merged])]

    def _part(self, group: Group) -> tuple[int, TaskData, Split, np.ndarray]:
        rows = self.rows[group.task][group.rows[self.rank :: self.world_size]]
        return group.task, self.tasks[group.task], "train", rows

    def digest(self, step: int) -> str:
        """16 hex digits of which examples step ``step`` holds, over all ranks."""
        content = hashlib.sha256()
        for group in self.schedule.groups(step):
            content.update(self.tasks[group.task].name.encode() + self.rows[group.task][group.rows].astype(np.int64).tobytes())
        return content.hexdigest()[:16]


def eval_batches(
    config: TrialConfig, number: int, data: TaskData, split: Split, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The split in batches of similar length: (row numbers, batch); each rank gets every ``world_size``-th batch."""
    rows = subset(data.name, data.size(split), config.data.max_eval)
    rows = rows[np.argsort(data.lengths(split)[rows], kind="stable")]
    size = config.train.eval_batch_size
    for start in range(rank * size, len(rows), world_size * size):
        chunk = rows[start : start + size]
        yield chunk, collate([(number, data, split, chunk)])
