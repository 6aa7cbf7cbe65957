"""Scores of one task from its predictions: every metric of the kind, and the one that comparisons use.

A score that is not defined for the data at hand is ``None`` with the reason, never NaN. The values are those of scikit-learn
(labels), scipy (numbers), seqeval (spans), the CoNLL 2018 evaluation (dependencies), EVALB (constituents), SQuAD and
rouge-score (text).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning_modules.data.tasks import METRICS, metric_parts
from lightning_modules.measure import structure_scores, text_scores
from lightning_modules.measure.label_scores import (
    NO_ANSWER,
    UndefinedScoreError,
    answer_score,
    label_score,
    number_score,
)

Similarity = Callable[[str, str], float]
"""How near a prediction is to a reference, from 0 to 1."""

_SIMILARITIES: dict[str, Similarity] = {
    "accuracy": text_scores.same_answer,
    "exact_match": text_scores.exact_match,
    "token_f1": text_scores.token_f1,
    "rouge_l": text_scores.rouge_l,
}


@dataclass(frozen=True)
class Scores:
    """Metric name -> value, and for values of ``None`` why they are not defined."""

    values: dict[str, float | None] = field(default_factory=dict)
    undefined: dict[str, str] = field(default_factory=dict)


def score(kind: str, metric: str, labels: Sequence[str], predictions: Sequence[Any], targets: Sequence[Any]) -> Scores:
    """All scores of ``kind`` and ``metric``, which keeps the name that the catalogue gives it.

    ``labels`` is the task's label set (not used for choice). Predictions and targets, one per example:

    - classification, choice: number of the label or option; a prediction of -1 is no answer: always wrong;
    - regression: number;
    - tagging: label numbers per word; a prediction of -1 is no answer: always wrong, and no span;
    - spans, constituency: (start, end, label number) of each span, end exclusive;
    - dependency: (head, relation number) per word, head 0 = root; (-1, -1) is no answer;
    - srl: (predicate, start, end, role number) of each argument, (predicate, -1, -1, -1) for a predicate without any;
      ``predicate_f1`` stands beside the score;
    - text2text: predictions are text, targets lists of all references. Metrics of labels and of numbers read the text first;
      ``invalid_rate``, the share of predictions that are none, stands beside them. Accuracy without ``labels`` (the options
      of a choice, of which every example has its own) is the share of answers that are the reference but for case.

    Raises:
        ValueError: unknown kind or metric, or predictions and targets differ in length.
    """
    if kind not in METRICS or metric_parts(metric)[0] not in METRICS[kind]:
        raise ValueError(f"metric must be one of {METRICS.get(kind, ())} for kind {kind}, got {metric!r}")
    if len(predictions) != len(targets):
        raise ValueError(f"predictions and targets must be as many, got {len(predictions)} and {len(targets)}")
    scores = Scores()
    for name in _names(kind, metric, labels):
        try:
            if not targets:
                raise UndefinedScoreError("no examples")
            if kind == "text2text":
                scores.values[name] = _text_value(name, _answers(metric, labels), labels, predictions, targets)
            else:
                scores.values[name] = _value(kind, name, labels, predictions, targets)
        except UndefinedScoreError as reason:
            scores.values[name] = None
            scores.undefined[name] = str(reason)
    return scores


def _names(kind: str, metric: str, labels: Sequence[str]) -> list[str]:
    """What to compute; of text, what fits the answers that the task has."""
    names: tuple[str, ...] = tuple(name for name in METRICS[kind] if name != "f1_positive")
    if kind == "srl":
        names = (*names, "predicate_f1")
    if kind == "text2text":
        names = {
            "text": ("exact_match", "token_f1", "rouge_l"),
            "labels": ("accuracy", "macro_f1", "micro_f1", "mcc", "exact_match", "invalid_rate"),
            "numbers": ("pearson", "spearman", "mse", "invalid_rate"),
        }[_answers(metric, labels)]
    return list(dict.fromkeys([*names, metric]))


def _answers(metric: str, labels: Sequence[str]) -> str:
    """What a text2text task's answers are: ``labels``, ``numbers`` or ``text``, where every example has answers of its own."""
    if metric in METRICS["regression"]:
        return "numbers"
    return "labels" if labels or _similarity(metric) is None else "text"


def _similarity(metric: str) -> Similarity | None:
    """What ``metric`` is the mean of; None for one that needs all answers together."""
    name, argument = metric_parts(metric)
    if name == "exact_match" and argument:
        mark = argument.removeprefix("number after")
        if mark == argument:
            raise ValueError(f"metric must be exact_match or exact_match(number after MARK), got {metric!r}")
        return partial(text_scores.same_number, mark=mark.strip())
    return _SIMILARITIES.get(name)


def _value(kind: str, metric: str, labels: Sequence[str], predictions: Sequence[Any], targets: Sequence[Any]) -> float:
    name, argument = metric_parts(metric)
    match kind, name:
        case "regression", _:
            return number_score(name, predictions, targets)
        case "tagging", "accuracy":
            return structure_scores.tag_accuracy(predictions, targets)
        case "tagging", _:
            return structure_scores.tag_span_f1(labels, predictions, targets)
        case "spans", _:
            return structure_scores.span_f1(predictions, targets)
        case "dependency", _:
            return structure_scores.attachment_score(name, labels, predictions, targets)
        case "constituency", _:
            return structure_scores.bracket_f1(labels, predictions, targets)
        case "srl", "predicate_f1":
            return structure_scores.predicate_f1(predictions, targets)
        case "srl", _:
            return structure_scores.argument_f1(predictions, targets)
        case _:
            return label_score(name, argument, () if kind == "choice" else labels, predictions, targets)


def _text_value(metric: str, answers: str, labels: Sequence[str], predictions: Sequence[str], targets: Sequence[Any]) -> float:
    if similarity := _similarity(metric):
        return text_scores.mean_over_examples(similarity, predictions, targets)
    name, argument = metric_parts(metric)
    if answers == "numbers":
        numbers, gold_numbers = text_scores.numbers_of(predictions, targets)
        if name == "invalid_rate":
            return numbers.count(None) / len(numbers)
        return answer_score(name, numbers, gold_numbers)
    guesses, golds = text_scores.labels_of(labels, predictions, targets)
    if name == "invalid_rate":
        return guesses.count(NO_ANSWER) / len(guesses)
    return label_score(name, argument, labels, guesses, golds)
