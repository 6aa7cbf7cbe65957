"""One tag per word."""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from lightning_modules.network.task_heads.base import HeadSpec, States, TaskHead, linear, symmetric_divergence


class Scores(NamedTuple):
    """Scores of C outcomes at several places of n examples: words, or spans."""

    scores: Tensor
    """(n, ..., C)."""
    mask: Tensor
    """(n, ...) bool, the places that an example has; the scores of the others mean nothing."""


def mean_cross_entropy(outputs: Scores, targets: Tensor) -> Tensor:
    """Mean over each example's places with a target (n, ...) that is not -100; 0 for an example without any -> (n,)."""
    targets = targets.masked_fill(~outputs.mask, -100).flatten(1)
    losses = functional.cross_entropy(outputs.scores.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
    return losses.sum(-1) / (targets >= 0).sum(-1).clamp_min(1)


class TaggingHead(TaskHead):
    """Logits (n, W, C) for the words that the model has read, from the mean of each word's subwords."""

    def __init__(self, hidden_size: int, spec: HeadSpec) -> None:
        super().__init__(hidden_size, spec)
        self.linear = linear(hidden_size, spec.num_labels, self.generator)

    def outputs(self, hidden: Tensor, states: States) -> Scores:
        """(n, S, d) -> logits (n, W, C) and the words (n, W) that have been read."""
        return Scores(self.linear(states.word_states(hidden)), states.word_mask)

    def loss(self, outputs: Scores, labels: Tensor) -> Tensor:
        """Cross-entropy with tags (n, any number of words), mean over each example's words that have been read -> (n,)."""
        width = outputs.mask.shape[1]
        return mean_cross_entropy(outputs, functional.pad(labels, (0, width - labels.shape[1]), value=-100))

    def predict(self, outputs: Scores) -> list[list[int]]:
        """The most probable tag's number for each word that has been read."""
        counts = outputs.mask.sum(-1).tolist()
        return [tags[:count] for tags, count in zip(outputs.scores.argmax(-1).tolist(), counts, strict=True)]

    def divergence(self, first: Scores, second: Scores) -> Tensor:
        """Between the tag distributions, mean over each example's words, (n,)."""
        apart = symmetric_divergence(first.scores, second.scores) * first.mask
        return apart.sum(-1) / first.mask.sum(-1).clamp_min(1)
