"""Scoring a network on a split: the only evaluation. Deterministic: no dropout, no router noise."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_modules.config import TrialConfig
from lightning_modules.data.batches import eval_batches
from lightning_modules.data.prepared import TaskData
from lightning_modules.data.tasks import Split
from lightning_modules.gang import Gang, gather
from lightning_modules.measure.scores import score
from lightning_modules.network.model import MultiTaskNetwork


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of one split."""

    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """task -> metric -> value, None where it is undefined."""
    undefined: dict[str, str] = field(default_factory=dict)
    """``task/metric`` -> why."""


def evaluate(
    network: MultiTaskNetwork, config: TrialConfig, tasks: Sequence[TaskData], split: Split, gang: Gang, device: torch.device
) -> Evaluation:
    """Score every task of the mixture on ``split``; workers share the batches and all get the result."""
    training = network.training
    network.eval()
    evaluation = Evaluation()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")
    with torch.no_grad(), autocast:
        for number, task in enumerate(tasks):
            answers = _predict(network, config, number, task, split, gang, device)
            rows = sorted(answers)
            targets = task.targets(split, rows)
            predictions = [answers[row] for row in rows]
            if task.kind in NO_ANSWER:
                predictions = [_for_every_word(p, len(gold), task.kind) for p, gold in zip(predictions, targets, strict=True)]
            result = score(task.kind, task.metric, task.labels, predictions, targets)
            evaluation.scores[task.name] = dict(result.values)
            evaluation.undefined.update({f"{task.name}/{metric}": why for metric, why in result.undefined.items()})
    network.train(training)
    return evaluation


NO_ANSWER: dict[str, Any] = {"tagging": -1, "dependency": (-1, -1)}
"""What stands for words that the model did not see (beyond ``max_windows``, or without a token): always wrong."""


def _for_every_word(answers: Any, words: int, kind: str) -> list[Any]:
    return [*answers, *[NO_ANSWER[kind]] * (words - len(answers))]


def _predict(
    network: MultiTaskNetwork,
    config: TrialConfig,
    number: int,
    task: TaskData,
    split: Split,
    gang: Gang,
    device: torch.device,
) -> dict[int, object]:
    """Row number -> predicted answer, over all workers."""
    answers: dict[int, object] = {}
    for rows, batch in eval_batches(config, number, task, split, gang.rank, gang.world_size):
        [found] = network.answers(batch.to(device), config.generation, config.backbone.max_target_length)
        if task.kind == "text2text":
            found = list(task.decode(found))
        answers.update(zip(rows.tolist(), found, strict=True))
    merged: dict[int, object] = {}
    for part in gather(answers):
        assert isinstance(part, dict)
        merged.update(part)
    return merged
