"""Task vectors that are computed from descriptions or data, cached by content (specs/task_moe.md 1.5).

Legend: T tasks, D width of a raw vector, du width of a task vector. How a task gets its raw vector: ``task_encoding``.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.building import require
from lightning_modules.config import DenseConfig, TrialConfig
from lightning_modules.data.prepared import TaskData
from lightning_modules.files import atomic_file
from lightning_modules.router_config import RouterConfig
from lightning_modules.task_encoding import STANDARD, Effort, TaskEncoder

ROUNDING = 1e-6
"""Differences between raw vectors below this, relative to their size, are rounding errors of float32."""

_KEY = "model.router.task_vectors"


def task_vectors(
    config: TrialConfig,
    tasks: Sequence[TaskData],
    root: Path,
    device: torch.device | str = "cpu",
    effort: Effort = STANDARD,
) -> Tensor | None:
    """The vectors (T, du) float32 of the mixture's ``tasks``, in order, on the CPU; None where the trial's router reads none
    or makes them itself (``id``, ``onehot``, ``random``).

    Width du: the backbone's d; ``fisher``: min(``task_vector_size``, trained tasks - 1) principal components, as there are no
    more. Over the trained tasks every entry has mean zero, and all entries together have mean square 1, so that what reads
    them starts alike whatever their source. Held-out tasks go through the same shift, components and scale and change nothing
    for the others; their vectors, too, come from the training examples that the trial's settings leave them (``fine_tuned``
    and ``fisher``: with labels). The vector of an only trained task is zero.

    They are the same for equal backbones, data, seeds and settings, and computed once: ``root`` / ``vectors`` holds each
    task's raw vector and the mixture's vectors under names that say what they depend on. Processes on one machine wait for
    each other. The global random state is left as it is.

    Args:
        config: the trial, as planned.
        tasks: its opened tasks.
        root: folder of the prepared data.
        device: where to compute.
        effort: how much goes into each vector.

    Raises:
        ConfigError: a task has no description or no training example, or the vectors do not tell the trained tasks apart.
        RuntimeError: a vector is not finite: training the task alone diverged.
    """
    router = None if isinstance(config.model, DenseConfig) else config.model.router
    if router is None or not router.computed_vectors:
        return None
    encoder = TaskEncoder(config, router, root, torch.device(device), effort)
    return torch.from_numpy(_of_mixture(config, router, encoder, tasks, root)["vectors"])


def _of_mixture(
    config: TrialConfig, router: RouterConfig, encoder: TaskEncoder, tasks: Sequence[TaskData], root: Path
) -> dict[str, np.ndarray]:
    """``vectors`` and what turned the tasks' raw ones into them, from the cache."""
    trained = np.array([task.name not in config.mixture.held_out for task in tasks])
    components = None
    if router.task_vectors == "fisher":
        require(int(trained.sum()) > 1, _KEY, "must not be fisher with one trained task, which has no principal components")
        components = router.task_vector_size
    keys = [encoder.key(task) for task in tasks]

    def compute() -> dict[str, np.ndarray]:
        raw = [
            _cached(root, key, lambda task=task: {"raw": encoder.raw(task)})["raw"]
            for task, key in zip(tasks, keys, strict=True)
        ]
        return {"tasks": np.array([task.name for task in tasks])} | _finished(np.stack(raw), trained, components)

    return _cached(root, {"tasks": keys, "trained": trained.tolist(), "components": components}, compute)


def _cached(root: Path, key: Mapping[str, Any], compute: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of ``key``, which names all that they depend on: read, or computed by one process while others wait."""
    text = json.dumps(key, sort_keys=True)
    path = root / "vectors" / f"{hashlib.sha256(text.encode()).hexdigest()}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                arrays = compute()
                with atomic_file(path, "wb") as file:
                    np.savez(file, allow_pickle=False, key=np.array(text), **arrays)
    with np.load(path) as stored:
        return dict(stored)


def _finished(raw: np.ndarray, trained: np.ndarray, components: int | None) -> dict[str, np.ndarray]:
    """Raw vectors (T, D) -> ``vectors`` (T, du) float32, ``mean`` (D,), ``scale`` () and, where ``components`` limits their
    number, ``components`` (du, D). ``trained``: (T,) bool, the tasks that decide on all of them."""
    count = int(trained.sum())
    mean = raw[trained].mean(0)
    vectors, kept = raw - mean, {}
    if components is not None:
        kept["components"] = _principal(vectors[trained], min(components, count - 1))
        # Row by row: a matrix product may round a row differently when there are more of them.
        vectors = np.stack([kept["components"] @ vector for vector in vectors])
    scale = 1.0
    if count > 1:
        scale, whole = (float(np.sqrt(np.square(part[trained]).mean())) for part in (vectors, raw))
        law = f"must tell the trained tasks apart, but the vectors of all {count} are the same, as for equal inputs"
        require(scale > ROUNDING * whole, _KEY, law)
    return {"vectors": (vectors / scale).astype(np.float32), "mean": mean, "scale": np.array(scale)} | kept


def _principal(centred: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` principal components (count, D) of centred rows; the largest entry of each is positive."""
    components = np.linalg.svd(centred, full_matrices=False)[2][:count]
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1)
    return components * np.sign(largest)
