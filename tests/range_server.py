"""A web server on 127.0.0.1 for tests: byte ranges, kept connections, ETags, and faults on demand."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

SLOW_PIECE, SLOW_PAUSE = 16, 0.25

# What a fault does to an answer: see _Handler.do_GET.
FAULTS = (
    "corrupt",
    "truncate",
    "long_length",
    "short_length",
    "wrong_range",
    "ignore_range",
    "reset",
    "garbage",
    "404",
    "416",
    "500",
    "503",
    "loop",
)


class RangeServer:
    """Serves `folder` until the block is left.

    fault(path, begin, end): what to do to this answer, one of FAULTS, "slow", "slow_head", or None.
    delay(path): seconds to wait before an answer.  rate: bytes/s of all answers together; None: no limit.
    """

    def __init__(self, folder: Path, *, secret: str | None = None):
        self.folder, self.secret = folder, secret
        self.fault: Callable[[str, int, int], str | None] = lambda *_: None
        self.delay: Callable[[str], float] = lambda _: 0.0
        self.rate: float | None = None
        self.up = True  # False: connections are cut, and new ones as well
        self.requests: list[tuple[str, int, int]] = []
        self.seen_headers: list[dict[str, str]] = []
        self.connections = 0
        self.etag_salt = ""
        self.redirect: str | None = None  # URL of another server, to which all is sent on
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._open: set = set()

    def __enter__(self) -> RangeServer:
        owner = self

        class Handler(_Handler):
            server_owner = owner

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request, client_address):
                pass  # a client that goes away is part of the tests

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.cut()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def cut(self) -> None:
        """Breaks all connections, as a link that goes down does."""
        with self.lock:
            held = list(self._open)
        for connection in held:
            with contextlib.suppress(OSError):
                connection.shutdown(2)

    def down(self) -> None:
        self.up = False
        self.cut()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_owner: RangeServer
    disable_nagle_algorithm = True
    wbufsize = 0

    def setup(self):
        super().setup()
        with self.server_owner.lock:
            self.server_owner.connections += 1
            self.server_owner._open.add(self.connection)

    def finish(self):
        with self.server_owner.lock:
            self.server_owner._open.discard(self.connection)
        super().finish()

    def log_message(self, *_):
        pass

    def do_GET(self):
        owner = self.server_owner
        if not owner.up:
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path).lstrip("/")
        owner.seen_headers.append(dict(self.headers))
        if owner.secret is not None and self.headers.get("Authorization") != owner.secret:
            return self.plain(401)
        if owner.redirect is not None:
            return self.plain(307, Location=owner.redirect + self.path)
        file = owner.folder / path
        if not file.is_file():
            return self.plain(404)
        size = file.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        begin, end = (int(match[1]), int(match[2]) + 1) if match else (0, size)
        with owner.lock:
            owner.requests.append((path, begin, end))
        time.sleep(owner.delay(path))
        if begin >= size or not owner.up:
            return self.plain(416) if owner.up else self.drop()
        end = min(end, size)
        fault = owner.fault(path, begin, end)
        if fault == "reset":
            return self.drop()
        if fault == "garbage":
            self.wfile.write(b"these are not the bytes you are looking for\r\n\r\n")
            return self.drop()
        if fault == "loop":
            return self.plain(302, Location=self.path)
        if fault and fault.isdigit():
            return self.plain(int(fault), **({"Retry-After": "0"} if fault == "503" else {}))
        if fault == "ignore_range":
            match, begin, end = None, 0, size
        with file.open("rb") as source:
            source.seek(begin)
            body = source.read(end - begin)
        stat = file.stat()
        tag = hashlib.sha256(f"{path}{size}{stat.st_mtime_ns}{owner.etag_salt}".encode())
        if fault == "corrupt":
            at = len(body) // 2
            body = body[:at] + bytes([body[at] ^ 0x10]) + body[at + 1 :]
        shown = begin + 1 if fault == "wrong_range" else begin
        length = len(body)
        if fault in ("long_length", "short_length"):
            length += 7 if fault == "long_length" else -7
        head = [
            f"HTTP/1.1 {'206 Partial Content' if match else '200 OK'}",
            f"Content-Length: {length}",
            f'ETag: "{tag.hexdigest()[:16]}"',
            "Accept-Ranges: bytes",
        ]
        if match:
            head.append(f"Content-Range: bytes {shown}-{end - 1}/{size}")
        head = ("\r\n".join(head) + "\r\n\r\n").encode()
        if fault == "truncate":
            body = body[: len(body) // 2]
        try:
            if fault == "slow_head":
                self.trickle(head)
            else:
                self.wfile.write(head)
            self.trickle(body) if fault == "slow" else self.send(body)
        except OSError:
            self.close_connection = True
        if fault in ("truncate", "long_length", "short_length"):
            self.drop()

    def send(self, body: bytes) -> None:
        owner = self.server_owner
        step = 16 << 10 if owner.rate else len(body)
        for at in range(0, len(body), max(step, 1)):
            if not owner.up:
                return self.drop()
            if owner.rate:
                with owner.lock:  # the link is shared
                    time.sleep(len(body[at : at + step]) / owner.rate)
            self.wfile.write(body[at : at + step])

    def trickle(self, data: bytes) -> None:
        for at in range(0, len(data), SLOW_PIECE):
            if self.server_owner.closing.wait(SLOW_PAUSE):
                return
            self.wfile.write(data[at : at + SLOW_PIECE])

    def drop(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def plain(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
