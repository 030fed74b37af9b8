"""An independent writer and reader of the ladder's payloads in numpy, for tests: random codes, scales and
tables instead of encoded weights, so that every field matters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from comoe import _C
from comoe_kernels.unpack import EXACT_DTYPES, paged_expert


def pad_to(a: np.ndarray, multiple: int) -> np.ndarray:
    return np.concatenate([a, np.zeros(-len(a) % multiple, np.uint8)])


def blocks_of(matrix: np.ndarray) -> np.ndarray:
    """[rows, cols] -> [row tiles * column blocks, 16, 32], padded with zeros."""
    rows, cols = matrix.shape
    padded = np.zeros((-(-rows // 16) * 16, -(-cols // 32) * 32), matrix.dtype)
    padded[:rows, :cols] = matrix
    tiles = padded.reshape(padded.shape[0] // 16, 16, padded.shape[1] // 32, 32).transpose(
        0, 2, 1, 3
    )
    return tiles.reshape(-1, 16, 32)


def quads_of(codes: np.ndarray) -> np.ndarray:
    """[blocks, 16, 32] -> [blocks, 8 quads, 64 lanes]."""
    return codes.reshape(-1, 16, 8, 4).transpose(0, 2, 1, 3).reshape(-1, 8, 64)


def pack_planes(codes: np.ndarray) -> list[np.ndarray]:
    """uint8 codes [rows, cols] -> the bytes of planes 2, 1, 1, 4."""
    q = quads_of(blocks_of(codes)).astype(np.uint8)
    two = np.zeros((len(q), 2, 64), np.uint8)
    ones = [np.zeros((len(q), 64), np.uint8) for _ in range(2)]
    four = np.zeros((len(q), 4, 64), np.uint8)
    for quad in range(8):
        code = q[:, quad]
        two[:, quad // 4] |= (code >> 6) << (2 * (quad % 4))
        ones[0] |= (code >> 5 & 1) << quad
        ones[1] |= (code >> 4 & 1) << quad
        four[:, quad // 2] |= (code & 15) << (4 * (quad % 2))
    return [two.reshape(-1), ones[0].reshape(-1), ones[1].reshape(-1), four.reshape(-1)]


def pack_exact(bits: np.ndarray) -> np.ndarray:
    blocks = blocks_of(bits)
    if bits.dtype == np.uint32:
        lanes = blocks.transpose(0, 2, 1)  # [block, column, row]
    else:
        lanes = blocks.reshape(-1, 16, 16, 2).transpose(0, 2, 1, 3)  # [block, pair, row, i]
    return np.ascontiguousarray(lanes).reshape(-1).view(np.uint8)


@dataclass
class LadderExpert:
    hidden: int
    intermediate: int
    gated: bool
    biased: bool
    exact_dtype: torch.dtype
    payloads: list[np.ndarray]
    dense: list[list[torch.Tensor]]  # [level][matrix] float32
    biases: list[list[torch.Tensor]]  # [level][matrix] float32

    def paged(self, level: int, *, page_bytes: int = 4096, order=None):
        needed = [4] if level == 4 else range(level + 1)
        return paged_expert(
            self.hidden,
            self.intermediate,
            gated=self.gated,
            biased=self.biased,
            exact_dtype=self.exact_dtype,
            level=level,
            payloads={r: self.payloads[r] for r in needed},
            page_bytes=page_bytes,
            order=order,
        )


def random_codes(
    rng: np.random.Generator,
    rows: int,
    cols: int,
    kind: torch.dtype | str,
    extremes: float = 0.1,
) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """(codes, scales, float32 weights) of a matrix as encode_expert takes it; extremes: the share of
    scales that make weights very small or very large."""
    if kind == "mxfp4":
        codes = rng.integers(0, 16, (rows, cols), dtype=np.uint8)
        scales = rng.integers(115, 125, (rows, -(-cols // 32)), dtype=np.uint8)
        odd = rng.random(scales.shape) < extremes
        scales[odd] = rng.integers(0, 253, odd.sum())
        values = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        weight = np.concatenate([values, -values])[codes]
        weight = (
            weight * np.ldexp(np.float32(1), scales.astype(np.int32) - 127).repeat(32, 1)[:, :cols]
        )
        return codes[:, ::2] | codes[:, 1::2] << 4, scales, torch.from_numpy(weight)
    codes = rng.integers(0, 256, (rows, cols), dtype=np.uint8)
    codes[codes & 127 == 127] ^= 1  # NaN
    scales = rng.standard_normal((-(-rows // 16), -(-cols // 128))).astype(np.float32) / 1000
    scales[rng.random(scales.shape) < extremes] *= np.float32(1e-36)  # products are subnormal
    value = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    scale = torch.from_numpy(scales.repeat(16, 0).repeat(128, 1)[:rows, :cols])
    return codes, scales, value * scale


def coded_expert(
    rng: np.random.Generator,
    hidden: int,
    intermediate: int,
    kind: torch.dtype | str,
    *,
    gated: bool = True,
    biased: bool = False,
    extremes: float = 0.1,
) -> LadderExpert:
    """An expert whose exact record holds codes; payloads by the encoder, weights by torch."""
    shapes = [(intermediate, hidden)] * (2 if gated else 1) + [(hidden, intermediate)]
    drawn = (random_codes(rng, *shape, kind, extremes) for shape in shapes)
    codes, scales, dense = zip(*drawn, strict=True)
    biases = [rng.standard_normal(rows).astype(np.float32) for rows, _ in shapes] if biased else []
    payloads = _C.encode_expert(list(codes), biases, EXACT_DTYPES[kind], gated, None, list(scales))
    return LadderExpert(
        hidden,
        intermediate,
        gated,
        biased,
        kind,
        payloads,
        [[]] * 4 + [list(dense)],
        [[]] * 4 + [[torch.from_numpy(b) for b in biases]],
    )


def random_expert(
    rng: np.random.Generator,
    hidden: int,
    intermediate: int,
    *,
    gated: bool = True,
    biased: bool = False,
    exact_dtype: torch.dtype = torch.bfloat16,
) -> LadderExpert:
    shapes = [(intermediate, hidden)] * (2 if gated else 1) + [(hidden, intermediate)]
    headers, params, planes, exact = [], [], [[], [], [], []], []
    bias32, bias_exact = [], []
    dense = [[] for _ in range(5)]
    biases = [[] for _ in range(5)]
    for rows, cols in shapes:
        codes = rng.integers(0, 256, (rows, cols), dtype=np.uint8)
        tiles, groups = -(-rows // 16), -(-cols // 128)
        log2_min, log2_step = np.float32(-13.0 - rng.random()), np.float32(0.01)
        scale_q = rng.integers(0, 256, (tiles * 16, groups), dtype=np.uint8)
        zero_q = rng.integers(96, 160, (tiles * 16, groups), dtype=np.uint8)
        tables = [np.sort(rng.integers(0, 256, 1 << b).astype(np.uint8)) for b in (2, 3, 4)]
        header = np.concatenate(
            [np.array([log2_min, log2_step], np.float32).view(np.uint8), *tables]
        )
        headers.append(pad_to(header, 64))
        both = np.stack([scale_q, zero_q])  # [2, tiles * 16, groups] -> [tiles, groups, 2, 16]
        params.append(both.reshape(2, tiles, 16, groups).transpose(1, 3, 0, 2).reshape(-1))
        for plane, packed in zip(planes, pack_planes(codes), strict=True):
            plane.append(packed)
        scale = np.exp2(np.float64(log2_min) + np.float64(log2_step) * scale_q)[:rows].repeat(
            128, 1
        )[:, :cols]
        zero = zero_q[:rows].astype(np.float64).repeat(128, 1)[:, :cols]
        for level, bits in enumerate((2, 3, 4, 8)):
            value = codes if bits == 8 else tables[level][codes >> (8 - bits)]
            dense[level].append(torch.from_numpy((scale * (value - zero)).astype(np.float32)))
        weight = torch.from_numpy(rng.standard_normal((rows, cols)).astype(np.float32) / cols**0.5)
        weight = weight.to(exact_dtype)
        dense[4].append(weight.float())
        exact.append(
            pack_exact(weight.view(torch.uint32 if weight.itemsize == 4 else torch.uint16).numpy())
        )
        bias = torch.from_numpy(rng.standard_normal(rows).astype(np.float32)).to(exact_dtype)
        for level in range(5):
            biases[level].append(bias.float())
        bias32.append(pad_to(bias.float().numpy().view(np.uint8), 64))
        bias_exact.append(pad_to(bias.view(torch.uint8).numpy(), 64))

    head = np.concatenate(headers + (bias32 if biased else []) + params)
    payloads = [np.concatenate([pad_to(head, 128), *planes[0]])]
    payloads += [np.concatenate(planes[r]) for r in (1, 2, 3)]
    block_bytes = 512 * exact_dtype.itemsize
    payloads.append(
        np.concatenate([pad_to(np.concatenate(bias_exact), block_bytes), *exact])
        if biased
        else np.concatenate(exact)
    )
    return LadderExpert(
        hidden,
        intermediate,
        gated,
        biased,
        exact_dtype,
        payloads,
        dense,
        biases if biased else [[]] * 5,
    )
