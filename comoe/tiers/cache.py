"""Local copies of remote stores: folders laid out as the stores themselves, their layer files full of holes.

    CACHE/remote/<name>-<hash of the manifest>/
        config.json ...            whole files
        experts/manifest.json
        experts/layer-N.bin        of full length; extents that are not here are holes
        .comoe-cache               the index (below); mapped by every process that uses the store
        .comoe-lock                held shared by those, exclusively by whoever removes the folder
        .comoe-opening             held by who makes the folder ready or removes it

The index says of every extent whether its bytes should be here, what they are worth and when they were last
used. It is a hint and nothing more: whoever reads an extent verifies its checksum, so a process that is killed
at any moment, or a machine that loses power, costs at most another fetch. That is why nothing waits for the
disk here.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from comoe.store.format import ALIGNMENT, EXPERTS_FOLDER, LayerInfo, StoreError
from comoe.store.reader import Store

INDEX_FILE, LOCK_FILE, OPENING_FILE = ".comoe-cache", ".comoe-lock", ".comoe-opening"
LIMIT_FILE = "limit"
MAGIC = b"COMOECA1"
HEADER = struct.Struct("<8sQ")  # magic, extents
ENTRY = np.dtype(
    [("here", "u1"), ("pulled", "u1"), ("pad", "V2"), ("value", "<f4"), ("used", "<f8")]
)
FREE_SHARE = 0.05  # of the disk that the cache leaves free where no limit was set
ROOM = (
    0.02  # of the limit that is freed beyond what is needed, so that it is not asked for each time
)
HALF_LIFE = 7 * 86400.0  # seconds without use in which what an extent is worth halves
LEAST_WORTH = 1e-3
PULLED = (
    2.0  # worth of what was pulled: as much as what a plan always holds (comoe/runtime/remote.py)
)
PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


def root() -> Path:
    """$XDG_CACHE_HOME/comoe/remote, by default ~/.cache/comoe/remote."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "comoe" / "remote"


class Extents:
    """All extents of a store, shared ones once, by file and offset.

    file: int32 [n] position of the layer.  offset, nbytes: int64 [n], payload.  crc: uint32 [n].
    """

    def __init__(self, layers: Sequence[LayerInfo]):
        parts, self._first = [], [0]
        for layer_idx, layer in enumerate(layers):
            records = layer.records.reshape(-1)
            records = records[records["nbytes"] > 0]
            _, first = np.unique(records["offset"], return_index=True)
            records = records[first]
            parts.append((np.full(len(records), layer_idx, np.int32), records))
            self._first.append(self._first[-1] + len(records))
        self.file = np.concatenate([file for file, _ in parts])
        records = np.concatenate([records for _, records in parts])
        self.offset = records["offset"].astype(np.int64)
        self.nbytes = records["nbytes"].astype(np.int64)
        self.crc = records["crc32c"].astype(np.uint32)
        self.on_disk = (self.nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT

    def __len__(self) -> int:
        return len(self.file)

    def of(self, file: int, offset: int | np.ndarray) -> np.ndarray:
        """Positions of the extents that begin at these offsets of a layer's file."""
        first, end = self._first[file], self._first[file + 1]
        return first + np.searchsorted(self.offset[first:end], offset)


class StoreCache:
    """The local copy of one store, for this process. Methods may be called from any thread."""

    def __init__(self, folder: Path, layers: Sequence[LayerInfo], limit: int | None = None):
        """folder: with whole headers of all layer files, and kept from being removed (`holding`).
        limit: bytes for all stores of the cache's root; None: what `set_limit` said."""
        self.folder, self.extents = folder, Extents(layers)
        self._limit = limit
        paths = [folder / EXPERTS_FOLDER / layer.file for layer in layers]
        self._files = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in paths]
        self._direct = [_open_direct(path) for path in paths]
        self._lock = threading.Lock()
        self._entries = _map_index(folder / INDEX_FILE, len(self.extents))
        self._unchecked = 0  # bytes that may be written before the disk is looked at again
        self._closed = self._broken = False

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                for fd in [*self._files, *self._direct]:
                    if fd is not None:
                        os.close(fd)

    # ---- what is here ---------------------------------------------------------------------------

    def here(self) -> np.ndarray:
        """bool [n]: extents whose bytes should be here; whoever reads one verifies it."""
        return self._entries["here"] == 1

    def is_here(self, which: int) -> bool:
        return bool(self._entries["here"][which])

    def is_here_each(self, which: np.ndarray) -> np.ndarray:
        return self._entries["here"][which] == 1

    def crc_of(self, which: int) -> int:
        return int(self.extents.crc[which])

    def forget(self, which: np.ndarray | int) -> None:
        """They turned out not to be here."""
        self._entries["here"][which] = 0

    def value(self, values: np.ndarray) -> None:
        """float [n]: what keeping each is worth, from now on; the least worth goes first."""
        self._entries["value"][:] = values

    def pulled(self, which: np.ndarray) -> None:
        """They were asked for by name, and are worth at least PULLED from now on."""
        self._entries["pulled"][which] = 1

    def used(self, which: np.ndarray | int) -> None:
        self._entries["used"][which] = time.time()

    def read(self, which: int) -> bytes | None:
        """Payload of an extent that should be here, not verified; None if it cannot be read."""
        e = self.extents
        try:
            data = os.pread(self._files[e.file[which]], int(e.nbytes[which]), int(e.offset[which]))
        except OSError:
            return None
        return data if len(data) == e.nbytes[which] else None

    def put(self, which: int, extent: memoryview) -> bool:
        """Keeps an extent. extent: its payload, verified, and zeros up to a whole number of ALIGNMENT.

        False where there is no room for it, or the disk fails.
        """
        e = self.extents
        if self._broken or self._closed or not self._make_room(int(e.on_disk[which])):
            return False
        file, offset = int(e.file[which]), int(e.offset[which])
        try:
            self._write(file, extent, offset)
        except OSError as error:
            self._entries["here"][which] = 0
            # Full, or failing: this process goes on without.
            self._broken = error.errno not in (errno.EINTR, errno.EAGAIN)
            return False
        entry = self._entries
        entry["used"][which] = time.time()
        entry["here"][which] = 1
        return True

    def _write(self, file: int, extent: memoryview, offset: int) -> None:
        """Past the page cache where the file system and the memory allow it: reads go past it, too."""
        while len(extent):
            direct = self._direct[file]
            try:
                count = os.pwrite(self._files[file] if direct is None else direct, extent, offset)
            except OSError as error:
                if direct is None or error.errno != errno.EINVAL:
                    raise
                self._direct[file] = None  # left open: another thread may be at it
                continue
            if count == 0:
                raise OSError(errno.ENOSPC, "write of 0 bytes")
            if direct is not None and count % ALIGNMENT:
                self._direct[file] = None
            extent, offset = extent[count:], offset + count

    # ---- room -----------------------------------------------------------------------------------

    def bytes_here(self) -> int:
        return int(self.extents.on_disk[self.here()].sum())

    def _make_room(self, nbytes: int) -> bool:
        """Whether `nbytes` more may be written. Looks at the disk now and then only."""
        with self._lock:
            self._unchecked -= nbytes
            if self._unchecked >= 0:
                return True
            base = self.folder.parent
            limit = read_limit(base) if self._limit is None else self._limit
            room = room_in(base, limit)
            if room < nbytes:
                room += evict(base, nbytes - room + int(ROOM * (limit or 0)), self)
            # Others write as well; they look for themselves.
            self._unchecked = max(min((room - nbytes) // 8, 64 << 20), 0)
            return room >= nbytes

    def worth(self, now: float) -> tuple[np.ndarray, np.ndarray]:
        """int64 [k] extents that are here, and float64 [k] what they are worth by now."""
        here = np.flatnonzero(self.here())
        entries = self._entries[here]
        age = np.clip(now - entries["used"], 0, None)
        # What is worth nothing to its policy goes by age alone.
        value = np.maximum(entries["value"], PULLED * entries["pulled"])
        return here, (value + LEAST_WORTH) * 0.5 ** (age / HALF_LIFE)

    def punch(self, which: int) -> int:
        """Gives an extent's bytes back to the disk; returns how many."""
        e = self.extents
        self._entries["here"][which] = 0  # before the bytes go
        if _punch(self._files[e.file[which]], int(e.offset[which]), int(e.on_disk[which])):
            return int(e.on_disk[which])
        self._entries["here"][which] = 1
        return 0


# ---- all stores of a cache ----------------------------------------------------------------------


def read_limit(base: Path) -> int | None:
    """Bytes that the cache may take as a whole, as `comoe cache --limit` set it; None: not set."""
    try:
        return int((base / LIMIT_FILE).read_text())
    except (OSError, ValueError):
        return None


def set_limit(base: Path, limit: int | None) -> None:
    base.mkdir(parents=True, exist_ok=True)
    if limit is None:
        (base / LIMIT_FILE).unlink(missing_ok=True)
        return
    part = base / (LIMIT_FILE + f".{os.getpid()}")
    part.write_text(str(limit))
    part.replace(base / LIMIT_FILE)


def stores(base: Path) -> list[Path]:
    """Folders of all stores in a cache."""
    if not base.is_dir():
        return []
    return sorted(path for path in base.iterdir() if (path / LOCK_FILE).exists())


def disk_bytes(folder: Path) -> int:
    """Bytes that a folder's files take on the disk, holes not counted."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:
                continue
    return total


def room_in(base: Path, limit: int | None) -> int:
    """Bytes that may be written now: up to the limit, or while FREE_SHARE of the disk stays free."""
    usage = shutil.disk_usage(base)
    room = usage.free - int(FREE_SHARE * usage.total)
    if limit is None:
        return room
    return min(limit - sum(disk_bytes(folder) for folder in stores(base)), usage.free)


def last_used(folder: Path) -> float:
    """Seconds of the epoch at which its lock was taken last to use it."""
    try:
        return (folder / LOCK_FILE).stat().st_mtime
    except OSError:
        return 0.0


def in_use(folder: Path) -> bool:
    try:
        with removing(folder):
            return False
    except OSError:
        return True


def evict(base: Path, nbytes: int, mine: StoreCache | None = None) -> int:
    """Frees at least `nbytes`, if it can, and returns how many: extents that are worth least by now, of
    `mine` and of stores that no process has open; then those stores' other files, too."""
    freed, now = 0, time.time()
    with ExitStack() as held:
        owners = [] if mine is None else [mine]
        for folder in stores(base):
            if mine is not None and folder == mine.folder:
                continue
            try:
                held.enter_context(removing(folder))
                cache = StoreCache(folder, Store.open(folder).layers)
            except (BlockingIOError, StoreError, OSError):
                continue  # in use, or not whole
            held.callback(cache.close)
            owners.append(cache)
        found = [cache.worth(now) for cache in owners]
        if not found:
            return 0
        owner = np.repeat(np.arange(len(found)), [len(which) for which, _ in found])
        which = np.concatenate([which for which, _ in found])
        for i in np.argsort(np.concatenate([worth for _, worth in found]), kind="stable"):
            if freed >= nbytes:
                return freed
            freed += owners[owner[i]].punch(int(which[i]))
    for folder in sorted(stores(base), key=last_used):
        if freed >= nbytes:
            break
        if mine is None or folder != mine.folder:
            freed += remove_store(folder)
    return freed


@contextmanager
def removing(folder: Path) -> Iterator[None]:
    """Nobody opens or uses the store meanwhile. BlockingIOError if somebody does already."""
    with ExitStack() as held:
        for name in (OPENING_FILE, LOCK_FILE):
            held.callback(os.close, _hold(folder, fcntl.LOCK_EX | fcntl.LOCK_NB, name))
        yield


def remove_store(folder: Path) -> int:
    """Deletes a store. Returns the bytes freed; 0 if somebody uses it."""
    try:
        with removing(folder):
            freed = disk_bytes(folder)
            gone = folder.with_name(f"{folder.name}.removed-{os.getpid()}")
            folder.rename(gone)  # nobody may open half a store
            shutil.rmtree(gone, ignore_errors=True)
            return freed
    except OSError:
        return 0


class Holding:
    """Keeps a store's folder from being removed until it is closed, or the process ends."""

    def __init__(self, folder: Path):
        self._fd: int | None = _hold(folder, fcntl.LOCK_SH)
        os.utime(folder / LOCK_FILE)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """One process at a time makes a store's folder ready; it is made if need be."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        fd = _hold(folder, fcntl.LOCK_EX, OPENING_FILE)
        try:  # it may have been removed between the two calls
            if os.stat(folder / OPENING_FILE).st_ino == os.fstat(fd).st_ino:
                break
        except OSError:
            pass
        os.close(fd)
    try:
        yield
    finally:
        os.close(fd)


def _hold(folder: Path, how: int, name: str = LOCK_FILE) -> int:
    """A lock on a store; it ends with the file descriptor, so also with the process."""
    fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, how)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _map_index(path: Path, count: int) -> np.ndarray:
    """ENTRY [count] of the index, mapped; a new one where there is none that fits. Under `opening` or
    `removing`, since it may be replaced."""
    size, head = HEADER.size + count * ENTRY.itemsize, HEADER.pack(MAGIC, count)
    try:
        try:
            fits = path.stat().st_size == size and path.open("rb").read(HEADER.size) == head
        except FileNotFoundError:
            fits = False
        if not fits:  # by a rename: a process that has the old one mapped keeps it
            part = path.with_name(path.name + ".part")
            part.write_bytes(head + bytes(size - len(head)))
            part.replace(path)
        with path.open("r+b") as file:
            held = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be used ({error}); choose another cache folder"
        ) from error
    return np.frombuffer(held, ENTRY, count, HEADER.size)


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return None


_libc = ctypes.CDLL(None, use_errno=True)


def _punch(fd: int, offset: int, nbytes: int) -> bool:
    """Gives the bytes' blocks back to the file system; False where it cannot."""
    try:
        result = _libc.fallocate(fd, PUNCH, ctypes.c_longlong(offset), ctypes.c_longlong(nbytes))
    except AttributeError:
        return False
    return result == 0
