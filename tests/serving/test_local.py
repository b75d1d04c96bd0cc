"""`pipelines serve --local`: the same application in one process, over a real socket, without Ray."""

import asyncio
import contextlib
import gzip
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from pipelines.cli import main
from pipelines.model.scorer import Scorer
from pipelines.serving import connections
from pipelines.settings import ComputeSettings
from tests.jobs import free_port, start_command, wait_until


class Server:
    """A server in a process of its own. Its log is in a file."""

    def __init__(self, folder, path, *options):
        self.port, self.log = free_port(), path / "log"
        self.stderr = self.log.open("w")
        self.process = start_command(
            "serve", folder, "--local", "--port", self.port, "--set", "dtype=float32", *options
        )
        self._reader = threading.Thread(target=self._copy, daemon=True)
        self._reader.start()

    def _copy(self):
        for line in self.process.stderr:
            self.stderr.write(line)
            self.stderr.flush()

    def said(self, words):
        assert self.process.poll() is None or words in self.log.read_text(), self.log.read_text()
        return words in self.log.read_text()

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(spam_folder, tmp_path_factory):
    running = Server(spam_folder.path, tmp_path_factory.mktemp("local"))
    wait_until(lambda: running.said("ready on http://127.0.0.1:"), seconds=60)
    yield running
    running.stop()


def test_answers_as_the_scorer_does(server, spam_folder, emails):
    texts = emails["text"].to_pylist()[:8]
    status, content = server.ask("POST", "/v1/predict", {"inputs": texts})
    assert status == 200
    scorer = Scorer.load(spam_folder, compute=ComputeSettings(dtype="float32"))
    expected = scorer.predict(texts)
    for prediction, scores in zip(json.loads(content)["predictions"], expected["scores"].to_pylist(), strict=True):
        assert [prediction["scores"][label] for label in ("ham", "spam")] == pytest.approx(scores, abs=1e-5)
    assert [one["label"] for one in json.loads(content)["predictions"]] == expected["predicted_label"].to_pylist()


def test_pages_probes_and_errors(server):
    for path, words in (("/", b"<html"), ("/docs", b"<html"), ("/health", b"ok"), ("/readyz", b"ready"),
                        ("/v2/health/ready", b"true")):  # fmt: skip
        status, content = server.ask("GET", path)
        assert (status, words in content.lower()) == (200, True), path
    assert json.loads(server.ask("GET", "/info")[1])["engine"] == "torch"
    assert server.ask("POST", "/v1/predict", {"inputs": 3})[0] == 422
    assert server.ask("GET", "/nowhere")[0] == 404


def test_metrics_have_the_names_of_ray_serve(server):
    server.ask("POST", "/v1/predict", {"inputs": ["count me"]})
    text = server.ask("GET", "/metrics")[1].decode()
    histograms = ("request_seconds", "queue_seconds", "batch_fill", "inference_seconds", "score")
    counters = ("requests", "tokens", "decided", "documents")
    names = [f"{name}_total" for name in counters] + [f"{name}_count" for name in histograms] + ["queued_tokens"]
    for name in names:
        assert re.search(rf"^ray_pipelines_{name}(\{{.*\}})? [0-9.e+]+$", text, re.M), name
    assert 'route="/v1/predict",status="200"' in text
    assert "count me" not in text


def test_one_process_without_ray(server):
    assert len(os.listdir(f"/proc/{server.process.pid}/task")) < 60
    assert "_raylet" not in Path(f"/proc/{server.process.pid}/maps").read_text()


def raw(server, content, *, answers=1):
    """Send bytes, and return the statuses and bodies of as many answers."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(content)
        stream = connection.makefile("rb")
        found = []
        for _ in range(answers):
            status = int(stream.readline().split()[1])
            headers = dict(
                line.decode("latin-1").strip().lower().split(": ", 1) for line in iter(stream.readline, b"\r\n")
            )
            is_head = content.startswith(b"HEAD")
            found.append((status, b"" if is_head else stream.read(int(headers["content-length"])), headers))
        return found


def post(body, *headers, path="/v1/predict", length=True):
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers]
    return "\r\n".join([*lines, *([f"content-length: {len(body)}"] if length else []), "", ""]).encode("latin-1") + body


BODY = json.dumps({"inputs": ["a text"]}).encode()


def test_head_over_a_socket_has_no_body(server):
    """A second answer on the same connection shows that nothing was sent after the headers of the first."""
    request = b"HEAD /info HTTP/1.1\r\nhost: x\r\n\r\n"
    (first, _, headers), (second, _, _) = raw(server, request * 2, answers=2)
    assert (first, second) == (200, 200)
    assert int(headers["content-length"]) > 100


def test_chunked_and_compressed_bodies_over_a_socket(server):
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:5], BODY[5:])) + b"0\r\n\r\n"
    head = post(b"", "transfer-encoding: chunked", length=False)
    zipped = gzip.compress(BODY)
    for content in (post(BODY), head + chunked, post(zipped, "content-encoding: gzip")):
        ((status, body, _),) = raw(server, content)
        assert status == 200
        assert len(json.loads(body)["predictions"]) == 1


def test_several_requests_at_once_on_a_connection_are_answered_in_order(server):
    bodies = [json.dumps({"inputs": ["a"] * count}).encode() for count in (3, 1, 2)]
    found = raw(server, b"".join(map(post, bodies)), answers=3)
    assert [len(json.loads(body)["predictions"]) for _, body, _ in found] == [3, 1, 2]


@pytest.mark.parametrize(
    "name", ["x-request-id", "user-agent", "x-request-timeout-seconds", "authorization", "origin", "cookie"]
)
def test_headers_that_are_not_ascii(server, name):
    ((status, body, _),) = raw(server, post(BODY, f"{name}: \xff\xe9"))
    assert status == (422 if name == "x-request-timeout-seconds" else 200), body


def test_clients_that_leave_stop_nobody(server):
    long = json.dumps({"inputs": ["word " * 20_000]}).encode()
    for content in (post(long), post(long)[:-1000], post(BODY)[:20], b"\x16\x03\x01" + bytes(100)):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(content)
    assert server.ask("POST", "/v1/predict", {"inputs": ["still there"]})[0] == 200


def test_work_for_a_client_that_left_is_dropped(server):
    def counted(pattern):
        return sum(map(float, re.findall(pattern, server.ask("GET", "/metrics")[1].decode(), re.M)))

    left, tokens = (
        r'^ray_pipelines_requests_total.*status="499".* ([0-9.e+]+)$',
        r"^ray_pipelines_tokens_total.* ([0-9.e+]+)$",
    )
    before, tokens_before = counted(left), counted(tokens)
    body = json.dumps({"inputs": ["word " * 50_000] * 12}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(post(body))
        wait_until(lambda: counted(tokens) > tokens_before, seconds=60)
    wait_until(lambda: counted(left) == before + 1, seconds=30)
    server.ask("POST", "/v1/predict", {"inputs": ["after the pass that was running"]})
    at_once = counted(tokens)
    time.sleep(1)
    assert counted(tokens) == at_once


@pytest.mark.parametrize(
    "start", [b"GET /ping HTTP/1.1\r\n", post(b"", "transfer-encoding: chunked", length=False) + b"0\r\n"]
)
def test_headers_and_trailers_have_a_limit(server, start):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(start)
        with contextlib.suppress(ConnectionError):
            for number in range(2000):
                connection.sendall(b"x-%d: " % number + b"y" * 8000 + b"\r\n")
            raise AssertionError("16 MB of headers were taken")
    assert server.ask("GET", "/ping")[0] == 200


def test_one_endless_header_is_refused(server):
    ((status, body, headers),) = raw(server, b"GET /ping HTTP/1.1\r\nx: " + b"y" * 70_000)
    assert (status, headers["connection"]) == (431, "close")
    assert json.loads(body) == {"error": "the headers have more than 65536 bytes", "error_type": "validation"}


def test_headers_have_a_time(monkeypatch):
    """Without the process, because the time is long."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)

    async def run():
        async def application(scope, receive, send):
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        port = free_port()
        server = uvicorn.Server(uvicorn.Config(application, http=connections.Connection, port=port, log_config=None))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        for sent in (b"", b"GET /ping HTTP/1.1\r\nx: y\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            answer = await asyncio.wait_for(reader.read(), 10)
            assert answer.startswith(b"HTTP/1.1 408"), "and the connection is closed"
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 204")
            while (await reader.readline()).strip():
                pass
            await asyncio.sleep(0.3)
        writer.close()
        server.should_exit = True
        await serving

    asyncio.run(run())


def test_what_is_not_http_has_the_error_schema(server):
    ((status, body, _),) = raw(server, b"\x16\x03\x01" + bytes(100))
    assert (status, json.loads(body)["error"]) == (400, "the request is not valid HTTP")
    upgrade = b"GET /nowhere HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
    ((status, body, _),) = raw(server, upgrade)
    assert (status, json.loads(body)["error_type"]) == (404, "route")


def test_requests_have_ids_and_are_logged(server):
    ((_, _, headers),) = raw(server, post(BODY, "x-request-id: my-id-1"))
    assert headers["x-request-id"] == "my-id-1"
    line = re.compile(r"^POST /v1/predict 200 in \d+ ms, id my-id-1$", re.M)
    wait_until(lambda: line.search(server.log.read_text()), seconds=10)
    ((_, _, headers),) = raw(server, post(BODY, 'x-request-id: a" status=500'))
    assert re.fullmatch(r"[0-9a-f]{32}", headers["x-request-id"]), "it could forge fields of a log line"


def test_second_server_on_the_port_is_refused(server, spam_folder, capsys):
    assert main(["serve", str(spam_folder.path), "--local", "--port", str(server.port)]) == 2
    assert f"port {server.port} of 127.0.0.1 is in use" in capsys.readouterr().err


def test_settings_of_ray_serve_are_refused(spam_folder, capsys):
    assert main(["serve", str(spam_folder.path), "--local", "--set", "num_replicas=2"]) == 2
    assert "num_replicas=2 is for Ray Serve" in capsys.readouterr().err


def test_running_requests_are_answered_before_it_stops(spam_folder, tmp_path, emails):
    running = Server(spam_folder.path, tmp_path)
    wait_until(lambda: running.said("ready on"), seconds=60)
    text = " ".join(emails["text"].to_pylist())[:200_000]
    answers = []
    client = threading.Thread(target=lambda: answers.append(running.ask("POST", "/v1/predict", {"inputs": [text]})[0]))
    client.start()
    time.sleep(0.3)
    assert running.stop() == 0
    client.join(60)
    assert answers == [200]
    assert running.said("running requests have finished")
