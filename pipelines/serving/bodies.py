"""Bodies of requests: read within limits of time, number and size, and decompressed.

A client that announces a body and does not send it holds a place. So there are deadlines, and if too many bodies are
awaited, the one that has been awaited longest is given up.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.types import Receive

MOST_BODIES = 256
"""Bodies that are awaited at once."""
MOST_BODY_BYTES = 64 * 2**20
"""Bytes of bodies that are awaited at once, or one body of the maximum size."""
TENSORS = "/infer"
"""End of the paths whose bodies may contain binary tensors."""
MOST_DIGITS = 18
"""Digits of a content length that is believed. A longer one is counted as the body arrives."""
GZIP = ("gzip", "x-gzip")
"""Names of gzip, by RFC 9110."""


class Refused(Exception):
    """A request that is answered before its route sees it."""

    def __init__(self, status: int, error_type: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.error_type, self.headers = status, error_type, headers


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


def encoding_of(headers: Headers, path: str) -> str:
    """Return how a body is compressed: gzip, deflate, or not at all. Raises Refused for other content than JSON."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    if not is_json and not path.endswith(TENSORS):
        raise Refused(415, "validation", "the body must be JSON, and say so: send content-type: application/json")
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return ""
    if encoding not in (*GZIP, "deflate"):
        raise Refused(415, "validation", "the body's content-encoding is not supported; send gzip, deflate or none")
    return "gzip" if encoding in GZIP else encoding


def decompressed(body: bytes, encoding: str, most: int) -> bytes:
    """Return the content of a compressed body, of at most this many bytes. A gzip file may have several members."""
    parts, left = [], most
    while body:
        member = zlib.decompressobj(_window_bits(body, encoding))
        try:
            parts.append(member.decompress(body, left + 1))
        except zlib.error as error:
            raise Refused(422, "validation", f"the body is not valid {encoding}") from error
        left -= len(parts[-1])
        if left < 0:
            raise Refused(413, "too_large", f"the body has more than {most} bytes after decompression")
        if not member.eof:
            raise Refused(422, "validation", f"the body is not valid {encoding}: it ends too early")
        body = member.unused_data
    return b"".join(parts)


def _window_bits(body: bytes, encoding: str) -> int:
    """Return zlib's number of a format. deflate is zlib's by RFC 9110, but some clients send it without its header."""
    if encoding == "gzip":
        return zlib.MAX_WBITS | 16
    has_header = body[0] & 15 == zlib.DEFLATED and int.from_bytes(body[:2], "big") % 31 == 0
    return zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS
