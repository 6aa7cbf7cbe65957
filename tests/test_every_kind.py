"""Every kind of task from its rows to its score: it trains, beats what one scores without looking, and resumes to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.building import build
from lightning_modules.config import TrialConfig
from lightning_modules.data.posing import formed
from lightning_modules.data.prepared import open_tasks, prepare
from lightning_modules.data.tasks import TaskSpec, load_catalogues
from pipelines.store import TrialFolder, TrialResult
from pipelines.trial import run_trial

ENCODER_KINDS = ("choice", "spans", "dependency", "constituency", "srl")
SIZE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 64, "vocab_size": 320}


@pytest.fixture(scope="module")
def tasks(catalogue: Path, every_kind: Path) -> dict[str, TaskSpec]:
    return load_catalogues([catalogue, every_kind], Path())


@pytest.fixture(scope="module")
def run(tasks: dict[str, TaskSpec], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrialResult]:
    """Train a small trial on the given tasks and return its result."""
    root = tmp_path_factory.mktemp("kinds")

    def run(names: tuple[str, ...], folder: Path, **settings: Any) -> TrialResult:
        plain: dict[str, Any] = {
            "backbone": {"max_length": 48, "size": {**SIZE, "tokenizer_tasks": names}, "dropout": 0.0},
            "heads": {"span_size": 16, "arc_size": 32, "label_size": 16, "dropout": 0.1, "srl_max_width": 4},
            "mixture": {"tasks": names, "batch_size": 16 * len(names), "tasks_per_step": len(names), "sampling": "uniform"},
            "train": {"steps": 150, "lr": 3e-3, "log_every": 50, "eval_batch_size": 64},
        }
        for key, value in settings.items():
            plain[key] = {**plain[key], **value} if key in plain else value
        form = plain.get("data", {}).get("form", "native")
        plain["digests"] = {name: formed(tasks[name], form).digest() for name in names}
        config = build(TrialConfig, plain, "trial")
        prepare([config], tasks, root)
        result = run_trial(config, TrialFolder(folder, config.trial_id), root)
        assert result is not None
        return result

    return run


def gain_over_floor(result: TrialResult, task: str) -> float:
    metric = result.primary[task]
    score, floor = result.scores["test"][task][metric], result.floors["test"][task][metric]
    assert score is not None and floor is not None
    return score - floor


@pytest.mark.slow
@pytest.mark.parametrize("model", [{"family": "dense"}, {"family": "task_moe", "num_experts": 3}], ids=lambda m: m["family"])
def test_all_encoder_kinds_together_beat_the_floor(
    model: dict[str, Any], run: Callable[..., TrialResult], tmp_path: Path
) -> None:
    names = tuple(f"kind/{kind}" for kind in ENCODER_KINDS)
    result = run(names, tmp_path, model=model, train={"steps": 300})
    gains = {name: gain_over_floor(result, name) for name in names}
    assert min(gains.values()) > 0.3, gains


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["tiny-bart", "tiny-t5"])
def test_text_tasks_and_posed_tasks_are_generated(backbone: str, run: Callable[..., TrialResult], tmp_path: Path) -> None:
    names = ("kind/classification", "kind/text2text")
    result = run(
        names, tmp_path, backbone={"name": backbone, "max_target_length": 8}, data={"form": "text2text"},
        train={"steps": 500, "lr": 2e-3}, generation={"beams": 2},
    )  # fmt: skip
    gains = {name: gain_over_floor(result, name) for name in names}
    assert min(gains.values()) > 0.15, (gains, result.scores["test"])
    assert result.scores["test"]["kind/classification"]["invalid_rate"] == 0


@pytest.mark.slow
def test_a_decoder_and_heads_share_one_trial(run: Callable[..., TrialResult], tmp_path: Path) -> None:
    """A mixed batch holds rows for the decoder beside rows for heads; long inputs are read in windows."""
    names = ("kind/text2text", "kind/dependency", "kind/choice")
    result = run(names, tmp_path, backbone={"name": "tiny-bart", "max_length": 8}, mixture={"batching": "mixed"},
                 model={"family": "adapter_moe", "num_experts": 2}, train={"steps": 20})  # fmt: skip
    assert set(result.scores["test"]) == set(names) and result.data["kind/text2text"]["windowed"] > 0


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_batching_and_windows_change_no_score(
    kind: str, tasks: dict[str, TaskSpec], run: Callable[..., TrialResult], tmp_path: Path
) -> None:
    """Scoring one example at a time gives the scores of large padded batches."""
    name = f"kind/{kind}"
    one, many = (run((name,), tmp_path / str(size), train={"steps": 12, "eval_batch_size": size}) for size in (1, 64))
    for split in ("dev", "test"):
        assert one.scores[split][name] == pytest.approx(many.scores[split][name], abs=1e-9)


@pytest.mark.parametrize("kind", [*ENCODER_KINDS, "text2text"])
def test_targets_come_back_from_the_arrays(kind: str, tasks: dict[str, TaskSpec], tmp_path: Path) -> None:
    """What scores compare with is what the rows say."""
    spec = tasks[f"kind/{kind}"]
    plain = {
        "backbone": {"max_length": 48, "size": {**SIZE, "tokenizer_tasks": [spec.name]}},
        "mixture": {"tasks": [spec.name]},
        "digests": {spec.name: spec.digest()},
    }
    config = build(TrialConfig, plain, "trial")
    prepare([config], {spec.name: spec}, tmp_path)
    [data] = open_tasks(config, tmp_path)
    rows = list(spec.read("test"))
    targets = data.targets("test", range(len(rows)))
    number = {label: i for i, label in enumerate(spec.labels)}
    for row, target in zip(rows, targets, strict=True):
        match kind:
            case "choice":
                assert target == row["label"]
            case "spans" | "constituency":
                assert sorted(target) == sorted((s, e, number[label]) for s, e, label in row["spans"])
            case "dependency":
                assert target == [(h, number[rel]) for h, rel in zip(row["heads"], row["deprels"], strict=True)]
            case "srl":
                full = [(f["predicate"], s, e, number[r]) for f in row["frames"] for s, e, r in f["arguments"]]
                bare = [(f["predicate"], -1, -1, -1) for f in row["frames"] if not f["arguments"]]
                assert sorted(target) == sorted([*full, *bare])
            case _:
                assert target == [row["target"]]
