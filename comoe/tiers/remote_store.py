"""Opens a packed folder by its URL: what is small comes into the local cache at once, experts when wanted.

The cache's folder is named by the manifest's hash, so the same store from another place is the same folder, and
a changed store another one. What was opened stays: manifest, configuration, tokenizer and dense weights are
read from the cache from then on.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from comoe import _C
from comoe.policy.links import Links
from comoe.store import Store, StoreError, checks
from comoe.store import format as fmt
from comoe.store.sums import FileSum, read_sums
from comoe.tiers import cache
from comoe.tiers.source import open_source
from comoe.tiers.sources import PATIENCE, NoSourceError, Sources
from comoe.tiers.urls import redacted

MANIFEST_PATH = f"{fmt.EXPERTS_FOLDER}/{fmt.MANIFEST_FILE}"
URL_FILE = ".comoe-url"
KNOWN_PATIENCE = 3.0  # seconds that a store that is in the cache waits for its sources
FIRST_HEADER = (
    64 << 10
)  # bytes of a layer file that are asked for before its header's size is known
MOST_HEADER = (
    fmt.LAYER_HEADER.itemsize
    + fmt.MAX_EXPERTS * fmt.MAX_RECORDS * fmt.RECORD.itemsize
    + 2 * fmt.MAX_NAME_BYTES
)
DOWNLOADS = 4  # at once, of what is fetched before a model can start

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_current: ContextVar[RemoteStore | None] = ContextVar("comoe_remote_store", default=None)


class RemoteStore:
    """A store elsewhere, and its local copy. `folder` is a packed folder with holes in its layer files."""

    def __init__(
        self,
        folder: Path,
        sources: Sources,
        holding: cache.Holding,
        limit: int | None = None,
        offline: str = "",
    ):
        """offline: why no source could be asked when it was opened."""
        self.folder, self.sources, self.offline = folder, sources, offline
        self._holding = holding
        self.store = Store.open(folder)
        self.cache = cache.StoreCache(folder, self.store.layers, limit)

    @classmethod
    def open(
        cls,
        urls: str | Iterable[str],
        *,
        base: Path | None = None,
        limit: int | None = None,
        patience: float = PATIENCE,
        links: Links | None = None,
        progress: Progress = lambda done, total: None,
        dense: bool = True,
    ) -> RemoteStore:
        """Fetches what a model needs to start, as far as it is not here.

        urls: of the packed folder, one per source; all must have the same store.  base: folder of the cache.
        limit: bytes that the whole cache may take.  patience: seconds that one request may take over all
        attempts.  progress(done, total): bytes fetched.  dense: with False, only what describes the experts.

        When no source answers and the store at the first URL was opened before, that one is opened from the
        cache alone: `offline` says so.

        Raises NoSourceError (an OSError) when no source answers, StoreError for a store that is damaged.
        """
        urls = [urls] if isinstance(urls, str) else list(urls)
        base = cache.root() if base is None else base
        sources = Sources([open_source(url) for url in urls], links=links, patience=patience)
        try:
            offline, known = "", _opened_before(base, urls[0])
            least = patience if known is None else min(patience, KNOWN_PATIENCE)
            try:
                raw = sources.pin(MANIFEST_PATH, checks.manifest_is_whole, least)
                folder = base / folder_name(urls[0], raw)
            except NoSourceError as error:
                if known is None:
                    raise
                folder, offline = known, str(error)
                raw = (folder / MANIFEST_PATH).read_bytes()
                sources.pin_known(MANIFEST_PATH, raw)
            with cache.opening(folder):
                holding = cache.Holding(folder)
                try:
                    _Opening(folder, sources, raw, progress, dense).run()
                    _note_url(folder, urls[0])
                    return cls(folder, sources, holding, limit, offline)
                except BaseException:
                    holding.close()
                    raise
        except BaseException:
            sources.close()
            raise

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While it lasts, a model that this thread loads from `folder` gets its experts from here."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def describe(self) -> str:
        return ", ".join(self.sources.names)

    def close(self) -> None:
        """What is here stays. May be called twice."""
        self.sources.close()
        self.cache.close()
        self._holding.close()


def current(folder: Path) -> RemoteStore | None:
    """The remote store that a model in `folder` is being loaded from. StoreError for a folder of the cache
    that is loaded without it: its experts are mostly holes."""
    found = _current.get()
    if found is not None and found.folder.resolve() == folder.resolve():
        return found
    if (folder / cache.INDEX_FILE).exists():
        raise StoreError(f"{folder} is comoe's cache of a remote store; load it by its URL")
    return None


def folder_name(url: str, manifest: bytes) -> str:
    """Of a store's cache: something to recognise it by, and the hash of its manifest."""
    last = redacted(url).rstrip("/").rpartition("/")[2]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.")[:60] or "store"
    return f"{plain}-{hashlib.sha256(manifest).hexdigest()[:16]}"


def _note_url(folder: Path, url: str) -> None:
    """Remembers that the store was found there; not the URL itself, which may have secrets in it."""
    _write_whole(folder / URL_FILE, hashlib.sha256(url.encode()).hexdigest().encode())


def _opened_before(base: Path, url: str) -> Path | None:
    """The folder of the store that was last found at a URL."""
    mark = hashlib.sha256(url.encode()).hexdigest().encode()
    found = []
    for folder in cache.stores(base):
        try:
            if (folder / URL_FILE).read_bytes() == mark and (folder / MANIFEST_PATH).is_file():
                found.append(((folder / URL_FILE).stat().st_mtime, folder))
        except OSError:
            continue
    return max(found)[1] if found else None


class _Opening:
    """Makes a folder of the cache ready; run by one process at a time."""

    def __init__(
        self, folder: Path, sources: Sources, manifest: bytes, progress: Progress, dense: bool
    ):
        self.folder, self.sources, self.raw, self.dense = folder, sources, manifest, dense
        self.experts = folder / fmt.EXPERTS_FOLDER
        self.progress = progress
        self.done = self.total = 0

    def run(self) -> None:
        self.experts.mkdir(exist_ok=True)
        where = self.sources.names[0]
        path = self.experts / fmt.MANIFEST_FILE
        if not path.exists() or path.read_bytes() != self.raw:
            _write_whole(path, self.raw)
        try:
            manifest = checks.read_manifest(self.experts)
        except StoreError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise StoreError(f"{where}: {_without(error, path)}") from None
        sums = {
            self.folder / name: (name, found) for name, found in read_sums(manifest, where).items()
        }
        if not self.dense:
            sums = {}
        losses = manifest.extra.get("losses")
        if losses is not None:
            sums[self.experts / fmt.LOSSES_FILE] = _losses_sum(losses, where)
        missing = {
            local: wanted
            for local, wanted in sums.items()
            if not local.exists() or local.stat().st_size != wanted[1].nbytes
        }
        layers = [e for i, e in enumerate(manifest.layers) if not self._has_header(e, i)]
        self.total = sum(wanted[1].nbytes for wanted in missing.values())
        free = shutil.disk_usage(self.folder).free
        if free < self.total:
            raise StoreError(
                f"{self.folder}: {self.total:,} bytes are needed for what is beside the experts, {free:,} are free; "
                "make room, or set XDG_CACHE_HOME to a folder on another disk"
            )
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            work = [pool.submit(self._header, entry) for entry in layers]
            try:
                for local, (path, wanted) in missing.items():
                    self._file(local, path, wanted, pool)
                for one in work:
                    one.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress(self.done, self.total)

    # ---- files ----------------------------------------------------------------------------------

    def _file(self, local: Path, path: str, wanted: FileSum, pool: ThreadPoolExecutor) -> None:
        """Fetches what is missing of a file; it appears under its name whole. An earlier attempt's chunks
        are taken over where their checksums are right."""
        part = local.with_name(local.name + ".part")
        with open(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", 0) as file:
            os.ftruncate(file.fileno(), wanted.nbytes)

            def chunk(offset: int, nbytes: int, crc: int) -> None:
                if _C.crc32c(os.pread(file.fileno(), nbytes, offset)) != crc:

                    def accept(view: memoryview) -> bool:
                        if _C.crc32c(view) != crc:
                            return False
                        _write_all(file.fileno(), view, offset)
                        return True

                    self.sources.fetch(path, offset, nbytes, accept, size=wanted.nbytes)
                self._advance(nbytes)

            work = [pool.submit(chunk, *one) for one in wanted.chunks()]
            try:
                for one in work:
                    one.result()
            except BaseException:
                for one in work:
                    one.cancel()
                for one in work:
                    if not one.cancelled():
                        one.exception()
                raise
            os.fsync(file.fileno())
        part.replace(local)

    # ---- layer files ----------------------------------------------------------------------------

    def _has_header(self, entry: dict, layer_idx: int) -> bool:
        try:
            checks.check_layer(self.experts, entry, layer_idx)
            return True
        except StoreError:
            return False

    def _header(self, entry: dict) -> None:
        name, size = _plain_name(entry.get("file"), self.sources.names[0]), entry["bytes"]
        path, nbytes = f"{fmt.EXPERTS_FOLDER}/{name}", min(FIRST_HEADER, size)
        crc = int(entry["header_crc32c"], 16)
        found: list[bytes] = []
        wanted: list[int] = []

        def accept(view: memoryview) -> bool:
            length = _header_bytes(view, size)
            if length is None:
                return False
            if length > len(view):  # believed only with the rest, whose checksum covers it
                wanted.append(length)
                return True
            found.append(bytes(view[:length]))
            return _header_crc(view[:length]) == crc

        for _ in range(3):
            self.sources.fetch(path, 0, nbytes, accept, size=size)
            if not wanted:
                break
            nbytes = wanted.pop()
        else:
            raise StoreError(f"{self.sources.names[0]}: {path}: its header makes no sense")
        local = self.experts / name
        part = local.with_name(local.name + ".part")
        with open(part, "wb") as file:
            file.write(found[-1])
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
        part.replace(local)


def _header_bytes(view: memoryview, size: int) -> int | None:
    """What a layer file's first bytes say of the length of its header; None where that cannot be."""
    head = fmt.LAYER_HEADER
    if len(view) < head.itemsize or bytes(view[:8]) != fmt.LAYER_MAGIC:
        return None
    (length,) = struct.unpack_from("<I", view, head.fields["header_bytes"][1])
    return length if head.itemsize <= length <= min(MOST_HEADER, size) else None


def _header_crc(view: memoryview) -> int:
    at = fmt.LAYER_HEADER.fields["header_crc32c"][1]
    text = bytearray(view)
    text[at : at + 4] = bytes(4)
    return _C.crc32c(text)


def _plain_name(name: object, where: str) -> str:
    plain = isinstance(name, str) and 0 < len(name) <= 255 and not name.startswith(".")
    if not plain or set("/\\\0") & set(name):
        raise StoreError(f"{where}: a layer's file must be a plain name, got {name!r}")
    return name


def _losses_sum(entry: object, where: str) -> tuple[str, FileSum]:
    """losses.npz, which the manifest names with one checksum of the whole."""
    try:
        nbytes, crc = entry["bytes"], int(entry["crc32c"], 16)
        if entry["file"] != fmt.LOSSES_FILE or type(nbytes) is not int or not 0 < nbytes < 1 << 30:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise StoreError(f"{where}: losses makes no sense; {checks.DAMAGED}") from None
    return f"{fmt.EXPERTS_FOLDER}/{fmt.LOSSES_FILE}", FileSum(nbytes, nbytes, (crc,))


def _without(error: Exception, path: Path) -> str:
    """An error's text without the local path, which says nothing to who gave a URL."""
    return str(error).replace(str(path), fmt.MANIFEST_FILE).replace(str(path.parent), "the folder")


def _write_whole(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
