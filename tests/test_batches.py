"""Prepared data and batches: nothing lost, ranks share a step, mixed and single-task hold the same rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_modules.building import ConfigError
from lightning_modules.config import TrialConfig
from lightning_modules.data.batches import IGNORE, Part, StepBatches, collate, eval_batches
from lightning_modules.data.prepared import TaskData, cut_lines, open_tasks, prepare, prepared_folder
from lightning_modules.data.tasks import SPLITS, TaskSpec
from lightning_modules.data.tokenizer import load_tokenizer, prepare_tokenizer, train_tokenizer, wants_spaces
from lightning_modules.data.windows import _windows, tokenise

Make = Callable[..., TrialConfig]


def test_prepared_examples_decode_to_their_text(make_trial: Make, specs: dict[str, TaskSpec], prepared: Path) -> None:
    config = make_trial()
    tokenizer = load_tokenizer(prepare_tokenizer(config, specs, prepared))
    sentiment, count, pos = open_tasks(config, prepared)
    for i, row in enumerate(specs["toy/sentiment"].read("train")):
        [(tokens, types, words, keep)] = sentiment.windows("train", [i]).rows
        assert keep.all()
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == row["text"]
        assert set(types) == {0} and set(words) == {-1}
        assert sentiment.labels[sentiment.targets("train", np.array([i]))[0]] == row["label"]
    for i, row in enumerate(specs["toy/pos"].read("dev")):
        [(tokens, _, words, _)] = pos.windows("dev", [i]).rows
        for n, word in enumerate(row["tokens"]):
            assert tokenizer.decode(tokens[words == n]).strip() == word
        assert [pos.labels[t] for t in pos.targets("dev", np.array([i]))[0]] == row["tags"]
    assert count.targets("test", np.array([0, 1])) == [row["label"] for row in list(specs["toy/count"].read("test"))[:2]]


def test_tokenizer_training_is_deterministic(specs: dict[str, TaskSpec]) -> None:
    texts = [row["text"] for row in specs["toy/sentiment"].read("train")]
    one, two = (train_tokenizer(iter(texts), 320) for _ in range(2))
    assert one.get_vocab() == two.get_vocab() and one("a good day")["input_ids"] == two("a good day")["input_ids"]


def test_pairs_have_two_segments(specs: dict[str, TaskSpec]) -> None:
    tokenizer = train_tokenizer(iter(["good day", "bad road"]), 300)
    encoded = tokenizer("good day", "bad road")
    assert set(encoded["token_type_ids"]) == {0, 1} and encoded["token_type_ids"][0] == 0


def test_long_inputs_are_read_in_windows(make_trial: Make, specs: dict[str, TaskSpec], tmp_path: Path) -> None:
    """Every token of the whole input stands, once, in the kept part of a window, in order; its word number goes with it."""
    config, whole = make_trial(backbone={"max_length": 8, "window_overlap": 0.5}), make_trial()
    prepare([config], specs, tmp_path)
    prepare([whole], specs, tmp_path)
    for short, long in zip(open_tasks(config, tmp_path), open_tasks(whole, tmp_path), strict=True):
        assert short.count("cut_tokens") == long.count("cut_tokens") == long.count("windowed") == 0 < short.count("windowed")
        assert short.row_counts("train").max() > 2
        for i in range(short.size("train")):
            [row] = long.windows("train", [i]).rows
            windows = short.windows("train", [i]).rows
            assert all(len(window.tokens) <= 8 for window in windows)
            for part, special in (("tokens", 0), ("words", -1)):
                kept = [value for w in windows for value in getattr(w, part)[1:-1][w.keep[1:-1]]]
                assert kept == getattr(row, part)[1:-1].tolist(), special


def test_stitched_sequences_hold_the_kept_tokens(make_trial: Make, specs: dict[str, TaskSpec], tmp_path: Path) -> None:
    config = make_trial(backbone={"max_length": 10}, mixture={"batching": "mixed"})
    prepare([config], specs, tmp_path)
    tasks = open_tasks(config, tmp_path)
    parts = [Part(0, tasks[0], "train", np.arange(6)), Part(2, tasks[2], "train", np.array([3, 1, 8]))]
    batch = collate(parts)
    assert batch.stitch is not None and batch.starts is not None
    flat = batch.input_ids.flatten()
    examples = [(part.data, i) for part in parts for i in part.rows]
    assert len(examples) == len(batch.stitch)
    for (data, i), places, starts in zip(examples, batch.stitch, batch.starts, strict=True):
        windows = data.windows("train", [i]).rows
        assert flat[places[places >= 0]].tolist() == [t for w in windows for t in w.tokens[w.keep]]
        assert int(starts.sum()) == len(windows) and set(flat[places[starts]].tolist()) == {windows[0].tokens[0]}
    assert [rows.sequences for rows in batch.tasks] == [slice(0, 6), slice(6, 9)]
    assert batch.tasks[0].stop == batch.tasks[1].start == len(batch.input_ids) - (batch.tasks[1].stop - batch.tasks[1].start)


def test_tokens_beyond_the_last_window_are_counted(make_trial: Make, specs: dict[str, TaskSpec], tmp_path: Path) -> None:
    whole, cut = make_trial(), make_trial(backbone={"max_length": 8, "max_windows": 1})
    prepare([whole], specs, tmp_path)
    prepare([cut], specs, tmp_path)
    for short, long in zip(open_tasks(cut, tmp_path), open_tasks(whole, tmp_path), strict=True):
        lost = sum(int(long.lengths(split).sum() - short.lengths(split).sum()) for split in ("train", "dev", "test"))
        assert short.count("cut_tokens") == lost > 0 and short.count("windowed") == 0
    assert cut_lines(whole, tmp_path) == []
    lines = cut_lines(cut, tmp_path)
    assert (
        len(lines) == 3 and lines[0].startswith("toy/sentiment: ") and "beyond backbone.max_windows=1 and are cut" in lines[0]
    )
    pos, rows = open_tasks(cut, tmp_path)[2], list(specs["toy/pos"].read("train"))
    # Trained on what is seen, scored on everything.
    assert [len(tags) for tags in pos.targets("train", np.arange(len(rows)))] == [len(row["tags"]) for row in rows]


def test_of_a_long_pair_the_longer_text_is_windowed(make_trial: Make) -> None:
    tokenizer = train_tokenizer(iter(["a b c d e f g h"]), 300)
    backbone = make_trial(backbone={"max_length": 24}).backbone
    for first, second in (("a b c", "d e f g " * 12), ("d e f g " * 12, "a b c")):
        windows, cut = _windows(tokenizer, first, second, backbone)
        assert cut == 0 and len(windows) > 2
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids, *_ in windows]
        assert all("a b c" in text for text in texts)
        long = [i for ids, types, _, keep in windows for i, t, k in zip(ids, types, keep, strict=True)
                if k and t == (second != "a b c") and i > 4]  # fmt: skip
        assert long == tokenizer("d e f g " * 12, add_special_tokens=False)["input_ids"]
    windows, cut = _windows(tokenizer, "a b " * 20, "c d " * 30, backbone)
    room = 24 - 3
    assert cut == len(tokenizer("a b " * 20, add_special_tokens=False)["input_ids"]) - room // 2
    assert all(len(ids) <= 24 for ids, *_ in windows)


def write_task(folder: Path, rows: list[dict[str, Any]]) -> TaskSpec:
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: folder / f"{split}.jsonl" for split in ("train", "dev", "test")}
    return TaskSpec(name="t", kind="classification", metric="accuracy", labels=("a", "b"), files=files)


def test_a_pair_counts_wherever_the_first_one_stands(
    make_trial: Make, prepared: Path, specs: dict[str, TaskSpec], tmp_path: Path
) -> None:
    rows = [{"text": "good", "label": "a"}, {"text": "bad", "text_pair": "road", "label": "b"}]
    tokenizer = load_tokenizer(prepare_tokenizer(make_trial(), specs, prepared))
    segments = []
    for order in (rows, rows[::-1]):
        arrays = tokenise("classification", order, tokenizer, make_trial().backbone, pairs=True).arrays()
        offsets = arrays["offsets"]
        segments.append([arrays["types"][offsets[i] : offsets[i + 1]].tolist() for i in range(2)])
    assert segments[0] == segments[1][::-1] and sum(map(sum, segments[0])) > 1


def test_columns_that_nobody_asked_for_do_no_harm(make_trial: Make, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "x", "label": "a", "id": 1},
        {"text": "y", "label": "b", "id": "q", "more": {"z": [1]}},
    ]
    spec = write_task(tmp_path, rows)
    config = make_trial(names=("t",), digests={"t": spec.digest()}, backbone={"size": {"tokenizer_tasks": ["t"]}})
    prepare([config], {"t": spec}, tmp_path / "prepared")
    assert open_tasks(config, tmp_path / "prepared")[0].size("train") == 2


def test_names_that_read_alike_have_folders_of_their_own(make_trial: Make, tmp_path: Path) -> None:
    config = make_trial(digests={"x/y": "0", "x_y": "0"})
    assert prepared_folder(config, "x/y", tmp_path) != prepared_folder(config, "x_y", tmp_path)


def test_data_are_prepared_once_and_by_content(make_trial: Make, specs: dict[str, TaskSpec], tmp_path: Path) -> None:
    config = make_trial()
    prepare([config], specs, tmp_path)
    folder = prepared_folder(config, "toy/pos", tmp_path)
    stamp = (folder / "meta.json").stat().st_mtime_ns
    prepare([make_trial(seed=3, train={"steps": 5})], specs, tmp_path)
    assert (folder / "meta.json").stat().st_mtime_ns == stamp
    changed = make_trial(digests={**config.digests, "toy/pos": "0" * 16})
    assert prepared_folder(changed, "toy/pos", tmp_path) != folder
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert json.loads((folder / "meta.json").read_text())["splits"]["train"]["examples"] == 60


def rows_of(batch) -> list[tuple[int, tuple[int, ...]]]:
    found = []
    for part in batch.tasks:
        for i in range(part.start, part.stop):
            found.append((part.task, tuple(batch.input_ids[i][batch.attention_mask[i] == 1].tolist())))
    return sorted(found)


def test_mixed_and_single_task_steps_hold_the_same_rows(make_trial: Make, prepared: Path) -> None:
    single, mixed = (make_trial(mixture={"batching": b, "tasks_per_step": 4}) for b in ("single_task", "mixed"))
    tasks = open_tasks(single, prepared)
    for step in range(10):
        groups = StepBatches(single, tasks).batches(step)
        [whole] = StepBatches(mixed, tasks).batches(step)
        assert len(groups) == 4 and all(len(group.tasks) == 1 for group in groups)
        assert rows_of(whole) == sorted(row for group in groups for row in rows_of(group))
        assert [part.task for part in whole.tasks] == sorted({part.task for part in whole.tasks})
        assert whole.task_ids.tolist() == [p.task for p in whole.tasks for _ in range(p.start, p.stop)]


def test_ranks_share_out_the_step_of_one_worker(make_trial: Make, prepared: Path) -> None:
    config = make_trial()
    tasks = open_tasks(config, prepared)
    for step in range(6):
        whole = [row for batch in StepBatches(config, tasks).batches(step) for row in rows_of(batch)]
        parts = [row for r in range(2) for batch in StepBatches(config, tasks, r, 2).batches(step) for row in rows_of(batch)]
        assert sorted(whole) == sorted(parts)
        assert StepBatches(config, tasks, 1, 2).digest(step) == StepBatches(config, tasks).digest(step)


def test_labels_are_padded_and_masks_fit(make_trial: Make, prepared: Path) -> None:
    config = make_trial(names=("toy/pos",))
    [task] = open_tasks(config, prepared)
    batch = StepBatches(config, [task]).batches(0)[0]
    labels = batch.tasks[0].labels
    words = batch.word_index.max(dim=1).values + 1
    assert torch.equal((labels != IGNORE).sum(1), words)
    assert torch.equal(batch.attention_mask.sum(1) > 2, torch.ones(len(labels), dtype=torch.bool))
    assert int((batch.word_index[batch.attention_mask == 0] != -1).sum()) == 0


def test_every_example_is_scored_once_over_the_ranks(make_trial: Make, prepared: Path) -> None:
    config = make_trial(train={"eval_batch_size": 5})
    task: TaskData = open_tasks(config, prepared)[0]
    seen = [int(i) for r in range(2) for rows, _ in eval_batches(config, 0, task, "test", r, 2) for i in rows]
    assert sorted(seen) == list(range(24))


def test_low_resource_keeps_a_fixed_subset(make_trial: Make, prepared: Path) -> None:
    small = make_trial(mixture={"low_resource": {"toy/pos": 10}})
    large = make_trial(mixture={"low_resource": {"toy/pos": 20}}, seed=9)
    tasks = open_tasks(small, prepared)
    few, more = (set(StepBatches(c, tasks).rows[2].tolist()) for c in (small, large))
    assert len(few) == 10 and few < more


def test_words_are_read_as_the_text_is(make_trial: Make) -> None:
    """A byte-level tokenizer without a prefix space, as released models have it, would glue the words of a list together."""
    texts = ["a cat sat", "the cat saw a hat"] * 20
    tokenizer = train_tokenizer(iter(texts), 320)
    assert not wants_spaces(tokenizer)
    released = Tokenizer(models.BPE(unk_token="[UNK]"))
    released.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    released.train_from_iterator(texts, trainers.BpeTrainer(special_tokens=["[UNK]"], initial_alphabet=sorted(alphabet)))
    glued = PreTrainedTokenizerFast(tokenizer_object=released, unk_token="[UNK]", pad_token="[UNK]")
    assert wants_spaces(glued)
    rows = [{"tokens": ["the", "cat", "saw"]}]
    arrays = tokenise("tagging", rows, glued, make_trial().backbone, pairs=False).arrays()
    assert arrays["tokens"].tolist() == glued(" the cat saw")["input_ids"] != glued(["the", "cat", "saw"],
        is_split_into_words=True)["input_ids"]  # fmt: skip
    assert arrays["words"].max() == 2


def test_data_that_changed_after_the_plan_are_refused(make_trial: Make, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]
    spec = write_task(tmp_path, rows)
    config = make_trial(names=("t",), digests={"t": spec.digest()}, backbone={"size": {"tokenizer_tasks": ["t"]}})
    write_task(tmp_path, rows[::-1])
    with pytest.raises(ConfigError, match="task t: the data have changed since the trials were planned"):
        prepare([config], {"t": spec}, tmp_path / "prepared")
    assert not [path for path in (tmp_path / "prepared").iterdir() if not path.name.startswith("tokenizer")]


@pytest.mark.slow
def test_several_processes_prepare_what_one_does(
    make_trial: Make, specs: dict[str, TaskSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a mistake found in one of them is told as it is found in one."""
    monkeypatch.setattr("lightning_modules.data.prepared.PARALLEL_FROM", 0)
    config = make_trial()
    prepare([config], specs, tmp_path / "two", processes=2)
    prepare([config], specs, tmp_path / "one", processes=1)
    for one, two in zip(open_tasks(config, tmp_path / "one"), open_tasks(config, tmp_path / "two"), strict=True):
        for split in SPLITS:
            for i in range(one.size(split)):
                a, b = (data.windows(split, [i]).rows[0].tokens.tolist() for data in (one, two))
                assert a == b and one.targets(split, [i]) == two.targets(split, [i])
    torn = write_task(tmp_path, [{"text": "x", "label": "a"}, {"text": "y", "label": "c"}])
    tasks = {**specs, "t": torn}
    bad = make_trial(names=("t", "toy/pos"))
    with pytest.raises(ConfigError, match=r"train.jsonl:2: label must be one of a, b"):
        prepare([bad], tasks, tmp_path / "two", processes=2)
