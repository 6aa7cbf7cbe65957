"""Texts and words as rows of tokens; a sequence that is too long for the model becomes several overlapping windows."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from lightning_modules.config import BackboneConfig
from lightning_modules.data.tokenizer import wants_spaces

WORD_KINDS = ("tagging", "spans", "dependency", "constituency", "srl")
"""Kinds whose examples are words rather than text."""


class Row(NamedTuple):
    """One window, each (tokens,)."""

    tokens: np.ndarray
    types: np.ndarray
    """Segment numbers: 1 in the second text of a pair."""
    words: np.ndarray
    """Word numbers, -1 for what is not part of a word."""
    keep: np.ndarray
    """bool: tokens whose state is taken from this window."""


_COLUMNS = (("tokens", np.int32), ("types", np.int8), ("words", np.int32), ("keep", np.bool_))


class Tokens:
    """The rows of a split as they are tokenised."""

    def __init__(self) -> None:
        self.rows: list[tuple[list[int], list[int], list[int], list[bool]]] = []
        """Those that have not been packed."""
        self._packed: list[list[np.ndarray]] = [[np.zeros(0, dtype)] for _, dtype in _COLUMNS]
        self._lengths: list[int] = []
        self.rows_per_sequence: list[int] = []
        self.sequences_per_example: list[int] = []
        self.windowed = 0
        self.cut = 0

    def pack(self) -> None:
        """Turn the rows into arrays: in lists a token takes 72 bytes, in arrays 10."""
        for i, (_, dtype) in enumerate(_COLUMNS):
            self._packed[i].append(np.fromiter((value for row in self.rows for value in row[i]), dtype=dtype))
        self._lengths += [len(row[0]) for row in self.rows]
        self.rows.clear()

    def arrays(self) -> dict[str, np.ndarray]:
        """The columns of all rows, flat; where each row starts in them (``offsets``), each sequence among the rows
        (``sequence_rows``), and each example among the sequences (``example_sequences``)."""
        flat = {name: np.concatenate(packed) for (name, _), packed in zip(_COLUMNS, self._packed, strict=True)}
        return flat | {
            "offsets": offsets_of(self._lengths),
            "sequence_rows": offsets_of(self.rows_per_sequence),
            "example_sequences": offsets_of(self.sequences_per_example),
        }


def offsets_of(lengths: Iterable[int]) -> np.ndarray:
    """(n + 1,) where each of n consecutive pieces starts, and the end of the last."""
    return np.cumsum([0, *lengths])


def tokenise(
    kind: str, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, backbone: BackboneConfig, pairs: bool
) -> Tokens:
    """All rows of a split. In a task with pairs (``pairs``) an example without a second text has an empty one."""
    tokens = Tokens()
    words = kind in WORD_KINDS
    tokens.sequences_per_example = [len(row["options"]) if kind == "choice" else 1 for row in rows]
    if words and wants_spaces(tokenizer):
        rows = [{"tokens": [f" {token}" for token in row["tokens"]]} for row in rows]
    for chunk in _inputs(kind, rows).iter(batch_size=1000):
        assert isinstance(chunk, dict)
        firsts = chunk["tokens"] if words else chunk["text"]
        seconds = chunk["text_pair"] if pairs or kind == "choice" else None
        whole = tokenizer(firsts, seconds, is_split_into_words=words, return_token_type_ids=True, verbose=False)
        for i, ids in enumerate(whole["input_ids"]):
            if len(ids) <= backbone.max_length:
                numbers = _word_numbers(whole, i) if words else [-1] * len(ids)
                tokens.rows.append((ids, whole["token_type_ids"][i], numbers, [True] * len(ids)))
                tokens.rows_per_sequence.append(1)
                continue
            windows, cut = _windows(tokenizer, firsts[i], seconds[i] if seconds else None, backbone)
            tokens.rows += windows
            tokens.rows_per_sequence.append(len(windows))
            tokens.windowed += len(windows) > 1
            tokens.cut += cut
        tokens.pack()
    return tokens


def _word_numbers(encoded: Any, i: int) -> list[int]:
    return [-1 if word is None else word for word in encoded.word_ids(i)]


def _inputs(kind: str, rows: list[dict[str, Any]]) -> Dataset:
    """The input columns as a typed table; whatever else the rows hold is none of the model's business."""
    if kind in WORD_KINDS:
        columns = Features({"tokens": List(Value("string"))})
        return Dataset.from_dict({"tokens": [row["tokens"] for row in rows]}, features=columns)
    pairs = [
        (row["text"], second) for row in rows for second in (row["options"] if kind == "choice" else [row.get("text_pair", "")])
    ]
    texts = {"text": [first for first, _ in pairs], "text_pair": [second for _, second in pairs]}
    return Dataset.from_dict(texts, features=Features({"text": Value("string"), "text_pair": Value("string")}))


def _windows(
    tokenizer: PreTrainedTokenizerBase, first: Any, second: str | None, backbone: BackboneConfig
) -> tuple[list[tuple[list[int], list[int], list[int], list[bool]]], int]:
    """The windows of one input that is longer than ``max_length``, and how many of its tokens none of them holds.

    Of a pair the longer text is windowed and the shorter one stands in every window, cut where it is longer than half the
    room. A token in the overlap of two windows is kept in the one where it stands further from the edge.
    """
    words = not isinstance(first, str)
    room = backbone.max_length - tokenizer.num_special_tokens_to_add(second is not None)
    long_first, cut = True, 0
    if second is not None:
        lengths = [len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in (first, second)]
        long_first = lengths[0] >= lengths[1]
        longest_short = room // 2
        if min(lengths) > longest_short:
            cut += min(lengths) - longest_short
            first, second = (first, _shorten(tokenizer, second, longest_short)) if long_first else (
                _shorten(tokenizer, first, longest_short), second)  # fmt: skip
        room -= min(*lengths, longest_short)
    overlap = min(int(room * backbone.window_overlap), room - 1)
    encoded = tokenizer(
        first,
        second,
        is_split_into_words=words,
        truncation="only_first" if long_first else "only_second",
        max_length=backbone.max_length,
        stride=overlap,
        return_overflowing_tokens=True,
        return_token_type_ids=True,
        verbose=False,
    )
    windowed_text = 0 if long_first else 1
    inside = [[number == windowed_text for number in encoded.sequence_ids(w)] for w in range(len(encoded["input_ids"]))]
    cut += sum(sum(window) - overlap for window in inside[backbone.max_windows :])
    windows = []
    for w, window in enumerate(inside[: backbone.max_windows]):
        content = np.flatnonzero(window)
        keep = np.ones(len(window), dtype=bool)
        if w > 0:
            keep[content[: overlap // 2]] = False
        if w + 1 < min(len(inside), backbone.max_windows):
            keep[content[len(content) - math.ceil(overlap / 2) :]] = False
        numbers = _word_numbers(encoded, w) if words else [-1] * len(window)
        windows.append((encoded["input_ids"][w], encoded["token_type_ids"][w], numbers, keep.tolist()))
    return windows, cut


def _shorten(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> str:
    """The beginning of ``text`` that its first ``tokens`` tokens stand for."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text[: offsets[tokens - 1][1]]
