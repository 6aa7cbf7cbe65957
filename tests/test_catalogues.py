"""The shipped catalogues: they load, say what a catalogue must say, and read rows as their data sets document them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_modules.building import ConfigError
from lightning_modules.data import forms, hub, posing
from lightning_modules.data.sources import placeholders
from lightning_modules.data.tasks import KINDS, METRICS, SPLITS, TaskSpec, check, load_catalogues, metric_parts

FOLDER = Path(__file__).resolve().parents[1] / "sweeps" / "tasks"
UNPINNED = "gym_unpinned.yaml"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
USABLE = [name for name in FILES if name != UNPINNED]
GYM_GROUPS = {
    *(f"classification/{g}" for g in ("emotion", "fact_checking", "hate_speech_detection", "nli", "other", "paraphrase")),
    *("classification/sentiment_analysis", "classification/topic"),
    *(f"conditional_generation/{g}" for g in ("dialogue", "other", "summarization")),
    *(f"other/{g}" for g in ("entity_linking", "generate_explanation", "linguistic_phenomenon", "none", "regression")),
    *("other/slot_filling", "qa/binary", "qa/closed_book_qa", "qa/long_form_qa", "qa/machine_reading_comprehension"),
    "qa/multiple_choice_qa",
}


def entries(name: str) -> list[dict[str, Any]]:
    content = yaml.safe_load((FOLDER / name).read_text())
    defaults = content.get("defaults", {}) | ({"licence": "none (generated)"} if "planted" in content else {})
    return [defaults | entry for entry in content["tasks"]]


@pytest.fixture(scope="module")
def specs() -> dict[str, TaskSpec]:
    return load_catalogues(USABLE, FOLDER)


def test_all_catalogues_load_together(specs: dict[str, TaskSpec]) -> None:
    """So their names are unique, and no entry is malformed."""
    assert len(specs) == sum(len(entries(name)) for name in USABLE)
    assert {"glue/sst2", "superglue/copa", "tweet_eval/irony", "gym/anli", "ud/german-gsd/dep", "ewt_srl"} <= set(specs)


@pytest.mark.parametrize("name", FILES)
def test_an_entry_says_what_it_is(name: str) -> None:
    for entry in entries(name):
        task = entry["name"]
        assert {"kind", "category", "metric", "licence"} <= set(entry), task
        assert re.fullmatch(r"[a-z_]+/[a-z_0-9-]+", entry["category"]), task
        assert entry["kind"] in KINDS, task
        metric, argument = metric_parts(entry["metric"])
        assert metric in METRICS[entry["kind"]], task
        assert argument.removeprefix("without ") in ["", *map(str, entry.get("labels", []))], task
        assert set(entry.get("columns", {})) <= set(forms.FIELDS[entry["kind"]]), task
        if "prompt" in entry:
            assert set(placeholders(entry["prompt"])) <= set(posing.PLACEHOLDERS[entry["kind"]]), task
        if "{text_pair}" in entry.get("prompt", ""):
            assert "text_pair" in entry["columns"], task
        if "hub" in entry:
            revision = entry["hub"]["revision"]
            assert revision is None or re.fullmatch(r"[0-9a-f]{40}", revision), task


def test_lines_fit_and_headers_are_honest() -> None:
    for name in FILES:
        text = (FOLDER / name).read_text()
        assert max(map(len, text.splitlines())) <= 128, name
        header = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
        assert name in ("planted.yaml", "planted_groups.yaml", "ewt.yaml", "local_choice.yaml") or "Written from" in header, (
            name
        )


def test_one_data_set_is_pinned_to_one_commit() -> None:
    pins: dict[str, set[str | None]] = {}
    for name in FILES:
        for entry in entries(name):
            if "hub" in entry:
                pins.setdefault(entry["hub"]["path"], set()).add(entry["hub"]["revision"])
    assert {path: found for path, found in pins.items() if len(found) > 1} == {}
    assert "revision: null" not in "".join((FOLDER / name).read_text() for name in USABLE)


def test_the_gym_has_every_group_of_the_ontology(specs: dict[str, TaskSpec]) -> None:
    gym = [spec for name, spec in specs.items() if name.startswith("gym/")]
    assert {spec.category for spec in gym} == GYM_GROUPS
    assert {entry["category"] for entry in entries(UNPINNED)} <= GYM_GROUPS
    header = (FOLDER / "gym.yaml").read_text()
    missing = 160 - len(gym) - len(entries(UNPINNED))
    assert f"{len(gym)} of its 160 tasks" in header and f"{len(entries(UNPINNED))} more tasks" in header
    assert f"{missing} are missing" in header


def test_what_is_not_pinned_lacks_nothing_but_the_pin(tmp_path: Path) -> None:
    text = (FOLDER / UNPINNED).read_text()
    count = len(entries(UNPINNED))
    assert text.count("revision: null}  # not pinned") == count and f"# {count} more tasks" in text
    for spec in load_catalogues([UNPINNED], FOLDER).values():
        with pytest.raises(ConfigError, match=rf"task {spec.name}: hub.revision must be pinned to a commit of"):
            check(spec)
    (tmp_path / "pinned.yaml").write_text(text.replace("revision: null", f"revision: {'ab' * 20}"))
    pinned = load_catalogues(["pinned.yaml"], tmp_path)
    assert len(pinned) == count and not set(pinned) & set(load_catalogues(["gym.yaml"], FOLDER))


@pytest.mark.parametrize("name", ["universal_dependencies.yaml", "natural_instructions.yaml"])
def test_data_that_are_not_there_are_named(name: str) -> None:
    spec = next(iter(load_catalogues([name], FOLDER).values()))
    if any(path.exists() for path in spec.files.values()):
        pytest.skip("the data set is on this machine")
    with pytest.raises(ConfigError, match=r"no such file: .*(conllu|jsonl)"):
        check(spec)


def test_the_development_folder_reads() -> None:
    for spec in load_catalogues(["ewt.yaml"], FOLDER).values():
        if not next(iter(spec.files.values())).is_file():
            pytest.skip(f"no {next(iter(spec.files.values())).parent}")
        for split in SPLITS:
            row = next(spec.read(split))
            assert row["tokens"] and set(row) <= set(forms.FIELDS[spec.kind])


def names(*classes: str) -> list[str]:
    """Marks a column whose numbers are classes with these names."""
    return list(classes)


SQUAD = {"question": "q", "context": "c", "answers": {"text": ["one", "two"], "answer_start": [0, 4]}}
KEYED = {"question": "q", "choices": {"text": ["cat", "dog"], "label": ["1", "2"]}, "answerKey": "2"}
DOCUMENTED: dict[str, tuple[dict[str, Any], dict[str, list[str]], dict[str, Any]]] = {
    "glue/mnli": (
        {"premise": "p", "hypothesis": "h", "label": 2, "idx": 0},
        {"label": names("entailment", "neutral", "contradiction")},
        {"text": "p", "text_pair": "h", "label": "contradiction"},
    ),
    "glue/stsb": (
        {"sentence1": "a", "sentence2": "b", "label": 3.8, "idx": 0},
        {},
        {"text": "a", "text_pair": "b", "label": 3.8},
    ),
    "superglue/copa": (
        {"premise": "It rained.", "choice1": "x", "choice2": "y", "question": "cause", "label": 1, "idx": 0},
        {"label": names("choice1", "choice2")},
        {"text": "It rained. What was the cause?", "options": ["x", "y"], "label": 1},
    ),
    "superglue/wsc": (
        {"text": "Ann saw her.", "span1_index": 0, "span2_index": 2, "span1_text": "Ann", "span2_text": "her", "label": 0},
        {"label": names("False", "True")},
        {"text": "Ann saw her.", "text_pair": "her refers to Ann", "label": "False"},
    ),
    "superglue/record": (
        {
            "passage": "p",
            "query": "@placeholder won",
            "entities": ["A", "B"],
            "answers": ["A"],
            "idx": {"passage": 0, "query": 0},
        },
        {},
        {"text": "record query: @placeholder won passage: p", "target": "A", "targets": ["A"]},
    ),
    "tweet_eval/stance_abortion": (
        {"text": "t", "label": 1},
        {"label": names("none", "against", "favor")},
        {"text": "t", "label": "against"},
    ),
    "gym/ai2_arc": ({"id": "1", **KEYED}, {}, {"text": "q", "options": ["cat", "dog"], "label": 1}),
    "gym/wino_grande": (
        {"sentence": "s _", "option1": "x", "option2": "y", "answer": "1"},
        {},
        {"text": "s _", "options": ["x", "y"], "label": 0},
    ),
    "gym/swag": (
        {"startphrase": "s", **{f"ending{i}": str(i) for i in range(4)}, "label": 3},
        {"label": names("0", "1", "2", "3")},
        {"text": "s", "options": ["0", "1", "2", "3"], "label": 3},
    ),
    "gym/blimp-ellipsis_n_bar_1": (
        {
            "sentence_good": "g",
            "sentence_bad": "b",
            "field": "syntax",
            "linguistics_term": "ellipsis",
            "UID": "u",
            "pair_id": 0,
        },
        {},
        {"text": "acceptable sentence (ellipsis)", "options": ["g", "b"], "label": 0},
    ),
    "gym/squad-with_context": (
        SQUAD,
        {},
        {"text": "question: q context: c", "target": "one", "targets": ["one", "two"]},
    ),
    "gym/boolq": ({"question": "q", "passage": "p", "answer": True}, {}, {"text": "q", "text_pair": "p", "label": "true"}),
    "gym/wiki_qa": (
        {"question": "q", "answer": "a", "label": 1},
        {"label": names("0", "1")},
        {"text": "q", "text_pair": "a", "label": "yes"},
    ),
    "gym/anli": (
        {"premise": "p", "hypothesis": "h", "label": 0},
        {"label": names("entailment", "neutral", "contradiction")},
        {"text": "p", "text_pair": "h", "label": "entailment"},
    ),
    "gym/climate_fever": (
        {"claim": "c", "claim_label": 3, "evidences": [{"evidence": "e"}]},
        {"claim_label": names("SUPPORTS", "REFUTES", "NOT_ENOUGH_INFO", "DISPUTED")},
        {"text": "c", "label": "DISPUTED"},
    ),
}
"""Task -> a row as its data set documents it, its class labels, and what the task must make of it."""


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_row_is_read(
    name: str, specs: dict[str, TaskSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in for the Hub that gives the documented row in every split."""
    from datasets import ClassLabel, Dataset

    row, classes, expected = DOCUMENTED[name]

    def download(*_: Any) -> Any:
        rows = Dataset.from_list([row])
        for column, names in classes.items():
            rows = rows.cast_column(column, ClassLabel(names=names))
        return rows

    monkeypatch.setenv("CROSSTALK_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_download", download)
    spec = specs[name]
    made = [example for split in SPLITS for example in spec.read(split)]
    assert made and all(example == expected for example in made)


def test_acronyms_become_spans(specs: dict[str, TaskSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    tags = ClassLabel(names=["B-long", "B-short", "I-long", "I-short", "O"])
    features = Features({"tokens": List(Value("string")), "labels": List(tags)})
    rows = Dataset.from_dict({"tokens": [["the", "red", "deer", "(", "RD", ")"]], "labels": [[4, 0, 2, 4, 1, 4]]}, features)
    monkeypatch.setenv("CROSSTALK_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_download", lambda *_: rows)
    (row,) = specs["gym/acronym_identification"].read("test")
    assert row["spans"] == [[1, 3, "long"], [4, 5, "short"]]


def test_local_rows_of_the_gym_and_of_natural_instructions(tmp_path: Path) -> None:
    kilt = {"id": "1", "input": "claim", "output": [{"answer": "REFUTES", "provenance": []}, {"answer": "REFUTES"}]}
    task = {"task_name": "t", "id": "t-1", "definition": "Do it.", "inputs": "x", "targets": "y"}
    wanted = {
        "gym/kilt_fever": ("gym.yaml", kilt, {"text": "claim", "label": "REFUTES"}),
        "gym/kilt_ay2": ("gym.yaml", kilt, {"text": "claim", "target": "REFUTES"}),
        "ni/task199_mnli_classification": (
            "natural_instructions.yaml",
            task,
            {"text": "Definition: Do it. Input: x Output:", "target": "y", "targets": ["y"]},
        ),
    }
    for name, (catalogue, row, expected) in wanted.items():
        content = yaml.safe_load((FOLDER / catalogue).read_text()) | {"root": "data"}
        (tmp_path / catalogue).write_text(yaml.safe_dump(content))
        spec = load_catalogues([catalogue], tmp_path)[name]
        for path in spec.files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row))
        assert next(example for split in SPLITS for example in spec.read(split)) == expected
