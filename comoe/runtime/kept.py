"""Tells the engine what keeping each expert's records is worth."""

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

    policy: the native half, which runs NextUse itself; or another policy, which is told what happens.
    ids: int32 [E, R] of each layer, records of its experts, -1 for none.
    """

    def __init__(
        self, engine: _C.Engine, policy: CachePolicy | _C.MoePolicy, ids: Sequence[np.ndarray]
    ):
        self._engine, self._policy, self._ids = engine, policy, ids
        self.watches = not isinstance(
            policy, _C.MoePolicy
        )  # whether note and predicted are to be called
        self._chances = RankChances(len(ids))
        self._predicted: dict[
            int, tuple[int, np.ndarray]
        ] = {}  # by layer: seen from where, experts
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
        for layer_idx, (ids, experts, starts) in enumerate(cached):
            if self.watches:
                self._tell(layer_idx)
            else:
                offsets = np.append(starts, len(experts)).astype(np.int32)
                self._policy.hold(layer_idx, ids, offsets, experts.astype(np.int32))

    def note(self, layer_idx: int, used: np.ndarray) -> None:
        """A layer ran. used: uint8 [E], level used + 1."""
        experts = np.flatnonzero(used)
        since, guess = self._predicted.pop(layer_idx, (layer_idx, experts[:0]))
        self._chances.note(layer_idx, layer_idx - since, guess, experts)
        levels = used[experts].astype(np.int64) - 1
        self._policy.note(layer_idx, experts, np.ones(len(experts)), levels)
        self._tell(layer_idx)
        if layer_idx == len(self._ids) - 1:
            self._tokens += 1
            if self._tokens % REFRESH == 0:  # a policy may count from another origin by now
                for other in range(len(self._ids)):
                    self._tell(other)

    def predicted(self, since: int, layer_idx: int, experts: np.ndarray) -> None:
        """Seen from layer `since`, a layer will likely use experts int64 [n], the most likely first."""
        self._predicted[layer_idx] = (since, experts)
        chances = self._chances.of(layer_idx, layer_idx - since, experts.size)
        self._policy.predicted(layer_idx, experts, chances)
        self._tell(layer_idx)

    def _tell(self, layer_idx: int) -> None:
        if not self._cached:
            return  # no plan with a cache was made yet
        ids, experts, starts = self._cached[layer_idx]
        if ids.size:
            values = self._policy.values(layer_idx)[experts]
            # What several experts share is worth what it is to the one that values it most.
            self._engine.set_value(ids, np.maximum.reduceat(values, starts))
