"""What feeding a step costs: loader and collation against the step itself, padding, preparation and reopening.

    python tests/benchmarks/data.py

Four synthetic classification tasks of short texts (log-normal lengths, median 12 words, 25,000 examples each) and a BERT
encoder of 22M parameters (6 blocks, width 384, random weights: speed does not depend on them). One thread.
Loader time and step time are taken in turn, step by step, in one process; the padding is counted over the same steps.
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import BertConfig, BertModel

from lightning_modules.building import build
from lightning_modules.config import TrialConfig
from lightning_modules.data.batches import Batch, StepBatches
from lightning_modules.data.prepared import open_tasks, prepare
from lightning_modules.data.tasks import TaskSpec
from lightning_modules.data.tokenizer import train_tokenizer
from lightning_modules.multitask import MultiTaskModule

TASKS, EXAMPLES, STEPS = 4, 25_000, 20
WORDS = 5_000


def write_tasks(folder: Path) -> dict[str, TaskSpec]:
    """The tasks' files and entries."""
    specs = {}
    for number in range(TASKS):
        rng = random.Random(number)
        files = {}
        for split, count in (("train", EXAMPLES), ("dev", 100), ("test", 100)):
            files[split] = folder / f"task{number}.{split}.jsonl"
            with files[split].open("w") as file:
                for _ in range(count):
                    length = min(100, max(1, round(rng.lognormvariate(2.5, 0.6))))
                    text = " ".join(f"w{rng.randrange(WORDS)}" for _ in range(length))
                    file.write(json.dumps({"text": text, "label": rng.choice("ab")}) + "\n")
        name = f"task{number}"
        specs[name] = TaskSpec(name=name, kind="classification", metric="accuracy", labels=("a", "b"), files=files)
    return specs


def write_backbone(folder: Path) -> Path:
    """A BERT of 22M parameters with its tokenizer."""
    tokenizer = train_tokenizer((f"w{i}" for i in range(WORDS)), 30_000)
    config = BertConfig(vocab_size=30_522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_config(specs: dict[str, TaskSpec], backbone: Path, **mixture: Any) -> TrialConfig:
    """A trial on the tasks."""
    plain = {
        "backbone": {"name": str(backbone), "max_length": 256},
        "mixture": {"tasks": list(specs), "batch_size": 64, "tasks_per_step": 4, **mixture},
        "digests": {name: spec.digest() for name, spec in specs.items()} | {"backbone": "benchmark"},
    }
    return build(TrialConfig, plain, "trial")


def padded_share(steps: list[list[Batch]]) -> float:
    """Share of the token places that hold padding."""
    places = sum(batch.attention_mask.numel() for step in steps for batch in step)
    return 1 - sum(int(batch.attention_mask.sum()) for step in steps for batch in step) / places


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        specs, backbone = write_tasks(root), write_backbone(root / "backbone")
        config = make_config(specs, backbone)
        begin = time.perf_counter()
        prepare([config], specs, root / "prepared")
        prepared = time.perf_counter() - begin
        reopened = []
        for _ in range(5):
            begin = time.perf_counter()
            tasks = open_tasks(config, root / "prepared")
            StepBatches(config, tasks).batches(0)
            reopened.append(time.perf_counter() - begin)
        print(f"preparing {TASKS * EXAMPLES:,} texts: {prepared:.1f} s; opening them to the first batch: "
              f"{statistics.median(reopened):.2f} s (max {max(reopened):.2f}, n=5)")  # fmt: skip

        module = MultiTaskModule(config, tasks, StepBatches(config, tasks))
        print(f"parameters: {sum(p.numel() for p in module.network.parameters()) / 1e6:.1f}M")
        optimizer = torch.optim.AdamW(module.network.parameters(), lr=1e-4, fused=True)
        forms = {
            "plain": {"bucketing": False},
            "bucketed": {},
            "token budget": {"batch_tokens": 1200},
        }
        print(f"{'batches':<14}{'padding':>9}{'examples/step':>15}{'step s':>9}{'loader s':>10}{'loader share':>14}")
        for form, mixture in forms.items():
            batches = StepBatches(make_config(specs, backbone, **mixture), tasks)
            batches.batches(0)
            loader, steps, seconds = [], [], []
            for number in range(STEPS):
                begin = time.perf_counter()
                step = batches.batches(number)
                loader.append(time.perf_counter() - begin)
                begin = time.perf_counter()
                for batch in step:
                    loss = sum((losses * rows.weights).sum()
                               for rows, losses in zip(batch.tasks, module.network.losses(batch), strict=True))  # fmt: skip
                    assert isinstance(loss, torch.Tensor)
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(time.perf_counter() - begin)
                steps.append(step)
            examples = sum(len(batch.input_ids) for step in steps for batch in step) / STEPS
            load, train = statistics.median(loader), statistics.median(seconds)
            print(f"{form:<14}{padded_share(steps):>9.1%}{examples:>15.1f}{train:>9.3f}{load:>10.4f}{load / train:>14.2%}")


if __name__ == "__main__":
    main()
