"""Backbones: Hugging Face encoders and encoder-decoders with seams, and how they are built or read.

Legend: B rows of the batch, n examples, S positions, T target positions, V vocabulary, d hidden width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from lightning_modules.building import ConfigError, require
from lightning_modules.config import BACKBONES, BackboneConfig, chosen_blocks
from lightning_modules.network.layouts import Layout, Stack, layout_of, length_limit
from lightning_modules.network.seams import (
    ContextSeam,
    FeedForward,
    Handover,
    Layer,
    LayerSeam,
    Seam,
    open_context,
    open_ffn,
    open_layer,
    part,
)
from lightning_modules.seeds import derive

Place = Literal["ffn", "layer", "attention_output", "cross_attention_output"]
"""Where a seam is: a block's FFN sub-layer, the whole block, before the output projection of its self-attention, or of a
decoder block's attention to the encoder's states."""


class Backbone(nn.Module):
    """A Hugging Face encoder, or encoder and decoder, with seams. Blocks are numbered from 0, the encoder's first."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model
        self.hidden_size: int = model.config.hidden_size
        self.is_seq2seq: bool = model.config.is_encoder_decoder
        self._layout = _known_layout(model.config)
        self._handover = Handover()
        self._has_token_types = getattr(model.config, "type_vocab_size", 0) > 1
        self._blocks = [
            _Block(stack, part(model, stack.blocks), i)
            for stack in self._layout.stacks
            for i in range(len(part(model, stack.blocks)))
        ]
        self.num_blocks = len(self._blocks)
        self.stack_sizes = tuple(len(part(model, stack.blocks)) for stack in self._layout.stacks)
        self.num_encoder_blocks = self.stack_sizes[0]
        self.seams()
        if self.is_seq2seq:
            # What a folder says about beams, lengths or forced tokens would mix with the trial's own settings.
            model.generation_config = GenerationConfig(**_special_ids(model.config))

    @overload
    def seams(self, place: Literal["ffn"] = "ffn") -> list[Seam]: ...
    @overload
    def seams(self, place: Literal["layer"]) -> list[LayerSeam]: ...
    @overload
    def seams(self, place: Literal["attention_output", "cross_attention_output"]) -> list[ContextSeam]: ...
    def seams(self, place: Place = "ffn") -> list[Any]:
        """The seams of one kind in block order: every block has one, save that only decoder blocks have a
        ``cross_attention_output``, and a block that has been replaced as a whole has no seams within any more.

        Seams at the FFN are always there; those elsewhere are opened when they are asked for first.
        """
        found: list[Any] = []
        for number, block in enumerate(self._blocks):
            if place == "layer":
                if not isinstance(block.now, LayerSeam):
                    block.container[block.index] = open_layer(number, block.now, block.stack, self._layout, self._handover)
                found.append(block.now)
            elif block.original is None:
                continue
            elif place == "ffn":
                found.append(open_ffn(number, block.original, block.stack.ffn, self._handover))
            elif path := getattr(block.stack, place):
                num_heads = getattr(self.model.config, block.stack.heads)
                found.append(open_context(number, block.original, path, num_heads, self._handover))
        return found

    def fresh_layer(self, number: int) -> Layer:
        """A block like block ``number`` with weights as the architecture draws them, from the global random numbers; its FFN
        is at a seam, as in every block here.

        Raises:
            RuntimeError: block ``number`` has been replaced already.
        """
        block = self._blocks[number]
        original = block.original
        if original is None:
            raise RuntimeError(f"block {number} has been replaced already")
        owner, _, _ = block.stack.blocks.rpartition(".")
        config = getattr(part(self.model, owner) if owner else self.model, "config", self.model.config)
        place = {"layer_idx": block.index} if "layer_idx" in inspect.signature(type(original)).parameters else {}
        fresh: Any = type(original)(config, **place)
        # Children first, as the architecture's rules expect: a whole FFN's come after those of a linear layer.
        fresh.apply(self.model._init_weights)
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if hasattr(original, name):
                setattr(fresh, name, getattr(original, name))
        open_ffn(number, fresh, block.stack.ffn, self._handover)
        return Layer(fresh.train(original.training))

    def fresh_ffn(self, number: int) -> FeedForward:
        """The FFN of a :meth:`fresh_layer`."""
        fresh = self.fresh_layer(number).block
        return open_ffn(number, fresh, self._blocks[number].stack.ffn, self._handover).take_ffn()

    def encode(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, handed: Mapping[int, Any]) -> Tensor:
        """(B, S) ids, mask and segment numbers (unused by architectures without them) -> (B, S, d), the encoder's states.

        ``handed``: block number -> second argument of the modules at that block's seams; {} where none needs one.
        """
        arguments: dict[str, Tensor] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._has_token_types:
            arguments["token_type_ids"] = token_type_ids
        encoder = self.model.get_encoder() if self.is_seq2seq else self.model
        with self._handover.hold(handed):
            return encoder(**arguments).last_hidden_state

    def decode(self, states: Tensor, mask: Tensor, target_ids: Tensor, handed: Mapping[int, Any]) -> Tensor:
        """Encoder states (n, S, d), their mask (n, S) and target ids (n, T), padded with -100 -> logits (n, T, V).

        Teacher forcing: position t sees the targets before t, the first one the architecture's start token. Logits at padded
        positions mean nothing. ``handed`` is for the decoder's blocks.
        """
        before = self.model.prepare_decoder_input_ids_from_labels(target_ids)
        with self._handover.hold(handed):
            return self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=cast(Any, states)),
                attention_mask=mask,
                decoder_input_ids=before,
                use_cache=False,
            ).logits

    def generate(
        self,
        states: Tensor,
        mask: Tensor,
        handed: Mapping[int, Any],
        *,
        beams: int,
        max_new_tokens: int,
        length_penalty: float = 1.0,
        use_cache: bool = True,
    ) -> Tensor:
        """Encoder states (n, S, d) and their mask (n, S) -> the best hypotheses (n, T), T <= ``max_new_tokens``, with their
        end token and padding behind it.

        Beam search (1: greedy) without any other rule: no forced tokens (BART's first ``<s>`` is a target token that is
        learned), no smallest length, no banned repetitions, whatever the model's folder asks for. ``handed`` is for the
        decoder's blocks and n * ``beams`` rows, each example's beams side by side. Nothing is sampled. ``use_cache``: keep keys
        and values, unless a layer seam's module can not.

        Raises:
            RuntimeError: the backbone is in training mode, where dropout would change the answers.
        """
        if self.training:
            raise RuntimeError("generate needs the backbone in evaluation mode: call eval() first")
        use_cache = use_cache and all(block.now.caches for block in self._blocks if isinstance(block.now, LayerSeam))
        cache = {"past_key_values": EncoderDecoderCache(_Places(self.stack_sizes[-1]), DynamicCache())} if use_cache else {}
        rules = GenerationConfig(
            num_beams=beams,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty if beams > 1 else None,
            use_cache=use_cache,
        )
        # Compiled blocks expect the shapes of training; with a growing cache they would be compiled again and again.
        with self._handover.hold(handed), torch.compiler.set_stance("force_eager"):
            ids = self.model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=cast(Any, states)),
                attention_mask=mask,
                generation_config=rules,
                **cache,
            )[:, 1:]
        # transformers pads with end tokens where the padding id is 0.
        special = _special_ids(self.model.config)
        ends = torch.isin(ids, torch.tensor(special["eos_token_id"], device=ids.device))
        return ids.masked_fill(ends.cumsum(1) - ends.int() > 0, special["pad_token_id"])

    def plain(self) -> PreTrainedModel:
        """A model of transformers without seams that computes the same, in evaluation mode. Its configuration is the backbone's
        with the inner width that the FFNs have now.

        Raises:
            NotPlainError: a seam holds a family's module, or FFNs of one stack have several widths.
        """
        self._check_plain()
        architecture = copy.deepcopy(self.model.config)
        architecture.use_cache = True
        for setting, widths in self._ffn_widths().items():
            if len(set(widths.values())) > 1:
                listed = ", ".join(f"block {number}: {width}" for number, width in widths.items())
                raise NotPlainError(f"a plain {architecture.model_type} has one {setting} for all blocks, but here {listed}")
            setattr(architecture, setting, next(iter(widths.values())))
        with torch.random.fork_rng(devices=[]):
            model = _class_for(architecture).from_config(
                architecture, dtype=torch.float32, attn_implementation=self._layout.attention, **self._layout.load
            )
        model.load_state_dict(self._plain_weights())
        if self.is_seq2seq:
            model.generation_config = copy.deepcopy(self.model.generation_config)
        return model.eval()

    def _check_plain(self) -> None:
        for name, module in self.model.named_modules():
            held = [getattr(module, where, None) for where in ("replacement", "follower", "inserted")]
            if isinstance(module, (Seam, LayerSeam, ContextSeam)) and any(each is not None for each in held):
                raise NotPlainError(f"{name} holds what no plain {self.model.config.model_type} has")

    def _ffn_widths(self) -> dict[str, dict[int, int]]:
        """Setting -> block number -> inner width."""
        widths: dict[str, dict[int, int]] = {}
        for seam in self.seams():
            setting = self._blocks[seam.block].stack.ffn_width
            widths.setdefault(setting, {})[seam.block] = seam.take_ffn().up.out_features
        return widths

    def _plain_weights(self) -> dict[str, Tensor]:
        """The weights by the plain model's names."""
        found: dict[str, Tensor] = {}
        for name, weight in self.model.state_dict().items():
            for stack in self._layout.stacks:
                if name.startswith(f"{stack.blocks}."):
                    number, _, inside = name.removeprefix(f"{stack.blocks}.").partition(".")
                    name = f"{stack.blocks}.{number}.{_plain_name(inside, stack)}"
                    break
            # The halves of a fused gate come one after the other, the activated one first.
            found[name] = torch.cat([found[name], weight]) if name in found else weight
        return found

    def checkpoint_gradients(self) -> None:
        """Compute every block again in the backward instead of keeping its activations; the numbers stay the same."""
        # An encoder has nothing to cache, and would tell so in the log.
        self.model.config.use_cache = False
        self.model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": self._handover.again})
        # Only re-entrant checkpoints need inputs with a gradient; a frozen embedding shall stay one.
        self.model.disable_input_require_grads()

    def compile_blocks(self) -> None:
        """``torch.compile`` every block, in place, for any batch and length. What families put at the seams runs as it is,
        and so does :meth:`generate`. Call it once the seams have got their modules.

        Raises:
            ConfigError: the blocks checkpoint their gradients, which torch can not compile with a context of ours.
        """
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                law = "does not go with backbone.gradient_checkpointing, got compile=true, gradient_checkpointing=true"
                require(not module.gradient_checkpointing, "train.compile", law)
                module.compile(dynamic=True)


@dataclass
class _Block:
    """A block's place in its stack."""

    stack: Stack
    container: nn.ModuleList
    index: int

    @property
    def now(self) -> Any:
        """The block, or the seam that has taken its place."""
        return self.container[self.index]

    @property
    def original(self) -> nn.Module | None:
        """The block as the model brought it; None: it has been replaced."""
        if not isinstance(self.now, LayerSeam):
            return self.now
        return self.now.layer.block if self.now.layer else None


class NotPlainError(ValueError):
    """A backbone is no plain model of transformers: what stands in the way."""


def _plain_name(name: str, stack: Stack) -> str:
    """The plain name of a weight of a block that has seams."""
    if name.startswith("biases.table."):
        return name.replace("biases.table", "layer.0.SelfAttention.relative_attention_bias", 1)
    name = name.removeprefix("layer.block.")
    ffn = stack.ffn
    moved = {f"{ffn.seat}.ffn.{each}.": f"{getattr(ffn, each)}." for each in ("up", "gate", "down")}
    for path in filter(None, (stack.attention_output, stack.cross_attention_output)):
        moved[f"{path}.projection."] = f"{path}."
    for seam, place in moved.items():
        if name.startswith(seam):
            return place + name.removeprefix(seam)
    return name


class _Places(DynamicCache):
    """Keys and values of a decoder's self-attentions, where several layers at one block each have a place: layer e of block b
    has place b + e * ``blocks``. A place that is not written to stays empty, so the length is not always that of the first.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self._blocks = blocks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that place ``layer_idx`` holds; 0, which transformers asks for the length of them all: any layer of the first
        block."""
        if layer_idx:
            return super().get_seq_length(layer_idx)
        return max((super(_Places, self).get_seq_length(i) for i in range(0, len(self.layers), self._blocks)), default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that ``query_length`` more tokens see."""
        return self.get_seq_length() + query_length, 0


@overload
def seams_at(backbone: Backbone, layers: tuple[int, ...] | str, place: Literal["ffn"] = "ffn") -> dict[int, Seam]: ...
@overload
def seams_at(backbone: Backbone, layers: tuple[int, ...] | str, place: Literal["layer"]) -> dict[int, LayerSeam]: ...
def seams_at(backbone: Backbone, layers: tuple[int, ...] | str, place: Literal["ffn", "layer"] = "ffn") -> dict[int, Any]:
    """Block number -> seam at the FFN or at the whole block, for the blocks that ``layers`` stands for (empty: all).

    Raises:
        ConfigError: ``layers`` does not fit the backbone.
    """
    chosen = chosen_blocks(layers, backbone.stack_sizes)
    return {seam.block: seam for seam in backbone.seams(place) if seam.block in chosen}


def load_backbone(config: BackboneConfig, vocab_size: int | None, seed: int) -> Backbone:
    """The backbone that ``config`` names: built from the seed (``tiny-encoder``, ``tiny-bart``, ``tiny-t5``) or read from a
    folder or the Hub.

    ``vocab_size`` is the tokenizer's; None: the backbone's own. Weights are read from safetensors only, as float32, and no
    code that comes with a model is run.

    Raises:
        ConfigError: the backbone cannot be read, lacks weights, has an architecture that is not known here, or is too short
            or has too small a vocabulary for the inputs.
    """
    if config.built_in:
        model = _tiny(config, vocab_size, seed)
    else:
        with _quiet():
            model = _pretrained(config)
        _check_inputs(config, model.config, vocab_size)
    if config.frozen:
        model.requires_grad_(False)
    backbone = Backbone(model)
    if config.gradient_checkpointing:
        backbone.checkpoint_gradients()
    return backbone


def _tiny(config: BackboneConfig, vocab_size: int | None, seed: int) -> PreTrainedModel:
    architecture = _tiny_architecture(config, vocab_size or config.size.vocab_size)
    layout = _known_layout(architecture)
    _set_dropout(architecture, layout, config.dropout)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "backbone"))
        return _class_for(architecture).from_config(architecture, attn_implementation=layout.attention, **layout.load)


def _tiny_architecture(config: BackboneConfig, vocab_size: int) -> PretrainedConfig:
    """Special tokens are those of the tokenizer that is trained with a built-in backbone: [PAD] 0, [CLS] 2, [SEP] 3. As in
    the originals, BART starts from the end token and T5 from padding."""
    size = config.size
    if config.name == "tiny-bart":
        ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
        return BartConfig(
            vocab_size=vocab_size,
            d_model=size.hidden_size,
            encoder_layers=size.num_layers,
            decoder_layers=size.num_layers,
            encoder_attention_heads=size.num_heads,
            decoder_attention_heads=size.num_heads,
            encoder_ffn_dim=size.ffn_size,
            decoder_ffn_dim=size.ffn_size,
            max_position_embeddings=max(config.max_length, config.max_target_length),
            # BART's own 0.02 belongs to a width of 1024; a narrow model that starts so small hardly learns.
            init_std=size.hidden_size**-0.5,
            **ids,
        )
    if config.name == "tiny-t5":
        ids = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
        return T5Config(
            vocab_size=vocab_size,
            d_model=size.hidden_size,
            d_kv=size.hidden_size // size.num_heads,
            d_ff=size.ffn_size,
            num_layers=size.num_layers,
            num_heads=size.num_heads,
            **ids,
        )
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=size.ffn_size,
        max_position_embeddings=config.max_length,
        # Padding is masked everywhere, so no id needs an embedding that never trains.
        pad_token_id=None,
    )


def _pretrained(config: BackboneConfig) -> PreTrainedModel:
    if config.revision is None and not Path(config.name).is_dir():
        raise ConfigError("backbone.revision", f"must be a commit for a Hub id (no folder {config.name!r} here), got null")
    source: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    try:
        architecture = AutoConfig.from_pretrained(config.name, trust_remote_code=False, **source)
        layout = _known_layout(architecture)
        _set_dropout(architecture, layout, config.dropout)
        model, report = _class_for(architecture).from_pretrained(
            config.name,
            config=architecture,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation=layout.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **source,
            **layout.load,
        )
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("backbone.name", f"cannot read {config.name!r}: {' '.join(str(error).split())}") from error
    for fault, keys in (("lacks", "missing_keys"), ("has other sizes than its config.json for", "mismatched_keys")):
        names = sorted(key if isinstance(key, str) else key[0] for key in report[keys])
        law = f"{config.name!r} {fault} {len(names)} of the model's weights, such as {names[0] if names else None}"
        require(not names, "backbone.name", law)
    return model.train()


def _class_for(architecture: PretrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if architecture.is_encoder_decoder else AutoModel


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports from transformers: what they say is checked here and told as a ConfigError."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_inputs(config: BackboneConfig, architecture: PretrainedConfig, vocab_size: int | None) -> None:
    limit = length_limit(architecture, _known_layout(architecture))
    lengths = {"max_length": config.max_length}
    if architecture.is_encoder_decoder:
        lengths["max_target_length"] = config.max_target_length
    for name, length in lengths.items():
        law = f"must be at most the backbone's {limit} positions, got {length}"
        require(limit is None or length <= limit, f"backbone.{name}", law)
    if vocab_size is not None and vocab_size > architecture.vocab_size:
        raise ConfigError("backbone.name", f"embeds {architecture.vocab_size} tokens, but its tokenizer has {vocab_size}")


def _special_ids(architecture: PretrainedConfig) -> dict[str, Any]:
    """The ids that a decoder needs, by the names of transformers' generation settings."""
    needed = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
    ids = {name: getattr(architecture, name, None) for name in needed}
    missing = [name for name, value in ids.items() if value is None]
    require(not missing, "backbone.name", f"its config.json must name {', '.join(needed)}, got no {', '.join(missing)}")
    return ids


def _known_layout(architecture: PretrainedConfig) -> Layout:
    layout = layout_of(architecture)
    if layout is None:
        raise ConfigError(
            "backbone.name", f"architecture must be one of {', '.join(BACKBONES)}, got {architecture.model_type!r}"
        )
    return layout


def _set_dropout(architecture: PretrainedConfig, layout: Layout, probability: float) -> None:
    for name in layout.dropouts:
        setattr(architecture, name, probability)
    # Blocks that are left out at random would be regularisation that no setting of a trial names.
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        if hasattr(architecture, name):
            setattr(architecture, name, 0.0)
