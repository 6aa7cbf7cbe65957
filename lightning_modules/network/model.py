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
    DenseConfig,
    GenerationConfig,
    TaskMoEConfig,
    TrialConfig,
)
from lightning_modules.network.backbones import Backbone, load_backbone
from lightning_modules.network.dispatch import RoutedExperts
from lightning_modules.network.routers.record import Record, Rows
from lightning_modules.network.routers.routers import Routers, Sites
from lightning_modules.network.routers.traffic import Traffic
from lightning_modules.network.task_heads.base import HeadSpec, States, TaskHead
from lightning_modules.network.task_heads.choice import ChoiceHead
from lightning_modules.network.task_heads.classification import ClassificationHead
from lightning_modules.network.task_heads.constituency import ConstituencyHead
from lightning_modules.network.task_heads.dependency import DependencyHead
from lightning_modules.network.task_heads.regression import RegressionHead
from lightning_modules.network.task_heads.spans import SpansHead
from lightning_modules.network.task_heads.srl import SRLHead
from lightning_modules.network.task_heads.tagging import TaggingHead
from lightning_modules.network.task_heads.text2text import sequence_divergence, sequence_loss
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
    """Backbone, routers (None: dense) and heads; task number t of a batch has head t, or the decoder (text2text)."""

    def __init__(
        self,
        backbone: Backbone,
        heads: Sequence[TaskHead | None],
        routers: Routers | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.routers = routers
        self.heads = nn.ModuleDict({str(task): head for task, head in enumerate(heads) if head is not None})
        self._label_smoothing = label_smoothing

    def losses(self, batch: Batch, records: list[Record] | None = None) -> list[Tensor]:
        """The loss of every example, (n,) float32 for each entry of ``batch.tasks``. ``records`` gets what was routed."""
        return [self._loss(rows, outputs) for rows, outputs in self._outputs(batch, records)]

    def compared_losses(self, batch: Batch, records: list[Record] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The losses of one pass, and how far the answers of a second one, with draws of its own, are from the first's:
        symmetric KL divergence, half of each direction (AdaMix), (n,) for each entry of ``batch.tasks``."""
        first, second = self._outputs(batch, records), self._outputs(batch, None)
        divergences = []
        for (rows, a), (_, b) in zip(first, second, strict=True):
            head = self.head(rows.task)
            divergences.append(sequence_divergence(a, b, rows.labels) if head is None else head.divergence(a, b))
        return [self._loss(rows, outputs) for rows, outputs in first], divergences

    def answers(
        self, batch: Batch, generation: GenerationConfig, max_new_tokens: int, records: list[Record] | None = None
    ) -> list[list[Any]]:
        """The predictions for each entry of ``batch.tasks``, one per example, in the form of ``data.kinds``; text2text: the
        generated token ids. ``records`` gets what the encoder's blocks routed."""
        answers: list[list[Any]] = []
        for rows, states in self._states(batch, records):
            head = self.head(rows.task)
            if head is not None:
                answers.append(head.predict(head(states)))
                continue
            traffic = self._decoder_traffic(rows, states, None, generation.beams)
            _collect(traffic, None)
            generated = self.backbone.generate(
                states.hidden,
                states.mask,
                self._handed(traffic),
                beams=generation.beams,
                max_new_tokens=max_new_tokens,
                length_penalty=generation.length_penalty,
            )
            answers.append(generated.tolist())
        return answers

    def encode(self, batch: Batch, records: list[Record] | None = None) -> Tensor:
        """The encoder's states (B, S, d), each row along its route."""
        traffic = None
        if self.routers is not None:
            rows = tuple((group.task, group.start, group.stop) for group in batch.tasks)
            traffic = Traffic(
                self.routers,
                rows,
                batch.input_ids.device,
                mask=batch.attention_mask,
                input_ids=batch.input_ids,
                weights=torch.cat([_weights_of_rows(group) for group in batch.tasks]),
            )
        states = self.backbone.encode(batch.input_ids, batch.attention_mask, batch.token_type_ids, self._handed(traffic))
        _collect(traffic, records)
        return states

    def _outputs(self, batch: Batch, records: list[Record] | None) -> list[tuple[TaskRows, Any]]:
        """For each entry of ``batch.tasks`` what its head computes, or the decoder's logits (n, T, V)."""
        found: list[tuple[TaskRows, Any]] = []
        for part, (rows, states) in enumerate(self._states(batch, records)):
            head = self.head(rows.task)
            if head is not None:
                found.append((rows, head(states)))
                continue
            traffic = self._decoder_traffic(rows, states, rows.labels >= 0)
            found.append((rows, self.backbone.decode(states.hidden, states.mask, rows.labels, self._handed(traffic))))
            _collect(traffic, records, part)
        return found

    def _loss(self, rows: TaskRows, outputs: Any) -> Tensor:
        head = self.head(rows.task)
        return sequence_loss(outputs, rows.labels, self._label_smoothing) if head is None else head.loss(outputs, rows.labels)

    def _states(self, batch: Batch, records: list[Record] | None) -> list[tuple[TaskRows, States]]:
        """What the heads read: for each entry of ``batch.tasks`` the states of its sequences, windows put together."""
        hidden = self.encode(batch, records)
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

    def _decoder_traffic(self, rows: TaskRows, states: States, mask: Tensor | None, beams: int = 1) -> Traffic | None:
        """Every example is a row, or ``beams`` rows side by side; ``mask`` (n, T) of the targets, None while generating."""
        if self.routers is None:
            return None
        real = states.mask.unsqueeze(-1)
        summary = (states.hidden.float() * real).sum(1) / real.sum(1)
        of_rows: Rows = ((rows.task, 0, len(summary) * beams),)
        device = states.hidden.device
        summary, weights = (each.repeat_interleave(beams, 0) for each in (summary, rows.weights / beams))
        return Traffic(self.routers, of_rows, device, mask=mask, summary=summary, weights=weights)

    def _handed(self, traffic: Traffic | None) -> dict[int, Any]:
        return {} if traffic is None else dict.fromkeys(range(self.backbone.num_blocks), traffic)

    def head(self, task: int) -> TaskHead | None:
        """The head of task number ``task``; None where the decoder answers."""
        head = self.heads[str(task)] if str(task) in self.heads else None
        assert head is None or isinstance(head, TaskHead)
        return head

    def routed(self) -> dict[int, RoutedExperts]:
        """Block number -> the experts there; {} for dense."""
        return {module.block: module for module in self.backbone.modules() if isinstance(module, RoutedExperts)}


def _weights_of_rows(group: TaskRows) -> Tensor:
    """(stop - start,) what each row of the group counts: an example's weight is shared by its rows."""
    if group.owner is None:
        return group.weights
    rows = torch.zeros_like(group.weights).index_add(0, group.owner, torch.ones_like(group.owner, dtype=torch.float32))
    return (group.weights / rows)[group.owner]


def _collect(traffic: Traffic | None, records: list[Record] | None, part: int | None = None) -> None:
    if traffic is not None:
        made = traffic.close()
        if records is not None:
            records.extend(replace(record, part=part) for record in made)


def build_network(
    config: TrialConfig, tasks: Sequence[HeadSpec], vocab_size: int | None = None, vectors: Tensor | None = None
) -> MultiTaskNetwork:
    """The network of a trial on the CPU, in training mode. It leaves the global random state alone.

    ``tasks`` in task order (name, kind, number of labels, facts; the rest is taken from ``config``); ``vocab_size`` is the
    tokenizer's (None: the backbone's own); ``vectors`` (T, width) are computed task vectors, where the router reads some. Every
    part has a random stream of its own, so backbone and heads start the same whatever the other tasks and the family are.

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
        routers = _install(backbone, config, tasks, vectors)
        if config.train.compile:
            backbone.compile_blocks()
        heads = [_head(task, backbone.hidden_size, config) for task in tasks]
        return MultiTaskNetwork(backbone, heads, routers, config.train.label_smoothing).train()


def count_parameters(network: MultiTaskNetwork, num_tasks: int) -> dict[str, int]:
    """``total``, ``trainable`` and ``active`` parameters.

    ``active``: what one example uses, mean over the tasks: the backbone with its whole embedding tables, the experts that its
    route takes and its part of each router, its own head. Merged experts count as what is read, not as what runs.
    """
    routers, routed = network.routers, network.routed()
    shared = _size(network.backbone) - sum(_size(module.experts) for module in routed.values())
    per_task = []
    for task in range(num_tasks):
        head = network.head(task)
        size = _size(head) if head else 0
        for block, module in routed.items():
            assert routers is not None
            size += routers.active_size(block) + sum(_size(module.experts[e]) for e in routers.active_experts(block, task))
        per_task.append(size)
    return {
        "total": _size(network),
        "trainable": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "active": round(shared + fmean(per_task)),
    }


def _install(backbone: Backbone, config: TrialConfig, tasks: Sequence[HeadSpec], vectors: Tensor | None) -> Routers | None:
    """Put the family's modules at the seams; the routers that they ask, None for dense."""
    model, seed = config.model, config.seed
    if isinstance(model, DenseConfig):
        dense.install(backbone, model, seed)
        return None
    if isinstance(model, TaskMoEConfig):
        experts = task_moe.install(backbone, model, seed)
    else:
        experts = adapter_moe.install(backbone, model, seed)
    vocabulary = backbone.model.config.vocab_size
    sites = Sites(experts, backbone.hidden_size, vocabulary, config.train.steps, backbone.num_encoder_blocks)
    decoded = [number for number, task in enumerate(tasks) if task.kind == "text2text"]
    return Routers(model.router, sites, [task.name for task in tasks], vectors, seed, decoded)


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
