"""Experts that share a base: the base is read once for all of its chosen members, each adds its own delta.

    out[i, :] = B_c @ x[token[i], :] + U_m @ (V_m @ x[token[i], :])        m = member[i]

    rows i of cluster c: cluster_offsets[c] <= i < cluster_offsets[c + 1]; of member m (sorted by cluster, then
    member): member_offsets[m] <= i < member_offsets[m + 1]
    x     [T, cols] float32, bfloat16 or float16        token, member  int32 [N]
    B_c   [rows, cols], C of them at 2, 3, 4 or 8 bits    V_m [rank, cols], U_m [rows, rank], M of each at 8 bits
    out   [N, rows] float32

The source of the form is MC-SMoE (arXiv 2310.01334): a merged expert plus a compressed difference. Two
launches: V_m @ x, its columns split over programs, since a factor of a few rows would keep only a few busy;
then the base, to which each row adds its U_m @ t before the result is written. Bytes moved:
`merged_lowrank_matmul_bytes`; each base once for each 16 rows of its cluster, factors of a member once
per row and once for each of the launches. No atomics, deterministic, does not synchronise, can be captured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from comoe_kernels.coded_matrix import CodedMatrix, coded_block, group_params
from comoe_kernels.dequant_matmul import add_group, check_rows, dequant_matmul, wide_products

MAX_RANK = 128  # of one delta: U's columns are one group
SPLIT_K = 8  # programs that share the columns of V
BLOCK_T, ROW_BLOCK, NUM_WARPS = 16, 16, 4  # rows of x, outputs and warps of a program


def merged_lowrank_matmul_ref(
    x: torch.Tensor,
    bases: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    u: Sequence[torch.Tensor],
    token: torch.Tensor,
    member: torch.Tensor,
    cluster_offsets: torch.Tensor,
) -> torch.Tensor:
    """[N, rows] float32 from dense matrices, row by row."""
    out = torch.empty(token.numel(), bases[0].shape[0])
    for c, base in enumerate(bases):
        for i in range(int(cluster_offsets[c]), int(cluster_offsets[c + 1])):
            row, m = x[int(token[i])].float(), int(member[i])
            out[i] = base.float() @ row + u[m].float() @ (v[m].float() @ row)
    return out


def merged_lowrank_matmul_bytes(
    base: CodedMatrix, v: CodedMatrix, u: CodedMatrix, clusters: int, members: int, num_rows: int
) -> int:
    """Packed bytes of the bases and factors that have rows, rows of x (16 bits) and of the result."""
    activations = num_rows * (base.cols * 2 + base.rows * 4)
    return clusters * base.nbytes + members * (v.nbytes + u.nbytes) + activations


@triton.jit
def _merged_lowrank_kernel(
    x,
    x_stride,
    token,
    member,
    offsets,
    shrunk,
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
    u_pages,
    u_pages_stride_s,
    u_page_stride,
    u_page_bytes,
    u_header_offset,
    u_params_offset,
    u_offset0,
    u_offset1,
    u_offset2,
    u_offset3,
    u_rows,
    rank,
    BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    c = tl.program_id(1)
    begin = tl.load(offsets + c) + tl.program_id(2) * BLOCK_T
    end = tl.load(offsets + c + 1)
    if begin < end:
        first_row = tl.program_id(0) * ROWS
        i = begin + tl.arange(0, BLOCK_T)
        present = i < end
        tokens = tl.load(token + i, mask=present, other=0)
        own = pages + c.to(tl.int64) * pages_stride_s
        acc = tl.zeros((BLOCK_T, ROWS), tl.float32)
        for group in range(0, (cols + 127) // 128):
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
        k = tl.arange(0, 32)
        for row in range(begin, tl.minimum(begin + BLOCK_T, end)):
            m = tl.load(member + row)
            factor = u_pages + m.to(tl.int64) * u_pages_stride_s
            scale, zero = group_params(
                factor,
                u_page_bytes,
                u_header_offset,
                u_params_offset,
                rows,
                rank,
                first_row,
                0,
                ROWS,
            )
            delta = tl.zeros((ROWS,), tl.float32)
            for block in range(0, (rank + 31) // 32):
                values = coded_block(
                    factor,
                    factor + u_page_stride,
                    factor + 2 * u_page_stride,
                    factor + 3 * u_page_stride,
                    u_page_bytes,
                    u_header_offset,
                    u_offset0,
                    u_offset1,
                    u_offset2,
                    u_offset3,
                    rows,
                    rank,
                    first_row,
                    block,
                    zero,
                    8,
                    ROWS,
                )
                t = tl.zeros((32,), tl.float32)
                inside = block * 32 + k < rank
                for part in range(SPLIT_K):
                    at = (row + part * num_rows_out).to(tl.int64) * rank + block * 32
                    t += tl.load(shrunk + at + k, mask=inside, other=0.0)
                delta += tl.sum(values.to(tl.float32) * t[None, :], axis=1)
            acc += tl.where((i == row)[:, None], (delta * scale)[None, :], 0.0)
        r = first_row + tl.arange(0, ROWS)
        at = i.to(tl.int64)[:, None] * rows + r[None, :]
        tl.store(out + at, acc, mask=present[:, None] & (r < rows)[None, :])


def merged_lowrank_matmul(
    x: torch.Tensor,
    base: CodedMatrix,
    v: CodedMatrix,
    u: CodedMatrix,
    token: torch.Tensor,
    member: torch.Tensor,
    cluster_offsets: torch.Tensor,
    member_offsets: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[N, rows] float32; see the module's docstring. member: int32 [N], the factors' number of each row.

    Raises ValueError for arguments that do not fit.
    """
    op = "merged_lowrank_matmul"
    check_rows(op, x, base.cols, token, cluster_offsets, base.num)
    if (v.rows, v.cols) != (u.cols, base.cols) or u.rows != base.rows or u.num != v.num:
        raise ValueError(
            f"{op}: factors: expected V [rank, {base.cols}] and U [{base.rows}, rank] of as many members, got "
            f"{v.num} V [{v.rows}, {v.cols}] and {u.num} U [{u.rows}, {u.cols}]"
        )
    if u.cols > MAX_RANK or v.bits != 8 or u.bits != 8:
        raise ValueError(
            f"{op}: factors: expected a rank of at most {MAX_RANK} at 8 bits, got rank {u.cols} at {v.bits} and "
            f"{u.bits} bits; add a larger delta in chunks"
        )
    if member.dtype != torch.int32 or member.shape != token.shape:
        raise ValueError(
            f"{op}: member: expected int32 [{token.numel()}], got {tuple(member.shape)}"
        )
    num = token.numel()
    if out is None:
        out = torch.empty((num, base.rows), dtype=torch.float32, device=x.device)
    elif out.shape != (num, base.rows) or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"{op}: out: expected contiguous float32 {(num, base.rows)}")
    if num == 0:
        return out
    shrunk = dequant_matmul(x, v, token, member_offsets, split_k=SPLIT_K)
    grid = (triton.cdiv(base.rows, ROW_BLOCK), base.num, triton.cdiv(num, BLOCK_T))
    _merged_lowrank_kernel[grid](
        x,
        x.stride(0),
        token,
        member,
        cluster_offsets,
        shrunk,
        out,
        num,
        *base.kernel_args(),
        *u.kernel_args(),
        BITS=base.bits,
        BLOCK_T=BLOCK_T,
        ROWS=ROW_BLOCK,
        SPLIT_K=SPLIT_K,
        WIDE=wide_products(x),
        num_warps=NUM_WARPS,
    )
    return out
