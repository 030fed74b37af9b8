"""Coded matrices in pages, as Triton kernels see them, and the tile that every such kernel decodes.

    W[r, c] = scale[r, c // 128] * (value(code[r, c]) - zero[r, c // 128])

Codes lie in planes of 2, 1, 1 and 4 bits, blocks of 16 x 32 weights, pages anywhere in memory
(csrc/ladder/layout.h, docs/format.md). A kernel reads a word of 4 bytes per row and plane: the columns
of such a word are neighbours, so that expanding it needs shifts only and no shuffle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from comoe_kernels.ladder_codec import Shape

NUM_PLANES = {2: 1, 3: 2, 4: 3, 8: 4}


@dataclass(frozen=True)
class CodedMatrix:
    """S matrices [rows, cols] of one level, and where they lie.

    pages: int64 [S, P, N] on the kernel's device, address of page n of the record with plane p (P = 1,
    2, 3, 4 planes at 2, 3, 4, 8 bits; planes of one record name the same pages).  page_bytes: a
    multiple of 4096.  Offsets in bytes from the start of the record: of the matrix's header and group
    parameters in the record of plane 0, and of the first block of each plane.
    """

    rows: int
    cols: int
    bits: int
    pages: torch.Tensor
    page_bytes: int
    header_offset: int
    params_offset: int
    block_offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        planes = NUM_PLANES.get(self.bits)
        if planes is None:
            raise ValueError(f"CodedMatrix: bits: expected 2, 3, 4 or 8, got {self.bits}")
        if (
            self.pages.dtype != torch.int64
            or self.pages.dim() != 3
            or self.pages.shape[1] != planes
        ):
            raise ValueError(
                f"CodedMatrix: pages: expected int64 [S, {planes}, N], got {self.pages.dtype} "
                f"{tuple(self.pages.shape)}"
            )
        if self.pages.stride(2) != 1:
            raise ValueError("CodedMatrix: pages: expected the last dimension contiguous")
        if self.page_bytes % 4096 or self.page_bytes < 4096:
            raise ValueError(
                f"CodedMatrix: page_bytes: expected a multiple of 4096, got {self.page_bytes}"
            )
        if self.pages.shape[2] * self.page_bytes >= 1 << 31:
            raise ValueError(
                f"CodedMatrix: pages: expected records under 2 GiB, got {self.pages.shape[2]} pages of "
                f"{self.page_bytes:,} bytes"
            )
        if len(self.block_offsets) != planes:
            raise ValueError(
                f"CodedMatrix: block_offsets: expected {planes}, got {len(self.block_offsets)}"
            )

    @classmethod
    def of_expert(
        cls, shape: Shape, m: int, bits: int, pages: torch.Tensor, page_bytes: int
    ) -> CodedMatrix:
        """Matrix m of S experts whose records 0.. have their planes in `pages`."""
        rows, cols = shape.matrices[m]
        offsets = tuple(shape.blocks_offset(p, m) for p in range(NUM_PLANES[bits]))
        return cls(rows, cols, bits, pages, page_bytes, 64 * m, shape.params_offset(m), offsets)

    @property
    def num(self) -> int:
        return self.pages.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of one matrix that a kernel reads: codes, group parameters, header."""
        tiles, blocks = -(-self.rows // 16), -(-self.cols // 32)
        return tiles * (blocks * 64 * self.bits + -(-blocks // 4) * 32) + 64

    def kernel_args(self) -> Sequence[object]:
        """In the order of the kernels' parameters `pages` to `cols`."""
        offsets = (*self.block_offsets, 0, 0, 0)[:4]
        return (
            self.pages,
            self.pages.stride(0),
            self.pages.stride(1),
            self.page_bytes,
            self.header_offset,
            self.params_offset,
            *offsets,
            self.rows,
            self.cols,
        )


@triton.jit
def _address(pages, offset, page_bytes):
    """Address of byte `offset` of a record."""
    return tl.load(pages + offset // page_bytes) + offset % page_bytes


@triton.jit
def _plane(pages, page_bytes, offset, number, present, lane_row, BITS: tl.constexpr):
    """Codes of one plane's blocks `number` [ROWS], int32 [ROWS, 32]; 0 where a block is not `present`."""
    WORDS: tl.constexpr = BITS  # of a row in one block
    COLS: tl.constexpr = 32 // BITS  # columns of a word
    at = offset + number * (
        64 * BITS
    )  # in 32 bits: division of 64 is a subroutine. A block has one page
    address = tl.load(pages + at // page_bytes, mask=present, other=0) + at % page_bytes
    address = address[:, None] + (tl.arange(0, WORDS) * 64)[None, :] + (lane_row * 4)[:, None]
    words = tl.load(address.to(tl.pointer_type(tl.int32)), mask=present[:, None], other=0)
    column = tl.arange(0, COLS)
    shift = 8 * (column % 4) + BITS * (column // 4)
    codes = (words[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(codes, (words.shape[0], 32))


@triton.jit
def group_params(
    pages,
    page_bytes,
    header_offset,
    params_offset,
    rows,
    cols,
    first_row,
    group,
    ROWS: tl.constexpr,
):
    """Scale (float32 [ROWS], 0 for rows that do not exist) and zero (int32 [ROWS]) of rows first_row ... in
    columns 128 * group ..."""
    row = first_row + tl.arange(0, ROWS)
    valid = row < rows
    at = params_offset + ((row // 16) * ((cols + 127) // 128) + group) * 32 + row % 16
    params = tl.load(pages + at // page_bytes, mask=valid, other=0) + at % page_bytes
    params = params.to(tl.pointer_type(tl.uint8))
    scale_q = tl.load(params, mask=valid, other=0).to(tl.float32)
    zero = tl.load(params + 16, mask=valid, other=0).to(tl.int32)
    header = _address(pages, header_offset, page_bytes).to(tl.pointer_type(tl.float32))
    scale = tl.exp2(tl.load(header) + tl.load(header + 1) * scale_q)
    return tl.where(valid, scale, 0.0), zero


@triton.jit
def coded_block(
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
    block,
    zero,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """pages0 ..: addresses of the pages of the records that hold the planes (those that BITS needs).

    value - zero of rows first_row .. first_row + ROWS (multiples of 16), columns 32 * block ..: int32
    [ROWS, 32] of at most 255 in size, which bf16 holds exactly. Weights that do not exist are not 0: the
    activation of such a column and the scale of such a row are."""
    row = first_row + tl.arange(0, ROWS)
    lane_row = row % 16
    blocks = (cols + 31) // 32
    column = block + row * 0
    present = (row < rows) & (column < blocks)
    number = (row // 16) * blocks + column
    code = _plane(pages0, page_bytes, offset0, number, present, lane_row, 2)
    if BITS >= 3:
        code = code * 2 + _plane(pages1, page_bytes, offset1, number, present, lane_row, 1)
    if BITS >= 4:
        code = code * 2 + _plane(pages2, page_bytes, offset2, number, present, lane_row, 1)
    if BITS == 8:
        value = code * 16 + _plane(pages3, page_bytes, offset3, number, present, lane_row, 4)
    else:
        TABLE: tl.constexpr = 8 if BITS == 2 else (12 if BITS == 3 else 20)  # in the header
        entries = _address(pages0, header_offset + TABLE, page_bytes).to(tl.pointer_type(tl.uint8))
        value = tl.load(entries + code).to(tl.int32)
    return value - zero[:, None]
