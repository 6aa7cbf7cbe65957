"""Every setting of one trial: frozen, keyword-only dataclasses. This file is the manual of the keys under ``trial:``.

No torch here: planning a sweep imports this file and must answer in about a second.
Values are checked where they are stored (``__post_init__``); :func:`build` turns a plain mapping (YAML) into these
classes and reports every mistake as a :class:`ConfigError` with the key path, the law and the value.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NUMERICS_VERSION = 1
"""Part of every trial's identity. Raise it when a change to the code alters a trial's numbers
(the golden losses in ``tests/golden`` fail when it should have been raised)."""

NOT_IN_IDENTITY = ("train.log_every", "train.checkpoint_every")
"""Key paths that cannot change a trial's scores, so they are left out of its id."""


class ConfigError(ValueError):
    """A setting breaks a law. ``key`` is the dotted path of the culprit, ``law`` says what must hold and what was given."""

    def __init__(self, key: str, law: str) -> None:
        super().__init__(f"{key}: {law}" if key else law)
        self.key = key
        self.law = law

    def under(self, prefix: str) -> "ConfigError":
        """The same error, its key path seen from one level further out."""
        return ConfigError(f"{prefix}.{self.key}" if self.key else prefix, self.law)


def _require(condition: bool, key: str, law: str) -> None:
    if not condition:
        raise ConfigError(key, law)


@dataclass(frozen=True, kw_only=True, slots=True)
class TinySizeConfig:
    """Sizes of the built-in ``tiny-encoder``: a BERT encoder built from a config, initialised from the seed."""

    hidden_size: int = 64
    """Width d of the residual stream."""
    num_layers: int = 2
    """Number of transformer blocks."""
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
            _require(getattr(self, name) >= 1, name, f"must be at least 1, got {getattr(self, name)}")
        _require(
            self.vocab_size >= 300,
            "vocab_size",
            f"must be at least 300 (256 bytes and 5 special tokens), got {self.vocab_size}",
        )
        _require(
            self.hidden_size % self.num_heads == 0,
            "num_heads",
            f"must divide hidden_size, got num_heads={self.num_heads}, hidden_size={self.hidden_size}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """The shared encoder."""

    name: str = "tiny-encoder"
    """``tiny-encoder``, a folder with a Hugging Face encoder and its tokenizer, or a Hub id."""
    revision: str | None = None
    """Commit of a Hub model; required for a Hub id (a branch can change under a trial's id)."""
    size: TinySizeConfig = field(default_factory=TinySizeConfig)
    """Sizes of ``tiny-encoder``; any other backbone brings its own."""
    max_length: int = 128
    """Longest input in tokens, special tokens included; what is cut is counted and logged."""
    dropout: float = 0.1
    """Dropout probability inside the encoder and before the heads."""
    frozen: bool = False
    """Keep the encoder's own weights fixed: only heads, experts, adapters and routers train."""

    def __post_init__(self) -> None:
        _require(self.max_length >= 8, "max_length", f"must be at least 8, got {self.max_length}")
        _require(0 <= self.dropout < 1, "dropout", f"must be in [0, 1), got {self.dropout}")
        if self.name != "tiny-encoder":
            default = TinySizeConfig()
            changed = [f.name for f in fields(TinySizeConfig) if getattr(self.size, f.name) != getattr(default, f.name)]
            _require(not changed, "size", f"applies to tiny-encoder only, but name={self.name!r} and {', '.join(changed)} set")
        else:
            _require(self.revision is None, "revision", "tiny-encoder has no revision")


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """How experts are chosen and weighted. Every kind returns the same routing record."""

    kind: Literal["task", "random", "uniform"] = "task"
    """``task``: one learned logit vector per task and layer, softmax over experts.
    ``random``: a fixed random expert per task and layer, drawn from the seed (a buffer, never trained): top-1.
    ``uniform``: weight 1/E for every expert, always (average routing): soft."""
    selection: Literal["top_k", "soft"] = "top_k"
    """``top_k``: only the k most probable experts run. ``soft``: all experts, weighted by their probability."""
    top_k: int = 1
    """Experts per task under ``top_k``. k = 1 uses the straight-through weight 1 + p - sg(p); k >= 2 renormalises
    (specs/task_aware_gating.md 2.3: both leave a pretrained function intact and give the router a gradient)."""
    combine: Literal["outputs", "parameters"] = "outputs"
    """Mix the experts' outputs, or their parameters (then one expert runs, whatever E is; SMEAR)."""
    temperature: float = 1.0
    """Divides the logits before the softmax."""
    init_std: float = 0.02
    """Standard deviation of the router's initial logits."""
    lr_scale: float = 10.0
    """Learning rate of the router relative to ``train.lr`` (Poly's ratio is 10)."""
    mutual_information: float = 0.0
    """Weight of -I(task; expert) over the step's tasks (Mod-Squad): balanced over tasks, sharp for each."""

    def __post_init__(self) -> None:
        _require(self.top_k >= 1, "top_k", f"must be at least 1, got {self.top_k}")
        _require(self.temperature > 0, "temperature", f"must be positive, got {self.temperature}")
        _require(self.init_std >= 0, "init_std", f"must not be negative, got {self.init_std}")
        _require(self.lr_scale >= 0, "lr_scale", f"must not be negative, got {self.lr_scale}")
        _require(self.mutual_information >= 0, "mutual_information", f"must not be negative, got {self.mutual_information}")
        if self.kind == "task" and self.selection == "top_k":
            _require(
                self.init_std > 0,
                "init_std",
                "must be positive for a learned top_k router: equal logits send every task to the same expert",
            )
        if self.kind != "task":
            self._check_fixed()

    def _check_fixed(self) -> None:
        """A fixed router has nothing to learn, and its kind says how many experts it weighs."""
        for name, default in (("mutual_information", 0.0), ("temperature", 1.0), ("init_std", 0.02), ("lr_scale", 10.0)):
            value = getattr(self, name)
            _require(value == default, name, f"applies to kind: task only, got kind={self.kind!r}, {name}={value}")
        object.__setattr__(self, "selection", "soft" if self.kind == "uniform" else "top_k")
        object.__setattr__(self, "top_k", 1)


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
        _require(self.ffn_multiple >= 1, "ffn_multiple", f"must be at least 1, got {self.ffn_multiple}")
        _check_layers(self.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskMoEConfig:
    """Feed-forward experts in place of the FFN sub-layer, chosen per task (specs/task_moe.md, task_aware_gating.md)."""

    family: Literal["task_moe"] = "task_moe"
    num_experts: int = 4
    """Experts E per routed block; each has the backbone's FFN size."""
    layers: tuple[int, ...] = ()
    """Routed blocks, 0-based; empty: all."""
    expert_noise: float = 0.01
    """Experts start as copies of the block's FFN plus Gaussian noise of this size relative to each weight tensor's
    standard deviation (sparse upcycling; 0 leaves identical copies that only routing can tell apart)."""
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        _check_experts(self.num_experts, self.router)
        _check_layers(self.layers)
        _require(self.expert_noise >= 0, "expert_noise", f"must not be negative, got {self.expert_noise}")


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
        _require(self.bottleneck >= 1, "bottleneck", f"must be at least 1, got {self.bottleneck}")


ModelConfig = DenseConfig | TaskMoEConfig | AdapterMoEConfig
BACKBONES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
"""Architectures (Hugging Face's ``model_type``) whose feed-forward sub-layers we know how to reach."""
FAMILIES: dict[str, type] = {"dense": DenseConfig, "task_moe": TaskMoEConfig, "adapter_moe": AdapterMoEConfig}


def _check_layers(layers: tuple[int, ...]) -> None:
    _require(all(i >= 0 for i in layers), "layers", f"must be block numbers from 0, got {list(layers)}")
    _require(len(set(layers)) == len(layers), "layers", f"must name each block once, got {list(layers)}")


def _check_experts(num_experts: int, router: RouterConfig) -> None:
    _require(num_experts >= 1, "num_experts", f"must be at least 1, got {num_experts}")
    if router.selection == "top_k":
        _require(
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
    """Examples per optimiser step, over all workers."""
    tasks_per_step: int = 4
    """Groups of one task each that make up a step; divides ``batch_size``. A group holds ``batch_size / tasks_per_step``
    examples of one task, of similar length."""
    batching: Literal["single_task", "mixed"] = "single_task"
    """``single_task``: one forward and backward per group, gradients accumulated. ``mixed``: all groups of a step in one
    forward, rows sorted by task. Same examples and, dropout aside, the same gradients."""
    sampling: Literal["proportional", "temperature", "uniform", "capped"] = "temperature"
    """Share of task t: n_t (proportional), n_t^(1/temperature), equal (uniform), or min(n_t, cap) (capped)."""
    temperature: float = 2.0
    """Exponent 1/temperature of ``sampling: temperature``; 1 is proportional, large is uniform."""
    cap: int | None = None
    """Size limit K of ``sampling: capped`` (examples-proportional mixing of T5)."""
    low_resource: Mapping[str, int] = field(default_factory=dict)
    """Task name or pattern -> training examples kept (a fixed subset: a smaller n is part of a larger one)."""

    def __post_init__(self) -> None:
        _require(self.tasks_per_step >= 1, "tasks_per_step", f"must be at least 1, got {self.tasks_per_step}")
        _require(
            self.batch_size >= 1 and self.batch_size % self.tasks_per_step == 0,
            "batch_size",
            "must be a positive multiple of tasks_per_step, "
            f"got batch_size={self.batch_size}, tasks_per_step={self.tasks_per_step}",
        )
        _require(self.temperature > 0, "temperature", f"must be positive, got {self.temperature}")
        _require(
            self.sampling == "temperature" or self.temperature == 2.0,
            "temperature",
            f"applies to sampling: temperature only, got sampling={self.sampling!r}, temperature={self.temperature}",
        )
        if self.sampling == "capped":
            _require(self.cap is not None and self.cap >= 1, "cap", f"must be at least 1 for sampling: capped, got {self.cap}")
        else:
            _require(
                self.cap is None, "cap", f"applies to sampling: capped only, got sampling={self.sampling!r}, cap={self.cap}"
            )
        for name, n in self.low_resource.items():
            _require(n >= 1, f"low_resource.{name}", f"must be at least 1 example, got {n}")

    @property
    def group_size(self) -> int:
        """Examples of one task in one group of a step."""
        return self.batch_size // self.tasks_per_step


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How much of each task is used."""

    max_train: int | None = None
    """At most this many training examples per task (a fixed subset), None: all."""
    max_eval: int | None = None
    """At most this many dev and test examples per task (a fixed subset), None: all."""

    def __post_init__(self) -> None:
        for name in ("max_train", "max_eval"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, f"must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Optimisation. AdamW (fused); experts that a step did not use stand still (their gradient is None)."""

    steps: int = 600
    """Optimiser steps."""
    lr: float = 1e-3
    """Peak learning rate."""
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

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "eval_batch_size"):
            _require(getattr(self, name) >= 1, name, f"must be at least 1, got {getattr(self, name)}")
        _require(self.eval_every is None or self.eval_every >= 1, "eval_every", f"must be at least 1, got {self.eval_every}")
        _require(self.lr > 0, "lr", f"must be positive, got {self.lr}")
        _require(0 <= self.warmup < 1, "warmup", f"must be in [0, 1), got {self.warmup}")
        _require(self.weight_decay >= 0, "weight_decay", f"must not be negative, got {self.weight_decay}")
        _require(self.clip is None or self.clip > 0, "clip", f"must be positive, got {self.clip}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialConfig:
    """One fully resolved configuration and one seed."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    model: ModelConfig = field(default_factory=DenseConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    """Drives initialisation, data order, dropout and random routes."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Content of what the trial reads: task name -> digest, and ``backbone`` -> digest for a folder or Hub model.
    The plan fills it in; it is not set by hand."""

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", f"must not be negative, got {self.seed}")
        layers = getattr(self.model, "layers", ())
        if self.backbone.name == "tiny-encoder" and layers:
            _require(
                max(layers) < self.backbone.size.num_layers,
                "model.layers",
                "must be below backbone.size.num_layers, "
                f"got layers={list(layers)}, num_layers={self.backbone.size.num_layers}",
            )

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


def build(cls: Any, value: Any, key: str = "") -> Any:
    """``value`` (plain YAML data) as an instance of ``cls``, checked.

    ``cls`` is one of this file's dataclasses or any annotation they use (``int``, ``float | None``, ``Literal[...]``,
    ``tuple[str, ...]``, ``Mapping[str, int]``). A union of dataclasses is chosen by the value's ``family``.

    Raises:
        ConfigError: unknown key (with the nearest names), wrong type, or a law of the class broken; its ``key`` starts with
            ``key``.
    """
    if dataclasses.is_dataclass(cls):
        return _build_dataclass(cls, value, key)
    origin, args = get_origin(cls), get_args(cls)
    if origin in (Union, types.UnionType):
        return _build_union(args, value, key)
    if origin is Literal:
        _require(value in args, key, f"must be one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        _require(isinstance(value, (list, tuple)), key, f"must be a list, got {value!r}")
        return tuple(build(args[0], v, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is Mapping:
        _require(isinstance(value, Mapping), key, f"must be a mapping, got {value!r}")
        return {build(args[0], k, key): build(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if cls is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if cls is Any:
        return value
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    _require(type(value) is cls, key, f"must be {names[cls]}, got {value!r}")
    _require(cls is not float or math.isfinite(value), key, f"must be finite, got {value!r}")
    return value


def _build_union(options: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    options = tuple(o for o in options if o is not types.NoneType)
    if all(dataclasses.is_dataclass(o) for o in options):
        if any(isinstance(value, o) for o in options):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(key, f"must be a mapping, got {value!r}")
        family = value.get("family", "dense")
        path = f"{key}.family" if key else "family"
        _require(isinstance(family, str) and family in FAMILIES, path, f"must be one of {', '.join(FAMILIES)}, got {family!r}")
        return _build_dataclass(FAMILIES[family], value, key)
    errors = []
    for option in options:
        try:
            return build(option, value, key)
        except ConfigError as error:
            errors.append(error.law)
    raise ConfigError(key, " or ".join(errors))


def _build_dataclass(cls: Any, value: Any, key: str) -> Any:
    if isinstance(value, cls):
        return value
    _require(isinstance(value, Mapping), key, f"must be a mapping, got {value!r}")
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"keys here: {', '.join(names)}"
            raise ConfigError(f"{prefix}{name}", f"unknown key; {hint}")
    defaults = {f.name: f.default_factory() for f in fields(cls) if f.default_factory is not dataclasses.MISSING}
    arguments = {}
    for name, given in value.items():
        default = defaults.get(name)
        if (
            dataclasses.is_dataclass(default)
            and isinstance(given, Mapping)
            and not isinstance(default, tuple(FAMILIES.values()))
        ):
            given = {**{f.name: getattr(default, f.name) for f in fields(default)}, **given}
        arguments[name] = build(hints[name], given, f"{prefix}{name}")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise (error.under(key) if key else error) from None
    except TypeError as error:
        raise ConfigError(key, str(error)) from None
