"""The interpreter's baseline: what Python, torch and transformers take before any model is there.

A budget promises peak <= baseline + memory + tolerance, so the baseline must hold all that a first
run brings in whatever the model: lazily imported modules, thread pools, kernels' code and scratch.
Therefore it is taken after a tiny dummy model has been made, run and generated from.
"""

from __future__ import annotations

import functools
import gc

from comoe import memory


def _dummy_config():
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    )


def run_dummy_model() -> None:
    """Makes a random two-layer MoE model, feeds it a prompt in fp32 and in bf16, and generates."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    # A caller's seed must mean the same whether or not a model was loaded before.
    state = torch.random.get_rng_state()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            model = Qwen3MoeForCausalLM(_dummy_config()).to(dtype).eval()
            ids = torch.arange(1, 65)[None] % 128
            with torch.inference_mode():
                model(input_ids=ids)
                model.generate(
                    ids[:, :8],
                    attention_mask=torch.ones((1, 8), dtype=torch.int64),
                    max_new_tokens=4,
                    do_sample=False,
                    pad_token_id=0,
                )
    finally:
        torch.random.set_rng_state(state)


@functools.cache
def warm_up() -> int:
    """Runs the dummy model once in this process; returns the baseline in bytes.

    In a fresh process that is the peak so far. Where the process had a higher peak before (another
    model, say), that is not the interpreter's: then it is what is in memory now.
    """
    before, peak_before = memory.rss(), memory.peak_rss()
    run_dummy_model()
    gc.collect()
    now = memory.rss()
    if peak_before > before + (now - before) // 2 + 32_000_000:
        return now
    return max(memory.peak_rss(), now)
