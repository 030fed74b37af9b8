"""The short way through Switch Transformers' MoE blocks: the same bits as transformers' own way."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

import comoe
from comoe.hf import switch_block
from comoe.hf.blocks import discover
from comoe.synthetic import config_of, make_model

SMALL = {"layers": 2, "hidden": 128, "intermediate": 48, "experts": 8, "vocab": 500}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("switch")
    config = config_of("switch-base-8", **SMALL)
    config.expert_capacity = 20
    make_model(folder / "m", config, popularity="zipf:2")  # so that some experts overflow
    with pytest.warns(UserWarning, match="no tokenizer"):
        comoe.pack(folder / "m", folder / "p")
    return folder / "p"


def load(packed):
    return comoe.load(packed, memory="100MB", exact=True)


def shortened(model) -> list:
    blocks = [m for m in model.modules() if hasattr(m, "router")]
    assert blocks and all("forward" in vars(m) for m in blocks)
    return blocks


@pytest.mark.parametrize("tokens", [1, 20, 21, 64])
def test_same_bits_as_the_long_way(packed, tokens):
    model = load(packed)
    blocks = shortened(model)
    ids = torch.randint(2, 500, (3, tokens), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        one = model(input_ids=ids, decoder_input_ids=ids).logits
        for block in blocks:
            del block.forward
        other = model(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.equal(one, other)
    model.comoe.close()


def test_decoding_calls_no_router_module(packed):
    model = load(packed)
    calls = []
    for module in model.modules():
        if hasattr(module, "expert_capacity"):
            forward = module.forward
            module.forward = lambda x, forward=forward: calls.append(x.shape) or forward(x)
    ids = torch.full((1, 30), 7)
    with torch.inference_mode():
        encoded = model.get_encoder()(input_ids=ids)
        encoded.router_logits = None
        assert len(calls) == 1  # 30 tokens may overflow an expert's 20
        model(encoder_outputs=encoded, decoder_input_ids=ids[:, :1], attention_mask=ids > 0)
    assert len(calls) == 1
    model.comoe.close()


def test_router_logits_are_still_collected(packed):
    model = load(packed)
    ids = torch.arange(2, 12)[None]
    with torch.inference_mode():
        out = model.get_encoder()(input_ids=ids, output_router_logits=True)
    assert [tuple(x.shape) for x in out.router_logits] == [(1, 10, 8)]
    model.comoe.close()


def test_a_block_with_other_arithmetic_is_left_alone(packed, monkeypatch):
    from transformers.models.switch_transformers import modeling_switch_transformers as modeling

    forward = modeling.SwitchTransformersSparseMLP.forward
    monkeypatch.setattr(
        modeling.SwitchTransformersSparseMLP, "forward", lambda self, x: 2 * forward(self, x)
    )
    model = load(packed)
    assert not [m for m in model.modules() if hasattr(m, "router") and "forward" in vars(m)]
    model.comoe.close()


def test_other_families_are_left_alone():
    from comoe.hf.checkpoint import meta_model

    model = meta_model(config_of("mixtral-8x7b", layers=1, hidden=128, vocab=64))
    before = copy.copy(vars(model.model.layers[0].mlp))
    switch_block.shorten(model, discover(model))
    assert vars(model.model.layers[0].mlp).keys() == before.keys()


def test_closing_still_raises_a_clear_error(packed):
    model = load(packed)
    model.comoe.close()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="runtime was closed"):
        model(input_ids=torch.ones((1, 4), dtype=torch.int64), decoder_input_ids=torch.ones((1, 1), dtype=torch.int64))  # fmt: skip


def test_the_model_as_transformers_runs_it(packed):
    """Exact weights, so the only difference is the order of sums."""
    folder = packed.parent / "m"
    plain = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    model = comoe.load(packed, memory="100MB", exact=True, dtype=torch.float32)
    ids = torch.randint(2, 500, (2, 15), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        want = plain(input_ids=ids, decoder_input_ids=ids).logits
        got = model(input_ids=ids, decoder_input_ids=ids).logits
    assert (want - got).abs().max() < 1e-3 * want.abs().max()
    model.comoe.close()
