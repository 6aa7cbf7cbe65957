"""Scoring a network on a split: the only evaluation. Deterministic: no dropout, no router noise."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_modules.config import TrialConfig
from lightning_modules.data.batches import eval_batches
from lightning_modules.data.prepared import TaskData
from lightning_modules.data.tasks import Split
from lightning_modules.gang import Gang, gather
from lightning_modules.measure.routing import RoutingTally
from lightning_modules.measure.scores import score
from lightning_modules.network.model import MultiTaskNetwork
from lightning_modules.network.routers.record import Record


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of one split."""

    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """task -> metric -> value, None where it is undefined."""
    undefined: dict[str, str] = field(default_factory=dict)
    """``task/metric`` -> why."""


def evaluate(
    network: MultiTaskNetwork,
    config: TrialConfig,
    tasks: Sequence[TaskData],
    split: Split,
    gang: Gang,
    device: torch.device,
    tally: RoutingTally | None = None,
    only: Collection[int] | None = None,
) -> Evaluation:
    """Score every task of the mixture on ``split``; workers share the batches and all get the result. ``tally`` counts how this
    worker's share was routed; what a decoder routes is counted at the gold targets (one more pass, without generating).
    ``only``: numbers of the tasks to score; None: all."""
    training = network.training
    network.eval()
    evaluation = Evaluation()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")
    with torch.no_grad(), autocast:
        for number, task in enumerate(tasks):
            if only is not None and number not in only:
                continue
            answers = _predict(network, config, number, task, split, gang, device, tally)
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
    tally: RoutingTally | None,
) -> dict[int, object]:
    """Row number -> predicted answer, over all workers."""
    answers: dict[int, object] = {}
    for rows, batch in eval_batches(config, number, task, split, gang.rank, gang.world_size):
        batch = batch.to(device)
        records: list[Record] = []
        at_targets = tally is not None and task.kind == "text2text"
        if at_targets:
            network.losses(batch, records)
        target_length = config.backbone.max_target_length
        [found] = network.answers(batch, config.generation, target_length, None if at_targets else records)
        if tally is not None:
            for record in records:
                tally.add(record)
        if task.kind == "text2text":
            found = list(task.decode(found))
        answers.update(zip(rows.tolist(), found, strict=True))
    merged: dict[int, object] = {}
    for part in gather(answers):
        assert isinstance(part, dict)
        merged.update(part)
    return merged
