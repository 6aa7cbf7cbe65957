"""The two layers of a biaffine parser (Dozat & Manning, ICLR 2017, arXiv 1611.01734, section 3.1).

Legend: n examples, I and J positions, s width, C outputs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_modules.network.task_heads.base import linear


class Projection(nn.Module):
    """One hidden layer with LeakyReLU (slope 0.1) that strips a state of what the following scores do not need.

    Dropout is variational as in the paper: one mask for all positions of an example.
    """

    def __init__(self, inputs: int, size: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = linear(inputs, size, generator)
        self.dropout = dropout

    def forward(self, states: Tensor) -> Tensor:
        """(n, I, inputs) -> (n, I, s)."""
        projected = functional.leaky_relu(self.linear(states), 0.1)
        keep = functional.dropout(torch.ones_like(projected[:, :1]), self.dropout, self.training)
        return projected * keep


class Biaffine(nn.Module):
    """C bilinear scores of every pair: left^T U_c right, the left side (with ``bias``, both sides) extended by a constant 1.

    The left side's constant is what scores the right state alone: for arcs, how readily a word is a head. The right side's
    constant adds the left state alone and a plain bias, as the paper has it for relations.
    """

    def __init__(self, size: int, outputs: int, generator: torch.Generator, bias: bool) -> None:
        super().__init__()
        self.bias = bias
        # Not zero, as in some parsers: the projections would start without a gradient.
        self.weight = nn.Parameter(torch.empty(size + 1, outputs, size + bias).normal_(0, 0.02, generator=generator))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """(n, I, s), (n, J, s) -> (n, I, J, C)."""
        left = functional.pad(left, (0, 1), value=1.0)
        right = functional.pad(right, (0, 1), value=1.0) if self.bias else right
        transformed = torch.einsum("nia,acb->nicb", left, self.weight)
        return torch.einsum("nicb,njb->nijc", transformed, right)
