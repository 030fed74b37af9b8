"""The HTTP side of serve-experts.

POST /v1/experts    a call of comoe/tiers/expert_wire.py; its result
GET  /v1/info       JSON: store_id, levels, level_names, max_bytes
GET  /v1/health     "ok", to anybody

401 without the token, before anything else is looked at       413 larger than allowed
503 + Retry-After: the queue is full                            408 the body did not come in time
400, 409, 422: not a call, another store, what the store has not    500: an expert could not be read
"""

from __future__ import annotations

import asyncio
import hmac
import logging

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from comoe.serve.batches import Batches, Full
from comoe.serve.host import CallError, ExpertHost
from comoe.tiers.expert_wire import Call, WireError, pack_result, unpack_call

BODY_SECONDS = 10.0  # that a body may take
log = logging.getLogger("comoe.serve")


class _Answer(Exception):
    """Ends a request with this answer."""

    def __init__(self, status: int, text: str, **headers: str):
        super().__init__(text)
        self.response = PlainTextResponse(text, status, headers or None)


class ExpertService:
    """The routes over one host. token: what callers must send as `Authorization: Bearer TOKEN`."""

    def __init__(
        self,
        host: ExpertHost,
        token: str,
        *,
        max_bytes: int = 4 << 20,
        most_calls: int = 32,
        body_seconds: float = BODY_SECONDS,
    ):
        self.host, self.max_bytes, self._body_seconds = host, max_bytes, body_seconds
        self._expected = f"Bearer {token}".encode()
        self.batches = Batches(host.compute, most_calls=most_calls)
        self.app = Starlette(
            routes=[
                Route("/v1/experts", self._guarded(self.experts), methods=["POST"]),
                Route("/v1/info", self._guarded(self.info)),
                Route("/v1/health", self.health),
            ]
        )

    def _guarded(self, handler):
        """Only with the token; compared in a time that does not tell how much of it was right."""

        async def guarded(request: Request) -> Response:
            given = request.headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):
                self._note_refusal(request, 401, "no or a wrong token")
                return PlainTextResponse("a token is needed", 401, {"WWW-Authenticate": "Bearer"})
            try:
                return await handler(request)
            except _Answer as answer:
                self._note_refusal(request, answer.response.status_code, str(answer))
                return answer.response

        return guarded

    def _note_refusal(self, request: Request, status: int, why: str) -> None:
        self.batches.figures.refused += 1
        client = request.client.host if request.client else "?"
        log.info("%d to %s: %s", status, client, why)

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("ok")

    async def info(self, request: Request) -> Response:
        return JSONResponse(
            {
                "store_id": self.host.store_id.hex(),
                "levels": self.host.levels(),
                "level_names": list(self.host.store.levels.names),
                "max_bytes": self.max_bytes,
            }
        )

    async def experts(self, request: Request) -> Response:
        try:
            self.batches.enter()
        except Full as full:
            raise _Answer(
                503, "the queue is full", **{"Retry-After": str(full.retry_after)}
            ) from None
        try:
            call = self._call(await self._body(request))
            try:
                result = await self.batches.result(call)
            except OSError as error:
                log.error("layer %d: %s", call.layer_idx, error)
                raise _Answer(500, "an expert could not be read; see the server's log") from None
            except Exception:
                log.exception("layer %d failed", call.layer_idx)
                raise _Answer(500, "the call failed; see the server's log") from None
            return Response(pack_result(result, call.wire), media_type="application/octet-stream")
        finally:
            self.batches.leave()

    async def _body(self, request: Request) -> bytes:
        """At most max_bytes of it, in time."""
        said = request.headers.get("content-length", "")
        if said.isascii() and said.isdigit() and int(said) > self.max_bytes:
            raise _Answer(413, f"a call may have {self.max_bytes} bytes", Connection="close")
        try:
            return await asyncio.wait_for(self._read(request), self._body_seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise _Answer(
                408, f"the body did not come in {self._body_seconds:g} s", Connection="close"
            ) from None
        except ClientDisconnect:
            raise _Answer(400, "the caller has gone") from None

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.max_bytes:
                raise _Answer(413, f"a call may have {self.max_bytes} bytes", Connection="close")
        return bytes(body)

    def _call(self, body: bytes) -> Call:
        try:
            call = unpack_call(body)
        except WireError as error:
            raise _Answer(400, str(error)) from None
        try:
            self.host.check(call)
        except CallError as error:
            status = 409 if call.store_id != self.host.store_id else 422
            raise _Answer(status, str(error)) from None
        return call
