"""One number per text or pair of texts."""

from torch import Tensor

from lightning_modules.network.task_heads.base import HeadSpec, States, TaskHead, linear


class RegressionHead(TaskHead):
    """A standardised label (n,) from the example's pooled state: (label - mean) / sd, both of the training data."""

    def __init__(self, hidden_size: int, spec: HeadSpec) -> None:
        super().__init__(hidden_size, spec)
        self.linear = linear(hidden_size, 1, self.generator)
        self.mean: float = spec.facts["mean"]
        self.sd: float = spec.facts["sd"]

    def outputs(self, hidden: Tensor, states: States) -> Tensor:
        """(n, S, d) -> standardised numbers (n,)."""
        return self.linear(states.pooled(hidden, self.spec.pooling)).squeeze(-1)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Squared error in units of the labels' variance, of numbers (n,) and raw labels (n,) float32 -> (n,)."""
        return (outputs - (labels - self.mean) / self.sd).square()

    def predict(self, outputs: Tensor) -> list[float]:
        """The number for each example, on the labels' raw scale."""
        return (outputs * self.sd + self.mean).tolist()

    def divergence(self, first: Tensor, second: Tensor) -> Tensor:
        """Between Gaussians of the labels' variance around the numbers, (n,)."""
        return 0.5 * (first - second).square()
