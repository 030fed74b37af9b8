"""Opens a store's files in the native engine, and names its records."""

from __future__ import annotations

import numpy as np

from comoe import _C
from comoe.policy.plan import LEVEL_MASKS, Sizes
from comoe.store import Store

NUM_RECORDS = _C.NUM_RECORDS
SLAB_SHARE = 64  # a slab is at most this fraction of the pool, so that it shrinks in small steps
HUGE_PAGE = 2 << 20
LEAST_SLAB = 4 << 20  # where the pool is large enough: fewer mappings, longer runs of pages


def store_sizes(store: Store) -> Sizes:
    """Sizes of every layer's records, in whole pages of the pool."""
    record_bytes = np.stack([layer.records["nbytes"][0].astype(np.int64) for layer in store.layers])
    num_experts = np.array([layer.num_experts for layer in store.layers], np.int64)
    paged = -(-record_bytes // store.page_bytes) * store.page_bytes
    return Sizes(paged, num_experts)


def slab_bytes(pool_bytes: int, floor: int, page_bytes: int) -> int:
    """A whole number of pages: room for one expert or 4 MiB, but at most about pool / 64. Slabs of a
    huge page or more hold whole ones, since each starts on one."""
    wanted = min(pool_bytes // SLAB_SHARE, max(floor, LEAST_SLAB))
    if wanted >= HUGE_PAGE:
        wanted = wanted // HUGE_PAGE * HUGE_PAGE + page_bytes - 1
    return max(1, wanted // page_bytes) * page_bytes


def pool_floor(sizes: Sizes, level: int, page_bytes: int) -> int:
    """The least pool that can compute at `level`: its largest expert, and an eighth more because
    memory comes in slabs."""
    needed = int(sizes.level_bytes(level).max())
    return -(-needed * 9 // (8 * page_bytes)) * page_bytes + page_bytes


def open_engine(
    store: Store, pool_bytes: int, slab: int, *, io_threads: int, direct: bool, verify: bool
) -> tuple[_C.Engine, list[int]]:
    """The engine over all of the store's records, and the id of each layer's first record."""
    engine = _C.Engine(
        store.page_bytes,
        slab,
        pool_bytes,
        level_masks=list(LEVEL_MASKS),
        io_threads=io_threads,
        direct=direct,
        verify=verify,
    )
    first = []
    for layer_idx, layer in enumerate(store.layers):
        file = engine.add_file(str(store.path(layer_idx)))
        records = layer.records.reshape(-1)
        first_record = engine.add_records(
            np.full(records.size, file, np.int32),
            records["offset"].astype(np.int64),
            records["nbytes"].astype(np.int64),
            records["crc32c"].astype(np.uint32),
        )
        first.append(first_record)
        engine.add_experts(first_record + np.arange(records.size, dtype=np.int32))
    return engine, first


class Records:
    """Names of records in the engine: record r of expert e in layer l is first[l] + 5 e + r."""

    def __init__(self, store: Store, first: list[int]):
        self._first = first
        self._experts = [layer.num_experts for layer in store.layers]
        self._bytes = np.concatenate(
            [layer.records["nbytes"].reshape(-1).astype(np.int64) for layer in store.layers]
        )
        self._weights = sum(
            layer.num_experts * layer.geometry.num_weights for layer in store.layers
        )

    def of(self, layer_idx: int, experts: np.ndarray, mask: int) -> np.ndarray:
        """int32 ids of the records in `mask` of some experts of a layer, expert by expert."""
        kinds = np.array([r for r in range(NUM_RECORDS) if mask >> r & 1], np.int32)
        base = self._first[layer_idx] + NUM_RECORDS * experts.astype(np.int32)
        return (base[:, None] + kinds[None, :]).reshape(-1)

    def all(self, mask: int = 0b11111) -> np.ndarray:
        """The same of every expert: all first records, then all second ones, and so on, so that a
        pool that fills up has every expert's coarsest plane first."""
        ids = [
            self.of(layer_idx, np.arange(count), 1 << r)
            for r in range(NUM_RECORDS)
            if mask >> r & 1
            for layer_idx, count in enumerate(self._experts)
        ]
        return np.concatenate(ids) if ids else np.empty(0, np.int32)

    def payload_bytes(self, chosen: np.ndarray) -> int:
        """Payload bytes of the records where the bool array `chosen` is true."""
        return int(self._bytes[chosen].sum())

    def exact_bytes(self) -> int:
        """bf16 bytes of all routed experts: what "bytes kept" is a fraction of."""
        return 2 * self._weights

    def bits_per_weight(self) -> np.ndarray:
        """float [levels]: bits per weight at each level, parameters included."""
        per_record = self._bytes.reshape(-1, NUM_RECORDS).sum(axis=0)
        masks = np.array(
            [[mask >> r & 1 for r in range(NUM_RECORDS)] for mask in LEVEL_MASKS], np.int64
        )
        return 8.0 * (masks @ per_record) / self._weights
