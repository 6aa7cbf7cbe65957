"""Baselines: the trials that a candidate is compared with, derived from its configuration (specs/interference.md, part B).

* ``single_task``: each task of the mixture alone in a dense model, with as many updates on that task, of as many of its
  examples, as in the mixture (update-matched, B1). Family and routing play no part in it, so all candidates that share data,
  backbone and training share their single-task baselines.
* ``parameter_matched``: the capacity of the experts without a choice among them. ``task_moe`` with E experts: a dense model
  with feed-forward layers E times as wide. ``adapter_moe`` with E adapters of width m: one adapter of width E m.
* ``random_routing``: the same experts, each task sent to a fixed random one.
* ``uniform_routing``: the same experts, every task using all of them equally.
* ``frozen_backbone``: the backbone as it is, only the heads train (the floor B0): what the tasks get without sharing anything
  that learns. Not for mixtures with text2text tasks, which the backbone itself answers.

A ``dense`` candidate has only the first and the last. A baseline that is its own candidate is left out of the plan.
"""

from dataclasses import replace
from typing import Literal

from lightning_modules.config import (
    AdapterMoEConfig,
    DenseConfig,
    MixtureConfig,
    ModelConfig,
    RouterConfig,
    TaskMoEConfig,
    TrialConfig,
)


def single_task(config: TrialConfig, task: str, share: float) -> TrialConfig:
    """``task`` alone, update-matched: in a mixture with A groups per step of b examples, S steps and share p of the groups,
    the task is met in about A S p groups of b examples. Alone it gets k = max(1, round(p A)) groups per step, for
    round(S A p / k) steps, at least one.

    With a token budget a group has as many tokens instead. Adaptive sampling is matched to the shares that it starts with. What
    the baseline does not read is left out of its identity: the other tasks, their data, how they are sampled and weighed.
    """
    mixture = config.mixture
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
        model=DenseConfig(),
        mixture=alone,
        train=replace(config.train, steps=steps, eval_every=None, loss_weighting="uniform"),
        digests={name: digest for name, digest in config.digests.items() if name in read},
    )


def parameter_matched(config: TrialConfig) -> TrialConfig | None:
    """The candidate's capacity in one piece; None for a dense candidate."""
    model = config.model
    if isinstance(model, TaskMoEConfig):
        layers = model.layers if model.num_experts > 1 else ()
        return replace(config, model=DenseConfig(ffn_multiple=model.num_experts, layers=layers))
    if isinstance(model, AdapterMoEConfig):
        router = RouterConfig(kind="uniform", selection="soft")
        width = model.bottleneck * model.num_experts
        return replace(config, model=replace(model, num_experts=1, bottleneck=width, router=router))
    return None


def routed(config: TrialConfig, kind: Literal["random", "uniform"]) -> TrialConfig | None:
    """The candidate with its router replaced; None for a dense candidate. Settings that only a learned router reads are left
    at their defaults, so that candidates that differ in nothing else share the baseline."""
    model = config.model
    if isinstance(model, DenseConfig):
        return None
    router = RouterConfig(kind=kind, selection="soft" if kind == "uniform" else "top_k", combine=model.router.combine)
    changed: ModelConfig = replace(model, router=router)
    return replace(config, model=changed)


def whole_mixture(config: TrialConfig, kind: str) -> TrialConfig | None:
    """The baseline of ``kind`` that trains on the candidate's whole mixture, None where there is none."""
    match kind:
        case "parameter_matched":
            return parameter_matched(config)
        case "random_routing":
            return routed(config, "random")
        case "uniform_routing":
            return routed(config, "uniform")
        case "frozen_backbone":
            return replace(config, model=DenseConfig(), backbone=replace(config.backbone, frozen=True))
        case _:
            raise ValueError(f"no baseline of kind {kind!r} trains on a whole mixture")
