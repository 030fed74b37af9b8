"""A store on any web server, by range requests over connections that are kept.

The standard library's client reads straight into our buffer. One connection to nginx on loopback, 1 MiB
ranges: 1.99 GB/s; urllib3 1.68, httpx2 0.51, fsspec's own (aiohttp) 0.45; at 64 KiB 0.28, 0.22, 0.12 and 0.12
(bench/bench_remote.py). And it shows its socket, so that a watchdog can end what a server drags out.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from comoe.tiers.source import (
    BadAnswer,
    Busy,
    Changed,
    Gone,
    Refused,
    SourceError,
    TooSlow,
    Transfer,
    Unreachable,
)
from comoe.tiers.urls import below, redacted

KEEP_SECONDS = 45.0  # servers close what is idle after 60 or more
MOST_REDIRECTS = 5
# Bytes between two looks at whether the transfer is still wanted: more where they come within PART_SECONDS. From a server
# on the same machine parts of 256 KiB brought 1.6 GB/s, of 1 MiB 2.6.
LEAST_PART, MOST_PART = 256 << 10, 1 << 20
PART_SECONDS = 0.002
PLAIN_HEADERS = {"User-Agent": "comoe", "Accept-Encoding": "identity"}
REDIRECTS = (301, 302, 303, 307, 308)


@dataclass
class _Connection:
    """client: of the standard library.  origin: scheme, host and port that it leads to.  proxied: through a
    proxy that wants whole URLs."""

    client: http.client.HTTPConnection
    origin: tuple[str, str, int]
    proxied: bool = False

    def close(self) -> None:
        self.client.close()


class HttpSource:
    """Files below `url`. Credentials: user and password in the URL, or headers in fsspec's configuration for
    "http" and "https" (`headers`, or `client_kwargs` with `headers`); they go to this host only."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        if not parts.hostname:
            raise ValueError(f"{redacted(url)}: expected a URL with a host, as https://host/path")
        self.name = redacted(url)
        self._url = url
        self._origin = _origin(url)
        self._headers = {**PLAIN_HEADERS, **_configured_headers(parts.scheme)}
        if parts.username is not None:
            self._headers["Authorization"] = _basic(parts)
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()
        # Connections at rest, by origin; the one used last goes first.
        self._idle: defaultdict[tuple, deque[tuple[_Connection, float]]] = defaultdict(deque)
        self._locations: dict[str, str] = {}  # where redirects led
        self._etags: dict[str, str] = {}
        self._closed = False
        self._part = LEAST_PART

    # ---- what a source does ---------------------------------------------------------------------

    def read_into(
        self, path: str, offset: int, view: memoryview, transfer: Transfer, size: int | None = None
    ) -> None:
        end = offset + len(view)
        wanted = {"Range": f"bytes={offset}-{end - 1}"}
        etag = self._etags.get(path)
        if etag and not etag.startswith("W/"):
            wanted["If-Match"] = etag
        connection, response = self._request(path, wanted, transfer)
        where = f"{self.name}: {path}"
        try:
            whole = response.status == 200 and offset == 0 and len(view) == size
            if not whole:
                self._check_range(response, where, offset, end, size)
            self._check_etag(response, where, path)
            if response.length is not None and response.length != len(view):
                raise BadAnswer(f"{where}: {len(view):,} bytes expected, {response.length:,} sent")
            transfer.begin_body()
            at = 0
            while at < len(view):
                begin, asked = time.monotonic(), self._part
                count = response.readinto(view[at : at + asked])
                if not count:
                    raise BadAnswer(f"{where}: the answer ends after {at:,} of {len(view):,} bytes")
                at += count
                transfer.progress(count)
                if count == asked:
                    self._part = fitting_part(asked, time.monotonic() - begin)
            if response.length is None and response.read(1):
                raise BadAnswer(f"{where}: more than {len(view):,} bytes came")
            self._keep(connection, response, transfer)
        except BaseException as error:
            connection.close()
            raise self._error(error, where, transfer) from error
        finally:
            transfer.rests()

    def read_all(self, path: str, most: int, transfer: Transfer) -> bytes:
        where = f"{self.name}: {path}"
        connection, response = self._request(path, {}, transfer)
        try:
            if response.status != 200:
                raise BadAnswer(f"{where}: expected status 200, got {response.status}")
            expected = response.length
            if expected is not None and expected > most:
                raise BadAnswer(f"{where}: {expected:,} bytes, more than the {most:,} it may have")
            transfer.begin_body()
            parts, total = [], 0
            while part := response.read(min(LEAST_PART, most + 1 - total)):
                parts.append(part)
                total += len(part)
                transfer.progress(len(part))
                if total > most:
                    raise BadAnswer(f"{where}: more than the {most:,} bytes that it may have")
            if expected is not None and total != expected:
                raise BadAnswer(f"{where}: the answer ends after {total:,} of {expected:,} bytes")
            self._keep(connection, response, transfer)
            return b"".join(parts)
        except BaseException as error:
            connection.close()
            raise self._error(error, where, transfer) from error
        finally:
            transfer.rests()

    def forget(self, path: str) -> None:
        with self._lock:
            self._etags.pop(path, None)
            self._locations.pop(path, None)

    def probe(self, path: str, seconds: float, transfer: Transfer) -> bool:
        self._drop_idle()  # whatever is the matter, they have seen it too
        try:
            self.read_into(path, 0, memoryview(bytearray(1)), transfer)
        except (Unreachable, TooSlow, Busy):
            return False
        except SourceError:
            pass  # an answer
        return True

    def close(self) -> None:
        self._closed = True
        self._drop_idle()

    def _drop_idle(self) -> None:
        with self._lock:
            idle = [connection for kept in self._idle.values() for connection, _ in kept]
            self._idle.clear()
        for connection in idle:
            connection.close()

    # ---- one request ----------------------------------------------------------------------------

    def _request(
        self, path: str, wanted: dict[str, str], transfer: Transfer
    ) -> tuple[_Connection, http.client.HTTPResponse]:
        """Sends it, follows redirects, and returns an answer with status 200 or 206."""
        where = f"{self.name}: {path}"
        url = self._locations.get(path) or below(self._url, path)
        seen = {url}
        while True:
            connection, response = self._send(url, wanted, transfer, where)
            if response.status in (200, 206):
                if url != below(self._url, path):
                    self._locations[path] = url
                return connection, response
            # Not read: the body of an error may be long, and slow.
            location, retry_after = response.getheader("Location"), _retry_after(response)
            connection.close()
            transfer.rests()
            if response.status not in REDIRECTS or not location:
                self._locations.pop(path, None)
                raise _status_error(response, where, retry_after)
            target = urljoin(url, location)
            scheme = urlsplit(target).scheme
            if scheme not in ("http", "https") or (url.startswith("https:") and scheme == "http"):
                raise Refused(f"{where}: it redirects to {scheme}, which is not followed")
            if target in seen or len(seen) > MOST_REDIRECTS:
                raise BadAnswer(f"{where}: redirects go round in circles or on and on")
            seen.add(target)
            url = target

    def _send(
        self, url: str, wanted: dict[str, str], transfer: Transfer, where: str
    ) -> tuple[_Connection, http.client.HTTPResponse]:
        origin = _origin(url)
        headers = {**self._headers, **wanted}
        if origin != self._origin:  # redirected: secrets stay at home
            headers = {**PLAIN_HEADERS, **wanted}
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        while True:
            connection, kept = self._connection(origin, transfer.timeout)
            try:
                if not kept:
                    transfer.check()
                    connection.client.connect()
                sock = connection.client.sock
                # Not SSLSocket's own: it takes the TLS state away under the thread that reads.
                transfer.closes_by(lambda sock=sock: _shut(sock))
                full = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{target}"
                line = full if connection.proxied else target
                connection.client.request("GET", line, headers=headers)
                return connection, connection.client.getresponse()
            except BaseException as error:
                connection.close()
                transfer.rests()
                broken = (http.client.RemoteDisconnected, ConnectionError, BrokenPipeError)
                if kept and isinstance(error, broken):
                    transfer.check()
                    continue  # the server had closed it while it was at rest
                raise self._error(error, where, transfer) from error

    def _connection(self, origin: tuple, timeout: float) -> tuple[_Connection, bool]:
        """A connection, and whether it was used before; a new one is not connected yet."""
        with self._lock:
            kept = self._idle[origin]
            while kept:
                connection, since = kept.pop()
                if time.monotonic() - since < KEEP_SECONDS:
                    return connection, True
                connection.close()
        scheme, host, port = origin
        proxy = None if proxy_bypass(host) else getproxies().get(scheme)
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else None
        to = (address.hostname, address.port or 3128) if address else (host, port)
        if scheme == "http":
            client = http.client.HTTPConnection(*to, timeout=timeout)
            return _Connection(client, origin, proxied=address is not None), False
        if self._tls is None:
            self._tls = ssl.create_default_context()
        client = http.client.HTTPSConnection(*to, timeout=timeout, context=self._tls)
        if address is not None:
            named = address.username is not None
            client.set_tunnel(host, port, {"Proxy-Authorization": _basic(address)} if named else {})
        return _Connection(client, origin), False

    def _keep(
        self, connection: _Connection, response: http.client.HTTPResponse, transfer: Transfer
    ) -> None:
        """Back to rest, unless the server wants to end it."""
        transfer.rests()
        transfer.check()
        with self._lock:
            if response.isclosed() and not response.will_close and not self._closed:
                self._idle[connection.origin].append((connection, time.monotonic()))
                return
        connection.close()

    # ---- checks ---------------------------------------------------------------------------------

    def _check_range(self, response, where: str, offset: int, end: int, size: int | None) -> None:
        if response.status == 200:
            raise Refused(f"{where}: the server does not serve byte ranges; use one that does")
        encoding = response.getheader("Content-Encoding", "identity")
        if encoding != "identity":
            raise BadAnswer(f"{where}: sent as {encoding}, though that was declined")
        got = response.getheader("Content-Range", "")
        unit, _, rest = got.partition(" ")
        span, _, total = rest.partition("/")
        if unit != "bytes" or span != f"{offset}-{end - 1}":
            raise BadAnswer(f"{where}: bytes {offset}-{end - 1} asked for, got {got[:80]!r}")
        if size is not None and total != "*" and total != str(size):
            raise Changed(f"{where}: the file has {total[:20]} bytes now, it had {size}")

    def _check_etag(self, response, where: str, path: str) -> None:
        etag = response.getheader("ETag")
        if etag is None:
            return
        known = self._etags.setdefault(path, etag)
        if known != etag:
            raise Changed(f"{where}: the file was exchanged (its ETag is another one)")

    def _error(self, error: BaseException, where: str, transfer: Transfer) -> BaseException:
        """What to raise for it: a SourceError for all that the other side or the way to it can cause."""
        try:
            transfer.check()
        except SourceError as reason:
            return reason
        if isinstance(error, SourceError) or not isinstance(error, Exception):
            return error
        if isinstance(error, ssl.SSLCertVerificationError):
            return Refused(f"{where}: its certificate is not accepted: {error.verify_message}")
        if isinstance(error, TimeoutError):
            return TooSlow(f"{where}: nothing came for {transfer.timeout:g} s")
        if isinstance(error, http.client.IncompleteRead):
            return BadAnswer(f"{where}: the answer is cut off")
        if isinstance(error, http.client.HTTPException):
            return BadAnswer(f"{where}: not an HTTP answer ({type(error).__name__})")
        if isinstance(error, (OSError, ValueError)):
            reason = getattr(error, "strerror", None) or type(error).__name__
            return Unreachable(f"{where}: {reason}")
        return error


def fitting_part(part: int, seconds: float) -> int:
    """Bytes to ask for after `part` bytes took `seconds`."""
    if seconds < PART_SECONDS:
        return min(2 * part, MOST_PART)
    return max(part // 2, LEAST_PART) if seconds > 4 * PART_SECONDS else part


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return (
        parts.scheme,
        parts.hostname or "",
        parts.port or (443 if parts.scheme == "https" else 80),
    )


def _basic(parts: SplitResult) -> str:
    pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _shut(sock: socket.socket | None) -> None:
    if sock is not None:
        with contextlib.suppress(OSError):  # it is closed already
            socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _configured_headers(scheme: str) -> dict[str, str]:
    """From fsspec's configuration (~/.config/fsspec/*.json, FSSPEC_HTTPS_... variables)."""
    from fsspec.config import conf

    found = conf.get(scheme) or {}
    inner = found.get("client_kwargs") or {}
    headers = {**(found.get("headers") or {}), **(inner.get("headers") or {})}
    return {str(k): str(v) for k, v in headers.items()}


def _retry_after(response) -> float:
    text = response.getheader("Retry-After", "")
    return min(float(text), 300.0) if text.isdigit() else 0.0


def _status_error(response, where: str, retry_after: float) -> SourceError:
    status, reason = response.status, (response.reason or "")[:60]
    said = f"{where}: status {status} {reason}".rstrip()
    if status in (404, 410):
        return Gone(f"{said}; is the URL that of a packed folder?")
    if status in (401, 403, 407):
        return Refused(f"{said}; credentials are missing or wrong")
    if status in (412, 416):
        return Changed(f"{said}; the file was exchanged")
    if status == 429 or status >= 500:
        return Busy(said, retry_after)
    return BadAnswer(said)
