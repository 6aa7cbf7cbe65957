"""Seams: the places in a Hugging Face model where a family puts its own modules.

Legend: B rows of the batch, S positions, d hidden width, H attention heads.

Untouched, a seam computes exactly what the plain model computes there. A module at a seam is called as
``module(hidden, handed)``, where ``handed`` is what the caller of the backbone handed over for that block: the backbone
itself knows nothing of tasks. All modules at the seams of one block are handed the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention

from lightning_modules.network.layouts import FfnPlace, Layout, Stack


class Handover:
    """What the seams of the forward in progress are handed, by block number. Hugging Face's blocks pass no arguments on to
    their parts, so it goes around them. A forward inside a forward has its own, and the outer one's comes back after it."""

    def __init__(self) -> None:
        self._stack: list[Mapping[int, Any]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Handover:
        """Itself: a copied block (an expert) is handed what its original would be."""
        return self

    @contextmanager
    def hold(self, handed: Mapping[int, Any]) -> Iterator[None]:
        """Hand ``handed`` over for the duration of a ``with`` block."""
        self._stack.append(handed)
        try:
            yield
        finally:
            self._stack.pop()

    def at(self, block: int) -> Any:
        """What block number ``block`` is handed.

        Raises:
            RuntimeError: no forward of the backbone is in progress.
        """
        if not self._stack:
            raise RuntimeError(f"the seam of block {block} was called outside of the backbone: nothing is handed to it")
        return self._stack[-1][block]

    def again(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For gradient checkpointing, which calls a block once more in the backward: contexts of the first and of the second
        computation, which is handed the same."""
        return nullcontext(), self.hold(self._stack[-1]) if self._stack else nullcontext()


class FeedForward(nn.Module):
    """The FFN sub-layer ``down(dropout(activation(up(x)) * gate(x)))``, (..., d) -> (..., d), built of the block's own linear
    layers; without ``gate`` that factor is left out (gated: Shazeer 2020)."""

    def __init__(
        self,
        up: nn.Linear,
        activation: Callable[[Tensor], Tensor],
        down: nn.Linear,
        gate: nn.Linear | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.up = up
        self.activation = activation
        self.gate = gate
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.down = down

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        units = self.activation(self.up(hidden))
        if self.gate is not None:
            units = units * self.gate(hidden)
        return self.down(self.dropout(units))


class Seam(nn.Module):
    """One block's FFN sub-layer: the FFN itself or what replaces it, and what follows it inside the residual, before dropout
    and LayerNorm."""

    def __init__(self, block: int, ffn: FeedForward, handover: Handover) -> None:
        super().__init__()
        self.block = block
        self.ffn: FeedForward | None = ffn
        self.replacement: nn.Module | None = None
        self.follower: nn.Module | None = None
        self._handover = handover

    def take_ffn(self) -> FeedForward:
        """The block's FFN, to be copied or widened.

        Raises:
            RuntimeError: it has been replaced already.
        """
        if self.ffn is None:
            raise RuntimeError("the FFN at this seam has been replaced already")
        return self.ffn

    def replace(self, module: nn.Module) -> None:
        """Compute ``module(hidden, handed)`` instead of the FFN, which is dropped (an idle copy would only take memory)."""
        self.take_ffn()
        self.ffn, self.replacement = None, module

    def restore(self, ffn: FeedForward) -> None:
        """Put a plain FFN in place of what has replaced the block's own."""
        self.ffn, self.replacement = ffn, None

    def follow(self, module: nn.Module) -> None:
        """Add ``module(out, handed)`` to the FFN's output ``out``."""
        self.follower = module

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, d) -> (B, S, d)."""
        out = self.take_ffn()(hidden) if self.replacement is None else _handed(self, self.replacement, hidden)
        return out if self.follower is None else out + _handed(self, self.follower, out)


@dataclass(frozen=True)
class RowFree:
    """An argument of a block that is the same for all rows of the batch, whatever its first dimension is."""

    value: Any
    rows: int | None = None
    """Of a cache: the number of rows that it is for. What has seen only some of them can not be reordered with the beams."""

    def of(self, hidden: Tensor) -> Any:
        """The argument, for a layer that computes the rows ``hidden``."""
        if self.rows not in (None, len(hidden)):
            raise RuntimeError(f"a layer that computes {len(hidden)} of {self.rows} rows can not keep their keys and values")
        return self.value


class Layer(nn.Module):
    """One whole block; of what it returns, the states."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def keep_apart(self, places: int) -> None:
        """Write the keys and values of ``generate`` that many places behind the block's own in the cache: of several layers
        at one seam, each needs its own place (a multiple of the decoder's blocks; see ``backbones``)."""
        for module in self.block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = module.layer_idx + places  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, S, d) and the block's other arguments -> (B, S, d)."""
        bare = [each.of(hidden) if isinstance(each, RowFree) else each for each in (*args, *kwargs.values())]
        out = self.block(hidden, *bare[: len(args)], **dict(zip(kwargs, bare[len(args) :], strict=True)))
        return out[0] if isinstance(out, tuple) else out


class LayerSeam(nn.Module):
    """One whole block or what replaces it.

    Other arguments of a block (masks, encoder states, caches; see the architecture's code) are passed on as they come, those
    without rows as :class:`RowFree`, which a :class:`Layer` takes off again. A decoder block writes its keys and values into
    the cache of ``generate``: each layer of what replaces it has to do this in a place of its own, and for all rows.
    """

    row_free = ("position_embeddings", "relative_pos", "rel_embeddings")
    """Arguments by name that are no :class:`RowFree` yet but have no rows."""

    def __init__(self, number: int, block: nn.Module, stack: Stack, handover: Handover) -> None:
        super().__init__()
        self.block = number
        self.layer: Layer | None = Layer(block)
        self.replacement: nn.Module | None = None
        self.caches = True
        self._handover = handover
        for name in stack.read:
            setattr(self, name, getattr(block, name))

    def take_layer(self) -> Layer:
        """The block, to be copied.

        Raises:
            RuntimeError: it has been replaced already.
        """
        if self.layer is None:
            raise RuntimeError("the block at this seam has been replaced already")
        return self.layer

    def replace(self, module: nn.Module, caches: bool = True) -> None:
        """Compute ``module(hidden, handed, *args, **kwargs)`` -> states instead of the block, which is dropped. The seams
        inside of the block go with it, or live on in its copies.

        ``caches``: whether the module's layers can keep keys and values from one generated token to the next, which they
        can not where rows change their layer; then ``generate`` computes all tokens again each time.
        """
        self.take_layer()
        self.layer, self.replacement, self.caches = None, module, caches

    def restore(self, layer: Layer) -> None:
        """Put one layer in place of what has replaced the block."""
        self.layer, self.replacement, self.caches = layer, None, True

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the block returns."""
        return self._states(hidden, *args, **kwargs)

    def _states(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.replacement is None:
            return self.take_layer()(hidden, *args, **kwargs)
        for name in self.row_free:
            if name in kwargs:
                kwargs[name] = RowFree(kwargs[name])
        if kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"] = RowFree(kwargs["past_key_values"], len(hidden))
        return _handed(self, self.replacement, hidden, *args, **kwargs)


class _DebertaLayerSeam(LayerSeam):
    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self._states(hidden, *args, **kwargs), None


class _T5LayerSeam(LayerSeam):
    """T5's first block makes the position biases of its whole stack. Like position embeddings they belong to no block: the
    first seam keeps the table, and all blocks get the biases from outside."""

    def __init__(self, number: int, block: nn.Module, stack: Stack, handover: Handover) -> None:
        super().__init__(number, block, stack, handover)
        attention = cast(Any, block).layer[0].SelfAttention
        self.biases = _PositionBiases(attention) if attention.has_relative_attention_bias else None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, None]:
        mask, biases, *others = args
        if self.biases is not None:
            biases = self.biases(hidden.shape[1], kwargs.get("past_key_values"))
        return self._states(hidden, mask, RowFree(biases), *others, **kwargs), biases, None


class _PositionBiases(nn.Module):
    """The relative position biases of a T5 stack, (1, H, queries, keys), out of its first block's attention."""

    def __init__(self, attention: T5Attention) -> None:
        super().__init__()
        self.table = attention.relative_attention_bias
        self._bidirectional = not attention.is_decoder
        self._buckets = attention.relative_attention_num_buckets
        self._max_distance = attention.relative_attention_max_distance
        attention.has_relative_attention_bias = False
        del attention.relative_attention_bias

    def forward(self, length: int, cache: Any) -> Tensor:
        past = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(past + length, device=self.table.weight.device)
        distances = positions[None, :] - positions[past:, None]
        buckets = T5Attention._relative_position_bucket(distances, self._bidirectional, self._buckets, self._max_distance)
        return self.table(buckets).permute(2, 0, 1)[None]


class ContextSeam(nn.Module):
    """The heads' context vectors on their way into an attention's output projection."""

    def __init__(self, block: int, projection: nn.Linear, num_heads: int, handover: Handover) -> None:
        super().__init__()
        self.block = block
        self.num_heads = num_heads
        self.projection = projection
        self.inserted: nn.Module | None = None
        self._handover = handover

    def insert(self, module: nn.Module) -> None:
        """Project ``module(context, handed)`` instead of the context vectors (B, S, H * head width), heads side by side.

        Raises:
            RuntimeError: there is a module already.
        """
        if self.inserted is not None:
            raise RuntimeError("there is a module at this seam already")
        self.inserted = module

    def forward(self, context: Tensor) -> Tensor:
        """(B, S, H * head width) -> (B, S, d)."""
        return self.projection(context if self.inserted is None else _handed(self, self.inserted, context))


def _call(seam: Seam | LayerSeam | ContextSeam, module: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a family's module computes. It stays out of compiled code: what it is handed changes with every batch."""
    return module(hidden, seam._handover.at(seam.block), *args, **kwargs)


_handed = cast(Callable[..., Tensor], torch.compiler.disable(_call))


def open_ffn(number: int, block: nn.Module, place: FfnPlace, handover: Handover) -> Seam:
    """The seam at a block's FFN, put there at the first call."""
    seat = part(block, place.seat)
    if isinstance(seat, Seam):
        return seat
    up, gate = part(block, place.up), part(block, place.gate) if place.gate else None
    if gate is up:
        up, gate = _halves(up)
    dropout = part(block, place.dropout) if place.dropout else 0.0
    probability = dropout if isinstance(dropout, float | int) else dropout.p
    seam = Seam(number, FeedForward(up, part(block, place.activation), part(block, place.down), gate, probability), handover)
    for path in place.emptied:
        _put(block, path, nn.Identity() if isinstance(part(block, path), nn.Module) else 0.0)
    _put(block, place.seat, seam)
    return seam


def open_layer(number: int, block: nn.Module, stack: Stack, layout: Layout, handover: Handover) -> LayerSeam:
    """A seam around a block, to be put in its place."""
    kinds = {
        "states": LayerSeam,
        "states and attention": _DebertaLayerSeam,
        "states and position biases": _T5LayerSeam,
    }
    return kinds[layout.block_output](number, block, stack, handover)


def open_context(number: int, block: nn.Module, path: str, num_heads: int, handover: Handover) -> ContextSeam:
    """The seam before the output projection at ``path``, put there at the first call."""
    projection = part(block, path)
    if isinstance(projection, ContextSeam):
        return projection
    seam = ContextSeam(number, projection, num_heads, handover)
    _put(block, path, seam)
    return seam


def part(root: nn.Module, path: str) -> Any:
    """What is at the dotted path."""
    found: Any = root
    for name in path.split("."):
        found = found[int(name)] if name.isdigit() else getattr(found, name)
    return found


def _put(root: nn.Module, path: str, value: Any) -> None:
    parent, _, name = path.rpartition(".")
    setattr(part(root, parent) if parent else root, name, value)


def _halves(fused: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
    """A linear layer's output in two layers of half the width each."""

    def half(which: int) -> nn.Linear:
        linear = nn.Linear(fused.in_features, fused.out_features // 2, fused.bias is not None, device="meta")
        for name, whole in fused.named_parameters():
            own = nn.Parameter(whole.detach().chunk(2)[which].clone(), requires_grad=whole.requires_grad)
            setattr(linear, name, own)
        return linear

    return half(0), half(1)
