"""Asks a machine that runs `comoe serve-experts` to compute experts: activations go over, outputs come back.

Connections are kept and used again; any number of threads may call. The standard library's HTTP client: a small POST
over loopback took 220 us with it, 380 with urllib3, 740 with httpx (uvicorn at the other end). Every call ends within its
time-out with a result or one of the errors below; a call has no effect on the server, so one that met a connection that the
server had closed meanwhile is sent once more.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np

from comoe.tiers.expert_wire import (
    FORMATS,
    Call,
    Result,
    WireError,
    pack_call,
    result_bytes,
    unpack_result,
)

MOST_TEXT = 1 << 20  # bytes of an answer that is not a result
PART = 1 << 16


class ExpertServerError(OSError):
    """No result; the message says of which server and why. `retry_after`: seconds, if it said so."""

    retry_after: float | None = None


class Unreachable(ExpertServerError):
    """No connection, or one that broke."""


class TimedOut(ExpertServerError):
    """No whole answer in time."""


class Unauthorized(ExpertServerError):
    """The server does not know the token."""


class Overloaded(ExpertServerError):
    """The server's queue is full; try again after `retry_after`."""


class Refused(ExpertServerError):
    """The server will not do it: another store, a call too large, a path that is not there."""


class BadAnswer(ExpertServerError):
    """Not what the protocol says, or damaged."""


@dataclass(frozen=True)
class ServerInfo:
    """store_id: of the packed store.  levels: per layer uint8 [E], at which each expert is computed.
    level_names: of the store.  max_bytes: of a call."""

    store_id: bytes
    levels: tuple[np.ndarray, ...]
    level_names: tuple[str, ...]
    max_bytes: int


class ExpertClient:
    """url: "http://host:port" or https.  token: the server's.  wire: "bf16" or "int8".
    timeout: seconds that a call may take in all.  ca_file: certificates to trust instead of the system's.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        wire: str = "bf16",
        timeout: float = 10.0,
        ca_file: str | None = None,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ValueError(
                "ExpertClient: url: expected http://host:port or https://host:port, got "
                f"{parts.scheme}://{parts.hostname or ''}"
            )
        if wire not in FORMATS:
            raise ValueError(f"ExpertClient: wire: expected one of {FORMATS}, got {wire!r}")
        if not token.isascii() or not token.isprintable() or not token:
            raise ValueError("ExpertClient: token: expected printable ASCII, as in the token file")
        self.url, self.wire, self.timeout = url.rstrip("/"), wire, timeout
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/")
        self._tls = None
        if parts.scheme == "https":
            self._tls = ssl.create_default_context(cafile=ca_file)
        self._headers = {"Authorization": f"Bearer {token}"}
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._closed = False
        self._max_bytes: int | None = None  # of a call, once `info` has said

    def info(self, timeout: float | None = None) -> ServerInfo:
        """What the server has."""
        body = self._ask("GET", "/v1/info", None, MOST_TEXT, timeout)
        try:
            said = json.loads(body)
            levels = tuple(np.array(layer, np.uint8) for layer in said["levels"])
            info = ServerInfo(
                bytes.fromhex(said["store_id"]),
                levels,
                tuple(map(str, said["level_names"])),
                int(said["max_bytes"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BadAnswer(f"{self.url}: /v1/info is not what it should be: {error}") from error
        self._max_bytes = info.max_bytes
        return info

    def compute(self, call: Call, timeout: float | None = None) -> Result:
        """The result of a call, in this client's wire format (`call.wire`)."""
        tokens, hidden = call.x.shape
        expected = result_bytes(tokens, hidden, call.wire)
        data = pack_call(call)
        # A server that refuses a long call closes the connection, and its answer may be lost with it.
        if self._max_bytes is not None and len(data) > self._max_bytes:
            raise Refused(f"{self.url}: takes calls of {self._max_bytes} bytes, not {len(data)}")
        body = self._ask("POST", "/v1/experts", data, expected, timeout)
        try:
            return unpack_result(body, tokens, hidden, call.wire)
        except WireError as error:
            raise BadAnswer(f"{self.url}: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for link in idle:
            link.close()

    # ---- one request --------------------------------------------------------------------------

    def _ask(
        self, method: str, path: str, body: bytes | None, most: int, timeout: float | None
    ) -> bytes:
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            link, used = self._take()
            try:
                return self._once(link, method, path, body, most, end)
            except TimeoutError as error:
                raise TimedOut(f"{self.url}: no whole answer in time") from error
            except ExpertServerError:
                raise
            except (http.client.HTTPException, OSError, ValueError) as error:
                stale = used and isinstance(
                    error, (http.client.RemoteDisconnected, ConnectionError, BrokenPipeError)
                )
                if not stale:
                    known = isinstance(error, (OSError, http.client.HTTPException))
                    kind = Unreachable if known else BadAnswer
                    raise kind(f"{self.url}: {type(error).__name__}: {error}") from error

    def _once(
        self,
        link: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None,
        most: int,
        end: float,
    ) -> bytes:
        """One request on a connection, which is kept only if the answer was whole."""
        keep = False
        try:
            link.timeout = _left(end)
            if link.sock is None:
                link.connect()
                link.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.sock.settimeout(_left(end))
            link.request(method, self._path + path, body, self._headers)
            answer = link.getresponse()
            data = self._read(link, answer, most, end)
            if answer.status != 200:
                raise self._error(answer, data)
            keep = not answer.will_close
            return data
        finally:
            self._give(link, keep)

    def _read(
        self,
        link: http.client.HTTPConnection,
        answer: http.client.HTTPResponse,
        most: int,
        end: float,
    ) -> bytes:
        """The body, however slowly it comes, until `end`."""
        most = most if answer.status == 200 else MOST_TEXT
        if answer.length is not None and answer.length > most:
            raise BadAnswer(f"{self.url}: expected at most {most} bytes, got {answer.length}")
        parts, total = [], 0
        while True:
            if link.sock is not None:  # None: the answer owns the connection now
                link.sock.settimeout(_left(end))
            _left(end)
            part = answer.read1(PART)
            if not part:
                break
            parts.append(part)
            total += len(part)
            if total > most:
                raise BadAnswer(f"{self.url}: expected at most {most} bytes, got more")
        answer.close()  # or the next request on this connection is refused
        if answer.length:
            raise Unreachable(f"{self.url}: the connection ended within the answer")
        return b"".join(parts)

    def _error(self, answer: http.client.HTTPResponse, data: bytes) -> ExpertServerError:
        text = data[:300].decode("utf-8", "replace")
        kind = {401: Unauthorized, 403: Unauthorized, 429: Overloaded, 503: Overloaded}.get(
            answer.status, Refused if 300 <= answer.status < 500 else BadAnswer
        )
        error = kind(f"{self.url}: {answer.status} {answer.reason}: {text}")
        wait = answer.getheader("Retry-After", "")
        if wait.isascii() and wait.isdigit():
            error.retry_after = float(wait)
        return error

    # ---- connections --------------------------------------------------------------------------

    def _take(self) -> tuple[http.client.HTTPConnection, bool]:
        """A connection, and whether it was used before."""
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.url}: this client was closed")
            if self._idle:
                return self._idle.pop(), True
        if self._tls is not None:
            return http.client.HTTPSConnection(self._host, self._port, context=self._tls), False
        return http.client.HTTPConnection(self._host, self._port), False

    def _give(self, link: http.client.HTTPConnection, keep: bool) -> None:
        with self._lock:
            if keep and not self._closed:
                self._idle.append(link)
                return
        link.close()


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("no time is left")
    return left
