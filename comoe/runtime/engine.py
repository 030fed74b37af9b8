"""Opens a store's files in the native engine, and names its records."""

from __future__ import annotations

import numpy as np

from comoe import _C
from comoe.policy.plan import Levels, Sizes
from comoe.store import LayerInfo, Store

PREFETCH, UPGRADE = 1, 2  # classes of transfers, as of csrc/engine/types.h; 0: demand
ABSENT, RESIDENT = 0, 2  # states of a record, as of csrc/engine/core.h; 1: loading
SLAB_SHARE = 64  # a slab is at most this fraction of the pool, so that it shrinks in small steps
HUGE_PAGE = 2 << 20
LEAST_SLAB = 4 << 20  # where the pool is large enough: fewer mappings, longer runs of pages


def record_ids(layer: LayerInfo, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids from `first` on for the records of a layer, one for all that are one record by their shared
    id: int32 [E, R], -1 where an expert has none; and the position in the table of each id's first owner.
    """
    flat = layer.records.reshape(-1)
    ids = np.full(flat.size, -1, np.int32)
    present = np.flatnonzero(flat["nbytes"] > 0)
    # Shared records by their id, all others by their place behind those.
    key = np.where(
        flat["shared_id"] >= 0, flat["shared_id"].astype(np.int64), 2**31 + np.arange(flat.size)
    )
    _, where, inverse = np.unique(key[present], return_index=True, return_inverse=True)
    owners = present[np.sort(where)]
    rank = np.empty(len(where), np.int32)
    rank[np.argsort(where)] = np.arange(len(where), dtype=np.int32)
    ids[present] = first + rank[inverse.ravel()]
    return ids.reshape(layer.records.shape), owners


class RecordTable:
    """The store's records as the engine names them.

    ids: int32 [E, R] of each layer.  owners: of each layer, place in its table of each id's first owner.
    nbytes: int64 [ids], payload.
    """

    def __init__(self, store: Store):
        self.ids: list[np.ndarray] = []
        self.owners: list[np.ndarray] = []
        nbytes, first = [], 0
        for layer in store.layers:
            ids, owners = record_ids(layer, first)
            self.ids.append(ids)
            self.owners.append(owners)
            nbytes.append(layer.records["nbytes"].reshape(-1)[owners].astype(np.int64))
            first += len(owners)
        self.nbytes = np.concatenate(nbytes)
        # As the engine wants them: as many records as the masks have bits, in every layer.
        width = max(mask.bit_length() for mask in store.levels.masks)
        self.ids = [_widened(ids, width) for ids in self.ids]


def _widened(ids: np.ndarray, width: int) -> np.ndarray:
    padding = np.full((len(ids), max(width - ids.shape[1], 0)), -1, np.int32)
    return np.ascontiguousarray(np.concatenate([ids, padding], axis=1)[:, :width])


def store_sizes(store: Store, table: RecordTable) -> Sizes:
    """Sizes of all records, in whole pages of the pool."""
    paged = -(-table.nbytes // store.page_bytes) * store.page_bytes
    num_experts = np.array([layer.num_experts for layer in store.layers], np.int64)
    return Sizes(store.levels, np.concatenate(table.ids), paged, num_experts)


def _wanted_slab(pool_bytes: int, floor: int, page_bytes: int) -> int:
    """A whole number of pages: room for one expert or 4 MiB, but at most about pool / 64. Slabs of a
    huge page or more hold whole ones, since each starts on one."""
    wanted = min(pool_bytes // SLAB_SHARE, max(floor, LEAST_SLAB))
    if wanted >= HUGE_PAGE:
        wanted = wanted // HUGE_PAGE * HUGE_PAGE + page_bytes - 1
    return max(1, wanted // page_bytes) * page_bytes


def _in_whole(nbytes: int, slab: int) -> int:
    return -(-nbytes // slab) * slab


def slab_bytes(pool_bytes: int, largest_need: int, floor: int, page_bytes: int) -> int:
    """Bytes of a slab for a pool of `pool_bytes`, whole pages. At most so many that the largest expert, in
    whole slabs, never takes more than `floor`: the pool may become as small as that later."""
    slab = _wanted_slab(pool_bytes, floor, page_bytes)
    while _in_whole(largest_need, slab) > floor:
        slab -= page_bytes
    return slab


def pool_floor(largest_need: int, total: int, page_bytes: int) -> int:
    """The least pool that can compute: room for the largest expert, and what memory in whole slabs costs.

    total: bytes of all experts in full. The floor does not depend on how much memory there is, so that
    a model which was loaded with much can shrink to it: it has room for slabs as large as for the largest
    pool of use, which are at most total / 64 and 4 MiB where they are larger than an expert.
    """
    floor = -(-largest_need * 9 // (8 * page_bytes)) * page_bytes + page_bytes
    return max(floor, _in_whole(largest_need, _wanted_slab(total, floor, page_bytes)))


def open_engine(
    store: Store,
    table: RecordTable,
    pool_bytes: int,
    slab: int,
    *,
    io_threads: int,
    direct: bool,
    verify: bool,
    remote: bool = False,
) -> tuple[_C.Engine, list[int]]:
    """The engine over all of the store's records, and the number of each layer's first expert. remote: the
    layer files are local copies with holes, and a Fetcher brings what is missing."""
    engine = _C.Engine(
        store.page_bytes,
        slab,
        pool_bytes,
        level_masks=list(store.levels.masks),
        io_threads=io_threads,
        direct=direct,
        verify=verify,
    )
    first = []
    for layer_idx, layer in enumerate(store.layers):
        path = str(store.path(layer_idx))
        file = engine.add_remote_file(path) if remote else engine.add_file(path)
        records = layer.records.reshape(-1)[table.owners[layer_idx]]
        engine.add_records(
            np.full(records.size, file, np.int32),
            records["offset"].astype(np.int64),
            records["nbytes"].astype(np.int64),
            records["crc32c"].astype(np.uint32),
        )
        first.append(engine.add_experts(table.ids[layer_idx].reshape(-1)))
    return engine, first


def add_layer(
    op: _C.MoeOp,
    layer: LayerInfo,
    ids: np.ndarray,
    first_expert: int,
    activation: str,
    alpha: float,
    limit: float,
) -> int:
    """Tells the operator what a layer's records are."""

    def column(field: str, dtype: type) -> np.ndarray:
        values = layer.records[field].astype(dtype)
        pad = [(0, 0), (0, max(ids.shape[1] - values.shape[1], 0)), *[(0, 0)] * (values.ndim - 2)]
        return np.ascontiguousarray(np.pad(values, pad)[:, : ids.shape[1]])

    return op.add_layer(
        layer.geometry,
        activation,
        alpha,
        limit,
        first_expert,
        ids,
        column("kind", np.uint8),
        column("bits", np.uint8),
        column("parent", np.int32),
        column("ranks", np.uint16),
    )


class Records:
    """Which records experts need at their levels, and what they cost."""

    def __init__(self, store: Store, table: RecordTable):
        self._ids, self._bytes = table.ids, table.nbytes
        self._needs = store.levels.needs(table.ids[0].shape[1])
        self._weights = [layer.geometry.num_weights for layer in store.layers]
        self._all_weights = sum(
            layer.num_experts * weights
            for layer, weights in zip(store.layers, self._weights, strict=True)
        )
        owners = np.zeros(len(self._bytes), np.int64)
        for ids in self._ids:
            owners += np.bincount(ids[ids >= 0], minlength=len(owners))
        # float64 [E, levels] of each layer: bits per weight, parameters included, and of a shared record
        # its share.
        share = self._bytes / np.maximum(owners, 1)
        self.bits = [
            8.0 * np.where(ids >= 0, share[ids], 0) @ self._needs.T.astype(np.float64) / weights
            for ids, weights in zip(self._ids, self._weights, strict=True)
        ]

    @property
    def count(self) -> int:
        return len(self._bytes)

    def above(
        self, layer_idx: int, experts: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of what experts at level `low` lack of level `high`, and the position in `experts` of
        the expert that each is for."""
        ids = self._ids[layer_idx][experts]
        missing = self._needs[high] & ~self._needs[low] & (ids >= 0)
        return ids[missing], np.nonzero(missing)[0]

    def in_order(self, chosen: np.ndarray) -> np.ndarray:
        """int32 ids where bool [ids] is true: of all experts the first record, then the second, and so
        on, so that a pool that fills up has every expert's coarsest plane first."""
        ids = np.concatenate([ids[:, r] for r in range(self._needs.shape[1]) for ids in self._ids])
        ids = ids[ids >= 0]
        ids = ids[chosen[ids]]
        _, first = np.unique(ids, return_index=True)
        return ids[np.sort(first)]

    def payload_bytes(self, chosen: np.ndarray) -> int:
        """Payload bytes of the records where the bool array `chosen` is true."""
        return int(self._bytes[chosen].sum())

    def exact_bytes(self) -> int:
        """bf16 bytes of all routed experts: what "bytes kept" is a fraction of."""
        return 2 * self._all_weights


def kernel_levels(levels: Levels) -> np.ndarray:
    """int64 [levels]: the level 0 to 4 (2, 3, 4, 8 bits, exact) that each is like for the kernels' speed:
    a sum of several parts is like 8 bits, which take two products."""
    like = {0b1: 0, 0b11: 1, 0b111: 2, 0b1111: 3, 1 << (_C.NUM_RECORDS - 1): 4}
    return np.array([like.get(mask, 3) for mask in levels.masks])
