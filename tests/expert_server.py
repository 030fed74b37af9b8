"""An expert server in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("uvicorn", reason="serve-experts needs pip install 'comoe[serve]'")
pytest.importorskip("uvloop", reason="serve-experts needs pip install 'comoe[serve]'")
import uvloop

from comoe.serve.app import ExpertService
from comoe.serve.server import _Bounded, _Server, uvicorn_config

TOKEN = "a-token-for-tests-only"


@contextlib.contextmanager
def serving(host, *, head_seconds: float = 10.0, tls=(None, None), **options) -> Iterator[tuple]:
    """(url, service) of a running server."""
    service = ExpertService(host, TOKEN, **options)
    config = uvicorn_config(service, "127.0.0.1", 0, tls_cert=tls[0], tls_key=tls[1])
    config.http = type("Bounded", (_Bounded,), {"head_seconds": head_seconds})
    server = _Server(config)

    async def run() -> None:
        try:
            await server.serve()
        finally:
            await service.batches.close()

    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        end = time.monotonic() + 10
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        scheme = "https" if tls[0] else "http"
        yield f"{scheme}://127.0.0.1:{port}", service
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop)
        thread.join(20)
        loop.close()
        assert not thread.is_alive()


async def _stop(server) -> None:
    server.should_exit = True
