"""A model whose dense layers are coded: what is replaced, what it costs, and what it still computes."""

from pathlib import Path

import pytest
import torch
from tiny_lm import byte_tokenizer, qwen3_moe
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, SwitchTransformersConfig
from transformers import SwitchTransformersForConditionalGeneration as Switch

import comoe
from comoe.config import CoMoEConfig
from comoe.forecast import Model
from comoe.hf.blocks import discover
from comoe.hf.dense import CodedEmbedding, CodedLinear, codable, coded_dense_bytes

MEMORY = "300MB"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    model = qwen3_moe(
        hidden_size=128, head_dim=64, num_experts=8, tie_word_embeddings=request.param
    ).bfloat16()
    model.save_pretrained(root / "source")
    byte_tokenizer().save_pretrained(root / "source")
    comoe.pack(root / "source", root / "packed")
    return root / "packed"


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) * 7 % 257
    with torch.inference_mode():
        return model(ids).logits.float()


def kl(want: torch.Tensor, got: torch.Tensor) -> float:
    p, q = want.log_softmax(-1), got.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_eight_bits_change_little_and_four_more(folder):
    losses, sizes = {}, {}
    models = {
        dense: comoe.load(folder, MEMORY, dense=dense) for dense in ("source", "bits8", "bits4")
    }
    want = logits(models["source"])
    for dense, model in models.items():
        losses[dense] = kl(want, logits(model))
        sizes[dense] = model.comoe.stats()["dense_bytes"]
    # Weights of this size make tokens change experts easily.
    assert losses["source"] == 0 and 4 * losses["bits8"] < losses["bits4"] and losses["bits8"] < 0.1
    assert sizes["bits8"] < 0.62 * sizes["source"] and sizes["bits4"] < 0.37 * sizes["source"]
    assert "in 8 bits" in models["bits8"].comoe.describe()
    for dense, bits in (("bits8", 8), ("bits4", 4)):
        counted = coded_dense_bytes(models[dense].config, bits)
        assert abs(counted - sizes[dense]) < 2000  # buffers, which every model has
        assert Model.open(folder, dense).needs.dense == pytest.approx(counted, abs=2)
    for model in models.values():
        model.comoe.close()


def test_what_is_coded(folder):
    model = comoe.load(folder, MEMORY, dense="bits8")
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, CodedLinear)
    assert isinstance(model.lm_head, CodedLinear)
    assert isinstance(model.model.embed_tokens, CodedEmbedding)
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert layer.mlp.gate.weight.is_floating_point()  # routers stay
    assert model.dtype == torch.bfloat16
    ids = torch.arange(5)[None]
    out = model.generate(ids, max_new_tokens=6, min_new_tokens=6)
    assert out.shape == (1, 11)
    model.comoe.close()


def test_offload_codes_the_model_in_memory():
    model = qwen3_moe(hidden_size=128, head_dim=64, tie_word_embeddings=True)
    want = logits(model)
    weight = model.lm_head.weight
    comoe.offload(model, MEMORY, dense="bits8")
    assert isinstance(model.model.layers[1].self_attn.o_proj, CodedLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert weight.numel() == 0  # not kept beside the record
    assert kl(want, logits(model)) < 0.1
    model.comoe.close()


def test_biases_routers_and_what_stays_in_float32():
    linear = nn.Linear(64, 64)
    assert CodedLinear(linear, 8).bias is linear.bias
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, vocab_size=100,
        )
    )  # fmt: skip
    names = codable(mixtral, discover(mixtral))
    assert not any("gate" in name or "experts" in name for name in names)
    assert "lm_head" in names and "model.embed_tokens" in names
    switch = Switch(
        SwitchTransformersConfig(
            d_model=64, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
            num_experts=64, vocab_size=100, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        )
    )  # fmt: skip
    names = codable(switch, discover(switch))
    assert names and not any(".classifier" in name or ".experts." in name for name in names)
    assert any(name.endswith(".wo") for name in names)
    switch._keep_in_fp32_modules = ["wo"]
    assert not any(name.endswith(".wo") for name in codable(switch, discover(switch)))


def test_encoder_decoder_with_shared_embeddings_still_generates():
    torch.manual_seed(0)
    model = Switch(
        SwitchTransformersConfig(
            d_model=64, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
            num_experts=4, vocab_size=100, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
            decoder_start_token_id=0,
        )
    ).eval()  # fmt: skip
    ids = torch.arange(2, 14)[None]
    with torch.inference_mode():
        want = model(ids, decoder_input_ids=ids).logits
        comoe.offload(model, MEMORY, dense="bits8")
        got = model(ids, decoder_input_ids=ids).logits
        assert model.generate(ids, max_new_tokens=4).shape[0] == 1
    assert kl(want, got) < 0.1
    model.comoe.close()


def test_exact_refuses_and_unknown_values_are_named():
    with pytest.raises(ValueError, match="exact: expected dense='source'"):
        CoMoEConfig(exact=True, dense="bits8")
    with pytest.raises(ValueError, match="dense: expected one of 'source', 'bits8', 'bits4'"):
        CoMoEConfig(dense="int8")
