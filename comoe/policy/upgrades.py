"""Which experts climb a rung after a step: those just used, into memory that is spare."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class UpgradePolicy(Protocol):
    def choose(self, used: np.ndarray, want: int) -> np.ndarray: ...


class LastUsedFirst:
    """Experts that the step computed below the wanted level get their next plane, at most
    `per_step` of them so that upgrades never crowd out demand."""

    def __init__(self, per_step: int = 64):
        self.per_step = per_step

    def choose(self, used: np.ndarray, want: int) -> np.ndarray:
        """used: uint8 [n], level computed at + 1, 0 where not used. Returns indices into it."""
        below = np.flatnonzero((used > 0) & (used - 1 < want))
        return below[: self.per_step]
