import asyncio

import pytest

from pipelines.serving.middleware import Guard


class Counts:
    """Stands in for the metrics: what was counted."""

    def __init__(self):
        self.seen = []

    def count_request(self, route, status, timings):
        self.seen.append(status)
        assert timings.total > 0


def ask(messages, *, headers=(), limit=10, answer=None, counts=None):
    """What an application behind the guard read, what was sent, and which statuses were counted."""
    read, sent, counts, left = [], [], counts or Counts(), list(messages)
    scope = {"type": "http", "path": "/", "headers": list(headers)}

    async def application(scope, receive, send):
        if answer is not None:
            raise answer
        read.append((await receive())["body"])
        assert (await receive())["type"] == "http.disconnect", "what comes after the body still comes"
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


def test_a_body_in_parts_is_handed_on_whole_and_the_answer_says_how_long_it_took():
    read, sent, counted, _ = ask([part(b"12345", True), part(b"", True), part(b"67890", False), GONE])
    assert read == [b"1234567890"]
    assert counted == [204]
    assert {name for name, _ in sent[0]["headers"]} >= {b"x-total-time", b"x-queue-time"}


def test_no_more_is_read_than_the_limit():
    read, sent, counted, left = ask([part(b"123456", True)] * 5)
    assert not read
    assert counted == [413]
    assert b"12 bytes; at most 10" in sent[1]["body"]
    assert len(left) == 3


def test_what_announces_too_much_is_not_read():
    read, _, counted, left = ask([part(b"1", False)], headers=[(b"content-length", b"11")])
    assert not read
    assert counted == [413]
    assert len(left) == 1


def test_a_length_that_is_no_number_is_counted_instead():
    read, _, counted, _ = ask([part(b"1", False), GONE], headers=[(b"content-length", b"\xb2")])
    assert read == [b"1"]
    assert counted == [204]


def test_half_a_body_is_not_taken_for_a_whole_one():
    read, sent, counted, _ = ask([part(b"123", True), GONE])
    assert not read
    assert not sent
    assert counted == [499]


@pytest.mark.parametrize(("error", "status"), [(ValueError, 500), (asyncio.CancelledError, 499)])
def test_what_is_raised_is_counted(error, status):
    counts = Counts()
    with pytest.raises(error):
        ask([part(b"", False)], answer=error(), counts=counts)
    assert counts.seen == [status]
