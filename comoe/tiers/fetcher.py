"""Brings the engine what it asks for from a remote store: takes requests, fetches, hands over, keeps.

Every thread takes the most urgent request and what lies near it, so one range brings several records; what
was not taken yet can still be overtaken. Speculation never has more than half of the threads.
"""

from __future__ import annotations

import threading

import numpy as np

from comoe import _C
from comoe.store.format import EXPERTS_FOLDER, padded
from comoe.tiers.remote_store import RemoteStore
from comoe.tiers.source import SourceError
from comoe.tiers.sources import CLOSE_SECONDS, NoSourceError

THREADS = 6
OTHERS = 3  # takes of prefetches and upgrades at once
GAP = 64 << 10  # bytes between two records that are rather fetched than asked around
MOST_BYTES = 2 << 20  # of one request for several records
TAKE_SECONDS = 1.0
OTHERS_PATIENCE = 1.0  # seconds of attempts for what nobody waits for


class Fetcher:
    """Between one engine and one remote store, which it does not close."""

    def __init__(
        self,
        engine: _C.Engine,
        remote: RemoteStore,
        layer_of_file: list[int],
        extent_of: np.ndarray,
        *,
        patience: float | None = None,
    ):
        """layer_of_file: of each of the engine's files.  extent_of: int64 [records] position in the cache of
        each of the engine's records.  patience: seconds that demand is waited for."""
        self._engine, self._remote = engine, remote
        self._layers, self._extent_of = layer_of_file, extent_of
        self._cache, self._sources = remote.cache, remote.sources
        self._patience = remote.sources.patience if patience is None else patience
        self.requests = 0
        here = np.flatnonzero(self._cache.here()[extent_of]).astype(np.int32)
        engine.set_local(here, True)
        self._threads = [
            threading.Thread(target=self._work, name="comoe-fetch", daemon=True)
            for _ in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """After the engine was closed."""
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)

    def stats(self) -> dict:
        """Figures so far, by source and in all."""
        sources = self._sources
        return {
            "requests": self.requests,
            "retries": sources.retries,
            "hedges": sources.hedges,
            "hedges_won": sources.hedges_won,
            "cached_bytes": self._cache.bytes_here(),
            "sources": sources.links.stats(),
        }

    def far(self, records: np.ndarray) -> np.ndarray:
        """bool [n]: which of these records' bytes are not in the cache."""
        return ~self._cache.is_here_each(self._extent_of[records])

    def tell_worth(self, values: np.ndarray, here: np.ndarray) -> None:
        """values: float [records], what keeping each in the cache is worth.  here: bool [records], those in use."""
        worth = np.zeros(len(self._cache.extents), np.float32)
        worth[self._extent_of] = values
        self._cache.value(worth)
        self._cache.used(self._extent_of[here])

    def _work(self) -> None:
        while True:
            taken = self._engine.remote_take(TAKE_SECONDS, GAP, MOST_BYTES, OTHERS)
            if taken is None:
                return
            if taken:
                self._serve(taken)

    def _serve(self, taken: list[tuple]) -> None:
        try:
            missing = [request for request in taken if not self._from_cache(request)]
            if missing:
                self._fetch(missing)
        except (SourceError, NoSourceError) as error:
            for ticket, *_ in taken:
                self._engine.remote_failed(ticket, str(error))
        except Exception as error:  # must not end the thread: others would wait for ever
            for ticket, *_ in taken:
                self._engine.remote_failed(ticket, f"{type(error).__name__}: {error}")

    def _from_cache(self, request: tuple) -> bool:
        """Another process may have fetched it meanwhile. What the engine found damaged is not."""
        ticket, record, _, _, _, _ = request
        which = int(self._extent_of[record])
        if not self._cache.is_here(which):
            return False
        data = self._cache.read(which)
        if data is None or self._engine.remote_done(ticket, data) is False:
            self._cache.forget(which)
            return False
        self._engine.set_local(np.array([record], np.int32), True)
        return True

    def _fetch(self, requests: list[tuple]) -> None:
        engine = self._engine
        layer = self._remote.store.layers[self._layers[requests[0][2]]]
        begin = requests[0][3]
        end = max(offset + padded(nbytes) for _, _, _, offset, nbytes, _ in requests)

        def accept(view: memoryview) -> bool:
            good = True
            for ticket, record, _, offset, nbytes, _ in requests:
                at = offset - begin
                payload = view[at : at + nbytes]
                handed = engine.remote_done(ticket, payload)
                if (
                    handed is None
                ):  # given up, or another source was first: still of use to the cache
                    handed = _C.crc32c(payload) == self._cache.crc_of(int(self._extent_of[record]))
                if handed:
                    self._keep(record, view[at : at + padded(nbytes)])
                good = good and handed
            return good

        def patience() -> float:
            demanded = any(engine.remote_demanded(ticket) for ticket, *_ in requests)
            return self._patience if demanded else min(OTHERS_PATIENCE, self._patience)

        self.requests += 1
        self._sources.fetch(
            f"{EXPERTS_FOLDER}/{layer.file}",
            begin,
            end - begin,
            accept,
            size=layer.file_bytes,
            patience=patience,
            wanted=lambda: any(engine.remote_open(r[0]) for r in requests),
        )

    def _keep(self, record: int, extent: memoryview) -> None:
        which = int(self._extent_of[record])
        if self._cache.is_here(which) or self._cache.put(which, extent):
            self._engine.set_local(np.array([record], np.int32), True)
