"""Brings a remote store's experts into the local cache ahead of use: all, or up to a level."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from comoe import _C
from comoe.store import StoreError
from comoe.store.format import EXPERTS_FOLDER
from comoe.tiers.remote_store import RemoteStore

THREADS = 4
GAP = 64 << 10  # as fetcher.py
MOST_BYTES = 4 << 20


@dataclass(frozen=True)
class Pulled:
    """level: finest that is here now.  bytes: of its increments, of which `fetched` came now."""

    folder: str
    level: str
    bytes: int
    fetched: int
    seconds: float

    def summary(self) -> dict:
        return asdict(self)


def wanted_extents(remote: RemoteStore, level: int) -> np.ndarray:
    """int64 [n]: extents of every record that some level up to `level` needs, in the order of the files."""
    levels = remote.store.levels
    found = []
    for layer_idx, layer in enumerate(remote.store.layers):
        columns = levels.needs(layer.records.shape[1])[: level + 1].any(axis=0)
        records = layer.records[:, columns].reshape(-1)
        offsets = np.unique(records["offset"][records["nbytes"] > 0]).astype(np.int64)
        found.append(remote.cache.extents.of(layer_idx, offsets))
    return np.concatenate(found)


def pull(
    remote: RemoteStore,
    up_to: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pulled:
    """Fetches what is not here of all levels up to `up_to` (None: all). Bytes that are here are verified, so
    that the store can be used without any source afterwards; stopped at any moment it goes on from there.

    progress(done, total): bytes.  StoreError where the cache has no room, NoSourceError where no source has
    what is wanted.
    """
    names = remote.store.levels.names
    up_to = up_to and up_to.removeprefix("bits")
    if up_to is not None and up_to not in names:
        raise ValueError(f"--up-to: expected one of {', '.join(names)}, got {up_to!r}")
    begin = time.perf_counter()
    cache, extents = remote.cache, remote.cache.extents
    level = names.index(up_to) if up_to else len(names) - 1
    wanted = wanted_extents(remote, level)
    total, done = int(extents.nbytes[wanted].sum()), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    def is_whole(which: int) -> bool:
        data = cache.read(which) if cache.is_here(which) else None
        if data is not None and _C.crc32c(data) == extents.crc[which]:
            advance(len(data))
            return True
        cache.forget(which)
        return False

    cache.pulled(wanted)
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            whole = np.array(list(pool.map(is_whole, wanted.tolist())), bool)
            missing = wanted[~whole]
            for nbytes in pool.map(lambda run: _fetch(remote, run), _runs(remote, missing)):
                advance(nbytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            remote.sources.close()
            raise
    if not cache.is_here_each(wanted).all():  # what came first had to go for what came later
        raise StoreError(_no_room(remote))
    return Pulled(
        str(remote.folder),
        names[level],
        total,
        int(extents.nbytes[missing].sum()),
        time.perf_counter() - begin,
    )


def _runs(remote: RemoteStore, which: np.ndarray) -> list[np.ndarray]:
    """Extents that one request brings: near one another in one file."""
    extents = remote.cache.extents
    runs: list[list[int]] = []
    for one in which.tolist():
        if runs:
            first, last = runs[-1][0], runs[-1][-1]
            end = extents.offset[last] + extents.on_disk[last]
            near = extents.offset[one] - end <= GAP
            fits = extents.offset[one] + extents.on_disk[one] - extents.offset[first] <= MOST_BYTES
            if extents.file[one] == extents.file[last] and near and fits:
                runs[-1].append(one)
                continue
        runs.append([one])
    return [np.array(run) for run in runs]


def _fetch(remote: RemoteStore, run: np.ndarray) -> int:
    """Fetches and keeps the extents of a run; returns their bytes."""
    cache, extents = remote.cache, remote.cache.extents
    layer = remote.store.layers[extents.file[run[0]]]
    begin = int(extents.offset[run[0]])
    end = int(extents.offset[run[-1]] + extents.on_disk[run[-1]])
    refused: list[int] = []

    def accept(view: memoryview) -> bool:
        good = True
        for which in run.tolist():
            at = int(extents.offset[which]) - begin
            if _C.crc32c(view[at : at + int(extents.nbytes[which])]) != extents.crc[which]:
                good = False
            elif not cache.put(which, view[at : at + int(extents.on_disk[which])]):
                refused.append(which)
        return good

    path = f"{EXPERTS_FOLDER}/{layer.file}"
    remote.sources.fetch(path, begin, end - begin, accept, size=layer.file_bytes)
    if refused:
        raise StoreError(_no_room(remote))
    return int(extents.nbytes[run].sum())


def _no_room(remote: RemoteStore) -> str:
    return (
        f"pull: the cache at {remote.folder.parent} has no room for all of it; raise `comoe cache --limit`, "
        "make room on the disk, or pull --up-to a coarser level"
    )
