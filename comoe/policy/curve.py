"""The planner of an aggregated store: for the pool's size, the best level of every expert as measured.

Aggregation writes a curve: for a series of sizes the levels that lose least (comoe/store/losses.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from comoe.policy.plan import EvenPlanner, Plan, Sizes, require_room


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
        self._totals: dict[int, int] = {}

    def least(self, sizes: Sizes, *, exact: bool) -> np.ndarray:
        return sizes.all_at(sizes.levels.exact) if exact else self._curve.levels[0]

    def plan(self, sizes: Sizes, pool_bytes: int, *, exact: bool) -> Plan:
        if exact or sizes.total(sizes.levels.exact) <= pool_bytes:
            return EvenPlanner().plan(sizes, pool_bytes, exact=True)
        point = self._finest(sizes, pool_bytes)
        if point < 0:
            least = self._curve.levels[0]
            require_room(sizes, least, pool_bytes)
            loss = float(self._curve.loss[0])
            return Plan(sizes.levels, least, least, False, pool_bytes, pool_bytes, loss)
        levels = self._curve.levels[point]
        finer = self._curve.levels[min(point + 1, len(self._curve.levels) - 1)]
        return Plan(
            sizes.levels,
            levels,
            np.maximum(levels, finer),
            True,
            pool_bytes - self._total(sizes, point),
            pool_bytes,
            float(self._curve.loss[point]),
        )

    def _finest(self, sizes: Sizes, pool_bytes: int) -> int:
        """Points need more and more bytes, so it is found by halving; -1 if not even the first fits."""
        low, high = -1, len(self._curve.levels)
        while high - low > 1:
            middle = (low + high) // 2
            if self._total(sizes, middle) <= pool_bytes:
                low = middle
            else:
                high = middle
        return low

    def _total(self, sizes: Sizes, point: int) -> int:
        if point not in self._totals:
            self._totals[point] = sizes.total(self._curve.levels[point])
        return self._totals[point]
