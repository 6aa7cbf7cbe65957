"""File formats and Hub data sets give the rows that were written, and say where they are broken."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_modules.building import ConfigError
from lightning_modules.data import hub
from lightning_modules.data.sources import fill, pick, placeholders, source_rows
from lightning_modules.data.tasks import SPLITS, TaskSpec, check

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [
    {"text": 'a "quoted" one, with a comma', "label": "x"},
    {"text": "naïve 漢字 \u2028 and \x85 inside", "label": "y"},
    {"text": "  spaces  ", "label": "x"},
]


def task(path: Path, kind: str = "classification", **settings: Any) -> TaskSpec:
    """A task with all splits in one file."""
    settings = {"files": {"train": path}, **settings}
    return TaskSpec(name="t", kind=kind, metric="accuracy", catalogue="c.yaml", **settings)


def read(path: Path, **settings: Any) -> list[dict[str, Any]]:
    return [row for row, _ in source_rows(task(path, **settings), "train")]


def write_rows(path: Path, form: str) -> None:
    if form == "jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    elif form == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif form == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif form == "csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        lines = ["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in ROWS)]
        path.write_text("\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_what_was_written_is_read(form: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"a.{form}", form)
    assert read(tmp_path / f"a.{form}") == ROWS
    (tmp_path / f"a.{form}").rename(tmp_path / "a.data")
    assert read(tmp_path / "a.data", format=form) == ROWS
    with pytest.raises(ConfigError, match=r"c.yaml: task t: format must be one of jsonl, .*, got 'a.data'"):
        read(tmp_path / "a.data")


def test_a_long_field_with_line_ends_is_one_field(tmp_path: Path) -> None:
    text = "line\nnext, " * 30_000
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], [text], ["b"]])
    assert read(tmp_path / "a.csv") == [{"text": text}, {"text": "b"}]


BROKEN = {
    "not UTF-8": ("a.jsonl", b'{"a": 1}\n\xff\xfe', r"a.jsonl: must be UTF-8"),
    "torn JSONL": ("a.jsonl", b'{"a": 1}\n\n{"a', r"a.jsonl:3: must be one JSON object per line, got '{\"a'"),
    "torn JSON": ("a.json", b'[{"a": 1}', r"a.json: must be a JSON list of objects \("),
    "no list": ("a.json", b'{"a": 1}', r"a.json: must be a JSON list of objects, got {\"a\": 1}"),
    "no object": ("a.json", b'[{"a": 1}, 2]', r"a.json\[1\]: must be a JSON object, got 2"),
    "fields": ("a.csv", b'a,b\n1,2\n"3\n4",5\n6\n', r"a.csv:5: must have 2 fields as the header has \(a, b\), got 1"),
    "quote": ("a.csv", b'a,b\n1,"2\n', r"a.csv:2: must be CSV: unexpected end of data"),
    "header": ("a.csv", b"a,a\n1,2\n", r"a.csv:1: must have a header of different names"),
    "tabs": ("a.tsv", b"a\tb\n1\t2\t3\n", r"a.tsv:2: must have 2 fields .*, got 3"),
    "Latin": ("a.csv", b"a,b\n1,\xe9\n", r"a.csv: must be UTF-8"),
    "no Parquet": ("a.parquet", b"PAR1 and nothing else", r"a.parquet: must be Parquet"),
    "columns": ("a.conllu", b"# x\n1\ta\n", r"a.conllu:2: CoNLL-U has 10 tab-separated columns, got 2"),
    "number": ("a.conllu", b"2" + b"\t_" * 9, r"a.conllu:1: word must have the number 1, got '2'"),
    "unclosed": ("a.mrg", b"(S (X a))\n\n(S (X a)", r"a.mrg:3: tree must close its brackets, 1 are open"),
    "stray": ("a.mrg", b"(S (X a)))", r"a.mrg:1: must be bracketed trees: expected '\(', got '\)'"),
    "two words": ("a.mrg", b"(S\n(X a b))", r"a.mrg:2: must be bracketed trees: expected \(TAG word\)"),
    "no label": ("a.mrg", b"(S ((X a)))", r"a.mrg:1: .* only the outermost bracket may have no label"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_with_its_line(name: str, tmp_path: Path) -> None:
    file, content, message = BROKEN[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / file)


# -- columns -------------------------------------------------------------------------------------------------------------

SOURCE = {
    "premise": "It rained.", "question": "effect", "choice1": "wet", "choice2": "dry", "n": 3, "none": None,
    "answers": {"text": ["a", "b"], "start": [1, 2]}, "turns": [{"who": "A"}, {"who": "B"}], "dotted.name": "d",
}  # fmt: skip


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("premise", "It rained."),
        ("answers.text", ["a", "b"]),
        ("answers.text.1", "b"),
        ("turns.who", ["A", "B"]),
        ("dotted.name", "d"),
        ("{premise} What was the {question}? ({answers.start.0}/{n}) {{}}", "It rained. What was the effect? (1/3) {}"),
        (["choice1", "{choice2}!"], ["wet", "dry!"]),
    ],
)
def test_a_field_is_found_by_column_path_or_template(column: Any, value: Any) -> None:
    assert pick(SOURCE, {"text": column}, ("text",), "f:1") == {"text": value}


@pytest.mark.parametrize("column", ["premis", "answers.texts", "answers.text.7", "premise.x", "{premis}", ["n", "choice3"]])
def test_a_column_that_is_not_there_is_told_with_those_that_are(column: Any) -> None:
    with pytest.raises(ConfigError, match=r"f:1: columns.text names '.*', which is not there; the row has premise, question"):
        pick(SOURCE, {"text": column}, ("text",), "f:1")


def test_a_template_takes_text_and_numbers_only() -> None:
    with pytest.raises(ConfigError, match=r"columns.text: {answers} must be text or a number, got {"):
        pick(SOURCE, {"text": "{answers}"}, ("text",), "f:1")


def test_columns_that_are_not_named_keep_their_name_and_null_is_none() -> None:
    row = {"text": "a", "label": 0, "other": 1, "text_pair": None}
    assert pick(row, {"text_pair": "other"}, ("text", "text_pair", "label"), "f:1") == {"text": "a", "text_pair": 1, "label": 0}
    assert pick(SOURCE, {"text": "none"}, ("text",), "f:1") == {}


def test_templates() -> None:
    assert placeholders("{a} {{b}} {c.d}") == ["a", "c.d"]
    assert fill("{a} {{b}}", {"a": "{x}"}) == "{x} {b}"
    for wrong in ("{", "{}", "{a:3}", "{a!r}"):
        with pytest.raises(ValueError):
            placeholders(wrong)


# -- CoNLL-U and trees ---------------------------------------------------------------------------------------------------

CONLLU = """# sent_id = 1
1-2\tdámelo\t_\t_\t_\t_\t_\t_\t_\t_
1\tda\tdar\tVERB\tV\tMood=Imp\t0\troot\t0:root\t_
2\tme\tyo\tPRON\tP\t_\t1\tiobj\t1:iobj\tSpaceAfter=No
2.1\tlo\t_\tPRON\t_\t_\t_\t_\t1:obj\t_

# sent_id = 2
1\tSí\tsí\tINTJ\tI\t_\t0\troot\t_\t_"""


def test_conllu_gives_words_without_ranges_and_empty_nodes(tmp_path: Path) -> None:
    path = tmp_path / "a.conllu"
    path.write_text(CONLLU, encoding="utf-8")
    found = list(source_rows(task(path, "dependency"), "train"))
    assert [place for _, place in found] == [f"{path}:3", f"{path}:8"]
    first = found[0][0]
    assert (first["tokens"], first["heads"], first["deprels"]) == (["da", "me"], [0, 1], ["root", "iobj"])
    assert (first["upos"], first["xpos"], first["lemma"]) == (["VERB", "PRON"], ["V", "P"], ["dar", "yo"])
    assert first["misc"] == ["_", "SpaceAfter=No"]
    assert list(task(path, "dependency").read("train"))[1] == {"tokens": ["Sí"], "heads": [0], "deprels": ["root"]}
    tagged = task(path, "tagging", columns={"tags": "upos"})
    assert [row["tags"] for row in tagged.read("train")] == [["VERB", "PRON"], ["INTJ"]]


TREE = r"""( (S
    (NP-SBJ-1 (-NONE- *PRO*))
    (SBAR (S (VP (VB Go)
      (PP-LOC=2 (IN to) (NP (NP (NNP Rome)) (-LRB- -LRB-) (CD 1\/2) (-RRB- -RRB-))))))
    (. .)) )
(ROOT (NP (NN tea)))(TOP (INTJ yes))"""


def test_trees_give_words_and_spans_outer_first(tmp_path: Path) -> None:
    path = tmp_path / "a.mrg"
    path.write_text(TREE)
    first, second, third = read(path)
    assert first["tokens"] == ["Go", "to", "Rome", "(", "1/2", ")", "."]
    assert first["pos"] == ["VB", "IN", "NNP", "-LRB-", "CD", "-RRB-", "."]
    assert first["spans"] == [
        [0, 7, "S"], [0, 6, "SBAR"], [0, 6, "S"], [0, 6, "VP"], [1, 6, "PP"], [2, 6, "NP"], [2, 3, "NP"],
    ]  # fmt: skip
    assert (second["tokens"], second["spans"]) == (["tea"], [[0, 1, "NP"]])
    assert (third["tokens"], third["spans"]) == (["yes"], [])
    assert [place for _, place in source_rows(task(path), "train")] == [f"{path}:1", f"{path}:6", f"{path}:6"]


def test_trees_written_from_spans_are_read_back(tmp_path: Path) -> None:
    """The real constituents, where they are there: spans -> brackets -> spans."""
    source = Path(__file__).resolve().parents[2] / "shared" / "data" / "ewt_con" / "dev.jsonl"
    if not source.is_file():
        pytest.skip("the shared real tasks are not beside this checkout")
    rows = [json.loads(line) for line in source.read_text().splitlines()]

    def brackets(row: dict[str, Any]) -> str:
        opened, closed = [""] * len(row["tokens"]), [""] * len(row["tokens"])
        for start, end, label in row["spans"]:
            opened[start] += f"({label} "
            closed[end - 1] += ")"
        escape = {"(": "-LRB-", ")": "-RRB-"}
        words = [f"(X {''.join(escape[c] if c in escape else c for c in token)})" for token in row["tokens"]]
        return f"(ROOT {' '.join(map(''.join, zip(opened, words, closed, strict=True)))})"

    (tmp_path / "a.ptb").write_text("\n".join(map(brackets, rows)))
    assert [row["spans"] for row in read(tmp_path / "a.ptb")] == [row["spans"] for row in rows]


# -- the Hub -------------------------------------------------------------------------------------------------------------

FEATURES = datasets.Features(
    {
        "sentence": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["negative", "positive"]),
        "stars": datasets.ClassLabel(names=["1", "2"]),
        "tokens": datasets.List(datasets.Value("string")),
        "tags": datasets.List(datasets.ClassLabel(names=["O", "B-PER", "I-PER"])),
        "answers": {"text": datasets.List(datasets.Value("string"))},
        "score": datasets.Value("float32"),
        "when": datasets.Value("timestamp[s]"),
    }
)
EXAMPLES = [
    {"sentence": f"s {i}", "label": i % 2, "stars": i % 2, "tokens": ["Ann", "Lee", "left"], "tags": [1, 2, 0],
     "answers": {"text": ["a", f"b {i}"]}, "score": i / 2, "when": i}
    for i in range(6)
]  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A data set folder as the Hub would serve it, read by the real ``load_dataset``; the calls it got."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        datasets.Dataset.from_list(EXAMPLES, features=FEATURES).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    calls: list[tuple[Any, ...]] = []
    load = datasets.load_dataset

    def from_folder(path: str, config: str | None, *, revision: str, split: str) -> Any:
        calls.append((path, config, revision, split))
        return load(str(folder), split=split, cache_dir=str(tmp_path / "arrow"))

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    monkeypatch.setenv("CROSSTALK_CACHE", str(tmp_path / "cache"))
    return calls


HUB = {"path": "someone/sentences", "config": "plain", "revision": COMMIT}


def hub_task(kind: str = "classification", **settings: Any) -> TaskSpec:
    return TaskSpec(name="h", kind=kind, metric="accuracy", catalogue="c.yaml", hub=HUB, **settings)


def test_class_labels_of_a_real_data_set_get_their_names(repository: list[tuple[Any, ...]]) -> None:
    spec = hub_task(columns={"text": "sentence"})
    assert spec.complete().labels == ("negative", "positive")
    assert [row["label"] for row in spec.read("train")] == ["negative", "positive"] * 3
    renamed = hub_task(columns={"text": "sentence"}, labels=("bad", "good"))
    assert next(renamed.read("train")) == {"text": "s 0", "label": "bad"}
    assert repository == [("someone/sentences", "plain", COMMIT, "train")]


def test_classes_that_are_called_by_numbers_keep_their_names(repository: list[tuple[Any, ...]]) -> None:
    spec = hub_task(columns={"text": "sentence", "label": "stars"})
    assert [row["label"] for row in spec.read("train")][:2] == ["1", "2"] and spec.complete().labels == ("1", "2")
    listed = hub_task(columns={"text": "sentence", "label": "stars"}, labels=("1", "2"))
    assert [row["label"] for row in listed.read("train")][:2] == ["1", "2"]


def test_other_features_of_a_real_data_set(repository: list[tuple[Any, ...]]) -> None:
    spans = hub_task("spans")
    assert spans.complete().labels == ("PER",)
    assert next(spans.read("train")) == {"tokens": ["Ann", "Lee", "left"], "spans": [[0, 2, "PER"]]}
    tagging = hub_task("tagging")
    assert next(tagging.read("train"))["tags"] == ["B-PER", "I-PER", "O"]
    text = hub_task("text2text", columns={"text": "{when}", "target": "answers.text.1", "targets": "answers.text"})
    assert next(text.read("train")) == {"text": "1970-01-01 00:00:00", "target": "b 0", "targets": ["a", "b 0"]}
    score = hub_task("regression", columns={"text": "sentence", "label": "score"})
    assert [row["label"] for row in score.read("train")][:2] == [0.0, 0.5]


def test_a_hub_task_is_downloaded_once(repository: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = hub_task(columns={"text": "sentence"}, labels=("a", "b"))
    rows = list(spec.read("test"))
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it now fails
    assert list(spec.read("test")) == rows and len(repository) == 1
    with pytest.raises(ImportError):
        list(spec.read("train"))


def test_the_cache_serves_another_process_without_datasets(repository: list[tuple[Any, ...]], tmp_path: Path) -> None:
    spec = hub_task(columns={"text": "sentence"}, labels=("a", "b"))
    rows = list(spec.read("test"))
    code = (
        "import json, sys\nfrom lightning_modules.data.tasks import TaskSpec\n"
        f"spec = TaskSpec(name='h', kind='classification', metric='accuracy', labels=('a', 'b'), hub={HUB!r}, "
        "columns={'text': 'sentence'})\n"
        "print(json.dumps([list(spec.read('test')), 'datasets' in sys.modules, 'pyarrow' in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert json.loads(done.stdout) == [rows, False, False]


def test_a_source_split_of_a_hub_task_is_found_by_the_recipe(repository: list[tuple[Any, ...]]) -> None:
    from lightning_modules.data.splits import parts

    recipe = parts({"dev": "validation"}, SPLITS)
    spec = hub_task(columns={"text": "sentence"}, labels=("a", "b"), recipe=recipe)
    assert check(spec).sizes == dict.fromkeys(SPLITS, 6)
    assert [split for *_, split in repository] == ["train", "validation", "test"]


def test_a_hub_that_cannot_be_read_is_told_in_one_line(repository: list[tuple[Any, ...]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read someone/sentences/plain@01234567 dev .*Unknown split") as caught:
        list(hub_task(columns={"text": "sentence"}, labels=("a", "b")).read("dev"))  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith("c.yaml: task h: ") and "the first read needs the network" in message and "\n" not in message
    assert not list((tmp_path / "cache").rglob("rows.jsonl"))


def test_a_column_that_the_data_set_lacks_is_told(repository: list[tuple[Any, ...]]) -> None:
    law = r"someone/sentences/plain@01234567 train:1: columns.text names 'text_a', .* the row has sentence, label, stars"
    with pytest.raises(ConfigError, match=law):
        list(hub_task(columns={"text": "text_a"}, labels=("a", "b")).read("train"))


def test_without_a_network_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real function, offline."""
    monkeypatch.setenv("CROSSTALK_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot read .* from the Hub \(\w+: .*Check path, config, revision"):
        list(hub_task().read("train"))


def test_a_local_folder_does_not_pass_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSTALK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "sentences").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a local folder here"):
        list(hub_task().read("train"))


def test_what_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"blob": datasets.Value("binary")})
    monkeypatch.setenv("CROSSTALK_CACHE", str(tmp_path))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"blob": b"x"}], features=features)
    )
    with pytest.raises(ConfigError, match=r"train: example 0 is not made of text, numbers and lists: got bytes"):
        list(hub_task().read("train"))
    assert hub.KEYS == ("path", "config", "revision") and not [p for p in tmp_path.rglob("*") if p.is_file()]
