"""Middleware around all routes: it checks API keys and body sizes, measures times, and counts responses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from pipelines.serving.auth import is_admitted
from pipelines.serving.schema import ErrorResponse
from pipelines.serving.timings import Metrics, begin_timings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


MOST_DIGITS = 18
"""Digits of a content length that is believed. A longer one is counted as the body arrives."""


class Guard:
    """ASGI middleware around all routes."""

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], max_body_bytes: int, metrics: Metrics) -> None:
        self._app, self._api_keys = app, api_keys
        self._max_body_bytes, self._metrics = max_body_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse the request. Response headers contain its times."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        timings = begin_timings()
        status = 500  # for exceptions; 499, as in nginx, if the client disconnected

        async def send_timed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(timings.headers())
            await send(message)

        try:
            await self._guarded(scope, receive, send_timed)
        except ClientDisconnect:
            status = 499
        except asyncio.CancelledError:
            status = 499
            raise
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.count_request(route, status, timings)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request without a valid key before its body is read, and a body that is too large."""
        headers = Headers(scope=scope)
        if not is_admitted(headers, scope["path"], self._api_keys):
            message = "the API key is missing or wrong; send Authorization: Bearer KEY"
            content = ErrorResponse(error=message, error_type="unauthorized").model_dump()
            await JSONResponse(content, 401, headers={"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        announced = headers.get("content-length", "0")
        digits = announced if announced.isdecimal() and len(announced) <= MOST_DIGITS else "0"
        size, body = await _read(receive, int(digits), self._max_body_bytes)
        if size > self._max_body_bytes:
            problem = f"the body has {size} bytes; at most {self._max_body_bytes}"
            content = ErrorResponse(error=problem, error_type="too_large").model_dump()
            await JSONResponse(content, 413)(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, receive_again, send)


async def _read(receive: Receive, announced: int, limit: int) -> tuple[int, bytes]:
    """Return the size of the body, announced or counted, and the body. Reading stops when the limit is exceeded.

    Raises ClientDisconnect if the client disconnects before the end of the body.
    """
    if announced > limit:
        return announced, b""
    size, chunks, has_more = 0, [], True
    while has_more and size <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size, has_more = size + len(chunk), message.get("more_body", False)
        chunks.append(chunk)
    return size, b"".join(chunks)
