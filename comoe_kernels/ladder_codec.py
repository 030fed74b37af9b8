"""The ladder codec: one expert as five records, of which the first four nest.

An expert of hidden size H and intermediate size I is a list of matrices W [rows, cols], cols along
the input dimension: gate [I, H], up [I, H], down [H, I], or up, down when it is not gated.

Each weight has one 8-bit `code`. Each group of 128 columns of one row has a scale and a zero (8 bits
each, 0.125 bit per weight together). Level b = 2, 3, 4 or 8 bits sees the upper b bits of the code:

    W      = scale * (value - zero)
    scale  = exp2(log2_min + log2_step * scale_q)      scale_q, zero: uint8 per group
    value  = table_b[code >> (8 - b)]                  table_b: uint8 [2**b] per matrix, in code units
    value  = code                                      at 8 bits

Every value and zero is an integer in 0..255, so a kernel may take dot products in int8 and apply the
scale once per group. The encoder covers each group's range (zero included) with codes 0..255 and
sets table entries to the mean code of their bin, weighted by scale**2. Level `exact` is the source
itself, bit for bit.

Records (payload bytes per weight, without padding):
    0: headers, biases (fp32), group parameters, plane of code bits 7..6     0.25 + 1/64
    1: plane of code bit 5                                                    0.125
    2: plane of code bit 4                                                    0.125
    3: plane of code bits 3..0                                                0.5
    4: the source's own elements                                              2 or 4
Level l = 0..3 (2, 3, 4, 8 bits) needs records 0..l, level 4 (exact) needs record 4 alone.

Byte order inside a payload: csrc/ladder/layout.h and, for people, docs/format.md. This file holds the
decoder that is obviously right; the encoder is `comoe._C.encode_expert` (csrc/ladder/codec.cpp), and
error against plain rounding is in docs/codec.md. CPU only, synchronous, no accelerator involved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from comoe import _C

BLOCK_ROWS, BLOCK_COLS, GROUP_COLS = 16, 32, 128
NUM_RECORDS = 5
LEVEL_BITS = (2, 3, 4, 8)  # of levels 0..3
KNOWN_BITS = (0, *LEVEL_BITS)  # of a code after n planes
EXACT_LEVEL = 4
FP32, BF16, FP16, FP8, MXFP4 = range(5)
EXACT_BITS = (32, 16, 16, 8, 4)

_BLOCK_BYTES = (128, 64, 64, 256)  # of records 0..3, one 16 x 32 block
_PARAMS_BYTES = 32
_HEADER = np.dtype(
    [
        ("log2_min", "<f4"),
        ("log2_step", "<f4"),
        ("table2", "u1", 4),
        ("table3", "u1", 8),
        ("table4", "u1", 16),
        ("reserved", "u1", 28),
    ]
)


def _up(a: int, b: int) -> int:
    return -(-a // b) * b


@dataclass(frozen=True)
class CodedShape:
    """Layout of coded records over a list of matrices [rows, cols], as csrc/ladder/coded.h has it.

    A record holds planes first..end - 1 of the four (2, 1, 1, 4 bits); one with plane 0 has headers,
    biases and group parameters before them.
    """

    matrices: tuple[tuple[int, int], ...]
    biased: bool = False

    def tiles(self, m: int) -> tuple[int, int, int]:
        """Row tiles, column blocks and groups of matrix m."""
        rows, cols = self.matrices[m]
        return -(-rows // BLOCK_ROWS), -(-cols // BLOCK_COLS), -(-cols // GROUP_COLS)

    def blocks(self, m: int) -> int:
        tiles, col_blocks, _ = self.tiles(m)
        return tiles * col_blocks

    def bias_offset(self, m: int) -> int:
        return len(self.matrices) * _HEADER.itemsize + sum(
            _up(rows * 4, 64) for rows, _ in self.matrices[:m]
        )

    def params_offset(self, m: int) -> int:
        at = self.bias_offset(len(self.matrices) if self.biased else 0)
        return at + sum(self.tiles(i)[0] * self.tiles(i)[2] * _PARAMS_BYTES for i in range(m))

    def plane_offset(self, first: int, plane: int, m: int) -> int:
        """Where the blocks of matrix m in `plane` start, in a record that begins with plane `first`."""
        count = len(self.matrices)
        at = self.params_offset(count) if first == 0 else 0
        for p in range(first, plane):
            at = _up(at, _BLOCK_BYTES[p]) + sum(map(self.blocks, range(count))) * _BLOCK_BYTES[p]
        return _up(at, _BLOCK_BYTES[plane]) + sum(map(self.blocks, range(m))) * _BLOCK_BYTES[plane]

    def record_bytes(self, first: int, end: int) -> int:
        return self.plane_offset(first, end - 1, len(self.matrices))


@dataclass(frozen=True)
class Shape:
    """Geometry of an expert, as csrc/ladder/layout.h has it."""

    hidden: int
    intermediate: int
    gated: bool = True
    biased: bool = False
    exact_dtype: int = BF16

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        up, down = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        return (up, up, down) if self.gated else (up, down)

    @property
    def itemsize(self) -> int:
        """Bytes of a bias in the exact record."""
        return 2 if self.exact_dtype in (BF16, FP16) else 4

    @property
    def num_weights(self) -> int:
        return len(self.matrices) * self.hidden * self.intermediate

    @property
    def coded(self) -> CodedShape:
        """Layout of the records that hold codes."""
        return CodedShape(self.matrices, self.biased)

    def low_rank(self, ranks: Sequence[int]) -> CodedShape:
        """Layout of a low-rank record: factors V [rank, cols], U [rows, rank] of each matrix in turn."""
        factors = (
            ((rank, cols), (rows, rank))
            for rank, (rows, cols) in zip(ranks, self.matrices, strict=True)
        )
        return CodedShape(tuple(shape for pair in factors for shape in pair))

    def tiles(self, m: int) -> tuple[int, int, int]:
        return self.coded.tiles(m)

    def bias_offset(self, m: int) -> int:
        return self.coded.bias_offset(m)

    def exact_bias_offset(self, m: int) -> int:
        return sum(_up(rows * self.itemsize, 64) for rows, _ in self.matrices[:m])

    def exact_scales_bytes(self, m: int) -> int:
        tiles, blocks, groups = self.tiles(m)
        return tiles * {FP8: 4 * groups, MXFP4: 16 * blocks}.get(self.exact_dtype, 0)

    def exact_scales_offset(self, m: int) -> int:
        at = self.exact_bias_offset(len(self.matrices)) if self.biased else 0
        return at + sum(self.exact_scales_bytes(i) for i in range(m))

    def params_offset(self, m: int) -> int:
        return self.coded.params_offset(m)

    def block_bytes(self, record: int) -> int:
        if record == 4:
            return BLOCK_ROWS * BLOCK_COLS * EXACT_BITS[self.exact_dtype] // 8
        return _BLOCK_BYTES[record]

    def blocks_offset(self, record: int, m: int) -> int:
        if record < 4:
            return self.coded.plane_offset(record, record, m)
        at = _up(self.exact_scales_offset(len(self.matrices)), self.block_bytes(4))
        return at + sum(map(self.coded.blocks, range(m))) * self.block_bytes(4)

    def record_bytes(self, record: int) -> int:
        return self.blocks_offset(record, len(self.matrices))


def expert_bytes(shape: Shape, level: int) -> int:
    """Payload bytes of one expert that `level` needs, all parameters and padding of blocks included."""
    records = (4,) if level == EXACT_LEVEL else range(level + 1)
    return sum(shape.record_bytes(r) for r in records)


def _untile(blocks: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """[row tiles, col blocks, 16, 32] -> [rows, cols]."""
    tiles, col_blocks = blocks.shape[:2]
    whole = blocks.transpose(0, 2, 1, 3).reshape(tiles * BLOCK_ROWS, col_blocks * BLOCK_COLS)
    return whole[:rows, :cols]


def _blocks_of(quads: np.ndarray) -> np.ndarray:
    """[tiles, blocks, quad 8, lane 64] -> [tiles, blocks, 16, 32]: lane L of quad q is row L // 4, column 4 q + L % 4."""
    tiles, blocks = quads.shape[:2]
    return (
        quads.reshape(tiles, blocks, 8, BLOCK_ROWS, 4)
        .transpose(0, 1, 3, 2, 4)
        .reshape(tiles, blocks, 16, 32)
    )


# One plane of a code set: the payload that holds it, and the first plane of that record.
Planes = Sequence[tuple[np.ndarray, int]]


def ladder_planes(payloads: Sequence[np.ndarray], level: int) -> Planes:
    """Of records 0..level, which hold one plane each."""
    return [(payloads[r], r) for r in range(level + 1)]


def chain_planes(chain: Sequence[tuple[np.ndarray, int]]) -> Planes:
    """Of a chain of coded records: (payload, bits that it adds), the record of the headers first."""
    planes, known = [], 0
    for payload, bits in chain:
        first, end = KNOWN_BITS.index(known), KNOWN_BITS.index(known + bits)
        planes += [(payload, first)] * (end - first)
        known += bits
    return planes


def _plane(shape: CodedShape, planes: Planes, plane: int, m: int) -> np.ndarray:
    """The code bits of a plane, right-aligned: [tiles, blocks, quad 8, lane 64]."""
    tiles, blocks, _ = shape.tiles(m)
    payload, first = planes[plane]
    at = shape.plane_offset(first, plane, m)
    raw = payload[at : at + tiles * blocks * _BLOCK_BYTES[plane]].reshape(
        tiles, blocks, _BLOCK_BYTES[plane] // 64, 64
    )
    if plane == 0:  # vector v holds quads 4v..4v+3, two bits each
        return np.stack([raw[:, :, q // 4] >> (2 * (q % 4)) & 3 for q in range(8)], axis=2)
    if plane == 3:  # vector v holds quads 2v (low nibble) and 2v + 1
        return np.stack([raw[:, :, q // 2] >> (4 * (q % 2)) & 15 for q in range(8)], axis=2)
    return np.stack([raw[:, :, 0] >> q & 1 for q in range(8)], axis=2)


def codes_ref(shape: Shape, payloads: Sequence[np.ndarray], level: int, m: int) -> np.ndarray:
    """The upper bits of the codes of matrix m that `level` sees, right-aligned: uint8 [rows, cols]."""
    return _codes(shape.coded, ladder_planes(payloads, level), m)


def _codes(shape: CodedShape, planes: Planes, m: int) -> np.ndarray:
    code = np.zeros(1, np.uint8)
    for plane, bits in enumerate((2, 1, 1, 4)[: len(planes)]):
        code = code << bits | _plane(shape, planes, plane, m)
    return _untile(_blocks_of(code), *shape.matrices[m])


def decode_coded_ref(shape: CodedShape, planes: Planes, m: int) -> np.ndarray:
    """Matrix m of a code set of which `planes` are known, fp32 [rows, cols]."""
    rows, cols = shape.matrices[m]
    tiles, _, groups = shape.tiles(m)
    head = planes[0][0]
    header = head[m * _HEADER.itemsize : (m + 1) * _HEADER.itemsize].view(_HEADER)[0]
    at = shape.params_offset(m)
    params = head[at : at + tiles * groups * _PARAMS_BYTES].reshape(tiles, groups, 2, BLOCK_ROWS)
    per_row = params.transpose(2, 0, 3, 1).reshape(2, tiles * BLOCK_ROWS, groups)
    scale_q, zero = np.repeat(per_row, GROUP_COLS, axis=2)[:, :rows, :cols].astype(np.float32)
    scale = np.exp2(header["log2_min"] + header["log2_step"] * scale_q)
    code = _codes(shape, planes, m)
    bits = KNOWN_BITS[len(planes)]
    value = code if bits == 8 else header[f"table{bits}"][code]
    return scale * (value.astype(np.float32) - zero)


def low_rank_ref(
    shape: Shape, payload: np.ndarray, ranks: Sequence[int], m: int, bits: int = 8
) -> np.ndarray:
    """U V of matrix m of a low-rank record, fp32 [rows, cols]."""
    factors, planes = shape.low_rank(ranks), chain_planes([(payload, bits)])
    u, v = (decode_coded_ref(factors, planes, 2 * m + i) for i in (1, 0))
    return u @ v


def encode_low_rank(
    factors: Sequence[tuple[np.ndarray, np.ndarray]], bits: int = 8
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Payload of a low-rank record, and its ranks: factors (U [rows, rank], V [rank, cols]), float32,
    of each matrix of the expert in order. Singular values may sit in either; U * sqrt(s) and sqrt(s) * V
    use the codes best."""
    flat = [np.ascontiguousarray(f, np.float32) for u, v in factors for f in (v, u)]
    for i, (u, v) in enumerate(factors):
        if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[0]:
            raise ValueError(
                f"encode_low_rank: factors {i}: expected U [rows, rank] and V [rank, cols], "
                f"got {u.shape} and {v.shape}"
            )
    return _C.encode_coded(flat, [], bits), tuple(v.shape[0] for _, v in factors)


def encode_mean(output: np.ndarray) -> np.ndarray:
    """Payload of a mean record of output [H]: fp32, padded to a multiple of 64 bytes."""
    raw = np.ascontiguousarray(output, np.float32).view(np.uint8)
    return np.concatenate([raw, np.zeros(-len(raw) % 64, np.uint8)])


def decode_ref(shape: Shape, payloads: Sequence[np.ndarray], level: int, m: int) -> np.ndarray:
    """Matrix m at `level`, fp32 [rows, cols]; at EXACT_LEVEL the source's elements, uint16 unless fp32,
    and fp32 products of codes and scales.

    payloads: uint8 arrays indexed by record; only those that the level needs are read.
    """
    if level != EXACT_LEVEL:
        return decode_coded_ref(shape.coded, ladder_planes(payloads, level), m)
    rows, cols = shape.matrices[m]
    tiles, blocks, _ = shape.tiles(m)
    at = shape.blocks_offset(4, m)
    raw = payloads[4][at : at + tiles * blocks * shape.block_bytes(4)]
    if shape.exact_dtype in (FP8, MXFP4):
        return _decode_codes(shape, payloads[4], raw, m)
    if shape.exact_dtype == FP32:  # vector c, element row
        whole = raw.view("<f4").reshape(tiles, blocks, 32, 16).transpose(0, 1, 3, 2)
    else:  # vector p, element 2 * row + i = column 2 p + i
        whole = (
            raw.view("<u2")
            .reshape(tiles, blocks, 16, 16, 2)
            .transpose(0, 1, 3, 2, 4)
            .reshape(tiles, blocks, 16, 32)
        )
    return np.ascontiguousarray(_untile(whole, rows, cols))


def minifloat_ref(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """fp32 values of all codes of a small float with a sign and IEEE's bias, infinities apart."""
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    code = np.arange(2 ** (exponent_bits + mantissa_bits))
    exponent, mantissa = code // steps, code % steps
    normal = (1 + mantissa / steps) * 2.0 ** (exponent - bias)
    value = np.where(exponent == 0, mantissa / steps * 2.0 ** (1 - bias), normal)
    return np.concatenate([value, -value]).astype(np.float32)


def _decode_codes(shape: Shape, payload: np.ndarray, raw: np.ndarray, m: int) -> np.ndarray:
    """fp32 [rows, cols]: value of each code times its scale."""
    rows, cols = shape.matrices[m]
    tiles, blocks, groups = shape.tiles(m)
    at = shape.exact_scales_offset(m)
    scales = payload[at : at + shape.exact_scales_bytes(m)]
    if shape.exact_dtype == FP8:  # as 16-bit elements lie
        codes = raw.reshape(tiles, blocks, 16, 16, 2).transpose(0, 1, 3, 2, 4)
        value = minifloat_ref(4, 3)[codes]
        scale = scales.view("<f4").reshape(tiles, groups, 1)
        scale = np.broadcast_to(scale, (tiles, groups, 16)).transpose(0, 2, 1)
        per_scale = GROUP_COLS
    else:  # word 2 row + i of vector v, bits 4 j: column 2 (4 v + j) + i
        words = raw.view("<u2").reshape(tiles, blocks, 4, 16, 2)
        codes = np.stack([words >> 4 * j & 15 for j in range(4)], axis=3)
        value = minifloat_ref(2, 1)[codes.transpose(0, 1, 4, 2, 3, 5)]
        scale = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        scale = scale.reshape(tiles, blocks, 16).transpose(0, 2, 1)
        per_scale = BLOCK_COLS
    scale = scale.reshape(tiles * BLOCK_ROWS, -1).repeat(per_scale, axis=1)[:rows, :cols]
    return _untile(value.reshape(tiles, blocks, 16, 32), rows, cols) * scale


def bias_ref(shape: Shape, payloads: Sequence[np.ndarray], level: int, m: int) -> np.ndarray:
    """Bias of matrix m: fp32 [rows], or the source's elements at EXACT_LEVEL."""
    rows = shape.matrices[m][0]
    if level == EXACT_LEVEL:
        at = shape.exact_bias_offset(m)
        return payloads[4][at : at + rows * shape.itemsize].view(
            "<f4" if shape.itemsize == 4 else "<u2"
        )
    at = shape.bias_offset(m)
    return payloads[0][at : at + rows * 4].view("<f4")
