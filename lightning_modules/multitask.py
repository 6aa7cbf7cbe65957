"""MultiTaskModule: the only training step, whatever the family, the mixture and the number of workers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from lightning_modules.config import DenseConfig, TrainConfig, TrialConfig
from lightning_modules.data.batches import Batch, StepBatches, facts_of
from lightning_modules.data.prepared import TaskData
from lightning_modules.gang import Gang, sum_gradients, sum_over_workers
from lightning_modules.network.model import build_network
from lightning_modules.network.routers import mutual_information_loss
from lightning_modules.network.task_heads.base import HeadSpec
from lightning_modules.seeds import derive
from lightning_modules.weighting import LossWeights


class MultiTaskModule(lightning.LightningModule):
    """A multi-task network and how it is trained.

    One Lightning batch is one optimiser step: the list of its forwards (``Batch``). The loss of a step is the mean over its
    groups of the mean over a group's examples, each task's weighted by ``train.loss_weighting``; each worker adds its slice,
    gradients are summed over workers, so neither the number of forwards nor of workers changes the step. Parameters without a
    gradient (experts that the step did not use) stand still.
    """

    def __init__(self, config: TrialConfig, tasks: Sequence[TaskData], batches: StepBatches, gang: Gang | None = None) -> None:
        """``batches``: what the steps hold; read for the sizes of the tasks and for the tasks of a step."""
        super().__init__()
        self.automatic_optimization = False
        self.trial = config
        self.gang = gang or Gang()
        self.task_names = [task.name for task in tasks]
        facts = [facts_of(task, rows) for task, rows in zip(tasks, batches.rows, strict=True)]
        heads = [
            HeadSpec(task.name, task.kind, max(1, len(task.labels)), known) for task, known in zip(tasks, facts, strict=True)
        ]
        self.network = build_network(config, heads, tasks[0].vocab_size)
        self.batches = batches
        self.weights = LossWeights(config.train.loss_weighting, batches.sizes)
        self.completed = 0
        """Optimiser steps taken so far."""
        self.losses = LossMeans(len(tasks))
        self.segment = LossMeans(len(tasks))
        """Losses since the shares of adaptive sampling last changed."""
        self._step = LossMeans(len(tasks))
        adapts = config.mixture.sampling == "adaptive"
        self._means = [self.losses, *([self.segment] if adapts else []), *([self._step] if self.weights.observes else [])]

    def configure_optimizers(self) -> Any:
        """AdamW, fused, with the config's schedule."""
        train = self.trial.train
        groups = parameter_groups(self.network, self.trial)
        if learned := list(self.weights.parameters()):
            groups.append({"params": learned, "lr": train.lr * train.head_lr_scale, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=train.lr, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(train, step))
        return [optimizer], [scheduler]

    def on_fit_start(self) -> None:
        """Put the loss means where the losses are computed."""
        for means in self._means:
            means.to(self.device)

    def training_step(self, batches: list[Batch], batch_idx: int) -> None:
        """One optimiser step."""
        torch.manual_seed(derive(self.trial.seed, "step", self.completed, self.gang.rank))
        for batch in batches:
            loss = torch.zeros((), device=self.device)
            for rows, losses in zip(batch.tasks, self.network.losses(batch), strict=True):
                for means in self._means:
                    means.add(rows.task, losses.detach())
                loss = loss + self.weights(rows.task, (losses * rows.weights).sum(), rows.weights.sum())
            self.manual_backward(loss)
        self._auxiliary_backward()
        self._apply_gradients()
        if self.weights.observes:
            self.weights.observe({task: mean for task, mean in enumerate(self._step.means()) if mean is not None})
        self.completed += 1

    def _auxiliary_backward(self) -> None:
        """Add the gradients of the routers' own loss, over the tasks of the whole step (a worker may lack some of them)."""
        router = None if isinstance(self.trial.model, DenseConfig) else self.trial.model.router
        if router is None or router.mutual_information == 0:
            return
        tasks = torch.tensor(self.batches.tasks_of(self.completed), device=self.device)
        routings = self.network.route(tasks)
        loss = torch.stack([mutual_information_loss(routing) for routing in routings.values()]).mean()
        self.manual_backward(router.mutual_information * loss / self.gang.world_size)

    def _apply_gradients(self) -> None:
        trainable = [p for p in (*self.network.parameters(), *self.weights.parameters()) if p.requires_grad]
        if self.gang.world_size > 1:
            mixture = self.trial.mixture
            sum_gradients(trainable, even=mixture.batch_tokens is None and mixture.group_size >= self.gang.world_size)
        parameters = [p for p in trainable if p.grad is not None]
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
    """Trainable parameters by learning rate and decay: routers and heads have their own rates; routers and vectors (biases,
    norms) have no decay."""
    router_scale = 1.0 if isinstance(config.model, DenseConfig) else config.model.router.lr_scale
    scales = {"backbone": 1.0, "heads": config.train.head_lr_scale, "router": router_scale}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            part = "router" if "router" in name else "heads" if name.startswith("heads.") else "backbone"
            groups.setdefault((part, parameter.ndim > 1 and part != "router"), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.train.lr * scales[part],
            "weight_decay": config.train.weight_decay if decay else 0.0,
        }
        for (part, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
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

    def read(self, names: Sequence[str]) -> tuple[dict[str, float], int]:
        """``train/loss`` (mean over examples) and ``train/loss/{task}`` over all workers, and the number of examples; starts
        anew."""
        sums, counts = self._totals()
        means = {f"train/loss/{name}": s / n for name, s, n in zip(names, sums, counts, strict=True) if n}
        return {"train/loss": sum(sums) / sum(counts), **means}, round(sum(counts))

    def means(self) -> list[float | None]:
        """The mean of each task over all workers, None for a task that has not been met; starts anew."""
        return [s / n if n else None for s, n in zip(*self._totals(), strict=True)]

    def _totals(self) -> tuple[list[float], list[float]]:
        sums, counts = sum_over_workers(torch.stack([self.sums, self.counts])).tolist()
        self.sums.zero_()
        self.counts.zero_()
        return sums, counts

    def state(self) -> Tensor:
        """(2, T) sums and counts of this worker, for a checkpoint."""
        return torch.stack([self.sums, self.counts]).cpu()

    def load(self, state: Tensor) -> None:
        """Go on from :meth:`state`."""
        self.sums, self.counts = state.clone().to(self.sums.device)
