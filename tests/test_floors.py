"""What a task scores without looking at the input: hand-computed for every kind, and as prepared data holds it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_modules.building import build
from lightning_modules.config import TrialConfig
from lightning_modules.data.prepared import open_tasks, prepare
from lightning_modules.data.tasks import METRICS, TaskSpec, load_catalogues
from lightning_modules.measure.floors import floor

ROOT, DET, OBJ = range(3)


def test_the_most_frequent_class_of_train_is_the_answer_to_every_example() -> None:
    """Class 1 leads in train; test has 1 of 4."""
    found = floor("classification", "accuracy", ["a", "b", "c"], [1, 0, 1, 2, 1], [0, 1, 2, 2], [0] * 4)
    assert found.values["accuracy"] == 0.25
    # F1 of class b: precision 1/4, recall 1; the others 0.
    assert found.values["macro_f1"] == pytest.approx((2 * 0.25 * 1 / 1.25) / 3)
    assert found.values["mcc"] in (0.0, None)  # nothing varies with the input


def test_a_class_that_only_test_has_often_is_not_the_answer() -> None:
    found = floor("classification", "f1_positive(b)", ["a", "b"], [0, 0, 1], [1, 1, 1], [0] * 3)
    assert found.values["accuracy"] == 0 and found.values["f1_positive(b)"] == 0


def test_the_most_frequent_option_number_is_chosen() -> None:
    found = floor("choice", "accuracy", [], [2, 2, 0, 1], [2, 0, 2, 1], [0] * 4)
    assert found.values["accuracy"] == 0.5


def test_the_mean_of_train_has_no_correlation_and_an_error() -> None:
    found = floor("regression", "pearson", [], [1.0, 2.0, 6.0], [3.0, 5.0], [0, 0])
    assert found.values["mse"] == pytest.approx(((3 - 3) ** 2 + (5 - 3) ** 2) / 2)
    for name in ("pearson", "spearman"):
        assert found.values[name] is None and found.undefined[name]


def test_the_most_frequent_tag_stands_on_every_word() -> None:
    """Tag 1 leads over words (4 of 7), though tag 0 begins more sentences."""
    train = [[0, 1, 1], [0, 1], [0, 1]]
    found = floor("tagging", "accuracy", ["NOUN", "VERB"], train, [[1, 0], [1, 1, 0]], [2, 3])
    assert found.values["accuracy"] == pytest.approx(3 / 5)
    assert found.values["span_f1"] is None


def test_bio_tags_have_the_floor_of_their_most_frequent_tag() -> None:
    labels = ["O", "B-X", "I-X"]
    outside = floor("tagging", "span_f1", labels, [[0, 0, 1]], [[1, 2, 0], [0, 1, 0]], [3, 3])
    assert outside.values["span_f1"] == 0 and outside.values["accuracy"] == 0.5
    # A B- on every word finds each span of one word: 1 hit, 6 found, 2 there.
    begins = floor("tagging", "span_f1", labels, [[1, 1, 0]], [[1, 2, 0], [0, 1, 0]], [3, 3])
    assert begins.values["span_f1"] == pytest.approx(2 * 1 / (6 + 2))


@pytest.mark.parametrize(
    ("kind", "metric", "targets"),
    [("spans", "span_f1", [[(0, 1, 0)], []]), ("srl", "srl_f1", [[(1, 0, 1, 0)], [(0, -1, -1, -1)]])],
)
def test_nothing_is_found_where_nothing_is_looked_at(kind: str, metric: str, targets: list[Any]) -> None:
    found = floor(kind, metric, ["A"], [[(0, 1, 0)] * 3 if kind == "spans" else [(1, 0, 1, 0)]], targets, [2, 2])
    assert found.values[metric] == 0.0 and not found.undefined
    if kind == "srl":
        assert found.values["predicate_f1"] == 0.0


def test_every_words_head_is_at_the_most_frequent_distance() -> None:
    """Distance +1 leads (3 of 5), its relation is DET; the last word's head would be outside, so it is the root."""
    train = [[(2, DET), (3, DET), (0, ROOT)], [(2, DET), (0, ROOT), (2, OBJ)], [(0, ROOT), (1, OBJ)]]
    gold = [[(2, DET), (3, OBJ), (4, DET), (0, ROOT)], [(0, ROOT), (1, OBJ)]]
    found = floor("dependency", "las", ["root", "det", "obj"], train, gold, [4, 2])
    # Predicted 2 3 4 0 | 2 0: the first sentence's heads are all right, both heads of the second are wrong.
    assert found.values["uas"] == pytest.approx(4 / 6)
    assert found.values["las"] == pytest.approx(2 / 6)  # words 1 and 3; word 2 is OBJ, the root's relation is DET too


def test_a_head_to_the_left_works_as_well() -> None:
    train = [[(0, ROOT), (1, OBJ), (2, OBJ)]]
    found = floor("dependency", "las", ["root", "det", "obj"], train, [[(0, ROOT), (1, OBJ), (1, OBJ)]], [3])
    assert found.values["uas"] == pytest.approx(2 / 3) and found.values["las"] == pytest.approx(1 / 3)


def test_the_root_is_at_no_distance() -> None:
    """Heads to the left: the relations at distance -1 are OBJ, OBJ and DET; the three roots at word 1 are at none."""
    train = [[(0, ROOT), (1, OBJ)], [(0, ROOT), (1, OBJ)], [(0, ROOT), (1, DET)]]
    found = floor("dependency", "las", ["root", "det", "obj"], train, [[(0, ROOT), (1, OBJ), (2, OBJ)]], [3])
    assert found.values["uas"] == 1.0 and found.values["las"] == pytest.approx(2 / 3)


def test_trees_branch_to_the_right_with_the_most_frequent_constituent() -> None:
    """NP (1) leads in train; four words: 0-4, 1-4, 2-4."""
    train = [[(0, 3, 0), (1, 3, 1)], [(0, 2, 1)], [(0, 2, 1)]]
    gold = [[(0, 4, 0), (1, 4, 1), (2, 4, 1)], [(0, 1, 1)], [(0, 2, 0), (0, 2, 1)]]
    found = floor("constituency", "bracket_f1", ["S", "NP"], train, gold, [4, 1, 2])
    # Predicted 3 + 1 + 1 brackets; hits 2 + 1 + 1; gold has 3 + 1 + 2.
    assert found.values["bracket_f1"] == pytest.approx(2 * 4 / (5 + 6))


def test_text_is_answered_by_the_most_frequent_first_reference() -> None:
    train = [["yes", "never"], ["no", "never"], ["yes", "never"]]
    open_ended = floor("text2text", "exact_match", [], train, [["yes"], ["no"], ["maybe", "yes"]], [0] * 3)
    assert open_ended.values["exact_match"] == pytest.approx(2 / 3)
    closed = floor("text2text", "accuracy", ["no", "yes"], train, [["yes"], ["no"], ["no"]], [0] * 3)
    assert closed.values["accuracy"] == pytest.approx(1 / 3) and closed.values["invalid_rate"] == 0
    numbers = floor("text2text", "pearson", [], [["2.0"], ["3.0"], ["2.0"]], [["2.0"], ["4.0"]], [0] * 2)
    assert numbers.values["pearson"] is None and numbers.undefined["pearson"]
    assert (
        numbers.values["mse"] == pytest.approx(((7 / 3 - 2) ** 2 + (7 / 3 - 4) ** 2) / 2)
        and numbers.values["invalid_rate"] == 0
    )


def test_every_kind_has_a_floor() -> None:
    examples: dict[str, tuple[Any, int]] = {
        "classification": (1, 0), "regression": (1.0, 0), "choice": (0, 0), "tagging": ([0, 1], 2), "spans": ([(0, 1, 0)], 2),
        "dependency": ([(2, 1), (0, 0)], 2), "constituency": ([(0, 2, 0)], 2), "srl": ([(0, 1, 2, 0)], 2),
        "text2text": (["b"], 0),
    }  # fmt: skip
    assert set(examples) == set(METRICS)
    for kind, (target, words) in examples.items():
        found = floor(kind, METRICS[kind][0], ["a", "b"], [target] * 2, [target] * 2, [words] * 2)
        assert METRICS[kind][0] in found.values, kind
        assert all(value is not None or found.undefined[name] for name, value in found.values.items()), kind


def test_prepared_data_holds_the_floors_of_its_own_rows(catalogue: Path, every_kind: Path, tmp_path: Path) -> None:
    """Counted here from the rows themselves."""
    specs: dict[str, TaskSpec] = load_catalogues([catalogue, every_kind], Path())
    names = ("toy/sentiment", "toy/count", "toy/pos", "kind/choice", "kind/dependency")
    plain = {
        "backbone": {"max_length": 48, "size": {"vocab_size": 320, "tokenizer_tasks": names}},
        "mixture": {"tasks": names},
        "digests": {name: specs[name].digest() for name in names},
    }
    config = build(TrialConfig, plain, "trial")
    prepare([config], specs, tmp_path)
    tasks = open_tasks(config, tmp_path)
    floors = {task.name: task.floor("test", np.arange(task.size("test"))) for task in tasks}
    train, test = ({name: list(specs[name].read(split)) for name in names} for split in ("train", "test"))

    def share(name: str, field: str) -> float:
        most = Counter(row[field] for row in train[name]).most_common(1)[0][0]
        return sum(row[field] == most for row in test[name]) / len(test[name])

    assert floors["toy/sentiment"]["accuracy"] == pytest.approx(share("toy/sentiment", "label"))
    assert floors["kind/choice"]["accuracy"] == pytest.approx(share("kind/choice", "label"))
    labels = [row["label"] for row in train["toy/count"]]
    mean = sum(labels) / len(labels)
    errors = [(row["label"] - mean) ** 2 for row in test["toy/count"]]
    assert floors["toy/count"]["mse"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert floors["toy/count"]["pearson"] is None
    tag = Counter(tag for row in train["toy/pos"] for tag in row["tags"]).most_common(1)[0][0]
    tags = [tag == other for row in test["toy/pos"] for other in row["tags"]]
    assert floors["toy/pos"]["accuracy"] == pytest.approx(sum(tags) / len(tags))
    few = tasks[0].floor("test", np.array([0, 1, 2]))["accuracy"]
    most = Counter(row["label"] for row in train["toy/sentiment"]).most_common(1)[0][0]
    assert few == pytest.approx(sum(row["label"] == most for row in test["toy/sentiment"][:3]) / 3)
    assert floors["kind/dependency"]["uas"] == 1.0  # every word's head is the next one, and the last word is the root
