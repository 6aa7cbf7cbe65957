"""Catalogues: what can be named, what is refused and how, and that a digest follows the content."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_modules.config import ConfigError
from lightning_modules.data import tasks
from lightning_modules.data.tasks import TaskSpec, check, load_catalogues, metric_parts, select

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "data" / "manifest.yaml"


def test_tasks_are_chosen_by_name_category_and_kind(specs: dict[str, TaskSpec]) -> None:
    assert select(specs, ["toy/*"], "k") == ["toy/sentiment", "toy/count", "toy/pos"]
    assert select(specs, ["toy/pos", "toy/count"], "k") == ["toy/count", "toy/pos"]
    assert select(specs, ["category:toy/reg*"], "k") == ["toy/count"]
    assert select(specs, ["kind:tagging", "kind:classification"], "k") == ["toy/sentiment", "toy/pos"]
    assert select(specs, ["toy/*", "!kind:tagging"], "k") == ["toy/sentiment", "toy/count"]


@pytest.mark.parametrize("patterns", [["toy/non*"], ["toy/*", "!toy/*"], ["kind:srl"]])
def test_a_pattern_without_a_task_is_refused(specs: dict[str, TaskSpec], patterns: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"no task matches|at least one task"):
        select(specs, patterns, "trial.mixture.tasks")


def test_check_counts_examples(specs: dict[str, TaskSpec]) -> None:
    assert check(specs["toy/pos"]) == {"train": 60, "dev": 24, "test": 24}


def write_task(folder: Path, rows: list[Any], **entry: Any) -> TaskSpec:
    for split in ("train", "dev", "test"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    files = {split: f"{split}.jsonl" for split in ("train", "dev", "test")}
    entry = {"name": "t", "kind": "classification", "labels": ["a", "b"], "files": files, **entry}
    (folder / "c.yaml").write_text(yaml.safe_dump({"tasks": [entry]}))
    return load_catalogues(["c.yaml"], folder)["t"]


GOOD = {"text": "x", "label": "a"}
TAGGED = {"tokens": ["x"], "tags": ["a"]}
BAD = {
    "torn line": ([GOOD, '{"text": "x", "la'], {}, r"train.jsonl:2: must be one JSON object per line"),
    "not an object": ([GOOD, "[1]"], {}, r"train.jsonl:2: must be one JSON object per line"),
    "unknown label": ([GOOD, GOOD, {"text": "x", "label": "c"}], {}, r"train.jsonl:3: label must be one of a, b, got 'c'"),
    "no text": ([{"label": "a"}], {}, r"train.jsonl:1: classification needs text"),
    "label no number": (
        [GOOD],
        {"kind": "regression", "metric": "pearson"},
        r"train.jsonl:1: label must be a finite number, got 'a'",
    ),
    "NaN": (['{"text": "x", "label": NaN}'], {"kind": "regression", "metric": "pearson"}, r"must be a finite number, got nan"),
    "lengths": (
        [{"tokens": ["x", "y"], "tags": ["a"]}],
        {"kind": "tagging"},
        r"train.jsonl:1: tokens and tags must have the same length",
    ),
    "unknown tag": ([TAGGED, {"tokens": ["x"], "tags": ["c"]}], {"kind": "tagging"}, r"train.jsonl:2: tag must be one of"),
    "srl": (
        [{**TAGGED, "predicate_index": 0}],
        {"kind": "tagging"},
        r"train.jsonl:1: column predicate_index belongs to kind srl",
    ),
    "empty": ([""], {}, r"train has no examples"),
    "kind": ([GOOD], {"kind": "text2text"}, r"kind must be one of classification, regression, tagging, got 'text2text'"),
    "metric": ([GOOD], {"metric": "bleu"}, r"metric must be one of accuracy, .* got 'bleu'"),
    "metric label": ([GOOD], {"metric": "f1_positive(z)"}, r"names a label that is not in labels"),
    "metric argument": ([GOOD], {"metric": "accuracy(a)"}, r"metric must be accuracy, got 'accuracy\(a\)'"),
    "macro argument": ([GOOD], {"metric": "macro_f1(a)"}, r"metric must be macro_f1\(without LABEL\), got"),
    "surrogate": (['{"text": "\\ud800", "label": "a"}'], {}, r"train.jsonl:1: text must be valid Unicode"),
    "huge": (['{"text": "x", "label": 1e300}'], {"kind": "regression", "metric": "pearson"}, r"must be a finite number"),
    "metric without label": ([GOOD], {"metric": "f1_positive"}, r"must name its label"),
    "labels": ([GOOD], {"labels": ["a"]}, r"at least two labels"),
    "low resource": ([GOOD], {"low_resource": 0}, r"low_resource must be a whole number of examples, at least 1, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_with_its_place(name: str, tmp_path: Path) -> None:
    rows, entry, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        check(write_task(tmp_path, rows, **entry))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    spec = write_task(tmp_path, [GOOD])
    (tmp_path / "dev.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"no such file: .*dev\.jsonl"):
        check(spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("tasks: 3", "must have a list under 'tasks'"),
        ("tasks: [3]", r"tasks\[0\] must be a mapping with a name"),
        ("tasks: [{name: x}]", r"\(x\) must have a kind"),
        ("tasks: [{name: x, kind: tagging}]", "must have files"),
        ("tasks: [{name: 'a*', kind: tagging, files: {}}]", "must have a name of letters, digits"),
        ("tasks: [{name: x, kind: tagging, files: {train: 3}}]", "must have text under files.train, got 3"),
        ("tasks: [{name: x, kind: tagging, labels: ab, files: {}}]", "must have labels as a list, got 'ab'"),
        ("tasks: [{name: x, kind: tagging, planted: 3}]", "must have planted as a mapping, got 3"),
        ("tasks: [{name: x, kind: tagging, metrik: accuracy, files: {}}]", "unknown key 'metrik'; did you mean metric"),
        ("planted: 3\ntasks: []", "planted must be a mapping, got 3"),
        ("planted: {seed: 0}\ntasks: [{name: x, kind: tagging, planted: {rule: nope}}]", r"\(x\): "),
    ],
)
def test_a_malformed_catalogue_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_catalogues(["c.yaml"], tmp_path)


def test_a_catalogue_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"tasks: [\xff\xfe]")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_catalogues(["c.yaml"], tmp_path)


def test_two_catalogues_cannot_define_the_same_task(catalogue: Path) -> None:
    with pytest.raises(ConfigError, match=r"which .* has defined"):
        load_catalogues([catalogue, catalogue], Path())


def test_the_digest_follows_content_and_form(tmp_path: Path) -> None:
    spec = write_task(tmp_path, [GOOD])
    digests = {spec.digest()}
    assert write_task(tmp_path, [GOOD]).digest() in digests
    digests.add(write_task(tmp_path, [GOOD, GOOD]).digest())
    digests.add(write_task(tmp_path, [GOOD], metric="mcc").digest())
    digests.add(write_task(tmp_path, [GOOD], labels=["b", "a"]).digest())
    assert len(digests) == 4


def test_metric_arguments() -> None:
    assert metric_parts("macro_f1(without Other)") == ("macro_f1", "without Other")
    assert metric_parts("accuracy") == ("accuracy", "")


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared real tasks are not beside this checkout")
def test_the_shared_manifest_is_read_as_it_is() -> None:
    found = load_catalogues([SHARED], Path())
    usable = [name for name in found if found[name].kind in tasks.KINDS]
    failures = {}
    for name in usable:
        try:
            check(found[name])
        except ConfigError as error:
            failures[name] = str(error)
    assert len(found) >= 60 and len(usable) - len(failures) >= 20
    assert set(failures) == {"ewt_con", "ewt_srl"}, failures  # constituency and roles: kinds of their own, told so
