import asyncio
import json

import pytest

from pipelines.serving import bodies
from pipelines.serving.middleware import Guard


class Counts:
    """Fake metrics that record the counted statuses."""

    def __init__(self):
        self.seen = []

    def count_request(self, route, status, timings):
        self.seen.append(status)
        assert timings.total > 0


JSON = (b"content-type", b"application/json")


def ask(messages, *, headers=(), limit=10, answer=None, counts=None):
    """Send messages through the guard. Return the messages read, sent and left, and the counted statuses."""
    read, sent, counts, left = [], [], counts or Counts(), list(messages)
    scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": [JSON, *headers]}

    async def application(scope, receive, send):
        if answer is not None:
            raise answer
        read.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        assert (await receive())["type"] == "http.disconnect", "messages after the body are passed on"

    async def receive():
        return left.pop(0)

    async def send(message):
        sent.append(message)

    guard = Guard(application, api_keys=(), max_body_bytes=limit, metrics=counts)
    asyncio.run(guard(scope, receive, send))
    return read, sent, counts.seen, left


def part(body, more):
    return {"type": "http.request", "body": body, "more_body": more}


GONE = {"type": "http.disconnect"}


def test_body_parts_are_joined_and_answer_is_timed():
    read, sent, counted, _ = ask([part(b"12345", True), part(b"", True), part(b"67890", False), GONE])
    assert read == [b"1234567890"]
    assert counted == [204]
    assert {name for name, _ in sent[0]["headers"]} >= {b"x-total-time", b"x-queue-time"}


def test_reading_stops_at_body_limit():
    read, sent, counted, left = ask([part(b"123456", True)] * 5)
    assert not read
    assert counted == [413]
    assert b"12 bytes; at most 10" in sent[1]["body"]
    assert len(left) == 3


def test_content_length_above_limit_is_413():
    read, _, counted, left = ask([part(b"1", False)], headers=[(b"content-length", b"11")])
    assert not read
    assert counted == [413]
    assert len(left) == 1


@pytest.mark.parametrize("length", [b"\xb2", b"-1", b"", b"x", b"9" * 5000])
def test_invalid_content_length_is_ignored(length):
    read, _, counted, _ = ask([part(b"1", False), GONE], headers=[(b"content-length", length)])
    assert read == [b"1"]
    assert counted == [204]


def test_incomplete_body_is_dropped():
    read, sent, counted, _ = ask([part(b"123", True), GONE])
    assert not read
    assert not sent
    assert counted == [499]


@pytest.mark.parametrize(("error", "status"), [(ValueError, 500), (asyncio.CancelledError, 499)])
def test_exceptions_are_counted(error, status):
    counts = Counts()
    with pytest.raises(error):
        ask([part(b"", False)], answer=error(), counts=counts)
    assert counts.seen == [status]


class Server:
    """A guard whose clients send what they are told to."""

    def __init__(self, **options):
        self.counts = Counts()
        self.guard = Guard(self.answer, api_keys=(), max_body_bytes=10**6, metrics=self.counts, **options)
        self.pause = 0

    async def answer(self, scope, receive, send):
        await asyncio.sleep(self.pause)
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def ask(self, *parts, path="/v1/predict", method="POST"):
        """Send the parts of a body, and then nothing more. Returns the status and the answer."""
        left, sent = [part(content, True) for content in parts[:-1]] + [part(p, False) for p in parts[-1:]], []

        async def receive():
            if left and left[0]["body"] is not None:
                return left.pop(0)
            await asyncio.sleep(100)

        async def send(message):
            sent.append(message)

        await self.guard({"type": "http", "method": method, "path": path, "headers": [JSON]}, receive, send)
        return sent[0]["status"], sent[1]["body"]


def test_probes_are_answered_beside_half_open_requests():
    """1,000 clients announce a body and send nothing. Everything else is answered at once."""

    async def run():
        server = Server()
        attack = [asyncio.create_task(server.ask(None, path=path)) for path in ["/v1/predict", "/health"] * 500]
        await asyncio.sleep(0.05)
        async with asyncio.timeout(1):
            assert (await server.ask(b"x")) == (200, b"x")
            assert (await server.ask(path="/health", method="GET"))[0] == 200
            assert (await server.ask(b"x" * 10, b"y", path="/v1/predict"))[0] == 200
        await asyncio.sleep(0)
        statuses = [task.result()[0] for task in attack if task.done()]
        assert statuses.count(200) == 500, "a body of a probe is not awaited"
        assert set(statuses) == {200, 408}
        for task in attack:
            task.cancel()

    asyncio.run(run())


def test_bodies_that_take_too_long_and_too_much_memory(monkeypatch):
    async def run():
        assert (await Server(body_timeout_s=0.05).ask(b"1", None))[0] == 408
        server = Server()
        monkeypatch.setattr(bodies, "MOST_BODY_BYTES", 10**6)
        slow = [asyncio.create_task(server.ask(b"x" * 300_000, None)) for _ in range(6)]
        await asyncio.sleep(0.05)
        assert [task.done() for task in slow] == [True] * 3 + [False] * 3, "the oldest are given up"
        assert (await server.ask(b"y" * 900_000))[0] == 200
        for task in slow:
            task.cancel()

    asyncio.run(run())


def test_requests_that_run_too_long_and_too_many():
    async def run():
        slow = Server(request_timeout_s=0.05)
        slow.pause = 10
        status, body = await slow.ask(b"x")
        assert (status, json.loads(body)["error_type"]) == (504, "timeout")
        server = Server()
        server.pause = 0.2
        running = [asyncio.create_task(server.ask(b"x")) for _ in range(1000)]
        await asyncio.sleep(0.05)
        assert (await server.ask(path="/readyz", method="GET"))[0] == 200
        statuses = [status for status, _ in await asyncio.gather(*running)]
        assert (statuses.count(200), statuses.count(503)) == (900, 100)
        assert (await server.ask(b"x"))[0] == 200

    asyncio.run(run())
