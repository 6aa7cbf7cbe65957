"""Planted tasks: what the documentation says about words, rules, relations, splits and noise holds in the examples."""

import functools
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.data import planted
from lightning_modules.data.tasks import TaskSpec, check, load_catalogues

CATALOGUE = load_catalogues(["sweeps/tasks/planted.yaml"], Path(__file__).parents[1])
SPECS = list(CATALOGUE.values())

GOLDEN = {
    "planted/tag-colours": "814ebe491f12c324",
    "planted/most-colour": "4eb3dcdd58f5e111",
    "planted/colour-score": "5482f8a676e0842a",
    "planted/light-or-dark": "d4b1de2d335c8017",
    "planted/tag-sounds": "97800937bf67173f",
    "planted/cheap-or-dear": "63d3dae6becb175d",
    "planted/tag-oaths": "20be4b25bd3a8d8d",
    "planted/tag-feuds": "c8b4dd3962b97cde",
    "planted/tag-debts": "dbaea921ac86c8e3",
}


def rows(params: Any, split: str, **changes: Any) -> list[dict[str, Any]]:
    return list(planted.generate({**params, **changes}, split))


def words_of(row: dict[str, Any]) -> list[str]:
    return row["tokens"] if "tokens" in row else row["text"].split(" ")


@functools.cache
def lexicon(name: str) -> dict[str, int]:
    """Content word -> hidden class, read off the noise-free tagging task over the same lexicon."""
    spec = CATALOGUE[name]
    sibling = {**spec.planted, "rule": "tags", "kind": "tagging", "noise": 0.0, "train": 2000}
    pairs = ((w, t) for row in planted.generate(sibling, "train") for w, t in zip(row["tokens"], row["tags"], strict=True))
    return {word: int(tag.removeprefix(spec.planted["trait"])) for word, tag in pairs if tag != "none"}


def expected(spec: TaskSpec, row: dict[str, Any], classes: dict[str, int]) -> Any:
    """The answer by the documented rule, written without the generator's code."""
    n = spec.planted.get("classes", 4)
    trait = spec.planted["trait"]
    held = [classes[word] for word in words_of(row) if word in classes]
    match spec.planted["rule"]:
        case "tags":
            return [f"{trait}{classes[word]}" if word in classes else "none" for word in words_of(row)]
        case "majority":
            return f"{trait}{max(range(n), key=held.count)}"
        case "contrast":
            return "high" if sum(c >= n / 2 for c in held) > len(held) / 2 else "low"
        case "mean":
            return pytest.approx(sum(-1 + 2 * c / (n - 1) for c in held) / len(held), abs=1e-6)


def each_task() -> Any:
    return pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])


def test_catalogue_has_every_kind_and_relation_and_can_be_read() -> None:
    assert {spec.kind for spec in SPECS} == {"classification", "regression", "tagging"}
    assert {spec.category for spec in SPECS} == {"planted/shares", "planted/independent", "planted/competes"}
    for spec in SPECS:
        counts = check(spec).sizes
        assert counts["train"] == spec.planted["train"] and counts["dev"] == 200 and counts["test"] == 600
        assert spec.low_resource is None or spec.low_resource < counts["train"]


@each_task()
def test_first_examples_are_golden(spec: TaskSpec) -> None:
    first = {split: rows(spec.planted, split, train=20, dev=20, test=20) for split in planted.SPLITS}
    digest = hashlib.sha256(json.dumps([planted.VERSION, first]).encode()).hexdigest()[:16]
    assert digest == GOLDEN[spec.name], "the examples have changed: raise planted.VERSION, then write the new digests here"


@each_task()
def test_examples_follow_the_documented_rule(spec: TaskSpec) -> None:
    classes = lexicon(spec.name)
    for row in rows(spec.planted, "train", noise=0.0, train=300) + rows(spec.planted, "test", test=200):
        assert row.get("label", row.get("tags")) == expected(spec, row, classes)


@each_task()
def test_labels_are_closed_and_all_occur(spec: TaskSpec) -> None:
    seen = {label for row in rows(spec.planted, "train", train=1000) for label in row.get("tags", [row.get("label")])}
    if spec.kind == "regression":
        assert spec.labels == () and all(isinstance(y, float) and -1 <= y <= 1 for y in seen) and len(seen) > 20
    else:
        assert seen == set(spec.labels)


@each_task()
def test_texts_are_short_sentences_of_pronounceable_words(spec: TaskSpec) -> None:
    for row in rows(spec.planted, "dev"):
        words = words_of(row)
        assert 6 <= len(words) <= 14
        assert all(w.isalpha() and [c in "aeiou" for c in w] == [False, True, False, True, False] for w in words)


@each_task()
def test_a_shorter_split_is_the_beginning_of_a_longer_one(spec: TaskSpec) -> None:
    assert rows(spec.planted, "train", train=7) == rows(spec.planted, "train", train=30)[:7]


def test_order_of_generation_does_not_matter() -> None:
    alone = [rows(spec.planted, "dev") for spec in SPECS]
    streams = [planted.generate(spec.planted, "dev") for spec in SPECS]
    interleaved = list(zip(*streams, strict=True))
    assert alone == [list(column) for column in zip(*interleaved, strict=True)]


def test_seed_decides_words_and_texts() -> None:
    params = SPECS[0].planted
    assert rows(params, "dev") != rows(params, "dev", seed=params["seed"] + 1)


def test_no_text_of_one_split_occurs_in_another_of_any_task() -> None:
    texts = {split: {tuple(words_of(row)) for spec in SPECS for row in rows(spec.planted, split)} for split in planted.SPLITS}
    assert not texts["train"] & texts["dev"] and not texts["train"] & texts["test"] and not texts["dev"] & texts["test"]


def test_splits_stay_disjoint_where_texts_repeat() -> None:
    params = {**SPECS[0].planted, "words": 4, "classes": 2, "fillers": 1, "min_length": 4, "max_length": 4}
    texts = {split: {tuple(words_of(row)) for row in rows(params, split)} for split in planted.SPLITS}
    assert len(texts["train"]) < params["train"]
    assert not texts["train"] & texts["dev"] and not texts["train"] & texts["test"] and not texts["dev"] & texts["test"]


@pytest.mark.parametrize(
    "name", ["planted/tag-colours", "planted/most-colour", "planted/light-or-dark", "planted/colour-score"]
)
def test_noise_disturbs_its_share_of_training_labels_only(name: str) -> None:
    params = CATALOGUE[name].planted
    flat = [
        [label for row in rows(params, "train", train=2000, noise=noise) for label in row.get("tags", [row.get("label")])]
        for noise in (0.0, 0.2)
    ]
    pairs = [(a, b) for a, b in zip(*flat, strict=True) if a != "none"]
    assert sum(a != b for a, b in pairs) / len(pairs) == pytest.approx(0.2, abs=0.03)
    assert all(b == "none" for a, b in zip(*flat, strict=True) if a == "none")
    assert rows(params, "test", noise=0.2) == rows(params, "test", noise=0.0)


def test_relations_are_those_of_the_catalogue() -> None:
    matrix = planted.relation_matrix([spec.planted for spec in SPECS])
    for i, a in enumerate(SPECS):
        assert matrix[i][i] == "shares"
        for j, b in enumerate(SPECS):
            assert matrix[i][j] == matrix[j][i]
            same = a.category == b.category and a.category != "planted/independent"
            assert i == j or matrix[i][j] == (a.category.removeprefix("planted/") if same else "independent")


@pytest.mark.parametrize("i", range(len(SPECS)))
def test_relations_show_in_the_examples(i: int) -> None:
    """shares: one lexicon; competes: the same texts, unrelated lexicons; independent: no common word."""
    a = SPECS[i]
    for b in SPECS[i + 1 :]:
        words_a, words_b = ({w for row in rows(s.planted, "dev") for w in words_of(row)} for s in (a, b))
        match planted.relation(a.planted, b.planted):
            case "independent":
                assert not words_a & words_b
            case "shares":
                assert lexicon(a.name) == lexicon(b.name)
            case "competes":
                assert [words_of(r) for r in rows(a.planted, "dev")] == [words_of(r) for r in rows(b.planted, "dev")]
                first, second = lexicon(a.name), lexicon(b.name)
                joint = Counter((first[w], second[w]) for w in first)
                assert max(joint.values()) <= 5, "classes of the two lexicons coincide"


def test_lexicons_with_other_classes_are_other_skills() -> None:
    params = SPECS[0].planted
    assert planted.relation(params, {**params, "classes": 2}) == "competes"


def test_suites_with_different_seeds_cannot_be_related() -> None:
    with pytest.raises(ValueError, match="same seed, got 7 and 8"):
        planted.relation(SPECS[0].planted, {**SPECS[0].planted, "seed": 8})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": "moon"}, "vocabulary must be one of harbour, .*, got 'moon'"),
        ({"rule": "guess"}, "rule must be one of tags, majority, contrast, mean, got 'guess'"),
        ({"kind": "regression"}, "rule tags makes a tagging task, got kind 'regression'"),
        ({"trait": "none"}, "trait must be letters and not 'none', got 'none'"),
        ({"classes": 1}, "classes must be at least 2, got 1"),
        ({"rule": "contrast", "kind": "classification", "classes": 3}, "classes must be even for rule contrast, got 3"),
        ({"words": 3}, "words must be in classes to 1920, got 3"),
        ({"words": 1921}, "words must be in classes to 1920, got 1921"),
        ({"words": "many"}, "words must be of type int, got 'many'"),
        ({"words": True}, "words must be of type int, got True"),
        ({"fillers": 0}, "fillers must be in 1..128, got 0"),
        ({"min_length": 9, "max_length": 8}, "3 <= min_length <= max_length, got 9 and 8"),
        ({"filler_share": 1.0}, "filler_share must be in 0..0.9, got 1.0"),
        ({"noise": 1.5}, "noise must be in 0..1, got 1.5"),
        ({"test": 0}, "test must be at least 1 example, got 0"),
        ({"colour": 3}, "planted has the keys .*, got 'colour'"),
    ],
)
def test_bad_parameters_are_refused_with_law_and_value(changes: dict[str, Any], message: str) -> None:
    params = {**SPECS[0].planted, **changes}
    for use in (planted.labels, planted.skills, lambda p: planted.count(p, "train"), lambda p: planted.generate(p, "train")):
        with pytest.raises(ValueError, match=message):
            use(params)


def test_missing_parameters_and_unknown_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="planted needs 'trait'"):
        planted.labels({key: value for key, value in SPECS[0].planted.items() if key != "trait"})
    with pytest.raises(ValueError, match="split must be one of train, dev, test, got 'valid'"):
        planted.generate(SPECS[0].planted, "valid")


def test_a_world_without_enough_texts_says_so() -> None:
    params = {**SPECS[1].planted, "words": 2, "classes": 2, "fillers": 1, "min_length": 3, "max_length": 3, "filler_share": 0.0}
    with pytest.raises(ValueError, match=r"draws gave no text for .*: words=2 or the lengths are too small"):
        for split in planted.SPLITS:
            rows(params, split)
