"""What a source of bytes is: files by path, read by range, and the ways in which that may fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

STALL_SECONDS = 10.0


class SourceError(OSError):
    """A source did not give what was asked for. The text names it, without secrets, and says why.

    lasting: asking again soon is of no use.  retry_after: seconds that the source asked for, or 0.
    """

    lasting = False

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


class Unreachable(SourceError):
    """No connection, or it broke."""


class TooSlow(SourceError):
    """Nothing came for too long, or so little that waiting is of no use."""


class BadAnswer(SourceError):
    """Wrong length, wrong range, wrong checksum, not the protocol."""


class Busy(SourceError):
    """The server has trouble or too much to do (429, 5xx)."""


class Gone(SourceError):
    """It has no such file (404, 410)."""

    lasting = True


class Refused(SourceError):
    """It does not let us (401, 403), or cannot serve ranges."""

    lasting = True


class Changed(SourceError):
    """It has another version of the file by now."""

    lasting = True


class Cancelled(SourceError):
    """Ended from our side: nobody wants it any more."""


class Transfer:
    """One request under way: how far it is, and the way to end it from another thread.

    began, first_byte: seconds of time.monotonic; first_byte is None until the answer begins.
    timeout: seconds without a connection or a byte after which the source gives up.
    """

    def __init__(
        self,
        source: str,
        nbytes: int,
        on_progress: Callable[[Transfer, int], None],
        timeout: float = STALL_SECONDS,
    ):
        self.source, self.nbytes, self.timeout = source, nbytes, timeout
        self.began = self.last = time.monotonic()
        self.first_byte: float | None = None
        self.received = 0
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._close: Callable[[], None] | None = None
        self._ended: SourceError | None = None

    def begin_body(self) -> None:
        """The answer's head has come, and it is a good one."""
        self.last = time.monotonic()
        if self.first_byte is None:
            self.first_byte = self.last
            self._on_progress(self, 0)

    def progress(self, count: int) -> None:
        """`count` more bytes are here. Raises what `abort` was given."""
        self.last = time.monotonic()
        self.received += count
        self._on_progress(self, count)
        self.check()

    def check(self) -> None:
        if self._ended is not None:
            raise self._ended

    def closes_by(self, close: Callable[[], None]) -> None:
        """How to break what the source waits on from now on."""
        with self._lock:
            self._close = close
        self.check()

    def rests(self) -> None:
        """The source waits on nothing, and what it waited on is not this transfer's any more."""
        with self._lock:
            self._close = None

    def abort(self, reason: SourceError) -> None:
        """Ends it: the source raises `reason` as soon as it can."""
        with self._lock:
            if self._ended is None:
                self._ended = reason
            if self._close is not None:
                self._close()


class Source(Protocol):
    """A place that holds the files of a packed folder. Used by several threads at once."""

    name: str  # redacted URL

    def read_into(
        self, path: str, offset: int, view: memoryview, transfer: Transfer, size: int | None = None
    ) -> None:
        """Fills `view`, uint8 [n], with bytes [offset, offset + n) of file `path`, or raises SourceError.

        size: bytes that the whole file must have, where that is known.
        """

    def read_all(self, path: str, most: int, transfer: Transfer) -> bytes:
        """A file of unknown size, at most `most` bytes."""

    def probe(self, path: str, seconds: float, transfer: Transfer) -> bool:
        """Whether it answers at all within about that time, asked over a new connection."""

    def forget(self, path: str) -> None:
        """Believes the file's present version from now on (ETag), and looks up redirects anew."""

    def close(self) -> None: ...


def open_source(url: str) -> Source:
    """The source for a URL: http(s) by the client of http_source.py, all else by fsspec."""
    scheme = url.partition("://")[0].lower()
    if scheme in ("http", "https"):
        from comoe.tiers.http_source import HttpSource

        return HttpSource(url)
    from comoe.tiers.fsspec_source import FsspecSource

    return FsspecSource(url)
