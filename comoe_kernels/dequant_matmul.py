"""Rows of activations times coded matrices, straight from their pages.

    out[i, :] = W_s @ x[token[i], :]                        for rows offsets[s] <= i < offsets[s + 1]
    part[k, i, :] = the same over the k-th share of columns    split_k > 1: the caller adds the parts

    x        [T, cols] float32, bfloat16 or float16, columns contiguous
    token    int32 [N]: row of x that row i reads          offsets  int32 [S + 1], rows sorted by matrix
    W_s      [rows, cols] at 2, 3, 4 or 8 bits (coded_matrix.py), S of one level per launch
    out      [N, rows] float32 (part: [split_k, N, rows])

Bytes moved: `dequant_matmul_bytes`; each matrix once for each `block_t` of its rows. 16-bit x: products of
16-bit values, exact for the codes, summed in float32; float32 x: float32 throughout. One launch, no
atomics: a row's result does not depend on the other rows. Does not synchronise, can be captured in a
CUDA graph: the grid follows from N alone, not from `offsets`. Decode (a few rows per matrix) and prefill
(many) are the same kernel with other blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from comoe_kernels.coded_matrix import CodedMatrix, coded_block, group_params

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of x, outputs and warps of a program. Decode: more programs, each with less to unpack. Prefill: each
# unpacked tile serves 64 rows.
DECODE, PREFILL = (16, 32, 8), (64, 64, 8)


def dequant_matmul_ref(
    x: torch.Tensor, matrices: Sequence[torch.Tensor], token: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """[N, rows] float32 from dense matrices [rows, cols], one after the other."""
    out = torch.empty(token.numel(), matrices[0].shape[0])
    for s, matrix in enumerate(matrices):
        rows = slice(int(offsets[s]), int(offsets[s + 1]))
        out[rows] = x[token[rows].long()].float() @ matrix.float().T
    return out


def dequant_matmul_bytes(
    matrix: CodedMatrix, num_used: int, num_rows: int, x_bytes: int = 2
) -> int:
    """Packed bytes of the matrices that have rows, rows of x and of the result."""
    return num_used * matrix.nbytes + num_rows * (matrix.cols * x_bytes + matrix.rows * 4)


def check_rows(
    op: str, x: torch.Tensor, cols: int, token: torch.Tensor, offsets: torch.Tensor, num: int
) -> None:
    """Raises ValueError where the arguments shared by the matmuls over pages do not fit."""
    if x.dim() != 2 or x.shape[1] != cols or x.dtype not in DTYPES or x.stride(1) != 1:
        raise ValueError(
            f"{op}: x: expected [T, {cols}] in float32, bfloat16 or float16 with contiguous columns, got "
            f"{tuple(x.shape)} {x.dtype}"
        )
    for name, tensor, size in (("token", token, None), ("offsets", offsets, num + 1)):
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"{op}: {name}: expected contiguous int32 [.], got {tensor.dtype}")
        if size is not None and tensor.numel() != size:
            raise ValueError(f"{op}: {name}: expected {size} entries, got {tensor.numel()}")


def wide_products(x: torch.Tensor) -> bool:
    """Whether products are taken in float32. Those of bf16 are exact in it too, and Triton's interpreter,
    which has no bf16, multiplies its bits as integers (seen in 3.9)."""
    interpreted = triton.knobs.runtime.interpret
    return x.dtype == torch.float32 or (interpreted and x.dtype == torch.bfloat16)


@triton.jit
def add_group(
    acc,
    x,
    x_stride,
    token,
    present,
    pages0,
    pages1,
    pages2,
    pages3,
    page_bytes,
    header_offset,
    params_offset,
    offset0,
    offset1,
    offset2,
    offset3,
    rows,
    cols,
    first_row,
    group,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """acc [BLOCK_T, ROWS] + x[token, 128 columns] @ W[first_row .. + ROWS, 128 columns].T"""
    scale, zero = group_params(
        pages0, page_bytes, header_offset, params_offset, rows, cols, first_row, group, ROWS
    )
    sums = tl.zeros_like(acc)
    for b in range(4):
        values = coded_block(
            pages0,
            pages1,
            pages2,
            pages3,
            page_bytes,
            header_offset,
            offset0,
            offset1,
            offset2,
            offset3,
            rows,
            cols,
            first_row,
            group * 4 + b,
            zero,
            BITS,
            ROWS,
        )
        column = group * 128 + b * 32 + tl.arange(0, 32)
        at = token[:, None].to(tl.int64) * x_stride + column[None, :]
        xs = tl.load(x + at, mask=present[:, None] & (column < cols)[None, :], other=0.0)
        if WIDE:
            sums = tl.dot(
                xs.to(tl.float32), tl.trans(values.to(tl.float32)), sums, input_precision="ieee"
            )
        else:
            sums = tl.dot(xs, tl.trans(values.to(xs.dtype)), sums)
    return acc + sums * scale[None, :]


@triton.jit
def _dequant_matmul_kernel(
    x,
    x_stride,
    token,
    offsets,
    out,
    num_rows_out,
    pages,
    pages_stride_s,
    page_stride,
    page_bytes,
    header_offset,
    params_offset,
    offset0,
    offset1,
    offset2,
    offset3,
    rows,
    cols,
    BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    s = tl.program_id(1)
    begin = tl.load(offsets + s) + tl.program_id(2) * BLOCK_T
    end = tl.load(offsets + s + 1)
    if begin < end:
        first_row = (tl.program_id(0) // SPLIT_K) * ROWS
        part = tl.program_id(0) % SPLIT_K
        i = begin + tl.arange(0, BLOCK_T)
        present = i < end
        tokens = tl.load(token + i, mask=present, other=0)
        own = pages + s.to(tl.int64) * pages_stride_s
        groups = (cols + 127) // 128
        share = (groups + SPLIT_K - 1) // SPLIT_K
        acc = tl.zeros((BLOCK_T, ROWS), tl.float32)
        for group in range(part * share, tl.minimum((part + 1) * share, groups)):
            acc = add_group(
                acc,
                x,
                x_stride,
                tokens,
                present,
                own,
                own + page_stride,
                own + 2 * page_stride,
                own + 3 * page_stride,
                page_bytes,
                header_offset,
                params_offset,
                offset0,
                offset1,
                offset2,
                offset3,
                rows,
                cols,
                first_row,
                group,
                BITS,
                ROWS,
                WIDE,
            )
        r = first_row + tl.arange(0, ROWS)
        at = (part.to(tl.int64) * num_rows_out + i)[:, None] * rows + r[None, :]
        tl.store(out + at, acc, mask=present[:, None] & (r < rows)[None, :])


def dequant_matmul(
    x: torch.Tensor,
    matrix: CodedMatrix,
    token: torch.Tensor,
    offsets: torch.Tensor,
    *,
    split_k: int = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[N, rows] float32, or with split_k > 1 the parts [split_k, N, rows]; see the module's docstring.

    Rows of `out` that no matrix claims stay as they are. Raises ValueError for arguments that do not fit.
    """
    check_rows("dequant_matmul", x, matrix.cols, token, offsets, matrix.num)
    num = token.numel()
    shape = (num, matrix.rows) if split_k == 1 else (split_k, num, matrix.rows)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=x.device)
    elif out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"dequant_matmul: out: expected contiguous float32 {shape}")
    if num == 0:
        return out
    block_t, row_block, num_warps = DECODE if num <= 16 * matrix.num else PREFILL
    grid = (
        triton.cdiv(matrix.rows, row_block) * split_k,
        matrix.num,
        triton.cdiv(num, block_t),
    )
    _dequant_matmul_kernel[grid](
        x,
        x.stride(0),
        token,
        offsets,
        out,
        num,
        *matrix.kernel_args(),
        BITS=matrix.bits,
        BLOCK_T=block_t,
        ROWS=row_block,
        SPLIT_K=split_k,
        WIDE=wide_products(x),
        num_warps=num_warps,
    )
    return out
