"""What a machine has, what a trial needs, and how long a plan will take. No Ray, no torch."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

from lightning_modules.building import ConfigError
from lightning_modules.config import AdapterMoEConfig, DenseConfig, ModelConfig, TrialConfig
from pipelines.spec import ResourcesConfig, SweepConfig, SweepError
from pipelines.store import TrialFolder, TrialResult

ROUGH_SECONDS_PER_STEP = {"tiny-encoder": 0.05, "": 0.5}
"""Seconds per step of 64 examples by backbone (``""``: any other) where nothing has been measured: an order of magnitude, no
more. Scaled by the batch size."""

MAX_FOREIGN = 40
"""Finished trials outside the plan that are read for their step times, newest first."""


class Machine(NamedTuple):
    """What trials can use."""

    cpus: float
    gpus: float


def local_resources() -> Machine:
    """CPU cores this process may use (affinity and cgroup quota) and GPUs it may see (device files,
    ``CUDA_VISIBLE_DEVICES``)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup/cpu.max"))
    cpus = cores if quota is None else max(1, min(cores, math.floor(quota)))
    devices = len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name.removeprefix("nvidia").isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
        devices = min(devices, len(named))
    return Machine(cpus=float(cpus), gpus=float(devices))


def _cgroup_quota(path: Path) -> float | None:
    try:
        quota, period = path.read_text().split()[:2]
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def check_resources(sweep: SweepConfig, available: Machine) -> None:
    """Whether one trial fits on the machine or cluster.

    Raises:
        SweepError: it asks for more CPU cores or GPUs than there are, so that no trial could ever start.
    """
    wanted = sweep.resources
    for name, has in (("gpus", available.gpus), ("cpus", available.cpus)):
        each = getattr(wanted, name)
        if each * wanted.workers > has:
            law = f"must be at most what the machine has, got {name}={each:g} x workers={wanted.workers}, machine has {has:g}"
            raise SweepError(sweep.file, f"resources.{name}", law)


def slots(resources: ResourcesConfig, available: Machine) -> int:
    """Trials that run at the same time, at least one."""
    fit = available.cpus / (resources.workers * resources.cpus)
    if resources.gpus:
        fit = min(fit, available.gpus / (resources.workers * resources.gpus))
    limit = fit if resources.max_concurrent == "auto" else min(fit, resources.max_concurrent)
    return max(1, math.floor(limit))


@dataclass(frozen=True, kw_only=True, slots=True)
class CostEstimate:
    """How long the trials that are left will take."""

    trials: int
    """Trials that are left."""
    seconds: float
    """Sum over them, one after the other."""
    wall_seconds: float
    """With ``slots`` trials at a time; never less than the longest trial."""
    slots: int
    sources: Mapping[str, int] = field(default_factory=dict)
    """Where the step times come from -> trials: ``measured`` (finished trials of the same shape), ``same family`` (of that
    family at other sizes), ``rough`` (:data:`ROUGH_SECONDS_PER_STEP`)."""


def estimate(
    left: Iterable[tuple[TrialConfig, int]], measured: Iterable[tuple[TrialConfig, TrialResult]], at_once: int
) -> CostEstimate:
    """The cost of ``left``, pairs of a trial and its remaining steps, from what finished trials took.

    Seconds per step are the median of ``result.seconds / result.steps`` (training and scoring, start-up excluded).
    """
    shapes: dict[tuple[object, ...], list[float]] = {}
    families: dict[str, list[float]] = {}
    for config, result in measured:
        if result.steps > 0 and result.seconds > 0:
            shapes.setdefault(_shape(config), []).append(result.seconds / result.steps)
            per_example = result.seconds / result.steps / config.mixture.batch_size
            families.setdefault(_family(config), []).append(per_example)
    times, sources = [], {}
    for config, steps in left:
        if _shape(config) in shapes:
            source, per_step = "measured", median(shapes[_shape(config)])
        elif _family(config) in families:
            source, per_step = "same family", median(families[_family(config)]) * config.mixture.batch_size
        else:
            rough = ROUGH_SECONDS_PER_STEP.get(config.backbone.name, ROUGH_SECONDS_PER_STEP[""])
            source, per_step = "rough", rough * config.mixture.batch_size / 64
        times.append(steps * per_step)
        sources[source] = sources.get(source, 0) + 1
    total = sum(times)
    wall = max(total / at_once, max(times, default=0.0))
    return CostEstimate(trials=len(times), seconds=total, wall_seconds=wall, slots=at_once, sources=sources)


def _shape(config: TrialConfig) -> tuple[object, ...]:
    """What the cost of a step depends on."""
    mixture, backbone = config.mixture, config.backbone
    size = (backbone.size.hidden_size, backbone.size.num_layers, backbone.size.ffn_size, backbone.max_length, backbone.frozen)
    return (*_parts(config.model), backbone.name, size, mixture.batch_size, mixture.tasks_per_step, mixture.batching,
            config.train.precision, config.train.freeze)  # fmt: skip


def _parts(model: ModelConfig) -> tuple[object, ...]:
    """What the cost of a step depends on in a family."""
    if isinstance(model, DenseConfig):
        return model.family, model.ffn_multiple, model.layers
    router = model.router
    routing = (router.kind, router.selection, router.top_k, router.combine, router.draw, router.slots, router.consistency > 0)
    if isinstance(model, AdapterMoEConfig):
        return model.family, model.num_experts, model.layers, model.bottleneck, routing
    return model.family, model.num_experts, model.layers, model.expert, model.shared_experts, model.dispatch, routing


def _family(config: TrialConfig) -> str:
    return f"{config.model.family} {config.backbone.name}"


def foreign_results(storage: Path, known: set[str]) -> Iterator[tuple[TrialConfig, TrialResult]]:
    """The newest finished trials of the store that are not in ``known``. Those of another version, whose configuration cannot
    be read any more, tell nothing about this one and are passed over."""
    files = [f for f in (storage / "trials").glob("*/result.json") if f.parent.name not in known]
    files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[:MAX_FOREIGN]:
        folder = TrialFolder(storage, file.parent.name)
        result = folder.result()
        if result is None:
            continue
        try:
            yield folder.read_config(), result
        except (ConfigError, FileNotFoundError):
            continue
