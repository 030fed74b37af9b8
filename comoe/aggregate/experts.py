"""Exact experts of a packed folder as dense float32 matrices, and their arithmetic in torch.

Matrices are in canonical orientation: gate [I, H], up [I, H], down [H, I]; without a gate: up, down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from comoe.aggregate.errors import AggregateError
from comoe.runtime.spec import ExpertsSpec
from comoe.store import Store
from comoe_kernels.expert_ffn import activate_ref
from comoe_kernels.unpack import paged_expert, unpack, unpack_bias

EXACT = 4  # the level of the kernels that holds the source's own bits
Matrices = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Expert:
    """One expert, float32."""

    matrices: Matrices  # [gate,] up, down
    biases: Matrices = ()  # the same order, or empty


def intermediate(x: torch.Tensor, expert: Expert, spec: ExpertsSpec) -> torch.Tensor:
    """What the down projection reads: x [S, H] -> [S, I], float32."""
    biases = expert.biases or (None,) * len(expert.matrices)
    parts = [F.linear(x, w, b) for w, b in zip(expert.matrices[:-1], biases[:-1], strict=True)]
    return activate(parts, spec)


def activate(parts: Sequence[torch.Tensor], spec: ExpertsSpec) -> torch.Tensor:
    """[gate and] up projections, [S, I] each, through the activation: [S, I]."""
    if spec.activation is None:
        return spec.apply_gate(torch.cat(parts, dim=-1))
    gate = parts[0] if spec.gated else None
    return activate_ref(gate, parts[-1], spec.activation, spec.alpha, spec.limit)


def expert_forward(x: torch.Tensor, expert: Expert, spec: ExpertsSpec) -> torch.Tensor:
    """The expert's output before the router's weight: x [S, H] -> [S, H], float32 throughout."""
    bias = expert.biases[-1] if expert.biases else None
    out = F.linear(intermediate(x, expert, spec), expert.matrices[-1], bias)
    return out if spec.post_norm is None else spec.post_norm(out)


class ExpertWeights:
    """The exact experts of a packed folder, read one at a time."""

    def __init__(self, store: Store, specs: Sequence[ExpertsSpec]) -> None:
        self.store, self.specs = store, tuple(specs)

    @classmethod
    def open(
        cls, folder: str | Path, specs: Sequence[ExpertsSpec] | None = None, *, verify: bool = True
    ) -> ExpertWeights:
        """specs: of the loaded model (`model.comoe.specs`); None: from the folder's config, which does for
        all models but those whose experts' output passes a norm with weights of its own."""
        store = Store.open(folder, verify=verify)
        if specs is None:
            specs = _specs_of(Path(folder))
        have = [(layer.name, layer.num_experts) for layer in store.layers]
        want = [(spec.name, spec.num_experts) for spec in specs]
        if have != want:
            raise AggregateError(
                f"{folder}: the expert store has layers {have}, the model {want}; pack the checkpoint again"
            )
        return cls(store, specs)

    @property
    def num_layers(self) -> int:
        return len(self.specs)

    @property
    def fingerprint(self) -> str:
        """Of the checkpoint that was packed."""
        return str(self.store.manifest.extra.get("fingerprint", ""))

    def dtype(self, layer: int) -> torch.dtype:
        """The checkpoint's own type of a layer's experts."""
        return getattr(torch, self.store.layers[layer].exact_dtype)

    def expert(self, layer: int, expert: int) -> Expert:
        """One expert from its exact record; finite, since packing refuses others."""
        info = self.store.layers[layer]
        payload = np.frombuffer(self.store.payload(layer, expert, EXACT), np.uint8)
        paged = paged_expert(
            info.hidden,
            info.intermediate,
            gated=info.gated,
            biased=info.biased,
            exact_dtype=self.dtype(layer),
            level=EXACT,
            payloads={EXACT: payload},
        )
        count = range(3 if info.gated else 2)
        return Expert(
            tuple(unpack(paged, m, torch.float32) for m in count),
            tuple(unpack_bias(paged, m) for m in count) if info.biased else (),
        )

    def layer(self, layer: int) -> list[Expert]:
        """All experts of one layer: 4 bytes per weight."""
        return [self.expert(layer, e) for e in range(self.specs[layer].num_experts)]


def rounded(expert: Expert, dtype: torch.dtype) -> Expert:
    """The expert as a checkpoint of `dtype` would keep it."""
    return replace(
        expert,
        matrices=tuple(m.to(dtype).float() for m in expert.matrices),
        biases=tuple(b.to(dtype).float() for b in expert.biases),
    )


def _specs_of(folder: Path) -> list[ExpertsSpec]:
    from comoe.hf.blocks import discover
    from comoe.hf.checkpoint import meta_model, read_config

    specs = [block.spec for block in discover(meta_model(read_config(folder)))]
    for spec in specs:
        if spec.post_norm is not None:
            raise AggregateError(
                f"{folder}: the experts of {spec.name} end in a norm, whose weights are in the model; give "
                "specs=model.comoe.specs of the loaded model"
            )
    return specs
