"""Scores of tags, spans, trees and predicates against the public scorers: seqeval, the Universal Dependencies evaluation
(udtools, which holds the CoNLL 2018 script's metrics) and EVALB (the PYEVALB package, and its counting written out)."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PYEVALB import parser as evalb_parser
from PYEVALB import scorer as evalb
from seqeval.metrics import f1_score as seqeval_f1
from seqeval.metrics.sequence_labeling import get_entities
from udtools import udeval

from lightning_modules.data.forms import bio_spans
from lightning_modules.measure.scores import score

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TYPES = ("PER", "LOC")
RELATIONS = ("root", "nsubj", "acl", "acl:relcl", "punct", "nsubj:pass")
CONSTITUENTS = ("S", "NP", "VP", "TOP")
Rng = np.random.Generator
Bracket = tuple[int, int, int]


@pytest.mark.parametrize("seed", range(20))
def test_spans_in_tags_and_their_f1_equal_seqeval(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, 15)
    gold = [rng.integers(0, 5, n).tolist() for n in lengths]
    guess = [[tag if rng.random() < 0.7 else int(rng.integers(0, 5)) for tag in tags] for tags in gold]
    text = [[[TAGS[t] for t in tags] for tags in side] for side in (gold, guess)]
    for tags in text[0]:
        assert bio_spans(tags) == [(first, last + 1, label) for label, first, last in get_entities(tags)]
    values = score("tagging", "span_f1", TAGS, guess, gold).values
    assert values["span_f1"] == pytest.approx(seqeval_f1(text[0], text[1]))
    assert values["accuracy"] == pytest.approx(np.mean(np.concatenate(gold) == np.concatenate(guess)))


def test_labels_that_mark_no_spans_leave_span_f1_undefined() -> None:
    scores = score("tagging", "accuracy", ("NOUN", "VERB"), [[0, 1]], [[0, 0]])
    assert scores.values == {"accuracy": 0.5, "span_f1": None}
    assert "NOUN" in scores.undefined["span_f1"]


@pytest.mark.parametrize(
    "kind, metric, nothing",
    [("tagging", "span_f1", [0, 0]), ("spans", "span_f1", []), ("constituency", "bracket_f1", []), ("srl", "srl_f1", [])],
)
@pytest.mark.filterwarnings("ignore:F-score is ill-defined", "ignore:Precision", "ignore:Recall")
def test_nothing_to_find_and_nothing_found_is_zero_as_seqeval_has_it(kind: str, metric: str, nothing: list[int]) -> None:
    assert score(kind, metric, TAGS, [nothing], [nothing]).values[metric] == 0.0
    assert seqeval_f1([["O", "O"]], [["O", "O"]]) == 0.0


def flat_spans(rng: Rng, words: int) -> list[Bracket]:
    """Spans of one to three words that do not overlap."""
    found, start = [], 0
    while start < words:
        end = min(start + int(rng.integers(1, 4)), words)
        if rng.random() < 0.5:
            found.append((start, end, int(rng.integers(2))))
        start = end
    return found


def bio(items: Sequence[Bracket], words: int) -> list[str]:
    tags = ["O"] * words
    for start, end, label in items:
        tags[start:end] = [f"I-{TYPES[label]}"] * (end - start)
        tags[start] = f"B-{TYPES[label]}"
    return tags


def half_kept(rng: Rng, gold: list[Bracket], words: int) -> list[Bracket]:
    """The gold spans of one part of the sentence and others in the rest."""
    cut = int(rng.integers(words + 1))
    return [s for s in gold if s[1] <= cut] + [s for s in flat_spans(rng, words) if s[0] >= cut]


@pytest.mark.parametrize("seed", range(40))
def test_span_f1_equals_seqeval_on_the_same_spans_as_tags(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, 10).tolist()
    gold = [flat_spans(rng, n) for n in lengths]
    guess = [half_kept(rng, items, n) for items, n in zip(gold, lengths, strict=True)]
    tags = [[bio(items, n) for items, n in zip(side, lengths, strict=True)] for side in (gold, guess)]
    assert score("spans", "span_f1", TYPES, guess, gold).values["span_f1"] == pytest.approx(seqeval_f1(*tags))


@pytest.mark.parametrize("seed", range(40))
def test_argument_f1_equals_seqeval_with_one_sequence_per_predicate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 10, 8).tolist()
    gold, guess, tags = [], [], ([], [])
    hits = found = wanted = 0
    for n in lengths:
        right: dict[int, list[Bracket]] = {}
        predicted: dict[int, list[Bracket]] = {}
        for predicate in rng.choice(n, 2, replace=False).tolist():
            right[predicate] = flat_spans(rng, n)
            if rng.random() < 0.8:
                predicted[predicate] = half_kept(rng, right[predicate], n)
        predicted.setdefault(int(rng.integers(n)), flat_spans(rng, n))
        for side, frames in ((gold, right), (guess, predicted)):
            items = [(p, *argument) for p, arguments in frames.items() for argument in arguments or [(-1, -1, -1)]]
            side.append(items)
        for predicate in right | predicted:
            tags[0].append(bio(right.get(predicate, []), n))
            tags[1].append(bio(predicted.get(predicate, []), n))
        hits, found, wanted = hits + len(right.keys() & predicted.keys()), found + len(predicted), wanted + len(right)
    values = score("srl", "srl_f1", TYPES, guess, gold).values
    assert values["srl_f1"] == pytest.approx(seqeval_f1(*tags))
    assert values["predicate_f1"] == pytest.approx(2 * hits / (found + wanted))


def random_tree(rng: Rng, words: int) -> list[int]:
    """Heads (0 = root) of a tree with one root: each word but the first of a random order hangs on an earlier one."""
    order = (rng.permutation(words) + 1).tolist()
    heads = [0] * words
    for i, word in enumerate(order[1:], 1):
        heads[word - 1] = order[int(rng.integers(i))]
    return heads


def conllu(sentences: Sequence[Sequence[tuple[int, int]]]) -> Any:
    lines = []
    for words in sentences:
        lines += [
            "\t".join([str(i), f"w{i}", *"____", str(head), RELATIONS[relation], "_", "_"])
            for i, (head, relation) in enumerate(words, 1)
        ] + [""]
    return udeval.load_conllu(io.StringIO("\n".join(lines) + "\n"), "", {})


@pytest.mark.parametrize("seed", range(40))
def test_attachment_scores_equal_the_universal_dependencies_evaluation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold, guess = [], []
    for n in rng.integers(1, 12, 6).tolist():
        heads = random_tree(rng, n)
        gold.append([(head, int(rng.integers(6)) if head else 0) for head in heads])
        other = heads if rng.random() < 0.6 else random_tree(rng, n)
        guess.append(
            [
                (head, 0 if not head else right if rng.random() < 0.6 else int(rng.integers(6)))
                for head, (_, right) in zip(other, gold[-1], strict=True)
            ]
        )
    official = udeval.evaluate(conllu(gold), conllu(guess))
    values = score("dependency", "las", RELATIONS, guess, gold).values
    assert values["uas"] == pytest.approx(official["UAS"].f1)
    assert values["las"] == pytest.approx(official["LAS"].f1)


def test_relations_are_compared_without_subtype_and_no_answer_is_wrong() -> None:
    gold = [[(0, 0), (1, 2), (1, 1)]]
    values = score("dependency", "las", RELATIONS, [[(0, 0), (1, 3), (1, 4)]], gold).values
    assert values == {"las": pytest.approx(2 / 3), "uas": 1.0}
    values = score("dependency", "las", RELATIONS, [[(-1, -1), (-1, -1), (1, -1)]], gold).values
    assert values == {"las": 0.0, "uas": pytest.approx(1 / 3)}
    with pytest.raises(ValueError):
        score("dependency", "las", RELATIONS, [[(0, 0)]], gold)


def random_brackets(rng: Rng, start: int, end: int, repeated: bool) -> list[Bracket]:
    """Properly nested brackets, the outermost over all words; ``repeated`` allows X over X and TOP."""
    labels = rng.choice(4 if repeated else 3, int(rng.integers(1, 3)), replace=repeated).tolist()
    found = [(start, end, label) for label in labels]
    if end - start > 1 and rng.random() < 0.9:
        cut = int(rng.integers(start + 1, end))
        for part in ((start, cut), (cut, end)):
            if rng.random() < 0.7:
                found += random_brackets(rng, *part, repeated)
    return found


def bracketed(brackets: Sequence[Bracket], words: int) -> str:
    return " ".join(
        "".join(f"({CONSTITUENTS[label]} " for start, _, label in brackets if start == i)
        + f"(T w{i})"
        + ")" * sum(end == i + 1 for _, end, _ in brackets)
        for i in range(words)
    )


def evalb_f1(gold: Sequence[Sequence[Bracket]], guess: Sequence[Sequence[Bracket]]) -> float:
    """EVALB's counting: every gold bracket takes the first equal bracket of the guess that is still free."""
    matched = wanted = found = 0
    for right, predicted in zip(gold, guess, strict=True):
        free = [bracket for bracket in predicted if CONSTITUENTS[bracket[2]] != "TOP"]
        found += len(free)
        for bracket in right:
            if CONSTITUENTS[bracket[2]] != "TOP":
                wanted += 1
                if bracket in free:
                    free.remove(bracket)
                    matched += 1
    precision, recall = matched / found, matched / wanted
    return 2 * precision * recall / (precision + recall) if matched else 0.0


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_bracket_f1_equals_evalb(seed: int, repeated: bool) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 12, 8).tolist()
    gold = [random_brackets(rng, 0, n, repeated) for n in lengths]
    guess = [b if rng.random() < 0.3 else random_brackets(rng, 0, n, repeated) for b, n in zip(gold, lengths, strict=True)]
    value = score("constituency", "bracket_f1", CONSTITUENTS, guess, gold).values["bracket_f1"]
    assert value == pytest.approx(evalb_f1(gold, guess))
    if not repeated:  # the package matches brackets as a set, unlike EVALB
        results = [
            evalb.Scorer().score_trees(*(evalb_parser.create_from_bracket_string(bracketed(b, n)) for b in pair))
            for *pair, n in zip(gold, guess, lengths, strict=True)
        ]
        hits = sum(result.matched_brackets for result in results)
        total = sum(result.gold_brackets + result.test_brackets for result in results)
        assert value == pytest.approx(2 * hits / total)


def test_a_repeated_bracket_counts_twice_and_top_never() -> None:
    gold = [[(0, 2, 3), (0, 2, 1), (0, 2, 1)]]
    assert score("constituency", "bracket_f1", CONSTITUENTS, [[(0, 2, 1)]], gold).values["bracket_f1"] == pytest.approx(2 / 3)
    assert score("constituency", "bracket_f1", CONSTITUENTS, [[(0, 2, 3)]], gold).values["bracket_f1"] == 0.0
