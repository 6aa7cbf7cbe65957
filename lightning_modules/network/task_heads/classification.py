"""One label per text or pair of texts."""

from torch import Tensor
from torch.nn import functional

from lightning_modules.network.task_heads.base import TaskHead


class ClassificationHead(TaskHead):
    """Logits (n, C) from the first token."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of logits (n, C) with labels (n,) int64 -> (n,)."""
        return functional.cross_entropy(outputs, labels, reduction="none")

    def predict(self, outputs: Tensor, word_index: Tensor) -> list[int]:
        """The most probable label's number for each example."""
        return outputs.argmax(-1).tolist()
