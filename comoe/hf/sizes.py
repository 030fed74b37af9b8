"""What of a transformers model's memory is not experts, read from the model and its config."""

from __future__ import annotations

from torch import nn

from comoe.runtime.budget import ModelSizes


def _value(config, name: str):
    """The field, or the list of its values where it varies by layer: such a field refuses plain reading."""
    try:
        return getattr(config, name, None)
    except Exception:
        layers = config.num_hidden_layers
        return [getattr(config.per_layer_config[i], name) for i in range(layers)]


def _attribute(config, *names: str, default: int = 0) -> int:
    """The first of `names` that the config has, as a number (the largest where it lists one per layer)."""
    for name in names:
        value = _value(config, name)
        if isinstance(value, (list, tuple)):
            value = max((v for v in value if isinstance(v, int)), default=None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default


def experts_per_token(model: nn.Module) -> int:
    """K, the most experts that one token uses in a layer."""
    config = model.config.get_text_config()
    names = (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_top_k",
        "moe_k",
        "top_k_experts",
    )
    inner = getattr(config, "ffn_config", config)  # DBRX
    return _attribute(config, *names, default=_attribute(inner, *names, default=2))


def model_sizes(model: nn.Module, experts_per_token: int, expert_intermediate: int) -> ModelSizes:
    """ModelSizes of a model whose experts are stripped.

    The KV cache is 2 * layers * KV heads * head size per position (twice that with cross-attention);
    activations are the residual stream, one attention block or one dense MLP, and the experts' rows.
    """
    config = model.config.get_text_config()
    element = next((p.element_size() for p in model.parameters()), 4)
    dense = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    hidden = _attribute(config, "hidden_size", "d_model", default=1024)
    layers = _attribute(config, "num_hidden_layers", "num_layers", "decoder_layers", default=1)
    heads = _attribute(
        config, "num_attention_heads", "num_heads", "decoder_attention_heads", "n_heads", default=8
    )
    head_dim = _attribute(config, "head_dim", "d_kv", default=max(hidden // max(heads, 1), 1))
    kv_heads = _attribute(config, "num_key_value_heads", default=heads)
    dense_intermediate = _attribute(
        config, "intermediate_size", "d_ff", "decoder_ffn_dim", default=4 * hidden
    )
    vocabulary = _attribute(config, "vocab_size", default=32_000)
    kv = 2 * layers * kv_heads * head_dim * element
    if getattr(model.config, "is_encoder_decoder", False):
        kv *= 2
    attention = 2 * (heads + kv_heads) * head_dim
    activations = element * (4 * hidden + max(attention, 3 * dense_intermediate)) + 8 * hidden
    eager = getattr(config, "_attn_implementation", None) == "eager"
    return ModelSizes(
        dense=dense,
        kv_per_token=kv,
        activations_per_token=activations,
        expert_rows_per_token=4 * experts_per_token * (hidden + expert_intermediate),
        logits_per_token=vocabulary * (element + 4),
        scores_per_pair=heads * (element + 4) if eager else 0,
    )
