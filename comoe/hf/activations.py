"""Names an expert's activation by evaluating it, so that no table of classes is needed.

A class's gate is any code it likes (`_apply_gate`). It is run on probe points and compared with the
activations that the kernels know; where none agrees, the activation stays in torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F

# Names are those of csrc/cpu/expert_ffn.h.
PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}

Gate = Callable[[torch.Tensor], torch.Tensor]


def swigluoai(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def activation_ref(
    x: torch.Tensor, *, gated: bool, activation: str, alpha: float = 0.0, limit: float = 0.0
) -> torch.Tensor:
    """x [S, 2 * I] (gate beside up) or, ungated, [S, I] -> [S, I]."""
    if not gated:
        return PLAIN[activation](x)
    gate, up = x.chunk(2, dim=-1)
    if activation == "swigluoai":
        return swigluoai(gate, up, alpha, limit)
    return PLAIN[activation](gate) * up


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


def _agree(got: torch.Tensor, want: torch.Tensor) -> bool:
    # 2e-6 of the value is a few roundings of fp32; gelu and its tanh form differ by 1e-4 and more.
    return bool(torch.isfinite(got).all()) and torch.allclose(got, want, rtol=2e-6, atol=2e-6)


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
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None, 0.0, 0.0  # not a plain function of its input (e.g. parameters on meta)
    if got.device.type == "meta" or got.numel() != x.numel() // (2 if gated else 1):
        return None, 0.0, 0.0
    for name in PLAIN:
        if _agree(got, activation_ref(x, gated=gated, activation=name)):
            return name, 0.0, 0.0
    if gated:
        for alpha, limit in itertools.product(numbers, repeat=2):
            want = activation_ref(x, gated=True, activation="swigluoai", alpha=alpha, limit=limit)
            if _agree(got, want):
                return "swigluoai", alpha, limit
    return None, 0.0, 0.0
