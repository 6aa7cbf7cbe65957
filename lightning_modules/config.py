"""Every setting of one trial: frozen, keyword-only dataclasses. This file is the manual of the keys under ``trial:``.

No torch here: planning a sweep imports this file and must answer in about a second.
Values are checked where they are stored (``__post_init__``); :func:`lightning_modules.building.build` turns a plain mapping
(YAML) into these classes and reports every mistake as a :class:`ConfigError` with the key path, the law and the value.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal

from lightning_modules.building import require
from lightning_modules.router_config import RouterConfig

NUMERICS_VERSION = 3
"""Part of every trial's identity. Raise it when a change to the code alters a trial's numbers
(the golden losses in ``tests/golden`` fail when it should have been raised)."""

NOT_IN_IDENTITY = ("train.log_every", "train.checkpoint_every", "mixture.unrelated", "start.changes")
"""Key paths that cannot change a trial's scores, so they are left out of its id. (What ``start.changes`` says is in the
id of the earlier trial, ``start.trial``.)"""

Part = Literal["router", "experts", "backbone", "heads"]
"""Parts of a network that can be frozen, or taken from an earlier trial. ``router``: everything that decides on routes, task
vectors and tables included; ``experts``: routed and shared experts, adapters; ``heads``: of all tasks; ``backbone``: what
remains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TinySizeConfig:
    """Sizes of the built-in backbones (``tiny-encoder``: BERT, ``tiny-bart``, ``tiny-t5``), built from a config and
    initialised from the seed."""

    hidden_size: int = 64
    """Width d of the residual stream."""
    num_layers: int = 2
    """Number of transformer blocks; of ``tiny-bart`` and ``tiny-t5``: in the encoder, and as many in the decoder."""
    num_heads: int = 4
    """Attention heads per block; divides ``hidden_size``."""
    ffn_size: int = 128
    """Inner width of the feed-forward sub-layer."""
    vocab_size: int = 2000
    """Size of the byte-pair vocabulary that is trained on the training texts."""
    tokenizer_tasks: tuple[str, ...] = ()
    """Tasks whose training texts train the tokenizer; empty: the mixture's own tasks. Baselines that the plan adds get
    their candidate's list here, so that both sides read the same tokens."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "ffn_size"):
            require(getattr(self, name) >= 1, name, f"must be at least 1, got {getattr(self, name)}")
        require(
            self.vocab_size >= 300,
            "vocab_size",
            f"must be at least 300 (256 bytes and 5 special tokens), got {self.vocab_size}",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            "num_heads",
            f"must divide hidden_size, got num_heads={self.num_heads}, hidden_size={self.hidden_size}",
        )


BUILT_IN = ("tiny-encoder", "tiny-bart", "tiny-t5")
"""Backbones that are built from a config: no download, weights from the seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """The shared model: an encoder, or an encoder and a decoder (``text2text`` tasks need one)."""

    name: str = "tiny-encoder"
    """``tiny-encoder``, ``tiny-bart`` or ``tiny-t5`` (built from ``size``), a folder with a Hugging Face model and its
    tokenizer, or a Hub id. :data:`BACKBONES` lists the architectures."""
    revision: str | None = None
    """Commit of a Hub model; required for a Hub id (a branch can change under a trial's id)."""
    size: TinySizeConfig = field(default_factory=TinySizeConfig)
    """Sizes of the built-in backbones; any other brings its own."""
    max_length: int = 128
    """Tokens that the model reads at once, special tokens included. A longer input is read in several windows of this
    length, whose states are put together before the head (or the decoder) reads them."""
    window_overlap: float = 0.25
    """Share of a window that the next one reads again, so that every token has context on both sides; each token's state is
    taken from the window in which it stands further from the edge."""
    max_windows: int = 8
    """Windows of one input at most. Tokens beyond are cut, which the command and the report tell."""
    max_target_length: int = 64
    """Tokens of a ``text2text`` target that training and generation reach; longer targets are cut and counted."""
    pooling: Literal["first", "mean"] = "first"
    """What the heads of classification, regression and choice read: the first token's state (of a long input: the mean over
    its windows' first tokens), or the mean over all tokens."""
    dropout: float = 0.1
    """Dropout probability inside the backbone and before the heads."""
    frozen: bool = False
    """Keep the backbone's own weights fixed: only heads, experts, adapters and routers train."""
    gradient_checkpointing: bool = False
    """Compute the blocks' activations again in the backward instead of keeping them: less memory, more time, same numbers."""

    def __post_init__(self) -> None:
        require(self.max_length >= 8, "max_length", f"must be at least 8, got {self.max_length}")
        require(0 <= self.window_overlap <= 0.5, "window_overlap", f"must be in [0, 0.5], got {self.window_overlap}")
        require(self.max_windows >= 1, "max_windows", f"must be at least 1, got {self.max_windows}")
        require(self.max_target_length >= 2, "max_target_length", f"must be at least 2, got {self.max_target_length}")
        require(0 <= self.dropout < 1, "dropout", f"must be in [0, 1), got {self.dropout}")
        if self.built_in:
            require(self.revision is None, "revision", f"{self.name} has no revision")
        else:
            default = TinySizeConfig()
            changed = [f.name for f in fields(TinySizeConfig) if getattr(self.size, f.name) != getattr(default, f.name)]
            law = f"applies to {', '.join(BUILT_IN)} only, but name={self.name!r} and {', '.join(changed)} set"
            require(not changed, "size", law)

    @property
    def built_in(self) -> bool:
        """Whether it is built from ``size`` rather than read from a folder or the Hub."""
        return self.name in BUILT_IN

    @property
    def stacks(self) -> tuple[int, ...]:
        """Blocks of the encoder, or of encoder and decoder, of a built-in backbone; () for any other, which brings its own."""
        return (self.size.num_layers,) * (0 if not self.built_in else 1 if self.name == "tiny-encoder" else 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseConfig:
    """All tasks share every weight of the encoder; each has its own head."""

    family: Literal["dense"] = "dense"
    ffn_multiple: int = 1
    """Widen the feed-forward sub-layers of ``layers`` to this multiple, keeping the function they compute at the start:
    the parameter-matched control of a ``task_moe`` with as many experts. Above 1 they train even in a frozen backbone, as
    experts do."""
    layers: tuple[int, ...] = ()
    """Blocks that are widened, 0-based; empty: all."""

    def __post_init__(self) -> None:
        require(self.ffn_multiple >= 1, "ffn_multiple", f"must be at least 1, got {self.ffn_multiple}")
        _check_layers(self.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskMoEConfig:
    """Experts in place of the FFN sub-layer or of the whole block (specs/task_moe.md, specs/task_aware_gating.md)."""

    family: Literal["task_moe"] = "task_moe"
    num_experts: int | tuple[int, ...] = 4
    """Experts E per routed block, or a list with one number for each routed block."""
    layers: tuple[int, ...] | str = ()
    """Routed blocks, 0-based; empty: all. ``every_other``: blocks 1, 3, 5, ... of each stack; ``last:N``: the last N of each
    stack."""
    expert: Literal["ffn", "ffn_split", "layer"] = "ffn"
    """``ffn``: the block's feed-forward sub-layer, full size. ``ffn_split``: a K-th of its inner width, K the experts chosen
    per unit (``router.top_k``), so that any K costs what the dense block costs. ``layer``: the whole block (Ye et al. 2022)."""
    shared_experts: int = 0
    """Experts of the same size that every row passes as well, beside the routed ones. Their sum starts as the block's own
    function: each of the n + 1 parts starts with 1/(n + 1) of the output (split experts: where they cover all parts)."""
    init: Literal["upcycle", "fresh"] = "upcycle"
    """Experts start as noisy copies of the block's own (sparse upcycling), or from fresh weights."""
    expert_noise: float = 0.01
    """Gaussian noise of copies relative to each weight tensor's standard deviation (0 leaves identical copies that only routing
    can tell apart)."""
    dispatch: Literal["auto", "loop", "grouped"] = "auto"
    """How tokens reach their experts: one matrix product per expert (``loop``, any dtype), or one grouped product for all
    (``grouped``). ``auto``: the faster that the widths and the dtype allow. Same numbers up to rounding."""
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        counts = (self.num_experts,) if isinstance(self.num_experts, int) else self.num_experts
        require(bool(counts), "num_experts", "must name at least one number, got []")
        for count in counts:
            _check_experts(count, self.router)
        _check_layers(self.layers)
        listed = len(self.layers) if isinstance(self.layers, tuple) else 0
        if isinstance(self.num_experts, tuple) and listed:
            law = f"must have one number for each of layers={list(self.layers)}, got {list(self.num_experts)}"
            require(len(self.num_experts) == listed, "num_experts", law)
        require(self.expert_noise >= 0, "expert_noise", f"must not be negative, got {self.expert_noise}")
        if self.init == "fresh":
            require(self.expert_noise == 0.01, "expert_noise", f"applies to init: upcycle only, got {self.expert_noise}")
        require(self.shared_experts >= 0, "shared_experts", f"must not be negative, got {self.shared_experts}")
        law = f"must be 0 with expert: layer, whose blocks bring their own residual, got {self.shared_experts}"
        require(self.expert != "layer" or self.shared_experts == 0, "shared_experts", law)
        law = f"must not route tokens with expert: layer, whose attention needs whole rows, got kind={self.router.kind!r}"
        require(self.expert != "layer" or self.router.kind not in ("token", "hash_token"), "router.kind", law)
        split = self.expert == "ffn_split"
        law = f"must choose by top_k with expert: ffn_split, got kind={self.router.kind!r}, selection={self.router.selection!r}"
        require(not split or (self.router.selection == "top_k" and self.router.learned), "router.selection", law)
        merged = f"must be outputs with expert: ffn_split, whose experts hold different units, got {self.router.combine!r}"
        require(not split or self.router.combine == "outputs", "router.combine", merged)
        halves = "must not be random_example with expert: layer, which has no two projections to draw apart"
        require(self.expert != "layer" or self.router.kind != "random_example", "router.kind", halves)
        tokens = self.router.kind in ("token", "hash_token")
        law = f"applies to routers of tokens (kind: token, hash_token), got dispatch={self.dispatch!r}, {self.router.kind!r}"
        require(self.dispatch == "auto" or tokens or self.expert == "layer", "dispatch", law)
        products = "must be auto or loop with expert: layer, which has no grouped product, got grouped"
        require(self.expert != "layer" or self.dispatch != "grouped", "dispatch", products)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterMoEConfig:
    """Bottleneck adapters after the FFN sub-layer, mixed per task (specs/adapter_moe.md 4.1, R1)."""

    family: Literal["adapter_moe"] = "adapter_moe"
    num_experts: int = 4
    """Adapters E per block."""
    bottleneck: int = 16
    """Inner width m of one adapter."""
    layers: tuple[int, ...] = ()
    """Blocks with adapters, 0-based; empty: all."""
    router: RouterConfig = field(default_factory=lambda: RouterConfig(selection="soft"))
    """Default: soft mixing of the outputs (R1, ``task_softmax``)."""

    def __post_init__(self) -> None:
        _check_experts(self.num_experts, self.router)
        _check_layers(self.layers)
        require(self.bottleneck >= 1, "bottleneck", f"must be at least 1, got {self.bottleneck}")


ModelConfig = DenseConfig | TaskMoEConfig | AdapterMoEConfig
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2", "distilbert", "modernbert")
"""Encoder architectures (Hugging Face's ``model_type``) whose seams we know; DeBERTa-v3 is a ``deberta-v2``."""
SEQ2SEQ = ("bart", "t5")
"""Encoder-decoder architectures whose seams we know. Only these can train ``text2text`` tasks."""
BACKBONES = (*ENCODERS, *SEQ2SEQ)
FAMILIES: dict[str, type] = {"dense": DenseConfig, "task_moe": TaskMoEConfig, "adapter_moe": AdapterMoEConfig}


def chosen_blocks(layers: tuple[int, ...] | str, stacks: Sequence[int]) -> tuple[int, ...]:
    """Block numbers, ascending, that ``layers`` stands for in a backbone whose stacks have that many blocks.

    Raises:
        ConfigError: a number is beyond the last block, or ``last:N`` asks for more than a stack has.
    """
    total = sum(stacks)
    if not isinstance(layers, str):
        law = f"must be below the backbone's {total} blocks, got {list(layers)}"
        require(max(layers, default=0) < total, "model.layers", law)
        return tuple(sorted(layers)) or tuple(range(total))
    chosen: list[int] = []
    start = 0
    for blocks in stacks:
        if layers == "every_other":
            chosen += range(start + 1, start + blocks, 2)
        else:
            last = int(layers.removeprefix("last:"))
            require(last <= blocks, "model.layers", f"must be at most the {blocks} blocks of a stack, got {layers!r}")
            chosen += range(start + blocks - last, start + blocks)
        start += blocks
    require(bool(chosen), "model.layers", f"must leave at least one block, got {layers!r} of {list(stacks)} blocks")
    return tuple(chosen)


def _check_layers(layers: tuple[int, ...] | str) -> None:
    if isinstance(layers, str):
        law = f"must be a list of block numbers, every_other, or last:N with N >= 1, got {layers!r}"
        require(re.fullmatch(r"every_other|last:[1-9]\d*", layers) is not None, "layers", law)
        return
    require(all(i >= 0 for i in layers), "layers", f"must be block numbers from 0, got {list(layers)}")
    require(len(set(layers)) == len(layers), "layers", f"must name each block once, got {list(layers)}")


def _check_experts(num_experts: int, router: RouterConfig) -> None:
    require(num_experts >= 1, "num_experts", f"must be at least 1, got {num_experts}")
    if router.selection == "top_k":
        require(
            router.top_k <= num_experts,
            "router.top_k",
            f"must be in 1..num_experts, got top_k={router.top_k}, num_experts={num_experts}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    """Which tasks train together and how often each is drawn."""

    tasks: tuple[str, ...] = ()
    """Task names or patterns (``planted/*``), by category (``category:sentiment/*``) or kind (``kind:tagging``); a leading
    ``!`` takes matches out again. The plan replaces patterns by the names they stand for, in catalogue order."""
    batch_size: int = 64
    """Examples per optimiser step, over all workers. Not read where ``batch_tokens`` is set."""
    batch_tokens: int | None = None
    """Token budget per optimiser step instead of a number of examples: each group holds as many examples of its task, of
    similar length, as fit into ``batch_tokens / tasks_per_step`` tokens with their padding. None: ``batch_size`` counts."""
    bucketing: bool = True
    """Cut groups from examples of similar length (less padding). False: as the shuffled epoch comes."""
    tasks_per_step: int = 4
    """Groups of one task each that make up a step; divides ``batch_size``. A group holds ``batch_size / tasks_per_step``
    examples of one task, of similar length."""
    batching: Literal["single_task", "mixed"] = "single_task"
    """``single_task``: one forward and backward per group, gradients accumulated. ``mixed``: all groups of a step in one
    forward, rows sorted by task. Same examples and, dropout aside, the same gradients."""
    sampling: Literal["proportional", "temperature", "uniform", "capped", "unimax", "weights", "adaptive"] = "temperature"
    """Share of task t: n_t (proportional), n_t^(1/temperature), equal (uniform), min(n_t, cap) (capped), equal but no task
    repeated more than ``max_epochs`` times (unimax; Chung et al. 2023), ``weights``, or learned while training (adaptive:
    the bandit of Albalak et al. 2023, online data mixing, which draws tasks with a high loss more often)."""
    temperature: float = 2.0
    """Exponent 1/temperature of ``sampling: temperature``; 1 is proportional, large is uniform."""
    cap: int | None = None
    """Size limit K of ``sampling: capped`` (examples-proportional mixing of T5)."""
    max_epochs: float | None = None
    """Passes over its training examples that ``sampling: unimax`` allows a task."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Task name or pattern -> relative share, of ``sampling: weights``; every trained task must have one."""
    adapt_every: int | None = None
    """Steps between two changes of the shares of ``sampling: adaptive``."""
    low_resource: Mapping[str, int] = field(default_factory=dict)
    """Role ``low_resource``: task name or pattern -> training examples kept (a fixed subset: a smaller n is part of a larger
    one)."""
    held_out: tuple[str, ...] = ()
    """Role ``held_out``: names or patterns of tasks that are scored, but never trained on (``text2text`` only: any other kind
    has a head of its own that would never train)."""
    unrelated: tuple[str, ...] = ()
    """Role ``unrelated``: names or patterns of tasks that train like the others, but serve as a control: they are compared as
    a group of their own and left out of the means over tasks."""

    def __post_init__(self) -> None:
        require(self.tasks_per_step >= 1, "tasks_per_step", f"must be at least 1, got {self.tasks_per_step}")
        require(
            self.batch_size >= 1 and self.batch_size % self.tasks_per_step == 0,
            "batch_size",
            "must be a positive multiple of tasks_per_step, "
            f"got batch_size={self.batch_size}, tasks_per_step={self.tasks_per_step}",
        )
        require(self.temperature > 0, "temperature", f"must be positive, got {self.temperature}")
        require(
            self.batch_tokens is None or self.batch_tokens >= self.tasks_per_step,
            "batch_tokens",
            f"must be at least tasks_per_step, got batch_tokens={self.batch_tokens}, tasks_per_step={self.tasks_per_step}",
        )
        self._check_rule()
        for name, n in self.low_resource.items():
            require(n >= 1, f"low_resource.{name}", f"must be at least 1 example, got {n}")

    def _check_rule(self) -> None:
        """Each sampling rule has its own settings; those of another one must stay at their defaults."""
        rules: dict[str, tuple[str, Any]] = {
            "temperature": ("temperature", 2.0),
            "cap": ("capped", None),
            "max_epochs": ("unimax", None),
            "weights": ("weights", {}),
            "adapt_every": ("adaptive", None),
        }
        for name, (rule, default) in rules.items():
            value = getattr(self, name)
            law = f"applies to sampling: {rule} only, got sampling={self.sampling!r}, {name}={value}"
            require(self.sampling == rule or value == default, name, law)
        for name in ("cap", "adapt_every"):
            value, rule = getattr(self, name), rules[name][0]
            if self.sampling == rule:
                require(value is not None and value >= 1, name, f"must be at least 1 for sampling: {rule}, got {value}")
        if self.sampling == "unimax":
            law = f"must be positive for sampling: unimax, got {self.max_epochs}"
            require(self.max_epochs is not None and self.max_epochs > 0, "max_epochs", law)
            law = f"must be null with sampling: unimax, whose plan counts examples, got {self.batch_tokens}"
            require(self.batch_tokens is None, "batch_tokens", law)
        if self.sampling == "weights":
            require(bool(self.weights), "weights", "must give every task a share for sampling: weights, got none")
        for name, weight in self.weights.items():
            require(weight > 0, f"weights.{name}", f"must be positive, got {weight}")

    @property
    def group_size(self) -> int:
        """Examples of one task in one group of a step (without ``batch_tokens``)."""
        return self.batch_size // self.tasks_per_step

    @property
    def group_tokens(self) -> int | None:
        """Tokens, padding included, of one group of a step with ``batch_tokens``."""
        return None if self.batch_tokens is None else self.batch_tokens // self.tasks_per_step


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How much of each task is used."""

    form: Literal["native", "text2text"] = "native"
    """``native``: each task as its kind says. ``text2text``: classification, regression and choice tasks are posed as text to
    text too (their catalogue entry's ``prompt``, or the one of their kind)."""
    few_shot: int | None = None
    """Train on k examples per class (other kinds: 2 k in all), and select on as many of dev; None: all. A draw's sample of a
    smaller k is part of that of a larger one."""
    draw: int = 0
    """Which of the five few-shot samples (0 to 4; the CrossFit gym has as many)."""
    max_train: int | None = None
    """At most this many training examples per task (a fixed subset), None: all."""
    max_eval: int | None = None
    """At most this many dev and test examples per task (a fixed subset), None: all."""

    def __post_init__(self) -> None:
        for name in ("few_shot", "max_train", "max_eval"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, f"must be at least 1, got {value}")
        require(0 <= self.draw <= 4, "draw", f"must be in 0..4, got {self.draw}")
        law = f"applies with few_shot only, got few_shot=null, draw={self.draw}"
        require(self.few_shot is not None or self.draw == 0, "draw", law)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadsConfig:
    """Sizes of the task heads and how they decode. Defaults: the decoders of specs/interference.md A2."""

    dropout: float = 0.33
    """Dropout inside the MLPs of the structured heads (spans, dependency, constituency, srl)."""
    spans: Literal["biaffine", "bio"] = "biaffine"
    """Named entities by scoring every span (Yu et al. 2020) or by BIO tags."""
    span_size: int = 150
    """Width of the start and end projections of ``spans`` and of the span and predicate projections of ``srl``."""
    arc_size: int = 500
    """Width of the arc MLPs of ``dependency`` and of the span MLPs of ``constituency``."""
    label_size: int = 100
    """Width of the label MLPs of ``dependency``, ``constituency`` and ``srl``."""
    tree: Literal["projective", "nonprojective", "greedy"] = "nonprojective"
    """How ``dependency`` decodes: the best projective tree (Eisner), the best tree (Chu-Liu/Edmonds), or each word's best head
    (no tree guaranteed)."""
    srl_max_width: int = 30
    """Longest argument, in words."""
    srl_argument_ratio: float = 0.8
    """Arguments kept for scoring, as a share of the words."""
    srl_predicate_ratio: float = 0.4
    """Predicates kept for scoring, as a share of the words."""

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, "dropout", f"must be in [0, 1), got {self.dropout}")
        for name in ("span_size", "arc_size", "label_size", "srl_max_width"):
            require(getattr(self, name) >= 1, name, f"must be at least 1, got {getattr(self, name)}")
        for name in ("srl_argument_ratio", "srl_predicate_ratio"):
            require(getattr(self, name) > 0, name, f"must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """How ``text2text`` answers are generated when scoring. Deterministic."""

    beams: int = 4
    """Width of the beam search; 1: greedy."""
    length_penalty: float = 1.0
    """A hypothesis is ranked by its log-probability over its length to this power."""

    def __post_init__(self) -> None:
        require(self.beams >= 1, "beams", f"must be at least 1, got {self.beams}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Optimisation. AdamW (fused); experts that a step did not use stand still (their gradient is None)."""

    steps: int = 600
    """Optimiser steps."""
    lr: float = 1e-3
    """Peak learning rate."""
    head_lr_scale: float = 1.0
    """Learning rate of the task heads relative to ``lr`` (He and Choi: 20, encoder 5e-5 and decoders 1e-3)."""
    loss_weighting: Literal["uniform", "size", "balance", "uncertainty"] = "uniform"
    """Weight of task t's loss: 1; n_t over the mean n (size); (sum_k L_k) / (T L_t) with L the mean of a task's last 5 losses
    (balance, He and Choi's moving average, here with mean weight about 1); or learned, exp(-s_t) L_t + s_t / 2 (uncertainty;
    Kendall et al. 2018)."""
    label_smoothing: float = 0.0
    """Share of a ``text2text`` target's probability that is spread over the vocabulary."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After warm-up: to zero linearly, to zero along a cosine, or unchanged."""
    warmup: float = 0.06
    """Share of the steps over which the learning rate rises linearly from zero."""
    weight_decay: float = 0.01
    """AdamW's decoupled decay; not applied to biases, norms and router logits."""
    clip: float | None = 1.0
    """Largest global gradient norm, None: no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: autocast, weights kept in float32; router logits and losses stay in float32."""
    eval_every: int | None = None
    """Score dev every this many steps as well as at the end; None: at the end only."""
    log_every: int = 20
    """Write the means of the training losses every this many steps."""
    checkpoint_every: int = 200
    """Write a checkpoint every this many steps."""
    eval_batch_size: int = 256
    """Examples per forward when scoring."""
    compile: bool = False
    """``torch.compile`` the backbone; worth it for long trials only (it needs a C++ compiler on a CPU)."""
    freeze: tuple[Part, ...] = ()
    """Parts that do not train: ``router``, ``experts``, ``backbone``, ``heads``. (``backbone.frozen`` leaves what a family puts
    into the backbone trainable as well, such as a widened feed-forward sub-layer; ``freeze: [backbone]`` does not.)"""

    def __post_init__(self) -> None:
        require(len(set(self.freeze)) == len(self.freeze), "freeze", f"must name each part once, got {list(self.freeze)}")
        for name in ("steps", "log_every", "checkpoint_every", "eval_batch_size"):
            require(getattr(self, name) >= 1, name, f"must be at least 1, got {getattr(self, name)}")
        require(self.eval_every is None or self.eval_every >= 1, "eval_every", f"must be at least 1, got {self.eval_every}")
        require(self.lr > 0, "lr", f"must be positive, got {self.lr}")
        require(self.head_lr_scale > 0, "head_lr_scale", f"must be positive, got {self.head_lr_scale}")
        require(0 <= self.label_smoothing < 1, "label_smoothing", f"must be in [0, 1), got {self.label_smoothing}")
        require(0 <= self.warmup < 1, "warmup", f"must be in [0, 1), got {self.warmup}")
        require(self.weight_decay >= 0, "weight_decay", f"must not be negative, got {self.weight_decay}")
        require(self.clip is None or self.clip > 0, "clip", f"must be positive, got {self.clip}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StartConfig:
    """Start from the final weights of an earlier trial: the later stage of a training in stages (specs/task_moe.md 1.6).

    The earlier trial is this one without its ``start`` and ``train.freeze``, with ``changes``, and of the same seed. The plan
    adds it, and it trains once however many trials start from it, in whatever sweep.
    """

    load: tuple[Part, ...] = ()
    """Parts taken from the earlier trial; everything else starts anew. Tasks are matched by name: what belongs to a task that
    the earlier trial did not have starts anew too. Empty: the trial starts from no other."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Key path -> value: what the earlier trial has other than this one (``model.router.selection: gumbel_st``). A ``start`` of
    its own makes three stages."""
    trial: str = ""
    """Id of the earlier trial. The plan fills it in; it is not set by hand."""

    def __post_init__(self) -> None:
        require(len(set(self.load)) == len(self.load), "load", f"must name each part once, got {list(self.load)}")
        law = f"must name the parts to take from the earlier trial, got [] with changes={dict(self.changes)}"
        require(bool(self.load) or not (self.changes or self.trial), "load", law)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialConfig:
    """One fully resolved configuration and one seed."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    model: ModelConfig = field(default_factory=DenseConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    data: DataConfig = field(default_factory=DataConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    start: StartConfig = field(default_factory=StartConfig)
    """An earlier trial to start from; default: none."""
    seed: int = 0
    """Drives initialisation, data order, dropout and random routes."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Content of what the trial reads: task name -> digest, and ``backbone`` -> digest for a folder or Hub model.
    The plan fills it in; it is not set by hand."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", f"must not be negative, got {self.seed}")
        law = "cannot compile a backbone that computes its activations again (backbone.gradient_checkpointing), got true"
        require(not (self.train.compile and self.backbone.gradient_checkpointing), "train.compile", law)
        if self.backbone.built_in:
            chosen_blocks(self.model.layers, self.backbone.stacks)
        self._check_parts()
        model = self.model
        if not isinstance(model, DenseConfig):
            known = model.router.diversity == 0 or "experts" not in self.start.load
            law = "must be 0 where experts come from an earlier trial, whose common start is not known, got start.load: experts"
            require(known, "model.router.diversity", law)
            law = "must be 0 where experts do not train (train.freeze), got freeze=experts"
            require(model.router.diversity == 0 or "experts" not in self.train.freeze, "model.router.diversity", law)
        # The second computation would come after the merged parameters have been taken out of the block again.
        merged = isinstance(model, TaskMoEConfig) and model.expert == "layer" and model.router.combine == "parameters"
        law = "cannot compute whole layers of merged parameters again (model.router.combine: parameters), got true"
        require(not (merged and self.backbone.gradient_checkpointing), "backbone.gradient_checkpointing", law)

    def _check_parts(self) -> None:
        """Only a routed network has experts and a router, and only a learned router has something to freeze."""
        for key, parts in (("train.freeze", self.train.freeze), ("start.load", self.start.load)):
            if isinstance(self.model, DenseConfig):
                law = f"must not name what a dense network lacks (router, experts), got {list(parts)}"
                require(not {"router", "experts"} & set(parts), key, law)
        there = {"heads", "backbone"} | (set() if isinstance(self.model, DenseConfig) else {"router", "experts"})
        law = f"must leave something to train, got {list(self.train.freeze)}"
        require(not there <= set(self.train.freeze), "train.freeze", law)
        if isinstance(self.model, DenseConfig) or "router" not in self.train.freeze:
            return
        router = self.model.router
        law = f"must not name the router, which has nothing to learn with kind: {router.kind}, got {list(self.train.freeze)}"
        require(router.learned, "train.freeze", law)
        own = {"mutual_information": 0.0, "z_loss": 0.0, "entropy": 0.0, "supervision": 0.0, "balance": "none"}
        moved = [name for name, default in own.items() if getattr(router, name) != default]
        moved += ["selection: sampled"] if router.selection == "sampled" else []
        law = f"must not name a router that losses of its own would train ({', '.join(moved)}), got {list(self.train.freeze)}"
        require(not moved, "train.freeze", law)

    @property
    def trial_id(self) -> str:
        """``<family>-<12 hex>``: a hash of everything that can change the trial's numbers (DESIGN 4.2)."""
        content = {"numerics": NUMERICS_VERSION, "config": identity(self)}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return f"{self.model.family}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def to_plain(config: Any) -> Any:
    """Dataclasses, tuples and mappings as plain dicts and lists, for YAML and JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, Mapping):
        return {str(k): to_plain(v) for k, v in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_plain(v) for v in config]
    return config


def identity(config: TrialConfig) -> dict[str, Any]:
    """The part of ``config`` that is hashed: without :data:`NOT_IN_IDENTITY` and without values equal to their default, so
    that a new setting with a default leaves old ids alone. ``backbone.name`` of a folder counts by its content only."""
    pruned = _without_defaults(config, "")
    if "backbone" in config.digests:
        pruned.get("backbone", {}).pop("name", None)
    return pruned


def _without_defaults(config: Any, path: str) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for f in fields(config):
        key = f"{path}{f.name}"
        value = getattr(config, f.name)
        if key in NOT_IN_IDENTITY:
            continue
        if dataclasses.is_dataclass(value):
            # Against the default as pruned: a group that differs only in NOT_IN_IDENTITY is no difference.
            inner = _without_defaults(value, f"{key}.")
            if inner != _pruned_default(type(config), f.name, key):
                kept[f.name] = inner
            continue
        default = _default(f)
        if f.name != "family" and (value == default or (isinstance(value, list) and tuple(value) == default)):
            continue
        if isinstance(f.default, float) and not isinstance(value, bool) and isinstance(value, (int, float)):
            kept[f.name] = float(value)
        else:
            kept[f.name] = to_plain(value)
    return kept


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else None


@cache
def _pruned_default(cls: Any, name: str, key: str) -> dict[str, Any] | None:
    default = _default(next(f for f in fields(cls) if f.name == name))
    return _without_defaults(default, f"{key}.") if dataclasses.is_dataclass(default) else None


def flatten(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> ``{"train.lr": 1e-3, ...}``; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{path}."))
        else:
            flat[path] = value
    return flat
