"""The seams change nothing by themselves, for every supported architecture; loading says what is wrong."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY, VOCAB, tiny_batch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedModel

from lightning_modules.config import BACKBONES, BackboneConfig, ConfigError
from lightning_modules.network.backbones import Encoder, load_backbone, seams_at

WITH_SEGMENTS = ("bert", "electra")
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "dim": 16,
    "embedding_size": 8,
    "num_hidden_layers": 2,
    "n_layers": 2,
    "num_attention_heads": 2,
    "n_heads": 2,
    "intermediate_size": 32,
    "hidden_dim": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


def plain_model(architecture: str) -> PreTrainedModel:
    kept = {} if architecture in ("electra", "distilbert") else {"add_pooling_layer": False}
    known = AutoConfig.for_model(architecture).to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in known}
    if architecture not in WITH_SEGMENTS and "type_vocab_size" in known:
        sizes["type_vocab_size"] = 1
    config = AutoConfig.for_model(architecture, **sizes)
    torch.manual_seed(0)
    return AutoModel.from_config(config, **kept)


def folder_with(architecture: str, place: Path) -> str:
    plain_model(architecture).save_pretrained(place)
    return str(place)


class Scaled(nn.Module):
    """Its input times what it is handed for each row."""

    def forward(self, hidden: Tensor, scales: Tensor) -> Tensor:
        return hidden * scales[:, None, None]


@pytest.mark.parametrize("architecture", BACKBONES)
def test_untouched_seams_compute_what_the_plain_model_computes(architecture: str) -> None:
    model = plain_model(architecture).eval()
    batch = tiny_batch([0, 1])
    arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if architecture in WITH_SEGMENTS:
        arguments["token_type_ids"] = batch.token_type_ids
    expected = model(**arguments).last_hidden_state
    encoder = Encoder(model)
    hidden = encoder(batch.input_ids, batch.attention_mask, batch.token_type_ids, {})
    torch.testing.assert_close(hidden, expected, atol=1e-6, rtol=0)
    assert len(encoder.seams()) == 2 and hidden.shape[-1] == encoder.hidden_size


@pytest.mark.parametrize("architecture", BACKBONES)
def test_a_folder_loads_with_the_trials_dropout_and_keeps_its_weights(architecture: str, tmp_path: Path) -> None:
    name = folder_with(architecture, tmp_path)
    encoder = load_backbone(BackboneConfig(name=name, dropout=0.25, max_length=32), VOCAB, seed=0)
    rates = {module.p for module in encoder.modules() if isinstance(module, nn.Dropout)}
    assert rates == {0.25} and encoder.training
    batch = tiny_batch([0])
    inputs = (batch.input_ids, batch.attention_mask, batch.token_type_ids, {})
    torch.testing.assert_close(encoder.eval()(*inputs), Encoder(plain_model(architecture)).eval()(*inputs))


@pytest.mark.parametrize("architecture", BACKBONES)
def test_what_follows_the_ffn_is_handed_its_argument_and_acts_inside_the_residual(architecture: str) -> None:
    encoder = Encoder(plain_model(architecture)).eval()
    batch = tiny_batch([0, 1])
    inputs = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    plain = encoder(*inputs, {})
    seam = encoder.seams()[1]
    seam.follow(Scaled())
    changed = encoder(*inputs, {1: torch.tensor([1.0, 1.0, 0.0, 0.0])})
    torch.testing.assert_close(changed[2:], plain[2:])
    down = seam.take_ffn().down
    with torch.no_grad():
        down.weight.mul_(2)
        down.bias.mul_(2)
    doubled = encoder(*inputs, {1: torch.zeros(4)})
    torch.testing.assert_close(changed[:2], doubled[:2])


def test_a_replaced_ffn_is_gone_and_can_not_be_replaced_again() -> None:
    encoder = load_backbone(TINY, VOCAB, seed=0)
    before = sum(p.numel() for p in encoder.parameters())
    seam = encoder.seams()[0]
    size = sum(p.numel() for p in seam.take_ffn().parameters())
    seam.replace(Scaled())
    assert sum(p.numel() for p in encoder.parameters()) == before - size
    with pytest.raises(RuntimeError, match="replaced already"):
        seam.replace(Scaled())


def test_the_handover_lasts_for_one_forward_and_nests() -> None:
    encoder = load_backbone(TINY, VOCAB, seed=0).eval()
    batch = tiny_batch([0, 1])
    inputs = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    seen: list[str] = []

    class Nested(nn.Module):
        def forward(self, hidden: Tensor, handed: str) -> Tensor:
            seen.append(handed)
            if len(seen) == 1:
                encoder(*inputs, {0: "inner 0", 1: "inner 1"})
            return hidden

    seams = encoder.seams()
    for seam in seams:
        seam.follow(Nested())
    encoder(*inputs, {0: "outer 0", 1: "outer 1"})
    assert seen == ["outer 0", "inner 0", "inner 1", "outer 1"]
    with pytest.raises(RuntimeError, match=r"outside of Encoder\.forward"):
        seams[0](torch.zeros(1, 1, 16))


def test_nothing_stays_handed_over_after_an_error() -> None:
    encoder = load_backbone(TINY, VOCAB, seed=0)
    with pytest.raises(IndexError):
        encoder(torch.full((1, 3), VOCAB), torch.ones(1, 3), torch.zeros(1, 3).long(), {0: torch.ones(1)})
    seam = encoder.seams()[0]
    seam.follow(Scaled())
    with pytest.raises(RuntimeError, match="outside"):
        seam(torch.zeros(1, 1, 16))


def test_the_seed_alone_decides_the_tiny_encoder_and_the_global_stream_is_left_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = load_backbone(TINY, VOCAB, seed=1).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    again, other = load_backbone(TINY, VOCAB, seed=1).state_dict(), load_backbone(TINY, VOCAB, seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_frozen_encoder_trains_nothing() -> None:
    encoder = load_backbone(replace(TINY, frozen=True), VOCAB, seed=0)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_layers_beyond_the_last_block_are_refused() -> None:
    encoder = load_backbone(TINY, VOCAB, seed=0)
    assert list(seams_at(encoder, ())) == [0, 1] and list(seams_at(encoder, (1,))) == [1]
    with pytest.raises(ConfigError, match=r"model\.layers: must be below the backbone's 2 blocks, got \[2\]"):
        seams_at(encoder, (2,))


def test_an_unknown_architecture_names_the_supported_ones(tmp_path: Path) -> None:
    GPT2Model(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"architecture must be one of bert, roberta, .*, got 'gpt2'"):
        load_backbone(BackboneConfig(name=str(tmp_path)), None, seed=0)


def test_inputs_that_do_not_fit_the_backbone_are_refused(tmp_path: Path) -> None:
    name = folder_with("roberta", tmp_path)
    with pytest.raises(ConfigError, match="must be at most the backbone's 39 positions, got 40"):
        load_backbone(BackboneConfig(name=name, max_length=40), VOCAB, seed=0)
    with pytest.raises(ConfigError, match=f"embeds {VOCAB} tokens, but its tokenizer has {VOCAB + 1}"):
        load_backbone(BackboneConfig(name=name, max_length=39), VOCAB + 1, seed=0)


def test_a_folder_without_weights_or_with_too_few_is_refused(tmp_path: Path) -> None:
    config = BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=VOCAB)
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"backbone\.name: cannot read"):
        load_backbone(BackboneConfig(name=str(tmp_path)), None, seed=0)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks 16 weights of its encoder, such as encoder\.layer\.1"):
        load_backbone(BackboneConfig(name=str(tmp_path)), None, seed=0)


def test_a_hub_id_needs_a_revision() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.revision: must be a commit for a Hub id"):
        load_backbone(BackboneConfig(name="someone/some-encoder"), None, seed=0)
