"""Scores of label numbers, with the values of scikit-learn, and of numbers, with those of scipy."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

NO_ANSWER = -1
"""A prediction that is none of the labels: always wrong."""


class UndefinedScoreError(ValueError):
    """A score has no value for these predictions and targets; the message is the reason."""


def label_score(name: str, argument: str, labels: Sequence[str], predictions: Sequence[int], targets: Sequence[int]) -> float:
    """Accuracy, F1 or Matthews correlation of label numbers, one per example.

    A prediction of :data:`NO_ANSWER` is one more, wrong column: it costs 1/n of accuracy and adds no class to a mean over
    classes. Macro F1 averages over all of ``labels``, also those that never occur, so predictions cannot change what is
    averaged. Without ``labels`` (choice: the numbers of options) it averages over the numbers that are right at least once.
    """
    guess, gold = np.asarray(predictions), np.asarray(targets)
    table = _confusion(guess, gold, len(labels) or int(max(guess.max(), gold.max())) + 1)
    match name:
        case "accuracy":
            return float(table.trace() / table.sum())
        case "micro_f1":
            return float(2 * table.trace() / (table.sum() + table[:, :-1].sum()))
        case "mcc":
            return _mcc(table)
        case "f1_positive":
            return float(_f1(table)[labels.index(argument)])
        case "macro_f1":
            left_out = argument.removeprefix("without ")
            averaged = [label != left_out for label in labels] if labels else table.sum(1) > 0
            return float(_f1(table)[averaged].mean())
        case _:
            raise ValueError(f"metric must be a score of labels, got {name!r}")


def _confusion(predictions: np.ndarray, targets: np.ndarray, num_labels: int) -> np.ndarray:
    """(C, C + 1) counts of label numbers (n,): row = target, column = prediction, the last one for no answer."""
    columns = np.where(predictions == NO_ANSWER, num_labels, predictions)
    shape = (num_labels, num_labels + 1)
    return np.bincount(targets * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)


def _f1(table: np.ndarray) -> np.ndarray:
    """(C,) F1 of each label, 0 for a label that is neither a target nor predicted."""
    return 2 * table.diagonal() / np.maximum(table.sum(0)[:-1] + table.sum(1), 1)


def _mcc(table: np.ndarray) -> float:
    """Matthews correlation for any number of labels (Gorodkin 2004); 0 when targets or predictions are constant."""
    counts = table.astype(float)
    n, target, predicted = counts.sum(), counts.sum(1), counts.sum(0)
    spread = (n**2 - target @ target) * (n**2 - predicted @ predicted)
    return float((counts.trace() * n - target @ predicted[:-1]) / np.sqrt(spread)) if spread > 0 else 0.0


def number_score(name: str, predictions: Sequence[float], targets: Sequence[float]) -> float:
    """Pearson or Spearman correlation, or mean squared error.

    Raises:
        UndefinedScoreError: a prediction is not finite, the error overflows, or a side of a correlation is constant.
    """
    guess, gold = np.asarray(predictions, dtype=float), np.asarray(targets, dtype=float)
    if not np.isfinite(guess).all():
        raise UndefinedScoreError(f"{np.sum(~np.isfinite(guess))} of {len(guess)} predictions are not finite")
    if name == "mse":
        with np.errstate(over="ignore"):
            error = float(np.mean((guess - gold) ** 2))
        if not np.isfinite(error):
            raise UndefinedScoreError("the squared error is too large for a float")
        return error
    _refuse_constant("predictions", guess)
    _refuse_constant("targets", gold)
    if name == "spearman":
        guess, gold = stats.rankdata(guess), stats.rankdata(gold)
    return _pearson(guess, gold)


def answer_score(name: str, answers: Sequence[float | None], targets: Sequence[float]) -> float:
    """:func:`number_score` where some of the predictions are no numbers (``None``), which then say nothing about the target.

    For a squared error they count as the mean of the targets; for a correlation as the mean of the predictions that are
    numbers (Spearman: of their ranks). Pearson's r is then r of the answered examples times the square root of their share
    of the targets' spread: an answer that is no number never raises a positive r, and one of them costs about 1/(2n) of it.
    A correlation for which no two different numbers are left is 0.

    Raises:
        UndefinedScoreError: as :func:`number_score` does for the targets, and where every answer is a number.
    """
    answered = np.array([answer is not None for answer in answers])
    gold = np.asarray(targets, dtype=float)
    if name == "mse" or answered.all():
        return number_score(name, [gold.mean() if answer is None else answer for answer in answers], targets)
    _refuse_constant("targets", gold)
    numbers = np.array([answer for answer in answers if answer is not None], dtype=float)
    if len(np.unique(numbers)) < 2:
        return 0.0
    if name == "spearman":
        numbers, gold = stats.rankdata(numbers), stats.rankdata(gold)
    guess = np.zeros(len(answers))
    guess[answered] = _centred(numbers)
    return _pearson(guess, gold)


def _refuse_constant(which: str, numbers: np.ndarray) -> None:
    if np.all(numbers == numbers[0]):
        raise UndefinedScoreError(f"all {len(numbers)} {which} are {numbers[0]:g}: no correlation with a constant")


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = _centred(a), _centred(b)
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def _centred(a: np.ndarray) -> np.ndarray:
    """Minus the mean, and at most 1 in size: neither the mean of huge numbers nor the square of tiny ones leaves the range."""
    a = np.ldexp(a, -np.frexp(np.abs(a).max())[1])
    a = a - a.mean()
    return a / np.abs(a).max()
