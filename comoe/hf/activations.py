"""Names an expert's activation by evaluating it, so that no table of classes is needed.

A class's gate is any code it likes (`_apply_gate`). It is run on probe points and compared with the
activations that the kernels know; where none agrees, the activation stays in torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from comoe_kernels.expert_ffn import ACTIVATIONS, activate_ref

Gate = Callable[[torch.Tensor], torch.Tensor]


def named_gate(activation: str, *, gated: bool, alpha: float = 0.0, limit: float = 0.0) -> Gate:
    """The kernels' activation as a function [S, 2 * I] (gate beside up) or, ungated, [S, I] -> [S, I]."""

    def apply(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1) if gated else (None, x)
        return activate_ref(gate, up, activation, alpha, limit)

    return apply


def _probe(gated: bool) -> torch.Tensor:
    # Fine steps where activations curve, and magnitudes to 1e6 that reveal any clamp.
    # Device and type are said because models are built under other defaults (meta, bf16).
    here = {"device": "cpu", "dtype": torch.float32}
    fine = torch.linspace(-12, 12, 97, **here)
    wide = torch.logspace(1.2, 6, 25, **here)
    points = torch.cat([fine, wide, -wide])
    if not gated:
        return points[None]
    gate, up = torch.meshgrid(points, points, indexing="ij")
    return torch.cat([gate.reshape(1, -1), up.reshape(1, -1)], dim=-1)


def _agree(got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor) -> bool:
    # 2e-6 of the inputs' size is a few roundings of fp32 (1 + erf loses that much in gelu's tail);
    # gelu and its tanh form differ by 1e-4 and more.
    return bool((torch.isfinite(got) & ((got - want).abs() <= 2e-6 * (want.abs() + scale))).all())


def match_activation(
    apply_gate: Gate, *, gated: bool, numbers: tuple[float, ...] = ()
) -> tuple[str | None, float, float]:
    """(name, alpha, limit) of `apply_gate`, or (None, 0, 0) if the kernels do not know it.

    `numbers`: constants of the module, tried as alpha and limit of swigluoai.
    """
    x = _probe(gated)
    try:
        with torch.no_grad():
            got = apply_gate(x).float()
    except Exception:
        # Any code may be here; what is not a plain function of its input stays in torch.
        return None, 0.0, 0.0
    if got.device.type == "meta" or got.numel() != x.numel() // (2 if gated else 1):
        return None, 0.0, 0.0
    candidates = [(name, 0.0, 0.0) for name in ACTIVATIONS if name != "swigluoai"]
    if gated:
        pairs = itertools.product(numbers, repeat=2)
        candidates += [("swigluoai", alpha, limit) for alpha, limit in pairs]
    scale = x.abs().clamp(min=1)
    if gated:
        scale = scale.chunk(2, dim=-1)[0] * scale.chunk(2, dim=-1)[1]
    for name, alpha, limit in candidates:
        if _agree(got, named_gate(name, gated=gated, alpha=alpha, limit=limit)(x), scale):
            return name, alpha, limit
    return None, 0.0, 0.0
