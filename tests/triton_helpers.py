"""Coded matrices in pages, for tests of Triton kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from comoe import _C
from comoe_kernels.coded_matrix import NUM_PLANES, CodedMatrix
from comoe_kernels.ladder_codec import Shape, decode_ref

BF16 = 1
LEVEL_OF_BITS = {2: 0, 3: 1, 4: 2, 8: 3}


@triton.jit
def _count(out, n):
    total = 0
    for i in range(0, tl.minimum(n, 3)):
        total += i
    tl.store(out, total)


def _why_not_interpreted() -> str | None:
    """Triton 3.6 reads bounds of loops as numpy 2.4 no longer allows; its compiler is not concerned."""
    if not triton.knobs.runtime.interpret:
        return None
    out = torch.zeros(1, dtype=torch.int32)
    try:
        _count[(1,)](out, 2)
    except Exception as error:
        versions = f"triton {triton.__version__} with numpy {np.__version__}"
        return f"the interpreter of {versions} runs no loops: {error}"
    assert out.item() == 1
    return None


_reason = _why_not_interpreted()
runs_kernels = pytest.mark.skipif(_reason is not None, reason=_reason or "")


def bf16_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()


def coded_matrices(rng, num, rows, cols, bits, page_bytes=4096, down=False):
    """(CodedMatrix, dense [fp32 [rows, cols]] * num, arena): random weights, pages in random order.

    down: the matrix is the last of its expert, so that its blocks do not begin its records.
    """
    hidden, inter = (rows, cols) if down else (cols, rows)
    shape = Shape(hidden, inter, gated=False)
    m, planes = int(down), NUM_PLANES[bits]
    payloads, dense = [], []
    for _ in range(num):
        matrices = [
            bf16_bits(rng.standard_normal(s).astype(np.float32) * rng.uniform(0.5, 2))
            for s in shape.matrices
        ]
        sizes = [shape.record_bytes(r) for r in range(5)]
        buffers = [np.zeros(n, np.uint8) for n in sizes]
        _C.encode_expert(matrices, [], BF16, False, buffers)
        payloads.append(buffers[:planes])
        dense.append(torch.from_numpy(decode_ref(shape, buffers, LEVEL_OF_BITS[bits], m)))
    counts = [-(-len(p) // page_bytes) for p in payloads[0]]
    total = num * sum(counts)
    arena = torch.full(((total + 1) * page_bytes,), 0xFF, dtype=torch.uint8)
    base = -arena.data_ptr() % 64
    slots = iter(rng.permutation(total))
    pages = torch.zeros(num, planes, max(counts), dtype=torch.int64)
    for s, buffers in enumerate(payloads):
        for p, payload in enumerate(buffers):
            for n in range(counts[p]):
                at = base + int(next(slots)) * page_bytes
                piece = torch.from_numpy(payload[n * page_bytes : (n + 1) * page_bytes])
                arena[at : at + piece.numel()] = piece
                pages[s, p, n] = arena.data_ptr() + at
    return CodedMatrix.of_expert(shape, m, bits, pages, page_bytes), dense, arena


def error(got, want) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())
