"""What a task's score is without looking at the input: the floor that a model must beat.

The answers come from the training examples alone: the most frequent class, option, tag or target; the mean label; every word's
head at the most frequent distance; right-branching trees of the most frequent constituent; no spans and no roles.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from lightning_modules.data.tasks import METRICS
from lightning_modules.measure.scores import Scores, score


def floor(
    kind: str, metric: str, labels: Sequence[str], train: Sequence[Any], targets: Sequence[Any], words: Sequence[int]
) -> Scores:
    """All scores of the trivial answers on ``targets``; ``train`` are the training targets, both in the form that scores read.

    ``words``: words of each example to be answered (read by the kinds that have words).
    """
    numbers = kind == "text2text" and metric in METRICS["regression"]
    answer = (_mean_of_references if numbers else _ANSWERS[kind])(train)
    return score(kind, metric, labels, [answer(count) for count in words], targets)


def _constant(train: Sequence[Any]) -> Any:
    most = Counter(train).most_common(1)[0][0]
    return lambda words: most


def _mean(train: Sequence[float]) -> Any:
    mean = sum(train) / len(train)
    return lambda words: mean


def _first_reference(train: Sequence[list[str]]) -> Any:
    return _constant([references[0] for references in train])


def _mean_of_references(train: Sequence[list[str]]) -> Any:
    mean = fmean(float(references[0]) for references in train)
    return lambda words: str(mean)


def _tag(train: Sequence[list[int]]) -> Any:
    most = Counter(tag for tags in train for tag in tags).most_common(1)[0][0]
    return lambda words: [most] * words


def _distance(train: Sequence[list[tuple[int, int]]]) -> Any:
    """Every word's head at the most frequent distance, the root where that leads out of the sentence."""
    arcs = [(head - i, rel) for words in train for i, (head, rel) in enumerate(words, 1) if head > 0]
    if not arcs:  # sentences of one word
        return lambda words: [(0, train[0][0][1])] * words
    distance = Counter(distance for distance, _ in arcs).most_common(1)[0][0]
    relation = Counter(rel for d, rel in arcs if d == distance).most_common(1)[0][0]

    def answer(words: int) -> list[tuple[int, int]]:
        heads = (i + distance for i in range(1, words + 1))
        return [(head if 1 <= head <= words else 0, relation) for head in heads]

    return answer


def _right_branching(train: Sequence[list[tuple[int, int, int]]]) -> Any:
    labels = Counter(label for spans in train for _, _, label in spans).most_common(1)
    if not labels:
        return _nothing(train)
    label = labels[0][0]
    return lambda words: [(start, words, label) for start in range(max(1, words - 1))]


def _nothing(train: Sequence[Any]) -> Any:
    return lambda words: []


_ANSWERS: dict[str, Any] = {
    "classification": _constant,
    "choice": _constant,
    "regression": _mean,
    "tagging": _tag,
    "spans": _nothing,
    "dependency": _distance,
    "constituency": _right_branching,
    "srl": _nothing,
    "text2text": _first_reference,
}
