"""A model's dense layers in fewer bits: its nn.Linear and its embedding become modules whose `weight` is
a record of comoe_kernels.coded_linear.

Routers stay as they are, since a rounded one chooses other experts; so do subclasses of nn.Linear and
nn.Embedding, whose arithmetic is their own, and what transformers keeps in float32.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from comoe.hf.blocks import MoEBlock, discover
from comoe.hf.checkpoint import meta_model
from comoe_kernels.coded_linear import (
    coded_embedding,
    coded_linear,
    coded_linear_bytes,
    encode_linear,
)

# A side shorter than this is not worth a record: one is padded to 16 rows and 128 columns of groups.
LEAST_SIDE = 64


def _empty_record(rows: int, cols: int, bits: int, device: torch.device) -> nn.Parameter:
    # int8, not uint8: some models cast activations to the type of a weight unless that is int8.
    record = torch.empty(coded_linear_bytes(rows, cols, bits), dtype=torch.int8, device=device)
    return nn.Parameter(record, requires_grad=False)


class CodedLinear(nn.Module):
    """nn.Linear over a record: `weight` int8 [coded_linear_bytes]."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits = bits
        self.weight = _empty_record(self.out_features, self.in_features, bits, torch.device("meta"))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return coded_linear(x, self.weight, self.bias, self.out_features, self.bits)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


class CodedEmbedding(nn.Module):
    """nn.Embedding over a record, with rows of `dtype`."""

    def __init__(self, embedding: nn.Embedding, bits: int) -> None:
        super().__init__()
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim
        self.bits, self.dtype = bits, embedding.weight.dtype
        self.weight = _empty_record(
            self.num_embeddings, self.embedding_dim, bits, torch.device("meta")
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows, cols = self.num_embeddings, self.embedding_dim
        return coded_embedding(ids, self.weight, rows, cols, self.bits, self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


CODED = (CodedLinear, CodedEmbedding)


def _kept(model: nn.Module) -> re.Pattern[str] | None:
    """Names of parameters that transformers keeps in float32."""
    patterns = [
        pattern
        for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for pattern in getattr(model, name, None) or ()
    ]
    return re.compile("|".join(patterns)) if patterns else None


def codable(model: nn.Module, blocks: Sequence[MoEBlock]) -> list[str]:
    """Names of the modules to be coded. Parameters that are tied are coded all or none."""
    kept = _kept(model)
    inside = tuple(f"{block.name}." for block in blocks)
    parents = {block.name.rpartition(".")[0]: block.spec.num_experts for block in blocks}

    def fits(name: str, module: nn.Module) -> bool:
        if type(module) not in (nn.Linear, nn.Embedding) or module.weight is None:
            return False
        if min(module.weight.shape) < LEAST_SIDE or (kept and kept.search(name)):
            return False
        if name.startswith(inside) or not module.weight.is_floating_point():
            return False
        if type(module) is nn.Embedding:
            # max_norm changes the weight; other small tables are positions and the like.
            return module.max_norm is None and module is model.get_input_embeddings()
        # A router: as many rows as experts, beside them.
        parent = next((p for p in parents if name.startswith(f"{p}.")), None)
        return parent is None or module.out_features != parents[parent]

    modules = dict(model.named_modules(remove_duplicate=False))
    names = {name for name, module in modules.items() if fits(name, module)}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[str, set[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, {source.rpartition(".")[0]}).add(target.rpartition(".")[0])
    embeddings = model.get_input_embeddings()
    for group in groups.values():
        # Other embeddings of the group (an encoder's, a decoder's) are one with the input's.
        if any(modules.get(name) is embeddings or name in names for name in group):
            plain = all(
                type(modules.get(name)) in (nn.Linear, nn.Embedding)
                and min(modules[name].weight.shape) >= LEAST_SIDE
                for name in group
            )
            names = names | group if plain else names - group
    return sorted(names)


def replace_dense(model: nn.Module, blocks: Sequence[MoEBlock], bits: int) -> list[str]:
    """Puts modules without weights (on the meta device) in place of those to be coded; returns their
    names. A module that appears twice is replaced by one."""
    new: dict[int, nn.Module] = {}
    names = codable(model, blocks)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        old = model.get_submodule(name)
        if id(old) not in new:
            kind = CodedLinear if type(old) is nn.Linear else CodedEmbedding
            new[id(old)] = kind(old, bits)
            new[id(old)].train(old.training)
            new[id(old)]._is_hf_initialized = True
        setattr(model.get_submodule(parent), leaf, new[id(old)])
    return names


def code_dense(model: nn.Module, blocks: Sequence[MoEBlock], bits: int) -> None:
    """Codes the dense layers of a model that is in memory, one at a time."""
    before = {name: model.get_submodule(name).weight for name in codable(model, blocks)}
    replace_dense(model, blocks, bits)
    coded: dict[nn.Parameter, nn.Parameter] = {}  # tied weights share a record
    while before:
        name, weight = before.popitem()
        if weight not in coded:
            coded[weight] = nn.Parameter(encode_linear(weight, bits), requires_grad=False)
        if not any(other is weight for other in before.values()):
            weight.data = torch.empty(0, dtype=weight.dtype)  # the original goes
        model.get_submodule(name).weight = coded[weight]


def coded_dense_bytes(config: PreTrainedConfig, bits: int) -> int:
    """Bytes of what is no expert of a model of this config, once its dense layers are coded."""
    model = meta_model(config)
    model.to(config.dtype or torch.bfloat16)
    blocks = discover(model)
    for block in blocks:
        block.strip()
    replace_dense(model, blocks, bits)
    model.tie_weights()
    return sum(p.nbytes for p in model.parameters())


class EncodeOnLoad:
    """What transformers calls with a weight that has been read, for a module that wants a record."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def convert(self, tensors: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        coded = {}
        for name, value in tensors.items():
            weight = value[0] if isinstance(value, list) else value
            coded[name] = encode_linear(weight, self.bits)
        return coded
