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


# In config.layer_types: layers whose cache does not grow with the context, or only up to a window.
CONSTANT = ("linear", "mamba", "conv", "recurrent", "moe", "mlp")
WINDOWED = ("sliding", "chunked")


def _layer_kinds(config, layers: int) -> tuple[int, int]:
    """(layers that cache every position, layers that cache the last ones)."""
    kinds = getattr(config, "layer_types", None)
    if not isinstance(kinds, (list, tuple)) or not all(isinstance(kind, str) for kind in kinds):
        return layers, 0
    windowed = sum(any(word in kind for word in WINDOWED) for kind in kinds)
    constant = sum(any(word in kind for word in CONSTANT) for kind in kinds)
    return len(kinds) - windowed - constant, windowed


def model_sizes(model: nn.Module, experts_per_token: int, expert_intermediate: int) -> ModelSizes:
    """ModelSizes of a model whose experts are stripped.

    The KV cache is 2 * KV heads * head size per layer and position (twice that with cross-attention);
    activations are the residual stream, one attention block or one dense MLP, and the experts' rows.
    """
    config = model.config.get_text_config()
    # Of what is computed in: records of coded layers are integers.
    element = next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)
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
    kv_layer = 2 * kv_heads * head_dim * element
    if getattr(model.config, "is_encoder_decoder", False):
        kv_layer *= 2
    full, windowed = _layer_kinds(config, layers)
    attention = 2 * (heads + kv_heads) * head_dim
    activations = element * (4 * hidden + max(attention, 3 * dense_intermediate)) + 8 * hidden
    eager = getattr(config, "_attn_implementation", None) == "eager"
    return ModelSizes(
        dense=dense,
        kv_per_token=full * kv_layer,
        kv_windowed=windowed * kv_layer,
        window=_attribute(config, "sliding_window", "attention_chunk_size") if windowed else 0,
        kv_layer=kv_layer,
        activations_per_token=activations,
        expert_rows_per_token=4 * experts_per_token * (hidden + expert_intermediate),
        logits_per_token=vocabulary * (element + 4),
        # scores, scaled or masked ones, and the softmax of them, in and out, in float32
        scores_per_pair=heads * (2 * element + 8) if eager else 0,
        # a bool mask, one that it is made from, and what attention adds to the scores
        mask_per_pair=2 + element,
        repeat_per_position=2 * heads * head_dim * element if heads != kv_heads else 0,
    )
