"""Hugging Face encoders with a seam at every feed-forward sub-layer.

Legend: B rows of the batch, S positions, d hidden width.

A :class:`Seam` stands where a block computes its FFN, before dropout, residual sum and LayerNorm. Untouched, the encoder
computes exactly what the plain Hugging Face model computes; a family puts its own modules at the seams. Such a module is
called as ``module(hidden, handed)``, where ``handed`` is what the caller of the encoder handed over for that block: the
encoder itself knows nothing of tasks.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertConfig, PretrainedConfig, PreTrainedModel

from lightning_modules.config import BACKBONES, BackboneConfig, ConfigError
from lightning_modules.seeds import derive


class FeedForward(nn.Module):
    """The FFN sub-layer ``down(activation(up(x)))``, (..., d) -> (..., d), built of the block's own linear layers."""

    def __init__(self, up: nn.Linear, activation: Callable[[Tensor], Tensor], down: nn.Linear) -> None:
        super().__init__()
        self.up = up
        self.activation = activation
        self.down = down

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self.down(self.activation(self.up(hidden)))


class Handover:
    """What the seams of the forward in progress are handed, by block number. Hugging Face's blocks pass no arguments on to
    their FFN, so it goes around them. A forward inside a forward has its own, and the outer one's comes back after it."""

    def __init__(self) -> None:
        self._stack: list[Mapping[int, Any]] = []

    @contextmanager
    def hold(self, handed: Mapping[int, Any]) -> Iterator[None]:
        """Hand ``handed`` over for the duration of a ``with`` block."""
        self._stack.append(handed)
        try:
            yield
        finally:
            self._stack.pop()

    def at(self, layer: int) -> Any:
        """What block ``layer`` is handed.

        Raises:
            RuntimeError: no forward of the encoder is in progress.
        """
        if not self._stack:
            raise RuntimeError(f"the seam of block {layer} was called outside of Encoder.forward: nothing is handed to it")
        return self._stack[-1][layer]


class Seam(nn.Module):
    """One block's FFN sub-layer: the FFN itself or what replaces it, and what follows it inside the residual."""

    def __init__(self, layer: int, ffn: FeedForward, handover: Handover) -> None:
        super().__init__()
        self.layer = layer
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

    def follow(self, module: nn.Module) -> None:
        """Add ``module(out, handed)`` to the FFN's output ``out``."""
        self.follower = module

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, d) -> (B, S, d)."""
        if self.replacement is not None:
            out = self.replacement(hidden, self._handover.at(self.layer))
        else:
            out = self.take_ffn()(hidden)
        return out if self.follower is None else out + self.follower(out, self._handover.at(self.layer))


class Encoder(nn.Module):
    """A Hugging Face encoder whose FFN sub-layers are seams."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._handover = Handover()
        _layout(model.config).open(model, self._handover)
        self.model = model
        self.hidden_size: int = model.config.hidden_size
        self._has_token_types = getattr(model.config, "type_vocab_size", 0) > 1

    def seams(self) -> list[Seam]:
        """The seams in block order."""
        return [module for module in self.model.modules() if isinstance(module, Seam)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, handed: Mapping[int, Any]) -> Tensor:
        """(B, S) ids, mask and segment numbers (unused by architectures without them) -> (B, S, d), the last block's states.

        ``handed``: block number -> second argument of the module at that block's seam; {} where no module needs one.
        """
        arguments: dict[str, Tensor] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._has_token_types:
            arguments["token_type_ids"] = token_type_ids
        with self._handover.hold(handed):
            return self.model(**arguments).last_hidden_state


def seams_at(encoder: Encoder, layers: tuple[int, ...]) -> dict[int, Seam]:
    """Block number -> seam for the blocks in ``layers`` (empty: all).

    Raises:
        ConfigError: a number is beyond the encoder's last block.
    """
    seams = encoder.seams()
    if layers and max(layers) >= len(seams):
        raise ConfigError("model.layers", f"must be below the backbone's {len(seams)} blocks, got {list(layers)}")
    return {layer: seams[layer] for layer in sorted(layers or range(len(seams)))}


def load_backbone(config: BackboneConfig, vocab_size: int | None, seed: int) -> Encoder:
    """The encoder that ``config`` names: built from the seed (``tiny-encoder``) or read from a folder or the Hub.

    ``vocab_size`` is the tokenizer's; None: the backbone's own. Weights are read from safetensors only, as float32, and no
    code that comes with a model is run.

    Raises:
        ConfigError: the backbone cannot be read, lacks weights, has an architecture whose FFN is not known here, or is too
            short or has too small a vocabulary for the inputs.
    """
    if config.name == "tiny-encoder":
        model = _tiny(config, vocab_size, seed)
    else:
        model = _pretrained(config)
        _check_inputs(config, model.config, vocab_size)
    if config.frozen:
        model.requires_grad_(False)
    return Encoder(model)


def _tiny(config: BackboneConfig, vocab_size: int | None, seed: int) -> PreTrainedModel:
    size = config.size
    architecture = BertConfig(
        vocab_size=vocab_size or size.vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=size.ffn_size,
        max_position_embeddings=config.max_length,
        # Padding is masked everywhere, so no id needs an embedding that never trains.
        pad_token_id=None,
    )
    _set_dropout(architecture, config.dropout)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "backbone"))
        return AutoModel.from_config(architecture, attn_implementation="sdpa", add_pooling_layer=False)


def _pretrained(config: BackboneConfig) -> PreTrainedModel:
    if config.revision is None and not Path(config.name).is_dir():
        raise ConfigError("backbone.revision", f"must be a commit for a Hub id (no folder {config.name!r} here), got null")
    source: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    try:
        architecture = AutoConfig.from_pretrained(config.name, trust_remote_code=False, **source)
        layout = _layout(architecture)
        _set_dropout(architecture, config.dropout)
        model, report = AutoModel.from_pretrained(
            config.name,
            config=architecture,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
            **source,
            **layout.load,
        )
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("backbone.name", f"cannot read {config.name!r}: {' '.join(str(error).split())}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError("backbone.name", f"{config.name!r} lacks {len(missing)} weights of its encoder, such as {missing[0]}")
    return model.train()


def _check_inputs(config: BackboneConfig, architecture: PretrainedConfig, vocab_size: int | None) -> None:
    positions = architecture.max_position_embeddings
    if architecture.model_type in _OFFSET_POSITIONS:
        positions -= architecture.pad_token_id + 1
    if config.max_length > positions:
        raise ConfigError(
            "backbone.max_length", f"must be at most the backbone's {positions} positions, got {config.max_length}"
        )
    if vocab_size is not None and vocab_size > architecture.vocab_size:
        raise ConfigError("backbone.name", f"embeds {architecture.vocab_size} tokens, but its tokenizer has {vocab_size}")


@dataclass(frozen=True)
class _Layout:
    """Where an architecture keeps its FFN and what its settings are called."""

    open: Callable[[PreTrainedModel, Handover], None]
    dropouts: tuple[str, ...]
    load: dict[str, Any]


def _open_bert_like(model: PreTrainedModel, handover: Handover) -> None:
    for layer, block in enumerate(cast(Any, model).encoder.layer):
        ffn = FeedForward(block.intermediate.dense, block.intermediate.intermediate_act_fn, block.output.dense)
        # `block.output` goes on with dropout, residual sum and LayerNorm; its linear layer now runs inside the seam.
        block.intermediate = Seam(layer, ffn, handover)
        block.output.dense = nn.Identity()


def _open_distilbert(model: PreTrainedModel, handover: Handover) -> None:
    for layer, block in enumerate(cast(Any, model).transformer.layer):
        ffn = FeedForward(block.ffn.lin1, block.ffn.activation, block.ffn.lin2)
        block.ffn = nn.Sequential(Seam(layer, ffn, handover), block.ffn.dropout)


_BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_WITH_POOLER = _Layout(_open_bert_like, _BERT_DROPOUTS, {"add_pooling_layer": False})
_LAYOUTS: dict[str, _Layout] = {
    "bert": _WITH_POOLER,
    "roberta": _WITH_POOLER,
    "xlm-roberta": _WITH_POOLER,
    "camembert": _WITH_POOLER,
    "electra": _Layout(_open_bert_like, _BERT_DROPOUTS, {}),
    "distilbert": _Layout(_open_distilbert, ("dropout", "attention_dropout"), {}),
}
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
"""Their position numbers start after the padding id."""


def _layout(architecture: PretrainedConfig) -> _Layout:
    if architecture.model_type not in _LAYOUTS:
        raise ConfigError(
            "backbone.name", f"architecture must be one of {', '.join(BACKBONES)}, got {architecture.model_type!r}"
        )
    return _LAYOUTS[architecture.model_type]


def _set_dropout(architecture: PretrainedConfig, probability: float) -> None:
    for name in _layout(architecture).dropouts:
        setattr(architecture, name, probability)
