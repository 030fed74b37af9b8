"""Rungs on what the experts of a layer share: base + residual in codes, base + low-rank delta.

    base.2c     base (4 bits, one for the layer) + 2-bit codes of expert - base     shared planes, own plane
    base.lr     base + U V in 8 bits, whitened by the inputs' second moments        shared planes, low rank

Both stand on the same base, which is charged once. See comoe/aggregate/decompose.py for the methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from comoe.aggregate import decompose
from comoe.aggregate.candidates import (
    FIRST_ADDED,
    PLANES,
    CodedSet,
    LayerMenu,
    Rung,
    coded_set,
    mask_of,
    place,
)
from comoe.aggregate.experts import Expert
from comoe.aggregate.rounding import shape_of
from comoe.aggregate.statistics import LayerStatistics
from comoe.store import AddedRecord
from comoe.store import format as fmt
from comoe_kernels.ladder_codec import encode_low_rank, low_rank_ref

LOW_RANK_BITS = 8
Moments = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Based:
    """base_bits, residual_bits: of the codes. rank: of the delta, a multiple of 16; 0: `usual_rank`."""

    base_bits: int = 4
    residual_bits: int = 2
    rank: int = 0

    @property
    def places(self) -> int:
        return len(PLANES[self.base_bits]) + len(PLANES[self.residual_bits]) + 1

    def add(self, menu: LayerMenu, statistics: LayerStatistics, first: int) -> None:
        experts = range(statistics.spec.num_experts)
        base = decompose.base_of(statistics, experts, statistics.use)
        moments = [statistics.second_moments(e, base.members[e]) for e in experts]
        held = coded_set(base.expert, _mean_moments(moments, statistics.use), self.base_bits)
        deltas = [decompose.residual(base.members[e], held.expert) for e in experts]
        for expert in experts:
            place(menu, expert, first, held, self.base_bits, group=0)
        # One object, so that whoever counts bytes knows that both rungs need the same base.
        shared_bytes = np.array([held.nbytes], np.int64)
        planes = len(PLANES[self.base_bits])
        base_mask, at = mask_of(first, planes), first + planes
        rung = self._residuals(menu, held, deltas, moments, at)
        rung = replace(rung, mask=rung.mask | base_mask)
        at += len(PLANES[self.residual_bits])
        delta = self._low_rank(menu, statistics, held, deltas, moments, at)
        delta = replace(delta, mask=delta.mask | base_mask)
        for found in (rung, delta):
            shared = np.where(found.own >= 0, 0, -1)
            menu.rungs.append(replace(found, shared=shared, shared_bytes=shared_bytes))

    def _residuals(
        self,
        menu: LayerMenu,
        held: CodedSet,
        deltas: Sequence[Expert],
        moments: Sequence[Moments],
        at: int,
    ) -> Rung:
        sets = [coded_set(d, m, self.residual_bits) for d, m in zip(deltas, moments, strict=True)]
        for expert, found in enumerate(sets):
            place(menu, expert, at, found, self.residual_bits)
        return Rung(
            f"base.{self.residual_bits}c",
            mask_of(at, len(PLANES[self.residual_bits])),
            np.array([s.nbytes for s in sets], np.int64),
            lambda e: decompose.added(held.expert, sets[e].expert),
            kind="residual",
        )

    def _low_rank(
        self,
        menu: LayerMenu,
        statistics: LayerStatistics,
        held: CodedSet,
        deltas: Sequence[Expert],
        moments: Sequence[Moments],
        at: int,
    ) -> Rung:
        spec = statistics.spec
        own = np.full(spec.num_experts, -1)
        rank = self.rank or usual_rank(spec.hidden, spec.intermediate)
        found: list[Expert] = []
        # Where 16 is more than the matrices' own rank there is no such rung.
        for expert, delta in enumerate(deltas if rank else ()):
            factors = decompose.low_rank(delta, moments[expert], rank, rounds=False)
            pairs = [(u.numpy(), v.numpy()) for u, v in zip(factors.up, factors.down, strict=True)]
            payload, ranks = encode_low_rank(pairs, LOW_RANK_BITS)
            menu.records[expert][at - FIRST_ADDED] = AddedRecord(
                fmt.LOW_RANK, LOW_RANK_BITS, at - len(PLANES[self.residual_bits]) - 1,
                ranks=ranks, payload=payload,
            )  # fmt: skip
            own[expert] = len(payload)
            found.append(_low_rank_expert(delta, payload, ranks))
        return Rung(
            "base.lr",
            1 << at,
            own,
            lambda e: decompose.added(held.expert, found[e]),
            kind="low rank",
        )


def usual_rank(hidden: int, intermediate: int) -> int:
    """The multiple of 16 whose 8-bit factors take about half the bytes of 2-bit codes; 0 if matrices are
    narrower than 16."""
    step = decompose.RANK_STEP
    if min(hidden, intermediate) < step:
        return 0
    return max(hidden * intermediate // (8 * (hidden + intermediate)) // step * step, step)


def _low_rank_expert(delta: Expert, payload: np.ndarray, ranks: tuple[int, ...]) -> Expert:
    """The matrices that a low-rank record holds. It has no biases, so those of the base stay."""
    shape = shape_of(delta.matrices, biased=bool(delta.biases))
    matrices = [
        low_rank_ref(shape, payload, ranks, m, LOW_RANK_BITS) for m in range(len(delta.matrices))
    ]
    return Expert(
        tuple(torch.from_numpy(m) for m in matrices),
        tuple(torch.zeros_like(b) for b in delta.biases),
    )


def _mean_moments(moments: Sequence[Moments], use: np.ndarray) -> Moments:
    """Of all experts, weighted by their use."""
    shares = np.maximum(use, 1e-9) / np.maximum(use, 1e-9).sum()
    return tuple(
        sum(float(s) * pair[i] for s, pair in zip(shares, moments, strict=True)) for i in range(2)
    )
