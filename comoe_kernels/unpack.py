"""Expert weights from the ladder's packed planes to dense row-major matrices.

    W[r, c] = scale[r, c // 128] * (value(code[r, c]) - zero[r, c // 128])      2, 3, 4, 8 bits
    W[r, c] = the source's own bits, or code * scale where it has codes         exact

    expert   _C.PagedExpert: H, I, level and the pages of its records (csrc/ladder/layout.h)
    matrix   0 gate [I, H], 1 up [I, H], 2 down [H, I]; ungated: 0 up, 1 down
    out      [rows, cols] float32, bfloat16 or float16, columns contiguous; rounded to nearest even

Bytes moved: `unpack_bytes` reads packed planes and writes dense weights. Runs on the CPU in the
threads of comoe_kernels.threads; returns when done; releases the GIL.
"""

from __future__ import annotations

import numpy as np
import torch

from comoe import _C
from comoe_kernels.ladder_codec import EXACT_BITS

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# What exact records hold: elements, or codes with scales (ladder_codec.py), named as the store does.
EXACT_DTYPES = {**DTYPES, torch.float8_e4m3fn: 3, "mxfp4": 4}
LEVELS = ("bits2", "bits3", "bits4", "bits8", "exact")
BITS = (2, 3, 4, 8)


def matrix_shape(expert: _C.PagedExpert, matrix: int) -> tuple[int, int]:
    if not 0 <= matrix < expert.num_matrices:
        raise ValueError(f"unpack: matrix: expected 0..{expert.num_matrices - 1}, got {matrix}")
    down = matrix == expert.num_matrices - 1
    return (expert.hidden, expert.intermediate) if down else (expert.intermediate, expert.hidden)


def paged_expert(
    hidden: int,
    intermediate: int,
    *,
    gated: bool,
    biased: bool,
    exact_dtype: torch.dtype | str,
    level: int,
    payloads: dict[int, np.ndarray],
    page_bytes: int = 4096,
    order: np.random.Generator | None = None,
    poison: int = 0xFF,
) -> _C.PagedExpert:
    """Copies payloads into pages, in random order if `order` is given. What no record owns is `poison`
    (0xFF is NaN in every float type)."""
    records = {}
    for record, payload in payloads.items():
        pages = -(-len(payload) // page_bytes)
        arena = np.full(pages * page_bytes + 64, poison, np.uint8)
        base = -arena.ctypes.data % 64
        slots = np.arange(pages) if order is None else order.permutation(pages)
        offsets = (base + slots * page_bytes).astype(np.int64)
        for i, offset in enumerate(offsets):
            piece = payload[i * page_bytes : (i + 1) * page_bytes]
            arena[offset : offset + len(piece)] = piece
        records[record] = (arena, offsets)
    return _C.PagedExpert(
        hidden, intermediate, gated, biased, EXACT_DTYPES[exact_dtype], level, records, page_bytes
    )


def unpack_bytes(expert: _C.PagedExpert, matrix: int, out_dtype: torch.dtype) -> int:
    """Bytes read and written by `unpack`; padding and group parameters included."""
    rows, cols = matrix_shape(expert, matrix)
    return (
        packed_bytes(rows, cols, expert.level, expert.exact_dtype)
        + rows * cols * out_dtype.itemsize
    )


def packed_bytes(rows: int, cols: int, level: int, exact_dtype: int) -> int:
    """Bytes of one matrix at a level."""
    tiles, blocks = -(-rows // 16), -(-cols // 32)
    if level == 4:
        scales = {3: -(-blocks // 4) * 4, 4: blocks * 16}.get(exact_dtype, 0)
        return tiles * (blocks * 512 * EXACT_BITS[exact_dtype] // 8 + scales)
    return tiles * (blocks * 512 * BITS[level] // 8 + -(-blocks // 4) * 32)


def unpack(
    expert: _C.PagedExpert,
    matrix: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Matrix `matrix` of `expert` as a dense tensor."""
    shape = matrix_shape(expert, matrix)
    if out is None:
        if dtype not in DTYPES:
            raise TypeError(f"unpack: dtype: expected one of {list(DTYPES)}, got {dtype}")
        out = torch.empty(shape, dtype=dtype)
    check_tensor("unpack", "out", out, shape)
    _C.unpack_matrix(expert, matrix, out.data_ptr(), DTYPES[out.dtype], row_stride(out))
    return out


def unpack_bias(expert: _C.PagedExpert, matrix: int) -> torch.Tensor:
    """Bias of matrix `matrix` as float32 [rows]."""
    out = torch.empty(matrix_shape(expert, matrix)[0])
    _C.unpack_bias(expert, matrix, out.data_ptr())
    return out


def unpack_mean(expert: _C.PagedExpert) -> torch.Tensor:
    """What is added to the expert's output, float32 [H]; zeros without a mean."""
    out = torch.empty(expert.hidden)
    _C.unpack_mean(expert, out.data_ptr())
    return out


def row_stride(tensor: torch.Tensor) -> int:
    """Elements from row to row; a single row may carry any stride in torch."""
    return tensor.stride(0) if tensor.shape[0] > 1 else max(tensor.shape[1], 1)


def check_tensor(op: str, name: str, tensor, shape: tuple[int | None, ...], dtypes=None) -> None:
    """TypeError or ValueError unless `tensor` is a CPU tensor of this shape (None: any size), of one of
    `dtypes`, whose last dimension is contiguous."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name}: expected a torch.Tensor, got {type(tensor).__name__}")
    dtypes = tuple(dtypes or DTYPES)
    if tensor.dtype not in dtypes:
        raise TypeError(
            f"{op}: {name}: expected dtype in {[str(d) for d in dtypes]}, got {tensor.dtype}"
        )
    if tensor.device.type != "cpu":
        raise ValueError(
            f"{op}: {name}: expected a CPU tensor, got one on {tensor.device}; move it"
        )
    fits = len(shape) == tensor.dim() and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{op}: {name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.numel() == 0:
        return  # strides of empty tensors mean nothing
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name}: expected a contiguous last dimension, got strides {tensor.stride()}; call .contiguous()"
        )
    if tensor.dim() == 2 and tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1]:
        raise ValueError(
            f"{op}: {name}: expected rows that do not overlap, got strides {tensor.stride()}"
        )
