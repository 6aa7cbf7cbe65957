"""What every task head does: outputs from the encoder's states, a loss per example, predictions."""

from typing import Any

import torch
from torch import Tensor, nn


class TaskHead(nn.Module):
    """Dropout and one linear layer on the encoder's states. It computes in float32, under autocast too.

    Legend: n examples of the task, S positions, d hidden width, C labels, W words.
    """

    def __init__(self, hidden_size: int, num_outputs: int, dropout: float, seed: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_size, num_outputs)
        with torch.no_grad():
            self.linear.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
            self.linear.bias.zero_()

    def forward(self, hidden: Tensor, attention_mask: Tensor, word_index: Tensor) -> Tensor:
        """Outputs for ``hidden`` (n, S, d), ``attention_mask`` (n, S), ``word_index`` (n, S; -1: not part of a word)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(self.dropout(self.pool(hidden.float(), attention_mask, word_index)))

    def pool(self, hidden: Tensor, attention_mask: Tensor, word_index: Tensor) -> Tensor:
        """The states that the linear layer reads; here the first token's, (n, S, d) -> (n, d)."""
        return hidden[:, 0]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of each example, (n,) float32."""
        raise NotImplementedError

    def predict(self, outputs: Tensor, word_index: Tensor) -> list[Any]:
        """Plain Python predictions, one per example."""
        raise NotImplementedError
