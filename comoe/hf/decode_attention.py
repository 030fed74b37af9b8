"""Attention of compiled decode steps: comoe_kernels.attend in place of torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from comoe_kernels.attend import attend

IMPLEMENTATION = "comoe"
# Arguments that change what torch's attention does with one new token; the mask tells the rest.
CHANGING = ("position_bias", "cache", "softcap", "output_attentions")


def decode_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' AttentionInterface calls; query [B, heads, T, D], result [B, T, heads, D]."""
    plain = (
        torch.compiler.is_compiling()
        and query.shape[2] == 1
        and query.device.type == "cpu"
        and not dropout
        and key.shape == value.shape
        and key.shape[3] == query.shape[3]
        and all(kwargs.get(name) in (None, False) for name in CHANGING)
    )
    if attention_mask is not None:
        plain = plain and attention_mask.dtype == torch.bool and attention_mask.shape[1:3] == (1, 1)
    if not plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


def use_decode_attention(model: nn.Module) -> None:
    """Where a model uses torch's attention; others keep theirs."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, decode_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    for config in {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config")
    }.values():
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = IMPLEMENTATION
