"""A runtime in plain torch, with the interface of comoe.runtime.runtime.Runtime that hf needs."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from comoe.hf.activations import named_gate
from comoe.hf.blocks import MoEBlock
from comoe.hf.layouts import Expert
from comoe.runtime.spec import ExpertsSpec
from comoe.store import Store
from comoe_kernels.unpack import paged_expert, unpack, unpack_bias


def experts_ref(
    spec: ExpertsSpec,
    experts: list[Expert],
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """[T, H], [T, K], [T, K] -> [T, H]. An index outside [0, E) counts as zero."""
    gate = spec.apply_gate
    if spec.activation is not None:
        gate = named_gate(spec.activation, gated=spec.gated, alpha=spec.alpha, limit=spec.limit)
    out = torch.zeros_like(hidden)
    for e, expert in enumerate(experts):
        token, k = torch.where(top_k_index == e)
        if token.numel() == 0:
            continue
        biases = expert.biases or (None,) * len(expert.matrices)
        x = [
            F.linear(hidden[token].to(m.dtype), m, b)
            for m, b in zip(expert.matrices[:-1], biases, strict=False)
        ]
        x = gate(torch.cat(x, dim=-1))
        x = F.linear(x, expert.matrices[-1], biases[-1])
        if spec.post_norm is not None:
            x = spec.post_norm(x)
        x = x * top_k_weights[token, k, None]
        out.index_add_(0, token, x.to(out.dtype))
    return out


class ReferenceRuntime:
    def __init__(self, specs: list[ExpertsSpec], experts: list[list[Expert]]) -> None:
        self.specs, self.experts = specs, experts
        self.calls: list[tuple[int, torch.Tensor]] = []

    @classmethod
    def of_blocks(cls, blocks: list[MoEBlock]) -> ReferenceRuntime:
        """Takes the experts out of a model's blocks."""
        experts = []
        for block in blocks:
            copies = [
                Expert(tuple(m.clone() for m in e.matrices), tuple(b.clone() for b in e.biases))
                for e in block.experts()
            ]
            experts.append(copies)
            block.strip()
        return cls([block.spec for block in blocks], experts)

    @classmethod
    def of_store(
        cls, blocks: list[MoEBlock], store: Store, dtype: torch.dtype | None = None
    ) -> ReferenceRuntime:
        """Reads the exact records of a store. dtype: what codes are decoded to."""
        specs = [block.spec for block in blocks]
        return cls(specs, [_read_layer(store, i, dtype) for i in range(len(specs))])

    @torch.no_grad()
    def experts_forward(self, layer_idx, hidden, top_k_index, top_k_weights):
        self.calls.append((layer_idx, top_k_index))
        return experts_ref(
            self.specs[layer_idx], self.experts[layer_idx], hidden, top_k_index, top_k_weights
        )


def _read_layer(store: Store, layer_idx: int, dtype: torch.dtype | None) -> list[Expert]:
    layer = store.layers[layer_idx]
    exact_dtype = getattr(torch, layer.exact_dtype, layer.exact_dtype)
    dtype = dtype or exact_dtype
    shape = layer.hidden, layer.intermediate
    num_matrices = 3 if layer.gated else 2
    experts = []
    for e in range(layer.num_experts):
        payloads = {r: np.frombuffer(store.payload(layer_idx, e, r), np.uint8) for r in (0, 4)}
        paged = paged_expert(
            *shape,
            gated=layer.gated,
            biased=layer.biased,
            exact_dtype=exact_dtype,
            level=4,
            payloads=payloads,
        )
        matrices = tuple(unpack(paged, m, dtype) for m in range(num_matrices))
        biases = ()
        if layer.biased:
            biases = tuple(unpack_bias(paged, m).to(dtype) for m in range(num_matrices))
        experts.append(Expert(matrices, biases))
    return experts
