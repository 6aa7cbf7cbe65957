"""Sizes of a backbone, as far as a plan needs them, without loading it. No torch here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_modules.building import ConfigError
from lightning_modules.config import BACKBONES, SEQ2SEQ, BackboneConfig, chosen_blocks

_BUILT_IN = {"tiny-encoder": "bert", "tiny-bart": "bart", "tiny-t5": "t5"}
_GATED = ("modernbert",)


@dataclass(frozen=True, slots=True)
class Stack:
    """The blocks of an encoder or of a decoder."""

    blocks: int
    attention: int | None
    """Weights of a block's attention, a decoder's attention to the encoder included: matrices, no biases and norms."""
    ffn: int | None
    """Weights of a block's feed-forward sub-layer, matrices only."""
    inner: int | None
    """Inner width f of the feed-forward sub-layer."""
    width: int | None
    """Width d of the residual stream."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a backbone is made of; None of a number that its ``config.json`` leaves to the library's defaults."""

    kind: str
    """Hugging Face's ``model_type``."""
    stacks: tuple[Stack, ...] | None
    """Encoder; encoder and decoder."""
    positions: int | None = None
    """Tokens that it has positions for; None: no limit, or left to the library."""

    @property
    def decodes(self) -> bool:
        """Whether it has a decoder."""
        return self.kind in SEQ2SEQ

    def blocks(self, layers: tuple[int, ...] | str) -> tuple[int, ...] | None:
        """The block numbers that ``model.layers`` stands for; None: not known without loading the model.

        Raises:
            ConfigError: a number is beyond the last block, or ``last:N`` asks for more than a stack has.
        """
        return None if self.stacks is None else chosen_blocks(layers, [stack.blocks for stack in self.stacks])

    def stack_of(self, block: int) -> Stack:
        """The stack of block number ``block``."""
        for stack in self.stacks or ():
            if block < stack.blocks:
                return stack
            block -= stack.blocks
        raise IndexError(block)


def architecture_of(backbone: BackboneConfig) -> Architecture | None:
    """Sizes of a built-in backbone, or what the ``config.json`` of a folder or of a Hub model in the local cache says; None:
    a Hub model that has not been downloaded yet.

    Raises:
        ConfigError: the file is not valid, or the architecture is not one that we know.
    """
    if backbone.built_in:
        size = backbone.size
        matrix, ffn = size.hidden_size**2, 2 * size.hidden_size * size.ffn_size
        stacks = [
            Stack(size.num_layers, 4 * matrix * (1 + i), ffn, size.ffn_size, size.hidden_size)
            for i in range(len(backbone.stacks))
        ]
        return Architecture(_BUILT_IN[backbone.name], tuple(stacks))
    file = _config_file(backbone)
    if file is None:
        return None
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError("trial.backbone.name", f"{file} is not valid JSON: {error}") from None
    kind = content.get("model_type")
    if kind not in BACKBONES:
        raise ConfigError("trial.backbone.name", f"must be one of {', '.join(BACKBONES)}, got model_type {kind!r} in {file}")
    return Architecture(kind, _stacks(kind, content), _positions(kind, content))


def _config_file(backbone: BackboneConfig) -> Path | None:
    folder = Path(backbone.name).expanduser()
    if folder.is_dir():
        return folder / "config.json"
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(backbone.name, "config.json", revision=backbone.revision)
    return Path(found) if isinstance(found, str) else None


def _positions(kind: str, content: Mapping[str, Any]) -> int | None:
    positions = content.get("max_position_embeddings")
    if kind == "t5" or (kind == "deberta-v2" and content.get("position_biased_input") is False) or positions is None:
        return None
    if kind in ("roberta", "xlm-roberta", "camembert"):  # their positions start after the padding id
        return positions - content.get("pad_token_id", 1) - 1
    return positions


def _stacks(kind: str, content: Mapping[str, Any]) -> tuple[Stack, ...] | None:
    """None where the file leaves a number of blocks to the library's defaults."""
    width, attention = _first(content, "hidden_size", "d_model", "dim"), None
    gated = kind in _GATED
    if kind == "bart":
        names = [("encoder_layers", "encoder_ffn_dim"), ("decoder_layers", "decoder_ffn_dim")]
        attention = width and 4 * width**2
    elif kind == "t5":
        decoder = "num_decoder_layers" if content.get("num_decoder_layers") else "num_layers"
        names = [("num_layers", "d_ff"), (decoder, "d_ff")]
        heads, each = _first(content, "num_heads"), _first(content, "d_kv")
        attention = width and heads and each and 4 * width * heads * each
        gated = str(content.get("feed_forward_proj", "")).startswith("gated")
    else:
        blocks = "num_hidden_layers" if "num_hidden_layers" in content else "n_layers"
        names = [(blocks, "hidden_dim" if kind == "distilbert" else "intermediate_size")]
        attention = width and 4 * width**2
    stacks = []
    for i, (blocks, inner) in enumerate(names):
        count, f = _first(content, blocks), _first(content, inner)
        if count is None:
            return None
        ffn = width and f and (3 if gated else 2) * width * f
        stacks.append(Stack(count, attention and attention * (1 + i), ffn, f, width))
    return tuple(stacks)


def _first(content: Mapping[str, Any], *names: str) -> int | None:
    return next((content[name] for name in names if isinstance(content.get(name), int)), None)
