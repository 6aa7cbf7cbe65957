"""From what a sweep file says to what a trial reads: task patterns -> names, low-resource sizes, content digests, shares.

Everything a plan needs to know of the data is read once per plan here, and everything that is wrong with it is found here.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning_modules.config import BACKBONES, BackboneConfig, ConfigError, TrialConfig
from lightning_modules.data.mixtures import task_shares
from lightning_modules.data.tasks import TaskSpec, check, select

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
    _digests: dict[str, str] = field(default_factory=dict)
    _backbones: dict[tuple[str, str | None], tuple[BackboneConfig, str]] = field(default_factory=dict)

    def resolve(self, config: TrialConfig) -> TrialConfig:
        """``config`` with task names for patterns, explicit low-resource sizes and tokenizer tasks, and all digests.

        Raises:
            ConfigError: a task cannot be used, a pattern matches nothing, or the backbone is not there.
        """
        names = select(self.specs, config.mixture.tasks, "trial.mixture.tasks")
        mixture = replace(config.mixture, tasks=tuple(names), low_resource=self._low_resource(config, names))
        backbone, digests = self._backbone(config.backbone, names)
        if not digests.get("backbone", "hub:").startswith("hub:"):
            check_architecture(backbone, config.model.layers)
        for name in sorted({*names, *backbone.size.tokenizer_tasks}):
            self._read(name)
            digests[name] = self._digests[name]
        return replace(config, mixture=mixture, backbone=backbone, digests=digests)

    def tasks(self) -> dict[str, PlannedTask]:
        """The tasks read so far, in catalogue order."""
        return {name: self._tasks[name] for name in self.specs if name in self._tasks}

    def sizes(self, config: TrialConfig) -> dict[str, int]:
        """Task -> training examples that a resolved trial uses."""
        sizes = {}
        for task in config.mixture.tasks:
            limits = (self._read(task).sizes["train"], config.mixture.low_resource.get(task), config.data.max_train)
            sizes[task] = min(n for n in limits if n is not None)
        return sizes

    def shares(self, config: TrialConfig) -> dict[str, float]:
        """Task -> share of the groups in a resolved trial."""
        sizes = self.sizes(config)
        return dict(zip(sizes, task_shares(config.mixture, list(sizes.values())), strict=True))

    def _read(self, name: str) -> PlannedTask:
        if name not in self._tasks:
            spec = self.specs[name]
            if name == "backbone":
                raise ConfigError(
                    f"{spec.catalogue}: task backbone", "must have another name: this one means the model's weights"
                )
            sizes = check(spec)
            self._digests[name] = spec.digest()
            self._tasks[name] = PlannedTask(
                name=name, kind=spec.kind, category=spec.category, metric=spec.metric, sizes=sizes
            )  # fmt: skip
        return self._tasks[name]

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
        if config.name == "tiny-encoder":
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


def check_architecture(config: BackboneConfig, layers: tuple[int, ...]) -> None:
    """What a folder's ``config.json`` says must fit the trial: a known architecture, blocks and positions enough.

    Raises:
        ConfigError: it does not.
    """
    file = Path(config.name) / "config.json"
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError("trial.backbone.name", f"{file} is not valid JSON: {error}") from None
    kind = content.get("model_type")
    if kind not in BACKBONES:
        raise ConfigError("trial.backbone.name", f"must be one of {', '.join(BACKBONES)}, got model_type {kind!r} in {file}")
    blocks = content.get("num_hidden_layers", content.get("n_layers"))
    if isinstance(blocks, int) and layers and max(layers) >= blocks:
        raise ConfigError("trial.model.layers", f"must be below the backbone's {blocks} blocks, got {list(layers)}")
    positions = content.get("max_position_embeddings")
    if isinstance(positions, int) and config.max_length > positions:
        raise ConfigError("trial.backbone.max_length", f"must be at most the backbone's {positions}, got {config.max_length}")


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
