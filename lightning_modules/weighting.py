"""How much each task's loss counts: the rules of ``train.loss_weighting``."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

WINDOW = 5
"""Losses of a task that ``balance`` averages (He and Choi 2021)."""

SMALLEST = 1e-8
"""``balance`` counts a mean loss below this as this, so that a task that is learned to the last bit keeps a finite weight."""


class LossWeights(nn.Module):
    """Weighs the loss of each group of a step by its task.

    * ``uniform``: 1.
    * ``size``: n_t over the mean n of the tasks, n_t training examples.
    * ``balance``: (sum_k M_k) / (K M_t), M_k the mean of the last :data:`WINDOW` losses that task k has had (of fewer, if it
      has had fewer), up to the step before, and the sum over the K tasks that have had one; 1 for a task that has had none.
      He and Choi 2021 (specs/interference.md A3) leave out the K, so theirs is K times as large.
    * ``uncertainty``: one learned s_t per task, from 0: exp(-s_t) L + s_t / 2. That is -log likelihood with s = log sigma^2 in
      its classification form, L / sigma^2 + log sigma (Kendall, Gal and Cipolla 2018), for every kind of task. Their
      regression form, L / (2 sigma^2) + log sigma for a squared error L, is the same up to a shift of s_t by log 2, so a
      regression task starts with twice the weight that it would have there.

    The parameters s_t are one scalar each, so that a task that a step did not hold has no gradient and stands still; they
    are to train without weight decay. The losses that ``balance`` averages are buffers, so a checkpoint holds them.
    """

    recent: Tensor
    counts: Tensor

    def __init__(self, rule: Literal["uniform", "size", "balance", "uncertainty"], sizes: Sequence[int]) -> None:
        """``sizes[t]``: training examples of task t, 0 for one that is not trained on."""
        super().__init__()
        self.rule = rule
        self.sizes = tuple(sizes)
        if rule == "uncertainty":
            self.log_variances = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in sizes)
        if rule == "balance":
            self.register_buffer("recent", torch.zeros(len(sizes), WINDOW, dtype=torch.float64))
            self.register_buffer("counts", torch.zeros(len(sizes), dtype=torch.int64))

    @property
    def observes(self) -> bool:
        """Whether :meth:`observe` has to be called after every step."""
        return self.rule == "balance"

    def forward(self, task: int, loss: Tensor, share: float | Tensor = 1.0) -> Tensor:
        """The weighted loss of one group: scalar to scalar.

        ``loss``: this worker's part of the group's mean loss, the sum over its rows divided by the rows of all workers (zero
        if it has none). ``share``: this worker's part of what is added once per group, s_t / 2; the shares of all workers sum
        to 1, as ``1 / world_size`` does, and then the sum of the results over the workers is what one worker would compute.
        """
        if self.rule == "uniform":
            return loss
        if self.rule == "uncertainty":
            s = self.log_variances[task]
            return torch.exp(-s) * loss + share * s / 2
        return loss * self.weight(task).to(loss)

    @torch.no_grad()
    def weight(self, task: int) -> Tensor:
        """The number, a float64 scalar, by which the loss of ``task`` is multiplied now."""
        if self.rule == "uncertainty":
            return torch.exp(-self.log_variances[task].double())
        if self.rule == "balance":
            return self._balance()[task]
        if self.rule == "size":
            trained = sum(size > 0 for size in self.sizes)
            return torch.tensor(self.sizes[task] * trained / sum(self.sizes), dtype=torch.float64)
        return torch.ones((), dtype=torch.float64)

    def _balance(self) -> Tensor:
        """(T,) weights by the moving averages."""
        seen = self.counts > 0
        means = (self.recent.sum(1) / self.counts.clamp(1, WINDOW)).clamp(min=SMALLEST)
        weights = (means * seen).sum() / (seen.sum() * means)
        return torch.where(seen, weights, torch.ones_like(weights))

    @torch.no_grad()
    def observe(self, losses: Mapping[int, Tensor | float]) -> None:
        """Take in the unweighted mean loss, over all workers, of each task that the step which has just ended held."""
        if not self.observes:
            return
        for task, loss in losses.items():
            latest = torch.as_tensor(loss, dtype=self.recent.dtype, device=self.recent.device).reshape(1)
            self.recent[task] = torch.cat([self.recent[task, 1:], latest])
            self.counts[task] += 1
