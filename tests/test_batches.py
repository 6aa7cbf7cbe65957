"""Prepared data and batches: nothing lost, ranks share a step, mixed and single-task hold the same rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_modules.config import TrialConfig
from lightning_modules.data.batches import (
    IGNORE,
    StepBatches,
    TaskData,
    _tokenise,
    collate,
    eval_batches,
    open_tasks,
    prepare,
    prepared_folder,
)
from lightning_modules.data.tasks import TaskSpec
from lightning_modules.data.tokenizer import load_tokenizer, prepare_tokenizer, train_tokenizer

Make = Callable[..., TrialConfig]


def test_prepared_examples_decode_to_their_text(make_trial: Make, specs: dict[str, TaskSpec], prepared: Path) -> None:
    config = make_trial()
    tokenizer = load_tokenizer(prepare_tokenizer(config, specs, prepared))
    sentiment, count, pos = open_tasks(config, prepared)
    for i, row in enumerate(specs["toy/sentiment"].read("train")):
        tokens, types, words = sentiment.row("train", i)
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == row["text"]
        assert set(types) == {0} and set(words) == {-1}
        assert sentiment.labels[sentiment.targets("train", np.array([i]))[0]] == row["label"]
    for i, row in enumerate(specs["toy/pos"].read("dev")):
        tokens, _, words = pos.row("dev", i)
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


def test_long_inputs_are_cut_and_counted(make_trial: Make, specs: dict[str, TaskSpec], tmp_path: Path) -> None:
    config = make_trial(backbone={"max_length": 8})
    prepare(config, specs, tmp_path)
    whole = make_trial()
    prepare(whole, specs, tmp_path)
    for short, long in zip(open_tasks(config, tmp_path), open_tasks(whole, tmp_path), strict=True):
        assert short.lengths("train").max() == 8
        assert short.cut_tokens("train") == long.lengths("train").sum() - short.lengths("train").sum() > 0
        assert long.cut_tokens("train") == 0
    pos, rows = open_tasks(config, tmp_path)[2], list(specs["toy/pos"].read("train"))
    assert [len(tags) for tags in pos.targets("train", np.arange(len(rows)))] == [len(row["tags"]) for row in rows]
    labels = collate([(0, pos, "train", np.arange(8))]).tasks[0].labels  # trained on what is seen, scored on everything
    assert (labels != IGNORE).sum(1).tolist() == [pos.row("train", i)[2].max() + 1 for i in range(8)]


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
        arrays = _tokenise(write_task(tmp_path, order), order, tokenizer, 32, pairs=True)
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
    prepare(config, {"t": spec}, tmp_path / "prepared")
    assert open_tasks(config, tmp_path / "prepared")[0].size("train") == 2


def test_names_that_read_alike_have_folders_of_their_own(make_trial: Make, tmp_path: Path) -> None:
    config = make_trial(digests={"x/y": "0", "x_y": "0"})
    assert prepared_folder(config, "x/y", tmp_path) != prepared_folder(config, "x_y", tmp_path)


def test_data_are_prepared_once_and_by_content(make_trial: Make, specs: dict[str, TaskSpec], tmp_path: Path) -> None:
    config = make_trial()
    prepare(config, specs, tmp_path)
    folder = prepared_folder(config, "toy/pos", tmp_path)
    stamp = (folder / "meta.json").stat().st_mtime_ns
    prepare(make_trial(seed=3, train={"steps": 5}), specs, tmp_path)
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
