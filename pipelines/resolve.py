"""From what a sweep file says to what a trial reads: task patterns -> names, low-resource sizes, content digests, shares.

Everything a plan needs to know of the data is read once per plan here, and everything that is wrong with it is found here.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning_modules.building import ConfigError
from lightning_modules.config import SEQ2SEQ, BackboneConfig, DenseConfig, MixtureConfig, ModelConfig, TrialConfig
from lightning_modules.data.mixtures import task_shares
from lightning_modules.data.posing import PROMPTS, pose
from lightning_modules.data.splits import few_shot
from lightning_modules.data.tasks import Checked, TaskSpec, check, select
from pipelines.architecture import Architecture, architecture_of
from pipelines.routing_laws import Routed, resolve_router

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "*.model",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTask:
    """A task that some trial of the plan trains on or is scored on."""

    name: str
    kind: str
    category: str
    metric: str
    sizes: Mapping[str, int]
    """Examples per split, as they are in the data."""


@dataclass(slots=True)
class Resolver:
    """Resolves the trials of one plan; each task is read and each file hashed once."""

    specs: Mapping[str, TaskSpec]
    _tasks: dict[str, PlannedTask] = field(default_factory=dict)
    _digests: dict[tuple[str, str], str] = field(default_factory=dict)
    _checked: dict[str, Checked] = field(default_factory=dict)
    _samples: dict[tuple[str, int, int], int] = field(default_factory=dict)
    _backbones: dict[tuple[str, str | None], tuple[BackboneConfig, str]] = field(default_factory=dict)

    def resolve(self, config: TrialConfig) -> TrialConfig:
        """``config`` with task names for patterns, explicit low-resource sizes and tokenizer tasks, what the router must
        know of the tasks, and all digests.

        Raises:
            ConfigError: a task cannot be used, a pattern matches nothing, the backbone is not there, or the settings cannot
                work with them.
        """
        names = select(self.specs, config.mixture.tasks, "trial.mixture.tasks")
        mixture = self._mixture(config, names)
        backbone, digests = self._backbone(config.backbone, names)
        architecture = architecture_of(backbone)
        if architecture is not None:
            _check_sizes(config, architecture)
        self._check_forms(config, mixture, None if architecture is None else architecture.kind)
        model = self._model(config, mixture, architecture)
        for name in sorted({*names, *backbone.size.tokenizer_tasks}):
            self._read(name)
            digests[name] = self._digest(name, config.data.form)
        return replace(config, mixture=mixture, backbone=backbone, model=model, digests=digests)

    def resolve_earlier(self, config: TrialConfig, later: TrialConfig) -> TrialConfig:
        """The trial that ``later``, which is resolved, starts from. Unless it says otherwise, it reads ``later``'s tokens.

        Raises:
            ConfigError: as :meth:`resolve`, or ``later`` cannot use its weights.
        """
        size = config.backbone.size
        if config.backbone.built_in and not size.tokenizer_tasks and config.backbone.name == later.backbone.name:
            size = replace(size, tokenizer_tasks=later.backbone.size.tokenizer_tasks)
        earlier = self.resolve(replace(config, backbone=replace(config.backbone, size=size)))
        if problem := _unfit(earlier, later):
            raise ConfigError("trial.start.load", problem)
        return earlier

    def _model(self, config: TrialConfig, mixture: MixtureConfig, architecture: Architecture | None) -> ModelConfig:
        if isinstance(config.model, DenseConfig):
            return config.model
        own = {name: self.specs[name] for name in mixture.tasks}
        posed = config.data.form == "text2text"
        routed = Routed(config.model, mixture, own, architecture, posed, config.train.precision)
        return replace(config.model, router=resolve_router(routed))

    def _mixture(self, config: TrialConfig, names: list[str]) -> MixtureConfig:
        """The mixture with task names for all patterns."""
        mixture, own = config.mixture, {name: self.specs[name] for name in names}
        roles = {role: tuple(self._matching(own, getattr(mixture, role), role)) for role in ("held_out", "unrelated")}
        trained = [name for name in names if name not in roles["held_out"]]
        if not trained:
            law = f"must leave at least one task to train on, got {list(mixture.held_out)}"
            raise ConfigError("trial.mixture.held_out", law)
        both = sorted(set(roles["held_out"]) & set(roles["unrelated"]))
        if both:
            raise ConfigError("trial.mixture.unrelated", f"must not name held-out tasks, got {', '.join(both)}")
        weights: dict[str, float] = {}
        for pattern, weight in mixture.weights.items():
            weights |= dict.fromkeys(self._matching(own, [pattern], "weights"), weight)
        if weights and (lacking := [name for name in trained if name not in weights]):
            raise ConfigError("trial.mixture.weights", f"must give every trained task a share, none for {', '.join(lacking)}")
        return replace(
            mixture,
            tasks=tuple(names),
            low_resource=self._low_resource(config, names),
            weights={name: weights[name] for name in trained} if weights else {},
            **roles,
        )

    def _matching(self, own: Mapping[str, TaskSpec], patterns: Sequence[str], setting: str) -> list[str]:
        """The tasks of the mixture that ``patterns`` stand for, in its order; none for no pattern."""
        key = f"trial.mixture.{setting}"
        try:
            return select(own, patterns, key) if patterns else []
        except ConfigError:
            shown = ", ".join(list(own)[:8]) + (", ..." if len(own) > 8 else "")
            law = f"must name tasks of the mixture, which has {shown}, got {', '.join(patterns)}"
            raise ConfigError(key, law) from None

    def _check_forms(self, config: TrialConfig, mixture: MixtureConfig, model_type: str | None) -> None:
        """Whether the backbone can answer each task in the form that it has here."""
        posed = config.data.form == "text2text"
        decoder = model_type is None or model_type in SEQ2SEQ
        for name in mixture.tasks:
            kind = self.specs[name].kind
            if posed and kind not in (*PROMPTS, "text2text"):
                law = f"must be native for {name}: only {', '.join(PROMPTS)} can be posed as text to text, it is {kind}"
                raise ConfigError("trial.data.form", law)
            if (posed or kind == "text2text") and not decoder:
                law = f"must have a decoder ({', '.join(SEQ2SEQ)}, tiny-bart, tiny-t5) for the text2text task {name}"
                raise ConfigError("trial.backbone.name", f"{law}, got {config.backbone.name!r}, which is {model_type}")
            if name in mixture.held_out and not posed and kind != "text2text":
                law = f"must be text2text tasks: {name} is {kind}, whose head would never train"
                raise ConfigError("trial.mixture.held_out", law)
        if self.decodes(config, mixture) and config.backbone.frozen and config.model == DenseConfig():
            law = "must be false for text2text tasks in a dense model, which would have nothing to train, got true"
            raise ConfigError("trial.backbone.frozen", law)

    def decodes(self, config: TrialConfig, mixture: MixtureConfig) -> bool:
        """Whether some task of the mixture is answered by the backbone's decoder."""
        return config.data.form == "text2text" or any(self.specs[name].kind == "text2text" for name in mixture.tasks)

    def tasks(self) -> dict[str, PlannedTask]:
        """The tasks read so far, in catalogue order."""
        return {name: self._tasks[name] for name in self.specs if name in self._tasks}

    def sizes(self, config: TrialConfig) -> dict[str, int]:
        """Task -> training examples that a resolved trial uses, of the tasks it trains on."""
        sizes = {}
        for task in config.mixture.tasks:
            if task not in config.mixture.held_out:
                available = self._read(task).sizes["train"] if config.data.few_shot is None else self._few_shot(config, task)
                limits = (available, config.mixture.low_resource.get(task), config.data.max_train)
                sizes[task] = min(n for n in limits if n is not None)
        return sizes

    def _few_shot(self, config: TrialConfig, task: str) -> int:
        """Examples of a few-shot sample."""
        spec, k = self._checked[task].spec, config.data.few_shot
        assert k is not None
        key = (task, k, config.data.draw)
        if key not in self._samples:
            labels = None
            if spec.kind == "classification":
                labels = [row["label"] for row in spec.read("train")]
            elif spec.kind == "text2text" and spec.labels:
                labels = [(row.get("targets") or [row["target"]])[0] for row in spec.read("train")]
            self._samples[key] = len(few_shot(task, labels, k, config.data.draw, self._read(task).sizes["train"]))
        return self._samples[key]

    def shares(self, config: TrialConfig) -> dict[str, float]:
        """Task -> share of the groups in a resolved trial; with adaptive sampling the one it starts with."""
        sizes = self.sizes(config)
        budget = config.train.steps * config.mixture.batch_size
        return dict(
            zip(sizes, task_shares(config.mixture, list(sizes.values()), names=list(sizes), budget=budget), strict=True)
        )

    def warnings(self, config: TrialConfig) -> list[str]:
        """What the user should know of a resolved trial's data."""
        longest = config.backbone.max_length
        found = []
        for name in config.mixture.tasks:
            checked = self._checked[name]
            found += [f"{name}: {warning}" for warning in checked.warnings]
            long = sum(count for words, count in checked.words.items() if words > longest)
            if long:
                found.append(
                    f"{name}: {long} examples have more words than backbone.max_length={longest}; they are read in windows"
                )
        mixture, sizes = config.mixture, self.sizes(config)
        allowed = (mixture.max_epochs or 0) * sum(sizes.values())
        drawn = config.train.steps * mixture.batch_size
        if mixture.sampling == "unimax" and drawn > allowed:
            passes = drawn / sum(sizes.values())
            found.append(
                f"mixture.max_epochs={mixture.max_epochs:g} allows {allowed:.0f} examples in all and the trial draws {drawn}: "
                f"every task is repeated {passes:.1f} times"
            )
        return found

    def _read(self, name: str) -> PlannedTask:
        if name not in self._tasks:
            spec = self.specs[name]
            if name == "backbone":
                raise ConfigError(
                    f"{spec.catalogue}: task backbone", "must have another name: this one means the model's weights"
                )
            checked = check(spec)
            self._tasks[name] = PlannedTask(
                name=name, kind=spec.kind, category=spec.category, metric=spec.metric, sizes=checked.sizes
            )  # fmt: skip
            self._checked[name] = checked
        return self._tasks[name]

    def _digest(self, name: str, form: str) -> str:
        """The task's digest in the form in which it is trained; a posed task is checked again, prompt and answers included."""
        if (name, form) not in self._digests:
            spec = self._checked[name].spec
            self._digests[name, form] = spec.digest() if form == "native" else check(pose(spec)).spec.digest()
        return self._digests[name, form]

    def _low_resource(self, config: TrialConfig, names: list[str]) -> dict[str, int]:
        """The catalogue's sizes, overridden by the mixture's in file order."""
        key = "trial.mixture.low_resource"
        mixture = {name: self.specs[name] for name in names}
        chosen: dict[str, tuple[int, str]] = {}
        for name, spec in mixture.items():
            if spec.low_resource is not None:
                chosen[name] = (spec.low_resource, f"{spec.catalogue}: task {name}: low_resource")
        for pattern, size in config.mixture.low_resource.items():
            try:
                matches = select(mixture, [pattern], key)
            except ConfigError:
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise ConfigError(key, f"{pattern!r} must match a task of the mixture, which has {shown}") from None
            chosen |= {name: (size, f"{key}.{pattern}") for name in matches}
        for name, (size, where) in chosen.items():
            available = self._read(name).sizes["train"]
            if size > available:
                raise ConfigError(where, f"must be at most the {available} training examples of {name}, got {size}")
        return {name: size for name, (size, _) in chosen.items()}

    def _backbone(self, config: BackboneConfig, names: list[str]) -> tuple[BackboneConfig, dict[str, str]]:
        if config.built_in:
            patterns = config.size.tokenizer_tasks
            chosen = select(self.specs, patterns, "trial.backbone.size.tokenizer_tasks") if patterns else names
            return replace(config, size=replace(config.size, tokenizer_tasks=tuple(sorted(chosen)))), {}
        key = (config.name, config.revision)
        if key not in self._backbones:
            self._backbones[key] = locate_backbone(config)
        found, digest = self._backbones[key]
        return replace(config, name=found.name), {"backbone": digest}


def locate_backbone(config: BackboneConfig) -> tuple[BackboneConfig, str]:
    """A Hugging Face backbone with its folder made absolute, and the digest of its content.

    A folder counts by the content of its config, tokenizer and safetensors files; a Hub id by its commit.

    Raises:
        ConfigError: no such folder, a folder without a model, or a Hub id without a commit.
    """
    try:
        folder = Path(config.name).expanduser()
    except RuntimeError as error:
        raise ConfigError("trial.backbone.name", f"{error}, got {config.name!r}") from None
    if folder.is_dir():
        if config.revision is not None:
            raise ConfigError("trial.backbone.revision", f"must be null for a folder, got {config.revision!r}")
        return replace(config, name=str(folder.resolve())), _folder_digest(folder)
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", config.name) is None:
        raise ConfigError("trial.backbone.name", f"no such folder: {config.name} (looked for {folder.absolute()})")
    if config.revision is None:
        law = f"must be a commit for the Hub model {config.name!r} (there is no folder of that name), got null"
        raise ConfigError("trial.backbone.revision", law)
    if re.fullmatch(r"[0-9a-f]{40}", config.revision) is None:
        law = f"must be a commit, 40 hex digits (a branch can change under a trial's id), got {config.revision!r}"
        raise ConfigError("trial.backbone.revision", law)
    return config, f"hub:{config.name}@{config.revision}"


def _check_sizes(config: TrialConfig, architecture: Architecture) -> None:
    """Whether the backbone has blocks and positions enough.

    Raises:
        ConfigError: it does not.
    """
    backbone = config.backbone
    try:
        architecture.blocks(config.model.layers)
    except ConfigError as error:
        raise error.under("trial") from None
    lengths = {"max_length": backbone.max_length}
    lengths |= {"max_target_length": backbone.max_target_length} if architecture.kind == "bart" else {}
    for name, length in lengths.items():
        if architecture.positions is not None and length > architecture.positions:
            raise ConfigError(
                f"trial.backbone.{name}", f"must be at most the backbone's {architecture.positions}, got {length}"
            )


def _unfit(earlier: TrialConfig, later: TrialConfig) -> str:
    """Why ``later`` cannot take the parts that it wants from ``earlier``, as far as settings tell; "": it can."""
    for part in later.start.load:
        for name in _SHAPING[part]:
            was, now = _setting(earlier, name), _setting(later, name)
            if was != now:
                return f"cannot take {part} from a trial with another {name}, got {was!r} there and {now!r} here"
    if "router" not in later.start.load:
        return ""
    if _setting(later, "model.router.task_vectors") == "onehot" and earlier.mixture.tasks != later.mixture.tasks:
        return (
            "cannot take a router with one-hot task vectors, whose entries are the tasks' numbers, from a trial of other tasks"
        )
    slotted = [_setting(config, "model.router.selection") == "slots" for config in (earlier, later)]
    if slotted[0] != slotted[1]:
        return "cannot take a router that has slots (selection: slots) on one side only"
    biased = [_setting(config, "model.router.balance") == "bias" for config in (earlier, later)]
    if biased[0] != biased[1]:
        return "cannot take a router whose selection is biased (balance: bias) on one side only: its routes would be others"
    return ""


_ROUTED = ("model.family", "model.num_experts", "model.layers")
_SHAPING = {
    "router": (*_ROUTED, *(f"model.router.{name}" for name in (
        "kind", "conditioning", "network", "task_vectors", "task_vector_size", "hidden_size", "normalise", "slots"))),
    "experts": (*_ROUTED, "model.expert", "model.shared_experts", "model.bottleneck", "backbone.name", "backbone.size"),
    "backbone": ("backbone.name", "backbone.revision", "backbone.size", "model.family", "model.layers", "model.ffn_multiple",
                 "model.expert"),
    "heads": ("backbone.size.hidden_size", "heads"),
}  # fmt: skip
"""Part -> settings that its tensors depend on. A built-in backbone's tokenizer tasks are among its sizes: other texts, other
tokens."""


def _setting(config: TrialConfig, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def _folder_digest(folder: Path) -> str:
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError("trial.backbone.name", f"must be a folder with config.json and *.safetensors, got {folder}")
    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        law = f"must be a folder with a tokenizer ({', '.join(_VOCABULARIES)}), got {folder}"
        raise ConfigError("trial.backbone.name", law)
    patterns = ("config.json", *_TOKENIZER_FILES, "*.safetensors")
    content = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            content.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return content.hexdigest()[:32]
