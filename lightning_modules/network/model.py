"""The network of one trial: an encoder, what its family puts at the seams, and one head per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_modules import adapter_moe, dense, task_moe
from lightning_modules.config import AdapterMoEConfig, DenseConfig, ModelConfig, TaskMoEConfig, TrialConfig
from lightning_modules.network.backbones import Encoder, load_backbone
from lightning_modules.network.dispatch import RoutedExperts, plan_routes
from lightning_modules.network.routers import Routing
from lightning_modules.network.task_heads.base import TaskHead
from lightning_modules.network.task_heads.classification import ClassificationHead
from lightning_modules.network.task_heads.regression import RegressionHead
from lightning_modules.network.task_heads.tagging import TaggingHead
from lightning_modules.seeds import derive

if TYPE_CHECKING:
    from lightning_modules.data.batches import Batch


@dataclass(frozen=True)
class HeadSpec:
    """One task's head: the task's name (its random stream), its kind, and how many labels it has (regression: 1)."""

    name: str
    kind: str
    num_labels: int


class MultiTaskNetwork(nn.Module):
    """Encoder and heads; task number t of a batch has head t."""

    def __init__(self, encoder: Encoder, heads: Sequence[TaskHead]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(heads)

    def forward(self, batch: Batch) -> list[Tensor]:
        """The outputs of each entry of ``batch.tasks`` by its task's head, which sees that entry's rows only."""
        hidden = self.encode(batch)
        spans = [(group.task, slice(group.start, group.stop)) for group in batch.tasks]
        return [self.heads[task](hidden[of], batch.attention_mask[of], batch.word_index[of]) for task, of in spans]

    def encode(self, batch: Batch) -> Tensor:
        """The encoder's states (B, S, d), each row along its task's route."""
        rows = tuple((group.task, group.start, group.stop) for group in batch.tasks)
        routers = {layer: module.router for layer, module in self.routed().items()}
        routes = plan_routes(routers, rows, batch.input_ids.device)
        return self.encoder(batch.input_ids, batch.attention_mask, batch.token_type_ids, routes)

    def head(self, task: int) -> TaskHead:
        """The head of task number ``task``."""
        head = self.heads[task]
        assert isinstance(head, TaskHead)
        return head

    def routed(self) -> dict[int, RoutedExperts]:
        """Block number -> the experts there; {} for dense."""
        return {
            layer: module
            for layer, seam in enumerate(self.encoder.seams())
            for module in (seam.replacement, seam.follower)
            if isinstance(module, RoutedExperts)
        }

    def route(self, task_ids: Tensor) -> dict[int, Routing]:
        """Block number -> routing of the tasks (R,) int64, without running the encoder; {} for dense."""
        return {layer: module.router(task_ids) for layer, module in self.routed().items()}


def build_network(config: TrialConfig, heads: Sequence[HeadSpec], vocab_size: int | None = None) -> MultiTaskNetwork:
    """The network of a trial on the CPU, in training mode. It leaves the global random state alone.

    ``heads`` in task order; ``vocab_size`` is the tokenizer's (None: the backbone's own). Every part has a random stream of
    its own, so encoder and heads start the same whatever the other tasks and the family are.

    Raises:
        ConfigError: the backbone cannot be used, or has fewer blocks than ``model.layers`` names.
    """
    with torch.random.fork_rng(devices=[]):
        encoder = load_backbone(config.backbone, vocab_size, config.seed)
        _install(encoder, config.model, len(heads), config.seed)
        modules = [_head(spec, encoder.hidden_size, config.backbone.dropout, config.seed) for spec in heads]
        return MultiTaskNetwork(encoder, modules).train()


def count_parameters(network: MultiTaskNetwork) -> dict[str, int]:
    """``total``, ``trainable`` and ``active`` parameters.

    ``active``: what one example uses, mean over the tasks: the encoder with its whole embedding tables, the chosen experts
    and the task's own row of each router, its own head.
    """
    routed = network.routed().values()
    shared = _size(network.encoder) - sum(_size(module) for module in routed)
    per_task = []
    for task, head in enumerate(network.heads):
        row = torch.tensor([task], device=next(head.parameters()).device)
        per_task.append(_size(head) + sum(_active_size(module, row) for module in routed))
    return {
        "total": _size(network),
        "trainable": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "active": round(shared + fmean(per_task)),
    }


def _install(encoder: Encoder, model: ModelConfig, num_tasks: int, seed: int) -> None:
    match model:
        case DenseConfig():
            dense.install(encoder, model, num_tasks, seed)
        case TaskMoEConfig():
            task_moe.install(encoder, model, num_tasks, seed)
        case AdapterMoEConfig():
            adapter_moe.install(encoder, model, num_tasks, seed)


def _head(spec: HeadSpec, hidden_size: int, dropout: float, seed: int) -> TaskHead:
    kinds: dict[str, type[TaskHead]] = {
        "classification": ClassificationHead,
        "regression": RegressionHead,
        "tagging": TaggingHead,
    }
    if spec.kind not in kinds:
        raise ValueError(f"task {spec.name}: kind must be one of {', '.join(kinds)}, got {spec.kind!r}")
    return kinds[spec.kind](hidden_size, spec.num_labels, dropout, derive(seed, "head", spec.name))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _active_size(module: RoutedExperts, task: Tensor) -> int:
    """Parameters that one task (1,) uses of a block's experts and router."""
    router_row = sum(parameter.shape[-1] for parameter in module.router.parameters())
    chosen = module.router(task).chosen[0].tolist()
    return router_row + sum(_size(module.experts[e]) for e in chosen)
