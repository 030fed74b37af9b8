"""A runtime in plain torch, with the interface of comoe.runtime.runtime.Runtime that hf needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from comoe.hf.activations import activation_ref
from comoe.hf.blocks import MoEBlock
from comoe.hf.layouts import Expert
from comoe.runtime.spec import ExpertsSpec


def experts_ref(
    spec: ExpertsSpec,
    experts: list[Expert],
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    in_torch: bool = False,
) -> torch.Tensor:
    """[T, H], [T, K], [T, K] -> [T, H]. An index outside [0, E) counts as zero.

    in_torch: use the module's own activation even where it has a name.
    """
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
        x = torch.cat(x, dim=-1)
        if spec.activation is None or in_torch:
            x = spec.apply_gate(x)
        else:
            x = activation_ref(
                x, gated=spec.gated, activation=spec.activation, alpha=spec.alpha, limit=spec.limit
            )
        x = F.linear(x, expert.matrices[-1], biases[-1])
        if spec.post_norm is not None:
            x = spec.post_norm(x)
        x = x * top_k_weights[token, k, None]
        out.index_add_(0, token, x.to(out.dtype))
    return out


class ReferenceRuntime:
    """Takes the experts out of a model's blocks and computes them here."""

    def __init__(self, blocks: list[MoEBlock]) -> None:
        self.specs = [block.spec for block in blocks]
        self.experts = []
        self.calls: list[tuple[int, torch.Tensor]] = []
        for block in blocks:
            self.experts.append(
                [
                    Expert(tuple(m.clone() for m in e.matrices), tuple(b.clone() for b in e.biases))
                    for e in block.experts()
                ]
            )
            block.strip()

    def experts_forward(self, layer_idx, hidden, top_k_index, top_k_weights):
        self.calls.append((layer_idx, top_k_index))
        with torch.no_grad():
            return experts_ref(
                self.specs[layer_idx], self.experts[layer_idx], hidden, top_k_index, top_k_weights
            )
