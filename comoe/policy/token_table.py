"""Predictions from token ids: what this token used when it was last seen, and what came after it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from comoe.policy.predictor import Predictor

MEMORY = 8 << 20  # bytes of each table, by default


class RoutingMemory:
    """Key -> for each layer the experts used under it, newer uses counting more; keys used longest ago go.

    width: experts kept per layer.  capacity: keys.  fade: of a score from one use of the key to the next.
    """

    def __init__(self, num_layers: int, width: int, capacity: int, fade: float = 0.7):
        self._experts = np.full((capacity, num_layers, width), -1, np.int16)
        self._scores = np.zeros((capacity, num_layers, width), np.float32)
        self._slots: OrderedDict[Hashable, int] = OrderedDict()
        self._fade = fade

    def note(self, key: Hashable, layer_idx: int, experts: np.ndarray) -> None:
        slot = self._slots.get(key)
        if slot is None:
            slot = len(self._slots)
            if slot == len(self._scores):
                slot = self._slots.popitem(last=False)[1]
                self._scores[slot], self._experts[slot] = 0, -1
            self._slots[key] = slot
        else:
            self._slots.move_to_end(key)
        known, scores = self._experts[slot, layer_idx], self._scores[slot, layer_idx]
        scores *= self._fade
        same = known[:, None] == experts
        scores += same.any(1)
        # What was used just now stays.
        weakest = np.argsort(scores, kind="stable")[: int((scores < 1).sum())]
        new = experts[~same.any(0)][: weakest.size]
        known[weakest[: new.size]], scores[weakest[: new.size]] = new, 1.0

    def add(self, key: Hashable, layer_idx: int, scores: np.ndarray, weight: float = 1.0) -> bool:
        """Adds what is remembered to scores [E]; False if nothing is."""
        slot = self._slots.get(key)
        if slot is None:
            return False
        known = self._experts[slot, layer_idx]
        has = known >= 0
        scores[known[has]] += weight * self._scores[slot, layer_idx][has]
        return bool(has.any())


class TokenTable(Predictor):
    """Routing follows the token's id more than anything else (OpenMoE, arXiv 2402.01739), and a text repeats
    its words. So before the first layer runs, the token's last routing predicts all layers; and when a
    layer has run, the routing that followed this token (after the one before it, if that pair is known)
    predicts the same layer at the next token.

    nbytes: memory of each of the two tables.
    """

    PAIR = 3.0  # a known pair of tokens says more than the last token alone

    def __init__(self, num_experts: Sequence[int], k: int, nbytes: int = MEMORY):
        self._num_experts = [int(count) for count in num_experts]
        self._width = min(2 * k, max(self._num_experts))
        layers = len(self._num_experts)
        capacity = max(nbytes // (layers * self._width * 6), 16)
        self._k = k
        self._own = RoutingMemory(layers, self._width, capacity)
        self._after = RoutingMemory(layers, self._width, capacity, fade=0.9)
        self.new_sequence()

    def new_sequence(self) -> None:
        self._tokens = (-1, -1, -1)  # the present token, and the two before it

    def begin_token(self, token: int) -> None:
        self._tokens = (token, *self._tokens[:2])

    def note(self, layer_idx: int, experts: np.ndarray, weights: np.ndarray) -> None:
        now, before, earlier = self._tokens
        if now >= 0:
            self._own.note(now, layer_idx, experts)
        if before >= 0:
            self._after.note(before, layer_idx, experts)
            if earlier >= 0:
                self._after.note((earlier, before), layer_idx, experts)

    def predict(self, layer_idx: int, hidden: Any) -> list[tuple[int, np.ndarray]]:
        if layer_idx >= 0 or self._tokens[0] < 0:
            return []
        ahead = []
        for later, count in enumerate(self._num_experts):
            scores = np.zeros(count, np.float32)
            if self._own.add(self._tokens[0], later, scores):
                ahead.append((later, self._best(scores)))
        return ahead

    def predict_next(self, layer_idx: int) -> np.ndarray | None:
        now, before, _ = self._tokens
        if now < 0:
            return None
        scores = np.zeros(self._num_experts[layer_idx], np.float32)
        known = self._after.add(now, layer_idx, scores)
        known |= before >= 0 and self._after.add((before, now), layer_idx, scores, self.PAIR)
        return self._best(scores) if known else None

    def _best(self, scores: np.ndarray) -> np.ndarray:
        order = np.argsort(-scores, kind="stable")[: self._width]
        return order[scores[order] > 0]
