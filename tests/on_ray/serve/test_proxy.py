"""The middleware of Ray Serve's own proxy, without a proxy."""

import asyncio
import json

import pytest

from pipelines.on_ray.serve.proxy import ProxyGuard


def through(status, kind, *, path="/v1/predict", headers=()):
    """Send a request through the guard to an application with this answer. Returns what it saw, and what was sent."""
    seen, sent = [], []

    async def application(scope, receive, send):
        seen.append(scope)
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": b"theirs"})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": list(headers)}
    asyncio.run(ProxyGuard(application)(scope, None, send))
    return seen[0], sent


def test_no_application_is_503_with_retry_after():
    _, sent = through(404, b"text/plain; charset=utf-8")
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"5") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error_type"] == "unavailable"


@pytest.mark.parametrize(
    ("status", "kind", "path"),
    [(404, b"application/json", "/nowhere"), (200, b"text/plain", "/metrics"), (404, b"text/plain", "*")],
)
def test_other_answers_are_passed_on(status, kind, path):
    """A 404 of the application is JSON, and OPTIONS * is for no application."""
    _, sent = through(status, kind, path=path)
    assert [sent[0]["status"], sent[1]["body"]] == [status, b"theirs"]


def test_headers_that_are_not_utf8_are_dropped():
    scope, _ = through(200, b"text/plain", headers=[(b"x-request-id", b"\xff\xe9"), (b"accept", "é".encode())])
    assert scope["headers"] == [(b"accept", "é".encode())]
