"""Predicts the next MoE layer's experts by giving its router the present layer's hidden state.

Residual streams change little from one layer to the next, so the next gate already chooses nearly the
same experts (HOBBIT: 96% of top-1). Only the gate's weight is used, and its correction bias where there
is one; what else a family's router does (groups, noise, norms) moves the guess, never the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from comoe.hf.blocks import MoEBlock

Owner = tuple[nn.Module, str]  # a parameter or buffer, found anew at each call: models may be moved


@dataclass(frozen=True)
class Gate:
    """A linear router: weight [E, H], and a bias [E] that only chooses (added to the scores)."""

    weight: Owner
    bias: Owner | None = None  # of the linear layer
    correction: Owner | None = None  # added to sigmoid scores (DeepSeek-V3 and its kin)

    @torch.no_grad()
    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, H] -> [T, E], in the order of preference of the router."""
        weight = getattr(*self.weight)
        bias = None if self.bias is None else getattr(*self.bias)
        logits = F.linear(hidden.to(weight.dtype), weight, bias)
        if self.correction is None:
            return logits
        return logits.float().sigmoid() + getattr(*self.correction).float()


def find_gate(model: nn.Module, block: MoEBlock) -> Gate | None:
    """The router beside an experts module; None if there is not exactly one linear candidate."""
    parent = model.get_submodule(block.name.rpartition(".")[0])
    spec = block.spec
    skip = {id(m) for m in block.module.modules()}
    weights: list[Owner] = []
    vectors: dict[str, Owner] = {}
    for module in parent.modules():
        if id(module) in skip:
            continue
        tensors = {**module._parameters, **module._buffers}
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.dim() == 2 and tensor.shape == (spec.num_experts, spec.hidden):
                weights.append((module, name))
            elif tensor.shape == (spec.num_experts,):
                vectors[name] = (module, name)
    if len(weights) != 1:
        return None
    bias = vectors.get("bias")
    if bias is not None and bias[0] is not weights[0][0]:
        bias = None
    return Gate(weights[0], bias, vectors.get("e_score_correction_bias"))


class NextGate:
    """A comoe.policy.predictor.Predictor: layer i's hidden state through layer i + 1's gate."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[MoEBlock], experts_per_token: int
    ) -> None:
        self._k = experts_per_token
        self._gates: list[Gate | None] = []
        for before, block in itertools.pairwise(blocks):
            # An encoder's last layer says nothing of the decoder's first: other tokens.
            same_stack = _stack(before.name) == _stack(block.name)
            same_width = before.spec.hidden == block.spec.hidden
            self._gates.append(find_gate(model, block) if same_stack and same_width else None)
        self._gates.append(None)

    def predict(self, layer_idx: int, hidden: torch.Tensor) -> list[tuple[int, np.ndarray]]:
        """Likely experts of the next layer, most wanted first; [] where the router is not understood."""
        gate = self._gates[layer_idx]
        if gate is None or hidden.shape[0] == 0:
            return []
        scores = gate.scores(hidden)
        chosen = scores.topk(min(self._k, scores.shape[-1]), dim=-1).indices
        experts, counts = chosen.unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        return [(layer_idx + 1, experts[order].cpu().numpy().astype(np.int64))]


def _stack(name: str) -> str:
    """The part of a module's path before its layer number: "model.layers.3.mlp" -> "model.layers"."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:number])
