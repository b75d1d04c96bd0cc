"""Middleware around all routes: it checks API keys and headers, limits requests and their bodies, and measures times.

HEAD is answered as GET without the body, bodies may be compressed with gzip, and other content than JSON is refused.

A client that announces a body and does not send it holds a place. So probes and GET read no body, there are deadlines,
and if too many bodies are awaited, the one that has been awaited longest is given up.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from pipelines.serving.auth import READING, is_admitted, is_open
from pipelines.serving.schema import ErrorResponse
from pipelines.serving.timings import Metrics, Timings, begin_timings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_REQUESTS = 1000
"""Requests at once in a replica. Ray Serve gives it no more."""
KEPT_FOR_PROBES = 100
"""Of these, how many are only for probes, so that they are answered when the server is full."""
MOST_BODIES = 256
"""Bodies that are awaited at once."""
MOST_BODY_BYTES = 64 * 2**20
"""Bytes of bodies that are awaited at once, or one body of the maximum size."""
TIMEOUT_HEADER = "x-request-timeout-seconds"
"""Seconds after which the client does not wait any more."""
TENSORS = "/infer"
"""End of the paths whose bodies may contain binary tensors."""
MOST_DIGITS = 18
"""Digits of a content length that is believed. A longer one is counted as the body arrives."""


class Refused(Exception):
    """A request that is answered before its route sees it."""

    def __init__(self, status: int, error_type: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.error_type, self.headers = status, error_type, headers


class Guard:
    """ASGI middleware around all routes."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Sequence[str],
        max_body_bytes: int,
        metrics: Metrics,
        body_timeout_s: float = 30,
        request_timeout_s: float = 300,
    ) -> None:
        self._app, self._api_keys, self._metrics = app, api_keys, metrics
        self._request_timeout_s = request_timeout_s
        self._bodies = Bodies(max_body_bytes, min(body_timeout_s, request_timeout_s))
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse the request. Response headers contain its times."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        timings = begin_timings()
        status = 500  # for exceptions; 499, as in nginx, if the client disconnected

        async def send_timed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(timings.headers())
            await send(message)

        try:
            await self._answered(scope, receive, send_timed, timings)
        except ClientDisconnect:
            status = 499
        except asyncio.CancelledError:
            status = 499
            raise
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.count_request(route, status, timings)

    async def _answered(self, scope: Scope, receive: Receive, send: Send, timings: Timings) -> None:
        """Answer a request, or say why not."""
        is_started = False

        async def send_once(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        seconds, name = self._request_timeout_s, "request_timeout_s"
        deadline: asyncio.Timeout | None = None
        try:
            asked = _timeout_of(Headers(scope=scope).get(TIMEOUT_HEADER))
            if asked < seconds:
                seconds, name = asked, TIMEOUT_HEADER
            timings.deadline, timings.deadline_name = timings.started + seconds, f"{name}={seconds:g}"
            async with asyncio.timeout(seconds) as deadline:
                await self._guarded(scope, receive, send_once)
        except Refused as refused:
            content = ErrorResponse(error=str(refused), error_type=refused.error_type).model_dump()
            headers = {name.replace("_", "-"): value for name, value in refused.headers.items()}
            await JSONResponse(content, refused.status, headers=headers)(scope, receive, send)
        except TimeoutError:
            if is_started or deadline is None or not deadline.expired():
                raise
            problem = f"the request has taken {seconds:g} s ({name})"
            content = ErrorResponse(error=problem, error_type="timeout").model_dump()
            await JSONResponse(content, 408 if name == TIMEOUT_HEADER else 504)(scope, receive, send)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request without a valid key before its body is read; or one too many, or a body too large."""
        headers, method, path = Headers(scope=scope), scope["method"], scope["path"]
        needs_no_key = is_open(method, path)
        if not needs_no_key and not is_admitted(headers, self._api_keys):
            message = "the API key is missing or wrong; send Authorization: Bearer KEY"
            raise Refused(401, "unauthorized", message, WWW_Authenticate="Bearer")
        if needs_no_key or method in READING:
            await self._app(scope, _after(receive, b""), send)
            return
        if self._running >= MOST_REQUESTS - KEPT_FOR_PROBES:
            problem = f"{self._running} requests are running; try again later"
            raise Refused(503, "overloaded", problem, Retry_After="1")
        encoding = _check_content(headers, path) if method == "POST" else ""
        self._running += 1
        try:
            body = await self._bodies.read(receive, headers.get("content-length", ""))
            if encoding == "gzip":
                body = _decompressed(body, self._bodies.max_bytes)
            await self._app(scope, _after(receive, body), send)
        finally:
            self._running -= 1


class Bodies:
    """Reads the bodies of requests within limits of time, number and size."""

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self.max_bytes, self._timeout_s = max_bytes, timeout_s
        self._awaited: dict[asyncio.Timeout, int] = {}
        """Deadlines of the bodies that are awaited, the oldest first, with the bytes that are here."""

    async def read(self, receive: Receive, announced: str) -> bytes:
        """Return a body.

        Args:
            receive: Receives the messages of the request.
            announced: The content-length in the headers, or anything else, which is ignored.

        Raises:
            Refused: It is too large, or does not arrive in time.
            ClientDisconnect: The client went away.
        """
        is_number = announced.isascii() and announced.isdecimal() and len(announced) <= MOST_DIGITS
        self._check_size(int(announced) if is_number else 0)
        if len(self._awaited) >= MOST_BODIES:
            self._give_up_oldest()
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                self._awaited[deadline] = 0
                return await self._chunks(receive, deadline)
        except TimeoutError:
            message = "the body did not arrive in time; send it at once, with a content-length that is its size"
            raise Refused(408, "timeout", message, Connection="close") from None
        finally:
            self._awaited.pop(deadline, None)

    async def _chunks(self, receive: Receive, deadline: asyncio.Timeout) -> bytes:
        chunks, has_more = [], True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunks.append(message.get("body", b""))
            has_more = message.get("more_body", False)
            size = self._awaited.get(deadline, 0) + len(chunks[-1])
            self._check_size(size)
            self._awaited[deadline] = size
            while sum(self._awaited.values()) > max(MOST_BODY_BYTES, self.max_bytes) and self._give_up_oldest(deadline):
                await asyncio.sleep(0)
        return b"".join(chunks)

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            raise Refused(413, "too_large", f"the body has {size} bytes; at most {self.max_bytes}")

    def _give_up_oldest(self, own: asyncio.Timeout | None = None) -> bool:
        """Let the deadline of the body that has been awaited longest pass. Returns whether there is another one."""
        oldest = next((one for one in self._awaited if one is not own), None)
        if oldest is None:
            return False
        del self._awaited[oldest]
        oldest.reschedule(asyncio.get_running_loop().time())
        return True


def _timeout_of(header: str | None) -> float:
    """Return the seconds that a client waits. Raises Refused if its header is no positive number."""
    if header is None:
        return math.inf
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise Refused(422, "validation", f"{TIMEOUT_HEADER} must be a positive number of seconds")
    return seconds


def _check_content(headers: Headers, path: str) -> str:
    """Return how a body is compressed: gzip, or not at all. Raises Refused for other content than JSON."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    if not is_json and not path.endswith(TENSORS):
        raise Refused(415, "validation", "the body must be JSON, and say so: send content-type: application/json")
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip"):
        raise Refused(415, "validation", "the body's content-encoding is not supported; send gzip or none")
    return encoding


def _decompressed(body: bytes, most: int) -> bytes:
    """Return the content of a gzip file of one or several members, of at most this many bytes."""
    parts, left = [], most
    while body:
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            parts.append(member.decompress(body, left + 1))
        except zlib.error as error:
            raise Refused(422, "validation", "the body is not valid gzip") from error
        left -= len(parts[-1])
        if left < 0:
            raise Refused(413, "too_large", f"the body has more than {most} bytes after decompression")
        if not member.eof:
            raise Refused(422, "validation", "the body is not valid gzip: it ends too early")
        body = member.unused_data
    return b"".join(parts)


def _without_body(send: Send) -> Send:
    """Return what sends an answer without its body, with the headers that describe it."""

    async def send_head(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_head


def _after(receive: Receive, body: bytes) -> Callable[[], Awaitable[Message]]:
    """Return what gives the whole body, and then waits for the client to disconnect."""
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        if whole:
            return whole.pop()
        while True:  # parts of a body that nobody reads
            message = await receive()
            if message["type"] == "http.disconnect":
                return message

    return receive_again
