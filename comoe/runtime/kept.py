"""Tells the engine what its cache policy thinks that keeping each expert's records is worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from comoe import _C
from comoe.policy.cache import CachePolicy
from comoe.policy.predictor import RankChances

REFRESH = 64  # tokens
HELD = np.float32(3e38)  # above every policy's values


class Kept:
    """Of one model. What the plan holds is worth more than anything that a policy says.

    ids: int32 [E, R] of each layer, records of its experts, -1 for none.
    """

    def __init__(self, engine: _C.Engine, policy: CachePolicy, ids: Sequence[np.ndarray]):
        self._engine, self.policy, self._ids = engine, policy, ids
        self._chances = RankChances(len(ids))
        self._tokens = 0
        self._cached: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def hold(self, base: np.ndarray) -> None:
        """base: bool [ids], the records that are always in memory; the others are the policy's."""
        self._engine.set_value(np.flatnonzero(base).astype(np.int32), np.full(base.sum(), HELD))
        cached = []
        for ids in self._ids:
            experts, columns = np.nonzero((ids >= 0) & ~base[ids])
            mine = ids[experts, columns]
            order = np.argsort(mine, kind="stable")  # records of several experts: side by side
            unique, starts = np.unique(mine[order], return_index=True)
            cached.append((unique.astype(np.int32), experts[order], starts))
        self._cached = cached  # at once: a pass may be running
        for layer_idx in range(len(cached)):
            self._tell(layer_idx)

    def note(self, layer_idx: int, experts: np.ndarray, used_levels: np.ndarray) -> None:
        """A layer ran. experts: int64 [n], each once.  used_levels: int64 [n]."""
        self.policy.note(layer_idx, experts, np.ones(len(experts)), used_levels)
        self._tell(layer_idx)
        if layer_idx == len(self._ids) - 1:
            self._tokens += 1
            if self._tokens % REFRESH == 0:  # a policy may count from another origin by now
                for other in range(len(self._ids)):
                    self._tell(other)

    def predicted(self, layer_idx: int, ahead: int, experts: np.ndarray) -> None:
        """A layer that runs `ahead` layers from now will likely use experts int64 [n]."""
        chances = self._chances.of(layer_idx, ahead, experts.size)
        self.policy.predicted(layer_idx, experts, chances)
        self._tell(layer_idx)

    def judge(self, layer_idx: int, ahead: int, guess: np.ndarray, used: np.ndarray) -> None:
        """What was predicted of a layer, and what it used."""
        self._chances.note(layer_idx, ahead, guess, used)

    def _tell(self, layer_idx: int) -> None:
        if not self._cached:
            return  # no plan with a cache was made yet
        ids, experts, starts = self._cached[layer_idx]
        if ids.size:
            values = self.policy.values(layer_idx)[experts]
            # What several experts share is worth what it is to the one that values it most.
            self._engine.set_value(ids, np.maximum.reduceat(values, starts))
