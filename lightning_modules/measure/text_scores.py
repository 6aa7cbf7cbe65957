"""Scores of generated text against references, and the reading of generated text as a label or a number."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

from lightning_modules.measure.label_scores import NO_ANSWER, UndefinedScoreError

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"([-+]?)\s*\$?\s*([-+]?)([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


def mean_over_examples(
    similarity: Callable[[str, str], float], predictions: Sequence[str], targets: Sequence[Sequence[str]]
) -> float:
    """Mean over examples of ``similarity(prediction, reference)``, of an example's references the best."""
    best = [max(similarity(guess, gold) for gold in golds) for guess, golds in zip(predictions, targets, strict=True)]
    return sum(best) / len(best)


def exact_match(prediction: str, reference: str) -> float:
    """1 where the words are the same after SQuAD v1.1's normalisation."""
    return float(_squad_words(prediction) == _squad_words(reference))


def token_f1(prediction: str, reference: str) -> float:
    """F1 over the bags of words after SQuAD v1.1's normalisation; 0 where either has no word left."""
    guess, gold = Counter(_squad_words(prediction)), Counter(_squad_words(reference))
    return 2 * (guess & gold).total() / max(guess.total() + gold.total(), 1)


def _squad_words(text: str) -> list[str]:
    """Rajpurkar et al. 2016, official script: lower case, without ASCII punctuation (so -5 is 5) and articles."""
    return _ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure over words (Lin 2004) as the rouge-score package has it by default: words are runs of a-z and 0-9 in
    lower case, so text in another script scores 0, and nothing is stemmed (Natural Instructions does stem)."""
    guess, gold = _rouge_words(prediction), _rouge_words(reference)
    return 2 * _common_subsequence(guess, gold) / max(len(guess) + len(gold), 1)


def _rouge_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a whole row of the table at once in the bits of a number (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    everything = (1 << len(a)) - 1
    row = everything
    for word in b:
        same = row & places.get(word, 0)
        row = (row + same | row - same) & everything
    return len(a) - row.bit_count()


def same_number(prediction: str, reference: str, mark: str) -> float:
    """1 where the numbers after the last ``mark`` are equal (GSM8K: ``#### 42``); thousands' commas, ``$`` and what follows
    the number do not matter. A prediction without such a number is wrong.

    Raises:
        UndefinedScoreError: the reference has no such number.
    """
    gold = _number_after(mark, reference)
    if gold is None:
        raise UndefinedScoreError(f"a reference has no number after {mark}: {reference[-40:]!r}")
    return float(_number_after(mark, prediction) == gold)


def _number_after(mark: str, text: str) -> Decimal | None:
    _, found, end = text.rpartition(mark)
    match = _NUMBER.match(end.strip()) if found else None
    return Decimal((match[1] or match[2]) + match[3].replace(",", "")) if match else None


def same_answer(prediction: str, reference: str) -> float:
    """1 where the texts are the same but for case and white space."""
    return float(_plain(prediction) == _plain(reference))


def labels_of(
    labels: Sequence[str], predictions: Sequence[str], targets: Sequence[Sequence[str]]
) -> tuple[list[int], list[int]]:
    """Label numbers of generated answers, and of the references. An answer is the label that it equals but for case and
    white space, else :data:`NO_ANSWER`; where an example has several references the one that was answered counts, else the
    first.

    Raises:
        UndefinedScoreError: no labels, two labels that are the same answer, or a reference that is no label.
    """
    if not labels:
        raise UndefinedScoreError("the task lists no labels: its answers are no closed set")
    numbers = {_plain(label): number for number, label in enumerate(labels)}
    if len(numbers) < len(labels):
        raise UndefinedScoreError(f"labels must differ in more than case and white space, got {', '.join(labels)[:80]}")
    guesses = [numbers.get(_plain(prediction), NO_ANSWER) for prediction in predictions]
    golds: list[int] = []
    for guess, references in zip(guesses, targets, strict=True):
        right = [numbers.get(_plain(reference), NO_ANSWER) for reference in references]
        if NO_ANSWER in right:
            raise UndefinedScoreError(f"reference {references[right.index(NO_ANSWER)]!r} is none of the task's labels")
        golds.append(guess if guess in right else right[0])
    return guesses, golds


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def numbers_of(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> tuple[list[float | None], list[float]]:
    """Generated answers and first references as numbers; ``None`` for an answer that is no number below 1e30 in size, which
    is what labels of regression may be.

    Raises:
        UndefinedScoreError: a reference is no such number.
    """
    golds: list[float] = []
    for references in targets:
        gold = _number(references[0])
        if gold is None:
            raise UndefinedScoreError(f"reference {references[0]!r} is not a number")
        golds.append(gold)
    return [_number(prediction) for prediction in predictions], golds


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < 1e30 else None
