"""Checkpoints of a stated shape with random weights, for timing: text from them means nothing.

python bench/synthetic.py FOLDER --layers 8 --experts 64 --top-k 8 --hidden 1024 --intermediate 512
"""

from __future__ import annotations

import argparse
from pathlib import Path


def make_checkpoint(
    folder: Path,
    *,
    layers: int,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    vocab: int = 4096,
    heads: int = 0,
    kv_heads: int = 0,
    seed: int = 0,
    embedding_scale: float = 1.0,
) -> None:
    """Writes a Qwen3-MoE checkpoint in bf16.

    Each expert is chosen about as often as any other, but attention outweighs the embeddings, so a text's
    tokens choose much the same ones. With embeddings 50 times as large every token has its own: the
    worst case for caches.

    heads, kv_heads: of 128 columns each; 0: as many as `hidden` has, and half of them.
    """
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden,
        moe_intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_experts=experts,
        num_experts_per_tok=top_k,
        num_attention_heads=heads or max(hidden // 128, 1),
        num_key_value_heads=kv_heads or max(hidden // 256, 1),
        head_dim=128,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen3MoeForCausalLM(config)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(embedding_scale)
        model.save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (
        ("layers", 8),
        ("experts", 64),
        ("top-k", 8),
        ("hidden", 1024),
        ("intermediate", 512),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    make_checkpoint(**vars(parser.parse_args()))
