"""What examples, labels and answers of each kind of task look like. No torch here.

Rows, label items (the labels tensor given to a head, one item per row of it) and answers (what is scored):

================ ============================== =================================== ==================================
kind             row                            label items                         answer
================ ============================== =================================== ==================================
classification   text, text_pair?, label: str   [(label,)]                          label number
regression       text, text_pair?, label: float [(value,)]                          value
choice           text, options, label: int      [(option,)]                         option number
tagging          tokens, tags                   (tag,) per word                     tag number per word
spans            tokens, spans                  (start, end, label)                 the same
dependency       tokens, heads, deprels         (head, relation) per word           the same
constituency     tokens, spans                  (start, end, chain)                 (start, end, label), one per constituent
srl              tokens, frames                 (predicate, start, end, role)       the same
text2text        text, target, targets?         token ids (the tokeniser's)         list of references
================ ============================== =================================== ==================================

``spans``: ``[[start, end, label], ...]`` in words, end exclusive: flat in kind spans; in constituency properly nested, in
pre-order, equal spans outer first, without parts of speech. ``heads``: 0 is the root, else the head's number from 1.
``frames``: ``[{predicate: word, arguments: [[start, end, role], ...]}, ...]``; a predicate without arguments is the item
``(predicate, -1, -1, -1)``. A chain is a number in ``facts["chains"]``: the labels of one span, outer first.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_modules.building import ConfigError
from lightning_modules.data.sources import shorten

if TYPE_CHECKING:
    from lightning_modules.data.tasks import TaskSpec

KINDS = (
    "classification", "regression", "choice", "tagging", "spans", "dependency", "constituency", "srl", "text2text",
)  # fmt: skip
STRUCTURED = ("spans", "dependency", "constituency", "srl")
"""Kinds whose answers are structures over words, scored from tables that grow with the square of the length."""
LABELLED = ("classification", "tagging", "spans", "dependency", "constituency", "srl")
"""Kinds with a closed label set."""

_WIDTH = {"spans": 3, "dependency": 2, "constituency": 3, "srl": 4}


def width(kind: str) -> int:
    """Numbers per label item."""
    return _WIDTH.get(kind, 1)


# -- checks --------------------------------------------------------------------------------------------------------------


def check_row(spec: "TaskSpec", row: Mapping[str, Any], place: str) -> None:
    """Raise ConfigError, with ``place``, unless ``row`` has the form of the task's kind and labels of its label set (any label
    where the set is not known yet)."""
    _CHECKS[spec.kind](spec, row, place)
    _check_unicode(row, place)


_NOTHING = object()


def _law(condition: bool, place: str, law: str, got: Any = _NOTHING) -> None:
    if not condition:
        raise ConfigError(place, law if got is _NOTHING else f"{law}, got {shorten(got)}")


def _need(spec: "TaskSpec", row: Mapping[str, Any], place: str, names: Sequence[str]) -> None:
    for name in names:
        _law(name in row, place, f"{spec.kind} needs {name}", row)


def _check_label(spec: "TaskSpec", label: Any, place: str, what: str = "label") -> None:
    if isinstance(label, str) and (not spec.labels or label in _label_set(spec.labels)):
        return
    shown = ", ".join(spec.labels[:12]) + (", ..." if len(spec.labels) > 12 else "")
    hint = " (a split without labels?)" if label == -1 else ""
    raise ConfigError(place, f"{what} must be one of {shown or 'a set of texts'}, got {label!r}{hint}")


@lru_cache(maxsize=64)
def _label_set(labels: tuple[str, ...]) -> frozenset[str]:
    return frozenset(labels)


def _check_text(spec: "TaskSpec", row: Mapping[str, Any], place: str) -> None:
    _need(spec, row, place, ("text", "target" if spec.kind == "text2text" else "label"))
    texts = isinstance(row["text"], str) and isinstance(row.get("text_pair", ""), str)
    _law(texts, place, f"{spec.kind} needs text (and text_pair) to be text", row)


def _check_classification(spec: "TaskSpec", row: Mapping[str, Any], place: str) -> None:
    _check_text(spec, row, place)
    _check_label(spec, row["label"], place)


def _check_regression(spec: "TaskSpec", row: Mapping[str, Any], place: str) -> None:
    _check_text(spec, row, place)
    label = row["label"]
    finite = isinstance(label, (int, float)) and not isinstance(label, bool) and -1e30 < label < 1e30
    _law(finite, place, f"label must be a finite number, got {label!r}")


def _check_choice(spec: "TaskSpec", row: Mapping[str, Any], place: str) -> None:
    _need(spec, row, place, ("text", "options", "label"))
    _check_text(spec, row, place)
    options = row["options"]
    _law(is_texts(options) and len(options) > 1, place, "options must be a list of two texts or more", options)
    right = type(row["label"]) is int and 0 <= row["label"] < len(options)
    _law(right, place, f"label must be the number of an option, 0 to {len(options) - 1}, got {row['label']!r}")


def _check_tokens(spec: "TaskSpec", row: Mapping[str, Any], place: str, *columns: str) -> None:
    _need(spec, row, place, ("tokens", *columns))
    for name in ("tokens", *columns):
        right = is_texts(row[name]) if name == "tokens" else isinstance(row[name], list)
        _law(right, place, f"{spec.kind} needs {' and '.join(('tokens', *columns))}, lists of text", row)


def _check_lengths(row: Mapping[str, Any], place: str, *columns: str) -> None:
    lengths = [len(row[name]) for name in ("tokens", *columns)]
    law = f"tokens and {' and '.join(columns)} must have the same length, at least 1, got {' and '.join(map(str, lengths))}"
    _law(len(set(lengths)) == 1 and lengths[0] > 0, place, law)


def _check_tagging(spec: "TaskSpec", row: Mapping[str, Any], place: str) -> None:
    law = "column predicate_index belongs to kind srl, tagging would ignore it: say kind: srl"
    _law("predicate_index" not in row, place, law)
    _check_tokens(spec, row, place, "tags")
    _check_lengths(row, place, "tags")
    for tag in row["tags"]:
        _check_label(spec, tag, place, "tag")


def _check_spans(spec: "TaskSpec", row: Mapping[str, Any], place: str) -> None:
    _check_span_list(spec, row, row.get("spans"), place)
    _check_flat(row["spans"], place, "spans")


def _check_constituency(spec: "TaskSpec", row: Mapping[str, Any], place: str) -> None:
    _check_span_list(spec, row, row.get("spans"), place)
    open_ends: list[tuple[int, int, str]] = []
    for start, end, label in row["spans"]:  # in pre-order
        while open_ends and open_ends[-1][1] <= start:
            open_ends.pop()
        if open_ends and open_ends[-1][1] < end:
            law = f"spans must be nested, got {list(open_ends[-1])} and {[start, end, label]}"
            raise ConfigError(place, law)
        open_ends.append((start, end, label))


def _check_span_list(
    spec: "TaskSpec", row: Mapping[str, Any], spans: Any, place: str, what: str = "spans", label: str = "label"
) -> None:
    _check_tokens(spec, row, place, *(("spans",) if what == "spans" else ()))
    n = len(row["tokens"])
    _law(n > 0, place, "tokens must have at least one word, got none")
    _law(is_spans(spans), place, f"{what} must be a list of [start, end, {label}]", spans)
    for start, end, name in spans:
        _law(0 <= start < end <= n, place, f"{what} must have 0 <= start < end <= {n} words", [start, end, name])
        _check_label(spec, name, place, label)


def _check_flat(spans: Sequence[Sequence[Any]], place: str, what: str) -> None:
    ordered = sorted(spans, key=lambda span: (span[0], span[1]))
    for one, other in pairwise(ordered):
        _law(one[1] <= other[0], place, f"{what} must not overlap", [one, other])


def _check_dependency(spec: "TaskSpec", row: Mapping[str, Any], place: str) -> None:
    _check_tokens(spec, row, place, "heads", "deprels")
    _check_lengths(row, place, "heads", "deprels")
    heads, n = row["heads"], len(row["tokens"])
    for head in heads:
        _law(type(head) is int and 0 <= head <= n, place, f"heads must be whole numbers from 0 to {n}, got {head!r}")
    for relation in row["deprels"]:
        _check_label(spec, relation, place, "relation")
    reaches_root = [True] + [False] * n
    for word in range(1, n + 1):
        path: list[int] = []
        while not reaches_root[word]:
            _law(word not in path, place, f"heads must lead to 0, but word {word} is in a cycle", heads)
            path.append(word)
            word = heads[word - 1]
        for passed in path:
            reaches_root[passed] = True


def _check_srl(spec: "TaskSpec", row: Mapping[str, Any], place: str) -> None:
    law = "srl needs frames, or predicate_index and BIO tags of the length of tokens"
    _law(isinstance(row.get("frames"), list), place, law, row)
    _check_tokens(spec, row, place)
    predicates = []
    for frame in row["frames"]:
        right = isinstance(frame, dict) and is_index(frame.get("predicate"), row["tokens"])
        _law(right, place, "frame must have predicate, the number of a word, and arguments", frame)
        _check_span_list(spec, row, frame.get("arguments"), place, "arguments", "role")
        _check_flat(frame["arguments"], place, "arguments")
        predicates.append(frame["predicate"])
    _law(len(set(predicates)) == len(predicates), place, "frames must have different predicates", predicates)


def _check_text2text(spec: "TaskSpec", row: Mapping[str, Any], place: str) -> None:
    _check_text(spec, row, place)
    target, targets = row["target"], row.get("targets", [row["target"]])
    _law(isinstance(target, str) and bool(target.strip()), place, f"target must be text, got {target!r}")
    right = is_texts(targets) and target in targets
    _law(right, place, "targets must be a list of texts with the target in it", targets)
    if spec.labels:
        _check_label(spec, target, place, "target")


_CHECKS = {
    "classification": _check_classification,
    "regression": _check_regression,
    "choice": _check_choice,
    "tagging": _check_tagging,
    "spans": _check_spans,
    "dependency": _check_dependency,
    "constituency": _check_constituency,
    "srl": _check_srl,
    "text2text": _check_text2text,
}


def _check_unicode(row: Mapping[str, Any], place: str) -> None:
    for name in ("text", "text_pair", "tokens", "options", "target", "targets"):
        value = row.get(name, "")
        try:
            ("".join(value) if isinstance(value, list) else value).encode()
        except UnicodeEncodeError as error:
            raise ConfigError(place, f"text must be valid Unicode: {error}") from None


def is_texts(value: Any) -> bool:
    """Whether ``value`` is a list of texts."""
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def is_spans(value: Any) -> bool:
    """Whether ``value`` is a list of [whole number, whole number, anything]."""
    return isinstance(value, list) and all(
        isinstance(span, (list, tuple)) and len(span) == 3 and type(span[0]) is int and type(span[1]) is int for span in value
    )


def is_index(value: Any, tokens: Sequence[Any]) -> bool:
    """Whether ``value`` is the number of one of ``tokens``."""
    return type(value) is int and 0 <= value < len(tokens)


# -- rows -> labels and answers ------------------------------------------------------------------------------------------


def labels_of(kind: str, row: Mapping[str, Any]) -> Iterator[str]:
    """Every label in a row of a task with a closed label set, as often as it stands there."""
    match kind:
        case "classification":
            yield row["label"]
        case "text2text":
            yield row["target"]
        case "tagging":
            yield from row["tags"]
        case "dependency":
            yield from row["deprels"]
        case "spans" | "constituency":
            yield from (label for *_, label in row["spans"])
        case "srl":
            yield from (role for frame in row["frames"] for *_, role in frame["arguments"])


def facts(spec: "TaskSpec", rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What a head must know of the data. ``rows``: split -> rows. Plain JSON.

    regression: ``mean`` and (population) ``sd`` of train's labels. constituency: ``chains``, lists of label numbers, in the
    order in which they first occur, train before the other splits. Other kinds: nothing.
    """
    if spec.kind == "regression":
        values = np.array([row["label"] for row in rows["train"]], dtype=np.float64)
        return {"mean": float(values.mean()), "sd": float(values.std())}
    if spec.kind == "constituency":
        number = label_numbers(spec.labels)
        order = ["train", *(split for split in rows if split != "train")]
        chains = (chain for split in order for row in rows[split] for *_, chain in _chains(row["spans"], number))
        return {"chains": [list(chain) for chain in dict.fromkeys(chains)]}
    return {}


@lru_cache(maxsize=64)
def label_numbers(labels: tuple[str, ...]) -> Mapping[str, int]:
    """Label -> its number."""
    return {label: i for i, label in enumerate(labels)}


def _chains(spans: Iterable[Sequence[Any]], number: Mapping[str, int]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Spans in pre-order with the labels of equal ones put together, outer first."""
    for (start, end), group in groupby(spans, key=lambda span: (span[0], span[1])):
        yield start, end, tuple(number[label] for *_, label in group)


def label_items(spec: "TaskSpec", row: Mapping[str, Any], facts: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The label items of a row, see the table above; ``facts`` as :func:`facts` gives them for the task.

    Raises:
        ValueError: the task is text2text, whose labels are token ids.
    """
    number = label_numbers(spec.labels)
    match spec.kind:
        case "classification":
            return [(number[row["label"]],)]
        case "regression":
            return [(float(row["label"]),)]
        case "choice":
            return [(row["label"],)]
        case "tagging":
            return [(number[tag],) for tag in row["tags"]]
        case "spans":
            return [(start, end, number[label]) for start, end, label in row["spans"]]
        case "dependency":
            return [(head, number[relation]) for head, relation in zip(row["heads"], row["deprels"], strict=True)]
        case "constituency":
            # The common chains come first: a search is faster than to build an index for every row.
            chains: list[list[int]] = facts["chains"]
            return [(start, end, chains.index(list(chain))) for start, end, chain in _chains(row["spans"], number)]
        case "srl":
            return [item for frame in row["frames"] for item in _frame_items(frame, number)]
        case _:
            raise ValueError(f"kind {spec.kind} has no label items")


def _frame_items(frame: Mapping[str, Any], number: Mapping[str, int]) -> list[tuple[int, int, int, int]]:
    predicate = frame["predicate"]
    items = [(predicate, start, end, number[role]) for start, end, role in frame["arguments"]]
    return items or [(predicate, -1, -1, -1)]


def gold(kind: str, items: Sequence[Sequence[Any]], facts: Mapping[str, Any]) -> Any:
    """The answer that scores compare with, from a row's label items; see the table above."""
    match kind:
        case "classification" | "choice":
            return int(items[0][0])
        case "regression":
            return float(items[0][0])
        case "tagging":
            return [tag for (tag,) in items]
        case "constituency":
            return [(start, end, label) for start, end, chain in items for label in facts["chains"][chain]]
        case _:
            return [tuple(item) for item in items]
