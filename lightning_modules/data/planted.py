"""Planted tasks: texts generated from a seed, whose relatedness is known by construction. No torch here.

**Words.** Every word is made up and pronounceable (``rozar``, ``husem``). A *vocabulary* is a block of words of its own:
*content words* that mean something and *fillers* that mean nothing. A text is 6 to 14 words of one vocabulary.

**Skills.** What a task needs to know is a *lexicon* ``(vocabulary, trait)``: it gives every content word one of ``classes``
hidden classes, at random and unrelated to how the word is spelled. Rules that read it:

* ``tags`` (tagging): each content word's class, ``none`` for fillers;
* ``majority`` (classification): the class that most content words of the text have (texts with a tie are not drawn);
* ``contrast`` (classification): ``low`` or ``high``, whichever half of the classes has more content words (the same);
* ``mean`` (regression): the mean over content words of their class's value, classes evenly spaced in [-1, 1].

**Relations** follow from the skills (:func:`relation`):

* the same lexicon: ``shares``. A task with few examples sees most words once or never; another task has taught them;
* different vocabularies have no word and no skill in common: ``independent``;
* different lexicons over the same vocabulary, thus the same texts and contradictory answers for every word: ``competes``.

Every task has a head of its own, so contradictory labels alone do not conflict: a wide encoder holds all lexicons side by
side. What competes is width. Separating C classes linearly takes some share of the encoder's d dimensions, and a dense
encoder has to separate the classes of all lexicons in one and the same state, as it does not know which task is asked.
So the loss grows with ``classes``, ``words`` and the number of competing tasks, and shrinks with d and with more training;
feed-forward experts chosen by task relieve it, for each can rewrite the state for its own task. ``competes`` says where a
loss can come from; how large it is depends on the encoder and its training (the catalogue says what was measured).

**Draws.** A text belongs to the split that its hash names, so no text of one split occurs in another, for any two
tasks. Tasks with the same vocabulary, ``words``, ``fillers``, lengths and ``filler_share`` draw the same texts (up to the
ties that are skipped). Label noise is put on the training split only: dev and test measure the rule.
"""

import functools
import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from lightning_modules.seeds import derive

VERSION = 1
"""Raise when the same parameters give other examples (the golden digests in the tests fail when it should have been raised)."""

Relation = Literal["shares", "independent", "competes"]
SPLITS = ("train", "dev", "test")
VOCABULARIES = ("harbour", "forest", "market", "tower", "river", "garden", "harvest", "winter")
"""Names of the word blocks; what a name says is not in the texts."""

RULES: dict[str, str] = {
    "tags": "tagging",
    "majority": "classification",
    "contrast": "classification",
    "mean": "regression",
}
"""rule -> the kind of task it makes."""

_BLOCK = 2048
_MAX_FILLERS = 128
_CONSONANTS = "bdfghklmnprstvz"
_VOWELS = "aeiou"
_CODAS = "lmnrst"
_MAX_DRAWS = 10_000
_SPLIT_OF_HASH = ("train",) * 6 + ("dev", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """The checked parameters of one task; the catalogue's manual."""

    name: str = ""
    kind: str
    seed: int
    """Seed of the suite: words, lexicons and texts."""
    vocabulary: str
    """One of :data:`VOCABULARIES`."""
    trait: str
    """Name of the lexicon; tasks with the same one share the skill."""
    rule: str
    """One of :data:`RULES`."""
    classes: int = 4
    """Hidden classes of the lexicon."""
    words: int = 200
    """Content words."""
    fillers: int = 24
    """Filler words."""
    min_length: int = 6
    """Shortest text in words."""
    max_length: int = 14
    """Longest text in words."""
    filler_share: float = 0.3
    """Chance that a word of a text is a filler."""
    noise: float = 0.0
    """Share of training labels (tagging: of content words' tags) replaced by another one (regression: by a uniform number)."""
    train: int = 2000
    dev: int = 200
    test: int = 600

    @property
    def skill(self) -> str:
        """What the task has to know, e.g. ``lexicon/harbour/colour/4``."""
        return f"lexicon/{self.vocabulary}/{self.trait}/{self.classes}"

    @property
    def classes_of_trait(self) -> tuple[str, ...]:
        """Names of the hidden classes."""
        return tuple(f"{self.trait}{i}" for i in range(self.classes))


def labels(params: Mapping[str, Any]) -> tuple[str, ...]:
    """The closed label set; ``()`` for regression.

    Raises:
        ValueError: a parameter is missing, unknown or breaks its law (the message says the law and the value).
    """
    plan = _plan(params)
    if plan.rule == "mean":
        return ()
    if plan.rule == "contrast":
        return ("low", "high")
    return ("none", *plan.classes_of_trait) if RULES[plan.rule] == "tagging" else plan.classes_of_trait


def count(params: Mapping[str, Any], split: str) -> int:
    """Number of examples of a split. Raises ValueError as :func:`labels`, or for an unknown split."""
    plan = _plan(params)
    _require(split in SPLITS, f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return {"train": plan.train, "dev": plan.dev, "test": plan.test}[split]


def generate(params: Mapping[str, Any], split: str) -> Iterator[dict[str, Any]]:
    """The examples of a split: ``{text, label}``, for tagging ``{tokens, tags}``. A pure function of its arguments; the first n
    examples do not depend on how many there are.

    Raises:
        ValueError: as :func:`labels`, or for an unknown split.
    """
    n = count(params, split)
    plan = _plan(params)
    return (_example(plan, split, i) for i in range(n))


def skills(params: Mapping[str, Any]) -> frozenset[str]:
    """The latent skills that the task needs. Raises ValueError as :func:`labels`."""
    return frozenset({_plan(params).skill})


def relation(params_a: Mapping[str, Any], params_b: Mapping[str, Any]) -> Relation:
    """How two tasks relate, computed from their skills and texts: a common skill ``shares``, other skills on the same words
    ``competes``, no common word ``independent``. Raises ValueError as :func:`labels`, or when the suites' seeds differ."""
    a, b = _plan(params_a), _plan(params_b)
    _require(a.seed == b.seed, f"tasks of one suite must have the same seed, got {a.seed} and {b.seed}")
    if skills(params_a) & skills(params_b):
        return "shares"
    return "competes" if a.vocabulary == b.vocabulary else "independent"


def relation_matrix(params: Sequence[Mapping[str, Any]]) -> list[list[Relation]]:
    """:func:`relation` of every pair; symmetric, the diagonal is ``shares``."""
    return [[relation(a, b) for b in params] for a in params]


def _plan(params: Mapping[str, Any]) -> _Plan:
    known = {f.name: f for f in fields(_Plan)}
    for key in params:
        _require(key in known, f"planted has the keys {', '.join(known)}, got {key!r}")
    for name, f in known.items():
        _require(name in params or f.default is not MISSING, f"planted needs {name!r}, got {', '.join(params) or 'nothing'}")
        _check_type(name, params.get(name, f.default), f.type)
    plan = _Plan(**params)
    _check(plan)
    return plan


def _check_type(name: str, value: Any, wanted: Any) -> None:
    accepted = (int, float) if wanted is float else wanted
    right = isinstance(value, accepted) and not isinstance(value, bool)
    _require(right, f"{name} must be of type {wanted.__name__}, got {value!r}")


def _check(plan: _Plan) -> None:
    _require(plan.vocabulary in VOCABULARIES, f"vocabulary must be one of {', '.join(VOCABULARIES)}, got {plan.vocabulary!r}")
    _require(plan.rule in RULES, f"rule must be one of {', '.join(RULES)}, got {plan.rule!r}")
    _require(plan.kind == RULES[plan.rule], f"rule {plan.rule} makes a {RULES[plan.rule]} task, got kind {plan.kind!r}")
    _require(plan.trait.isalpha() and plan.trait != "none", f"trait must be letters and not 'none', got {plan.trait!r}")
    _require(plan.classes >= 2, f"classes must be at least 2, got {plan.classes}")
    even = plan.rule != "contrast" or plan.classes % 2 == 0
    _require(even, f"classes must be even for rule contrast, got {plan.classes}")
    most = _BLOCK - _MAX_FILLERS
    _require(
        plan.classes <= plan.words <= most, f"words must be in classes to {most}, got {plan.words} with classes={plan.classes}"
    )
    _require(1 <= plan.fillers <= _MAX_FILLERS, f"fillers must be in 1..{_MAX_FILLERS}, got {plan.fillers}")
    ordered = 3 <= plan.min_length <= plan.max_length
    _require(ordered, f"lengths must have 3 <= min_length <= max_length, got {plan.min_length} and {plan.max_length}")
    _require(0 <= plan.filler_share <= 0.9, f"filler_share must be in 0..0.9, got {plan.filler_share}")
    _require(0 <= plan.noise <= 1, f"noise must be in 0..1, got {plan.noise}")
    for split in SPLITS:
        _require(getattr(plan, split) >= 1, f"{split} must be at least 1 example, got {getattr(plan, split)}")


def _require(condition: bool, law: str) -> None:
    if not condition:
        raise ValueError(law)


def _example(plan: _Plan, split: str, i: int) -> dict[str, Any]:
    words, answer = _draw(plan, split, i)
    noise = random.Random(derive(plan.seed, "noise", plan.name, i)) if split == "train" else None
    tokens = [_words(plan.seed)[word] for word in words]
    if plan.rule == "tags":
        return {"tokens": tokens, "tags": _tags(plan, words, noise)}
    return {"text": " ".join(tokens), "label": _label(plan, answer, noise)}


def _draw(plan: _Plan, split: str, i: int) -> tuple[list[int], int | float]:
    """Word numbers and answer of the first text that belongs to ``split`` and that the rule can answer."""
    rng = random.Random(derive(plan.seed, "text", plan.vocabulary, split, i))
    for _ in range(_MAX_DRAWS):
        words = _draw_words(plan, rng)
        answer = _answer(plan, words)
        if answer is not None and _split_of(words) == split:
            return words, answer
    raise ValueError(
        f"{plan.name}: {_MAX_DRAWS} draws gave no text for {split}: words={plan.words} or the lengths are too small"
    )


def _split_of(words: Sequence[int]) -> str:
    digest = hashlib.sha256(",".join(map(str, words)).encode()).digest()
    return _SPLIT_OF_HASH[digest[0] % len(_SPLIT_OF_HASH)]


def _draw_words(plan: _Plan, rng: random.Random) -> list[int]:
    length = plan.min_length + _below(rng, plan.max_length - plan.min_length + 1)
    return [_draw_word(plan, rng) for _ in range(length)]


def _draw_word(plan: _Plan, rng: random.Random) -> int:
    start = VOCABULARIES.index(plan.vocabulary) * _BLOCK
    if rng.random() < plan.filler_share:
        return start + _below(rng, plan.fillers)
    return start + _MAX_FILLERS + _below(rng, plan.words)


def _below(rng: random.Random, n: int) -> int:
    # random() is the one method whose sequence Python promises to keep.
    return math.floor(rng.random() * n)


def _is_content(word: int) -> bool:
    return word % _BLOCK >= _MAX_FILLERS


def _class(plan: _Plan, word: int) -> int:
    return _lexicon(plan.seed, plan.skill)[word % _BLOCK] % plan.classes


def _tags(plan: _Plan, words: Sequence[int], noise: random.Random | None) -> list[str]:
    names = plan.classes_of_trait
    return [_disturb(plan, names[_class(plan, word)], names, noise) if _is_content(word) else "none" for word in words]


def _label(plan: _Plan, answer: int | float, noise: random.Random | None) -> str | float:
    if isinstance(answer, float):
        return round(2 * noise.random() - 1, 6) if noise is not None and noise.random() < plan.noise else answer
    names = ("low", "high") if plan.rule == "contrast" else plan.classes_of_trait
    return _disturb(plan, names[answer], names, noise)


def _disturb(plan: _Plan, label: str, names: Sequence[str], noise: random.Random | None) -> str:
    if noise is None or noise.random() >= plan.noise:
        return label
    return names[(names.index(label) + 1 + _below(noise, len(names) - 1)) % len(names)]


def _answer(plan: _Plan, words: Sequence[int]) -> int | float | None:
    """The rule's answer: number of the label, or the value of a regression; None where the rule has none."""
    classes = [_class(plan, word) for word in words if _is_content(word)]
    if not classes:
        return None
    if plan.rule == "mean":
        return round(sum(2 * c - plan.classes + 1 for c in classes) / (len(classes) * (plan.classes - 1)), 6)
    if plan.rule == "contrast":
        classes = [int(c >= plan.classes // 2) for c in classes]
    ranked = Counter(classes).most_common(2)
    tie = len(ranked) == 2 and ranked[0][1] == ranked[1][1]
    return None if tie and plan.rule != "tags" else ranked[0][0]


@functools.lru_cache(maxsize=8)
def _words(seed: int) -> tuple[str, ...]:
    """All words of a suite; vocabulary v has the numbers v * _BLOCK and up, its fillers first."""
    shapes = [c + v + d + w + e for c in _CONSONANTS for v in _VOWELS for d in _CONSONANTS for w in _VOWELS for e in _CODAS]
    return tuple(shapes[i] for i in _order(len(shapes), random.Random(derive(seed, "words"))))


@functools.lru_cache(maxsize=64)
def _lexicon(seed: int, skill: str) -> tuple[int, ...]:
    """Word number within the block -> rank in a random order; the rank modulo the number of classes is the hidden class,
    so that classes are about equally large."""
    return tuple(_order(_BLOCK, random.Random(derive(seed, skill))))


def _order(n: int, rng: random.Random) -> list[int]:
    return sorted(range(n), key=lambda _: rng.random())
