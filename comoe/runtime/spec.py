"""What the runtime must know of one layer's experts, and nothing about where it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ExpertsSpec:
    """Shape and arithmetic of every expert of one MoE layer.

    Matrices in canonical orientation: gate [I, H], up [I, H], down [H, I]; `gated=False` has no gate.
    """

    name: str  # path of the experts module in the model, e.g. "model.layers.0.mlp.experts"
    num_experts: int
    hidden: int
    intermediate: int
    gated: bool = True
    biased: bool = False
    activation: str | None = "silu"  # a name the kernels know; None: `apply_gate` runs in torch
    alpha: float = 0.0  # of swigluoai
    limit: float = 0.0
    # [S, 2 * I] (gate beside up) -> [S, I]; ungated: [S, I] -> [S, I]
    apply_gate: Callable[[torch.Tensor], torch.Tensor] | None = None
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None = None  # [S, H] -> [S, H], per pair

    @property
    def runs_in_torch(self) -> bool:
        """True where the fused kernel cannot compute these experts."""
        return self.activation is None or self.post_norm is not None
