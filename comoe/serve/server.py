"""Runs the service: token, TLS, limits, log, shutdown.

starlette on uvicorn with httptools and uvloop: a POST of 1 KB over loopback took 220 us, with aiohttp 360.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from comoe.config import format_bytes
from comoe.serve.app import ExpertService
from comoe.serve.host import ExpertHost

HEAD_SECONDS = 10.0  # that a request's head may take
HEAD_BYTES = 1 << 20  # uvicorn hands on up to 256 KB at once, of which a body may be a part
MOST_CONNECTIONS = 256
GRACE_SECONDS = 5
log = logging.getLogger("comoe.serve")


class _Bounded(HttpToolsProtocol):
    """uvicorn's protocol bounds neither the size of a request's head nor the time that it takes."""

    head_seconds = HEAD_SECONDS

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._begin_head()

    def _begin_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def data_received(self, data: bytes) -> None:
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self.transport.close()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:  # the first one began with the connection
            self._begin_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def connection_lost(self, exc) -> None:
        self._end_head()
        super().connection_lost(exc)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def uvicorn_config(
    service: ExpertService,
    address: str,
    port: int,
    *,
    tls_cert: str | None = None,
    tls_key: str | None = None,
) -> uvicorn.Config:
    return uvicorn.Config(
        service.app,
        host=address,
        port=port,
        http=_Bounded,
        loop="none",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=GRACE_SECONDS,
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
    )


class _Server(uvicorn.Server):
    """Says when it listens, and where; a signal stops it, and is not raised again afterwards."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                scheme = "https" if self.config.is_ssl else "http"
                log.info("listening on %s://%s:%d", scheme, host, port)


def serve(
    folder: str | Path,
    token: str,
    *,
    memory: int | None = None,
    exact: bool = False,
    threads: int = 0,
    address: str = "127.0.0.1",
    port: int = 8790,
    tls_cert: str | None = None,
    tls_key: str | None = None,
    max_bytes: int = 4 << 20,
    most_calls: int = 32,
) -> None:
    """Serves until SIGINT or SIGTERM; calls that are being computed are then answered first."""
    if (tls_cert is None) != (tls_key is None):
        raise ValueError("serve-experts: expected --tls-cert and --tls-key together; give both")
    host = ExpertHost(folder, memory, exact=exact, threads=threads)
    try:
        host.runtime.wait_ready()
        service = ExpertService(host, token, max_bytes=max_bytes, most_calls=most_calls)
        log.info(
            "%s; calls of up to %s, %d at once",
            host.runtime.describe(),
            format_bytes(max_bytes),
            most_calls,
        )
        if tls_cert is None and address not in ("127.0.0.1", "::1", "localhost"):
            log.warning(
                "without TLS, token and activations can be read on the way: give --tls-cert"
            )
        config = uvicorn_config(service, address, port, tls_cert=tls_cert, tls_key=tls_key)

        async def run() -> None:
            try:
                await _Server(config).serve()
            finally:
                await service.batches.close()

        loop = uvloop.new_event_loop()
        try:
            loop.run_until_complete(run())
        finally:
            loop.close()
        f = service.batches.figures
        log.info(
            "stopped after %d calls in %d batches, %d tokens, %.1f s of computing; refused %d, shed %d, failed %d",
            f.calls, f.batches, f.tokens, f.busy, f.refused, f.shed, f.failed,
        )  # fmt: skip
    finally:
        host.close()
