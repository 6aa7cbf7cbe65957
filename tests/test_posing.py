"""Native tasks as text to text: prompts, answers, and what has no such form."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_modules.building import ConfigError
from lightning_modules.data.posing import pose
from lightning_modules.data.tasks import TaskSpec, check, load_catalogues

ROWS: dict[str, list[dict[str, Any]]] = {
    "classification": [{"text": "so good", "label": "pos"}, {"text": "so {bad}", "text_pair": "really", "label": "neg"}],
    "regression": [{"text": "one", "label": 3.849}, {"text": "two", "label": -0.04}, {"text": "three", "label": 2}],
    "choice": [{"text": "Who?", "options": ["me", "you"], "label": 1}],
    "tagging": [{"tokens": ["a"], "tags": ["x"]}],
    "text2text": [{"text": "a", "target": "b"}],
}
METRIC = {"classification": "macro_f1", "regression": "pearson", "text2text": "rouge_l"}


def task(folder: Path, kind: str, **entry: Any) -> TaskSpec:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    files = dict.fromkeys(("train", "dev", "test"), "rows.jsonl")
    entry = {"name": "my/task", "kind": kind, "metric": METRIC.get(kind, "accuracy"), "files": files, **entry}
    (folder / "c.yaml").write_text(yaml.safe_dump({"tasks": [entry]}))
    return load_catalogues(["c.yaml"], folder)[entry["name"]]


def test_classes_become_their_names(tmp_path: Path) -> None:
    posed = pose(task(tmp_path, "classification", labels=["neg", "pos"]))
    assert (posed.name, posed.kind, posed.metric, posed.labels) == ("my/task", "text2text", "macro_f1", ("neg", "pos"))
    assert list(posed.read("train")) == [
        {"text": "my/task: text: so good", "target": "pos", "targets": ["pos"]},
        {"text": "my/task: text: so {bad} text_pair: really", "target": "neg", "targets": ["neg"]},
    ]


def test_answers_prompt_and_metric_go_together(tmp_path: Path) -> None:
    entry = {"labels": ["neg", "pos"], "answers": {"neg": "awful"}, "prompt": "{{x}} {text}? {name}"}
    posed = pose(task(tmp_path, "classification", metric="f1_positive(neg)", **entry))
    assert posed.labels == ("awful", "pos") and posed.metric == "f1_positive(awful)"
    assert [(row["text"], row["target"]) for row in posed.read("dev")] == [
        ("{x} so good? my/task", "pos"), ("{x} so {bad}? my/task", "awful"),
    ]  # fmt: skip
    assert pose(task(tmp_path, "classification", metric="macro_f1(without neg)", **entry)).metric == "macro_f1(without awful)"


def test_labels_that_are_not_listed_are_found_first(tmp_path: Path) -> None:
    assert pose(task(tmp_path, "classification")).labels == ("neg", "pos")


def test_numbers_have_fixed_decimals_and_keep_the_exact_one_as_reference(tmp_path: Path) -> None:
    posed = pose(task(tmp_path, "regression"))
    assert [row["target"] for row in posed.read("train")] == ["3.8", "0.0", "2.0"]
    assert [row["targets"] for row in posed.read("train")] == [["3.849", "3.8"], ["-0.04", "0.0"], ["2.0"]]
    assert posed.metric == "pearson" and posed.labels == () and check(posed).sizes["train"] == 3
    finer = pose(task(tmp_path, "regression", answers={"decimals": 2}))
    assert [row["target"] for row in finer.read("train")] == ["3.85", "-0.04", "2.00"]


def test_options_stand_in_the_input_and_the_right_one_is_the_target(tmp_path: Path) -> None:
    posed = pose(task(tmp_path, "choice"))
    row = {"text": "my/task: text: Who? options: (A) me (B) you", "target": "you", "targets": ["you"]}
    assert list(posed.read("train")) == [row]
    assert check(posed).sizes["train"] == 1 and posed.metric == "accuracy"


def test_text_to_text_stays(tmp_path: Path) -> None:
    spec = task(tmp_path, "text2text")
    assert pose(spec) is spec


def test_a_posed_task_can_be_checked_and_posed_again(tmp_path: Path) -> None:
    posed = pose(task(tmp_path, "classification"))
    checked = check(posed)
    assert checked.spec == posed and pose(posed) is posed
    assert checked.words == {4: 3, 6: 3} and checked.warnings[0] == "2 of 2 test examples also stand in train"


def test_one_answer_to_everything_is_refused(tmp_path: Path) -> None:
    spec = task(tmp_path, "classification", labels=["neg", "pos", "none"])
    assert "1 of 3 labels are not in train: none" in check(pose(spec)).warnings
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS["classification"][0]) + "\n")
    with pytest.raises(ConfigError, match="train must have more than one class, got 'pos' for all examples"):
        check(pose(spec))


@pytest.mark.parametrize(
    ("kind", "entry", "message"),
    [
        ("tagging", {"labels": ["x", "y"]}, "form text2text applies to classification, regression, choice and text2text, got"),
        ("choice", {"metric": "mcc"}, "metric must be accuracy or micro_f1 to pose a choice task"),
        ("classification", {"answers": {"nought": "x"}}, "answers must be of the labels neg, pos, got 'nought'"),
        ("classification", {"answers": {"neg": "Pos"}}, "answers must differ, beyond case, for every label, got Pos, pos"),
    ],
)
def test_what_has_no_text_form_is_refused(kind: str, entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        pose(task(tmp_path, kind, **entry))


def test_a_prompt_needs_its_second_text(tmp_path: Path) -> None:
    posed = pose(task(tmp_path, "classification", prompt="{text} {text_pair}"))
    with pytest.raises(ConfigError, match=r"prompt names {text_pair}, which an example lacks: {\"text\": \"so good\""):
        list(posed.read("train"))


def test_the_digest_follows_prompt_answers_and_data_of_the_posed_form_only(tmp_path: Path) -> None:
    plain = {"labels": ["neg", "pos"]}
    variants = [plain, {**plain, "prompt": "{text}"}, {**plain, "answers": {"neg": "bad"}}, {**plain, "name": "my/task2"}]
    native, posed = set(), set()
    for entry in variants:
        spec = task(tmp_path, "classification", **entry)
        native.add(spec.digest())
        posed.add(pose(spec).digest())
    assert len(native) == 1 and len(posed) == 4 and not native & posed
    spec = pose(task(tmp_path, "classification", **plain))
    before = spec.digest()
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text() * 2)
    assert spec.digest() != before
