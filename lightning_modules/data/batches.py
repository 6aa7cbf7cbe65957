"""From examples to batches: prepared arrays, then sliced by step and rank.

Shapes: B rows of a forward, S tokens of its longest row, W words of its longest example. A row is one window of one input
sequence; an input that fits into ``backbone.max_length`` is one row. An example has one sequence, or one per option (choice).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.config import TrialConfig
from lightning_modules.data.kinds import STRUCTURED
from lightning_modules.data.mixtures import Schedule, subset
from lightning_modules.data.prepared import TaskData, Windows
from lightning_modules.data.splits import few_shot
from lightning_modules.data.tasks import Split

SQUARE = 64
"""Tokens of a sentence up to which a structured kind is scored in batches of full size."""

IGNORE = -100
"""Label of what is padding."""


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The part of a batch that belongs to task number ``task``: its rows ``start:stop`` hold n examples."""

    task: int
    start: int
    stop: int
    labels: Tensor
    """In the form of ``lightning_modules.data.kinds``: (n,) int64 or float32, (n, W) or (n, K, width) int64, padded with
    :data:`IGNORE`; text2text (n, T) int64, the target's token ids."""
    weights: Tensor
    """(n,) float32: what each example's loss counts in the step's loss. Over all groups and workers they sum to 1."""
    first: int = -1
    """The part's sequences are ``first:last`` of the batch's; -1: its rows are its sequences."""
    last: int = -1
    options: Tensor | None = None
    """(n,) int64, the number of sequences of each example; None: one."""
    owner: Tensor | None = None
    """(stop - start,) int64, the example that each row belongs to, counted from the part's first; None: row i is example i."""

    @property
    def sequences(self) -> slice:
        """Where the part's sequences stand among the batch's."""
        return slice(self.start, self.stop) if self.first < 0 else slice(self.first, self.last)


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
    """(B, S) int64, the word that a token belongs to (kinds with words), -1 for special tokens and padding."""
    tasks: tuple[TaskRows, ...]
    stitch: Tensor | None = None
    """(N, S') int64 where some input has several windows: for each of the N sequences, the numbers of its tokens among the
    B x S of the rows, overlaps left out, -1 for padding. None: each row is a sequence."""
    starts: Tensor | None = None
    """(N, S') bool with ``stitch``: the first token of each window."""

    @property
    def task_ids(self) -> Tensor:
        """(B,) int64, the task number of every row."""
        numbers = torch.tensor([rows.task for rows in self.tasks], device=self.input_ids.device)
        return numbers.repeat_interleave(torch.tensor([r.stop - r.start for r in self.tasks], device=numbers.device))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``."""
        return replace(self, tasks=tuple(_moved(rows, device) for rows in self.tasks), **_tensors(self, device))


def _tensors(holder: Batch | TaskRows, device: torch.device | str) -> dict[str, Tensor]:
    values = {f.name: getattr(holder, f.name) for f in fields(holder)}
    return {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}


def _moved(rows: TaskRows, device: torch.device | str) -> TaskRows:
    return replace(rows, **_tensors(rows, device))


@dataclass(frozen=True, slots=True)
class Part:
    """Examples of one task that go into a batch."""

    task: int
    data: TaskData
    split: Split
    rows: np.ndarray
    """Numbers of the examples, (n,)."""
    weights: np.ndarray | None = None
    """(n,) float32, see :attr:`TaskRows.weights`; None: equal, summing to 1."""


def collate(parts: Sequence[Part]) -> Batch:
    """One batch of ``parts``, in that order, padded to the longest row."""
    windows = [part.data.windows(part.split, part.rows) for part in parts]
    rows = [row for part in windows for row in part.rows]
    width = max(len(row.tokens) for row in rows)
    tokens, types, words, mask = (np.full((len(rows), width), fill, dtype=np.int64) for fill in (parts[0].data.pad, 0, -1, 0))
    for i, row in enumerate(rows):
        n = len(row.tokens)
        tokens[i, :n], types[i, :n], words[i, :n], mask[i, :n] = row.tokens, row.types, row.words, 1
    several = any(len(part.rows) != len(part.rows_per_sequence) for part in windows)
    tasks, start, first = [], 0, 0
    for part, of_part in zip(parts, windows, strict=True):
        n = len(part.rows)
        stop, last = start + len(of_part.rows), first + len(of_part.rows_per_sequence)
        weights = np.full(n, 1 / max(1, n), dtype=np.float32) if part.weights is None else part.weights
        tasks.append(
            TaskRows(
                task=part.task,
                start=start,
                stop=stop,
                labels=label_tensor(part.data, part.split, part.rows),
                weights=torch.from_numpy(weights),
                first=first if several else -1,
                last=last if several else -1,
                options=None if of_part.options is None else torch.from_numpy(of_part.options),
                owner=_owners(of_part, n) if several or of_part.options is not None else None,
            )
        )
        start, first = stop, last
    tensors = map(torch.from_numpy, (tokens, mask, types, words))
    batch = Batch(*tensors, tasks=tuple(tasks))
    if not several:
        return batch
    counts = [n for part in windows for n in part.rows_per_sequence]
    stitch, starts = _stitch(counts, [row.keep for row in rows], width)
    return replace(batch, stitch=torch.from_numpy(stitch), starts=torch.from_numpy(starts))


def _owners(windows: Windows, examples: int) -> Tensor:
    """(rows,) the example that each row belongs to."""
    options = np.ones(examples, dtype=np.int64) if windows.options is None else windows.options
    of_sequences = np.repeat(np.arange(examples), options)
    return torch.from_numpy(np.repeat(of_sequences, windows.rows_per_sequence))


def _stitch(counts: Sequence[int], keep: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, S') token numbers (row x width + position) of each sequence and where its windows begin."""
    sequences, row = [], 0
    for count in counts:
        sequences.append([number * width + np.flatnonzero(keep[number]) for number in range(row, row + count)])
        row += count
    longest = max(sum(map(len, windows)) for windows in sequences)
    stitch = np.full((len(counts), longest), -1, dtype=np.int64)
    starts = np.zeros_like(stitch, dtype=bool)
    for i, windows in enumerate(sequences):
        together = np.concatenate(windows)
        stitch[i, : len(together)] = together
        starts[i, np.cumsum([0, *map(len, windows[:-1])])] = True
    return stitch, starts


def label_tensor(data: TaskData, split: Split, rows: np.ndarray) -> Tensor:
    """The labels of the given examples, padded with :data:`IGNORE` to the most items."""
    items = data.labels_of(split, rows)
    if data.scalar:
        values = np.concatenate(items) if items else np.zeros(0)
        return torch.from_numpy(values.astype(np.float32 if data.kind == "regression" else np.int64))
    longest = max([1, *map(len, items)])
    padded = np.full((len(items), longest, *items[0].shape[1:]), IGNORE, dtype=np.int64)
    for i, item in enumerate(items):
        padded[i, : len(item)] = item
    return torch.from_numpy(padded)


def chosen_rows(config: TrialConfig, task: TaskData, split: Split) -> np.ndarray:
    """Numbers, ascending, of the examples of ``split`` that a trial uses: few-shot sample, caps, low resource."""
    rows = np.arange(task.size(split))
    if config.data.few_shot is not None and split != "test":
        labels = task.class_of_each(split)
        rows = np.sort(few_shot(task.name, labels, config.data.few_shot, config.data.draw, task.size(split)))
    limit = config.data.max_train if split == "train" else config.data.max_eval
    if split == "train":
        limit = min((n for n in (limit, config.mixture.low_resource.get(task.name)) if n), default=None)
    return rows[subset(task.name, len(rows), limit)]


def facts_of(task: TaskData, rows: np.ndarray) -> dict[str, Any]:
    """What the task's head must know of the training data: as prepared, but mean and sd of regression labels are those of the
    examples that are used."""
    if task.kind != "regression" or len(rows) == task.size("train"):
        return task.facts
    values = np.concatenate(task.labels_of("train", rows)).astype(np.float64)
    return task.facts | {"mean": float(values.mean()), "sd": float(values.std()) or 1.0}


class StepBatches:
    """The training batches of every step: ``batches(step)`` is a pure function of (config, step) for each rank; with adaptive
    sampling of the shares learned so far, too (``schedule.segments``)."""

    def __init__(self, config: TrialConfig, tasks: Sequence[TaskData], rank: int = 0, world_size: int = 1) -> None:
        """Each rank gets every ``world_size``-th row of every group of the one global step."""
        self.config, self.tasks = config, tasks
        self.rank, self.world_size = rank, world_size
        self.rows = [chosen_rows(config, task, "train") for task in tasks]
        self.trained = [i for i, task in enumerate(tasks) if task.name not in config.mixture.held_out]
        names = [tasks[i].name for i in self.trained]
        lengths = [tasks[i].lengths("train")[self.rows[i]] for i in self.trained]
        budget = config.train.steps * config.mixture.batch_size
        self.schedule = Schedule(config.mixture, names, lengths, config.seed, budget=budget)

    @property
    def sizes(self) -> list[int]:
        """Training examples of each task, 0 for one that is held out."""
        return [len(rows) if i in self.trained else 0 for i, rows in enumerate(self.rows)]

    def totals(self, step: int) -> list[float]:
        """The weight of each of the T tasks in the step's loss, over all ranks; they sum to 1."""
        groups = self.schedule.groups(step)
        counts = np.bincount([self.trained[group.task] for group in groups], minlength=len(self.tasks))
        return (counts / len(groups)).tolist()

    def batches(self, step: int) -> list[Batch]:
        """The step's forwards, in order: one per group (``single_task``) or one for all (``mixed``). A rank for which a group
        has no row left takes no part in it."""
        parts = [part for part in self._parts(step) if len(part.rows)]
        if self.config.mixture.batching == "single_task":
            return [collate([part]) for part in parts]
        merged: list[Part] = []
        for part in parts:
            if merged and merged[-1].task == part.task:
                before = merged.pop()
                assert before.weights is not None and part.weights is not None
                rows, weights = (np.concatenate(pair) for pair in ((before.rows, part.rows), (before.weights, part.weights)))
                part = replace(part, rows=rows, weights=weights)
            merged.append(part)
        return [collate(merged)] if merged else []

    def _parts(self, step: int) -> Iterator[Part]:
        """This rank's part of each group of the step."""
        groups = self.schedule.groups(step)
        for group in groups:
            task = self.trained[group.task]
            rows = self.rows[task][group.rows[self.rank :: self.world_size]]
            weights = np.full(len(rows), 1 / (len(groups) * len(group.rows)), dtype=np.float32)
            yield Part(task, self.tasks[task], "train", rows, weights)

    def digest(self, step: int) -> str:
        """16 hex digits of which examples step ``step`` holds, over all ranks."""
        content = hashlib.sha256()
        for group in self.schedule.groups(step):
            task = self.trained[group.task]
            content.update(self.tasks[task].name.encode() + self.rows[task][group.rows].astype(np.int64).tobytes())
        return content.hexdigest()[:16]


def eval_batches(
    config: TrialConfig, number: int, data: TaskData, split: Split, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The split in batches of similar length: (example numbers, batch); each rank gets every ``world_size``-th batch.

    A batch holds ``eval_batch_size`` rows, or one example where that alone has more (long inputs and options have several);
    fewer where long sentences would make the tables of a structured head too large.
    """
    rows = chosen_rows(config, data, split)
    lengths, counts = data.lengths(split), data.row_counts(split)
    chunks: list[list[int]] = [[]]
    held = 0
    for row in rows[np.argsort(lengths[rows], kind="stable")]:
        # The structured heads' tables grow with the square of the length, and the rows come sorted by it.
        squares = (len(chunks[-1]) + 1) * int(lengths[row]) ** 2 if data.kind in STRUCTURED else 0
        full = held + counts[row] > config.train.eval_batch_size or squares > config.train.eval_batch_size * SQUARE**2
        if chunks[-1] and full:
            chunks.append([])
            held = 0
        chunks[-1].append(int(row))
        held += int(counts[row])
    for i, chunk in enumerate(chunks):
        if i % world_size == rank and chunk:
            numbers = np.array(chunk)
            yield numbers, collate([Part(number, data, split, numbers)])
