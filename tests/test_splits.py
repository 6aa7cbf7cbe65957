"""Recipes, carving by content, few-shot samples and the census of doubtful examples."""

import random
from typing import Any

import numpy as np
import pytest

from lightning_modules.data.splits import Census, Part, content, few_shot, parts, position

SPLITS = ("train", "dev", "test")


def test_without_a_recipe_the_sources_are_the_splits() -> None:
    assert parts({}, SPLITS) == {split: (Part(split),) for split in SPLITS}


def test_a_recipe_renames_joins_and_carves() -> None:
    found = parts(
        {"train": ["a", "b"], "dev": {"from": "a", "share": 0.25}, "test": {"from": ["a", "b"], "share": 0.5}}, SPLITS
    )
    assert found == {
        "train": (Part("a", 0.75), Part("b", 0.5)),
        "dev": (Part("a", 0, 0.25),),
        "test": (Part("a", 0.25, 0.75), Part("b", 0, 0.5)),
    }


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"valid": "x"}, "splits must be of train, dev, test, got valid"),
        ({"dev": 3}, "splits.dev must be a source, a list of sources"),
        ({"dev": []}, "splits.dev must be a source"),
        ({"dev": ["a", "a"]}, "splits.dev must be a source"),
        ({"dev": {"from": "train"}}, "splits.dev must have from and a share between 0 and 1"),
        ({"dev": {"from": "train", "share": 1.5}}, "a share between 0 and 1"),
        ({"dev": {"from": "train", "share": True}}, "a share between 0 and 1"),
        ({"dev": "train"}, "splits train and dev must not both be 'train'"),
        ({"dev": {"from": "x", "share": 0.6}, "test": {"from": "x", "share": 0.6}}, "at most all of 'x', got 1.2"),
        (
            {"train": "x", "dev": {"from": "x", "share": 0.5}, "test": {"from": "x", "share": 0.5}},
            "must leave something of 'x' for train",
        ),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parts(recipe, SPLITS)


ROWS = [{"text": f"text {i % 900}", "label": i} for i in range(1000)]  # 100 inputs stand there twice


def carved(rows: list[dict[str, Any]], recipe: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {split: [row for row in rows if pieces[0].holds(row)] for split, pieces in parts(recipe, SPLITS).items()}


def test_carved_splits_share_nothing_lose_nothing_and_keep_their_shares() -> None:
    shares = {"dev": 0.1, "test": 0.3}
    found = carved(ROWS, {"train": "x"} | {split: {"from": "x", "share": share} for split, share in shares.items()})
    texts = {split: {row["text"] for row in rows} for split, rows in found.items()}
    assert sum(map(len, found.values())) == 1000 and sum(map(len, texts.values())) == 900
    for split, share in shares.items():
        assert abs(len(texts[split]) / 900 - share) < 4 * np.sqrt(share * (1 - share) / 900)
    whole = carved(ROWS, {s: {"from": "x", "share": 1 / 3} for s in SPLITS})
    assert sum(map(len, whole.values())) == 1000


def test_carving_does_not_depend_on_the_order_or_the_other_rows() -> None:
    recipe = {"train": "x", "dev": {"from": "x", "share": 0.2}, "test": "y"}
    kept = {row["label"] for row in carved(ROWS, recipe)["dev"]}
    shuffled = random.Random(0).sample(ROWS, 500)
    assert {row["label"] for row in carved(shuffled, recipe)["dev"]} == kept & {row["label"] for row in shuffled}
    smaller = carved(ROWS, {**recipe, "dev": {"from": "x", "share": 0.1}})["dev"]
    assert {row["label"] for row in smaller} < kept


def test_the_place_of_an_example_is_that_of_its_input_alone() -> None:
    assert position({"text": "a b", "label": "x"}) == position({"text": "a b", "label": "y"})
    assert position({"text": "a b", "label": "x"}) == position({"tokens": ["a", "b"], "heads": [0, 1]})
    different = [
        {"text": "a b"},
        {"text": "a", "text_pair": "b"},
        {"text": "a b", "options": ["x"]},
        {"text": "a b", "options": ["y"]},
    ]
    assert len({content(row) for row in different}) == 4
    assert position({"text": "golden"}) == pytest.approx(0.8646067532750590)  # the same on every machine


LABELS = [i % 3 if i % 10 else 3 for i in range(300)]  # class 3 has 30 rows


@pytest.mark.parametrize("labels", [LABELS, None], ids=["classes", "no classes"])
def test_few_shot_samples_are_nested_and_draws_differ(labels: list[int] | None) -> None:
    for draw in range(5):
        samples = [set(few_shot("t", labels, k, draw, 300).tolist()) for k in (1, 2, 8, 16)]
        assert samples[0] < samples[1] < samples[2] < samples[3]
    draws = [tuple(few_shot("t", labels, 16, draw, 300)) for draw in range(5)]
    assert len(set(draws)) == 5 and tuple(few_shot("t", labels, 16, 2, 300)) == draws[2]
    assert tuple(few_shot("other", labels, 16, 0, 300)) != draws[0]


def test_few_shot_counts() -> None:
    rows = few_shot("t", LABELS, 16, 0, 300)
    assert np.bincount(np.array(LABELS)[rows]).tolist() == [16, 16, 16, 16] and (np.diff(rows) > 0).all()
    assert np.bincount(np.array(LABELS)[few_shot("t", LABELS, 50, 0, 300)]).tolist() == [50, 50, 50, 30]
    assert len(few_shot("t", None, 16, 0, 300)) == 32 and few_shot("t", None, 16, 0, 20).tolist() == list(range(20))


def test_few_shot_reaches_every_row() -> None:
    hits = np.zeros(60)
    for draw in range(5):
        for task in range(40):
            hits[few_shot(f"t{task}", None, 10, draw, 60)] += 1
    assert abs(hits.mean() - 200 / 3) < 1e-9 and hits.min() > 35 and hits.max() < 100  # sd 6.7


def test_the_census_against_sets() -> None:
    rng = random.Random(1)
    rows = {split: [{"text": f"t{rng.randint(0, 80)}", "label": rng.randint(0, 1)} for _ in range(60)] for split in SPLITS}
    census = Census()
    for split in SPLITS:
        for row in rows[split]:
            census.add(split, row)
    texts = {split: [row["text"] for row in rows[split]] for split in SPLITS}
    shared = {
        (a, b): sum(t in set(texts[b]) for t in texts[a]) for a, b in (("test", "train"), ("dev", "train"), ("test", "dev"))
    }
    torn = sum(any(o["text"] == row["text"] and o["label"] != row["label"] for o in rows["train"]) for row in rows["train"])
    assert min(shared.values()) > 0 and torn > 0
    assert census.warnings() == [
        *(f"{n} of 60 {a} examples also stand in {b}" for (a, b), n in shared.items()),
        f"{torn} of 60 train examples have the input of another one that is labelled differently",
    ]


def test_the_census_is_silent_about_several_references_and_clean_data() -> None:
    census = Census()
    for split, text in (("train", "a"), ("dev", "b"), ("test", "c")):
        census.add(split, {"text": text, "target": "x"})
        census.add(split, {"text": text, "target": "y"})
    assert census.warnings() == []
