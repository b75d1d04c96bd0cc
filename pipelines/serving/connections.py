"""Connections of the server without Ray, with limits on what comes before and after bodies. Imports no Ray.

uvicorn limits neither the size of headers nor the time in which they arrive, and a body's limits do not cover the
trailers after it.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MOST_HEAD_BYTES = 64 * 2**10
"""Bytes of the headers of a request, or of what else is no body."""
HEAD_SECONDS = 30.0
"""Time in which the headers of a request must arrive, from the connection or from their first byte on."""


class Connection(HttpToolsProtocol):
    """A connection of uvicorn that is closed if headers are too large or too slow."""

    _other_bytes = 0
    """Bytes since the last complete headers, or the last part of a body."""
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Await the headers of the first request."""
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Await nothing more."""
        self._end_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what is no body."""
        self._other_bytes += len(data)
        super().data_received(data)
        if self._other_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self._close(431, f"the headers have more than {MOST_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        """Await the headers of a request."""
        super().on_message_begin()
        if self._deadline is None:
            self._await_headers()

    def on_headers_complete(self) -> None:
        """Go on to the body."""
        self._end_waiting()
        self._other_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Leave the body to its own limits."""
        self._other_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Go on to the next request."""
        self._other_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the form of all other errors."""
        self._close(400, "the request is not valid HTTP")

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: the request is answered as if it had not asked for another protocol."""

    def _await_headers(self) -> None:
        self._deadline = self.loop.call_later(
            HEAD_SECONDS, self._close, 408, f"the headers did not arrive in {HEAD_SECONDS:g} s"
        )

    def _end_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self, status: int, problem: str) -> None:
        """Close the connection, after an answer unless another one is on its way."""
        self._end_waiting()
        if self.cycle is None or self.cycle.response_complete:
            content: dict[str, Any] = {"error": problem, "error_type": "timeout" if status == 408 else "validation"}
            body = json.dumps(content).encode()
            headers = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + headers.encode() + body)
        self.transport.close()
