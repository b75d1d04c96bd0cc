"""`pipelines serve --local`: the same application in one process, over a real socket, without Ray."""

import http.client
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from pipelines.cli import main
from pipelines.model.scorer import Scorer
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
