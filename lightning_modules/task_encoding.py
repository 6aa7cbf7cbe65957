"""What a task looks like to the trial's backbone: the raw vector of one task (specs/task_moe.md 1.5).

Legend: B rows, S positions, N input sequences, n examples, d hidden width, m bottleneck, D width of a raw vector.

After Ye et al. (2022), whose scripts are released in part only. What differs here, and why:

* ``text_embedding``: the **encoder's** states, of real tokens only. Theirs are the decoder's, with the padding in the mean.
* ``fine_tuned``: every example of the sample counts. Theirs reads one example of each batch of eight.
* ``fisher``: one adapter behind every feed-forward sub-layer, changing nothing at first. Theirs start as all ones: then all
  units of a bottleneck have the same gradients and stay copies of each other, and the pretrained function is gone at once.
* The last two train for :attr:`Effort.steps` with the trial's own optimiser settings and batch size. Theirs: 2500 steps, lr
  3e-5, batch 8.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.building import require
from lightning_modules.config import (
    NUMERICS_VERSION,
    AdapterMoEConfig,
    BackboneConfig,
    DenseConfig,
    MixtureConfig,
    TrainConfig,
    TrialConfig,
    identity,
)
from lightning_modules.data.batches import Batch, Part, StepBatches, chosen_rows, collate, eval_batches
from lightning_modules.data.prepared import TaskData, prepared_folder
from lightning_modules.data.tokenizer import load_tokenizer, tokenizer_key
from lightning_modules.gang import Gang, make_trainer
from lightning_modules.multitask import MultiTaskModule
from lightning_modules.network.backbones import Backbone, load_backbone
from lightning_modules.network.experts import Bottleneck
from lightning_modules.network.model import MultiTaskNetwork
from lightning_modules.router_config import RouterConfig

VERSION = 1
"""Raise when the same settings and data give other vectors."""

BOTTLENECK = 8
"""Inner width m of the adapters of ``fisher``; Ye et al.'s."""

ROWS = 32
"""Rows per forward."""

TRAINED = ("fine_tuned", "fisher")
"""Sources for which each task trains alone first, with its labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How much goes into one task's vector."""

    examples: int = 256
    """Training examples that it is a mean over, at most: a fixed subset of those that the trial uses."""
    steps: int = 200
    """Optimiser steps on the task alone, of ``fine_tuned`` and ``fisher``."""


STANDARD = Effort()


class TaskEncoder:
    """Raw vectors of single tasks, of the kind ``router.task_vectors``."""

    def __init__(self, config: TrialConfig, router: RouterConfig, root: Path, device: torch.device, effort: Effort) -> None:
        """``root``: folder of the prepared data."""
        self._config, self._root, self._device, self._effort = config, root, device, effort
        self._source, self._descriptions = router.task_vectors, router.descriptions
        self._frozen = cache(self._load_frozen)

    def key(self, task: TaskData) -> dict[str, Any]:
        """All that the task's raw vector depends on; its last bits depend on what is under ``machine``, too."""
        if self._source == "description":
            read = [tokenizer_key(self._config), self._description(task.name)]
        else:
            read = [prepared_folder(self._config, task.name, self._root).name, self._effort.examples]
        return {
            "version": [VERSION, NUMERICS_VERSION],
            "source": self._source,
            "settings": identity(self._settings(task.name)),
            "read": read,
            "machine": [self._device.type, torch.get_num_threads(), str(torch.__version__)],
        }

    def raw(self, task: TaskData) -> np.ndarray:
        """The vector (D,) float64 of ``task``. The global random state is left as it is.

        Raises:
            ConfigError: the task has no description or no training example.
            RuntimeError: the vector is not finite.
        """
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            vector = self._vector(task).cpu().numpy()
        if not np.isfinite(vector).all():
            hint = "; a smaller train.lr or train.clip may help" if self._source in TRAINED else ""
            raise RuntimeError(f"the {self._source} vector of task {task.name} is not finite{hint}")
        return vector

    def _vector(self, task: TaskData) -> Tensor:
        if self._source == "description":
            return self._described(task)
        settings = self._settings(task.name)
        sample = limited(settings, self._effort.examples)
        law = f"must not be {self._source}, for which task {task.name} has no training example"
        require(len(chosen_rows(sample, task, "train")) > 0, "model.router.task_vectors", law)
        if self._source not in TRAINED:
            return mean_state(self._frozen(task.vocab_size), sample, task, first=self._source == "centroid")
        network = train_alone(settings, task, self._device)
        if self._source == "fisher":
            return adapter_fisher(network, sample, task)
        return mean_state(network.backbone, sample, task, first=False)

    def _described(self, task: TaskData) -> Tensor:
        """The mean state of the description's tokens, without those beyond ``max_length``."""
        tokenizer = load_tokenizer(self._root / f"tokenizer-{tokenizer_key(self._config)}")
        longest = self._config.backbone.max_length
        text = self._description(task.name)
        encoded = tokenizer(text, truncation=True, max_length=longest, return_token_type_ids=True)
        ids, types = (torch.tensor([encoded[name]], device=self._device) for name in ("input_ids", "token_type_ids"))
        with torch.no_grad():
            states = self._frozen(task.vocab_size).encode(ids, torch.ones_like(ids), types, {})
        return states[0].double().mean(0)

    def _description(self, task: str) -> str:
        text = self._descriptions.get(task, "").strip()
        require(bool(text), "model.router.descriptions", f"must have a text for task {task}, got none")
        return text

    def _load_frozen(self, vocab_size: int) -> Backbone:
        return load_backbone(self._config.backbone, vocab_size, self._config.seed).to(self._device).eval()

    def _settings(self, task: str) -> TrialConfig:
        """The trial's settings that decide on the vector, the others at their defaults, so that trials that differ in nothing
        else share it; for :data:`TRAINED` the trial that trains the task alone. The data themselves are not named here."""
        if self._source == "description":
            return _still(self._config)
        trained = self._source in TRAINED
        settings = _moving(self._config, self._source, self._effort.steps) if trained else _still(self._config)
        low_resource = {name: n for name, n in self._config.mixture.low_resource.items() if name == task}
        own = replace(settings.mixture, tasks=(task,), low_resource=low_resource)
        return replace(settings, mixture=own, data=replace(self._config.data, max_eval=None))


def _still(config: TrialConfig) -> TrialConfig:
    """What decides on the states of the backbone as the trial starts with it."""
    backbone = _shared_backbone(config, dropout=0.0, pooling="first", frozen=False, gradient_checkpointing=False)
    seed = config.seed if backbone.built_in else 0
    return TrialConfig(backbone=backbone, train=TrainConfig(eval_batch_size=ROWS), seed=seed, digests=_backbone_digest(config))


def _moving(config: TrialConfig, source: str, steps: int) -> TrialConfig:
    """What decides on the network of a task that trains alone. A backbone that is frozen in the trial is not frozen for
    ``fine_tuned``, whose vectors could not move otherwise; that of ``fisher`` always is."""
    mixture, fisher = config.mixture, source == "fisher"
    uniform = RouterConfig(kind="uniform", selection="soft")
    adapters = AdapterMoEConfig(num_experts=1, bottleneck=BOTTLENECK, router=uniform)
    own = MixtureConfig(
        batch_size=mixture.batch_size,
        batch_tokens=mixture.batch_tokens,
        tasks_per_step=mixture.tasks_per_step,
        bucketing=mixture.bucketing,
        sampling="uniform",
    )
    train = replace(
        config.train,
        steps=steps,
        eval_every=None,
        eval_batch_size=ROWS,
        loss_weighting="uniform",
        compile=False,
        precision="fp32",
    )
    return TrialConfig(
        backbone=_shared_backbone(config, frozen=fisher),
        model=adapters if fisher else DenseConfig(),
        mixture=own,
        heads=config.heads,
        train=train,
        seed=config.seed,
        digests=_backbone_digest(config),
    )


def _shared_backbone(config: TrialConfig, **changes: Any) -> BackboneConfig:
    """The backbone without the names of the tasks that trained its tokenizer: :meth:`TaskEncoder.key` names its content."""
    return replace(config.backbone, size=replace(config.backbone.size, tokenizer_tasks=()), **changes)


def _backbone_digest(config: TrialConfig) -> dict[str, str]:
    return {name: digest for name, digest in config.digests.items() if name == "backbone"}


def limited(config: TrialConfig, examples: int) -> TrialConfig:
    """``config`` with at most ``examples`` of the training examples that it leaves a task: a fixed subset of them."""
    return replace(config, data=replace(config.data, max_train=min(examples, config.data.max_train or examples)))


def train_alone(config: TrialConfig, task: TaskData, device: torch.device) -> MultiTaskNetwork:
    """The network of ``config`` after its training on ``task``, its only task, in evaluation mode."""
    batches = StepBatches(config, [task])
    module = MultiTaskModule(config, [task], batches)
    trainer = make_trainer(Gang(), gpu=device.type == "cuda")
    trainer.fit(module, map(batches.batches, range(config.train.steps)))
    return module.network.to(device).eval()


def mean_state(backbone: Backbone, config: TrialConfig, task: TaskData, *, first: bool) -> Tensor:
    """The mean (d,) float64, over the training examples that ``config`` leaves ``task``, of :func:`pooled` encoder states.

    ``backbone`` is in evaluation mode and has none of a family's modules at its seams.
    """
    device = next(backbone.parameters()).device
    total, count = torch.zeros(backbone.hidden_size, dtype=torch.float64, device=device), 0
    with torch.no_grad():
        for rows, on_cpu in eval_batches(config, 0, task, "train"):
            batch = on_cpu.to(device)
            hidden = backbone.encode(batch.input_ids, batch.attention_mask, batch.token_type_ids, {})
            total += pooled(hidden, batch, first=first).double().sum(0)
            count += len(rows)
    return total / count


def pooled(hidden: Tensor, batch: Batch, *, first: bool) -> Tensor:
    """States (B, S, d) of a batch of one task -> one for each of its examples (n, d): the mean over the input's real tokens,
    special ones included, or its first token's state (``first``; of a long input: the mean over its windows' first tokens).
    Padding does not count, nor a token twice where windows overlap. Of a choice: the mean over its options."""
    if batch.stitch is None or batch.starts is None:
        weights = batch.attention_mask.clone()
        if first:
            weights[:, 1:] = 0
    else:
        weights = batch.starts if first else batch.stitch >= 0
        hidden = hidden.flatten(0, 1)[batch.stitch.clamp_min(0)]
    weights = weights.to(hidden.dtype)
    sequences = (weights[:, None, :] @ hidden).squeeze(1) / weights.sum(-1, keepdim=True)
    options = batch.tasks[0].options
    return sequences if options is None else torch.stack([one.mean(0) for one in sequences.split(options.tolist())])


def adapter_fisher(network: MultiTaskNetwork, config: TrialConfig, task: TaskData) -> Tensor:
    """The diagonal (D,) float64 of the empirical Fisher information of the adapters' weight matrices: over the training
    examples that ``config`` leaves ``task``, one at a time, the mean square of the gradient of the loss with the gold labels.

    Adapter by adapter, first the projection down (m, d), then the one up (d, m).
    """
    adapters = [module for module in network.modules() if isinstance(module, Bottleneck)]
    weights = [layer.weight for adapter in adapters for layer in (adapter.down, adapter.up)]
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    rows = chosen_rows(config, task, "train")
    for row in rows:
        batch = collate([Part(0, task, "train", np.array([row]))]).to(weights[0].device)
        (losses,) = network.losses(batch)
        # A head reads the encoder: adapters in a decoder that does not answer get no gradient.
        gradients = torch.autograd.grad(losses.sum(), weights, materialize_grads=True)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.double().square()
    return torch.cat([total.flatten() for total in sums]) / len(rows)
