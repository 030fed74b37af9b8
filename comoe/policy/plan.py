"""The plan: for every expert the least level to compute at, the level wanted, and what is pinned.

The planner here is the simple one: the highest level that fits for all experts alike, and what
memory is left over goes to the experts used last. Anything with the same `plan` method can stand in
for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

BITS2, BITS3, BITS4, BITS8, EXACT = range(5)
LEVEL_NAMES = ("2-bit", "3-bit", "4-bit", "8-bit", "exact")
# Records that each level needs, as a bit mask: planes nest, `exact` stands alone.
LEVEL_MASKS = (0b00001, 0b00011, 0b00111, 0b01111, 0b10000)


@dataclass(frozen=True)
class Levels:
    """What an expert of a store may be, from coarsest to finest; the last is `exact`.

    masks: bit r of masks[l] is set if level l needs record r. An expert has a level if it has all
    of the level's records.
    """

    names: tuple[str, ...]
    masks: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def exact(self) -> int:
        return len(self.masks) - 1

    def describe(self, level: int) -> str:
        name = self.names[level]
        return f"{name}-bit" if name.isdigit() else name

    def needs(self, num_records: int) -> np.ndarray:
        """bool [levels, num_records]: the masks as a table."""
        masks = np.array(self.masks, np.uint64)[:, None]
        return (masks >> np.arange(num_records, dtype=np.uint64) & np.uint64(1)).astype(bool)


LADDER = Levels(("2", "3", "4", "8", "exact"), LEVEL_MASKS)  # what packing alone gives


class BudgetError(ValueError):
    """A memory budget that cannot be met; the message says what the least is."""


@dataclass(frozen=True)
class Sizes:
    """What the planner must know of the store; sizes in bytes of pool pages.

    record_bytes: int64 [L, R], one expert's record r in layer l.  num_experts: int64 [L].
    """

    record_bytes: np.ndarray
    num_experts: np.ndarray

    def level_bytes(self, level: int) -> np.ndarray:
        """int64 [L]: one expert at `level`."""
        wanted = np.array(
            [(LEVEL_MASKS[level] >> r) & 1 for r in range(self.record_bytes.shape[1])]
        )
        return self.record_bytes @ wanted

    def total(self, level: int) -> int:
        """Bytes of all experts of all layers at `level`."""
        return int(self.level_bytes(level) @ self.num_experts)


@dataclass(frozen=True)
class Plan:
    """One level pair for all experts; `resident` says whether `min_level` fits for every expert.

    min_level: compute may start here.  want_level: and uses the best complete one up to this.
    spare: bytes of the pool that upgrades above min_level, or a cache of experts, may use.
    """

    min_level: int
    want_level: int
    resident: bool
    spare: int
    pool_bytes: int

    def describe(self) -> str:
        name = LEVEL_NAMES[self.min_level]
        if self.resident and self.min_level == self.want_level:
            return f"every expert resident at {name}"
        if self.resident:
            return f"every expert resident at {name}, those used last up to {LEVEL_NAMES[self.want_level]}"
        return f"experts at {name}, the last used cached, the rest read from disk when needed"


class Planner(Protocol):
    def plan(self, sizes: Sizes, pool_bytes: int, *, exact: bool) -> Plan: ...


class EvenPlanner:
    """The highest level at which all experts fit; `exact` allows only the original weights."""

    def plan(self, sizes: Sizes, pool_bytes: int, *, exact: bool) -> Plan:
        least = EXACT if exact else BITS2
        needed = int(sizes.level_bytes(least).max())
        if pool_bytes < needed:
            raise BudgetError(
                f"the expert pool has {pool_bytes:,} bytes, but one expert at {LEVEL_NAMES[least]} "
                f"needs {needed:,}"
            )
        for level in (EXACT,) if exact else (EXACT, BITS8, BITS4, BITS3, BITS2):
            if sizes.total(level) <= pool_bytes:
                spare = pool_bytes - sizes.total(level)
                # Above 8 bits the next step replaces every plane: not worth a mixture.
                want = level if level >= BITS8 else level + 1
                return Plan(level, want, True, spare, pool_bytes)
        return Plan(least, least, False, pool_bytes, pool_bytes)
