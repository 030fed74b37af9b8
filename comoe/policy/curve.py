"""The planner of an aggregated store: for the pool's size, the best level of every expert as measured.

Aggregation writes a curve: for a series of sizes the levels that lose least (comoe/store/losses.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from comoe.policy.plan import EvenPlanner, Plan, Sizes, all_cached, require_room


@dataclass(frozen=True)
class Curve:
    """levels: uint8 [P, X], of each expert at each point, coarser points first.  loss: float32 [P],
    nats per token expected there."""

    levels: np.ndarray
    loss: np.ndarray


class CurvePlanner:
    """The finest point of the curve that fits the pool; above it, what is used climbs to the next one."""

    def __init__(self, curve: Curve):
        self._curve = curve
        self._totals: np.ndarray | None = None

    def least(self, sizes: Sizes, *, exact: bool) -> np.ndarray:
        return sizes.all_at(sizes.levels.exact) if exact else self._curve.levels[0]

    def plan(self, sizes: Sizes, pool_bytes: int, *, exact: bool) -> Plan:
        if exact or sizes.total(sizes.levels.exact) <= pool_bytes:
            return EvenPlanner().plan(sizes, pool_bytes, exact=True)
        totals = self._bytes(sizes)
        fitting = np.flatnonzero(totals <= pool_bytes)
        if not fitting.size:
            least = self._curve.levels[0]
            require_room(sizes, least, pool_bytes)
            loss = float(self._curve.loss[0])
            return all_cached(sizes, least, pool_bytes, loss)
        point = int(fitting[-1])
        levels = self._curve.levels[point]
        finer = self._curve.levels[min(point + 1, len(totals) - 1)]
        return Plan(
            sizes.levels,
            levels.astype(np.int8),
            levels,
            np.maximum(levels, finer),
            int(pool_bytes - totals[point]),
            pool_bytes,
            sizes.chosen(levels),
            loss=float(self._curve.loss[point]),
        )

    def _bytes(self, sizes: Sizes) -> np.ndarray:
        """int64 [P]: pages of the pool that each point takes. Nearly ascending: the curve counts payload."""
        if self._totals is None:
            self._totals = np.array([sizes.total(levels) for levels in self._curve.levels])
        return self._totals
