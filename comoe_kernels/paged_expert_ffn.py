"""Feed-forward networks of the experts of one MoE layer on a GPU, straight from the pool's pages.

    a[p]   = act(gate_e @ x[t]) * (up_e @ x[t])        for each pair p = t * K + k, e = chosen[t, k]
    out[t] = sum over k of weights[t, k] * (down_e @ a[p])          ungated: a[p] = act(up_e @ x[t])

    x        [T, H] bfloat16, float16 or float32, columns contiguous
    chosen   int32 [T, K]; pairs of an expert outside [0, E) (transformers' sentinel) add nothing
    weights  float32 [T, K]
    items    int32 [N] experts of the layer that are chosen, each once, then -1 (any order)
    levels   int32 [N] level of each item: 0, 1, 2, 3 (2, 3, 4, 8 bits), 4 (exact); -1: it adds nothing
    tables   `PageTables`: where each expert's records lie (device/protocol.h, Plane)
    out      [T, H] of x's dtype

Experts of all levels in one launch. Two launches for decode (up to `DECODE_TOKENS` tokens, no sorting:
an item finds its tokens in `chosen`): the first writes a, the second goes through the items in their
order and sums in registers, so that the result is deterministic without atomics. Prefill: pairs sorted by
expert (`sort_pairs`), 64 at a time through tensor cores, then `combine`. Products of 16-bit values are summed
in float32; a is rounded to x's dtype.

Bytes moved: `paged_expert_ffn_bytes`, each chosen expert once for each block of its tokens. Does not
synchronise, can be captured: the grid follows from shapes alone. Not here: biases, low-rank parts, means,
and exact weights of other types than bfloat16 and float16, which raise ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from comoe_kernels.dequant_matmul import DTYPES, add_group, wide_products
from comoe_kernels.ladder_codec import BF16, FP16, Shape

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "quick_gelu": 5}
DECODE_TOKENS = 16
# (tokens, outputs of a program, warps)
DECODE_UP, DECODE_DOWN, PREFILL = (16, 32, 8), (16, 16, 8), (64, 32, 8)
SPLIT = (
    1  # programs that share the items of a tile of outputs in decode; their sums are added after
)


@dataclass(frozen=True)
class PageTables:
    """Where records lie.  page_table: int64 [.], addresses of all records' pages, one record after the other.
    first_page: int64 [records], where each record's begin.  records: int32 [experts, R], R >= 5: records
    of the rungs of 2, 1, 1, 4 bits and the exact one; -1: it has none.  page_bytes: multiple of 4096."""

    page_table: torch.Tensor
    first_page: torch.Tensor
    records: torch.Tensor
    page_bytes: int

    def __post_init__(self) -> None:
        for name, tensor, dtype, dims in (
            ("page_table", self.page_table, torch.int64, 1),
            ("first_page", self.first_page, torch.int64, 1),
            ("records", self.records, torch.int32, 2),
        ):
            if tensor.dtype != dtype or tensor.dim() != dims or not tensor.is_contiguous():
                raise ValueError(
                    f"PageTables: {name}: expected contiguous {dtype} with {dims} dimensions, got "
                    f"{tensor.dtype} {tuple(tensor.shape)}"
                )
        if self.records.shape[1] < 5:
            raise ValueError(
                f"PageTables: records: expected at least 5 per expert, got {self.records.shape[1]}"
            )
        if self.page_bytes % 4096 or self.page_bytes < 4096:
            raise ValueError(
                f"PageTables: page_bytes: expected a multiple of 4096, got {self.page_bytes}"
            )


def paged_expert_ffn_ref(
    x: torch.Tensor,
    experts: dict[int, Sequence[torch.Tensor]],
    chosen: torch.Tensor,
    weights: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """[T, H] float32 from dense matrices (gate, up, down, or up, down) of the experts that count."""
    from comoe_kernels.expert_ffn import expert_ffn_ref

    out = torch.zeros(x.shape, dtype=torch.float32)
    for t, (row, of_row) in enumerate(zip(chosen.tolist(), weights.tolist(), strict=True)):
        for e, w in zip(row, of_row, strict=True):
            if e in experts:
                out[t] += w * expert_ffn_ref(x[t : t + 1], experts[e], activation=activation)[0]
    return out


def paged_expert_ffn_bytes(shape: Shape, levels: Sequence[int], T: int, K: int) -> int:
    """Bytes that must be read and written once: records of the levels, x, pairs and out (16 bits)."""
    records = sum(
        shape.record_bytes(4)
        if level == 4
        else sum(shape.record_bytes(r) for r in range(level + 1))
        for level in levels
        if level >= 0
    )
    return records + T * shape.hidden * 4 + 2 * T * K * shape.intermediate * 2


@triton.jit
def _activate(v, ACT: tl.constexpr):
    if ACT == 0:
        return v / (1.0 + tl.exp(-v))
    elif ACT == 1:
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == 2:
        inner = 0.7978845608028654 * (v + 0.044715 * v * v * v)
        return v / (1.0 + tl.exp(-2.0 * inner))
    elif ACT == 3:
        return tl.maximum(v, 0.0)
    elif ACT == 4:
        positive = tl.maximum(v, 0.0)
        return positive * positive
    else:
        return v / (1.0 + tl.exp(-1.702 * v))


@triton.jit
def _exact_block(
    pages, page_bytes, offset, rows, cols, first_row, block, ROWS: tl.constexpr, HALF: tl.constexpr
):
    """Weights of rows first_row .. + ROWS, columns 32 * block ..: float32 [ROWS, 32], 0 outside."""
    row = first_row + tl.arange(0, ROWS)
    blocks = (cols + 31) // 32
    present = (row < rows) & (block + row * 0 < blocks)
    at = offset + ((row // 16) * blocks + block) * 1024
    address = tl.load(pages + at // page_bytes, mask=present, other=0) + at % page_bytes
    word = tl.arange(0, 16)
    address = address[:, None] + (word * 64)[None, :] + ((row % 16) * 4)[:, None]
    words = tl.load(address.to(tl.pointer_type(tl.int32)), mask=present[:, None], other=0)
    bits = (words[:, :, None] >> (tl.arange(0, 2) * 16)[None, None, :]) & 0xFFFF
    bits = tl.reshape(bits, (ROWS, 32))
    if HALF:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _add_exact_group(
    acc,
    x,
    x_stride,
    source,
    present,
    pages,
    page_bytes,
    offset,
    rows,
    cols,
    first_row,
    group,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    HALF: tl.constexpr,
):
    for b in range(4):
        values = _exact_block(
            pages, page_bytes, offset, rows, cols, first_row, group * 4 + b, ROWS, HALF
        )
        column = group * 128 + b * 32 + tl.arange(0, 32)
        at = source[:, None].to(tl.int64) * x_stride + column[None, :]
        xs = tl.load(x + at, mask=present[:, None] & (column < cols)[None, :], other=0.0)
        if WIDE:
            acc = tl.dot(xs.to(tl.float32), tl.trans(values), acc, input_precision="ieee")
        else:
            acc = tl.dot(xs, tl.trans(values.to(xs.dtype)), acc)
    return acc


@triton.jit
def _record_pages(page_table, first_page, records, record):
    """The row of the page table of an expert's record; of one that it lacks, any."""
    number = tl.load(records + record)
    return page_table + tl.load(first_page + tl.maximum(number, 0))


@triton.jit
def _times_matrix(
    acc,
    x,
    x_stride,
    source,
    present,
    page_table,
    first_page,
    records,
    page_bytes,
    header_offset,
    params_offset,
    offset0,
    offset1,
    offset2,
    offset3,
    offset4,
    rows,
    cols,
    first_row,
    level,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_EXACT: tl.constexpr,
    HALF: tl.constexpr,
):
    """acc [BLOCK_T, ROWS] + x[source] @ W[first_row .. + ROWS].T, at whatever level the expert has."""
    groups = (cols + 127) // 128
    pages0 = _record_pages(page_table, first_page, records, 0)
    pages1 = _record_pages(page_table, first_page, records, 1)
    pages2 = _record_pages(page_table, first_page, records, 2)
    pages3 = _record_pages(page_table, first_page, records, 3)
    pages4 = _record_pages(page_table, first_page, records, 4)
    # One branch per level, the loop within it: the level is the same for the whole program.
    if level == 4:
        for group in range(0, groups):
            acc = _add_exact_group(
                acc, x, x_stride, source, present, pages4, page_bytes, offset4, rows, cols,
                first_row, group, ROWS, WIDE_EXACT, HALF,
            )  # fmt: skip
    elif level == 3:
        for group in range(0, groups):
            acc = add_group(
                acc, x, x_stride, source, present, pages0, pages1, pages2, pages3, page_bytes,
                header_offset, params_offset, offset0, offset1, offset2, offset3, rows, cols,
                first_row, group, 8, ROWS, WIDE,
            )  # fmt: skip
    elif level == 2:
        for group in range(0, groups):
            acc = add_group(
                acc, x, x_stride, source, present, pages0, pages1, pages2, pages3, page_bytes,
                header_offset, params_offset, offset0, offset1, offset2, offset3, rows, cols,
                first_row, group, 4, ROWS, WIDE,
            )  # fmt: skip
    elif level == 1:
        for group in range(0, groups):
            acc = add_group(
                acc, x, x_stride, source, present, pages0, pages1, pages2, pages3, page_bytes,
                header_offset, params_offset, offset0, offset1, offset2, offset3, rows, cols,
                first_row, group, 3, ROWS, WIDE,
            )  # fmt: skip
    elif level == 0:
        for group in range(0, groups):
            acc = add_group(
                acc, x, x_stride, source, present, pages0, pages1, pages2, pages3, page_bytes,
                header_offset, params_offset, offset0, offset1, offset2, offset3, rows, cols,
                first_row, group, 2, ROWS, WIDE,
            )  # fmt: skip
    return acc


@triton.jit
def _pairs_of(
    expert, item, chosen, sorted_pairs, offsets, T, K,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Pairs of an expert that this program takes: (pair [BLOCK_T], whether there is one)."""
    lane = tl.arange(0, BLOCK_T)
    if SORTED:
        i = tl.load(offsets + item) + tl.program_id(2) * BLOCK_T + lane
        present = i < tl.load(offsets + item + 1)
        pair = tl.load(sorted_pairs + i, mask=present, other=0)
    else:
        k = tl.arange(0, BLOCK_K)
        inside = (lane < T)[:, None] & (k < K)[None, :]
        names = tl.load(chosen + lane[:, None] * K + k[None, :], mask=inside, other=-1)
        place = tl.max(tl.where(names == expert, k[None, :] + 1, 0), axis=1)  # 0: not chosen
        present = place > 0
        pair = tl.where(present, lane * K + place - 1, 0)
    return pair, present


@triton.jit
def _ffn_up_kernel(
    x,
    x_stride,
    chosen,
    items,
    levels,
    sorted_pairs,
    offsets,
    hidden_out,
    page_table,
    first_page,
    records,
    records_stride,
    page_bytes,
    T,
    K,
    rows,
    cols,
    gate_header,
    gate_params,
    gate0,
    gate1,
    gate2,
    gate3,
    gate4,
    up_header,
    up_params,
    up0,
    up1,
    up2,
    up3,
    up4,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    SORTED: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_EXACT: tl.constexpr,
    HALF: tl.constexpr,
):
    # Grid: (tiles of I, items, blocks of an item's pairs). A program owns one tile of one item.
    item = tl.program_id(1)
    expert = tl.load(items + item)
    level = tl.load(levels + item)
    if (expert >= 0) & (level >= 0):
        pair, present = _pairs_of(
            expert, item, chosen, sorted_pairs, offsets, T, K, BLOCK_T, BLOCK_K, SORTED
        )
        if tl.max(present.to(tl.int32), axis=0) > 0:
            own = records + expert.to(tl.int64) * records_stride
            first_row = tl.program_id(0) * ROWS
            token = pair // K
            up = _times_matrix(
                tl.zeros((BLOCK_T, ROWS), tl.float32), x, x_stride, token, present, page_table,
                first_page, own, page_bytes, up_header, up_params, up0, up1, up2, up3, up4, rows,
                cols, first_row, level, ROWS, WIDE, WIDE_EXACT, HALF,
            )  # fmt: skip
            if GATED:
                gate = _times_matrix(
                    tl.zeros((BLOCK_T, ROWS), tl.float32), x, x_stride, token, present, page_table,
                    first_page, own, page_bytes, gate_header, gate_params, gate0, gate1, gate2,
                    gate3, gate4, rows, cols, first_row, level, ROWS, WIDE, WIDE_EXACT, HALF,
                )  # fmt: skip
                a = _activate(gate, ACT) * up
            else:
                a = _activate(up, ACT)
            r = first_row + tl.arange(0, ROWS)
            at = pair.to(tl.int64)[:, None] * rows + r[None, :]
            tl.store(
                hidden_out + at,
                a.to(hidden_out.dtype.element_ty),
                mask=present[:, None] & (r < rows)[None, :],
            )


@triton.jit
def _ffn_down_kernel(
    a,
    chosen,
    weights,
    items,
    levels,
    sorted_pairs,
    offsets,
    out,
    page_table,
    first_page,
    records,
    records_stride,
    page_bytes,
    num_items,
    T,
    K,
    rows,
    cols,
    header,
    params,
    offset0,
    offset1,
    offset2,
    offset3,
    offset4,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    SORTED: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_EXACT: tl.constexpr,
    HALF: tl.constexpr,
):
    # Decode: grid (tiles of H, split): a program owns a tile of out for all tokens, goes through its share
    # of the items in order, and stores once. Prefill: (tiles of H, items, blocks of an item's pairs).
    first_row = tl.program_id(0) * ROWS
    r = first_row + tl.arange(0, ROWS)
    total = tl.zeros((BLOCK_T, ROWS), tl.float32)
    share = (num_items + tl.num_programs(1) - 1) // tl.num_programs(1)
    begin = tl.program_id(1) * share
    for item in range(begin, tl.minimum(begin + share, num_items)):
        expert = tl.load(items + item)
        level = tl.load(levels + item)
        if (expert >= 0) & (level >= 0):
            pair, present = _pairs_of(
                expert, item, chosen, sorted_pairs, offsets, T, K, BLOCK_T, BLOCK_K, SORTED
            )
            if tl.max(present.to(tl.int32), axis=0) > 0:
                own = records + expert.to(tl.int64) * records_stride
                y = _times_matrix(
                    tl.zeros((BLOCK_T, ROWS), tl.float32), a, cols, pair, present, page_table,
                    first_page, own, page_bytes, header, params, offset0, offset1, offset2, offset3,
                    offset4, rows, cols, first_row, level, ROWS, WIDE, WIDE_EXACT, HALF,
                )  # fmt: skip
                if SORTED:
                    at = pair.to(tl.int64)[:, None] * rows + r[None, :]
                    tl.store(out + at, y, mask=present[:, None] & (r < rows)[None, :])
                else:
                    w = tl.load(weights + pair, mask=present, other=0.0)
                    total += w[:, None] * y
    if not SORTED:
        t = tl.arange(0, BLOCK_T)
        at = (tl.program_id(1) * T + t).to(tl.int64)[:, None] * rows + r[None, :]
        tl.store(
            out + at,
            total.to(out.dtype.element_ty),
            mask=(t < T)[:, None] & (r < rows)[None, :],
        )


@triton.jit
def _combine_kernel(pair_out, chosen, weights, level_of, out, K, rows, E, BLOCK: tl.constexpr):
    # Grid: (tokens, tiles of H).
    t = tl.program_id(0)
    r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, K):
        e = tl.load(chosen + t * K + k)
        real = (e >= 0) & (e < E)
        level = tl.load(level_of + e, mask=real, other=-1)
        if level >= 0:
            at = (t * K + k).to(tl.int64) * rows
            total += tl.load(weights + t * K + k) * tl.load(
                pair_out + at + r, mask=r < rows, other=0.0
            )
    tl.store(out + t.to(tl.int64) * rows + r, total.to(out.dtype.element_ty), mask=r < rows)


def sort_pairs(chosen: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(pairs int32 [T * K] sorted by expert, those of no expert last; offsets int32 [E + 1])."""
    flat = torch.where((chosen < 0) | (chosen >= num_experts), num_experts, chosen).flatten()
    pairs = flat.argsort(stable=True).to(torch.int32)
    # bincount would ask the host for its size.
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=chosen.device)
    counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int32))
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=chosen.device)
    offsets[1:] = counts[:num_experts].cumsum(0)
    return pairs, offsets


def _matrix_args(shape: Shape, m: int) -> tuple[int, ...]:
    offsets = tuple(shape.blocks_offset(r, m) for r in range(5))
    return (64 * m, shape.params_offset(m), *offsets)


def paged_expert_ffn(
    x: torch.Tensor,
    shape: Shape,
    tables: PageTables,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    items: torch.Tensor,
    levels: torch.Tensor,
    *,
    activation: str = "silu",
    out: torch.Tensor | None = None,
    split: int = SPLIT,
) -> torch.Tensor:
    """[T, H] of x's dtype; see the module's docstring. tables.records: [E, R] of this layer's experts.

    In prefill (more than DECODE_TOKENS tokens) items must be 0 .. E - 1 in order, levels -1 where an expert is
    not chosen or not here. Raises ValueError for arguments that do not fit.
    """
    op = "paged_expert_ffn"
    if (
        x.dim() != 2
        or x.shape[1] != shape.hidden
        or x.dtype not in DTYPES
        or (x.numel() and x.stride(1) != 1)
    ):
        raise ValueError(
            f"{op}: x: expected [T, {shape.hidden}] in float32, bfloat16 or float16 with contiguous "
            f"columns, got {tuple(x.shape)} {x.dtype}"
        )
    T = x.shape[0]
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    if shape.biased or shape.exact_dtype not in (BF16, FP16):
        raise ValueError(
            f"{op}: shape: expected an expert without biases whose exact weights are bfloat16 or "
            "float16; run others with device='cpu'"
        )
    for name, tensor, dtype in (
        ("chosen", chosen, torch.int32),
        ("weights", weights, torch.float32),
    ):
        if tensor.dtype != dtype or tensor.dim() != 2 or tensor.shape[0] != T:
            raise ValueError(
                f"{op}: {name}: expected {dtype} [{T}, K], got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name}: expected contiguous memory")
    if weights.shape != chosen.shape:
        raise ValueError(
            f"{op}: weights: expected {tuple(chosen.shape)}, got {tuple(weights.shape)}"
        )
    for name, tensor in (("items", items), ("levels", levels)):
        if tensor.dtype != torch.int32 or tensor.shape != items.shape or tensor.dim() != 1:
            raise ValueError(
                f"{op}: {name}: expected int32 [N], got {tensor.dtype} {tuple(tensor.shape)}"
            )
    num_experts = tables.records.shape[0]
    sorted_pairs_mode = T > DECODE_TOKENS
    if sorted_pairs_mode and items.numel() != num_experts:
        raise ValueError(
            f"{op}: items: expected all {num_experts} experts in order for more than {DECODE_TOKENS} "
            f"tokens, got {items.numel()}"
        )
    if split < 1:
        raise ValueError(f"{op}: split: expected at least 1, got {split}")
    if out is None:
        out = torch.empty((T, shape.hidden), dtype=x.dtype, device=x.device)
    elif out.shape != (T, shape.hidden) or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"{op}: out: expected contiguous {x.dtype} {(T, shape.hidden)}")
    K = chosen.shape[1]
    if T == 0:
        return out
    if K == 0 or items.numel() == 0:
        return out.zero_()

    wide = wide_products(x)
    # bf16 x with bf16 weights, fp16 with fp16: products of the matrix units; else in float32.
    half = shape.exact_dtype == FP16
    wide_exact = wide or x.dtype != (torch.float16 if half else torch.bfloat16)
    common = {
        "BLOCK_K": triton.next_power_of_2(K),
        "WIDE": wide,
        "WIDE_EXACT": wide_exact,
        "HALF": half,
        "SORTED": sorted_pairs_mode,
    }
    if sorted_pairs_mode:
        pairs, offsets = sort_pairs(chosen, num_experts)
    else:
        pairs = offsets = chosen  # not read
    where = (
        tables.page_table,
        tables.first_page,
        tables.records,
        tables.records.stride(0),
        tables.page_bytes,
    )
    gated, inter = shape.gated, shape.intermediate
    hidden = torch.empty((T * K, inter), dtype=x.dtype, device=x.device)
    block_t, rows, warps = PREFILL if sorted_pairs_mode else DECODE_UP
    blocks = triton.cdiv(T, block_t)  # an expert has at most one pair of each token
    up = _matrix_args(shape, 1 if gated else 0)
    _ffn_up_kernel[(triton.cdiv(inter, rows), items.numel(), blocks)](
        x, x.stride(0), chosen, items, levels, pairs, offsets, hidden, *where, T, K, inter,
        shape.hidden, *_matrix_args(shape, 0), *up, BLOCK_T=block_t, ROWS=rows, GATED=gated,
        ACT=ACTIVATIONS[activation], **common, num_warps=warps,
    )  # fmt: skip
    down = _matrix_args(shape, 2 if gated else 1)
    block_t, rows, warps = PREFILL if sorted_pairs_mode else DECODE_DOWN
    tiles = triton.cdiv(shape.hidden, rows)
    if sorted_pairs_mode:
        target = torch.empty((T * K, shape.hidden), dtype=torch.float32, device=x.device)
        grid = (tiles, items.numel(), blocks)
    elif split == 1:
        target, grid = out, (tiles, 1)
    else:
        target = torch.empty((split, T, shape.hidden), dtype=torch.float32, device=x.device)
        grid = (tiles, split)
    _ffn_down_kernel[grid](
        hidden, chosen, weights, items, levels, pairs, offsets, target, *where, items.numel(), T, K,
        shape.hidden, inter, *down, BLOCK_T=block_t, ROWS=rows, **common, num_warps=warps,
    )  # fmt: skip
    if sorted_pairs_mode:
        _combine_kernel[(T, triton.cdiv(shape.hidden, 256))](
            target, chosen, weights, levels, out, K, shape.hidden, num_experts, BLOCK=256
        )
    elif split > 1:
        out.copy_(target.sum(0))
    return out
