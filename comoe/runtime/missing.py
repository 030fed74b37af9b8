"""Asks a rule in Python what to do about experts of which something is missing; LeastCost runs natively."""

from __future__ import annotations

import numpy as np

from comoe import _C
from comoe.policy.misses import SENT, SKIP, Chosen, LeastCost, MissRule
from comoe.policy.plan import Sizes
from comoe.runtime.engine import RESIDENT

_EARLIER = np.tri(256, k=-1, dtype=bool)


def native_rule(rule: LeastCost) -> _C.LeastCost:
    """The same, for the native half to ask; it knows neither deadlines nor other machines."""
    loss, nbytes, steps = rule.tables
    return _C.LeastCost(loss, nbytes, steps, rule.price, rule.bandwidth, rule.latency)


class MissHandler:
    """Of one model. `waited`, `coarser`, `skipped`, `sent`: experts that rules decided about so far."""

    def __init__(self, engine: _C.Engine, sizes: Sizes):
        self._engine, self._sizes = engine, sizes
        self._first = np.concatenate([[0], np.cumsum(sizes.num_experts)])
        self._masks = np.array(sizes.levels.masks, np.uint64)
        self._bits = np.uint64(1) << np.arange(sizes.records.shape[1], dtype=np.uint64)
        self.waited = self.coarser = self.skipped = self.sent = 0

    def decide(
        self,
        rule: MissRule,
        layer_idx: int,
        index: np.ndarray,
        weights: np.ndarray,
        low: np.ndarray,
        want: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """(index, levels, sent): experts left out or sent have index E, levels uint8 [E] are where compute may
        start, and sent int64 [n] are the experts that another machine computes.
        None: nothing that the plan aims at is missing, or all of it is waited for.

        index, weights: [T, K] of the layer.  low, want: uint8 [E] of the plan.
        """
        num_experts = len(low)
        experts, slot, inside = _distinct(index, num_experts)
        if not experts.size:
            return None
        rows = self._first[layer_idx] + experts
        resident = self._resident(rows, want[experts])
        aimed = low[experts].astype(np.int64)
        if (resident >= aimed).all():
            return None
        gates = weights[inside].astype(np.float64)
        squares = np.bincount(slot, gates * gates, len(experts))
        chosen = Chosen(
            rows,
            np.sqrt(squares),
            _mass_before(weights, inside, slot, len(experts)),
            resident,
            aimed,
            want[experts].astype(np.int64),
            len(index),
        )
        decided = rule.decide(chosen)
        sent = decided == SENT
        skipped = decided == SKIP
        away = sent | skipped
        self.waited += int((decided > resident).sum())
        self.coarser += int(((decided < aimed) & ~away).sum())
        self.skipped += int(skipped.sum())
        self.sent += int(sent.sum())
        if (decided == aimed).all():
            return None
        levels = low.copy()
        levels[experts] = np.where(away, aimed, decided)
        if away.any():
            index = np.where(np.isin(index, experts[away]), num_experts, index)
        return index, levels, experts[sent]

    def without_waiting(
        self, layer_idx: int, index: np.ndarray, only: np.ndarray, want: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(index, levels) with what is here and nothing else: an expert of which no level is complete is left
        out. only: int64 [n] experts to compute."""
        num_experts = len(want)
        resident = self._resident(self._first[layer_idx] + np.arange(num_experts), want)
        computed = resident >= 0
        computed &= np.isin(np.arange(num_experts), only)
        inside = (index >= 0) & (index < num_experts)
        left_out = ~computed[np.where(inside, index, 0)] & inside
        asked = np.intersect1d(only, index)
        self.skipped += int((resident[asked] < 0).sum())
        levels = np.maximum(resident, 0).astype(np.uint8)
        return np.where(left_out, num_experts, index), levels

    def row_of(self, layer_idx: int, experts: np.ndarray) -> np.ndarray:
        """Rows of the sizes for experts of a layer."""
        return self._first[layer_idx] + experts

    def finest_here(self, layer_idx: int, experts: np.ndarray, want: np.ndarray) -> np.ndarray:
        """int64 [n]: of each expert the finest level at most `want` that is complete here, -1: none."""
        return self._resident(self.row_of(layer_idx, experts), want)

    def _resident(self, rows: np.ndarray, want: np.ndarray) -> np.ndarray:
        """int64 [n]: the finest complete level at most `want`, -1: none."""
        sizes = self._sizes
        ids = sizes.records[rows]
        here = (self._engine.resident()[ids] == RESIDENT) & (ids >= 0)
        held = (here * self._bits).sum(1, dtype=np.uint64)
        complete = ((self._masks & ~held[:, None]) == 0) & sizes.has[rows]
        complete &= np.arange(complete.shape[1]) <= want[:, None]
        finest = complete.shape[1] - 1 - complete[:, ::-1].argmax(1)
        return np.where(complete.any(1), finest, -1)


def _distinct(index: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(experts [n], each once; of each choice inside its position in them; bool [T, K], choices inside)."""
    inside = (index >= 0) & (index < num_experts)
    if len(index) == 1:  # a router chooses an expert once per token
        experts = index[inside]
        return experts, np.arange(len(experts)), inside
    experts, slot = np.unique(index[inside], return_inverse=True)
    return experts, slot.ravel(), inside


def _mass_before(
    weights: np.ndarray, inside: np.ndarray, slot: np.ndarray, count: int
) -> np.ndarray:
    """float64 [count]: share of a token's gate mass that experts with larger weights have; of an expert
    that several tokens chose, the least."""
    mass = np.where(inside, weights, 0.0).astype(np.float64)
    if len(mass) == 1 and count <= len(_EARLIER) and inside.all():
        # mass of the larger ones, and of equal ones before it
        gates = mass[0]
        larger = (gates > gates[:, None]) | ((gates == gates[:, None]) & _EARLIER[:count, :count])
        return larger @ gates / max(gates.sum(), 1e-12)
    order = np.argsort(-mass, axis=1, kind="stable")
    sorted_mass = np.take_along_axis(mass, order, 1)
    before = np.cumsum(sorted_mass, 1) - sorted_mass
    before /= np.maximum(mass.sum(1, keepdims=True), 1e-12)
    mine = np.empty_like(before)
    np.put_along_axis(mine, order, before, 1)
    least = np.full(count, np.inf)
    np.minimum.at(least, slot, mine[inside])
    return least
