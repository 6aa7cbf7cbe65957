"""Routes of tasks that were never trained, from the rows of tasks that were (specs/task_aware_gating.md 6.2).

Wherever a router has a row for each task (logits, learned vectors, the weights of per-task gates), the row of an unseen task u
becomes sum_s pi_us row_s over the trained tasks s. The control ``random`` needs nothing from here: a row that no step asked
for has no gradient and routers have no weight decay, so that it still is the fresh draw of the start.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Seeding = Literal["uniform", "nearest_category", "nearest_vector", "soft_vector"]

SOFTNESS = 0.1
"""Temperature of the cosines in ``soft_vector``."""


def donor_shares(
    kind: Seeding, trained: Sequence[int], unseen: Sequence[int], *, vectors: Tensor | None, donors: Mapping[int, int]
) -> Tensor:
    """The shares pi of the ``trained`` tasks in each of the ``unseen`` ones, (unseen, trained) float32; each row sums to 1.

    ``uniform``: 1 / trained. ``nearest_category``: all from ``donors[u]``. ``nearest_vector``: all from the task of the
    greatest cosine (of equal ones the first). ``soft_vector``: softmax(cosine / 0.1).

    Args:
        vectors: (T, u), a vector for every task number; read by the last two kinds.
        donors: unseen -> trained task number; read by ``nearest_category``.

    Raises:
        ValueError: no task is trained, what the kind reads is missing, or an unseen task's vector is orthogonal to all of the
            trained ones, so that none is near.
    """
    if not trained:
        raise ValueError("rows of unseen tasks come from trained tasks, got none")
    if kind == "uniform":
        return torch.full((len(unseen), len(trained)), 1 / len(trained))
    if kind == "nearest_category":
        for task in unseen:
            if donors.get(task) not in trained:
                raise ValueError(f"task {task} needs a donor among the trained tasks {list(trained)}, got {donors.get(task)}")
        return _one_hot([trained.index(donors[task]) for task in unseen], len(trained))
    if vectors is None:
        raise ValueError(f"unseen: {kind} compares task vectors, got none")
    own, others = vectors[list(unseen)].float(), vectors[list(trained)].float()
    cosines = functional.cosine_similarity(own.unsqueeze(1), others, dim=-1).cpu()
    for task, row in zip(unseen, cosines, strict=True):
        if not row.any():
            raise ValueError(
                f"unseen: {kind} needs vectors that say which tasks are alike; that of task {task} has cosine 0 to all"
            )
    return _one_hot(cosines.argmax(-1).tolist(), len(trained)) if kind == "nearest_vector" else (cosines / SOFTNESS).softmax(-1)


def seed_rows(rows: Tensor | Sequence[Tensor], trained: Sequence[int], unseen: Sequence[int], shares: Tensor) -> None:
    """Write the rows of the ``unseen`` tasks in place: sums of the ``trained`` ones by ``shares`` (unseen, trained).

    ``rows``: (T, ...) or a list of T tensors of one shape. A share of 1 copies its donor's row bit by bit.

    Raises:
        ValueError: a task is both trained and unseen, or ``shares`` does not fit.
    """
    if overlap := sorted(set(trained) & set(unseen)):
        raise ValueError(f"tasks {overlap} are both trained and unseen")
    if shares.shape != (len(unseen), len(trained)):
        raise ValueError(f"shares must be ({len(unseen)}, {len(trained)}), got {tuple(shares.shape)}")
    with torch.no_grad():
        for task, of_task in zip(unseen, shares.tolist(), strict=True):
            if 1.0 in of_task:
                rows[task].copy_(rows[trained[of_task.index(1.0)]])
            else:
                parts = [share * rows[donor].float() for donor, share in zip(trained, of_task, strict=True)]
                rows[task].copy_(torch.stack(parts).sum(0))


def _one_hot(numbers: list[int], count: int) -> Tensor:
    return functional.one_hot(torch.tensor(numbers, dtype=torch.int64), count).float()
