"""Checkpoints in FP8 and MXFP4: packed with their own codes, and run as transformers dequantises them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from quantized_sources import save_fp8, save_mxfp4
from reference_runtime import ReferenceRuntime
from safetensors.torch import load_file, save_file
from tiny_lm import VOCABULARY, byte_tokenizer, qwen3_moe

import comoe
from comoe.hf.blocks import discover
from comoe.hf.checkpoint import Checkpoint
from comoe.hf.quantized import FP8_SINCE, dequantises_fp8_experts
from comoe.hf.safetensors_io import CheckpointError
from comoe.packing import pack
from comoe.policy.plan import LADDER
from comoe.store import Store, StoreError
from comoe.store.inspect import inspect

needs_fp8 = pytest.mark.skipif(
    not dequantises_fp8_experts(),
    reason=f"transformers {transformers.__version__} cannot dequantise FP8 experts, {FP8_SINCE} can",
)
WIDE = {"hidden_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 4}
TINY = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def deepseek_v3():
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **(TINY | {"num_key_value_heads": 4, "initializer_range": 0.05}),
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=128,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=128,
        kv_lora_rank=96,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
    )
    return transformers.DeepseekV3ForCausalLM(config).eval()


def gpt_oss(hidden=64, intermediate=96):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **(TINY | {"num_attention_heads": 2, "num_key_value_heads": 1}),
        hidden_size=hidden,
        intermediate_size=intermediate,
        head_dim=32,
        num_local_experts=4,
    )
    return transformers.GptOssForCausalLM(config).eval()


SOURCES = {
    "qwen3_moe": (lambda folder: save_fp8(qwen3_moe(**WIDE), folder), "float8_e4m3fn", 8.05),
    "deepseek_v3": (lambda folder: save_fp8(deepseek_v3(), folder), "float8_e4m3fn", 8.05),
    "gpt_oss": (lambda folder: save_mxfp4(gpt_oss(), folder), "mxfp4", 4.8),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=needs_fp8 if source[1] == "float8_e4m3fn" else ())
        for name, source in SOURCES.items()
    ],
)
def packed(request, tmp_path_factory):
    """(source folder, packed folder, exact_dtype, bits of exact, padding included)"""
    save, exact_dtype, bits = SOURCES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    save(folder / "src")
    byte_tokenizer().save_pretrained(folder / "src")
    pack(folder / "src", folder / "dst")
    return folder / "src", folder / "dst", exact_dtype, bits


def dequantised(folder):
    """transformers' own model of a quantised checkpoint, in bf16, on a machine without a GPU."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def test_exact_weights_are_those_of_transformers(packed):
    src, dst, exact_dtype, _ = packed
    model = dequantised(src)
    blocks = discover(model)
    store = Store.open(dst)
    assert [layer.exact_dtype for layer in store.layers] == [exact_dtype] * len(blocks)
    stored = ReferenceRuntime.of_store(blocks, store, torch.bfloat16)
    for block, experts in zip(blocks, stored.experts, strict=True):
        for got, want in zip(experts, block.experts(), strict=True):
            for a, b in zip(got.matrices + got.biases, want.matrices + want.biases, strict=True):
                assert torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


def test_dense_weights_are_dequantised(packed):
    src, dst, *_ = packed
    want = dequantised(src).state_dict()
    for name, tensor in load_file(dst / "model.safetensors").items():
        assert tensor.dtype in (torch.bfloat16, torch.float32)
        assert torch.equal(tensor, want[name].to(tensor.dtype))


def test_exact_is_as_small_as_the_source(packed):
    *_, dst, _, bits = packed
    rungs = {rung["name"]: rung["bits"] for rung in inspect(dst)["rungs"]}
    assert rungs["exact"] < bits
    assert rungs["exact"] < rungs["8"]


def test_exact_gives_the_tokens_of_transformers(packed, tmp_path):
    """In float32, where no near tie hides behind rounding. FP8 scales are made powers of two first: the
    weights then have few enough bits to be the same in float32 and in transformers' bf16."""
    src = shutil.copytree(packed[0], tmp_path / "src")
    if packed[2] != "mxfp4":
        change(src, lambda name, t: t.log2().round().exp2() if name.endswith("scale_inv") else t)
    dst = pack(src, tmp_path / "dst")
    ids = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    want = dequantised(src).float().generate(ids, **options)
    model = comoe.load(dst, memory="1GB", exact=True, dtype=torch.float32)
    assert torch.equal(model.generate(ids, **options), want)
    model.comoe.close()


def test_levels_follow_the_source(packed):
    """Coarser levels come closer to the exact logits as they get finer; none costs more than exact."""
    _, dst, *_ = packed
    ids = torch.randint(1, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(1))
    model = comoe.load(dst, memory="1GB", dtype=torch.float32)
    runtime = model.comoe
    assert (runtime.plan.min_level == LADDER.exact).all()
    logits = []
    for level in (0, LADDER.names.index("4"), LADDER.exact):
        for layer_idx, spec in enumerate(runtime.specs):
            levels = np.full(spec.num_experts, level, np.uint8)
            runtime.placement.parts.op.set_levels(layer_idx, levels, levels)
        with torch.no_grad():
            logits.append(model(ids).logits)
    coarse, fine = ((x - logits[-1]).norm() for x in logits[:2])
    assert 0 < fine < coarse / 2
    runtime.close()


# ---- blocks that no store holds, and dense layers with ragged blocks ---------------------------------


@needs_fp8
@pytest.mark.parametrize("block", [(64, 64), (8, 128)])
def test_blocks_too_small_for_the_store_are_dequantised(tmp_path, block):
    save_fp8(qwen3_moe(**WIDE), tmp_path, block)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.exact_dtype(0) == "bfloat16"
    want = discover(dequantised(tmp_path))[0]
    for got, expert in zip(checkpoint.load_experts(0), want.experts(), strict=True):
        assert all(map(torch.equal, got.matrices, expert.matrices))


@needs_fp8
@pytest.mark.parametrize("scale", [torch.tensor(0.01), torch.tensor([0.01])], ids=["0-d", "1-d"])
def test_one_scale_for_a_tensor(tmp_path, scale):
    save_fp8(qwen3_moe(**WIDE), tmp_path)
    change(tmp_path, lambda name, t: scale.clone() if name.endswith("_scale_inv") else t)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.exact_dtype(0) == "float8_e4m3fn"
    want = discover(dequantised(tmp_path))[0]
    for got, expert in zip(checkpoint.load_experts(0), want.experts(), strict=True):
        for codes, weight in zip(got.matrices, expert.matrices, strict=True):
            value = codes.view(torch.float8_e4m3fn).float() * 0.01
            assert torch.equal(value.bfloat16(), weight)
        assert all((s == scale.float()).all() for s in got.scales)


@needs_fp8
def test_last_blocks_may_be_smaller(tmp_path):
    """576 = 4.5 * 128 rows, as in DeepSeek-V3, which transformers' own conversion refuses."""
    model = qwen3_moe(**WIDE | {"intermediate_size": 192}, mlp_only_layers=[0])
    weight = model.model.layers[0].mlp.up_proj.weight.detach().bfloat16()
    save_fp8(model, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    made = next(e for e in checkpoint.dense if e.name == "model.layers.0.mlp.up_proj.weight")
    got = made.read()
    assert got.shape == made.shape == (192, 256) and got.dtype == torch.bfloat16
    assert (got - weight).norm() < 0.05 * weight.norm()  # 96-row blocks are off by far more


# ---- bad input ------------------------------------------------------------------------------------


def change(folder, edit):
    """Rewrites each tensor; None leaves it out."""
    path = folder / "model.safetensors"
    tensors = {name: edit(name, tensor) for name, tensor in load_file(path).items()}
    save_file({n: t for n, t in tensors.items() if t is not None}, path, metadata={"format": "pt"})


@pytest.fixture
def fp8(tmp_path):
    return save_fp8(qwen3_moe(**WIDE), tmp_path / "fp8")


@pytest.fixture
def mxfp4(tmp_path):
    return save_mxfp4(gpt_oss(), tmp_path / "mxfp4")


@needs_fp8
@pytest.mark.parametrize(
    "lost", ["layers.1.mlp.experts.2.up_proj.weight_scale_inv", "q_proj.weight_scale_inv"]
)
def test_missing_scales(fp8, lost):
    change(fp8, lambda name, t: None if name.endswith(lost) else t)
    with pytest.raises(CheckpointError, match=rf"{lost} is missing. Download"):
        Checkpoint(fp8)


def test_missing_mxfp4_scales(mxfp4):
    change(mxfp4, lambda name, t: None if name.endswith("0.mlp.experts.down_proj_scales") else t)
    with pytest.raises(CheckpointError, match=r"experts.down_proj_scales is missing"):
        Checkpoint(mxfp4)


@needs_fp8
def test_scales_of_wrong_shape(fp8):
    change(fp8, lambda name, t: torch.ones(3, 7) if "2.up_proj.weight_scale_inv" in name else t)
    with pytest.raises(
        CheckpointError, match=r"scale_inv of shape \(3, 7\) does not fit .*\(128, 2"
    ):
        Checkpoint(fp8)


def test_mxfp4_scales_of_wrong_shape(mxfp4):
    change(mxfp4, lambda name, t: t[:, :-1].contiguous() if name.endswith("_scales") else t)
    with pytest.raises(CheckpointError, match=r"must be \[experts, rows, groups, 16\]"):
        Checkpoint(mxfp4)


def test_codes_of_wrong_shape(mxfp4):
    path = mxfp4 / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 64}))
    with pytest.raises(
        CheckpointError, match=r"config.json asks for shape \(4, 64, 64\), the .*\(4, 96, 64\)"
    ):
        list(Checkpoint(mxfp4).load_experts(0))


@needs_fp8
def test_codes_that_are_no_numbers(fp8, tmp_path):
    def spoil(name, tensor):
        if name.endswith("layers.0.mlp.experts.2.up_proj.weight"):
            tensor.view(torch.uint8)[3, 5] = 0x7F
        return tensor

    change(fp8, spoil)
    with pytest.raises(StoreError, match=r"expert 2: .*matrix up .*got NaN at row 3, column 5"):
        pack(fp8, tmp_path / "dst")


def test_scales_that_are_no_numbers(mxfp4, tmp_path):
    change(mxfp4, lambda name, t: t.fill_(255) if name.endswith("down_proj_scales") else t)
    with pytest.raises(StoreError, match=r"expert 0: .*matrix down .*must be finite"):
        pack(mxfp4, tmp_path / "dst")


def test_a_transformers_without_fp8_experts_is_refused(fp8, monkeypatch):
    monkeypatch.setattr("comoe.hf.quantized.transformers.__version__", "5.9.0")
    with pytest.raises(CheckpointError, match=r"cannot dequantise FP8 experts; expected 5\.10 or"):
        Checkpoint(fp8)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_other_methods_are_refused(fp8, method):
    path = fp8 / "config.json"
    quantization = {"quant_method": method, "bits": 4}
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": quantization})
    )
    with pytest.raises(CheckpointError, match=rf"quantised \({method}\).*save a dequantised copy"):
        Checkpoint(fp8)
