"""Baselines: the trials that a candidate is compared with, derived from its configuration (specs/interference.md, part B).

* ``single_task``: each task of the mixture alone in a dense model, with as many updates on that task, of as many of its
  examples, as in the mixture (update-matched, B1). Family and routing play no part in it, so all candidates that share data,
  backbone and training share their single-task baselines.
* ``parameter_matched``: the capacity of the experts without a choice among them. ``task_moe``: a dense model whose routed
  blocks have wider feed-forward layers, with as many parameters as all experts, shared ones included. ``adapter_moe`` with E
  adapters of width m: one adapter of width E m.
* ``compute_matched``: the same with as many parameters as a row (or token) passes through: K under ``top_k``, E under ``soft``,
  one where parameters are merged or one expert is drawn; shared ones too.
* ``random_routing``: the same experts, each task sent to a fixed random one.
* ``uniform_routing``: the same experts, every task using all of them equally.
* ``frozen_backbone``: the backbone as it is, only the heads train (the floor B0): what the tasks get without sharing anything
  that learns. Not for mixtures with text2text tasks, which the backbone itself answers.

A dense model is widened by a whole number, the same at all routed blocks: the nearest for parameters, and rounded up for
compute, so that the control has no less. Both count weight matrices. Where experts are whole blocks, the attention that a dense
block has but once is made up for by its feed-forward layer; scores of the attention, which have no weights, are not counted.

A ``dense`` candidate has only the first and the last, and split experts, of which any K make one feed-forward layer, have no
control by random or uniform routing. A baseline that is its own candidate is left out of the plan. Baselines
start from no earlier trial (``trial.start``), and what their candidate froze because it had been loaded trains.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from lightning_modules.building import ConfigError
from lightning_modules.config import (
    AdapterMoEConfig,
    DenseConfig,
    MixtureConfig,
    ModelConfig,
    RouterConfig,
    StartConfig,
    TaskMoEConfig,
    TrialConfig,
)
from pipelines.architecture import Architecture, architecture_of


def single_task(config: TrialConfig, task: str, share: float) -> TrialConfig:
    """``task`` alone, update-matched: in a mixture with A groups per step of b examples, S steps and share p of the groups,
    the task is met in about A S p groups of b examples. Alone it gets k = max(1, round(p A)) groups per step, for
    round(S A p / k) steps, at least one.

    With a token budget a group has as many tokens instead. Adaptive sampling is matched to the shares that it starts with. What
    the baseline does not read is left out of its identity: the other tasks, their data, how they are sampled and weighed.
    """
    config, mixture = _dense(config, DenseConfig()), config.mixture
    groups = max(1, round(share * mixture.tasks_per_step))
    alone = MixtureConfig(
        tasks=(task,),
        batch_size=groups * mixture.group_size,
        tasks_per_step=groups,
        batch_tokens=None if mixture.group_tokens is None else groups * mixture.group_tokens,
        bucketing=mixture.bucketing,
        batching="single_task",
        sampling="uniform",
        low_resource={task: mixture.low_resource[task]} if task in mixture.low_resource else {},
    )
    steps = max(1, round(config.train.steps * mixture.tasks_per_step * share / groups))
    read = {"backbone", task, *config.backbone.size.tokenizer_tasks}
    return replace(
        config,
        mixture=alone,
        train=replace(config.train, steps=steps, eval_every=None, loss_weighting="uniform"),
        digests={name: digest for name, digest in config.digests.items() if name in read},
    )


def _dense(config: TrialConfig, model: DenseConfig) -> TrialConfig:
    """The candidate as a dense model that starts from no earlier trial. A frozen backbone part stays one, widened sub-layers
    aside, which train as the experts do for which they stand."""
    frozen = "backbone" in config.train.freeze and "backbone" not in config.start.load
    backbone = replace(config.backbone, frozen=config.backbone.frozen or frozen)
    return replace(config, model=model, backbone=backbone, start=StartConfig(), train=replace(config.train, freeze=()))


def _rerouted(config: TrialConfig, model: ModelConfig) -> TrialConfig:
    """The candidate with another router, from no earlier trial; what it froze of its own stays frozen."""
    freeze = tuple(part for part in config.train.freeze if part != "router" and part not in config.start.load)
    return replace(config, model=model, start=StartConfig(), train=replace(config.train, freeze=freeze))


def parameter_matched(config: TrialConfig) -> TrialConfig | None:
    """The candidate's capacity in one piece; None for a dense candidate.

    Raises:
        ConfigError: it takes sizes of the backbone that are not known before it is downloaded.
    """
    return _in_one_piece(config, "parameter_matched", lambda model, experts: experts, lambda wide: math.floor(wide + 0.5))


def compute_matched(config: TrialConfig) -> TrialConfig | None:
    """What one row passes through in one piece; None for a dense candidate.

    Raises:
        ConfigError: as :func:`parameter_matched`.
    """
    tokens = config.backbone.max_length
    return _in_one_piece(config, "compute_matched", lambda model, e: passed(model.router, e, tokens), math.ceil)


def passed(router: RouterConfig, num_experts: int, tokens: int) -> float:
    """Routed experts that a row, or a token, of a row of ``tokens`` tokens passes, in training, mean over the tokens."""
    if router.combine == "parameters":
        return 1
    match router.selection:
        case "soft" | "gumbel" | "skills":
            return num_experts
        case "top_k":
            return min(router.top_k, num_experts)
        case "expert_choice" | "task_expert_choice":
            return router.capacity or 1
        case "slots":
            return num_experts * router.slots / tokens
        case _:
            return 1


def _in_one_piece(
    config: TrialConfig,
    kind: str,
    counted: Callable[[TaskMoEConfig | AdapterMoEConfig, int], float],
    whole: Callable[[float], int],
) -> TrialConfig | None:
    """``counted``: routed experts of a block with as many -> those that count; ``whole`` rounds the multiple."""
    model = config.model
    if isinstance(model, DenseConfig):
        return None
    if isinstance(model, AdapterMoEConfig):
        router = RouterConfig(kind="uniform", selection="soft")
        width = math.ceil(model.bottleneck * counted(model, model.num_experts))
        return _rerouted(config, replace(model, num_experts=1, bottleneck=width, router=router))
    uniform = isinstance(model.num_experts, int) and isinstance(model.layers, tuple) and model.expert != "layer"
    architecture = None if uniform else _known(config, kind)
    multiple = max(1, whole(_width(model, architecture, counted)))
    if multiple == 1:
        return _dense(config, DenseConfig())
    layers = model.layers if isinstance(model.layers, tuple) else _blocks(model, architecture)
    return _dense(config, DenseConfig(ffn_multiple=multiple, layers=layers))


def _known(config: TrialConfig, kind: str) -> Architecture:
    architecture = architecture_of(config.backbone)
    stacks = None if architecture is None else architecture.stacks
    if architecture is None or stacks is None or not all(stack.ffn and stack.attention for stack in stacks):
        law = f"must not have {kind} here: it takes the sizes of {config.backbone.name!r}, which are not known before it is "
        raise ConfigError("baselines", law + "downloaded (or its config.json does not have them)")
    return architecture


def _blocks(model: TaskMoEConfig, architecture: Architecture | None) -> tuple[int, ...]:
    blocks = None if architecture is None else architecture.blocks(model.layers)
    assert blocks is not None
    return blocks


def _width(model: TaskMoEConfig, architecture: Architecture | None, counted: Callable[[TaskMoEConfig, int], float]) -> float:
    """Feed-forward weights that count over those of the routed blocks."""
    if architecture is None:
        assert isinstance(model.num_experts, int)
        return _units(model, counted(model, model.num_experts))
    blocks = _blocks(model, architecture)
    numbers = (model.num_experts,) * len(blocks) if isinstance(model.num_experts, int) else model.num_experts
    wanted = present = 0.0
    for block, number in zip(blocks, numbers, strict=True):
        stack, units = architecture.stack_of(block), _units(model, counted(model, number))
        ffn, attention = stack.ffn or 0, stack.attention or 0
        wanted += units * (ffn + attention) - attention if model.expert == "layer" else units * ffn
        present += ffn
    return wanted / present


def _units(model: TaskMoEConfig, routed_experts: float) -> float:
    """Experts as multiples of the block's own feed-forward layer (or of the whole block)."""
    units = routed_experts + model.shared_experts
    return units / model.router.top_k if model.expert == "ffn_split" else units


def routed(config: TrialConfig, kind: Literal["random", "uniform"]) -> TrialConfig | None:
    """The candidate with its router replaced; None for a dense candidate. Settings that only a learned router reads are left
    at their defaults, so that candidates that differ in nothing else share the baseline."""
    model = config.model
    if isinstance(model, DenseConfig) or (isinstance(model, TaskMoEConfig) and model.expert == "ffn_split"):
        return None
    router = RouterConfig(kind="random")
    if kind == "uniform":
        router = RouterConfig(kind="uniform", selection="soft", combine=model.router.combine)
    changed: ModelConfig = replace(model, router=router)
    return _rerouted(config, changed)


def whole_mixture(config: TrialConfig, kind: str) -> TrialConfig | None:
    """The baseline of ``kind`` that trains on the candidate's whole mixture, None where there is none."""
    match kind:
        case "parameter_matched":
            return parameter_matched(config)
        case "compute_matched":
            return compute_matched(config)
        case "random_routing":
            return routed(config, "random")
        case "uniform_routing":
            return routed(config, "uniform")
        case "frozen_backbone":
            floor = _dense(config, DenseConfig())
            return replace(floor, backbone=replace(floor.backbone, frozen=True))
        case _:
            raise ValueError(f"no baseline of kind {kind!r} trains on a whole mixture")
