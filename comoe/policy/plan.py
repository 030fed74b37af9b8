"""The plan: for every expert the least level to compute at, the level wanted, and what is pinned.

The planner here is the simple one: the highest level that fits for all experts alike, and what
memory is left over goes to the experts used last. Anything with the same `plan` method can stand in
for it (comoe/policy/curve.py, comoe/policy/joint.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np


class BudgetError(ValueError):
    """A memory budget that cannot be met; the message says what the least is."""


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


# What packing alone gives: planes nest, `exact` stands alone.
LADDER = Levels(("2", "3", "4", "8", "exact"), (0b00001, 0b00011, 0b00111, 0b01111, 0b10000))


@dataclass(frozen=True)
class Sizes:
    """What the planner must know of the store; sizes in bytes of pool pages.

    records: int32 [X, R], for each of the X experts of all layers the ids of its records, -1 where it
        has none; what several experts share is one id.
    record_bytes: int64 [ids].  num_experts: int64 [layers], which add up to X.
    """

    levels: Levels
    records: np.ndarray
    record_bytes: np.ndarray
    num_experts: np.ndarray
    _totals: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def needs(self) -> np.ndarray:
        """bool [levels, R]."""
        return self.levels.needs(self.records.shape[1])

    @cached_property
    def has(self) -> np.ndarray:
        """bool [X, levels]: which levels each expert has."""
        beyond = [mask >> self.records.shape[1] != 0 for mask in self.levels.masks]
        missing = (self.records < 0).astype(np.int64) @ self.needs.T.astype(np.int64)
        return (missing == 0) & ~np.array(beyond)

    @cached_property
    def bytes_at(self) -> np.ndarray:
        """int64 [X, levels]: one expert at each level, what it shares with others in full; 0 where it
        does not have it."""
        paged = np.where(self.records >= 0, self.record_bytes[self.records], 0)
        return np.where(self.has, paged @ self.needs.T.astype(np.int64), 0)

    @cached_property
    def step_bytes(self) -> np.ndarray:
        """int64 [X, levels, levels]: what the second level needs beside the records of the first."""
        added = self.needs[None] & ~self.needs[:, None]
        paged = np.where(self.records >= 0, self.record_bytes[self.records], 0)
        count = len(self.levels)
        return (paged @ added.reshape(count * count, -1).T).reshape(-1, count, count)

    def of_layer(self, per_expert: np.ndarray) -> list[np.ndarray]:
        """An array [X, ...] cut into the layers' parts."""
        return np.split(per_expert, np.cumsum(self.num_experts)[:-1])

    @cached_property
    def shared(self) -> np.ndarray:
        """bool [ids]: records that several experts have."""
        ids = self.records[self.records >= 0]
        return np.bincount(ids, minlength=len(self.record_bytes)) > 1

    def all_at(self, level: int) -> np.ndarray:
        """uint8 [X]: `level` for every expert."""
        return np.full(len(self.records), level, np.uint8)

    def nothing(self) -> np.ndarray:
        """int8 [X]: -1 for every expert."""
        return np.full(len(self.records), -1, np.int8)

    def chosen(self, levels: np.ndarray) -> np.ndarray:
        """bool [ids]: the records that experts need at levels [X]; at -1 none."""
        ids = self.records[self.needs[levels] & (levels >= 0)[:, None]]
        chosen = np.zeros(len(self.record_bytes), bool)
        chosen[ids[ids >= 0]] = True
        return chosen

    def total(self, levels: int | np.ndarray) -> int:
        """Bytes of all experts of all layers, each at its level [X] or all at one; shared ones once."""
        if not isinstance(levels, (int, np.integer)):
            return int(self.record_bytes[self.chosen(levels)].sum())
        if levels not in self._totals:
            self._totals[levels] = self.total(self.all_at(levels))
        return self._totals[levels]

    def largest(self, levels: np.ndarray) -> int:
        """Bytes of the largest expert when each is at its level [X]."""
        return int(self.bytes_at[np.arange(len(levels)), levels].max())

    def worthwhile(self) -> list[int]:
        """Levels of the ladder of packing, which every expert has, coarsest first, without those that a
        finer one undercuts: where the source has 4 or 8 bits, its own weights take less than the 8-bit
        planes."""
        ladder = [i for i, mask in enumerate(self.levels.masks) if mask in LADDER.masks]
        totals = {level: self.total(level) for level in ladder}
        return [
            level
            for i, level in enumerate(ladder)
            if all(totals[level] < totals[finer] for finer in ladder[i + 1 :])
        ]


@dataclass(frozen=True)
class Plan:
    """What every expert is held at, and what it is computed at.

    held: int8 [X], the level that is always in memory; -1: none.  base: bool [ids], the records that
    always are: those of `held`, and shared ones that are held alone.  min_level: uint8 [X], what compute aims
    at; what is missing then is read when the expert is used.  want_level: uint8 [X], and a finer level up
    to this is used where it is complete.
    pool_bytes: of the pool; spare: those that upgrades above min_level, or a cache of experts, may use.
    price: nats that a second of waiting is worth; inf: nothing is worth waiting for (see misses.LeastCost).
    loss: nats per token, seconds: per token, expected at min_level, if they are known.
    away: bool [X], another machine computes it, at min_level; None: none.
    loss_limit: nats per token that may be lost in all, at misses too; 0: as many as it takes.  caution: as of
        the Situation that it was made for.
    """

    levels: Levels
    held: np.ndarray
    min_level: np.ndarray
    want_level: np.ndarray
    spare: int
    pool_bytes: int
    base: np.ndarray
    price: float = 0.0
    loss: float | None = None
    seconds: float | None = None
    away: np.ndarray | None = None
    loss_limit: float = 0.0
    caution: float = 1.0

    @property
    def aimed(self) -> np.ndarray:
        """int [X]: the levels whose records this machine wants, -1 for none."""
        levels = self.min_level.astype(np.int64)
        return levels if self.away is None else np.where(self.away, -1, levels)

    @cached_property
    def resident(self) -> bool:
        """Nothing is ever waited for, once all is loaded; what is away is."""
        return bool((self.held >= self.min_level).all())

    def describe(self) -> str:
        least, most = self._names(self.min_level), self._names(self.want_level)
        if self.loss is not None and self.loss > 0:
            least += f" (expected loss {self.loss:.3g} nats per token)"
        if not self.resident:
            held = f"{np.mean(self.held >= self.min_level):.0%} of the experts held"
            if (self.held < 0).all():
                held = "the last used cached"
            if self.away is not None and self.away.any():
                held += f", {np.mean(self.away):.0%} computed on another machine"
            return f"experts at {least}, {held}, the rest read from disk when needed"
        if np.array_equal(self.min_level, self.want_level):
            return f"every expert resident at {least}"
        return f"every expert resident at {least}, those used last up to {most}"

    def _names(self, levels: np.ndarray) -> str:
        """The level, or how many experts are at each."""
        counts = Counter(levels.tolist())
        if len(counts) == 1:
            return self.levels.describe(int(levels[0]))
        shares = (
            f"{self.levels.describe(level)} {count / len(levels):.0%}"
            for level, count in sorted(counts.items())
        )
        return "mixed levels: " + ", ".join(shares)


class Planner(Protocol):
    def least(self, sizes: Sizes, *, exact: bool) -> np.ndarray:
        """uint8 [X]: the coarsest levels that `plan` may choose."""
        ...

    def plan(self, sizes: Sizes, pool_bytes: int, *, exact: bool) -> Plan: ...


def require_room(sizes: Sizes, levels: np.ndarray, pool_bytes: int) -> None:
    """BudgetError unless the pool holds the largest expert at levels [X]."""
    needed = sizes.largest(levels)
    if pool_bytes < needed:
        expert = int(sizes.bytes_at[np.arange(len(levels)), levels].argmax())
        raise BudgetError(
            f"the expert pool has {pool_bytes:,} bytes, but one expert at "
            f"{sizes.levels.describe(int(levels[expert]))} needs {needed:,}"
        )


def all_cached(
    sizes: Sizes, levels: np.ndarray, pool_bytes: int, loss: float | None = None
) -> Plan:
    """Nothing is held; experts are read at `levels` when they are used, and the last used stay."""
    held = sizes.nothing()
    base = sizes.chosen(held)
    return Plan(sizes.levels, held, levels, levels, pool_bytes, pool_bytes, base, loss=loss)


class EvenPlanner:
    """The highest level of packing's ladder at which all experts fit; `exact` allows only the original
    weights. Levels that aggregation added are not used: nothing says what they cost."""

    def least(self, sizes: Sizes, *, exact: bool) -> np.ndarray:
        return sizes.all_at(sizes.levels.exact if exact else sizes.worthwhile()[0])

    def plan(self, sizes: Sizes, pool_bytes: int, *, exact: bool) -> Plan:
        levels = [sizes.levels.exact] if exact else sizes.worthwhile()
        least = self.least(sizes, exact=exact)
        require_room(sizes, least, pool_bytes)
        for i, level in reversed([*enumerate(levels)]):
            if sizes.total(level) <= pool_bytes:
                # The step to exact replaces every plane: not worth a mixture.
                finer = levels[i + 1] if i + 1 < len(levels) else sizes.levels.exact
                want = finer if finer != sizes.levels.exact else level
                spare = pool_bytes - sizes.total(level)
                min_level, want_level = sizes.all_at(level), sizes.all_at(want)
                held = min_level.astype(np.int8)
                return Plan(
                    sizes.levels, held, min_level, want_level, spare, pool_bytes, sizes.chosen(held)
                )
        return all_cached(sizes, least, pool_bytes)
