"""Learned routers of examples and tokens: hidden state (and task) -> router logits, in float32 whatever the states' dtype.

Formulas: specs/task_aware_gating.md 2.4, numerics 2.5. Legend: U units, G groups of units of one task each, d hidden width,
E experts, T tasks, u_t the task's vector, of width r.

A vector depends on its task alone, so what it makes of the gate is computed once per group and meets the states in one
product per group: no (U, r) copies, and as many products as the batch has tasks.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_modules.network.routers.record import Rows
from lightning_modules.router_config import CONDITIONED, RouterConfig
from lightning_modules.seeds import derive

Vectors = Callable[[Tensor], Tensor]
"""(R,) int64 task numbers -> (R, r) task vectors."""

_TASK_SHARE = 0.1
"""Scale of ``hyper``'s V_r relative to W at the start: nearly one gate for all tasks, yet every parameter has a gradient."""


class Gate(nn.Module):
    """Logits of one block's ``example`` or ``token`` router, by ``config.conditioning``; ``gate(x, groups, vectors)``.

    =========== ================================================== ==========================================================
    none        z = W x                                            ``weight`` (E, d)
    per_task    z = W_t x + b_t                                    ``weights[t]`` (E, d), ``biases[t]`` (E,): one each per task
    additive    z = W x + U u_t                                    ``weight``, ``shift`` (E, r)
    mlp         z = W_2 gelu(W_1 [x; u_t])                         ``inner`` (h, d + r), ``weight`` (E, h)
    film        z = W (x * (1 + A u_t) + C u_t)                    ``weight``, ``scale`` A and ``offset`` C (d, r)
    hyper       z = (W + sum_r u_t[r] V_r) x                       ``weight``, ``bank`` V (r, E, d)
    =========== ================================================== ==========================================================

    ``additive`` is the task-agnostic gate plus a bias per task; the last three let task and state interact. Every matrix
    starts from N(0, ``init_std``), ``hyper``'s bank at a tenth of it, ``mlp``'s first layer from N(0, 1/fan_in), so that
    zeros after it can learn; biases start at zero. Each tensor has its own stream of the seed and each task of ``per_task``
    too, whatever the number of tasks. A task of ``per_task`` that a step does not hold gets no gradient at all.

    ``normalise`` (SMEAR, Muqeeth et al. 2023): LayerNorm on x, and each expert's weight vector divided by its length.
    ``noise: jitter`` (Switch): x * U(1 - e, 1 + e). ``noise: gaussian`` (Shazeer et al. 2017): z + N(0, 1) softplus(W_n x),
    with W_n (``noise_weight``) = 0 at the start, one for all tasks. Both in training only, from the global random state.
    """

    def __init__(
        self,
        config: RouterConfig,
        hidden_size: int,
        num_experts: int,
        num_tasks: int,
        vector_width: int,
        block: int,
        seed: int,
    ) -> None:
        super().__init__()
        self._conditioning = config.conditioning
        self._noise: Literal["none", "jitter", "gaussian"] = config.noise
        self._noise_scale = config.noise_scale
        self._normalise = config.normalise

        def normal(std: float, *shape: int, stream: tuple[str | int, ...]) -> nn.Parameter:
            generator = torch.Generator().manual_seed(derive(seed, "router", block, *stream))
            return nn.Parameter(torch.randn(shape, generator=generator) * std)

        if self._conditioning == "per_task":
            streams = [("weight", task) for task in range(num_tasks)]
            self.weights = nn.ParameterList(normal(config.init_std, num_experts, hidden_size, stream=s) for s in streams)
            self.biases = nn.ParameterList(nn.Parameter(torch.zeros(num_experts)) for _ in streams)
        else:
            width = config.hidden_size if self._conditioning == "mlp" else hidden_size
            self.weight = normal(config.init_std, num_experts, width, stream=("weight",))
        match self._conditioning:
            case "additive":
                self.shift = normal(config.init_std, num_experts, vector_width, stream=("shift",))
            case "mlp":
                fan_in = hidden_size + vector_width
                self.inner = normal(fan_in**-0.5, config.hidden_size, fan_in, stream=("inner",))
            case "film":
                self.scale = normal(config.init_std, hidden_size, vector_width, stream=("scale",))
                self.offset = normal(config.init_std, hidden_size, vector_width, stream=("offset",))
            case "hyper":
                std = config.init_std * _TASK_SHARE
                self.bank = normal(std, vector_width, num_experts, hidden_size, stream=("bank",))
            case "none" | "per_task":
                pass
        self.norm = nn.LayerNorm(hidden_size) if config.normalise else None
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, hidden_size)) if config.noise == "gaussian" else None
        self.baseline = _zero_linear(hidden_size) if config.selection == "sampled" else None

    def forward(self, x: Tensor, groups: Rows, vectors: Vectors | None) -> Tensor:
        """(U, d) states of any dtype -> logits (U, E) float32.

        ``groups``: (task, start, stop), covering the U units in order. ``vectors``: read by conditionings with a vector only.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.training and self._noise == "jitter":
                x = x * torch.empty_like(x).uniform_(1 - self._noise_scale, 1 + self._noise_scale)
            if self.norm is not None:
                x = self.norm(x)
            logits = self._logits(x, groups, vectors)
            if self.training and self.noise_weight is not None:
                size = functional.softplus(functional.linear(x, self.noise_weight))
                logits = logits + torch.randn_like(logits) * size
            return logits

    def value(self, x: Tensor) -> Tensor:
        """The learned baseline of ``selection: sampled``, (U, d) -> (U,) float32; nothing flows back into the states.

        Raises:
            ValueError: another selection, which has no baseline.
        """
        if self.baseline is None:
            raise ValueError("only selection: sampled has a baseline")
        with torch.autocast(x.device.type, enabled=False):
            return self.baseline(x.detach().float()).squeeze(-1)

    def rows_of_tasks(self) -> list[list[Tensor]]:
        """The parameters of ``per_task``, each a list with one tensor per task; [] of gates without rows of tasks."""
        return [list(self.weights), list(self.biases)] if self._conditioning == "per_task" else []

    def _logits(self, x: Tensor, groups: Rows, vectors: Vectors | None) -> Tensor:
        if self._conditioning == "none":
            return functional.linear(x, self._unit(self.weight))
        if self._conditioning == "per_task":
            pairs = [(self._unit(self.weights[task]), self.biases[task]) for task, _, _ in groups]
            return _affine(x, groups, [w for w, _ in pairs], [b for _, b in pairs])
        u = _vectors_of(groups, vectors, x.device)
        match self._conditioning:
            case "additive":
                return functional.linear(x, self.weight) + _spread(functional.linear(u, self.shift), groups)
            case "mlp":
                of_x, of_u = self.inner.split([x.shape[-1], u.shape[-1]], dim=-1)
                inner = functional.linear(x, of_x) + _spread(functional.linear(u, of_u), groups)
                return functional.linear(functional.gelu(inner), self.weight)
            case "film":  # W (x * s + c) = (W * s) x + W c: a matrix of the group's own, and nothing of size (U, d) to keep
                scale, offset = 1 + functional.linear(u, self.scale), functional.linear(u, self.offset)
                biases = functional.linear(offset, self.weight)
                return _affine(x, groups, list((self.weight * scale.unsqueeze(1)).unbind()), list(biases.unbind()))
            case _:  # hyper
                own = (u @ self.bank.flatten(1)).unflatten(1, self.weight.shape)
                return _affine(x, groups, list((self.weight + own).unbind()))

    def _unit(self, weight: Tensor) -> Tensor:
        return functional.normalize(weight, dim=-1) if self._normalise else weight


def _zero_linear(width: int) -> nn.Linear:
    """A width -> 1 layer that predicts 0, built without drawing from the global random state."""
    layer = nn.Linear(width, 1, device="meta").to_empty(device="cpu")
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _vectors_of(groups: Rows, vectors: Vectors | None, device: torch.device) -> Tensor:
    """(G, r) float32 vectors of the groups' tasks."""
    if vectors is None:
        raise ValueError(f"a gate whose conditioning is one of {', '.join(CONDITIONED)} needs task vectors, got None")
    tasks = torch.tensor([task for task, _, _ in groups])
    return vectors(tasks.to(device, non_blocking=True)).float()


def _spread(per_group: Tensor, groups: Rows) -> Tensor:
    """(G, n), one row per group -> (U, n), the group's row for each of its units."""
    rows = per_group.unbind()
    return torch.cat([row.expand(stop - start, -1) for row, (_, start, stop) in zip(rows, groups, strict=True)])


def _affine(x: Tensor, groups: Rows, weights: list[Tensor], biases: list[Tensor] | None = None) -> Tensor:
    """Each group's own (E, d) matrix and (E,) bias on its units, (U, d) -> (U, E)."""
    shifts = biases or [None] * len(groups)
    parts = [
        functional.linear(x[start:stop], weight, bias)
        for (_, start, stop), weight, bias in zip(groups, weights, shifts, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
