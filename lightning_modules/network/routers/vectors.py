"""Task vectors: what a task network or a conditioned gate knows of a task (specs/task_aware_gating.md 2.4).

Legend: R tasks asked for, T tasks, u width of a vector.
"""

import torch
from torch import Tensor, nn

from lightning_modules.router_config import RouterConfig
from lightning_modules.seeds import derive

ID_STD = 0.02
"""Standard deviation of learned vectors at the start (specs/task_aware_gating.md 2.4)."""


class TaskVectors(nn.Module):
    """One vector for each of T tasks: parameters where they are trained, else buffers.

    ``id`` starts from N(0, 0.02^2) and ``random`` from N(0, 1), each task with its own stream whatever the number of tasks;
    ``onehot`` is the identity; every other kind is computed elsewhere and given.
    """

    rows: Tensor

    def __init__(self, config: RouterConfig, num_tasks: int, given: Tensor | None, seed: int) -> None:
        """``given``: (T, u) vectors of the kinds that are computed; the kinds that start from nothing do not look at it.

        Raises:
            ValueError: the kind is computed and ``given`` is None, or does not have one row per task.
        """
        super().__init__()
        kind = config.task_vectors
        match kind:
            case "id" | "random":
                streams = [torch.Generator().manual_seed(derive(seed, "task vector", task)) for task in range(num_tasks)]
                rows = torch.stack([torch.randn(config.task_vector_size, generator=stream) for stream in streams])
                rows = rows * ID_STD if kind == "id" else rows
            case "onehot":
                rows = torch.eye(num_tasks)
            case _:
                if given is None:
                    raise ValueError(f"task_vectors: {kind} needs the tasks' computed vectors, got none")
                if given.ndim != 2 or len(given) != num_tasks:
                    shape = tuple(given.shape)
                    raise ValueError(f"task_vectors: {kind} needs a row for each of {num_tasks} tasks, got shape {shape}")
                rows = given.detach().to(torch.float32, copy=True)
        trained = kind == "id" if config.train_task_vectors is None else config.train_task_vectors
        if trained:
            self.rows = nn.Parameter(rows)
        else:
            self.register_buffer("rows", rows)

    @property
    def width(self) -> int:
        """Width u of a vector."""
        return self.rows.shape[1]

    def forward(self, task_ids: Tensor) -> Tensor:
        """(R,) int64 task numbers -> (R, u) float32."""
        return self.rows[task_ids].float()
