"""Middleware around all routes: it checks API keys and headers, limits requests, and measures times.

HEAD is answered as GET without the body, a slash at the end of a path does not matter, bodies may be compressed, and
other content than JSON is refused. Probes and GET read no body. If a client goes away before its answer begins, the
rest of its request is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from pipelines.serving.auth import READING, is_admitted, is_open
from pipelines.serving.bodies import GZIP, Bodies, Refused, decompressed, encoding_of
from pipelines.serving.schema import ErrorResponse
from pipelines.serving.timings import Metrics, Timings, begin_timings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_REQUESTS = 1000
"""Requests at once in a replica. Ray Serve gives it no more."""
KEPT_FOR_PROBES = 100
"""Of these, how many are only for probes, so that they are answered when the server is full."""
TIMEOUT_HEADER = "x-request-timeout-seconds"
"""Seconds after which the client does not wait any more."""
ID_HEADER = "x-request-id"
CLEAN_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
"""Ids of requests that are returned and logged. Others could forge fields of a log line."""
SECONDS = re.compile(r"\+?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
logger = logging.getLogger(__name__)


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
        logs_requests: bool = False,
        is_route: Callable[[Scope], bool] = lambda scope: True,
    ) -> None:
        """Wrap an application.

        Args:
            app: The application.
            api_keys: SHA-256 of each key.
            max_body_bytes: Maximum size of a body, after decompression too.
            metrics: Counts the answers.
            body_timeout_s: Maximum time in which a body must arrive.
            request_timeout_s: Maximum time of a request.
            logs_requests: Whether to log each request but probes, and to give it an id. Ray Serve's proxies do both.
            is_route: Whether the application has a path.
        """
        self._app, self._api_keys, self._metrics = app, api_keys, metrics
        self._request_timeout_s = request_timeout_s
        self._bodies = Bodies(max_body_bytes, min(body_timeout_s, request_timeout_s))
        self._logs_requests, self._is_route = logs_requests, is_route
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse the request. Response headers contain its times."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        scope = {**scope, "path": _without_slash(path, scope.get("root_path", ""))}
        headers = Headers(scope=scope)
        others = [item for item in scope["headers"] if item[0] != b"accept-encoding"]
        is_zipped = _accepts_gzip(headers.get("accept-encoding", ""))
        scope["headers"] = [*others, (b"accept-encoding", b"gzip")] if is_zipped else others
        if method == "HEAD":
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        request_id = _id_of(headers) if self._logs_requests else None
        timings = begin_timings()
        status = 500  # for exceptions; 499, as in nginx, if the client disconnected

        async def send_timed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(timings.headers())
                if request_id is not None:
                    MutableHeaders(scope=message)[ID_HEADER] = request_id
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
            if request_id is not None and not is_open(method, scope["path"]):
                logger.info("%s %s %d in %.0f ms, id %s", method, route, status, 1000 * timings.total, request_id)

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
        if needs_no_key or method in READING or not self._is_route(scope):
            await self._app(scope, _Connection(receive, b"").receive, send)
            return
        if self._running >= MOST_REQUESTS - KEPT_FOR_PROBES:
            problem = f"{self._running} requests are running; try again later"
            raise Refused(503, "overloaded", problem, Retry_After="1")
        encoding = encoding_of(headers, path) if method == "POST" else ""
        self._running += 1
        try:
            body = await self._bodies.read(receive, headers.get("content-length", ""))
            if encoding:
                body = decompressed(body, encoding, self._bodies.max_bytes)
            await _Connection(receive, body).run(self._app, scope, send)
        finally:
            self._running -= 1


class _Connection:
    """The connection of a client whose body is here."""

    def __init__(self, receive: Receive, body: bytes) -> None:
        self._receive_more = receive
        self._whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self._is_gone, self._is_answered = asyncio.Event(), False

    async def receive(self) -> Message:
        """Return the whole body, and then wait for the client to disconnect."""
        if self._whole:
            return self._whole.pop()
        while not self._is_gone.is_set():
            message = await self._receive_more()  # parts of a body that nobody reads
            if message["type"] == "http.disconnect":
                self._is_gone.set()
        return {"type": "http.disconnect"}

    async def run(self, app: ASGIApp, scope: Scope, send: Send) -> None:
        """Run an application, but drop the rest if the client disconnects before the answer begins.

        Raises:
            ClientDisconnect: The client went away.
        """
        body: Message | None = self._whole.pop()
        running = asyncio.current_task()
        assert running is not None

        async def receive_body() -> Message:
            nonlocal body
            if body is not None:
                found, body = body, None
                return found
            await self._is_gone.wait()
            return {"type": "http.disconnect"}

        async def send_answer(message: Message) -> None:
            self._is_answered = True
            await send(message)

        async def watch() -> None:
            with suppress(Exception):  # of a proxy that is gone: then Ray Serve ends the request itself
                await self.receive()
            if self._is_gone.is_set() and not self._is_answered:
                running.cancel()

        watching = asyncio.create_task(watch())
        try:
            await app(scope, receive_body, send_answer)
        except asyncio.CancelledError:
            if not self._is_gone.is_set() or self._is_answered or running.uncancel():
                raise
            raise ClientDisconnect from None
        finally:
            watching.cancel()


def _without_slash(path: str, root_path: str) -> str:
    """Return a path without a slash at its end, unless it is the root."""
    stripped = path.rstrip("/")
    return path if stripped in ("", root_path.rstrip("/")) else stripped


def _accepts_gzip(header: str) -> bool:
    """Whether a client accepts answers in gzip."""
    for item in header.lower().split(","):
        name, _, rest = item.partition(";")
        if name.strip() in GZIP:
            weight = rest.strip().removeprefix("q=").strip()
            return not (weight and re.fullmatch(r"0(\.0*)?", weight))
    return False


def _id_of(headers: Headers) -> str:
    """Return the id of a request: that of its header if it is clean, or a new one."""
    given = headers.get(ID_HEADER, "")
    return given if CLEAN_ID.fullmatch(given) else uuid.uuid4().hex


def _timeout_of(header: str | None) -> float:
    """Return the seconds that a client waits. Raises Refused if its header is no positive number."""
    if header is None:
        return math.inf
    seconds = float(header) if SECONDS.fullmatch(header.strip()) else math.nan
    if not 0 < seconds < math.inf:
        raise Refused(422, "validation", f"{TIMEOUT_HEADER} must be a positive number of seconds")
    return seconds


def _without_body(send: Send) -> Send:
    """Return what sends an answer without its body, with the headers that describe it."""

    async def send_head(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_head
