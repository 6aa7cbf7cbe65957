"""MultiTaskModule: the only training step, whatever the family, the mixture and the number of workers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from lightning_modules.config import DenseConfig, TrainConfig, TrialConfig
from lightning_modules.data.batches import Batch, TaskData
from lightning_modules.gang import Gang, sum_gradients, sum_over_workers
from lightning_modules.network.model import HeadSpec, build_network
from lightning_modules.network.routers import mutual_information_loss
from lightning_modules.seeds import derive


class MultiTaskModule(lightning.LightningModule):
    """A multi-task network and how it is trained.

    One Lightning batch is one optimiser step: the list of its forwards (``Batch``). The loss of a step is the mean over its
    groups of the mean over a group's examples; each worker adds its slice, gradients are summed over workers, so neither the
    number of forwards nor of workers changes the step. Parameters without a gradient (experts that the step did not use)
    stand still.
    """

    def __init__(self, config: TrialConfig, tasks: Sequence[TaskData], gang: Gang | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.trial = config
        self.gang = gang or Gang()
        self.task_names = [task.name for task in tasks]
        heads = [HeadSpec(name=task.name, kind=task.kind, num_labels=max(1, len(task.labels))) for task in tasks]
        self.network = build_network(config, heads, tasks[0].vocab_size)
        self.completed = 0
        """Optimiser steps taken so far."""
        self.losses = LossMeans(len(tasks))

    def configure_optimizers(self) -> Any:
        """AdamW, fused, with the config's schedule."""
        train = self.trial.train
        optimizer = torch.optim.AdamW(parameter_groups(self.network, self.trial), lr=train.lr, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(train, step))
        return [optimizer], [scheduler]

    def on_fit_start(self) -> None:
        """Put the loss means where the losses are computed."""
        self.losses.to(self.device)

    def training_step(self, batches: list[Batch], batch_idx: int) -> None:
        """One optimiser step."""
        config = self.trial
        torch.manual_seed(derive(config.seed, "step", self.completed, self.gang.rank))
        for batch in batches:
            loss = torch.zeros((), device=self.device)
            outputs = self.network(batch)
            for rows, output in zip(batch.tasks, outputs, strict=True):
                losses = self.network.head(rows.task).loss(output, rows.labels)
                self.losses.add(rows.task, losses.detach())
                loss = loss + losses.sum() / config.mixture.batch_size
            self.manual_backward(loss)
        self._auxiliary_backward(batches)
        self._apply_gradients()
        self.completed += 1

    def _auxiliary_backward(self, batches: list[Batch]) -> None:
        router = None if isinstance(self.trial.model, DenseConfig) else self.trial.model.router
        if router is None or router.mutual_information == 0:
            return
        tasks = sorted({rows.task for batch in batches for rows in batch.tasks})
        routings = self.network.route(torch.tensor(tasks, device=self.device))
        loss = torch.stack([mutual_information_loss(routing) for routing in routings.values()]).mean()
        self.manual_backward(router.mutual_information * loss / self.gang.world_size)

    def _apply_gradients(self) -> None:
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        if self.gang.world_size > 1:
            sum_gradients(parameters)
        if self.trial.train.clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.trial.train.clip)
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert not isinstance(optimizer, list) and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()


def lr_factor(train: TrainConfig, step: int) -> float:
    """Learning rate of optimiser step ``step`` (from 0) relative to the peak: linear warm-up, then the config's schedule."""
    warmup = math.ceil(train.warmup * train.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, train.steps - warmup))
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[train.schedule]


def parameter_groups(network: nn.Module, config: TrialConfig) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and decay: routers have their own rate and no decay; vectors (biases, norms)
    have no decay."""
    scale = 1.0 if isinstance(config.model, DenseConfig) else config.model.router.lr_scale
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            router = "router" in name
            groups.setdefault((router, parameter.ndim > 1 and not router), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.train.lr * (scale if router else 1.0),
            "weight_decay": config.train.weight_decay if decay else 0.0,
        }
        for (router, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


@dataclass
class LossMeans:
    """Running means of the training losses since they were last read, kept on the device: no synchronisation per step."""

    num_tasks: int

    def __post_init__(self) -> None:
        self.sums = torch.zeros(self.num_tasks, dtype=torch.float64)
        self.counts = torch.zeros(self.num_tasks, dtype=torch.float64)

    def to(self, device: torch.device) -> None:
        """Move to ``device``."""
        self.sums, self.counts = self.sums.to(device), self.counts.to(device)

    def add(self, task: int, losses: Tensor) -> None:
        """Count the per-example ``losses`` (n,) of one task."""
        self.sums[task] += losses.sum()
        self.counts[task] += len(losses)

    def read(self, names: Sequence[str]) -> dict[str, float]:
        """``train/loss`` (mean over examples) and ``train/loss/{task}`` over all workers; starts anew."""
        sums, counts = sum_over_workers(torch.stack([self.sums, self.counts])).tolist()
        self.sums.zero_()
        self.counts.zero_()
        means = {f"train/loss/{name}": s / n for name, s, n in zip(names, sums, counts, strict=True) if n}
        return {"train/loss": sum(sums) / sum(counts), **means}

    def state(self) -> Tensor:
        """(2, T) sums and counts of this worker, for a checkpoint."""
        return torch.stack([self.sums, self.counts]).cpu()

    def load(self, state: Tensor) -> None:
        """Go on from :meth:`state`."""
        self.sums, self.counts = state.clone().to(self.sums.device)
