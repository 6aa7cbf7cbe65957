"""Task-level routers: which experts a task uses at one block, and with what weight.

Legend: R rows routed (one per task of the batch), T tasks, E experts, K experts chosen per row.
Every router returns the same :class:`Routing`; losses and measurements read nothing else.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.config import RouterConfig
from lightning_modules.seeds import derive


@dataclass(frozen=True)
class Routing:
    """The decision of one router for R tasks, in float32."""

    weights: Tensor
    """(R, E) combine weights, zero where an expert is not chosen; each row sums to 1."""
    chosen: Tensor
    """(R, K) int64 numbers of the experts that run, most probable first."""
    probabilities: Tensor
    """(R, E) softmax over all experts, before selection."""
    logits: Tensor
    """(R, E); of a fixed router, logits whose softmax gives its probabilities."""


class Router(nn.Module):
    """Routes tasks at one block: ``router(task_ids)`` with (R,) int64 -> :class:`Routing`. Deterministic."""

    def forward(self, task_ids: Tensor) -> Routing:
        """(R,) int64 task numbers -> routing of R rows."""
        raise NotImplementedError


class TaskRouter(Router):
    """One learned logit vector per task: p = softmax(logits_t / temperature).

    Initial logits are drawn from N(0, init_std); each task has its own stream, whatever the number of tasks.
    """

    def __init__(self, config: RouterConfig, num_tasks: int, num_experts: int, layer: int, seed: int) -> None:
        super().__init__()
        self._selection: Literal["top_k", "soft"] = config.selection
        self._top_k = config.top_k
        self._temperature = config.temperature
        rows = [torch.randn(num_experts, generator=_stream(seed, layer, task)) for task in range(num_tasks)]
        self.logits = nn.Parameter(torch.stack(rows) * config.init_std)

    def forward(self, task_ids: Tensor) -> Routing:
        """(R,) int64 task numbers -> routing of R rows."""
        logits = self.logits[task_ids].float()
        probabilities = (logits / self._temperature).softmax(-1)
        if self._selection == "soft":
            return Routing(probabilities, probabilities.argsort(-1, descending=True), probabilities, logits)
        weights, chosen = select(probabilities, self._top_k)
        return Routing(weights, chosen, probabilities, logits)


class RandomRouter(Router):
    """One fixed expert per task, drawn from the seed: a control without any learned routing."""

    expert: Tensor

    def __init__(self, num_tasks: int, num_experts: int, layer: int, seed: int) -> None:
        super().__init__()
        self._num_experts = num_experts
        draws = [torch.randint(num_experts, (), generator=_stream(seed, layer, task)) for task in range(num_tasks)]
        self.register_buffer("expert", torch.stack(draws))

    def forward(self, task_ids: Tensor) -> Routing:
        """(R,) int64 task numbers -> routing of R rows."""
        chosen = self.expert[task_ids].unsqueeze(-1)
        weights = torch.zeros(len(task_ids), self._num_experts, device=chosen.device).scatter(-1, chosen, 1.0)
        logits = torch.zeros_like(weights).masked_fill(weights == 0, torch.finfo(weights.dtype).min)
        return Routing(weights, chosen, weights, logits)


class UniformRouter(Router):
    """Weight 1/E for every expert: a control that has the experts but no choice among them."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self._num_experts = num_experts

    def forward(self, task_ids: Tensor) -> Routing:
        """(R,) int64 task numbers -> routing of R rows."""
        logits = torch.zeros(len(task_ids), self._num_experts, device=task_ids.device)
        weights = torch.full_like(logits, 1 / self._num_experts)
        chosen = torch.arange(self._num_experts, device=task_ids.device).expand(len(task_ids), -1)
        return Routing(weights, chosen, weights, logits)


def build_router(config: RouterConfig, num_tasks: int, num_experts: int, layer: int, seed: int) -> Router:
    """The router of ``config.kind`` for one block."""
    match config.kind:
        case "task":
            return TaskRouter(config, num_tasks, num_experts, layer, seed)
        case "random":
            return RandomRouter(num_tasks, num_experts, layer, seed)
        case "uniform":
            return UniformRouter(num_experts)


def select(probabilities: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Combine weights (R, E) and numbers (R, K) of the ``top_k`` most probable experts.

    K = 1 weighs its expert by 1 + p - sg(p), which is 1 but has the gradient of p; K >= 2 renormalises over the chosen.
    Equal experts then compute what one of them computes, and the router has a gradient (specs/task_aware_gating.md 2.3).
    """
    kept, chosen = probabilities.topk(top_k, dim=-1)
    kept = (kept - kept.detach()) + 1 if top_k == 1 else kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, chosen, kept), chosen


def mutual_information_loss(routing: Routing) -> Tensor:
    """-I(task; expert) in nats, a scalar; the routing's rows are distinct tasks of equal weight (Mod-Squad, Chen et al. 2023).

    I = mean_t KL(p_t || mean_t p_t). The least value is -ln min(R, E): experts balanced over the tasks, each task sharp.
    With one row it is 0 and has no gradient.
    """
    p = routing.probabilities
    tiny = torch.finfo(p.dtype).tiny
    marginal = p.mean(0)
    return -(p * (p.clamp_min(tiny).log() - marginal.clamp_min(tiny).log())).sum(-1).mean()


def _stream(seed: int, layer: int, task: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, "router", layer, task))
