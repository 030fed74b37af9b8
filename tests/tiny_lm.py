"""A tokenizer and small random language models that tests make on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 257  # one token per byte, and one that ends a text


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that any text can be written and read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{symbol: i + 1 for i, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def qwen3_moe(seed: int = 0, **changes) -> Qwen3MoeForCausalLM:
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "eos_token_id": 0,
        "pad_token_id": 0,
        # Large enough that predictions differ from token to token.
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(options | changes))).eval()


def granite_moe(seed: int = 0) -> GraniteMoeForCausalLM:
    """Divides its logits by 3, which an evaluation must not forget."""
    torch.manual_seed(seed)
    config = GraniteMoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        logits_scaling=3.0,
        initializer_range=0.2,
    )
    return GraniteMoeForCausalLM(config).eval()


def save_qwen3_moe(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes
) -> Path:
    """A checkpoint folder with model and tokenizer."""
    qwen3_moe(seed, **changes).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
