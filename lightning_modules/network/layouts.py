"""Where each Hugging Face architecture keeps the parts of its blocks: the only table to extend for a new one.

Paths are dotted, numbers index module lists: :attr:`Stack.blocks` from the model, all others from a block. Architectures are
named as in their ``model_type``; a gated T5 (v1.1, Flan) has its own line.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import PretrainedConfig

Positions = Literal["learned", "learned after padding id", "learned or relative", "rotary", "relative"]


@dataclass(frozen=True)
class FfnPlace:
    """A block's feed-forward sub-layer ``down(dropout(activation(up(x)) [* gate(x)]))``."""

    seat: str
    """What the seam takes the place of."""
    up: str
    activation: str
    down: str
    gate: str = ""
    """Second factor of a gated FFN; the same as ``up``: both are halves of that layer."""
    dropout: str = ""
    """Between activation and ``down``: a module, or a probability."""
    emptied: tuple[str, ...] = ()
    """Parts outside of the seat whose work the seam does too: they become identities (a probability: 0)."""


@dataclass(frozen=True)
class Stack:
    """The blocks of an encoder or of a decoder."""

    blocks: str
    ffn: FfnPlace
    attention_output: str
    """Output projection of the self-attention."""
    cross_attention_output: str = ""
    """Output projection of a decoder's attention to the encoder's states."""
    heads: str = "num_attention_heads"
    """Setting with the number of attention heads."""
    ffn_width: str = "intermediate_size"
    """Setting with the inner width of its FFNs."""
    read: tuple[str, ...] = ()
    """Attributes of a block that its stack reads."""


@dataclass(frozen=True)
class Layout:
    """One architecture."""

    stacks: tuple[Stack, ...]
    """Encoder; encoder and decoder."""
    dropouts: tuple[str, ...]
    """Settings of every dropout inside the backbone."""
    positions: Positions
    """What limits the length: a table of positions (RoBERTa's starts after the padding id), the length the rotary positions
    were made for, or nothing. DeBERTa may have a table beside its relative positions."""
    block_output: Literal["states", "states and attention", "states and position biases"] = "states"
    """What a block returns."""
    attention: str = "sdpa"
    """Implementation of the attention."""
    load: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's class."""


_BERT = Layout(
    stacks=(
        Stack(
            "encoder.layer",
            FfnPlace(
                "intermediate",
                "intermediate.dense",
                "intermediate.intermediate_act_fn",
                "output.dense",
                emptied=("output.dense",),
            ),
            attention_output="attention.output.dense",
        ),
    ),
    dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    positions="learned",
)
_BERT_WITHOUT_POOLER = replace(_BERT, load={"add_pooling_layer": False})
_ROBERTA = replace(_BERT_WITHOUT_POOLER, positions="learned after padding id")
_DISTILBERT = Layout(
    stacks=(
        Stack(
            "transformer.layer",
            FfnPlace("ffn.lin1", "ffn.lin1", "ffn.activation", "ffn.lin2", emptied=("ffn.activation", "ffn.lin2")),
            attention_output="attention.out_lin",
            ffn_width="hidden_dim",
        ),
    ),
    dropouts=("dropout", "attention_dropout"),
    positions="learned",
)
_MODERNBERT = Layout(
    stacks=(
        Stack(
            "layers",
            FfnPlace("mlp", "mlp.Wi", "mlp.act", "mlp.Wo", gate="mlp.Wi", dropout="mlp.drop"),
            attention_output="attn.Wo",
            read=("attention_type",),
        ),
    ),
    dropouts=("embedding_dropout", "attention_dropout", "mlp_dropout"),
    positions="rotary",
)
_BART_FFN = FfnPlace(
    "fc1", "fc1", "activation_fn", "fc2", dropout="activation_dropout", emptied=("activation_fn", "activation_dropout", "fc2")
)
_BART = Layout(
    stacks=(
        Stack(
            "model.encoder.layers",
            _BART_FFN,
            "self_attn.out_proj",
            heads="encoder_attention_heads",
            ffn_width="encoder_ffn_dim",
        ),
        Stack(
            "model.decoder.layers",
            _BART_FFN,
            "self_attn.out_proj",
            "encoder_attn.out_proj",
            heads="decoder_attention_heads",
            ffn_width="decoder_ffn_dim",
        ),
    ),
    dropouts=("dropout", "attention_dropout", "activation_dropout"),
    positions="learned",
)


def _t5(up: str, gate: str) -> Layout:
    def ffn(place: str) -> FfnPlace:
        dense = f"{place}.DenseReluDense"
        gating = f"{dense}.{gate}" if gate else ""
        return FfnPlace(dense, f"{dense}.{up}", f"{dense}.act", f"{dense}.wo", gating, f"{dense}.dropout")

    own, other = "layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"
    return Layout(
        stacks=(
            Stack("encoder.block", ffn("layer.1"), own, ffn_width="d_ff"),
            Stack("decoder.block", ffn("layer.2"), own, other, ffn_width="d_ff"),
        ),
        dropouts=("dropout_rate",),
        positions="relative",
        block_output="states and position biases",
    )


LAYOUTS: dict[str, Layout] = {
    "bert": _BERT_WITHOUT_POOLER,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": _BERT,
    "deberta-v2": replace(_BERT, positions="learned or relative", block_output="states and attention", attention="eager"),
    "distilbert": _DISTILBERT,
    "modernbert": _MODERNBERT,
    "bart": _BART,
    "t5": _t5("wi", ""),
    "t5 (gated)": _t5("wi_0", "wi_1"),
}


def layout_of(architecture: PretrainedConfig) -> Layout | None:
    """The layout of an architecture; None: not known here."""
    gated = getattr(architecture, "is_gated_act", False)
    return LAYOUTS.get(f"{architecture.model_type} (gated)" if gated else architecture.model_type)


def length_limit(architecture: PretrainedConfig, layout: Layout) -> int | None:
    """Tokens that a model can read at once; None: any number."""
    match layout.positions:
        case "relative":
            return None
        case "learned or relative":
            return architecture.max_position_embeddings if architecture.position_biased_input else None
        case "learned after padding id":
            return architecture.max_position_embeddings - architecture.pad_token_id - 1
        case _:
            return architecture.max_position_embeddings
