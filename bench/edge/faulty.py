"""A static web server that misbehaves: for tests and scripts, on a host of the testbed or on loopback.

    python -m bench.edge.faulty ROOT --port 80 --fault corrupt --share 0.3 [--seed 0]

Serves whole files and single ranges, with an ETag. Of its answers with a body the share `--share` has the fault, chosen by
a seeded generator:

    corrupt     one byte of the body is another one      truncate    the connection ends within the body
    short       Content-Length promises less than asked  reset       the connection is reset within the body
    drip        a byte every half second                 loop        302 to itself
    404 416 500 that status                              any         one of these by chance
"""

from __future__ import annotations

import argparse
import random
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

FAULTS = ("corrupt", "truncate", "short", "reset", "drip", "loop", "404", "416", "500")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_GET(self) -> None:
        path = (self.server.root / unquote(urlsplit(self.path).path).lstrip("/")).resolve()
        if not path.is_relative_to(self.server.root) or not path.is_file():
            return self._status(404)
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = 0, len(data)
        if match is not None:
            begin, end = int(match[1]), min(int(match[2] or len(data) - 1) + 1, len(data))
            if begin >= end:
                return self._status(416)
        body = data[begin:end]
        fault = self.server.next_fault()
        if fault in ("404", "416", "500"):
            return self._status(int(fault))
        if fault == "loop":
            return self._status(302, ("Location", self.path))
        if fault == "corrupt" and body:
            at = self.server.rng.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ 0x40]) + body[at + 1 :]
        if fault == "short":
            body = body[: len(body) // 2]
        self.send_response(206 if match is not None else 200)
        if match is not None:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}-{len(data):x}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault in ("truncate", "reset"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "reset":  # no lingering: close sends RST
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return None
        if fault == "drip":
            for i in range(len(body)):
                if self.server.stopping.wait(0.5):
                    break
                self.wfile.write(body[i : i + 1])
                self.wfile.flush()
            self.close_connection = True
            return None
        self.wfile.write(body)
        return None

    do_HEAD = do_GET

    def _status(self, code: int, *headers: tuple[str, str]) -> None:
        self.send_response(code)
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


class FaultyServer(ThreadingHTTPServer):
    """fault: one of FAULTS, "any", or None. `served`, `faults`: answers so far, and those with a fault.
    faults_left: when they are used up the server is sound."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self,
        root: Path,
        address: tuple[str, int] = ("127.0.0.1", 0),
        *,
        fault: str | None = None,
        share: float = 1.0,
        seed: int = 0,
        faults_left: int | None = None,
    ):
        self.root, self.fault, self.share = Path(root).resolve(), fault, share
        self.rng, self.faults_left = random.Random(seed), faults_left
        self.served, self.faults = 0, 0
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        super().__init__(address, Handler)

    def next_fault(self) -> str | None:
        with self._lock:
            self.served += 1
            if self.fault is None or self.faults_left == 0 or self.rng.random() >= self.share:
                return None
            self.faults += 1
            if self.faults_left is not None:
                self.faults_left -= 1
            return self.rng.choice(FAULTS) if self.fault == "any" else self.fault

    def handle_error(self, *args: object) -> None:
        pass  # clients that gave up

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_address[1]}"

    def __enter__(self) -> FaultyServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A static web server that misbehaves.")
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=80)
    parser.add_argument("--address", default="0.0.0.0")
    parser.add_argument("--fault", choices=[*FAULTS, "any"])
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with FaultyServer(
        args.root, (args.address, args.port), fault=args.fault, share=args.share, seed=args.seed
    ):
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
