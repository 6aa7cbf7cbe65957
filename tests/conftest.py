"""Shared fixtures: a small catalogue in files, trials on it, and their prepared data. Nothing here needs a network."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import yaml

from lightning_modules.building import build
from lightning_modules.config import TrialConfig
from lightning_modules.data import tasks

ADJECTIVES = {"good": 1, "fine": 1, "bright": 1, "bad": 0, "dull": 0, "grim": 0}
NOUNS = ["day", "meal", "song", "road"]


def _rows(kind: str, n: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        words = [rng.choice([*ADJECTIVES, *NOUNS]) for _ in range(rng.randint(3, 9))] + [rng.choice(list(ADJECTIVES))]
        value = ADJECTIVES[words[-1]]
        if kind == "classification":
            rows.append({"text": " ".join(words), "label": "pos" if value else "neg"})
        elif kind == "regression":
            rows.append({"text": " ".join(words), "label": float(sum(ADJECTIVES.get(w, 0) for w in words))})
        else:
            rows.append({"tokens": words, "tags": ["ADJ" if w in ADJECTIVES else "NOUN" for w in words]})
    return rows


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue of three learnable tasks, one of each kind: ``toy/sentiment``, ``toy/count`` and ``toy/pos``."""
    folder = tmp_path_factory.mktemp("catalogue")
    entries = []
    for name, kind, metric, labels in (
        ("toy/sentiment", "classification", "accuracy", ["neg", "pos"]),
        ("toy/count", "regression", "pearson", []),
        ("toy/pos", "tagging", "accuracy", ["ADJ", "NOUN"]),
    ):
        files = {}
        for i, (split, n) in enumerate({"train": 60, "dev": 24, "test": 24}.items()):
            files[split] = f"{kind}.{split}.jsonl"
            (folder / files[split]).write_text("".join(json.dumps(row) + "\n" for row in _rows(kind, n, i)))
        entries.append(
            {"name": name, "kind": kind, "metric": metric, "labels": labels, "category": f"toy/{kind}", "files": files}
        )
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({"tasks": entries}))
    return path


def _structured_rows(kind: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Sentences whose annotation follows from which of its words are adjectives."""
    rng = random.Random(100 + seed)
    rows = []
    for _ in range(n):
        words = [rng.choice([*ADJECTIVES, *NOUNS]) for _ in range(rng.randint(3, 8))]
        adjective = [word in ADJECTIVES for word in words]
        runs = [(i, i + 1 + adjective[i:].index(False) if False in adjective[i:] else len(words))
                for i in range(len(words)) if adjective[i] and (i == 0 or not adjective[i - 1])]  # fmt: skip
        tokens: dict[str, Any] = {"tokens": words}
        match kind:
            case "choice":
                options = rng.sample(NOUNS, 2)
                right = rng.randrange(3)
                options.insert(right, rng.choice(list(ADJECTIVES)))
                rows.append({"text": "which describes?", "options": options, "label": right})
            case "spans":
                rows.append(tokens | {"spans": [[i, i + 1, "NOUN"] for i, a in enumerate(adjective) if not a]})
            case "dependency":
                last = len(words)
                heads = [i + 2 if i + 1 < last else 0 for i in range(last)]
                rows.append(tokens | {"heads": heads, "deprels": ["adj" if a else "noun" for a in adjective]})
            case "constituency":
                rows.append(tokens | {"spans": [[0, len(words), "S"], *([start, stop, "NP"] for start, stop in runs)]})
            case "srl":
                frames = [
                    {"predicate": i, "arguments": [[i - 1, i, "A"]] if i and adjective[i - 1] else []}
                    for i, a in enumerate(adjective) if not a
                ]  # fmt: skip
                rows.append(tokens | {"frames": frames})
            case "classification":
                rows.append({"text": " ".join(words), "label": "adjective" if adjective[0] else "noun"})
            case "text2text":
                rows.append({"text": " ".join(words), "target": words[0]})
    return rows


STRUCTURED = {
    "classification": ("accuracy", ["adjective", "noun"]),
    "choice": ("accuracy", None),
    "spans": ("span_f1", ["NOUN"]),
    "dependency": ("las", ["adj", "noun"]),
    "constituency": ("bracket_f1", ["NP", "S"]),
    "srl": ("srl_f1", ["A"]),
    "text2text": ("exact_match", None),
}


@pytest.fixture(scope="session")
def every_kind(catalogue: Path) -> Path:
    """A catalogue with a learnable task ``kind/KIND`` of every kind that ``catalogue`` lacks."""
    entries = []
    for kind, (metric, labels) in STRUCTURED.items():
        files = {}
        for i, (split, n) in enumerate({"train": 400, "dev": 24, "test": 40}.items()):
            files[split] = f"kind.{kind}.{split}.jsonl"
            rows = _structured_rows(kind, n, i)
            (catalogue.parent / files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        entry = {"name": f"kind/{kind}", "kind": kind, "metric": metric, "category": f"kind/{kind}", "files": files}
        entries.append(entry | ({"labels": labels} if labels else {}))
    path = catalogue.parent / "every_kind.yaml"
    path.write_text(yaml.safe_dump({"tasks": entries}))
    return path


@pytest.fixture(scope="session")
def specs(catalogue: Path) -> dict[str, tasks.TaskSpec]:
    """The catalogue's tasks by name."""
    return tasks.load_catalogues([catalogue], Path())


@pytest.fixture(scope="session")
def make_trial(specs: dict[str, tasks.TaskSpec]) -> Callable[..., TrialConfig]:
    """``make_trial(model=..., mixture=..., train=..., names=...)``: a tiny trial on the catalogue."""

    def make(names: tuple[str, ...] = ("toy/sentiment", "toy/count", "toy/pos"), **settings: Any) -> TrialConfig:
        plain = {
            "backbone": {
                "max_length": 32,
                "size": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_size": 32, "vocab_size": 320,
                         "tokenizer_tasks": sorted(specs)},
            },
            "mixture": {"tasks": names, "batch_size": 8, "tasks_per_step": 2},
            "train": {"steps": 12, "lr": 3e-3, "log_every": 3, "checkpoint_every": 4},
            "digests": {name: specs[name].digest() for name in specs},
        }  # fmt: skip
        for key, value in settings.items():
            plain[key] = {**plain[key], **value} if isinstance(plain.get(key), dict) and isinstance(value, dict) else value
        return build(TrialConfig, plain, "trial")

    return make


@pytest.fixture(scope="session")
def prepared(
    specs: dict[str, tasks.TaskSpec], make_trial: Callable[..., TrialConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of the catalogue's tokenised data."""
    from lightning_modules.data.prepared import prepare

    root = tmp_path_factory.mktemp("prepared")
    prepare([make_trial()], specs, root)
    return root


MODELS = {
    "dense": {"family": "dense"},
    "task_moe": {"family": "task_moe", "num_experts": 3},
    "task_moe_soft": {"family": "task_moe", "num_experts": 3, "router": {"selection": "soft"}},
    "adapter_moe": {"family": "adapter_moe", "num_experts": 3, "bottleneck": 4},
}


@pytest.fixture(params=MODELS, ids=list(MODELS))
def model(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of every family in turn."""
    return MODELS[request.param]
