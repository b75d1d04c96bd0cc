import asyncio

import pytest

from pipelines.serving.middleware import Guard


class Counts:
    """Fake metrics that record the counted statuses."""

    def __init__(self):
        self.seen = []

    def count_request(self, route, status, timings):
        self.seen.append(status)
        assert timings.total > 0


def ask(messages, *, headers=(), limit=10, answer=None, counts=None):
    """Send messages through the guard. Return the messages read, sent and left, and the counted statuses."""
    read, sent, counts, left = [], [], counts or Counts(), list(messages)
    scope = {"type": "http", "path": "/", "headers": list(headers)}

    async def application(scope, receive, send):
        if answer is not None:
            raise answer
        read.append((await receive())["body"])
        assert (await receive())["type"] == "http.disconnect", "messages after the body are passed on"
        await send({"type": "http.response.start", "status": 204, "headers": []})

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
