"""Several sources of one store as one: each request goes where it should arrive first, a late one is asked
for a second time elsewhere, a failed one is tried again.

What counts as arrived is decided by the caller (`accept`: a checksum). A source whose manifest is another
than the one pinned has another version of the store, and is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from comoe.policy.links import Links
from comoe.tiers.buffers import block
from comoe.tiers.source import (
    BadAnswer,
    Cancelled,
    Changed,
    Gone,
    Source,
    SourceError,
    TooSlow,
    Transfer,
)

PATIENCE = 30.0  # seconds that a request may take over all attempts
MOST_WRONG = 3  # wrong checksums of one request, per source
WATCH_SECONDS = 0.01
SLOW_SECONDS = 5.0  # in which at least SLOW_BYTES must come
SLOW_BYTES = 2 << 10
LACK_SECONDS = 60.0  # for which a file that a source does not have is not asked for again
HEDGERS = 2
PROBE_SECONDS, PROBE_GROWTH, MOST_PROBE_SECONDS = 0.3, 1.1, 10.0  # between probes of one source
PROBE_TIMEOUT = 1.0
CLOSE_SECONDS = 5.0  # for threads to end: fsspec's calls cannot be ended from outside
MOST_MANIFEST = 16 << 20


class NoSourceError(OSError):
    """No source gave what was asked for, within the patience."""


class _Job:
    """One range that somebody wants. active: transfers under way, by source."""

    def __init__(
        self,
        path: str,
        offset: int,
        nbytes: int,
        size: int | None,
        accept: Callable[[memoryview], bool],
    ):
        self.path, self.offset, self.nbytes, self.size = path, offset, nbytes, size
        self.accept = accept
        self.active: dict[str, Transfer] = {}
        self.done = threading.Event()
        self.changed = threading.Event()  # a hedge has ended
        self.wrong = 0
        self.hedged = False


class _Running:
    def __init__(self, job: _Job, transfer: Transfer, hedge_after: float):
        self.job, self.transfer = job, transfer
        self.hedge_at = transfer.began + hedge_after
        self.window = transfer.began, 0  # begin and bytes at begin of the window of SLOW_SECONDS


class Sources:
    """Of one store. `fetch` may be called from several threads.

    patience: seconds that one `fetch` may take at most, if it is not told otherwise.
    """

    def __init__(
        self, sources: Sequence[Source], *, links: Links | None = None, patience: float = PATIENCE
    ):
        self._by_name = {source.name: source for source in sources}
        if len(self._by_name) < len(sources):
            raise ValueError("expected every source once; two have the same URL")
        self.links = links or Links(self._by_name)
        self.patience = patience
        self.hedges = self.hedges_won = self.retries = 0
        self._pinned: bytes | None = None  # hash of the manifest
        self._manifest_path = ""
        self._same: dict[str, float] = {}  # when a source's manifest was last seen to be the pinned
        self._lacks: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()
        self._running: dict[Transfer, _Running] = {}
        self._wake = threading.Condition(self._lock)
        self._threads: list[threading.Thread] = []
        self._heard: dict[str, float] = {}  # when the last byte came, by source
        self._hedges: queue.SimpleQueue[tuple[_Job, str] | None] = queue.SimpleQueue()
        self._closed = False
        self._stop = threading.Event()
        self._probe_transfer: Transfer | None = None

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    # ---- identity -------------------------------------------------------------------------------

    def pin(
        self,
        path: str,
        is_whole: Callable[[bytes], bool] = bool,
        patience: float | None = None,
    ) -> bytes:
        """The file that stands for the store's version, from the first source that gives it. All sources
        must have the same from now on. is_whole: whether it is one, and undamaged."""
        errors: dict[str, SourceError] = {}
        give_up = time.monotonic() + (self.patience if patience is None else patience)
        while True:
            for name in self.links.order(0):
                try:
                    found = self._read_all(name, path, MOST_MANIFEST)
                    if not is_whole(found):
                        raise BadAnswer(f"{name}: {path}: damaged, or not what the name says")
                except SourceError as error:
                    errors[name] = error
                    self._failed(name, error)
                    continue
                self._manifest_path, self._pinned = path, hashlib.sha256(found).digest()
                self._same[name] = time.monotonic()
                return found
            lasting = errors and all(error.lasting for error in errors.values())
            pause = self.links.retry_in()
            if lasting or time.monotonic() + pause > give_up:
                raise NoSourceError(_reasons(errors))
            time.sleep(pause)

    def pin_known(self, path: str, manifest: bytes) -> None:
        """As `pin`, of a manifest that is here."""
        self._manifest_path, self._pinned = path, hashlib.sha256(manifest).digest()

    def _read_all(self, name: str, path: str, most: int) -> bytes:
        """A whole file. Never Changed: of a file asked for whole that says nothing."""
        transfer = Transfer(name, 0, lambda *_: None)
        with self._watched(_Running(_Job(path, 0, SLOW_BYTES, None, bool), transfer, float("inf"))):
            try:
                return self._by_name[name].read_all(path, most, transfer)
            except Changed as error:
                raise BadAnswer(str(error)) from None

    def _require_same(self, name: str, since: float) -> None:
        """Changed unless the source's manifest was the pinned one, seen after `since`."""
        if self._pinned is None or self._same.get(name, -1.0) > since:
            return
        # Twice the same, or it is a bad link and no other version.
        read = [self._read_all(name, self._manifest_path, MOST_MANIFEST)]
        if hashlib.sha256(read[0]).digest() != self._pinned:
            self._same.pop(name, None)
            read.append(self._read_all(name, self._manifest_path, MOST_MANIFEST))
            if read[0] != read[1]:
                raise BadAnswer(f"{name}: {self._manifest_path}: damaged on its way")
            raise Changed(
                f"{name}: it has another version of the store than the one that was opened; load the model "
                "again to use that one"
            )
        self._same[name] = time.monotonic()

    # ---- one request ----------------------------------------------------------------------------

    def fetch(
        self,
        path: str,
        offset: int,
        nbytes: int,
        accept: Callable[[memoryview], bool],
        *,
        size: int | None = None,
        patience: Callable[[], float] | None = None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Gets bytes [offset, offset + nbytes) of file `path` and gives them to `accept`, in some thread,
        perhaps more than once and from several threads; it returns whether they are right.

        patience: seconds, asked again whenever no source may be asked.

        Raises NoSourceError once patience is over, with what each source said last, and Cancelled once
        `wanted()` is false.
        """
        job = _Job(path, offset, nbytes, size, accept)
        patience = patience or (lambda: self.patience)
        began = time.monotonic()
        errors: dict[str, SourceError] = {}
        while not job.done.is_set():
            if not wanted() or self._closed:
                raise Cancelled("nobody wants it any more")
            job.changed.clear()
            lacking = self._lacking(path)
            names = self.links.order(nbytes, {*lacking, *job.active})
            if names:
                name = names[0]
                try:
                    self._attempt(job, name, block(nbytes))
                except SourceError as error:
                    if not job.done.is_set():
                        errors[name] = error
                        self.retries += 1
                continue
            if job.active:  # a hedge is under way
                job.changed.wait(0.05)
                continue
            pause = self.links.retry_in(lacking)
            hopeless = job.wrong >= MOST_WRONG * len(self._by_name)
            if hopeless or time.monotonic() + pause - began > patience():
                raise NoSourceError(_reasons(errors) or "every source is left alone for a while")
            job.done.wait(min(pause, 0.05) + 1e-3)

    def _attempt(self, job: _Job, name: str, view: memoryview, hedge: bool = False) -> None:
        source = self._by_name[name]
        transfer = Transfer(name, job.nbytes, self._progress)
        job.active[name] = transfer
        expected = self.links.began(name, job.nbytes, hedge=hedge)
        ratio = None
        try:
            self._require_same(name, -1.0)
            late = float("inf") if hedge else self.links.hedge_after(name, job.nbytes, expected)
            transfer.began = time.monotonic()
            with self._watched(_Running(job, transfer, late)):
                source.read_into(job.path, job.offset, view, transfer, job.size)
            if not job.accept(view):
                job.wrong += 1
                raise BadAnswer(f"{name}: {job.path}: wrong checksum at offset {job.offset:,}")
            ratio = (time.monotonic() - transfer.began) / max(expected, 1e-6)
            job.done.set()
            for other in list(job.active.values()):
                if other is not transfer:
                    other.abort(Cancelled("another source was first"))
        except SourceError as error:
            if isinstance(error, Cancelled):
                raise
            error = self._reconsidered(name, job.path, error, transfer.began)
            self._failed(name, error, job.path)
            raise error from None
        finally:
            missing = job.nbytes - transfer.received
            self.links.ended(name, missing, transfer.first_byte is not None, ratio)
            job.active.pop(name, None)
            job.changed.set()

    def _reconsidered(self, name: str, path: str, error: SourceError, began: float) -> SourceError:
        """Bytes that are wrong, or of another version: is it the store that was exchanged, or only that
        file's ETag, or a bad link?"""
        if not isinstance(error, (Changed, BadAnswer)):
            return error
        self._by_name[name].forget(path)
        try:
            self._require_same(name, began)
        except Changed as changed:
            return changed
        except SourceError:
            pass  # not known: asked again soon
        return BadAnswer(str(error)) if isinstance(error, Changed) else error

    def _failed(self, name: str, error: SourceError, path: str | None = None) -> None:
        if isinstance(error, Gone) and path is not None:
            self._lacks[name, path] = time.monotonic()  # it may have others
        else:
            self.links.failed(name, lasting=error.lasting, retry_after=error.retry_after)

    def _lacking(self, path: str) -> set[str]:
        now = time.monotonic()
        return {
            name
            for name in self._by_name
            if now - self._lacks.get((name, path), -LACK_SECONDS) < LACK_SECONDS
        }

    def _progress(self, transfer: Transfer, count: int) -> None:
        self._heard[transfer.source] = transfer.last
        if count == 0:
            self.links.answered(transfer.source, transfer.last - transfer.began)
        else:
            self.links.received(transfer.source, count)

    # ---- watching -------------------------------------------------------------------------------

    def _watched(self, running: _Running) -> _Watch:
        return _Watch(self, running)

    def _watch(self) -> None:
        while True:
            with self._wake:
                while not self._running and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                running = list(self._running.values())
            now = time.monotonic()
            self._find_stalled(running, now)
            for one in running:
                begin, had = one.window
                if now - begin >= SLOW_SECONDS:
                    if one.transfer.received - had < min(SLOW_BYTES, one.job.nbytes):
                        text = f"{one.transfer.source}: {one.job.path}: less than {SLOW_BYTES:,} bytes in {SLOW_SECONDS:g} s"
                        one.transfer.abort(TooSlow(text))
                    one.window = now, one.transfer.received
                if now >= one.hedge_at and not one.job.hedged:
                    self._hedge(one)
            time.sleep(WATCH_SECONDS)

    def _find_stalled(self, running: list[_Running], now: float) -> None:
        """A source that owes answers and says nothing, on any connection, is gone for the moment."""
        since: dict[str, float] = {}
        for one in running:
            name, began = one.transfer.source, one.transfer.began
            since[name] = min(since.get(name, began), began)
        for name, began in since.items():
            if now - max(began, self._heard.get(name, began)) > self.links.silence(name):
                self.links.stalled(name)

    def _probe(self) -> None:
        """Asks sources that were left alone whether they are back, so that nobody has to try in vain, and
        what hangs on a dead connection is asked for again at once."""
        due: dict[str, tuple[float, float]] = {}  # when next, and how long after that
        while not self._stop.wait(PROBE_SECONDS / 4):
            now = time.monotonic()
            wanted = self.links.to_probe()
            due = {name: due.get(name, (now, PROBE_SECONDS)) for name in wanted}
            for name in wanted:
                at, pause = due[name]
                if now < at or not self._manifest_path:
                    continue
                asked = time.monotonic()
                transfer = Transfer(name, 1, lambda *_: None, timeout=PROBE_TIMEOUT)
                with self._probing(transfer):
                    back = self._by_name[name].probe(self._manifest_path, PROBE_TIMEOUT, transfer)
                if back:
                    self._recovered(name, asked)
                pause = min(pause * PROBE_GROWTH, MOST_PROBE_SECONDS)
                due[name] = time.monotonic() + pause * random.uniform(0.7, 1.3), pause

    def _recovered(self, name: str, asked: float) -> None:
        self.links.recovered(name)
        with self._lock:
            running = [one.transfer for one in self._running.values()]
        for transfer in running:
            if transfer.source == name and transfer.last < asked - self.links.silence(name) / 2:
                transfer.abort(TooSlow(f"{name}: the connection was lost"))

    def path_changed(self, lost: bool) -> None:
        """Another way leads to the sources now, and all may be asked at once. lost: an interface is gone, and
        with it perhaps what is under way: that is asked for again, rather than waited for."""
        with self._lock:
            running = [one.transfer for one in self._running.values()] if lost else []
        for transfer in running:
            transfer.abort(TooSlow(f"{transfer.source}: the network interface was lost"))
        self.links.path_changed()

    @contextlib.contextmanager
    def _probing(self, transfer: Transfer) -> Iterator[None]:
        """So that `close` can end it."""
        self._probe_transfer = transfer
        try:
            yield
        finally:
            self._probe_transfer = None

    def _hedge(self, late: _Running) -> None:
        job = late.job
        names = self.links.order(job.nbytes, {*self._lacking(job.path), *job.active})
        if not names or job.done.is_set():
            return
        job.hedged = True
        self.hedges += 1
        self._hedges.put((job, names[0]))

    def _hedger(self) -> None:
        while (found := self._hedges.get()) is not None:
            job, name = found
            if job.done.is_set() or name in job.active:
                continue
            try:
                self._attempt(job, name, block(job.nbytes), hedge=True)
                self.hedges_won += 1
            except SourceError:
                pass  # the first request goes on

    def _start(self) -> None:
        if self._threads or self._closed:
            return
        targets = [self._watch, self._probe] + [self._hedger] * (
            HEDGERS if len(self._by_name) > 1 else 0
        )
        self._threads = [
            threading.Thread(target=target, name="comoe-sources", daemon=True) for target in targets
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends what is under way."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            self._wake.notify_all()
            running = [one.transfer for one in self._running.values()]
        self._stop.set()
        for transfer in [*running, self._probe_transfer]:
            if transfer is not None:
                transfer.abort(Cancelled("closed"))
        for _ in range(HEDGERS):
            self._hedges.put(None)
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)
        for source in self._by_name.values():
            source.close()


class _Watch:
    """While it lasts, the watchdog looks at a transfer."""

    def __init__(self, owner: Sources, running: _Running):
        self._owner, self._running = owner, running

    def __enter__(self) -> None:
        owner = self._owner
        with owner._wake:
            owner._start()
            owner._running[self._running.transfer] = self._running
            owner._wake.notify_all()

    def __exit__(self, *_: object) -> None:
        with self._owner._wake:
            del self._owner._running[self._running.transfer]


def _reasons(errors: dict[str, SourceError]) -> str:
    return "; ".join(dict.fromkeys(str(error) for error in errors.values()))
