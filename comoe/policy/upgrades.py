"""Which experts climb a rung into memory that is spare: those used last, and often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

Choice = tuple[int, np.ndarray, np.ndarray]  # layer, experts, the value of each in [0, 1)


class UpgradePolicy(Protocol):
    def note(self, used: Sequence[np.ndarray]) -> None:
        """One step is over. used[l]: uint8 [E], level computed at + 1, 0 where not used."""
        ...

    def choose(self) -> Iterator[Choice]:
        """Experts of each layer with what a finer rung of each is worth now."""
        ...


class RecentUse:
    """An expert's value is its number of uses, each fading by half in `half_life` steps."""

    def __init__(self, num_experts: Sequence[int], half_life: float = 64.0):
        self._fade = 0.5 ** (1.0 / half_life)
        self._uses = [np.zeros(count) for count in num_experts]

    def note(self, used: Sequence[np.ndarray]) -> None:
        for uses, now in zip(self._uses, used, strict=True):
            uses *= self._fade
            uses += now > 0

    def choose(self) -> Iterator[Choice]:
        for layer_idx, uses in enumerate(self._uses):
            experts = np.argsort(-uses, kind="stable")
            yield layer_idx, experts, uses[experts] / (1.0 + uses[experts])
