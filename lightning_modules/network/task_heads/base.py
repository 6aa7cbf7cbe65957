"""What every task head does: outputs from the encoder's states, a loss per example, predictions.

Legend: n examples of the task, S positions, d hidden width, W words of the longest example, C labels.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.building import ConfigError
from lightning_modules.config import HeadsConfig


@dataclass(frozen=True)
class States:
    """The encoder's states of n examples; a long input's windows have been put together."""

    hidden: Tensor
    """(n, S, d)."""
    mask: Tensor
    """(n, S) bool, True for tokens."""
    words: Tensor
    """(n, S) int64, the word that a token belongs to; -1 for special tokens and padding, and everywhere in kinds that have no
    words."""
    starts: Tensor
    """(n, S) bool, True at the first token of every window (a whole input that fits is one window)."""
    options: Tensor | None = None
    """(m,) int64, the options of each of m examples, one row each, one example's after another's; None: a row is an example."""

    @cached_property
    def word_counts(self) -> Tensor:
        """(n,) int64, the words of each example that the model has read (words beyond ``max_windows`` are missing)."""
        return self.words.amax(-1) + 1

    @cached_property
    def word_mask(self) -> Tensor:
        """(n, W) bool, True for words."""
        width = int(self.word_counts.max().clamp_min(1))
        return torch.arange(width, device=self.words.device) < self.word_counts[:, None]

    def word_states(self, hidden: Tensor) -> Tensor:
        """The mean over each word's subwords of ``hidden`` (n, S, d) -> (n, W, d); zero for words without a token."""
        # A matrix product, not scatter_add: on a GPU the order of scatter_add's sums changes from run to run.
        numbers = torch.arange(self.word_mask.shape[1], device=self.words.device)
        belongs = (self.words[:, None, :] == numbers[None, :, None]).to(hidden.dtype)
        return (belongs @ hidden) / belongs.sum(-1, keepdim=True).clamp_min(1)

    def pooled(self, hidden: Tensor, pooling: str) -> Tensor:
        """One state per example, (n, S, d) -> (n, d): of the windows' first tokens (``first``) or of all tokens (``mean``)."""
        weights = (self.starts if pooling == "first" else self.mask).to(hidden.dtype)
        return (weights[:, None, :] @ hidden).squeeze(1) / weights.sum(-1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class HeadSpec:
    """What a head must know of its task."""

    name: str
    """The task's name: it names the head's random stream."""
    kind: str
    num_labels: int
    """Labels of the task; 1 for kinds without labels."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the preparation found in the training data for this kind of head (regression: mean and sd of the labels;
    constituency: the unary chains)."""
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    pooling: str = "first"
    dropout: float = 0.1
    """Dropout on the encoder's states."""
    seed: int = 0
    """Of the head's own random stream."""


class TaskHead(nn.Module, ABC):
    """A task's head. It computes in float32, under autocast too."""

    def __init__(self, hidden_size: int, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.dropout = nn.Dropout(spec.dropout)
        self.generator = torch.Generator().manual_seed(spec.seed)
        """Draws the initial weights; only used while the head is built."""

    def forward(self, states: States) -> Any:
        """The head's outputs for the examples of ``states``, in whatever form :meth:`loss` and :meth:`predict` read."""
        with torch.autocast(states.hidden.device.type, enabled=False):
            return self.outputs(self.dropout(states.hidden.float()), states)

    @abstractmethod
    def outputs(self, hidden: Tensor, states: States) -> Any:
        """As :meth:`forward`; ``hidden`` (n, S, d) are the states in float32, after dropout."""

    @abstractmethod
    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """Loss of each example, (n,) float32. ``labels`` in the form of ``lightning_modules.data.kinds``, padded with -100."""

    @abstractmethod
    def predict(self, outputs: Any) -> list[Any]:
        """Plain Python predictions, one per example, in the form of ``lightning_modules.data.kinds``."""

    def divergence(self, first: Any, second: Any) -> Tensor:
        """How far two outputs for the same n examples are apart: the mean of both KL divergences between their answers, (n,).

        Raises:
            ConfigError: the kind's answers have no distribution that is written down here (trees, spans, frames).
        """
        law = f"must be 0 with {self.spec.kind} tasks ({self.spec.name}), whose answers it cannot compare"
        raise ConfigError("model.router.consistency", law)


def linear(inputs: int, outputs: int, generator: torch.Generator, bias: bool = True) -> nn.Linear:
    """A linear layer with weights from N(0, 0.02) of ``generator`` and biases of zero."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.normal_(0, 0.02, generator=generator)
        if bias:
            layer.bias.zero_()
    return layer


def symmetric_divergence(first: Tensor, second: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2 of the softmaxes of two logit tensors (..., C) -> (...); -inf in both is no option."""
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    options = torch.isfinite(p)
    ratio = torch.where(options, p - q, 0.0)
    return 0.5 * ((p.exp() - q.exp()) * ratio).sum(-1)
