"""Scores of one task from its predictions: every metric of the kind, and the one that comparisons use.

A score that is not defined for the data at hand is ``None`` with the reason, never NaN.
The values are those of scikit-learn (classification), scipy (regression) and seqeval (spans).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from lightning_modules.data.tasks import METRICS, metric_parts


@dataclass(frozen=True)
class Scores:
    """Metric name -> value, and for values of ``None`` why they are not defined."""

    values: dict[str, float | None] = field(default_factory=dict)
    undefined: dict[str, str] = field(default_factory=dict)


class UndefinedScoreError(ValueError):
    """A score has no value for these predictions and targets; the message is the reason."""


def score(kind: str, metric: str, labels: Sequence[str], predictions: Sequence[Any], targets: Sequence[Any]) -> Scores:
    """All scores of ``kind`` and ``metric``, which keeps the name that the catalogue gives it.

    ``labels`` is the task's label set. Predictions and targets, one per example: label number (classification), number
    (regression), or label numbers per word (tagging; a prediction of -1 is no answer: always wrong, and no span).

    Raises:
        ValueError: unknown kind or metric, or predictions and targets differ in length.
    """
    if kind not in METRICS or metric_parts(metric)[0] not in METRICS[kind]:
        raise ValueError(f"metric must be one of {METRICS.get(kind, ())} for kind {kind}, got {metric!r}")
    if len(predictions) != len(targets):
        raise ValueError(f"predictions and targets must be as many, got {len(predictions)} and {len(targets)}")
    names = dict.fromkeys([*(name for name in METRICS[kind] if name != "f1_positive"), metric])
    scores = Scores()
    for name in names:
        try:
            if not targets:
                raise UndefinedScoreError("no examples")
            scores.values[name] = _value(kind, name, labels, predictions, targets)
        except UndefinedScoreError as reason:
            scores.values[name] = None
            scores.undefined[name] = str(reason)
    return scores


def _value(kind: str, metric: str, labels: Sequence[str], predictions: Sequence[Any], targets: Sequence[Any]) -> float:
    name, argument = metric_parts(metric)
    if kind == "tagging":
        return _span_f1(labels, predictions, targets) if name == "span_f1" else _token_accuracy(predictions, targets)
    if kind == "regression":
        return _regression(name, np.asarray(predictions, dtype=float), np.asarray(targets, dtype=float))
    table = confusion(np.asarray(predictions), np.asarray(targets), len(labels))
    match name:
        case "accuracy":
            return float(table.trace() / table.sum())
        case "mcc":
            return _mcc(table)
        case "f1_positive":
            return float(_f1(table)[labels.index(argument)])
        case _:
            left_out = argument.removeprefix("without ")
            return float(np.mean([f1 for label, f1 in zip(labels, _f1(table), strict=True) if label != left_out]))


def confusion(predictions: np.ndarray, targets: np.ndarray, num_labels: int) -> np.ndarray:
    """(C, C) counts of label numbers (n,): row = target, column = prediction."""
    return np.bincount(targets * num_labels + predictions, minlength=num_labels**2).reshape(num_labels, num_labels)


def _f1(table: np.ndarray) -> np.ndarray:
    """F1 of each label, 0 for a label that is neither a target nor predicted."""
    return 2 * table.diagonal() / np.maximum(table.sum(0) + table.sum(1), 1)


def _mcc(table: np.ndarray) -> float:
    """Matthews correlation for any number of labels (Gorodkin 2004); 0 when targets or predictions are constant."""
    counts = table.astype(float)
    n, target, predicted = counts.sum(), counts.sum(1), counts.sum(0)
    spread = (n**2 - target @ target) * (n**2 - predicted @ predicted)
    return float((counts.trace() * n - target @ predicted) / np.sqrt(spread)) if spread > 0 else 0.0


def _regression(name: str, predictions: np.ndarray, targets: np.ndarray) -> float:
    if not np.isfinite(predictions).all():
        raise UndefinedScoreError(f"{np.sum(~np.isfinite(predictions))} of {len(predictions)} predictions are not finite")
    if name == "mse":
        with np.errstate(over="ignore"):
            error = float(np.mean((predictions - targets) ** 2))
        if not np.isfinite(error):
            raise UndefinedScoreError("the squared error is too large for a float")
        return error
    for which, numbers in (("predictions", predictions), ("targets", targets)):
        if np.all(numbers == numbers[0]):
            raise UndefinedScoreError(f"all {len(numbers)} {which} are {numbers[0]:g}: no correlation with a constant")
    if name == "spearman":
        predictions, targets = stats.rankdata(predictions), stats.rankdata(targets)
    return _pearson(predictions, targets)


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def _token_accuracy(predictions: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> float:
    right = words = 0
    for predicted, gold in zip(predictions, targets, strict=True):
        words += len(gold)
        right += sum(p == g for p, g in zip(predicted, gold, strict=True))
    if not words:
        raise UndefinedScoreError("no words")
    return right / words


def _span_f1(labels: Sequence[str], predictions: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> float:
    """F1 over exact spans of all types together, 0 when nothing is right."""
    plain = [label for label in labels if label != "O" and label[:2] not in ("B-", "I-")]
    if plain or all(label == "O" for label in labels):
        raise UndefinedScoreError(f"labels mark no spans (B-..., I-..., O), got {', '.join((plain or list(labels))[:3])}")
    found = {(i, *span) for i, tags in enumerate(predictions) for span in spans([labels[t] if t >= 0 else "O" for t in tags])}
    wanted = {(i, *span) for i, tags in enumerate(targets) for span in spans([labels[t] for t in tags])}
    return 2 * len(found & wanted) / max(len(found) + len(wanted), 1)


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, last word) of each span in BIO tags. As conlleval and seqeval's default mode have it, an I- that
    follows O or another type begins a span."""
    found: list[tuple[str, int, int]] = []
    previous, start = "O", 0
    for i, tag in enumerate([*tags, "O"]):
        inside = tag.startswith("I-") and previous[1:] == tag[1:]
        if previous != "O" and not inside:
            found.append((previous[2:], start, i - 1))
        if tag != "O" and not inside:
            start = i
        previous = tag
    return found
