"""Splitting the experts of one layer into what they share and what each has of its own.

    f_e  ~  base + planes of the residual             `base_of`, `residual`, `coded`
    f_e  ~  base + U_e V_e, nested by rank            `base_of`, `low_rank`
    f_e  ~  base + the largest tenth of the delta     `base_of`, `pruned`
    f_e  ~  its mean output                           LayerStatistics.mean_output

Pure functions. Members of a cluster take the order of neurons of its base, which leaves their functions as
they are. Matrices are [gate,] up, down; H hidden, I intermediate, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from comoe import _C
from comoe.aggregate.errors import AggregateError
from comoe.aggregate.experts import Expert, Matrices
from comoe.aggregate.merging import aligned, averaged
from comoe.aggregate.statistics import LayerStatistics
from comoe_kernels.ladder_codec import BLOCK_COLS, BLOCK_ROWS, GROUP_COLS, LEVEL_BITS
from comoe_kernels.unpack import paged_expert, unpack

RANK_STEP = 16  # ranks are multiples of it, since the kernels work in blocks of 16 rows
FLOAT32 = 0  # the codec's number for the source's type


@dataclass(frozen=True)
class Base:
    """What a cluster shares, and its members with their neurons in the base's order."""

    expert: Expert
    members: dict[int, Expert]


def base_of(statistics: LayerStatistics, group: Sequence[int], shares: Sequence[float]) -> Base:
    """The members' mean, weighted by `shares` (as D2-MoE, arXiv 2502.17298, weights by Fisher information),
    after their neurons were aligned with the member of the largest share."""
    experts = [statistics.weights.expert(statistics.layer_idx, e) for e in group]
    reference = experts[int(np.argmax(shares))]
    found = [e if e is reference else aligned(e, reference) for e in experts]
    return Base(averaged(found, shares), dict(zip(map(int, group), found, strict=True)))


def residual(expert: Expert, base: Expert) -> Expert:
    """expert - base; both with neurons in one order."""
    return _combined(expert, base, -1.0)


def added(base: Expert, delta: Expert) -> Expert:
    return _combined(base, delta, 1.0)


def _combined(a: Expert, b: Expert, sign: float) -> Expert:
    return Expert(
        tuple(x + sign * y for x, y in zip(a.matrices, b.matrices, strict=True)),
        tuple(x + sign * y for x, y in zip(a.biases, b.biases, strict=True)),
    )


def coded(expert: Expert, level: int) -> Expert:
    """The expert (or a residual) as the ladder's planes hold it at a level: 0..3 are 2, 3, 4 and 8 bits.
    Biases stay as they are."""
    if not 0 <= level < len(LEVEL_BITS):
        raise AggregateError(f"coded: level: expected 0 to {len(LEVEL_BITS) - 1}, got {level}")
    hidden, inter = expert.matrices[-1].shape
    gated = len(expert.matrices) == 3
    records = _C.encode_expert(
        [np.ascontiguousarray(m.numpy()) for m in expert.matrices], [], FLOAT32, gated
    )
    paged = paged_expert(
        hidden,
        inter,
        gated=gated,
        biased=False,
        exact_dtype=torch.float32,
        level=level,
        payloads=dict(enumerate(records[: level + 1])),
    )
    matrices = tuple(unpack(paged, m, torch.float32) for m in range(len(expert.matrices)))
    return Expert(matrices, expert.biases)


# ---- low rank ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRank:
    """U V for each matrix, ordered by singular directions: the first r of them are the best of rank r."""

    up: Matrices  # [rows, R]
    down: Matrices  # [R, cols]
    biases: Matrices = ()  # kept whole

    @property
    def rank(self) -> int:
        return self.up[0].shape[1]

    def delta(self, rank: int) -> Expert:
        """The dense matrices of a prefix."""
        if not 1 <= rank <= self.rank:
            raise AggregateError(f"low rank: rank: expected 1 to {self.rank}, got {rank}")
        pairs = zip(self.up, self.down, strict=True)
        return Expert(tuple(u[:, :rank] @ v[:rank] for u, v in pairs), self.biases)


def low_rank(
    delta: Expert, moments: tuple[torch.Tensor, torch.Tensor], rank: int, *, rounds: bool = True
) -> LowRank:
    """Best rank-r approximation of each matrix where its inputs lie: with moment S S^T = E x x^T, the SVD of
    delta S is cut off and S taken out again (activation whitening: SVD-LLM, arXiv 2403.07378; D2-MoE).

    moments: of the expert's inputs [H, H] and of what its down projection reads [I, I] (in the neuron order
    of `delta`). rank: a multiple of 16, at most the smaller side of the matrices.
    rounds: factors as 8-bit codes hold them. Singular values go into V, whose rows have scales of their own.
    """
    hidden, inter = delta.matrices[-1].shape
    if rank < RANK_STEP or rank % RANK_STEP or rank > min(hidden, inter):
        raise AggregateError(
            f"low_rank: rank: expected a multiple of {RANK_STEP} up to {min(hidden, inter)}, the smaller side of "
            f"matrices [{inter}, {hidden}], got {rank}; a larger one costs more bytes than the matrix"
        )
    roots = [torch.linalg.cholesky(m.double()) for m in moments]
    ups, downs = [], []
    for i, matrix in enumerate(delta.matrices):
        root = roots[1] if i == len(delta.matrices) - 1 else roots[0]
        u, s, vh = torch.linalg.svd(matrix.double() @ root, full_matrices=False)
        v = torch.linalg.solve_triangular(root, s[:rank, None] * vh[:rank], upper=False, left=False)
        ups.append(u[:, :rank].float())
        downs.append(v.float())
    if rounds:
        ups = [torch.cat([round8(part) for part in u.split(RANK_STEP, 1)], 1) for u in ups]
        downs = [round8(v) for v in downs]
    return LowRank(tuple(ups), tuple(downs), delta.biases)


def round8(matrix: torch.Tensor) -> torch.Tensor:
    """[rows, cols] rounded to 256 steps over the range of each group of 128 columns of a row, 0 among them,
    as the codec's 8 bits do."""
    groups = matrix.split(GROUP_COLS, 1)
    return torch.cat([_round_group(group) for group in groups], 1)


def _round_group(x: torch.Tensor) -> torch.Tensor:
    low = x.amin(1, keepdim=True).clamp_max(0)
    step = (x.amax(1, keepdim=True).clamp_min(0) - low) / 255
    step = torch.where(step > 0, step, torch.ones(()))
    zero = (-low / step).round()
    return ((x / step).round() + zero).clamp(0, 255).sub(zero) * step


def coded_bytes(rows: int, cols: int, bits: int) -> int:
    """Bytes of a matrix in planes of `bits`, group parameters and padding of blocks included."""
    tiles, blocks = -(-rows // BLOCK_ROWS), -(-cols // BLOCK_COLS)
    params = tiles * -(-cols // GROUP_COLS) * 2 * BLOCK_ROWS
    return tiles * blocks * BLOCK_ROWS * BLOCK_COLS * bits // 8 + params


def low_rank_bytes(hidden: int, intermediate: int, num_matrices: int, rank: int) -> int:
    """Bytes of the 8-bit factors of one expert at a rank."""
    up = coded_bytes(intermediate, rank, 8) + coded_bytes(rank, hidden, 8)
    down = coded_bytes(hidden, rank, 8) + coded_bytes(rank, intermediate, 8)
    return (num_matrices - 1) * up + down


# ---- sparse deltas -------------------------------------------------------------------------------------


def pruned(delta: Expert, kept: float = 0.1) -> Expert:
    """The `kept` share of largest magnitudes of the whole delta, the rest 0: E-WEMoE (arXiv 2410.21804)."""
    if not 0 < kept <= 1:
        raise AggregateError(f"pruned: kept: expected more than 0 and at most 1, got {kept}")
    flat = torch.cat([m.abs().flatten() for m in delta.matrices])
    count = max(1, round(kept * flat.numel()))
    least = flat.kthvalue(flat.numel() - count + 1).values
    return Expert(tuple(torch.where(m.abs() >= least, m, 0) for m in delta.matrices), delta.biases)


def pruned_bytes(num_weights: int, kept: float = 0.1) -> int:
    """Bytes of a delta of 16-bit values and a bit per weight that says where they are."""
    return round(kept * num_weights) * 2 + -(-num_weights // 8)
