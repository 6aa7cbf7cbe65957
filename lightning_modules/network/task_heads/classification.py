"""One label per text or pair of texts."""

from torch import Tensor
from torch.nn import functional

from lightning_modules.network.task_heads.base import HeadSpec, States, TaskHead, linear, symmetric_divergence


class ClassificationHead(TaskHead):
    """Logits (n, C) from the example's pooled state."""

    def __init__(self, hidden_size: int, spec: HeadSpec) -> None:
        super().__init__(hidden_size, spec)
        self.linear = linear(hidden_size, spec.num_labels, self.generator)

    def outputs(self, hidden: Tensor, states: States) -> Tensor:
        """(n, S, d) -> logits (n, C)."""
        return self.linear(states.pooled(hidden, self.spec.pooling))

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of logits (n, C) with labels (n,) int64 -> (n,)."""
        return functional.cross_entropy(outputs, labels, reduction="none")

    def predict(self, outputs: Tensor) -> list[int]:
        """The most probable label's number for each example."""
        return outputs.argmax(-1).tolist()

    def divergence(self, first: Tensor, second: Tensor) -> Tensor:
        """Between the label distributions, (n,)."""
        return symmetric_divergence(first, second)
