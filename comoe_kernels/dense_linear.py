"""A dense layer with its weights as they are in the model, for a few rows, on the CPU.

    y = x @ W.T + bias

    x [T, cols] float32, bfloat16 or float16;  W [rows, cols], bias [rows] of one of these types;  y [T, rows] like x

Bytes moved: W once per row of x. In float32 throughout. torch's own product of one bfloat16 row reads W at
well under half of the memory's bandwidth (bench/bench_dense.py), and starts its OpenMP threads for it, which
then spin beside the experts' kernels. Known to torch.compile as torch.ops.comoe.dense_linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from comoe import _C
from comoe_kernels.unpack import DTYPES

MOST_ROWS = 4  # of x; more are a product for torch


def dense_linear_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """In float32."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def dense_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y [T, rows]; see the head of this file."""
    return torch.ops.comoe.dense_linear(x, weight, bias)


def _dense_linear_cpu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"dense_linear: expected x [T, cols] and weight [rows, cols], got {list(x.shape)} and "
            f"{list(weight.shape)}"
        )
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        raise ValueError(
            f"dense_linear: expected float32, bfloat16 or float16, got {x.dtype} and {weight.dtype}"
        )
    if bias is not None and (bias.dtype != weight.dtype or bias.shape != (len(weight),)):
        raise ValueError(
            f"dense_linear: bias: expected {weight.dtype} [{len(weight)}], got {bias.dtype} {list(bias.shape)}"
        )
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight.contiguous()
    out = x.new_empty((len(x), len(weight)))
    _C.dense_linear(
        weight.data_ptr(),
        DTYPES[weight.dtype],
        len(weight),
        weight.shape[1],
        x.data_ptr(),
        DTYPES[x.dtype],
        len(x),
        x.stride(0),
        0 if bias is None else bias.contiguous().data_ptr(),
        out.data_ptr(),
    )
    return out


_LIBRARY = torch.library.Library("comoe", "FRAGMENT")
_LIBRARY.define("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("dense_linear", _dense_linear_cpu, "CPU")


@torch.library.register_fake("comoe::dense_linear", lib=_LIBRARY)
def _(x, weight, bias):
    return x.new_empty((x.shape[0], weight.shape[0]))
