"""The seams change nothing by themselves, for every supported architecture; loading says what is wrong."""

import copy
import logging
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GenerationConfig,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)
from transformers.utils import logging as transformers_logging

from lightning_modules.building import ConfigError
from lightning_modules.config import BACKBONES, ENCODERS, SEQ2SEQ, BackboneConfig, RouterConfig, TinySizeConfig
from lightning_modules.network.backbones import Backbone, NotPlainError, load_backbone, seams_at
from lightning_modules.network.dispatch import RoutedExperts
from lightning_modules.network.experts import drawn_from, upcycle, widen
from lightning_modules.network.layouts import LAYOUTS, layout_of
from lightning_modules.network.routers.record import Rows
from lightning_modules.network.routers.routers import Routers, Sites
from lightning_modules.network.routers.traffic import Traffic
from lightning_modules.network.seams import FeedForward, RowFree

VOCAB, HEADS, PAD, START, END = 60, 2, 0, 2, 3
BLOCKS = 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "dim": 16,
    "d_model": 16,
    "d_kv": 6,
    "embedding_size": 8,
    "num_hidden_layers": BLOCKS,
    "n_layers": BLOCKS,
    "num_layers": BLOCKS,
    "num_decoder_layers": 2,
    "encoder_layers": BLOCKS,
    "decoder_layers": 2,
    "num_attention_heads": HEADS,
    "n_heads": HEADS,
    "num_heads": HEADS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "intermediate_size": 32,
    "hidden_dim": 32,
    "d_ff": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
    "decoder_start_token_id": END,
    "type_vocab_size": 1,
    "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 6,
}
DEBERTA_V3 = {
    "relative_attention": True,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"type_vocab_size": 2}),
    "roberta": ("roberta", {}),
    "xlm-roberta": ("xlm-roberta", {}),
    "camembert": ("camembert", {}),
    "electra": ("electra", {"type_vocab_size": 2}),
    "deberta-v2": ("deberta-v2", {"conv_kernel_size": 3, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "deberta-v3": ("deberta-v2", DEBERTA_V3),
    "distilbert": ("distilbert", {}),
    # One global and two local blocks of one neighbour on each side.
    "modernbert": ("modernbert", {"local_attention": 2, "mlp_bias": True}),
    "bart": ("bart", {}),
    "t5": ("t5", {"decoder_start_token_id": PAD}),
    "t5-v1.1": ("t5", {"decoder_start_token_id": PAD, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}
DECODERS = ("bart", "t5", "t5-v1.1")
PLACES = ("ffn", "layer", "attention_output", "cross_attention_output")
IDS = torch.randint(5, VOCAB, (4, 7), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) < torch.tensor([[7], [3], [5], [6]])).long()
SEGMENTS = (torch.arange(7) > 2).long() * MASK
INPUTS = (IDS * MASK, MASK, SEGMENTS)
TARGETS = torch.tensor([[8, 9, 10, END, -100], [11, END, -100, -100, -100], [12, 13, 14, 15, END], [9, 8, 9, END, -100]])
TASKS: Rows = ((1, 0, 2), (0, 2, 4))
TINY = BackboneConfig(
    size=TinySizeConfig(hidden_size=16, num_layers=2, num_heads=2, ffn_size=32, vocab_size=300), max_length=16, dropout=0.0
)


def plain_model(variant: str, noise: float = 0.15, **changes: Any) -> PreTrainedModel:
    """A model of transformers with random weights of a size that matters, without dropout, in evaluation mode."""
    model_type, own = VARIANTS[variant]
    known = AutoConfig.for_model(model_type)
    dropouts = dict.fromkeys(LAYOUTS[model_type].dropouts, 0.0)
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name) or name == "decoder_start_token_id"}
    config = AutoConfig.for_model(model_type, **{**sizes, **dropouts, **own, **changes})
    kind: Any = AutoModelForSeq2SeqLM if variant in DECODERS else AutoModel
    torch.manual_seed(0)
    model = kind.from_config(config, **LAYOUTS[model_type].load).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Variant -> folder with a saved model."""
    root = tmp_path_factory.mktemp("models")
    for variant in VARIANTS:
        plain_model(variant).save_pretrained(root / variant)
    return {variant: str(root / variant) for variant in VARIANTS}


def loaded(name: str, **settings: Any) -> Backbone:
    return load_backbone(
        BackboneConfig(name=name, **{"dropout": 0.0, "max_length": 32, "max_target_length": 8, **settings}), VOCAB, 0
    ).eval()


def plain_loss(model: PreTrainedModel) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the plain model computes, and the gradients of all its parameters by name."""
    arguments: dict[str, Any] = {"input_ids": INPUTS[0], "attention_mask": MASK}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        arguments["token_type_ids"] = SEGMENTS
    if model.config.is_encoder_decoder:
        out = model(**arguments, labels=TARGETS)
        outputs = [out.encoder_last_hidden_state, out.logits]
    else:
        outputs = [model(**arguments).last_hidden_state]
    return real(outputs), gradients(model, outputs)


def seam_loss(backbone: Backbone, handed: Mapping[int, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """As :func:`plain_loss`, through a backbone."""
    outputs = [backbone.encode(*INPUTS, handed)]
    if backbone.is_seq2seq:
        outputs.append(backbone.decode(outputs[0], MASK.bool(), TARGETS, handed))
    return real(outputs), gradients(backbone, outputs)


def real(outputs: list[Tensor]) -> list[Tensor]:
    """The outputs at positions that are no padding."""
    return [out[mask].detach() for out, mask in zip(outputs, (MASK.bool(), TARGETS >= 0), strict=False)]


def gradients(model: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = torch.zeros(())
    for out, mask in zip(outputs, (MASK.bool(), TARGETS >= 0), strict=False):
        values = out[mask]
        loss = loss + (values * torch.arange(values.numel()).reshape(values.shape).cos()).mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_names(backbone: Backbone, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients by the plain model's names for their parameters."""
    layout = layout_of(backbone.model.config)
    assert layout is not None
    found: dict[str, Tensor] = {}
    for name, grad in grads.items():
        name = name.removeprefix("model.").replace(".replacement.experts.0.block.", ".")
        name = name.replace(".replacement.layer.block.", ".").replace(".layer.block.", ".")
        name = name.replace(".projection.", ".").replace(".biases.table.", ".layer.0.SelfAttention.relative_attention_bias.")
        for stack in layout.stacks:
            for part in ("up", "gate", "down"):
                inside = (
                    rf"(?<={re.escape(stack.blocks)}\.\d\.){re.escape(stack.ffn.seat)}\.(ffn|replacement\.experts\.0)\.{part}\."
                )
                name = re.sub(inside, f"{getattr(stack.ffn, part)}.", name)
        if ".inserted." not in name:
            found[name] = torch.cat([found[name], grad]) if name in found else grad
    return found


class Same(nn.Module):
    """The block itself, in its own place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, handed: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer(hidden, *args, **kwargs)


class Gate(nn.Module):
    """One factor per head."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(num_heads))

    def forward(self, context: Tensor, handed: Any) -> Tensor:
        return (context.unflatten(-1, (len(self.factors), -1)) * self.factors[:, None]).flatten(-2)


class Scaled(nn.Module):
    """Its input times what it is handed for each row."""

    def forward(self, hidden: Tensor, scales: Tensor) -> Tensor:
        return hidden * scales[:, None, None]


def install(backbone: Backbone, place: str, num_experts: int = 1, noise: float = 0.0) -> dict[int, Any]:
    """Put modules at all seams of one kind that compute the same as before (``ffn``, ``experts``: up to the noise of
    the experts in place of FFNs and of layers), and return what to hand over for :data:`TASKS`."""
    handed: dict[int, Any] = dict.fromkeys(range(backbone.num_blocks))
    if place == "ffn":
        for seam in backbone.seams():
            experts = [upcycle(seam.take_ffn(), noise, seed=e) for e in range(num_experts)]
            seam.replace(RoutedExperts(seam.block, experts, "outputs"))
        return handed_to(backbone, routers_of(backbone, num_experts), TASKS)
    if place == "experts":
        for seam in backbone.seams("layer"):
            layers = [upcycle(seam.take_layer(), noise, seed=e) for e in range(num_experts)]
            for e, layer in enumerate(layers):
                layer.keep_apart(e * backbone.stack_sizes[-1])
            seam.replace(RoutedExperts(seam.block, layers, "outputs"))
        return handed_to(backbone, routers_of(backbone, num_experts), TASKS)
    if place == "layer":
        for seam in backbone.seams("layer"):
            seam.replace(Same(seam.take_layer()))
    else:
        for seam in backbone.seams(place):  # pyright: ignore[reportArgumentType, reportCallIssue]
            seam.insert(Gate(seam.num_heads))
    return handed


def routers_of(backbone: Backbone, num_experts: int, **settings: Any) -> Routers:
    """Task routers for two tasks at all blocks; they hang at the backbone, so that their gradients are found."""
    config = RouterConfig(**{"init_std": 1.0, **settings})
    sites = Sites(dict.fromkeys(range(backbone.num_blocks), num_experts), 16, VOCAB, 1, backbone.num_encoder_blocks)
    routers = Routers(config, sites, ["a", "b"], None, seed=3)
    backbone.add_module("routers", routers)
    return routers


def handed_to(backbone: Backbone, routers: Routers, rows: Rows) -> dict[int, Any]:
    return dict.fromkeys(range(backbone.num_blocks), Traffic(routers, rows, torch.device("cpu")))


def test_every_architecture_of_the_configuration_is_covered() -> None:
    assert {model_type for model_type, _ in VARIANTS.values()} == set(BACKBONES) == {*ENCODERS, *SEQ2SEQ}
    assert {name.removesuffix(" (gated)") for name in LAYOUTS} == set(BACKBONES)


@pytest.mark.parametrize("place", ["none", *PLACES, "experts"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_computes_the_same_at_a_seam_leaves_outputs_and_gradients_alone(
    variant: str, place: str, folders: Mapping[str, str]
) -> None:
    if place == "cross_attention_output" and variant not in DECODERS:
        assert loaded(folders[variant]).seams("cross_attention_output") == []
        return
    expected, expected_grads = plain_loss(plain_model(variant))
    backbone = loaded(folders[variant])
    handed = {} if place == "none" else install(backbone, place)
    outputs, grads = seam_loss(backbone, handed)
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
    named = plain_names(backbone, grads)
    assert set(named) == set(expected_grads)
    torch.testing.assert_close(named, expected_grads, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_seams_come_in_block_order_encoder_first_and_the_blocks_call_them(variant: str) -> None:
    backbone = Backbone(plain_model(variant))
    called: list[tuple[str, int]] = []

    class Recorder(nn.Module):
        def __init__(self, place: str, layer: nn.Module | None = None) -> None:
            super().__init__()
            self.place, self.layer = place, layer

        def forward(self, hidden: Tensor, handed: int, *args: Any, **kwargs: Any) -> Tensor:
            called.append((self.place, handed))
            return self.layer(hidden, *args, **kwargs) if self.layer else hidden

    for place in PLACES[2:]:
        for seam in backbone.seams(place):  # pyright: ignore[reportArgumentType, reportCallIssue]
            seam.insert(Recorder(place))
    for seam in backbone.seams():
        seam.follow(Recorder("ffn"))
    for seam in backbone.seams("layer"):
        seam.replace(Recorder("layer", seam.take_layer()))
    seam_loss(backbone, {block: block for block in range(backbone.num_blocks)})
    decoders = 2 if variant in DECODERS else 0
    assert (backbone.num_encoder_blocks, backbone.num_blocks) == (BLOCKS, BLOCKS + decoders)
    assert backbone.is_seq2seq == (decoders > 0) and backbone.hidden_size == 16
    expected = []
    for block in range(BLOCKS + decoders):
        cross = [("cross_attention_output", block)] if block >= BLOCKS else []
        expected += [("layer", block), ("attention_output", block), *cross, ("ffn", block)]
    assert called == expected
    assert [seam.block for seam in backbone.seams("layer")] == list(range(BLOCKS + decoders))


@pytest.mark.parametrize(
    ("variant", "place"),
    [(v, "attention_output") for v in VARIANTS] + [(v, "cross_attention_output") for v in DECODERS],
)
def test_a_closed_gate_is_a_head_without_its_columns_of_the_output_projection(variant: str, place: Any) -> None:
    gated, cut = Backbone(plain_model(variant)), Backbone(plain_model(variant))
    before, _ = seam_loss(cut, {})
    for backbone in (gated, cut):
        for seam in backbone.seams(place):
            head = seam.block % HEADS
            width = seam.projection.in_features // HEADS
            with torch.no_grad():
                if backbone is cut:
                    seam.projection.weight[:, head * width : (head + 1) * width] = 0
                else:
                    gate = Gate(HEADS)
                    gate.factors[head] = 0
                    seam.insert(gate)
    expected, _ = seam_loss(cut, {})
    outputs, _ = seam_loss(gated, dict.fromkeys(range(gated.num_blocks)))
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
    assert (outputs[-1] - before[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_follows_the_ffn_is_handed_its_argument_and_acts_inside_the_residual(variant: str) -> None:
    backbone = Backbone(plain_model(variant)).eval()
    plain = backbone.encode(*INPUTS, {})
    seam = backbone.seams()[1]
    seam.follow(Scaled())
    changed = backbone.encode(*INPUTS, {1: torch.tensor([1.0, 1.0, 0.0, 0.0])})
    torch.testing.assert_close(changed[2:], plain[2:])
    down = seam.take_ffn().down
    with torch.no_grad():
        for parameter in down.parameters():
            parameter.mul_(2)
    doubled = backbone.encode(*INPUTS, {1: torch.zeros(4)})
    torch.testing.assert_close(changed[:2], doubled[:2])
    assert (changed[:2] - plain[:2]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architectures_ffn_is_widened_without_changing_what_it_computes(variant: str) -> None:
    for seam in Backbone(plain_model(variant)).seams():
        ffn = seam.take_ffn()
        hidden = torch.randn(3, 16)
        expected, units = ffn(hidden), ffn.up.out_features
        ffn.up, ffn.gate, ffn.down = widen(ffn.up, ffn.gate, ffn.down, 3, 0.0, seed=0)
        torch.testing.assert_close(ffn(hidden), expected, atol=1e-5, rtol=1e-5)
        assert ffn.up.out_features == 3 * units and (ffn.gate is None) == (variant not in ("modernbert", "t5-v1.1"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_never_matters(variant: str) -> None:
    backbone = Backbone(plain_model(variant)).eval()
    more = torch.full((4, 5), 9)
    wider = (torch.cat([IDS, more], 1), torch.cat([MASK, 0 * more], 1), torch.cat([SEGMENTS, 0 * more], 1))
    noisy = (wider[0].where(wider[1].bool(), torch.tensor(11 if variant not in ROBERTAS else PAD)), *wider[1:])
    states, again = backbone.encode(*INPUTS, {}), backbone.encode(*noisy, {})
    torch.testing.assert_close(again[:, :7][MASK.bool()], states[MASK.bool()], atol=1e-5, rtol=1e-5)
    if backbone.is_seq2seq:
        logits = backbone.decode(states, MASK, TARGETS, {})
        longer = torch.cat([TARGETS, torch.full((4, 2), -100)], 1)
        torch.testing.assert_close(
            backbone.decode(again, wider[1], longer, {})[:, :5][TARGETS >= 0], logits[TARGETS >= 0], atol=1e-5, rtol=1e-5
        )


ROBERTAS = ("roberta", "xlm-roberta", "camembert")
"""They tell padding from text by its id as well as by the mask: their positions count the ids that are not padding."""


@pytest.mark.parametrize("variant", DECODERS)
def test_teacher_forcing_shows_each_position_the_targets_before_it(variant: str) -> None:
    backbone = Backbone(plain_model(variant)).eval()
    states = backbone.encode(*INPUTS, {})
    logits = backbone.decode(states, MASK, TARGETS, {})
    later = TARGETS.clone()
    later[:, 2:] = 20
    changed = backbone.decode(states, MASK, later, {})
    torch.testing.assert_close(changed[:, :3], logits[:, :3], atol=1e-6, rtol=0)
    assert (changed[:, 3] - logits[:, 3]).abs().max() > 1e-3


def answers(backbone: Backbone, handed: Mapping[int, Any], rows: slice = slice(None), **settings: Any) -> Tensor:
    ids, mask, segments = (each[rows] for each in INPUTS)
    states = backbone.encode(ids, mask, segments, handed)
    return backbone.generate(states, MASK[rows].bool(), handed, **{"max_new_tokens": 6, **settings})


@pytest.mark.parametrize("place", [*PLACES, "experts"])
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("variant", DECODERS)
def test_generation_is_transformers_own_with_and_without_a_cache(variant: str, beams: int, place: str) -> None:
    model: Any = plain_model(variant, noise=0.3)
    rules = GenerationConfig(num_beams=beams, max_new_tokens=9, length_penalty=0.7 if beams > 1 else None)
    model.generation_config.forced_eos_token_id = None
    ids = model.generate(input_ids=INPUTS[0], attention_mask=MASK, generation_config=rules)
    expected = [until_the_end(row) for row in ids[:, 1:].tolist()]
    assert len(set(map(tuple, expected))) > 2
    backbone = Backbone(model).eval()
    handed = install(backbone, place)
    for use_cache in (True, False):
        found = answers(backbone, handed, beams=beams, max_new_tokens=9, length_penalty=0.7, use_cache=use_cache)
        assert found.tolist() == [row + [PAD] * (found.shape[1] - len(row)) for row in expected]


def until_the_end(row: list[int]) -> list[int]:
    return row[: row.index(END) + 1] if END in row else row


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("variant", DECODERS)
def test_each_rows_beams_go_through_its_own_tasks_experts(variant: str, beams: int) -> None:
    backbone = Backbone(plain_model(variant, noise=0.3)).eval()
    install(backbone, "ffn", num_experts=2, noise=1.5)
    routers = opposite(backbone)

    def generate(rows: Rows, of: slice, use_cache: bool = True) -> list[list[int]]:
        ids, mask, segments = (each[of] for each in INPUTS)
        states = backbone.encode(ids, mask, segments, handed_to(backbone, routers, rows))
        handed = handed_to(backbone, routers, tuple((t, a * beams, b * beams) for t, a, b in rows))
        found = backbone.generate(states, MASK[of], handed, beams=beams, max_new_tokens=6, use_cache=use_cache)
        return [until_the_end(row) for row in nn.functional.pad(found, (0, 6 - found.shape[1])).tolist()]

    together = generate(TASKS, slice(None))
    assert together == generate(TASKS, slice(None), use_cache=False)
    apart = [generate(((task, 0, stop - start),), slice(start, stop)) for task, start, stop in TASKS]
    assert together == apart[0] + apart[1]
    swapped = [generate(((1 - task, 0, stop - start),), slice(start, stop)) for task, start, stop in TASKS]
    assert together != swapped[0] + swapped[1]


def opposite(backbone: Backbone) -> Routers:
    """The routers, where task 0 takes expert 0 everywhere and task 1 expert 1."""
    routers = cast(Routers, backbone.get_submodule("routers"))
    for parameter in routers.parameters():
        parameter.data = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    return routers


SELECTIONS: dict[str, dict[str, Any]] = {
    "top_1": {"top_k": 1},
    "top_2": {"top_k": 2},
    "soft": {"selection": "soft"},
    "merged": {"selection": "soft", "combine": "parameters"},
}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("variant", DECODERS)
def test_whole_layers_generate_the_same_with_and_without_a_cache(variant: str, beams: int, selection: str) -> None:
    model = plain_model(variant, noise=0.3)
    for name, parameter in model.named_parameters():
        # Otherwise BART would say the same token again and again, whatever its layers see.
        parameter.data.mul_(8 if "embed_positions" in name else "norm.bias" not in name)
    backbone = Backbone(model).eval()
    install(backbone, "experts", num_experts=3, noise=0.35 if variant == "bart" else 0.5)
    for seam in backbone.seams("layer"):
        cast(RoutedExperts, seam.replacement).combine = SELECTIONS[selection].get("combine", "outputs")
    routers = routers_of(backbone, 3, **SELECTIONS[selection])
    chosen = [routing.chosen for routing in routers.of_tasks(torch.arange(2)).values()]
    assert any((block != 0).any() for block in chosen), "another expert than the first is chosen somewhere"
    answers_of: list[list[int]] = []
    for task in (0, 1):
        states = backbone.encode(*INPUTS, handed_to(backbone, routers, ((task, 0, 4),)))
        handed = handed_to(backbone, routers, ((task, 0, 4 * beams),))
        found = [
            backbone.generate(states, MASK, handed, beams=beams, max_new_tokens=9, length_penalty=0.7, use_cache=use_cache)
            for use_cache in (True, False)
        ]
        assert torch.equal(*found)
        answers_of += [until_the_end(row) for row in found[0].tolist()]
        if beams == 1:
            forced = backbone.decode(states, MASK, found[0], handed).argmax(-1)
            assert [until_the_end(row) for row in forced.tolist()] == answers_of[-4:]
    assert len(set(map(tuple, answers_of))) > 2


def test_the_rows_of_several_tasks_can_not_keep_the_keys_of_whole_layers() -> None:
    backbone = Backbone(plain_model("bart")).eval()
    handed = install(backbone, "experts", num_experts=2)
    opposite(backbone)
    handed = handed_to(backbone, cast(Routers, backbone.get_submodule("routers")), TASKS)
    with pytest.raises(RuntimeError, match="computes 2 of 4 rows"):
        answers(backbone, handed, beams=1)
    expected = answers(backbone, handed, beams=1, use_cache=False)
    for seam in backbone.seams("layer"):
        seam.caches = False
    assert torch.equal(answers(backbone, handed, beams=1), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_row_of_a_mixed_batch_goes_through_its_own_tasks_layers(variant: str) -> None:
    backbone = Backbone(plain_model(variant)).eval()
    install(backbone, "experts", num_experts=2, noise=1.0)
    routers = opposite(backbone)
    together, _ = seam_loss(backbone, handed_to(backbone, routers, TASKS))
    for task, start, stop in TASKS:
        alone, _ = seam_loss(backbone, handed_to(backbone, routers, ((task, 0, 4),)))
        other, _ = seam_loss(backbone, handed_to(backbone, routers, ((1 - task, 0, 4),)))
        of_rows = [(mask.sum(1).cumsum(0)).tolist() for mask in (MASK.bool(), TARGETS >= 0)]
        for mixed, own, foreign, ends in zip(together, alone, other, of_rows, strict=False):
            of = slice(([0, *ends])[start], ends[stop - 1])
            torch.testing.assert_close(mixed[of], own[of], atol=1e-5, rtol=1e-5)
            assert (mixed[of] - foreign[of]).abs().max() > 1e-3


def test_what_a_folder_says_about_generation_does_not_leak_in_and_nothing_is_said(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transformers_logging.warning_once.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model: Any = plain_model("bart", noise=0.3)
    model.save_pretrained(tmp_path / "plain")
    expected = answers(loaded(str(tmp_path / "plain")), {}, beams=4)
    model.generation_config.update(forced_bos_token_id=START, num_beams=3, no_repeat_ngram_size=1, min_length=6)
    model.save_pretrained(tmp_path / "rules")
    saved = model.generate(input_ids=INPUTS[0], attention_mask=MASK, max_new_tokens=6)[:, 1:]
    assert saved.tolist() != expected.tolist() and (saved[:, 0] == START).all()
    capfd.readouterr()
    caplog.clear()
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        assert answers(loaded(str(tmp_path / "rules")), {}, beams=4).tolist() == expected.tolist()
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_an_answer_that_ends_early_is_padded_behind_its_end_token() -> None:
    backbone = Backbone(plain_model("t5")).eval()
    for parameter in backbone.parameters():
        parameter.data.zero_()

    class Ending(nn.Module):
        """Logits of one long and three short answers."""

        def forward(self, hidden: Tensor) -> Tensor:
            likely = torch.tensor([8, END, END, END]).repeat_interleave(len(hidden) // 4)
            return nn.functional.one_hot(likely, VOCAB)[:, None] * 50.0

    backbone.model.lm_head = Ending()
    for beams in (1, 3):
        found = answers(backbone, {}, beams=beams, max_new_tokens=4)
        assert found.tolist() == [[8, 8, 8, 8]] + [[END, PAD, PAD, PAD]] * 3


def test_generation_needs_evaluation_mode() -> None:
    backbone = Backbone(plain_model("bart")).train()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        answers(backbone, {}, beams=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_loads_with_the_trials_dropout_everywhere(variant: str, folders: Mapping[str, str]) -> None:
    backbone = loaded(folders[variant], dropout=0.25).train()
    assert {module.p for module in backbone.modules() if isinstance(module, nn.Dropout)} <= {0.25}
    layout = layout_of(backbone.model.config)
    assert layout is not None
    assert {getattr(backbone.model.config, name) for name in layout.dropouts} == {0.25}
    torch.manual_seed(0)
    first, _ = seam_loss(backbone, {})
    for name in layout.dropouts:
        assert hasattr(AutoConfig.for_model(backbone.model.config.model_type), name), f"{name} is no setting of {variant}"
    second, _ = seam_loss(backbone, {})
    assert not torch.equal(first[-1], second[-1])
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


@pytest.mark.parametrize("variant", ["bart", "t5", "t5-v1.1", "modernbert"])
def test_the_ffns_inner_dropout_draws_what_the_plain_models_draws(variant: str, folders: Mapping[str, str]) -> None:
    layout = layout_of(plain_model(variant).config)
    assert layout is not None
    # Attention masks differ between implementations, so only the other dropouts are compared.
    model = plain_model(variant, **dict.fromkeys([n for n in layout.dropouts if "attention" not in n], 0.3)).train()
    backbone = Backbone(copy.deepcopy(model)).train()
    results = []
    for run in (lambda: plain_loss(model), lambda: seam_loss(backbone, {})):
        torch.manual_seed(5)
        results.append(run()[0])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_blocks_are_not_left_out_at_random(tmp_path: Path) -> None:
    plain_model("bart", encoder_layerdrop=0.9, decoder_layerdrop=0.9).save_pretrained(tmp_path)
    backbone = loaded(str(tmp_path)).train()
    torch.testing.assert_close(backbone.encode(*INPUTS, {}), backbone.encode(*INPUTS, {}), atol=0, rtol=0)


@pytest.mark.parametrize("place", ["ffn", "layer", "experts", "attention_output"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(variant: str, place: str, folders: Mapping[str, str]) -> None:
    results, calls = [], []
    for checkpointing in (False, True):
        backbone = loaded(folders[variant], dropout=0.2, gradient_checkpointing=checkpointing).train()
        handed = install(backbone, place, num_experts=2, noise=0.5)
        calls.append(0)
        for module in backbone.modules():
            if isinstance(module, Gate) or isinstance(module, RoutedExperts if place == "ffn" else FeedForward):
                module.register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
        torch.manual_seed(7)
        results.append(seam_loss(backbone, handed))
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)
    routed = place in ("ffn", "experts")
    assert not routed or any("router" in name and grad.abs().sum() > 0 for name, grad in results[1][1].items())
    assert calls[1] == 2 * calls[0] > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_says_nothing(
    variant: str, folders: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transformers_logging.warning_once.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = loaded(folders[variant], gradient_checkpointing=True).train()
        seam_loss(backbone, {})
        if backbone.is_seq2seq:
            answers(backbone.eval(), {}, beams=2)
    assert not caplog.records


def test_compiling_blocks_that_checkpoint_their_gradients_is_refused() -> None:
    backbone = load_backbone(replace(TINY, gradient_checkpointing=True), None, seed=0)
    with pytest.raises(ConfigError, match=r"train\.compile: does not go with backbone\.gradient_checkpointing"):
        backbone.compile_blocks()


def test_checkpointing_a_frozen_backbone_asks_for_no_gradients() -> None:
    backbone = load_backbone(replace(TINY, frozen=True, gradient_checkpointing=True), None, seed=0)
    assert not backbone.encode(*INPUTS, {}).requires_grad


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("place", ["ffn", "experts"])
@pytest.mark.parametrize("variant", ["bert", "bart"])
def test_compiled_blocks_compute_the_same(variant: str, place: str, folders: Mapping[str, str]) -> None:
    plain, compiled = loaded(folders[variant]), loaded(folders[variant])
    handed = [install(backbone, place, num_experts=2, noise=0.5) for backbone in (plain, compiled)]
    compiled.compile_blocks()
    counters.clear()
    expected, found = seam_loss(plain, handed[0]), seam_loss(compiled, handed[1])
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 9, "all blocks of a stack share their graphs"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    ids, mask, segments = (each[: 4 if place == "experts" else 2, :5] for each in INPUTS)
    both = [(each, cast(Routers, each.get_submodule("routers"))) for each in (plain, compiled)]
    # Whole blocks are compiled once more for a single row, and for a whole batch instead of a part of one.
    rows: Rows = TASKS if place == "experts" else ((1, 0, 1), (0, 1, 2))
    routes = [handed_to(each, routers, rows) for each, routers in both]
    states = [each.encode(ids, mask, segments, handed) for each, handed in zip((plain, compiled), routes, strict=True)]
    torch.testing.assert_close(states[1], states[0], atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == graphs, "other shapes and routes compile nothing again"
    if plain.is_seq2seq:
        whole = [handed_to(each, routers, ((1, 0, 4),)) for each, routers in both]
        assert torch.equal(answers(compiled, whole[1], beams=1), answers(plain, whole[0], beams=1))
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_a_replaced_ffn_is_gone_and_can_not_be_replaced_again() -> None:
    backbone = load_backbone(TINY, None, seed=0)
    before = sum(p.numel() for p in backbone.parameters())
    seam = backbone.seams()[0]
    size = sum(p.numel() for p in seam.take_ffn().parameters())
    seam.replace(Scaled())
    assert sum(p.numel() for p in backbone.parameters()) == before - size
    with pytest.raises(RuntimeError, match="replaced already"):
        seam.replace(Scaled())


def test_a_replaced_block_takes_its_seams_along_and_its_copies_are_handed_what_it_would_be() -> None:
    backbone = load_backbone(TINY, None, seed=0).eval()
    plain = backbone.encode(*INPUTS, {})
    backbone.seams()[1].follow(Scaled())
    expected = backbone.encode(*INPUTS, {1: torch.full((4,), 0.5)})
    seam = backbone.seams("layer")[1]
    seam.replace(Same(copy.deepcopy(seam.take_layer())))
    assert [s.block for s in backbone.seams()] == [s.block for s in backbone.seams("attention_output")] == [0]
    torch.testing.assert_close(backbone.encode(*INPUTS, {1: torch.full((4,), 0.5)}), expected, atol=0, rtol=0)
    assert (plain - expected).abs().max() > 1e-4
    with pytest.raises(RuntimeError, match="replaced already"):
        seam.take_layer()


def test_t5s_position_biases_stay_when_its_first_blocks_are_replaced() -> None:
    backbone = Backbone(plain_model("t5"))
    expected, _ = seam_loss(backbone, {})
    for seam in backbone.seams("layer"):
        seam.replace(Same(copy.deepcopy(seam.take_layer())))
    tables = [name for name, _ in backbone.named_parameters() if "biases" in name or "relative" in name]
    assert tables == ["model.encoder.block.0.biases.table.weight", "model.decoder.block.0.biases.table.weight"]
    found, _ = seam_loss(backbone, dict.fromkeys(range(5)))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_two_modules_do_not_fit_before_one_projection() -> None:
    seam = load_backbone(TINY, None, seed=0).seams("attention_output")[0]
    seam.insert(Gate(2))
    with pytest.raises(RuntimeError, match="already"):
        seam.insert(Gate(2))


def test_the_handover_lasts_for_one_forward_and_nests() -> None:
    backbone = load_backbone(TINY, None, seed=0).eval()
    seen: list[str] = []

    class Nested(nn.Module):
        def forward(self, hidden: Tensor, handed: str) -> Tensor:
            seen.append(handed)
            if len(seen) == 1:
                backbone.encode(*INPUTS, {0: "inner 0", 1: "inner 1"})
            return hidden

    seams = backbone.seams()
    for seam in seams:
        seam.follow(Nested())
    backbone.encode(*INPUTS, {0: "outer 0", 1: "outer 1"})
    assert seen == ["outer 0", "inner 0", "inner 1", "outer 1"]
    with pytest.raises(RuntimeError, match="outside of the backbone"):
        seams[0](torch.zeros(1, 1, 16))


def test_nothing_stays_handed_over_after_an_error() -> None:
    backbone = load_backbone(TINY, None, seed=0)
    with pytest.raises(IndexError):
        backbone.encode(torch.full((1, 3), 300), torch.ones(1, 3), torch.zeros(1, 3).long(), {0: torch.ones(1)})
    seam = backbone.seams()[0]
    seam.follow(Scaled())
    with pytest.raises(RuntimeError, match="outside"):
        seam(torch.zeros(1, 1, 16))


@pytest.mark.parametrize("name", ["tiny-encoder", "tiny-bart", "tiny-t5"])
def test_the_seed_alone_decides_a_built_in_backbone_and_the_global_stream_is_left_alone(name: str) -> None:
    config = replace(TINY, name=name)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = load_backbone(config, None, seed=1).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    again, other = load_backbone(config, None, seed=1).state_dict(), load_backbone(config, None, seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ["tiny-bart", "tiny-t5"])
def test_built_in_decoders_use_the_built_in_tokenizers_special_tokens(name: str) -> None:
    config = replace(TINY, name=name, max_target_length=50)
    backbone = load_backbone(config, VOCAB, seed=0).eval()
    assert (backbone.num_encoder_blocks, backbone.num_blocks, backbone.model.config.vocab_size) == (2, 4, VOCAB)
    target = torch.full((4, 50), 8)
    target[:, -1] = END
    states = backbone.encode(*INPUTS, {})
    logits = backbone.decode(states, MASK, target, {})
    assert logits.shape == (4, 50, VOCAB) and logits.isfinite().all()
    starts = backbone.model.prepare_decoder_input_ids_from_labels(target)[:, 0].tolist()
    assert starts == [END if name == "tiny-bart" else PAD] * 4
    embedding = backbone.model.get_input_embeddings().weight
    assert backbone.model.get_output_embeddings().weight is embedding
    # With the end token as the only likely one, every answer is just that.
    bias = torch.full((VOCAB,), -1e4)
    bias[END] = 0
    backbone.model.lm_head.bias = nn.Parameter(bias)
    assert backbone.generate(states, MASK, {}, beams=2, max_new_tokens=4)[:, 0].tolist() == [END] * 4


def test_a_frozen_backbone_trains_nothing(folders: Mapping[str, str]) -> None:
    for backbone in (load_backbone(replace(TINY, frozen=True), None, seed=0), loaded(folders["modernbert"], frozen=True)):
        assert not any(p.requires_grad for p in backbone.parameters())


def test_layers_beyond_the_last_block_are_refused() -> None:
    backbone = load_backbone(replace(TINY, name="tiny-t5"), None, seed=0)
    assert list(seams_at(backbone, ())) == [0, 1, 2, 3] and list(seams_at(backbone, (3, 1))) == [1, 3]
    with pytest.raises(ConfigError, match=r"model\.layers: must be below the backbone's 4 blocks, got \[4\]"):
        seams_at(backbone, (4,))


def test_layers_by_name_count_in_each_stack() -> None:
    backbone = load_backbone(replace(TINY, name="tiny-t5", size=replace(TINY.size, num_layers=3)), None, seed=0)
    assert backbone.stack_sizes == (3, 3)
    assert list(seams_at(backbone, "every_other")) == [1, 4]
    assert list(seams_at(backbone, "last:2", "layer")) == [1, 2, 4, 5]
    with pytest.raises(ConfigError, match=r"model\.layers: must be at most the 3 blocks of a stack, got 'last:4'"):
        seams_at(backbone, "last:4")


def test_what_has_no_rows_is_marked_for_those_who_slice_rows() -> None:
    marked: dict[str, set[str]] = {}

    class Spy(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: Tensor, handed: Any, *args: Any, **kwargs: Any) -> Tensor:
            named = {str(place): value for place, value in enumerate(args)} | kwargs
            free = {name for name, value in named.items() if isinstance(value, RowFree)}
            marked.setdefault(handed, set()).update(free)
            rows = [v for name, v in named.items() if isinstance(v, Tensor)]
            assert all(len(value) == len(hidden) for value in rows), "the rest goes row by row"
            return self.layer(hidden, *args, **kwargs)

    for variant in VARIANTS:
        backbone = Backbone(plain_model(variant)).eval()
        for seam in backbone.seams("layer"):
            seam.replace(Spy(seam.take_layer()))
        seam_loss(backbone, dict.fromkeys(range(backbone.num_blocks), variant))
        if backbone.is_seq2seq:
            answers(backbone, dict.fromkeys(range(backbone.num_blocks), variant), beams=2)
    free = {"deberta": {"relative_pos", "rel_embeddings"}, "modernbert": {"position_embeddings"}}
    free |= {"t5": {"1", "past_key_values"}, "bart": {"past_key_values"}}
    for variant, names in marked.items():
        assert names == free.get(variant.split("-")[0], set()), variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_block_is_one_of_the_architectures_own(variant: str) -> None:
    backbone = Backbone(plain_model(variant, noise=0.0, tie_word_embeddings=True)).eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for number, seam in enumerate(backbone.seams()):
        own = backbone._blocks[number].original
        assert own is not None
        with drawn_from(number):
            fresh = backbone.fresh_layer(number).block
        with drawn_from(number):
            assert torch.equal(
                backbone.fresh_ffn(number).up.weight, fresh.get_parameter(f"{seam_path(seam, own)}.ffn.up.weight")
            )
        own_parameters = {name: p for name, p in own.named_parameters() if "relative" not in name}
        assert [name for name, _ in fresh.named_parameters()] == list(own_parameters)
        for name, parameter in fresh.named_parameters():
            was = own_parameters[name]
            assert parameter.shape == was.shape and parameter.requires_grad
            constant = bool((was == was.flatten()[0]).all())
            assert torch.equal(parameter, was) if constant else 0.6 < (parameter.std() / was.std()).item() < 1.6, name
    assert torch.equal(torch.get_rng_state(), state)


def seam_path(seam: nn.Module, block: nn.Module) -> str:
    return next(name for name, module in block.named_modules() if module is seam)


@pytest.mark.parametrize("place", ["ffn", "layer", "attention_output"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plain_model_comes_back_out_of_the_seams(variant: str, place: str) -> None:
    model = plain_model(variant)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    before, _ = plain_loss(copy.deepcopy(model))
    backbone = Backbone(model)
    backbone.seams(cast(Any, place))
    plain = backbone.plain()
    assert list(plain.state_dict()) == list(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in plain.state_dict().items())
    after, _ = plain_loss(plain)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert {p.data_ptr() for p in plain.parameters()}.isdisjoint(p.data_ptr() for p in backbone.parameters())


def test_a_widened_backbone_is_plain_if_its_configuration_can_say_so() -> None:
    for variant in VARIANTS:
        backbone = Backbone(plain_model(variant)).eval()
        expected, _ = seam_loss(backbone, {})
        seams = backbone.seams()
        for seam in seams:
            ffn = seam.take_ffn()
            ffn.up, ffn.gate, ffn.down = widen(ffn.up, ffn.gate, ffn.down, 2, 0.0, seed=0)
        torch.testing.assert_close(plain_loss(backbone.plain())[0], expected, atol=1e-5, rtol=1e-5)
        ffn = seams[0].take_ffn()
        ffn.up, ffn.gate, ffn.down = widen(ffn.up, ffn.gate, ffn.down, 2, 0.0, seed=0)
        with pytest.raises(NotPlainError, match=r"has one \w+ for all blocks, but here block 0: 128, block 1: 64"):
            backbone.plain()


@pytest.mark.parametrize("place", ["ffn", "experts", "layer", "attention_output"])
def test_what_no_plain_model_has_is_named(place: str) -> None:
    backbone = Backbone(plain_model("bart"))
    install(backbone, place, num_experts=2)
    with pytest.raises(NotPlainError, match=r"layers\.0\S* holds what no plain bart has"):
        backbone.plain()


def test_an_unknown_architecture_names_the_supported_ones(tmp_path: Path) -> None:
    GPT2Model(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"architecture must be one of bert, roberta, .*t5, got 'gpt2'"):
        load_backbone(BackboneConfig(name=str(tmp_path)), None, seed=0)


@pytest.mark.parametrize(
    ("variant", "positions"),
    [
        ("bert", 40),
        ("roberta", 39),
        ("xlm-roberta", 39),
        ("camembert", 39),
        ("electra", 40),
        ("deberta-v2", 40),
        ("deberta-v3", None),
        ("distilbert", 40),
        ("modernbert", 40),
        ("bart", 40),
        ("t5", None),
    ],
)
def test_the_longest_input_that_fits_is_read_and_a_longer_one_refused(
    variant: str, positions: int | None, folders: Mapping[str, str]
) -> None:
    length = positions or 90
    backbone = loaded(folders[variant], max_length=length)
    ids = torch.full((1, length), 7)
    assert backbone.encode(ids, torch.ones_like(ids), torch.zeros_like(ids), {}).isfinite().all()
    if positions:
        with pytest.raises(ConfigError, match=rf"backbone\.max_length: must be at most .* {positions} positions, got"):
            loaded(folders[variant], max_length=positions + 1)


def test_targets_that_do_not_fit_and_unknown_tokens_are_refused(folders: Mapping[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"backbone\.max_target_length: must be at most the backbone's 40 positions, got 41"):
        loaded(folders["bart"], max_target_length=41)
    longest = loaded(folders["bart"], max_target_length=40)
    target = torch.full((4, 40), 8)
    assert longest.decode(longest.encode(*INPUTS, {}), MASK, target, {}).isfinite().all()
    with pytest.raises(ConfigError, match=f"embeds {VOCAB} tokens, but its tokenizer has {VOCAB + 1}"):
        load_backbone(BackboneConfig(name=folders["bert"], max_length=32), VOCAB + 1, seed=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_that_lacks_a_weight_or_has_one_of_another_size_is_refused(
    variant: str, folders: Mapping[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folders[variant], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = max(weights, key=lambda key: ("1." in key, "wo." in key or "Wo." in key or "fc2" in key or "dense" in key, key))
    for law, value in (("has other sizes", torch.zeros(3, 3)), ("lacks 1 of the model's weights, such as", None)):
        changed = {key: weight for key, weight in weights.items() if key != name} | ({} if value is None else {name: value})
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=law):
            loaded(str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_weights_under_another_models_prefix_are_found_and_an_encoder_alone_is_no_seq2seq(tmp_path: Path) -> None:
    config = BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=VOCAB)
    masked = BertForMaskedLM(config).eval()
    masked.save_pretrained(tmp_path / "masked")
    expected = masked.bert(input_ids=IDS, attention_mask=MASK, token_type_ids=SEGMENTS).last_hidden_state
    torch.testing.assert_close(loaded(str(tmp_path / "masked")).encode(IDS, MASK, SEGMENTS, {}), expected, atol=1e-6, rtol=0)
    T5EncoderModel(cast(T5Config, plain_model("t5").config)).save_pretrained(tmp_path / "half")
    with pytest.raises(ConfigError, match=r"lacks \d+ of the model's weights, such as decoder\.block\.0"):
        loaded(str(tmp_path / "half"))


def test_a_folder_without_weights_or_with_too_few_is_refused(tmp_path: Path) -> None:
    config = BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=VOCAB)
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"backbone\.name: cannot read"):
        load_backbone(BackboneConfig(name=str(tmp_path)), None, seed=0)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks 16 of the model's weights, such as encoder\.layer\.1"):
        load_backbone(BackboneConfig(name=str(tmp_path)), None, seed=0)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = plain_model("bert")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"backbone\.name: cannot read .*no file named model\.safetensors"):
        loaded(str(tmp_path))


def test_a_decoder_without_its_special_tokens_is_refused(tmp_path: Path) -> None:
    plain_model("bart", decoder_start_token_id=None).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json must name .* got no decoder_start_token_id"):
        loaded(str(tmp_path))


def test_a_hub_id_needs_a_revision() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.revision: must be a commit for a Hub id"):
        load_backbone(BackboneConfig(name="someone/some-encoder"), None, seed=0)
