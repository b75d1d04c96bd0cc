"""Choose the proxy in front of the replicas. Ray Serve reads the choice from the environment at import and start.

`ProxyGuard` mends two answers of Ray Serve's own proxy: 404 while the model loads or the server stops, and 500 for a
header that is not UTF-8. `pipelines.on_ray.serve.haproxy` does the same for HAProxy.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING, Literal

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

from pipelines.errors import SettingsError
from pipelines.on_ray.serve.haproxy import BINARY, PROGRAM, RETRY_AFTER_SECONDS, UNAVAILABLE
from pipelines.serving.schema import ErrorResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
DEFAULTS = {
    # Log lines that are written at once. The 1000 of throughput mode block a replica's loop for 50 ms.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "100",
    # Seconds after which a silent client is cut, such as one that sends no complete headers. Ray's default is an hour.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "300",
}
MIDDLEWARES = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.middlewares"}
"""Variable with the function that returns the middlewares of Ray Serve's own proxy. HAProxy falls back to that one."""


def prepare_proxy(proxy: str) -> None:
    """Set the environment for the proxy, for this process and a local Ray that it starts.

    Call this before Ray Serve is imported.
    """
    if proxy == "haproxy":
        os.environ.update(HAPROXY)
        program = shutil.which(PROGRAM, path=os.path.dirname(sys.executable))
        if program is not None:
            os.environ.setdefault(BINARY, program)
    for name, value in ({**DEFAULTS, **MIDDLEWARES} if proxy == "haproxy" else MIDDLEWARES).items():
        os.environ.setdefault(name, value)


def middlewares() -> list[Middleware]:
    """Return the middlewares of Ray Serve's own proxy. Ray Serve calls this in each proxy."""
    return [Middleware(ProxyGuard)]


class ProxyGuard:
    """ASGI middleware: answers 503 with Retry-After without an application, and drops headers that are not UTF-8.

    Without an application, Ray Serve's proxy answers 404 in plain text. The application's own 404 is JSON.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        is_replaced = False

        async def send_replaced(message: Message) -> None:
            nonlocal is_replaced
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "")
                is_replaced = message["status"] == 404 and kind.startswith("text/plain")
            if not is_replaced:
                await send(message)

        if "headers" in scope:
            scope = {**scope, "headers": [pair for pair in scope["headers"] if all(map(_is_text, pair))]}
        is_path = scope.get("path", "").startswith("/")  # OPTIONS * is for no application
        await self._app(scope, receive, send_replaced if is_path else send)
        if is_replaced:
            content = ErrorResponse(error=UNAVAILABLE, error_type="unavailable").model_dump()
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            await JSONResponse(content, 503, headers=headers)(scope, receive, send)


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def check_proxy(proxy: Literal["python", "haproxy"]) -> None:
    """Check that the environment has the variables that the proxy needs.

    Raises:
        SettingsError: The proxy is haproxy, and its variables are not set.
    """
    if proxy == "haproxy" and any(os.environ.get(name) != value for name, value in HAPROXY.items()):
        needed = " ".join(f"{name}={value}" for name, value in HAPROXY.items())
        raise SettingsError(f"proxy=haproxy needs {needed} in the environment of every Ray node and of this process")
