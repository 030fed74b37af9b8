"""Tiny random models of every MoE family that the installed transformers has.

Families are found by reading transformers' modeling files, not from a list; a model is made small by
rules on the names of configuration fields. What the rules cannot do is in SPECIAL.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

MODELS = Path(transformers.__file__).parent / "models"
# A class of experts: decorated, or named like one.
EXPERTS = re.compile(
    r"^@use_experts_implementation|^class \w*Experts\w*\(nn\.|^class \w*(?:SparseMLP|MoE|Moe)\(nn\.",
    re.M,
)

# Field name -> small value; only fields that the configuration has are set.
SMALL = {
    "vocab_size": 131,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "intermediate_size": 80,
    "ffn_hidden_size": 80,
    "d_ff": 80,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "moe_intermediate_size": 40,
    "moe_ffn_hidden_size": 40,
    "expert_ffn_hidden_size": 40,
    "expert_ffn_size": 40,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "num_hidden_layers": 4,
    "n_layers": 3,
    "num_layers": 4,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "num_decoder_layers": 4,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "kv_channels": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "num_experts_per_token": 3,
    "moe_top_k": 3,
    "moe_topk": 3,
    "moe_k": 3,
    "top_k_experts": 3,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "expert_capacity": 64,
    "max_position_embeddings": 256,
    "max_seq_len": 256,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "mamba_d_state": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "ssm_state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "vocab_size_per_layer_input": 131,
    "hidden_size_per_layer_input": 16,
}

# Set even where the default is None.
ALWAYS = {
    "num_experts",
    "num_experts_per_tok",
    "n_routed_experts",
    "top_k_experts",
    "moe_intermediate_size",
}

# Family -> fields that the rules above get wrong; "class" names the model where the text path alone
# is tested (building the whole of some multimodal families is no test of experts).
SPECIAL: dict[str, dict] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_ocr2": {
        "class": "DeepseekOcr2TextModel",
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "head_dim": 16,
    },
    "diffusion_gemma": {"class": "DiffusionGemmaEncoderTextModel", "global_head_dim": 16},
    "dots3_note": {
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 2,
    },
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe": {
        "class": "Ernie4_5_VLMoeForConditionalGeneration",
        "text_config": {
            "moe_intermediate_size": [40, 24],
            "head_dim": 128,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
        "vision_config": {"depth": 2},
    },
    "gemma4": {"enable_moe_block": True, "global_head_dim": 16},
    "glm4v_moe": {"text_config": {"head_dim": 128}, "vision_config": {"depth": 2}},
    "glm5_next": {
        "class": "Glm5NextTextModel",
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "index_topk": 16,
        "index_kpool": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    },
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "muse_spark": {"class": "MuseSparkTextModel", "moe_hidden_size": 48},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "n_groups": 2,
    },
    "qwen3_omni_moe": {"class": "Qwen3OmniMoeThinkerTextModel", "head_dim": 16},
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "step3p7": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "sliding_window": 16,
            "swiglu_limits": [None, 0.5, None, 0.7],
        },
        "vision_config": {"num_hidden_layers": 2},
    },
    "switch_transformers": {"decoder_start_token_id": 0},
    "vitpose_backbone": {"class": "VitPoseBackbone", "num_experts": 4, "part_features": 16},
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """Folders of transformers/models whose modeling code holds a class of experts."""
    return sorted(
        path.parent.name
        for path in MODELS.glob("*/modeling_*.py")
        if EXPERTS.search(path.read_text())
    )


def _get(config: PreTrainedConfig, name: str):
    """Some fields refuse to be read where they vary by layer."""
    return vars(config).get(name, getattr(type(config), name, None))


def _small(config_class: type[PreTrainedConfig], special: dict) -> dict:
    default = config_class()
    out = {}
    for name, value in SMALL.items():
        exists = name in vars(default) or hasattr(type(default), name)
        if exists and (name in ALWAYS or _get(default, name) is not None):
            out[name] = value
    if hasattr(default, "qk_rope_head_dim"):
        # Latent attention: head_dim is what rotary embeddings turn, and every head has its own key.
        out["num_key_value_heads"] = out["num_attention_heads"]
        if hasattr(default, "head_dim"):
            out["head_dim"] = out["qk_rope_head_dim"]
    for name in getattr(config_class, "sub_configs", None) or {}:
        current = _get(default, name)
        if isinstance(current, PreTrainedConfig):
            out[name] = _small(type(current), special.get(name, {}))
    for name, value in special.items():
        if name != "class" and name not in (config_class.sub_configs or {}):
            out[name] = value
    return out


def small_config(family: str, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    return config_class(**_small(config_class, SPECIAL.get(family, {})))


SUFFIXES = ("ForCausalLM", "ForConditionalGeneration", "TextModel", "Model")


@functools.cache
def model_class(family: str) -> type[PreTrainedModel] | None:
    """The family's text generator, or its plain model where it has none."""
    found: list[type[PreTrainedModel]] = []
    for path in sorted((MODELS / family).glob("modeling_*.py")):
        module = importlib.import_module(f"transformers.models.{family}.{path.stem}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__:
                found.append(cls)
    named = SPECIAL.get(family, {}).get("class")
    for suffix in (named,) if named else SUFFIXES:
        for cls in found:
            if cls.__name__.endswith(suffix) and cls.config_class is not None:
                return cls
    return None


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A tiny model on transformers' own eager experts, the same weights for the same seed."""
    cls = model_class(family)
    config = small_config(family, cls.config_class)
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained does it
    try:
        model = cls(config).eval()
    finally:
        torch.set_default_dtype(before)
    spread(model)
    keep = set(model._keep_in_fp32_modules_strict or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and any(part in name for part in keep):
            tensor.data = tensor.data.float()
    return model


def build_meta(family: str) -> PreTrainedModel:
    cls = model_class(family)
    with torch.device("meta"):
        return cls(small_config(family, cls.config_class))


@torch.no_grad()
def spread(model: PreTrainedModel) -> None:
    """Weights as large as a trained model's (transformers starts near zero, where every activation
    looks linear and the experts do not matter), and no two alike."""
    for _, parameter in sorted(model.named_parameters()):
        if parameter.dim() >= 2:
            fan_in = parameter.shape[-1]
            parameter.normal_(0, 1.0 / fan_in**0.5)
        elif parameter.numel() and parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter) * 0.1)
