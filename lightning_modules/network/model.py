"""The network of one trial: a backbone, what its family puts at the seams, and one head per task.

Legend: B rows of a batch, N input sequences (a long one has several rows), n examples of one task, S positions, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_modules import adapter_moe, dense, task_moe
from lightning_modules.building import ConfigError
from lightning_modules.config import (
    SEQ2SEQ,
    AdapterMoEConfig,
    DenseConfig,
    GenerationConfig,
    ModelConfig,
    TaskMoEConfig,
    TrialConfig,
)
from lightning_modules.network.backbones import Backbone, load_backbone
from lightning_modules.network.dispatch import RoutedExperts, Rows, plan_routes
from lightning_modules.network.routers import Routing
from lightning_modules.network.task_heads.base import HeadSpec, States, TaskHead
from lightning_modules.network.task_heads.choice import ChoiceHead
from lightning_modules.network.task_heads.classification import ClassificationHead
from lightning_modules.network.task_heads.constituency import ConstituencyHead
from lightning_modules.network.task_heads.dependency import DependencyHead
from lightning_modules.network.task_heads.regression import RegressionHead
from lightning_modules.network.task_heads.spans import SpansHead
from lightning_modules.network.task_heads.srl import SRLHead
from lightning_modules.network.task_heads.tagging import TaggingHead
from lightning_modules.network.task_heads.text2text import sequence_loss
from lightning_modules.seeds import derive

if TYPE_CHECKING:
    from lightning_modules.data.batches import Batch, TaskRows

HEADS: dict[str, type[TaskHead]] = {
    "classification": ClassificationHead,
    "regression": RegressionHead,
    "choice": ChoiceHead,
    "tagging": TaggingHead,
    "spans": SpansHead,
    "dependency": DependencyHead,
    "constituency": ConstituencyHead,
    "srl": SRLHead,
}
"""The head of each kind; ``text2text`` has none: the decoder answers."""


class MultiTaskNetwork(nn.Module):
    """Backbone and heads; task number t of a batch has head t, or the decoder (text2text)."""

    def __init__(self, backbone: Backbone, heads: Sequence[TaskHead | None], label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict({str(task): head for task, head in enumerate(heads) if head is not None})
        self._label_smoothing = label_smoothing

    def losses(self, batch: Batch) -> list[Tensor]:
        """The loss of every example, (n,) float32 for each entry of ``batch.tasks``."""
        losses = []
        for rows, states in self._states(batch):
            head = self.head(rows.task)
            if head is not None:
                losses.append(head.loss(head(states), rows.labels))
                continue
            logits = self.backbone.decode(states.hidden, states.mask, rows.labels, self._decoder_routes(rows, states))
            losses.append(sequence_loss(logits, rows.labels, self._label_smoothing))
        return losses

    def answers(self, batch: Batch, generation: GenerationConfig, max_new_tokens: int) -> list[list[Any]]:
        """The predictions for each entry of ``batch.tasks``, one per example, in the form of ``data.kinds``; text2text: the
        generated token ids."""
        answers: list[list[Any]] = []
        for rows, states in self._states(batch):
            head = self.head(rows.task)
            if head is not None:
                answers.append(head.predict(head(states)))
                continue
            generated = self.backbone.generate(
                states.hidden,
                states.mask,
                self._decoder_routes(rows, states, generation.beams),
                beams=generation.beams,
                max_new_tokens=max_new_tokens,
                length_penalty=generation.length_penalty,
            )
            answers.append(generated.tolist())
        return answers

    def encode(self, batch: Batch) -> Tensor:
        """The encoder's states (B, S, d), each row along its task's route."""
        rows = tuple((group.task, group.start, group.stop) for group in batch.tasks)
        routes = self._routes(rows, range(self.backbone.num_encoder_blocks), batch.input_ids.device)
        return self.backbone.encode(batch.input_ids, batch.attention_mask, batch.token_type_ids, routes)

    def _states(self, batch: Batch) -> list[tuple[TaskRows, States]]:
        """What the heads read: for each entry of ``batch.tasks`` the states of its sequences, windows put together."""
        hidden = self.encode(batch)
        mask, words = batch.attention_mask.bool(), batch.word_index
        if batch.stitch is None or batch.starts is None:
            starts = torch.zeros_like(mask)
            starts[:, 0] = True
        else:
            index, starts = batch.stitch.clamp_min(0), batch.starts
            mask = batch.stitch >= 0
            hidden = hidden.flatten(0, 1)[index] * mask.unsqueeze(-1)
            words = words.flatten()[index].masked_fill(~mask, -1)
        return [
            (rows, States(hidden[of], mask[of], words[of], starts[of], rows.options))
            for rows in batch.tasks
            for of in (rows.sequences,)
        ]

    def _decoder_routes(self, rows: TaskRows, states: States, beams: int = 1) -> dict[int, Any]:
        blocks = range(self.backbone.num_encoder_blocks, self.backbone.num_blocks)
        return self._routes(((rows.task, 0, len(states.hidden) * beams),), blocks, states.hidden.device)

    def _routes(self, rows: Rows, blocks: range, device: torch.device) -> dict[int, Any]:
        routers = {layer: module.router for layer, module in self.routed().items() if layer in blocks}
        return dict(plan_routes(routers, rows, device))

    def head(self, task: int) -> TaskHead | None:
        """The head of task number ``task``; None where the decoder answers."""
        head = self.heads[str(task)] if str(task) in self.heads else None
        assert head is None or isinstance(head, TaskHead)
        return head

    def routed(self) -> dict[int, RoutedExperts]:
        """Block number -> the experts there; {} for dense."""
        return {
            seam.block: module
            for seam in self.backbone.seams()
            for module in (seam.replacement, seam.follower)
            if isinstance(module, RoutedExperts)
        }

    def route(self, task_ids: Tensor) -> dict[int, Routing]:
        """Block number -> routing of the tasks (R,) int64, without running the backbone; {} for dense."""
        return {layer: module.router(task_ids) for layer, module in self.routed().items()}


def build_network(config: TrialConfig, tasks: Sequence[HeadSpec], vocab_size: int | None = None) -> MultiTaskNetwork:
    """The network of a trial on the CPU, in training mode. It leaves the global random state alone.

    ``tasks`` in task order (name, kind, number of labels, facts; the rest is taken from ``config``); ``vocab_size`` is the
    tokenizer's (None: the backbone's own). Every part has a random stream of its own, so backbone and heads start the same
    whatever the other tasks and the family are.

    Raises:
        ConfigError: the backbone cannot be used, has no decoder for a ``text2text`` task, or has fewer blocks than
            ``model.layers`` names.
    """
    with torch.random.fork_rng(devices=[]):
        backbone = load_backbone(config.backbone, vocab_size, config.seed)
        for task in tasks:
            if task.kind == "text2text" and not backbone.is_seq2seq:
                law = f"must have a decoder ({', '.join(SEQ2SEQ)}) for the text2text task {task.name}"
                raise ConfigError("backbone.name", f"{law}, got {config.backbone.name!r}")
        _install(backbone, config.model, len(tasks), config.seed)
        if config.train.compile:
            backbone.compile_blocks()
        heads = [_head(task, backbone.hidden_size, config) for task in tasks]
        return MultiTaskNetwork(backbone, heads, config.train.label_smoothing).train()


def count_parameters(network: MultiTaskNetwork, num_tasks: int) -> dict[str, int]:
    """``total``, ``trainable`` and ``active`` parameters.

    ``active``: what one example uses, mean over the tasks: the backbone with its whole embedding tables, the chosen experts
    and the task's own row of each router, its own head.
    """
    routed = network.routed().values()
    shared = _size(network.backbone) - sum(_size(module) for module in routed)
    device = next(network.parameters()).device
    per_task = []
    for task in range(num_tasks):
        head, row = network.head(task), torch.tensor([task], device=device)
        per_task.append((_size(head) if head else 0) + sum(_active_size(module, row) for module in routed))
    return {
        "total": _size(network),
        "trainable": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "active": round(shared + fmean(per_task)),
    }


def _install(backbone: Backbone, model: ModelConfig, num_tasks: int, seed: int) -> None:
    match model:
        case DenseConfig():
            dense.install(backbone, model, num_tasks, seed)
        case TaskMoEConfig():
            task_moe.install(backbone, model, num_tasks, seed)
        case AdapterMoEConfig():
            adapter_moe.install(backbone, model, num_tasks, seed)


def _head(task: HeadSpec, hidden_size: int, config: TrialConfig) -> TaskHead | None:
    if task.kind == "text2text":
        return None
    if task.kind not in HEADS:
        raise ValueError(f"task {task.name}: kind must be one of {', '.join(HEADS)}, got {task.kind!r}")
    backbone, seed = config.backbone, derive(config.seed, "head", task.name)
    spec = replace(task, heads=config.heads, pooling=backbone.pooling, dropout=backbone.dropout, seed=seed)
    return HEADS[task.kind](hidden_size, spec)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _active_size(module: RoutedExperts, task: Tensor) -> int:
    """Parameters that one task (1,) uses of a block's experts and router."""
    router_row = sum(parameter.shape[-1] for parameter in module.router.parameters())
    chosen = module.router(task).chosen[0].tolist()
    return router_row + sum(_size(module.experts[e]) for e in chosen)
