"""A runtime's experts that lie elsewhere: what comes over the network, and what its local cache keeps."""

from __future__ import annotations

import numpy as np

from comoe import _C
from comoe.runtime.engine import RecordTable
from comoe.tiers.fetcher import MOST_BYTES, THREADS, Fetcher
from comoe.tiers.remote_store import RemoteStore

FETCH_BYTES = THREADS * MOST_BYTES  # that transfers come into, of the budget


class Remote:
    """Of one runtime; closes the store that it was given."""

    def __init__(self, engine: _C.Engine, remote: RemoteStore, table: RecordTable):
        self._store = remote
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

    def describe(self) -> str:
        return self._store.describe()

    def stats(self) -> dict:
        return self._fetcher.stats()

    def close(self) -> None:
        """After the engine was closed."""
        self._store.sources.close()
        self._fetcher.close()
        self._store.close()
