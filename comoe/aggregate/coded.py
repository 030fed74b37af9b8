"""Experts as ladder codes that something other than the packer chose: rounding, distillation.

A `CodedMatrix` holds what record 0..3 say of one matrix [rows, cols], cols along the input:

    weight = exp2(log2_min + log2_step * scale_q) * (table_b[code >> (8 - b)] - zero)

`to_payloads` writes the records of an expert from its coded matrices, byte for byte as
docs/format.md has them, and `from_payloads` reads them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from comoe_kernels.ladder_codec import _HEADER as HEADER
from comoe_kernels.ladder_codec import (
    BLOCK_COLS,
    BLOCK_ROWS,
    GROUP_COLS,
    LEVEL_BITS,
    Shape,
    codes_ref,
)

LARGEST_SPAN = 16.0  # octaves between the scales of one matrix, as the packer has it
LEAST_LOG2_SCALE = -120.0


@dataclass
class CodedMatrix:
    """One matrix [rows, cols] in codes; groups of 128 columns of a row have a scale and a zero."""

    codes: np.ndarray  # uint8 [rows, cols]; of a set of b bits only the upper b bits mean anything
    scale_q: np.ndarray  # uint8 [rows, groups]
    zero: np.ndarray  # uint8 [rows, groups]
    log2_min: float
    log2_step: float
    tables: dict[int, np.ndarray] = field(default_factory=dict)  # bits -> uint8 [2**bits]

    @property
    def scale(self) -> np.ndarray:
        """float32 [rows, groups]"""
        return scale_of(self.log2_min, self.log2_step, self.scale_q)

    def value(self, bits: int) -> np.ndarray:
        """What codes stand for before zero and scale, float32 [rows, cols]."""
        if bits == 8:
            return self.codes.astype(np.float32)
        return self.tables[bits].astype(np.float32)[self.codes >> (8 - bits)]

    def decode(self, bits: int) -> np.ndarray:
        """The matrix at 2, 3, 4 or 8 bits, float32 [rows, cols]."""
        cols = self.codes.shape[1]
        spread = [np.repeat(a, GROUP_COLS, axis=1)[:, :cols] for a in (self.scale, self.zero)]
        return spread[0] * (self.value(bits) - spread[1].astype(np.float32))


def scale_of(log2_min: float, log2_step: float, scale_q: np.ndarray) -> np.ndarray:
    return np.exp2(np.float32(log2_min) + np.float32(log2_step) * scale_q.astype(np.float32))


def scale_grid(scale: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(log2_min, log2_step, scale_q uint8) whose scales are nearest to `scale` (in the logarithm).

    The grid spans `scale`, at most 16 octaves down from the largest; what is under it takes its foot.
    """
    log2 = np.log2(np.maximum(scale.astype(np.float64), 2.0**LEAST_LOG2_SCALE))
    most = float(log2.max())
    least = max(float(log2.min()), most - LARGEST_SPAN)
    step = np.float32((most - least) / 255)
    least = np.float32(least)
    if step == 0:
        return float(least), 0.0, np.zeros(scale.shape, np.uint8)
    q = np.clip(np.rint((log2 - least) / step), 0, 255)
    return float(least), float(step), q.astype(np.uint8)


def to_payloads(
    shape: Shape,
    matrices: Sequence[CodedMatrix],
    biases: Sequence[np.ndarray] = (),
    *,
    bits: int = 8,
) -> list[np.ndarray]:
    """Payloads of the plane records that `bits` needs: 1, 2, 3 or 4 of them for 2, 3, 4 or 8 bits.

    biases: float [rows] of each matrix if shape.biased.  Tables that a matrix does not have are zeros.
    """
    _check(shape, matrices, biases, bits)
    payloads = [
        np.zeros(shape.record_bytes(r), np.uint8) for r in range(LEVEL_BITS.index(bits) + 1)
    ]
    for m, matrix in enumerate(matrices):
        tiles, blocks, groups = shape.tiles(m)
        header = np.zeros((), HEADER)
        header["log2_min"], header["log2_step"] = matrix.log2_min, matrix.log2_step
        for b, table in matrix.tables.items():
            header[f"table{b}"] = table
        payloads[0][m * HEADER.itemsize : (m + 1) * HEADER.itemsize] = np.frombuffer(
            header.tobytes(), np.uint8
        )
        params = np.zeros((2, tiles * BLOCK_ROWS, groups), np.uint8)
        params[:, : matrix.codes.shape[0]] = matrix.scale_q, matrix.zero
        params = params.reshape(2, tiles, BLOCK_ROWS, groups).transpose(1, 3, 0, 2)
        at = shape.params_offset(m)
        payloads[0][at : at + params.size] = params.reshape(-1)
        quads = _quads(matrix.codes, tiles, blocks)
        for record, payload in enumerate(payloads):
            plane = _plane_bytes(quads, record)
            at = shape.blocks_offset(record, m)
            payload[at : at + plane.size] = plane.reshape(-1)
    for m, bias in enumerate(biases):
        raw = np.ascontiguousarray(bias, "<f4").view(np.uint8)
        payloads[0][shape.bias_offset(m) : shape.bias_offset(m) + raw.size] = raw
    return payloads


def from_payloads(shape: Shape, payloads: Sequence[np.ndarray], *, bits: int) -> list[CodedMatrix]:
    """The coded matrices of an expert from its plane records; codes of a set of fewer than 8 bits have
    zeros below."""
    matrices = []
    for m, (rows, _) in enumerate(shape.matrices):
        tiles, _, groups = shape.tiles(m)
        header = payloads[0][m * HEADER.itemsize : (m + 1) * HEADER.itemsize].view(HEADER)[0]
        at = shape.params_offset(m)
        params = payloads[0][at : at + tiles * groups * 2 * BLOCK_ROWS]
        params = params.reshape(tiles, groups, 2, BLOCK_ROWS).transpose(2, 0, 3, 1)
        scale_q, zero = params.reshape(2, tiles * BLOCK_ROWS, groups)[:, :rows]
        codes = codes_ref(shape, payloads, LEVEL_BITS.index(bits), m) << (8 - bits)
        matrices.append(
            CodedMatrix(
                np.ascontiguousarray(codes),
                scale_q.copy(),
                zero.copy(),
                float(header["log2_min"]),
                float(header["log2_step"]),
                {b: header[f"table{b}"].copy() for b in (2, 3, 4)},
            )
        )
    return matrices


def _quads(codes: np.ndarray, tiles: int, blocks: int) -> np.ndarray:
    """[rows, cols] -> [tiles, blocks, quad 8, lane 64]; lane L of quad q is row L // 4, column 4 q + L % 4."""
    whole = np.zeros((tiles * BLOCK_ROWS, blocks * BLOCK_COLS), np.uint8)
    whole[: codes.shape[0], : codes.shape[1]] = codes
    split = whole.reshape(tiles, BLOCK_ROWS, blocks, 8, 4).transpose(0, 2, 3, 1, 4)
    return split.reshape(tiles, blocks, 8, 4 * BLOCK_ROWS)


def _plane_bytes(quads: np.ndarray, record: int) -> np.ndarray:
    """The bytes of one plane, [tiles, blocks, vector, lane 64]."""
    tiles, blocks = quads.shape[:2]
    if record == 0:  # vector v holds quads 4 v..4 v + 3, two bits each
        two = (quads >> 6).reshape(tiles, blocks, 2, 4, 64)
        return two[..., 0, :] | two[..., 1, :] << 2 | two[..., 2, :] << 4 | two[..., 3, :] << 6
    if record == 3:  # vector v holds quads 2 v (low nibble) and 2 v + 1
        low = (quads & 15).reshape(tiles, blocks, 4, 2, 64)
        return low[..., 0, :] | low[..., 1, :] << 4
    bit = quads >> (6 - record) & 1
    return np.bitwise_or.reduce(bit << np.arange(8, dtype=np.uint8)[:, None], axis=2)


def _check(shape: Shape, matrices, biases, bits: int) -> None:
    if bits not in LEVEL_BITS:
        raise ValueError(f"to_payloads: bits: expected one of {LEVEL_BITS}, got {bits}")
    if len(matrices) != len(shape.matrices) or len(biases) != shape.biased * len(matrices):
        raise ValueError(
            f"to_payloads: expected {len(shape.matrices)} matrices and "
            f"{shape.biased * len(shape.matrices)} biases, got {len(matrices)} and {len(biases)}"
        )
    for m, (matrix, (rows, cols)) in enumerate(zip(matrices, shape.matrices, strict=True)):
        groups = (rows, shape.tiles(m)[2])
        got = matrix.codes.shape, matrix.scale_q.shape, matrix.zero.shape
        if got != ((rows, cols), groups, groups):
            raise ValueError(
                f"to_payloads: matrix {m}: expected codes {[rows, cols]}, scale_q and zero "
                f"{list(groups)}, got {[list(s) for s in got]}"
            )
