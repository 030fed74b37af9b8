"""Attention of one new token per sequence over its KV cache, on the CPU.

    y[b, h] = sum over l with mask[b, l] of softmax_l(scale * q[b, h] . k[b, g, l]) * v[b, g, l],  g = h // (heads // kv_heads)

    q [B, heads, 1, D];  k, v [B, kv_heads, L, D];  mask bool [B or 1, 1, 1, L] or None (all);  y [B, heads, 1, D]
    float32, bfloat16 or float16, all alike; the last dimension contiguous

Bytes moved: keys and values of the positions that count, once; torch's own kernel reads the whole length of
a static cache, after a copy of it for every query head. In float32 throughout. A sequence without any
position gives zeros. Known to torch.compile as torch.ops.comoe.attend.
"""

from __future__ import annotations

import torch

from comoe import _C
from comoe_kernels.unpack import DTYPES


def attend_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """In float32."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(group, dim=1) for t in (k, v))
    scores = scale * q.float() @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """y [B, heads, 1, D]; see the head of this file."""
    return torch.ops.comoe.attend(q, k, v, mask, scale)


def _attend_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    batch, heads, _, size = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != size or q.shape[2] != 1:
        raise ValueError(
            "attend: expected q [B, heads, 1, D] and k, v [B, kv_heads, L, D], got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"attend: expected one of float32, bfloat16, float16 for all, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    positions = k.shape[2]
    if mask is not None and (
        mask.dtype != torch.bool
        or mask.shape[0] not in (1, batch)
        or mask.shape[1:] != (1, 1, positions)
    ):
        raise ValueError(
            f"attend: mask: expected bool [{batch}, 1, 1, {positions}], got {mask.dtype} {list(mask.shape)}"
        )
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    mask_stride = 0
    if mask is not None:
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        mask_stride = mask.stride(0) if mask.shape[0] > 1 else 0
    out = torch.empty((batch, heads, 1, size), dtype=q.dtype)
    _C.attend(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        out.data_ptr(),
        DTYPES[q.dtype],
        (batch, heads, k.shape[1], positions, size),
        (*q.stride()[:2], *k.stride()[:3], *v.stride()[:3], mask_stride),
        scale,
    )
    return out


_LIBRARY = torch.library.Library("comoe", "FRAGMENT")
_LIBRARY.define("attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")
_LIBRARY.impl("attend", _attend_cpu, "CPU")


@torch.library.register_fake("comoe::attend", lib=_LIBRARY)
def _(q, k, v, mask, scale):
    return q.new_empty(q.shape)
