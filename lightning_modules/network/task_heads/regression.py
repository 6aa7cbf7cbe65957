"""One number per text or pair of texts."""

from torch import Tensor

from lightning_modules.network.task_heads.base import TaskHead


class RegressionHead(TaskHead):
    """A number (n,) from the first token, on the scale of the labels as they are in the data (they are not standardised)."""

    def forward(self, hidden: Tensor, attention_mask: Tensor, word_index: Tensor) -> Tensor:
        """(n, S, d) states -> (n,) numbers."""
        return super().forward(hidden, attention_mask, word_index).squeeze(-1)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Squared error of numbers (n,) and labels (n,) float32 -> (n,)."""
        return (outputs - labels).square()

    def predict(self, outputs: Tensor, word_index: Tensor) -> list[float]:
        """The number for each example."""
        return outputs.tolist()
