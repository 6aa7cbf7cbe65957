"""Experts: upcycled copies and parts of a feed-forward sub-layer, bottleneck adapters, and function-preserving widening.

Every expert is a module with parameters of its own, never a row of a stacked tensor: an expert that a step does not use
keeps ``grad is None`` and the optimiser leaves it alone.
Legend: d hidden width, f inner width of the FFN, m bottleneck.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Bottleneck(nn.Module):
    """``U gelu(D x)`` with biases, D (m, d), U (d, m): the change that an adapter adds to its input x.

    D is drawn from N(0, 0.02), U and the biases are zero, so that the change is zero at the start (Houlsby et al. 2019).
    """

    def __init__(self, hidden_size: int, bottleneck: int, seed: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, bottleneck)
        self.up = nn.Linear(bottleneck, hidden_size)
        with torch.no_grad():
            self.down.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                zero.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self.up(functional.gelu(self.down(hidden)))


def upcycle(module: AnyModule, noise: float, seed: int) -> AnyModule:
    """A trainable copy of ``module`` for use as an expert (sparse upcycling, Komatsuzaki et al. 2022).

    Each parameter tensor gets Gaussian noise of ``noise`` times the tensor's own standard deviation.
    """
    expert = copy.deepcopy(module).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in expert.parameters():
            _perturb(parameter, noise, generator)
    return expert


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Draw the global random numbers on the CPU from ``seed`` for a while: for code of others that takes no generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def split(
    up: nn.Linear, gate: nn.Linear | None, down: nn.Linear, which: int, parts: int
) -> tuple[nn.Linear, nn.Linear | None, nn.Linear]:
    """Part ``which`` of ``parts`` equal parts of the hidden units of ``down(activation(up(x)) [* gate(x)])``: up and gate
    (f, d) -> (f/parts, d), down (d, f) -> (d, f/parts) times ``parts``.

    The mean of all parts is the whole: down's bias, which every part has, stays as it is (Mod-Squad's width, Chen et al. 2023).
    ``parts`` divides f.
    """
    narrow_down = _blank(down.in_features // parts, down.out_features, down)
    with torch.no_grad():
        narrow_down.weight.copy_(down.weight.chunk(parts, 1)[which] * parts)
        if down.bias is not None:
            narrow_down.bias.copy_(down.bias)
    return _part(up, which, parts), None if gate is None else _part(gate, which, parts), narrow_down


def scaled(down: nn.Linear, factor: float) -> nn.Linear:
    """A copy of an FFN's last layer whose output is ``factor`` times as large."""
    smaller = copy.deepcopy(down)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.mul_(factor)
    return smaller


def _part(linear: nn.Linear, which: int, parts: int) -> nn.Linear:
    narrow = _blank(linear.in_features, linear.out_features // parts, linear)
    for name, parameter in narrow.named_parameters():
        parameter.data.copy_(linear.get_parameter(name).chunk(parts)[which])
    return narrow


def _blank(inputs: int, outputs: int, like: nn.Linear) -> nn.Linear:
    """A layer without values, made without random numbers."""
    return nn.Linear(inputs, outputs, bias=like.bias is not None, device="meta").to_empty(device=like.weight.device)


def widen(
    up: nn.Linear, gate: nn.Linear | None, down: nn.Linear, multiple: int, noise: float, seed: int
) -> tuple[nn.Linear, nn.Linear | None, nn.Linear]:
    """``multiple`` copies of every hidden unit of ``down(activation(up(x)) [* gate(x)])``: up and gate (f, d) ->
    (multiple f, d), down (d, f) -> (d, multiple f).

    Each copy hands on 1/multiple of the unit's output, so the function stays (Net2Net, Chen et al. 2016). ``noise``,
    relative to each tensor's standard deviation, lets the copies drift apart; without it they would stay equal. The result
    trains even in a frozen encoder, as the experts do for which it is the control.
    """
    generator = torch.Generator().manual_seed(seed)
    wide_down = nn.Linear(down.in_features * multiple, down.out_features, bias=down.bias is not None)
    with torch.no_grad():
        wide_up = _repeat_units(up, multiple, noise, generator)
        wide_gate = None if gate is None else _repeat_units(gate, multiple, noise, generator)
        wide_down.weight.copy_(down.weight.repeat(1, multiple) / multiple)
        if down.bias is not None:
            wide_down.bias.copy_(down.bias)
        _perturb(wide_down.weight, noise, generator)
    return wide_up, wide_gate, wide_down


def _repeat_units(linear: nn.Linear, multiple: int, noise: float, generator: torch.Generator) -> nn.Linear:
    wide = nn.Linear(linear.in_features, linear.out_features * multiple, bias=linear.bias is not None)
    wide.weight.copy_(linear.weight.repeat(multiple, 1))
    if linear.bias is not None:
        wide.bias.copy_(linear.bias.repeat(multiple))
    _perturb(wide.weight, noise, generator)
    return wide


def _perturb(tensor: Tensor, noise: float, generator: torch.Generator) -> None:
    scale = noise * tensor.std(correction=0)
    tensor.add_(torch.randn(tensor.shape, generator=generator) * scale)
