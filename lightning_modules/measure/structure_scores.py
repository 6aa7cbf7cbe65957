"""Scores of structures over the words of a sentence: tags, spans, dependencies, constituents, arguments of predicates.

All F1 are over the whole corpus (micro), and 0 when there is nothing to find and nothing is found, as in seqeval and EVALB.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from lightning_modules.data.forms import bio_spans
from lightning_modules.measure.label_scores import UndefinedScoreError

Items = Sequence[Sequence[tuple[int, ...]]]
"""Per example, tuples of whole numbers."""


def tag_accuracy(predictions: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> float:
    """Share of words with the right tag."""
    return _share(
        p == g for predicted, gold in zip(predictions, targets, strict=True) for p, g in zip(predicted, gold, strict=True)
    )


def tag_span_f1(labels: Sequence[str], predictions: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> float:
    """F1 over the exact spans in BIO tags, of all types together (seqeval). A tag of -1 is in no span.

    Raises:
        UndefinedScoreError: the labels are not ``O``, ``B-...`` and ``I-...``.
    """
    plain = [label for label in labels if label != "O" and label[:2] not in ("B-", "I-")]
    if plain or all(label == "O" for label in labels):
        raise UndefinedScoreError(f"labels mark no spans (B-..., I-..., O), got {', '.join((plain or list(labels))[:3])}")
    found = {
        (i, *span) for i, tags in enumerate(predictions) for span in bio_spans([labels[t] if t >= 0 else "O" for t in tags])
    }
    wanted = {(i, *span) for i, tags in enumerate(targets) for span in bio_spans([labels[t] for t in tags])}
    return _f1(len(found & wanted), len(found), len(wanted))


def span_f1(predictions: Items, targets: Items) -> float:
    """F1 over exact (start, end, label): what seqeval gives for the same spans as BIO tags."""
    found, wanted = _distinct(predictions), _distinct(targets)
    return _f1(len(found & wanted), len(found), len(wanted))


def attachment_score(name: str, labels: Sequence[str], predictions: Items, targets: Items) -> float:
    """Share of words with the right head (``uas``), and with the right relation too (``las``).

    As the CoNLL 2018 evaluation script has it on gold words: all words count, punctuation too, and relations are compared
    without their subtype (``acl:relcl`` is ``acl``). That a prediction is a tree is not demanded. A head or relation of -1
    is no answer.
    """
    universal = [label.partition(":")[0] for label in labels]
    return _share(
        head == right_head and (name == "uas" or (relation >= 0 and universal[relation] == universal[right_relation]))
        for predicted, gold in zip(predictions, targets, strict=True)
        for (head, relation), (right_head, right_relation) in zip(predicted, gold, strict=True)
    )


def bracket_f1(labels: Sequence[str], predictions: Items, targets: Items) -> float:
    """F1 over labelled brackets (start, end, label) as EVALB counts them: each gold bracket is matched at most once, so a
    bracket that stands twice in a unary chain counts twice, and brackets named TOP do not count.

    EVALB with no other line in its parameter file: unlike COLLINS.prm, punctuation is kept and PRT is not ADVP.
    """
    kept = {number for number, label in enumerate(labels) if label != "TOP"}
    found, wanted = (
        Counter((i, *bracket) for i, brackets in enumerate(side) for bracket in brackets if bracket[2] in kept)
        for side in (predictions, targets)
    )
    return _f1((found & wanted).total(), found.total(), wanted.total())


def argument_f1(predictions: Items, targets: Items) -> float:
    """F1 over the arguments (predicate, start, end, role) of predicates that are predicted too: a wrong predicate makes its
    arguments wrong. A predicate without arguments, (predicate, -1, -1, -1), is no argument."""
    found, wanted = (_distinct([[item for item in items if item[1] >= 0] for items in side]) for side in (predictions, targets))
    return _f1(len(found & wanted), len(found), len(wanted))


def predicate_f1(predictions: Items, targets: Items) -> float:
    """F1 over the predicates, with or without arguments."""
    found, wanted = (_distinct([[item[:1] for item in items] for items in side]) for side in (predictions, targets))
    return _f1(len(found & wanted), len(found), len(wanted))


def _distinct(items: Items) -> set[tuple[int, ...]]:
    return {(i, *item) for i, example in enumerate(items) for item in example}


def _share(right: Iterable[bool]) -> float:
    words = list(right)
    if not words:
        raise UndefinedScoreError("no words")
    return sum(words) / len(words)


def _f1(hits: int, found: int, wanted: int) -> float:
    return 2 * hits / max(found + wanted, 1)
