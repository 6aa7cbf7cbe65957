"""One tag per word."""

import torch
from torch import Tensor
from torch.nn import functional

from lightning_modules.network.task_heads.base import TaskHead


class TaggingHead(TaskHead):
    """Logits (n, S, C) for words 0 to S - 1 (a text of S tokens has at most S words), from the mean of each word's subwords.

    Rows beyond an example's last word hold the linear layer's bias and mean nothing.
    """

    def pool(self, hidden: Tensor, attention_mask: Tensor, word_index: Tensor) -> Tensor:
        """The mean state of each word's subwords, (n, S, d) -> (n, S, d) with words in place of positions."""
        # A matrix product, not scatter_add: on a GPU the order of scatter_add's sums changes from run to run.
        words = torch.arange(word_index.shape[1], device=word_index.device)
        belongs = (word_index[:, None, :] == words[None, :, None]).to(hidden.dtype)
        return (belongs @ hidden) / belongs.sum(-1, keepdim=True).clamp_min(1)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of logits (n, S, C) with tags (n, W), W <= S, -100: no word; mean over each example's words -> (n,)."""
        logits = outputs[:, : labels.shape[1]].transpose(1, 2)
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return losses.sum(-1) / (labels >= 0).sum(-1).clamp_min(1)

    def predict(self, outputs: Tensor, word_index: Tensor) -> list[list[int]]:
        """The most probable tag's number for each word that has a token left in ``word_index`` (n, S)."""
        counts = (word_index.amax(-1) + 1).tolist()
        return [tags[:count] for tags, count in zip(outputs.argmax(-1).tolist(), counts, strict=True)]
