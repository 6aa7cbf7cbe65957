"""Which examples are in which split: recipes, few-shot samples, and examples that stand in two splits. No torch here."""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_modules.seeds import derive

INPUTS = ("text", "text_pair", "options", "tokens")
"""Fields of a row that are its input; the others are its answer."""


@dataclass(frozen=True, slots=True)
class Part:
    """The examples of a source whose :func:`position` is in [start, end)."""

    source: str
    start: float = 0.0
    end: float = 1.0

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether an example belongs to the part."""
        return (self.start, self.end) == (0.0, 1.0) or self.start <= position(row) < self.end


def parts(recipe: Mapping[str, Any], splits: Sequence[str]) -> dict[str, tuple[Part, ...]]:
    """Where each split comes from. ``recipe`` has for a split: a source, a list of them, or ``{from: source or list, share:
    s}`` for a part of it; a split that it does not name is the source of its own name. A source that is used whole elsewhere
    gives what is left of it.

    Raises:
        ValueError: the recipe is malformed, two splits get the same examples, or the shares of a source exceed 1.
    """
    unknown = [split for split in recipe if split not in splits]
    _require(not unknown, f"splits must be of {', '.join(splits)}, got {', '.join(map(str, unknown))}")
    wanted = {split: _sources(split, recipe.get(split, split)) for split in splits}
    carved: dict[str, float] = defaultdict(float)
    found: dict[str, tuple[Part, ...]] = {}
    for split, (sources, share) in wanted.items():
        if share is not None:
            ends = {source: carved[source] + share for source in sources}
            for source, end in ends.items():
                _require(end < 1 + 1e-9, f"splits must carve at most all of {source!r}, got {end:g}")
            found[split] = tuple(Part(source, carved[source], 1.0 if end > 1 - 1e-9 else end) for source, end in ends.items())
            carved |= ends
    owner: dict[str, str] = {}
    for split, (sources, share) in wanted.items():
        if share is None:
            for source in sources:
                _require(source not in owner, f"splits {owner.get(source)} and {split} must not both be {source!r}")
                _require(carved[source] < 1 - 1e-9, f"splits must leave something of {source!r} for {split}")
                owner[source] = split
            found[split] = tuple(Part(source, carved[source]) for source in sources)
    return {split: found[split] for split in splits}


def _sources(split: str, value: Any) -> tuple[list[str], float | None]:
    share = None
    if isinstance(value, dict):
        share = value.get("share")
        right = set(value) == {"from", "share"} and isinstance(share, float) and 0 < share < 1
        _require(right, f"splits.{split} must have from and a share between 0 and 1, got {value!r}")
        value = value["from"]
    sources = value if isinstance(value, list) else [value]
    right = bool(sources) and all(isinstance(source, str) for source in sources) and len(set(sources)) == len(sources)
    _require(right, f"splits.{split} must be a source, a list of sources or {{from, share}}, got {value!r}")
    return sources, share


def _require(condition: bool, law: str) -> None:
    if not condition:
        raise ValueError(law)


def content(row: Mapping[str, Any]) -> str:
    """The input of an example as one text; words count as the text that they make."""
    values = [row[name] for name in INPUTS if name in row]
    return "\x1f".join(" ".join(value) if isinstance(value, list) else value for value in values)


def position(row: Mapping[str, Any]) -> float:
    """A fixed number in [0, 1) from the input of an example. Equal inputs have the same one, in every task and order, so that
    tasks over the same sentences are carved alike."""
    return _hash(content(row)) / 2**64


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def few_shot(name: str, labels: Sequence[Any] | None, k: int, draw: int, size: int) -> np.ndarray:
    """Row numbers, ascending, of few-shot sample number ``draw`` of the ``size`` examples of task ``name``: k of each class of
    ``labels`` (all of a class that has fewer), or 2 k in all for None. A smaller k's sample is part of a larger one's.

    Sizes as in the CrossFit gym (Ye et al. 2021: 16 per class, 32 for tasks that are no classification).
    """
    rng = random.Random(derive(0, "few_shot", name, draw))
    keys = [rng.random() for _ in range(size)]
    groups: dict[Any, list[int]] = defaultdict(list)
    for row in sorted(range(size), key=keys.__getitem__):
        groups[None if labels is None else labels[row]].append(row)
    kept = [row for rows in groups.values() for row in rows[: 2 * k if labels is None else k]]
    return np.array(sorted(kept), dtype=np.int64)


@dataclass(slots=True)
class Census:
    """Counts what is doubtful about a task's examples."""

    inputs: dict[str, dict[int, int]] = field(default_factory=dict)
    """split -> hash of an input -> how often it stands there."""
    answers: dict[int, dict[int, int]] = field(default_factory=dict)
    """Hash of an input of train -> hash of its answer -> how often they stand together."""
    empty: int = 0

    def add(self, split: str, row: Mapping[str, Any]) -> None:
        """Take in one example."""
        key = _hash(content(row))
        counts = self.inputs.setdefault(split, {})
        counts[key] = counts.get(key, 0) + 1
        self.empty += any(not text.strip() for text in _texts(row))
        if split == "train" and "target" not in row:  # several references of one text are no contradiction
            answer = _hash(json.dumps({name: value for name, value in row.items() if name not in INPUTS}, sort_keys=True))
            seen = self.answers.setdefault(key, {})
            seen[answer] = seen.get(answer, 0) + 1

    def warnings(self) -> list[str]:
        """One sentence with its count for everything that was found."""
        found = []
        for split, other in (("test", "train"), ("dev", "train"), ("test", "dev")):
            counts, others = self.inputs.get(split, {}), self.inputs.get(other, {})
            shared = sum(n for key, n in counts.items() if key in others)
            if shared:
                found.append(f"{shared} of {sum(counts.values())} {split} examples also stand in {other}")
        conflicts = sum(sum(seen.values()) for seen in self.answers.values() if len(seen) > 1)
        if conflicts:
            total = sum(self.inputs["train"].values())
            found.append(f"{conflicts} of {total} train examples have the input of another one that is labelled differently")
        if self.empty:
            found.append(f"{self.empty} of {sum(sum(n.values()) for n in self.inputs.values())} examples have an empty text")
        return found


def _texts(row: Mapping[str, Any]) -> list[str]:
    texts = []
    for name in INPUTS:
        value = row.get(name, [])
        texts += value if isinstance(value, list) else [value]
    return texts
