"""Rows of every kind: what is converted, what is refused, and that labels give back the answers they came from."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_modules.building import ConfigError
from lightning_modules.data import kinds
from lightning_modules.data.forms import bio_spans, examples, listed
from lightning_modules.data.tasks import TaskSpec

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def spec(kind: str, labels: tuple[str, ...] = (), **settings: Any) -> TaskSpec:
    return TaskSpec(name="t", kind=kind, metric="", labels=labels, **settings)


def formed(task: TaskSpec, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row, _ in examples(task, iter([(row, f"f:{i}") for i, row in enumerate(rows, 1)]))]


WORDS = ["a", "b", "c", "d"]
GOOD: dict[str, tuple[tuple[str, ...], dict[str, Any], Any, list[tuple[Any, ...]]]] = {
    "classification": (("x", "y"), {"text": "a", "text_pair": "b", "label": "y"}, 1, [(1,)]),
    "regression": ((), {"text": "a", "label": 2.5}, 2.5, [(2.5,)]),
    "choice": ((), {"text": "a", "options": ["b", "c", "d"], "label": 2}, 2, [(2,)]),
    "tagging": (("x", "y"), {"tokens": ["a", "b"], "tags": ["y", "x"]}, [1, 0], [(1,), (0,)]),
    "spans": (
        ("x", "y"),
        {"tokens": WORDS, "spans": [[2, 4, "y"], [0, 1, "x"]]},
        [(2, 4, 1), (0, 1, 0)],
        [(2, 4, 1), (0, 1, 0)],
    ),
    "dependency": (
        ("root", "obj"),
        {"tokens": ["a", "b"], "heads": [0, 1], "deprels": ["root", "obj"]},
        [(0, 0), (1, 1)],
        [(0, 0), (1, 1)],
    ),
    "constituency": (
        ("S", "NP", "VP"),
        {"tokens": WORDS, "spans": [[0, 4, "S"], [0, 2, "S"], [0, 2, "NP"], [2, 4, "VP"]]},
        [(0, 4, 0), (0, 2, 0), (0, 2, 1), (2, 4, 2)],
        [(0, 4, 0), (0, 2, 1), (2, 4, 2)],
    ),
    "srl": (
        ("A0", "A1"),
        {
            "tokens": WORDS,
            "frames": [{"predicate": 1, "arguments": [[0, 1, "A0"], [2, 4, "A1"]]}, {"predicate": 2, "arguments": []}],
        },
        [(1, 0, 1, 0), (1, 2, 4, 1), (2, -1, -1, -1)],
        [(1, 0, 1, 0), (1, 2, 4, 1), (2, -1, -1, -1)],
    ),
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_row_gives_label_items_and_they_give_the_answer(kind: str) -> None:
    labels, row, answer, items = GOOD[kind]
    task = spec(kind, labels)
    (read,) = formed(task, dict(row))
    assert read == row
    facts = json.loads(json.dumps(kinds.facts(task, {"train": [read], "dev": [], "test": []})))
    assert kinds.label_items(task, read, facts) == items
    assert all(len(item) == kinds.width(kind) for item in items)
    assert kinds.gold(kind, items, facts) == answer


def test_text2text_has_no_label_items() -> None:
    row = {"text": "a", "target": "b", "targets": ["b", "c"]}
    assert formed(spec("text2text"), {"input": "a", "target": "b", "targets": ["b", "c"]}) == [row]
    with pytest.raises(ValueError, match="text2text has no label items"):
        kinds.label_items(spec("text2text"), row, {})


def tokens(n: int = 4, **columns: Any) -> dict[str, Any]:
    return {"tokens": WORDS[:n], **columns}


def frame(predicate: Any = 1, *arguments: list[Any]) -> dict[str, Any]:
    return {"predicate": predicate, "arguments": list(arguments)}


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "pair": ("classification", {"text": "a", "text_pair": 3, "label": "x"}, r"text \(and text_pair\) to be text, got {"),
    "list label": ("classification", {"text": "a", "label": ["x"]}, r"label must be one of x, y, got \['x'\]"),
    "null label": ("classification", {"text": "a", "label": None}, r"needs label, .* leaves empty; the row has text, label"),
    "NaN": ("regression", {"text": "a", "label": float("nan")}, r"label must be a finite number, got nan"),
    "nan text": ("regression", {"text": "a", "label": "nan"}, r"label must be a finite number, got nan"),
    "true": ("regression", {"text": "a", "label": True}, r"label must be a finite number, got True"),
    "one option": ("choice", {"text": "a", "options": ["b"], "label": 0}, r"two texts or more, got \[\"b\"\]"),
    "option type": ("choice", {"text": "a", "options": ["b", 2], "label": 0}, r"two texts or more, got \[\"b\", 2\]"),
    "option number": ("choice", {"text": "a", "options": ["b", "c"], "label": 2}, r"number of an option, 0 to 1, got 2"),
    "option text": ("choice", {"text": "a", "options": ["b", "c"], "label": "c"}, r"number of an option, 0 to 1, got 'c'"),
    "tag length": ("tagging", tokens(tags=["x"]), r"tokens and tags must have the same length, at least 1, got 4 and 1"),
    "no words": ("tagging", tokens(0, tags=[]), r"same length, at least 1, got 0 and 0"),
    "tag": ("tagging", tokens(1, tags=["z"]), r"tag must be one of x, y, got 'z'"),
    "words": ("tagging", {"tokens": ["a", 1], "tags": ["x", "x"]}, r"tagging needs tokens and tags, lists of text, got {"),
    "BIO": ("spans", tokens(1, tags=["x"]), r"tag must be O, B-... or I-..., got 'x'"),
    "BIO length": ("spans", tokens(tags=["O"]), r"spans needs spans, got {"),
    "span range": ("spans", tokens(spans=[[2, 5, "x"]]), r"0 <= start < end <= 4 words, got \[2, 5, \"x\"\]"),
    "empty span": ("spans", tokens(spans=[[2, 2, "x"]]), r"0 <= start < end <= 4 words"),
    "span form": ("spans", tokens(spans=[[0, "x"]]), r"spans must be a list of \[start, end, label\], got"),
    "span label": ("spans", tokens(spans=[[0, 1, "z"]]), r"label must be one of x, y, got 'z'"),
    "overlap": ("spans", tokens(spans=[[1, 3, "x"], [0, 2, "y"]]), r"spans must not overlap, got \[\[0, 2, \"y\"\], \[1, 3"),
    "crossing": (
        "constituency",
        tokens(spans=[[0, 4, "x"], [1, 4, "x"], [0, 2, "x"]]),
        r"nested, got \[0, 2, 'x'\] and \[1, 4",
    ),
    "tree range": ("constituency", tokens(spans=[[0, 5, "x"]]), r"0 <= start < end <= 4 words"),
    "heads length": ("dependency", tokens(heads=[0], deprels=["x"] * 4), r"tokens and heads and deprels .* got 4 and 1 and 4"),
    "head range": ("dependency", tokens(2, heads=[0, 3], deprels=["x"] * 2), r"whole numbers from 0 to 2, got 3"),
    "head text": ("dependency", tokens(2, heads=[0, "_"], deprels=["x"] * 2), r"whole numbers from 0 to 2, got '_'"),
    "cycle": ("dependency", tokens(heads=[0, 3, 4, 2], deprels=["x"] * 4), r"word 2 is in a cycle, got \[0, 3, 4, 2\]"),
    "own head": ("dependency", tokens(2, heads=[0, 2], deprels=["x"] * 2), r"word 2 is in a cycle"),
    "relation": ("dependency", tokens(1, heads=[0], deprels=["z"]), r"relation must be one of x, y, got 'z'"),
    "predicate": ("srl", tokens(frames=[frame(4)]), r"predicate, the number of a word, and arguments, got"),
    "role": ("srl", tokens(frames=[frame(1, [0, 1, "z"])]), r"role must be one of x, y, got 'z'"),
    "argument": ("srl", tokens(frames=[frame(1, [0, 9, "x"])]), r"arguments must have 0 <= start < end <= 4 words"),
    "arguments": ("srl", tokens(frames=[frame(1, [0, 2, "x"], [1, 3, "x"])]), r"arguments must not overlap"),
    "twice": ("srl", tokens(frames=[frame(1), frame(1)]), r"frames must have different predicates, got \[1, 1\]"),
    "frames": ("srl", tokens(predicate_index=4, tags=["O"] * 4), r"srl needs frames, or predicate_index and BIO tags"),
    "target": ("text2text", {"text": "a", "target": " "}, r"target must be text, got ' '"),
    "targets": ("text2text", {"text": "a", "target": "x", "targets": ["y"]}, r"texts with the target in it, got \[\"y\"\]"),
    "closed": ("text2text", {"text": "a", "target": "z"}, r"target must be one of x, y, got 'z'"),
    "surrogate": ("text2text", {"text": "a", "target": "x", "targets": ["x", "\ud800"]}, r"text must be valid Unicode"),
    "word": ("spans", {"tokens": ["\ud800"], "spans": []}, r"text must be valid Unicode"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_breaks_its_form_is_told(name: str) -> None:
    kind, row, message = BAD[name]
    labels = ("x", "y") if kind not in ("regression", "choice") else ()
    with pytest.raises(ConfigError, match=message) as caught:
        formed(spec(kind, labels), row)
    assert caught.value.key == "f:1"


# -- numbers, names and keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "value", "label"),
    [
        (("no", "yes"), 1, "yes"),
        (("no", "yes"), "1", "yes"),
        (("no", "yes"), 1.0, "yes"),
        (("no", "yes"), True, "yes"),
        (("false", "true"), True, "true"),
        (("1", "2", "3"), 1, "1"),
        (("1", "2", "3"), "3", "3"),
        ((), 7, "7"),
        ((), False, "false"),
        ((), "anything", "anything"),
    ],
)
def test_what_a_label_column_means(labels: tuple[str, ...], value: Any, label: str) -> None:
    assert formed(spec("classification", labels), {"text": "a", "label": value})[0]["label"] == label


@pytest.mark.parametrize("value", [0, 4, -1, "4"])
def test_numbers_as_names_are_no_places(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"label must be one of 1, 2, 3, got '(0|4|-1)'"):
        formed(spec("classification", ("1", "2", "3")), {"text": "a", "label": value})


def test_numbers_of_tags_are_places_in_the_list_as_it_was_listed() -> None:
    names = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    labels, keys = listed("spans", names)
    assert (labels, keys) == (("PER", "LOC"), names)
    row = {"tokens": WORDS, "tags": [1, 2, 0, 3]}
    assert formed(spec("spans", labels, keys=keys), dict(row))[0]["spans"] == [[0, 2, "PER"], [3, 4, "LOC"]]
    assert formed(spec("tagging", names, keys=names), dict(row))[0]["tags"] == ["B-PER", "I-PER", "O", "B-LOC"]


def test_an_options_label_may_be_its_key_its_number_or_text_of_it() -> None:
    def label(value: Any, keys: tuple[str, ...] = (), **columns: Any) -> int:
        row = {"text": "q", "options": ["a", "b", "c"], "label": value, **columns}
        (read,) = formed(spec("choice", keys=keys), row)
        assert set(read) == {"text", "options", "label"}
        return read["label"]

    assert listed("choice", ["A", "B", "C"]) == ((), ("A", "B", "C"))
    assert (
        label("B", ("A", "B", "C")) == label(1) == label("1") == label(2, ("1", "2", "3")) == label("2", ("1", "2", "3")) == 1
    )
    assert label("3", keys=["1", "2", "3"]) == 2  # type: ignore[arg-type]


def test_bio_tags_are_read_leniently_as_seqeval_does() -> None:
    from seqeval.metrics.sequence_labeling import get_entities

    rng = random.Random(0)
    tags = ["O", "B-x", "I-x", "B-y", "I-y"]
    for _ in range(500):
        sentence = [rng.choice(tags) for _ in range(rng.randint(1, 9))]
        expected = [(start, end + 1, label) for label, start, end in get_entities(sentence)]
        assert bio_spans(sentence) == expected, sentence


# -- roles ---------------------------------------------------------------------------------------------------------------


def role_row(words: list[str], predicate: int, tags: list[str]) -> dict[str, Any]:
    return {"tokens": words, "predicate_index": predicate, "tags": tags, "predicate": "be.01"}


def test_rows_of_one_predicate_are_joined_by_their_words() -> None:
    other = ["e", "f"]
    rows = [
        role_row(WORDS, 1, ["B-A0", "B-V", "B-A1", "I-A1"]),
        role_row(other, 0, ["B-V", "O"]),
        role_row(WORDS, 2, ["I-A0", "O", "B-V", "B-C-V"]),
        role_row(WORDS, 1, ["O", "B-V", "I-V", "B-A1"]),
    ]
    first = {"tokens": WORDS, "frames": [frame(1, [0, 1, "A0"], [2, 4, "A1"]), frame(2, [0, 1, "A0"])]}
    second = {"tokens": WORDS, "frames": [frame(1, [3, 4, "A1"])]}
    assert formed(spec("srl"), *rows) == [first, {"tokens": other, "frames": [frame(0)]}, second]


def test_the_roles_of_listed_bio_tags() -> None:
    assert listed("srl", ["B-A0", "B-C-V", "B-V", "I-A0", "O", "B-R-A1"])[0] == ("A0", "R-A1")


# -- facts ---------------------------------------------------------------------------------------------------------------


def test_facts_of_regression_are_trains() -> None:
    rows = [{"text": "a", "label": value} for value in (1.0, 2.0, 6.0)]
    facts = kinds.facts(spec("regression"), {"train": rows, "dev": [{"text": "a", "label": 100.0}]})
    assert facts == {"mean": pytest.approx(3.0), "sd": pytest.approx(float(np.std([1, 2, 6])))}


def test_chains_are_numbered_train_first() -> None:
    task = spec("constituency", ("S", "NP", "VP"))
    dev = [tokens(spans=[[0, 4, "VP"], [0, 2, "NP"]])]
    train = [tokens(spans=[[0, 4, "S"], [0, 4, "VP"]]), tokens(spans=[[0, 4, "NP"]])]
    assert kinds.facts(task, {"dev": dev, "train": train}) == {"chains": [[0, 2], [1], [2]]}


def test_spans_of_a_tree_are_put_in_pre_order() -> None:
    spans = [[2, 4, "VP"], [0, 2, "NP"], [0, 4, "S"], [0, 2, "N"]]
    (row,) = formed(spec("constituency"), tokens(spans=spans))
    assert row["spans"] == [[0, 4, "S"], [0, 2, "NP"], [0, 2, "N"], [2, 4, "VP"]]


REAL = {"ewt_con": "constituency", "ewt_dep": "dependency", "ewt_srl": "srl", "wnut17": "spans"}


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared real tasks are not beside this checkout")
@pytest.mark.parametrize(("task", "kind"), REAL.items())
def test_real_answers_come_back_from_their_labels(task: str, kind: str) -> None:
    files = {split: DATA / task / f"{split}.jsonl" for split in ("train", "dev", "test")}
    found = spec(kind, files={split: files["dev"] for split in files}).complete()
    rows = list(found.read("dev"))
    facts = kinds.facts(found, {"train": rows})
    number = {label: i for i, label in enumerate(found.labels)}
    for row in rows:
        answer = kinds.gold(kind, kinds.label_items(found, row, facts), facts)
        if kind == "dependency":
            assert answer == [(head, number[rel]) for head, rel in zip(row["heads"], row["deprels"], strict=True)]
        elif kind == "srl":
            assert {p for p, *_ in answer} == {frame["predicate"] for frame in row["frames"]}
        else:
            assert answer == [(start, end, number[label]) for start, end, label in row["spans"]]
