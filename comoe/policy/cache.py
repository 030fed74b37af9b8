"""Cache policies: what keeping an expert's records is worth, for the engine's order of eviction.

The engine evicts the least value first, then the least recently used, then the finest record. A policy is
told what each layer used; values(l) is asked for a layer after it ran, after predictions about it, and for
all layers before each token. Values of all layers compare with each other.

Policies by clock: a layer's run is one tick. A value that is a point in time (when the next use is
expected, or when the last one was) stays right while time passes, so only what was learnt must be set anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class CachePolicy(Protocol):
    def new_sequence(self) -> None:
        """The next tokens belong to another sequence."""
        ...

    def note(
        self, layer_idx: int, experts: np.ndarray, weights: np.ndarray, used_levels: np.ndarray
    ) -> None:
        """A layer ran. experts: int64 [n], each once.  weights: float [n], the gate weight of each,
        summed over tokens.  used_levels: int [n], the level it was computed at, -1: skipped."""
        ...

    def predicted(self, layer_idx: int, experts: np.ndarray, chances: np.ndarray) -> None:
        """experts [n] are likely used when `layer_idx` runs next, each with chances [n]."""
        ...

    def values(self, layer_idx: int) -> np.ndarray:
        """float32 [E]: the worth of keeping each expert of a layer."""
        ...


class LRU:
    """Least recently used: every value is the same, and the engine's second criterion decides."""

    def __init__(self, num_experts: Sequence[int]):
        self._values = [np.zeros(int(count), np.float32) for count in num_experts]

    def new_sequence(self) -> None:
        pass

    def note(
        self, layer_idx: int, experts: np.ndarray, weights: np.ndarray, used_levels: np.ndarray
    ) -> None:
        pass

    def predicted(self, layer_idx: int, experts: np.ndarray, chances: np.ndarray) -> None:
        pass

    def values(self, layer_idx: int) -> np.ndarray:
        return self._values[layer_idx]


class LFU(LRU):
    """Least frequently used: uses since the beginning, in all sequences."""

    def note(
        self, layer_idx: int, experts: np.ndarray, weights: np.ndarray, used_levels: np.ndarray
    ) -> None:
        self._values[layer_idx][experts] += 1


class Clocked(LRU):
    """Base of the policies with a clock of layers: `self.now` is the tick of the layer noted last, token
    * L + layer.

    Float32 tells ticks apart up to 2^24, so `values` counts from `self._base`, which moves behind a last
    layer at times: all values are set anew before the next token.
    """

    def __init__(self, num_experts: Sequence[int]):
        super().__init__(num_experts)
        self._values = [values.astype(np.float64) for values in self._values]
        self.num_layers = len(self._values)
        self.now = -1
        self._base = 0

    def _tick(self, layer_idx: int) -> int:
        """The clock at the next run of `layer_idx`."""
        return self.now + 1 + (layer_idx - self.now - 1) % self.num_layers

    def _advance(self, layer_idx: int) -> int:
        """The clock, now that `layer_idx` runs."""
        self.now = self._tick(layer_idx)
        if layer_idx == self.num_layers - 1 and self.now - self._base >= 1 << 22:
            self._base = self.now
        return self.now
