"""Catalogues: what can be named, what is refused and how, and that a digest follows the content."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_modules.building import ConfigError
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
    checked = check(specs["toy/pos"])
    assert checked.sizes == {"train": 60, "dev": 24, "test": 24}
    lengths = [len(row["tokens"]) for split in tasks.SPLITS for row in specs["toy/pos"].read(split)]
    assert checked.words == Counter(lengths)


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
    "kind": ([GOOD], {"kind": "poem"}, r"kind must be one of classification, regression, .*, text2text, got 'poem'"),
    "metric": ([GOOD], {"metric": "bleu"}, r"metric must be one of accuracy, .* got 'bleu'"),
    "metric label": ([GOOD], {"metric": "f1_positive(z)"}, r"names a label that is not in labels"),
    "metric argument": ([GOOD], {"metric": "accuracy(a)"}, r"metric must be accuracy, got 'accuracy\(a\)'"),
    "macro argument": ([GOOD], {"metric": "macro_f1(a)"}, r"metric must be macro_f1\(without LABEL\), got"),
    "surrogate": (['{"text": "\\ud800", "label": "a"}'], {}, r"train.jsonl:1: text must be valid Unicode"),
    "huge": (['{"text": "x", "label": 1e300}'], {"kind": "regression", "metric": "pearson"}, r"must be a finite number"),
    "metric without label": ([GOOD], {"metric": "f1_positive"}, r"must name its label"),
    "labels": ([GOOD], {"labels": ["a"]}, r"at least two labels"),
    "column": (
        [{"text": "x", "sentiment": "a"}],
        {"columns": {"label": "sentimnt"}},
        r"train.jsonl:1: columns.label names 'sentimnt', which is not there; the row has text, sentiment",
    ),
    "no column": ([{"sentence": "x", "label": "a"}], {}, r"classification needs text, .*; the row has sentence, label"),
    "label number": ([{"text": "x", "label": -1}], {}, r"label must be one of a, b, got -1 \(a split without labels\?\)"),
    "label too large": ([GOOD, {"text": "x", "label": 2}], {}, r"train.jsonl:2: label must be one of a, b, got 2"),
    "one class": ([GOOD, GOOD], {}, r"train must have more than one class, got 'a' for all examples"),
    "constant": (
        [{"text": "x", "label": 1.5}] * 2,
        {"kind": "regression", "metric": "mse"},
        r"train must have more than one label, got 1.5 for all examples",
    ),
    "closed set": (
        [{"text": "x", "target": "a"}],
        {"kind": "text2text", "metric": "accuracy", "labels": None},
        r"metric 'accuracy' needs labels, the closed set of answers",
    ),
    "open answer": (
        [{"text": "x", "target": "c"}],
        {"kind": "text2text"},
        r"train.jsonl:1: target must be one of a, b, got 'c'",
    ),
    "number": (
        [{"text": "x", "target": "1.5"}, {"text": "x", "target": "high"}],
        {"kind": "text2text", "metric": "pearson", "labels": None},
        r"metric pearson needs numbers as targets, got 'high'",
    ),
    "mark": ([GOOD], {"kind": "text2text", "metric": "exact_match(####)"}, r"must be exact_match\(number after MARK\)"),
    "same labels": ([GOOD], {"labels": ["a", "a"]}, r"labels must differ"),
    "source": ([GOOD], {"splits": {"test": "validation"}}, r"files must have validation, which splits: uses, got"),
    "format": ([GOOD], {"format": "xml"}, r"format must be one of jsonl, json, csv, tsv, parquet, conllu, brackets, got 'xml'"),
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
        ("task: []\ntasks: []\ndefault: {}", "unknown key 'task'; did you mean tasks"),
        ("defaults: 3\ntasks: []", "defaults must be a mapping, got 3"),
        ("root: 3\ntasks: []", "root must be text, got 3"),
        ("tasks: [{name: x, kind: tagging, files: {}, planted: {}}]", "got files and planted"),
        ("tasks: [{name: x, kind: tagging, files: {}, columns: {text: a}}]", r"columns of tagging \(tokens, tags,"),
        ("tasks: [{name: x, kind: tagging, files: {}, columns: {tags: 3}}]", "text under columns.tags, got 3"),
        ("tasks: [{name: x, kind: choice, files: {}, columns: {text: '{a'}}]", r"\(x\) .*'}'"),
        ("tasks: [{name: x, kind: choice, files: {}, columns: {text: '{a!r}'}}]", "placeholders must be {name}"),
        ("tasks: [{name: x, kind: tagging, files: {}, splits: {dev: {from: train}}}]", "splits.dev must have from and a share"),
        ("tasks: [{name: x, kind: tagging, hub: {path: a/b, revision: main}}]", "hub.revision as a commit, .* got 'main'"),
        ("tasks: [{name: x, kind: tagging, hub: {name: a/b}}]", r"must have hub: {path, config, revision}"),
        (
            "tasks: [{name: x, kind: tagging, files: {}, prompt: '{text}'}]",
            "prompt applies to classification, regression, choice",
        ),
        ("tasks: [{name: x, kind: regression, files: {}, prompt: '{body}'}]", r"by {name}, {text}, {text_pair}, got {body}"),
        ("tasks: [{name: x, kind: regression, files: {}, answers: {a: b}}]", "answers must be {decimals: 0 to 6}"),
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


def test_labels_are_taken_from_the_data_train_first(tmp_path: Path) -> None:
    rows = {"train": ["b", "a", "b"], "dev": ["d"], "test": ["c", "a"]}
    spec = write_task(tmp_path, [], labels=None)
    for split, labels in rows.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": v, "label": v}) + "\n" for v in labels))
    checked = check(spec)
    assert spec.labels == () and checked.spec.labels == ("a", "b", "d", "c")
    assert checked.spec.digest() == spec.digest() and checked.spec.complete() == checked.spec
    assert "2 of 4 labels are not in train: d, c" in checked.warnings


def test_numbers_without_names_are_labels_in_their_order(tmp_path: Path) -> None:
    rows = [{"text": str(i), "label": i} for i in (10, 9, 2)]
    assert check(write_task(tmp_path, rows, labels=None)).spec.labels == ("2", "9", "10")


def test_what_is_doubtful_is_counted(tmp_path: Path) -> None:
    texts = {"train": ["one", "two", "three", "two"], "dev": ["four", "one"], "test": ["one", "one", "four", "five", " "]}
    spec = write_task(tmp_path, [], labels=["a", "b", "c"])
    for split, values in texts.items():
        rows = [{"text": text, "label": "ab"[i % 2] if split == "train" else "a"} for i, text in enumerate(values)]
        rows[0]["label"] = "b"
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check(spec).warnings == (
        "1 of 3 labels are not in train: c",
        "2 of 5 test examples also stand in train",
        "1 of 2 dev examples also stand in train",
        "3 of 5 test examples also stand in dev",
        "1 of 11 examples have an empty text",
    )
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": "x", "label": v}) + "\n" for v in "abb"))
    assert "3 of 3 train examples have the input of another one that is labelled differently" in check(spec).warnings


def test_a_carved_split_leaves_the_rest_of_its_source(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(200)]
    spec = write_task(tmp_path, rows, splits={"dev": {"from": "train", "share": 0.2}})
    train, dev = ({row["text"] for row in spec.read(split)} for split in ("train", "dev"))
    assert not train & dev and len(train | dev) == 200 and 20 < len(dev) < 60
    assert check(spec).sizes == {"train": len(train), "dev": len(dev), "test": 200}


def test_defaults_and_root_hold_for_every_entry(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    write_task(folder, [{"sentence": "x", "label": 0}, {"sentence": "y", "label": 1}])
    files = {split: f"deep/{split}.jsonl" for split in tasks.SPLITS}
    defaults = {"kind": "classification", "labels": ["a", "b"], "columns": {"text": "sentence"}, "files": files}
    entries = [{"name": "one"}, {"name": "two", "labels": ["c", "d"], "columns": {"text_pair": "sentence"}}]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"root": "data", "defaults": defaults, "tasks": entries}))
    found = load_catalogues(["c.yaml"], tmp_path)
    assert next(found["one"].read("train")) == {"text": "x", "label": "a"}
    assert next(found["two"].read("train")) == {"text": "x", "text_pair": "x", "label": "c"}


CHANGES: dict[str, dict[str, Any]] = {
    "kind": {"kind": "tagging"},
    "metric": {"metric": "mcc"},
    "labels": {"labels": ["b", "a"]},
    "columns": {"columns": {"text": "text"}},
    "splits": {"splits": {"dev": {"from": "train", "share": 0.1}}},
    "format": {"format": "jsonl"},
    "low_resource": {"low_resource": 1},
}


def test_the_digest_knows_what_changes_numbers_and_nothing_else(tmp_path: Path) -> None:
    plain = write_task(tmp_path, [GOOD])
    notes = {"licence": "CC0", "source": "here", "category": "c/d", "prompt": "{text}?", "answers": {"a": "yes"}}
    assert write_task(tmp_path, [GOOD], **notes).digest() == plain.digest()
    digests = {name: write_task(tmp_path, [GOOD], **entry).digest() for name, entry in CHANGES.items()}
    assert len({plain.digest(), *digests.values()}) == len(CHANGES) + 1, digests


def test_the_digest_of_a_hub_task_follows_its_commit(tmp_path: Path) -> None:
    def digest(**hub: Any) -> str:
        entry = {
            "name": "t",
            "kind": "classification",
            "labels": ["a", "b"],
            "hub": {"path": "a/b", "revision": "0" * 40, **hub},
        }
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"tasks": [entry]}))
        return load_catalogues(["c.yaml"], tmp_path)["t"].digest()

    assert len({digest(), digest(revision="1" * 40), digest(path="a/c"), digest(config="d")}) == 4


def test_the_planted_tasks_are_checked_without_being_generated_whole() -> None:
    spec = next(iter(load_catalogues(["sweeps/tasks/planted.yaml"], REPOSITORY).values()))
    checked = check(spec)
    assert checked.sizes == {"train": 2000, "dev": 200, "test": 600} and checked.words.total() == 150


@pytest.fixture(scope="module")
def shared_catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared manifest with the two tasks that it calls tagging, but that are more."""
    if not SHARED.is_file():
        pytest.skip("the shared real tasks are not beside this checkout")
    content = yaml.safe_load(SHARED.read_text())
    for entry in content["tasks"]:
        entry |= {"ewt_con": {"kind": "constituency"}, "ewt_srl": {"kind": "srl", "metric": "srl_f1"}}.get(entry["name"], {})
        if entry["name"] in ("ewt_ner", "wnut17"):
            entry["kind"] = "spans"
    content["root"] = str(SHARED.parent)
    path = tmp_path_factory.mktemp("shared") / "manifest.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared real tasks are not beside this checkout")
def test_the_shared_manifest_is_read_as_it_is() -> None:
    found = load_catalogues([SHARED], Path())
    with pytest.raises(ConfigError, match=r"metric must be one of accuracy, span_f1 for tagging, got 'bracket_f1'"):
        check(found["ewt_con"])
    with pytest.raises(ConfigError, match=r"train.jsonl:1: column predicate_index belongs to kind srl.*say kind: srl"):
        check(found["ewt_srl"])
    assert found["ewt_dep"].kind == "dependency" and check(found["ewt_ner"]).sizes["dev"] == 765


@pytest.mark.slow
def test_every_shared_task_is_read_whole(shared_catalogue: Path) -> None:
    found = load_catalogues([shared_catalogue], Path())
    manifest = {entry["name"]: entry for entry in yaml.safe_load(SHARED.read_text())["tasks"]}
    assert len(found) == 67 and {spec.kind for spec in found.values()} == set(tasks.KINDS) - {"choice"}
    for name, spec in found.items():
        checked = check(spec)
        listed = manifest[name].get("labels")
        assert spec.kind == "srl" or checked.sizes == manifest[name]["counts"], name
        assert spec.kind in ("srl", "spans", "constituency") or list(checked.spec.labels) == (listed or []), name
        assert not [w for w in checked.warnings if "stand in" in w], (name, checked.warnings)
    rows = {split: list(found["ewt_srl"].read(split)) for split in tasks.SPLITS}
    frames = {split: sum(len(row["frames"]) for row in of_split) for split, of_split in rows.items()}
    assert frames == manifest["ewt_srl"]["counts"]  # a row per predicate has become a frame each


def test_where_keeps_the_rows_that_it_names(tmp_path: Path) -> None:
    """Compared as text, so that it reads in CSV as it reads in JSON; nothing left is a mistake."""
    rows = ["text,label,stars,spam", "a,x,1,false", "b,y,1,false", "c,x,2,false", "d,y,3,true"]
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.csv").write_text("\n".join(rows))
    files = "{train: train.csv, dev: dev.csv, test: test.csv}"

    def texts(where: str) -> list[str]:
        entry = f"{{name: t, kind: classification, files: {files}, where: {where}}}"
        (tmp_path / "c.yaml").write_text(f"tasks: [{entry}]")
        return [row["text"] for row in load_catalogues(["c.yaml"], tmp_path)["t"].read("train")]

    assert texts("{stars: 1}") == ["a", "b"] and texts("{stars: [1, 3]}") == ["a", "b", "d"]
    assert texts("{stars: [1, 3], spam: false}") == ["a", "b"]
    with pytest.raises(ConfigError, match=r"task t: train: where must leave some rows, \{'stars': 9\} leaves none of 4"):
        texts("{stars: 9}")
    with pytest.raises(ConfigError, match="where names 'year', which is not there; the row has text, label, stars, spam"):
        texts("{year: 9}")


def test_a_regular_expression_takes_a_column_apart(tmp_path: Path) -> None:
    row = {"input": "What is it? options: (A) a cat (B) a dog", "target": "a dog"}
    other = {"input": "And this? options: (A) red (B) blue (C) green", "target": "red"}
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n")
    (tmp_path / "c.yaml").write_text(r"""
tasks:
- name: t
  kind: choice
  files: {train: train.jsonl, dev: dev.jsonl, test: test.jsonl}
  columns:
    text: {column: input, regex: '^(.*?) options: \(A\) '}
    options: {column: input, regex: '\([A-H]\) (.*?)(?= \([A-H]\) |$)'}
    keys: {column: input, regex: '\([A-H]\) (.*?)(?= \([A-H]\) |$)'}
    label: target
""")
    spec = load_catalogues(["c.yaml"], tmp_path)["t"]
    assert list(spec.read("train")) == [
        {"text": "What is it?", "options": ["a cat", "a dog"], "label": 1},
        {"text": "And this?", "options": ["red", "blue", "green"], "label": 0},
    ]
    text = (tmp_path / "c.yaml").read_text()
    for broken, law in (("'('", "regular expression under columns.text.regex"), ("'(x)(y)'", "at most one group")):
        (tmp_path / "c.yaml").write_text(text.replace(r"'^(.*?) options: \(A\) '", broken))
        with pytest.raises(ConfigError, match=law):
            load_catalogues(["c.yaml"], tmp_path)


def test_keys_that_mean_nothing_are_told(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    files = "{train: train.jsonl, dev: dev.jsonl, test: test.jsonl}"
    (tmp_path / "c.yaml").write_text(f"tasks: [{{name: t, kind: classification, files: {files}, filter: 3, licence: MIT}}]")
    warnings = check(load_catalogues(["c.yaml"], tmp_path)["t"]).warnings
    assert "keys of its entry that mean nothing: filter" in warnings
    (tmp_path / "c.yaml").write_text(f"tasks: [{{name: t, kind: classification, files: {files}, file: {files}}}]")
    with pytest.raises(ConfigError, match="unknown key 'file'; did you mean files"):
        load_catalogues(["c.yaml"], tmp_path)
