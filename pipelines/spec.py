"""Sweep files: YAML and command-line overrides -> :class:`SweepConfig`, every mistake as one line with file and key path.

This file is the manual of a sweep file's top-level keys; the keys under ``trial:`` are ``lightning_modules/config.py``'s, those
under ``axes:`` are explained in :mod:`pipelines.axes`. No torch and no Ray here: ``--plan`` answers in about a second.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_modules.building import ConfigError, build
from pipelines.axes import Point, expand_axes, is_trial_key, key_parts, parse_axes, unknown_key

BaselineKind = Literal[
    "single_task", "parameter_matched", "compute_matched", "random_routing", "uniform_routing", "frozen_backbone"
]


class SweepError(ValueError):
    """A sweep cannot be run as it is written. ``str()`` is one line: ``file: key: law, got value``."""

    def __init__(self, file: str, key: str, law: str) -> None:
        text = ": ".join(part for part in (file, key, law) if part)
        super().__init__(" ".join(text.split()))
        self.file = file
        self.key = key
        self.law = law


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourcesConfig:
    """What each trial is given. Not part of a trial's identity."""

    workers: int = 1
    """Processes that train one trial together (data parallel)."""
    cpus: int = 1
    """CPU cores per worker."""
    gpus: float = 0.0
    """GPUs per worker, at most one; a fraction lets several trials share one."""
    max_concurrent: int | Literal["auto"] = "auto"
    """Trials that run at the same time; ``auto``: as many as fit."""

    def __post_init__(self) -> None:
        for name in ("workers", "cpus"):
            _require(getattr(self, name) >= 1, name, f"must be at least 1, got {getattr(self, name)}")
        _require(self.gpus >= 0, "gpus", f"must not be negative, got {self.gpus}")
        whole = self.gpus == int(self.gpus)
        _require(self.gpus <= 1, "gpus", f"must be at most 1 (a worker trains on one GPU; workers adds more), got {self.gpus}")
        _require(
            self.workers == 1 or whole,
            "gpus",
            f"must be a whole number when a trial has several workers, got gpus={self.gpus}, workers={self.workers}",
        )
        if self.max_concurrent != "auto":
            _require(self.max_concurrent >= 1, "max_concurrent", f"must be at least 1 or auto, got {self.max_concurrent}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """How the grid is worked through."""

    kind: Literal["grid"] = "grid"
    """``grid``: every point trains to its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """A sweep: what its trials share, what varies, and what they are compared with."""

    name: str
    """File name of the sweep's folder (``<storage>/sweeps/<name>``) and name of its MLflow experiment."""
    question: str = ""
    """What the sweep asks, for the report."""
    catalogues: tuple[str, ...] = ()
    """Catalogue files. A relative path is looked up in the current directory, then in the sweep file's folder, then in the
    folder above that (the project's root for ``sweeps/x.yaml``); the first that exists counts."""
    trial: Mapping[str, Any] = field(default_factory=dict)
    """What every trial shares; keys are :class:`lightning_modules.config.TrialConfig`'s."""
    axes: Mapping[str, Any] = field(default_factory=dict)
    """The grid: see :mod:`pipelines.axes`."""
    seeds: int | tuple[int, ...] = 1
    """A number n (seeds 0..n-1) or a list of seeds. Every grid point runs once per seed; comparisons are paired by seed."""
    baselines: tuple[BaselineKind, ...] = ("single_task",)
    """What the plan adds to compare with: see :mod:`pipelines.baselines`."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    retries: int = 2
    """How often a trial that crashed is started again from its last checkpoint."""
    file: str = ""
    """The sweep file, for messages; set by :func:`load_sweep`, not a key of the file."""

    def __post_init__(self) -> None:
        _require(
            re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", self.name) is not None,
            "name",
            f"must be a file name of letters, digits, _ . - that does not start with . or -, got {self.name!r}",
        )
        _require(bool(self.catalogues), "catalogues", "must list at least one catalogue file")
        _require(self.retries >= 0, "retries", f"must not be negative, got {self.retries}")
        _require(len(set(self.baselines)) == len(self.baselines), "baselines", f"must differ, got {list(self.baselines)}")
        if isinstance(self.seeds, int):
            _require(1 <= self.seeds <= 1000, "seeds", f"must be in 1..1000, or a list of seeds, got {self.seeds}")
        else:
            distinct = len(set(self.seeds)) == len(self.seeds) > 0 and min(self.seeds) >= 0
            _require(distinct, "seeds", f"must be different numbers from 0, at least one, got {list(self.seeds)}")

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds themselves."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def error(self, error: ConfigError) -> SweepError:
        """A broken law of this sweep's settings or data, as a line that names the file."""
        return SweepError(self.file, error.key, error.law)

    def points(self) -> list[Point]:
        """The grid's points in order (the last axis varies fastest), each with its checked ``TrialConfig``, seeds left out.

        Raises:
            SweepError: an axis or a point breaks a law; the point is named by its axis values.
        """
        try:
            return expand_axes(self.trial, parse_axes(self.axes))
        except ConfigError as error:
            raise self.error(error) from None


def _require(condition: bool, key: str, law: str) -> None:
    if not condition:
        raise ConfigError(key, law)


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep file, apply ``key=value`` overrides, resolve interpolations, and check everything that needs no data.

    An override's key is a path of the file (``trial.train.steps=50``, ``seeds=1``, ``axes.model.num_experts=[2,4]``), its value
    is YAML. An override replaces what stands at its key; new keys may be set where the file could have set them.

    Raises:
        SweepError: the file is missing or no YAML, a key is unknown, a value breaks a law, or a grid point is impossible.
    """
    file = str(path)
    raw = _read_yaml(Path(path), file)
    try:
        for override in overrides:
            _apply_override(raw, override)
        plain = _resolve(raw)
        _require("file" not in plain, "file", "unknown key")
        _require("name" in plain, "name", "must be given")
        sweep: SweepConfig = build(SweepConfig, plain)
        _check_not_by_hand(sweep.trial)
        sweep = replace(sweep, file=file, catalogues=tuple(_find_catalogue(c, Path(path)) for c in sweep.catalogues))
    except ConfigError as error:
        raise SweepError(file, error.key, error.law) from None
    sweep.points()
    return sweep


def _read_yaml(path: Path, file: str) -> dict[str, Any]:
    try:
        content = OmegaConf.load(path)
    except FileNotFoundError:
        raise SweepError(file, "", "no such file") from None
    except OSError as error:
        raise SweepError(file, "", f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SweepError(file, "", f"must be UTF-8 text: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SweepError(file, line, f"is not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise SweepError(file, "", f"is not valid YAML: {error}") from None
    plain = OmegaConf.to_container(content)
    if not isinstance(plain, dict) or not plain:
        raise SweepError(file, "", "must be a mapping with at least a name, catalogues and a trial; is it empty?")
    return {str(key): value for key, value in plain.items()}


def _resolve(raw: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(OmegaConf.create(dict(raw)), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(error.full_key or "", str(error.msg or error).splitlines()[0]) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError("", f"an override must be key=value, got {override!r}")
    top, _, rest = key.partition(".")
    names = [f.name for f in fields(SweepConfig) if f.name != "file"]
    if top not in names:
        raise unknown_key(key, names)
    path = [top, *_override_path(raw, top, rest)] if rest else [top]
    target = raw
    for part in path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(key, f"cannot be set: {part} is {target!r} in the file, not a mapping")
    target[path[-1]] = _override_value(key, text)


def _override_value(key: str, text: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(key, f"value is not valid YAML: {str(error).splitlines()[0]}, got {text!r}") from None


def _override_path(raw: Mapping[str, Any], top: str, rest: str) -> list[str]:
    """The mapping keys that lead to ``top.rest``: names of axes and of tasks contain dots."""
    axes = raw.get("axes") if isinstance(raw.get("axes"), dict) else {}
    assert isinstance(axes, dict)
    if top == "axes":
        return _axis_path(axes, rest)
    if top == "trial":
        if not is_trial_key(rest):
            raise unknown_key(f"trial.{rest}", None)
        for name, values in axes.items():
            if isinstance(values, list) and values and all(rest in _set_by(str(name), value) for value in values):
                which = "the axis" if name == rest else f"the axis {name}"
                raise ConfigError(f"trial.{rest}", f"has no effect, {which} sets it in every trial; use axes.{name}=[...]")
        return key_parts(rest)
    known = {"resources": ResourcesConfig, "schedule": ScheduleConfig}.get(top)
    names = [f"{top}.{f.name}" for f in fields(known)] if known else [top]
    if f"{top}.{rest}" not in names:
        raise unknown_key(f"{top}.{rest}", names)
    return [rest]


def _set_by(axis: str, value: Any) -> set[str]:
    """The key paths that one value of an axis sets: the axis itself, what its mapping holds, or a zipped axis' keys."""
    if not isinstance(value, Mapping):
        return {axis}
    return {f"{axis}.{key}" for key in value} if is_trial_key(axis) else {str(key) for key in value}


def _axis_path(axes: Mapping[str, Any], rest: str) -> list[str]:
    for name in sorted(axes, key=len, reverse=True):
        if rest == name:
            return [name]
        if isinstance(axes[name], dict) and rest == f"{name}.values":
            return [name, "values"]
        if isinstance(axes[name], dict) and rest.startswith(f"{name}.when."):
            return [name, "when", rest.removeprefix(f"{name}.when.")]
    if is_trial_key(rest):
        return [rest]
    near = difflib.get_close_matches(rest, list(axes), 3, 0.5)
    raise unknown_key(f"axes.{rest}", [f"axes.{name}" for name in near or axes] or None)


def _check_not_by_hand(trial: Mapping[str, Any]) -> None:
    _require("seed" not in trial, "trial.seed", "must not be set here; the key seeds lists the seeds of all trials")
    _require("digests" not in trial, "trial.digests", "must not be set; the plan computes them from the data")
    start = trial.get("start")
    by_hand = isinstance(start, Mapping) and "trial" in start
    _require(not by_hand, "trial.start.trial", "must not be set; the plan finds the earlier trial by start.changes")


def _find_catalogue(catalogue: str, sweep_file: Path) -> str:
    folder = sweep_file.resolve().parent
    places = [Path(catalogue), folder / catalogue, folder.parent / catalogue]
    for place in places:
        if place.is_file():
            return str(place)
    shown = ", ".join(dict.fromkeys(str(place.absolute()) for place in places))
    raise ConfigError("catalogues", f"no such file: {catalogue} (looked for {shown}); name yours with 'catalogues=[FILE]'")
