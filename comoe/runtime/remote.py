"""A runtime's experts that lie elsewhere, and what to do while they do not come.

Where a rung of an expert is here, finer ones that are far away are not waited for: compute uses what is here,
and they come in the background. Only under a quality goal, whose rule finds that waiting pays, are they
waited for, up to WAIT_SECONDS per step and if they are expected within that. An expert of which no rung is
here is waited for, at its coarsest, as long as some source answers; else it is left out of the sum. `exact`
waits for everything, for at most the sources' patience.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from comoe import _C
from comoe.policy.links import Links
from comoe.policy.plan import Sizes
from comoe.runtime.engine import PREFETCH, RESIDENT, RecordTable
from comoe.runtime.missing import MissHandler
from comoe.tiers.fetcher import MOST_BYTES, THREADS, Fetcher
from comoe.tiers.remote_store import RemoteStore

WAIT_SECONDS = 0.1  # per step, for rungs where coarser ones are here
TICK_SECONDS = 0.01
LATE = "it did not come in time"

logger = logging.getLogger("comoe")


def fetch_bytes(nbytes: np.ndarray) -> int:
    """What transfers come into, of the budget. nbytes: int64 [records]."""
    return THREADS * max(MOST_BYTES, int(nbytes.max()))


class Remote:
    """Of one runtime; closes the store that it was given."""

    def __init__(
        self,
        engine: _C.Engine,
        remote: RemoteStore,
        table: RecordTable,
        sizes: Sizes,
        missing: MissHandler,
        least: np.ndarray,
        exact: bool,
    ):
        """least: int [X], the level below which no expert may be computed."""
        self._engine, self._store, self._sizes, self._missing = engine, remote, sizes, missing
        self._links, self._least, self._exact = remote.sources.links, least, exact
        self._nbytes, self._layers = table.nbytes, len(table.ids)
        self._needs = sizes.levels.needs(sizes.records.shape[1])
        extents = remote.cache.extents
        extent_of = [
            extents.of(layer_idx, layer.records["offset"].reshape(-1)[owners].astype(np.int64))
            for layer_idx, (layer, owners) in enumerate(
                zip(remote.store.layers, table.owners, strict=True)
            )
        ]
        self._fetcher = Fetcher(
            engine, remote, list(range(len(extent_of))), np.concatenate(extent_of)
        )
        self.coarser = self.left_out = 0  # experts
        self._was_up = True
        self._deadline = _Deadline(engine, self._links)
        self._left = 0.0  # seconds that this step may still wait for what it could do without
        # Also at the end of the process: a thread must not be inside the engine then.
        self._end = weakref.finalize(
            self, _end, engine, self._fetcher, remote, None if exact else self._deadline
        )
        if not exact:
            self._deadline.start()

    # ---- one layer ------------------------------------------------------------------------------

    def face(
        self, layer_idx: int, index: np.ndarray, low: np.ndarray, want: np.ndarray, *, rule: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """(index, levels, dispensable): experts left out have index E; levels uint8 [E] are where compute may
        start; int32 [n] records that are waited for though compute could do without. None: all is here.

        index: int64 [T, K] of the layer.  low, want: uint8 [E] of the plan.  rule: what is missing was found
        worth waiting for.
        """
        num_experts = len(low)
        experts = np.unique(index)
        experts = experts[(experts >= 0) & (experts < num_experts)]
        resident = self._missing.finest_here(layer_idx, experts, want[experts])
        short = resident < low[experts]
        if not short.any():
            return None
        experts, resident = experts[short], resident[short]
        least = np.minimum(self._least[self._missing.row_of(layer_idx, experts)], low[experts])
        lacking = self._lacking(layer_idx, experts, low[experts])
        far = np.array([self._fetcher.far(ids).any() for ids in lacking])
        usable, up = resident >= least, self._links.is_up()
        ids = np.unique(np.concatenate(lacking)).astype(np.int32)
        ids = ids[self._fetcher.far(ids)]
        nbytes = int(self._nbytes[ids].sum())
        waits = rule and up and self._links.expected(nbytes) <= self._left
        coarser = far & usable & (not waits)
        without = far & ~usable & (not up)
        levels = low.copy()
        levels[experts[coarser]] = resident[coarser]
        levels[experts[far & ~usable]] = least[far & ~usable]
        if without.any():
            index = np.where(np.isin(index, experts[without]), num_experts, index)
        self.coarser += int(coarser.sum())
        self.left_out += int(without.sum())
        if up and ids.size:
            self._engine.request(ids, PREFETCH, self._layers)
        optional = [row for row, one in zip(lacking, far & usable & waits, strict=True) if one]
        return index, levels, np.concatenate([*optional, np.empty(0, np.int32)]).astype(np.int32)

    def _lacking(self, layer_idx: int, experts: np.ndarray, levels: np.ndarray) -> list[np.ndarray]:
        """Of each expert the records of its level that are not here."""
        rows = self._missing.row_of(layer_idx, experts)
        ids, states = self._sizes.records[rows], self._engine.resident()
        wanted = self._needs[levels] & (ids >= 0)
        wanted &= states[ids] != RESIDENT
        return [row[chosen] for row, chosen in zip(ids, wanted, strict=True)]

    @contextmanager
    def waiting(self, dispensable: np.ndarray) -> Iterator[None]:
        """While a layer may wait, at most for the rest of this step's WAIT_SECONDS for what it could do
        without, and for nothing once no source answers."""
        began = time.monotonic()
        self._deadline.begin(began + self._left, dispensable)
        try:
            yield
        finally:
            self._deadline.end()
            if dispensable.size:
                self._left = max(self._left - (time.monotonic() - began), 0.0)

    def gave_up(self, error: Exception) -> bool:
        """Whether the layer can go on without what it waited for."""
        return not self._exact and "fetching record" in str(error) and self._end.alive

    # ---- steps ----------------------------------------------------------------------------------

    def note_plan(self, base: np.ndarray, aimed: np.ndarray, use: np.ndarray) -> None:
        """What the plan in force is worth to the cache: what it always holds 2, what else it aims at 1, and of
        both and the rest how likely a token uses an expert that needs it.

        base, aimed: bool [records].  use: float [X], 0 to 1."""
        used = np.zeros(len(base))
        ids = self._sizes.records
        for column in range(ids.shape[1]):
            there = ids[:, column] >= 0
            np.maximum.at(used, ids[there, column], use[there])
        values = np.where(base, 2.0, np.where(aimed, 1.0, 0.0)) + np.clip(used, 0, 1)
        self._fetcher.tell_worth(values, self._engine.resident() == RESIDENT)

    def begin_step(self) -> bool:
        """Whether sources answer again after they were out of reach: then what the plan lacks is to be asked for
        again. Says so."""
        self._left = WAIT_SECONDS
        up = self._links.is_up()
        before, self._was_up = self._was_up, up
        if before and not up:
            logger.warning(
                "comoe: no source of the experts answers (%s); going on with what is here",
                self.describe(),
            )
        if up and not before:
            logger.warning("comoe: sources of the experts answer again")
        return up and not before

    def describe(self) -> str:
        return self._store.describe()

    def stats(self) -> dict:
        return self._fetcher.stats() | {
            "up": self._links.is_up(),
            "coarser": self.coarser,
            "left_out": self.left_out,
            "expired": self._deadline.expired,
        }

    def close(self) -> None:
        """Ends the engine's reads, too. May be called twice."""
        self._end()


class _Deadline:
    """Ends waits that are of no use, so that a layer goes on with what is here. A thread of its own, which
    knows nothing of the runtime, so that a model that nobody has any more is freed."""

    def __init__(self, engine: _C.Engine, links: Links):
        self._engine, self._links = engine, links
        self._waiting = threading.Event()
        self._call: tuple[float, np.ndarray] | None = None  # until when; records then given up
        self._closed = False
        self.expired = 0  # records
        self._thread = threading.Thread(target=self._run, name="comoe-deadline", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def begin(self, until: float, dispensable: np.ndarray) -> None:
        self._call = until, dispensable
        self._waiting.set()

    def end(self) -> None:
        self._waiting.clear()
        self._call = None

    def close(self) -> None:
        self._closed = True
        self._waiting.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            self._waiting.wait()
            call = self._call
            if call is not None:
                until, dispensable = call
                if not self._links.is_up():
                    self.expired += self._engine.remote_expire(None, LATE)
                elif dispensable.size and time.monotonic() > until:
                    self.expired += self._engine.remote_expire(dispensable, LATE)
            time.sleep(TICK_SECONDS)


def _end(
    engine: _C.Engine, fetcher: Fetcher, remote: RemoteStore, deadline: _Deadline | None
) -> None:
    if deadline is not None:
        deadline.close()
    engine.close()
    remote.sources.close()
    fetcher.close()
    remote.close()
