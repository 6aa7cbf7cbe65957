"""Several workers that train one trial: who they are, how Lightning sees them, and how they add up gradients."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Gang:
    """One worker's place among the workers of its trial."""

    rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    """Where rank 0 listens."""
    port: int = 0


class GangEnvironment(ClusterEnvironment):
    """Tells Lightning what the launcher has decided: every worker is a node with one device."""

    def __init__(self, gang: Gang) -> None:
        self._gang = gang

    @property
    def creates_processes_externally(self) -> bool:  # noqa: D102
        return True

    @property
    def main_address(self) -> str:  # noqa: D102
        return self._gang.address

    @property
    def main_port(self) -> int:  # noqa: D102
        return self._gang.port

    @staticmethod
    def detect() -> bool:  # noqa: D102
        return False

    def world_size(self) -> int:  # noqa: D102
        return self._gang.world_size

    def set_world_size(self, size: int) -> None:  # noqa: D102
        if size != self._gang.world_size:
            raise ValueError(f"the gang has {self._gang.world_size} workers, Lightning expects {size}")

    def global_rank(self) -> int:  # noqa: D102
        return self._gang.rank

    def set_global_rank(self, rank: int) -> None:  # noqa: D102
        if rank != self._gang.rank:
            raise ValueError(f"this worker has rank {self._gang.rank}, Lightning expects {rank}")

    def local_rank(self) -> int:  # noqa: D102
        return 0

    def node_rank(self) -> int:  # noqa: D102
        return self._gang.rank


class GangStrategy(DDPStrategy):
    """Lightning's DDP without the DistributedDataParallel wrapper.

    The wrapper gives every parameter a gradient bucket, so experts that a step did not use would get zero gradients and
    AdamW would move them. Here :func:`sum_gradients` adds up only the gradients that exist: idle experts stand still with
    any number of workers, as they do with one.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is."""

    def __init__(self, gang: Gang) -> None:
        super().__init__(cluster_environment=GangEnvironment(gang))


def make_trainer(
    gang: Gang, gpu: bool = False, precision: Literal["fp32", "bf16"] = "fp32", callbacks: Sequence[lightning.Callback] = ()
) -> lightning.Trainer:
    """Lightning's trainer for one worker with one device: one pass over the steps that it is given, and nothing of its own (no
    logger, checkpoints, progress bar, sampler or rehearsal of validation)."""
    several = gang.world_size > 1
    return lightning.Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=1,
        num_nodes=gang.world_size,
        strategy=GangStrategy(gang) if several else "auto",
        plugins=None if several else [GangEnvironment(gang)],
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def sum_gradients(parameters: Iterable[Tensor], even: bool = True) -> None:
    """Replace each existing gradient by its sum over all workers.

    ``even``: every worker holds a slice of every group of the step, so all have gradients for the same parameters. If not, the
    workers first agree which parameters have one anywhere; who lacks it adds zeros.
    """
    parameters = list(parameters)
    if not even:
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
        dist.all_reduce(present, dist.ReduceOp.MAX)
        for parameter, anywhere in zip(parameters, present.tolist(), strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = parameters_to_vector(gradients)
    dist.all_reduce(flat)
    vector_to_parameters(flat, gradients)


def gather(value: object) -> list[object]:
    """``value`` of every worker, by rank; ``[value]`` without a gang."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def sum_over_workers(tensor: Tensor) -> Tensor:
    """The sum over all workers, a new tensor."""
    total = tensor.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total
