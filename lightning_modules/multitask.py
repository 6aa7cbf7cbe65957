"""MultiTaskModule: the only training step, whatever the family, the mixture and the number of workers."""

import math
from collections.abc import Mapping, Sequence
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
from lightning_modules.network.routers.balance import diversity
from lightning_modules.network.routers.record import Record
from lightning_modules.network.task_heads.base import HeadSpec
from lightning_modules.router_config import RouterConfig
from lightning_modules.seeds import derive
from lightning_modules.weighting import LossWeights


class MultiTaskModule(lightning.LightningModule):
    """A multi-task network and how it is trained.

    One Lightning batch is one optimiser step: the list of its forwards (``Batch``). The loss of a step is the mean over its
    groups of the mean over a group's examples, each task's weighted by ``train.loss_weighting``; each worker adds its slice,
    gradients are summed over workers, so neither the number of forwards nor of workers changes the step. Parameters without a
    gradient (experts that the step did not use) stand still.
    """

    def __init__(
        self,
        config: TrialConfig,
        tasks: Sequence[TaskData],
        batches: StepBatches,
        gang: Gang | None = None,
        vectors: Tensor | None = None,
    ) -> None:
        """``batches``: what the steps hold; read for the sizes of the tasks and for the tasks of a step. ``vectors``: computed
        task vectors, where the router reads some."""
        super().__init__()
        self.automatic_optimization = False
        self.trial = config
        self.gang = gang or Gang()
        self.task_names = [task.name for task in tasks]
        facts = [facts_of(task, rows) for task, rows in zip(tasks, batches.rows, strict=True)]
        heads = [
            HeadSpec(task.name, task.kind, max(1, len(task.labels)), known) for task, known in zip(tasks, facts, strict=True)
        ]
        self.network = build_network(config, heads, tasks[0].vocab_size, vectors)
        self.batches = batches
        self.weights = LossWeights(config.train.loss_weighting, batches.sizes)
        self.completed = 0
        """Optimiser steps taken so far."""
        self._starts = self._expert_starts()
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
        """Put the loss means and the experts' starts where the losses are computed."""
        for means in self._means:
            means.to(self.device)
        self._starts = {
            block: [[start.to(self.device) for start in expert] for expert in experts]
            for block, experts in self._starts.items()
        }

    def training_step(self, batches: list[Batch], batch_idx: int) -> None:
        """One optimiser step."""
        torch.manual_seed(derive(self.trial.seed, "step", self.completed, self.gang.rank))
        routers = self.network.routers
        totals = None
        if routers is not None:
            routers.begin(self.completed)
            totals = torch.tensor(self.batches.totals(self.completed), dtype=torch.float32, device=self.device)
        used: dict[int, Tensor] = {}
        for batch in batches:
            records: list[Record] = []
            loss = self._loss(batch, records)
            if routers is not None and totals is not None:
                added = routers.loss(records, totals)
                loss = loss if added is None else loss + added
                routers.observe(records)
                if self._starts:
                    _mark_used(used, records)
            self.manual_backward(loss)
        self._step_backward(used)
        self._apply_gradients()
        if routers is not None:
            routers.finish(sum_over_workers)
            routers.begin(self.completed + 1)
        if self.weights.observes:
            self.weights.observe({task: mean for task, mean in enumerate(self._step.means()) if mean is not None})
        self.completed += 1

    def _loss(self, batch: Batch, records: list[Record]) -> Tensor:
        """What a forward adds to the step's loss, the routers' own losses of its ``records`` aside."""
        compares = self._router is not None and self._router.consistency > 0
        if compares:
            each, divergences = self.network.compared_losses(batch, records)
        else:
            each, divergences = self.network.losses(batch, records), None
        loss = torch.zeros((), device=self.device)
        for i, (rows, losses) in enumerate(zip(batch.tasks, each, strict=True)):
            for means in self._means:
                means.add(rows.task, losses.detach())
            if divergences is not None and self._router is not None:
                losses = losses + self._router.consistency * divergences[i]
            loss = loss + self.weights(rows.task, (losses * rows.weights).sum(), rows.weights.sum())
        if self._router is not None and self._router.selection == "sampled":
            assert self.network.routers is not None
            for record in records:
                loss = loss + self.network.routers.policy_loss(record, _losses_of_units(batch, each, record))
        return loss

    @property
    def _router(self) -> RouterConfig | None:
        return None if isinstance(self.trial.model, DenseConfig) else self.trial.model.router

    def _step_backward(self, used: Mapping[int, Tensor]) -> None:
        """Add the gradients of the losses that belong to the step as a whole (a worker may lack some of its tasks)."""
        routers = self.network.routers
        if routers is None or self._router is None:
            return
        losses = []
        if (own := routers.step_loss(self.batches.trained)) is not None:
            losses.append(own)
        if self._router.diversity > 0 and (apart := self._diversity(used)) is not None:
            losses.append(self._router.diversity * apart)
        if losses:
            self.manual_backward(torch.stack(losses).sum() / self.gang.world_size)

    def _expert_starts(self) -> dict[int, list[list[Tensor]]]:
        """Block -> a copy of each expert's parameters as they start, where ``diversity`` needs them."""
        if self._router is None or self._router.diversity == 0:
            return {}
        routed = self.network.routed().items()
        return {block: [[p.detach().clone() for p in e.parameters()] for e in module.experts] for block, module in routed}

    def _diversity(self, used: Mapping[int, Tensor]) -> Tensor | None:
        """The diversity loss, mean over the blocks, of the experts that the step uses (the others stand still, and with them
        the blocks that it does not use, as a decoder's); None: it uses none."""
        losses, blocks = [], self.network.routed()
        for block, module in blocks.items():
            pairs = [(module.experts[e].parameters(), self._starts[block][e]) for e in self._experts_used(block, used)]
            if pairs:
                losses.append(diversity([[p - start for p, start in zip(*pair, strict=True)] for pair in pairs]))
        return torch.stack(losses).sum() / len(blocks) if losses else None

    def _experts_used(self, block: int, used: Mapping[int, Tensor]) -> list[int]:
        """Experts of the block that some unit of the step chose, on any worker."""
        assert self.network.routers is not None
        own = used.get(block)
        own = torch.zeros(self.network.routers.experts[block] + 1, device=self.device) if own is None else own
        return sum_over_workers(own)[:-1].nonzero().flatten().tolist()

    @property
    def _even(self) -> bool:
        """Whether every worker has gradients for the same parameters: a slice of every group, on the same routes."""
        mixture, router = self.trial.mixture, self._router
        alike = router is None or (router.per_task and router.draw == "task")
        return alike and mixture.batch_tokens is None and mixture.group_size >= self.gang.world_size

    def _apply_gradients(self) -> None:
        trainable = [p for p in (*self.network.parameters(), *self.weights.parameters()) if p.requires_grad]
        if self.gang.world_size > 1:
            sum_gradients(trainable, even=self._even)
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
            part = "router" if name.startswith("routers.") else "heads" if name.startswith("heads.") else "backbone"
            groups.setdefault((part, parameter.ndim > 1 and part != "router"), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.train.lr * scales[part],
            "weight_decay": config.train.weight_decay if decay else 0.0,
        }
        for (part, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _mark_used(used: dict[int, Tensor], records: Sequence[Record]) -> None:
    """Set 1 in the (E + 1,) of each block for every expert that was chosen, in the last place where none was."""
    for record in records:
        weights, chosen = record.routing.weights, record.routing.chosen
        used.setdefault(record.block, weights.new_zeros(weights.shape[1] + 1))[chosen.flatten()] = 1.0


def _losses_of_units(batch: Batch, losses: Sequence[Tensor], record: Record) -> Tensor:
    """(U,) the loss of the example that each unit of ``record`` belongs to."""
    if record.part is not None:
        return losses[record.part][record.units.example]
    of_rows = [each if rows.owner is None else each[rows.owner] for rows, each in zip(batch.tasks, losses, strict=True)]
    return torch.cat(of_rows)[record.units.example]


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
