"""Every route of the HTTP application, without sockets and without Ray."""

import hashlib
import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from pipelines.errors import ModelFolderError, SettingsError
from pipelines.serving import predictor
from pipelines.serving.auth import check_exposure, is_admitted
from pipelines.serving.settings import ServeSettings
from tests.serving.keys import KEYS

TEXTS = ["Noon at the usual place?", "WIN a free cruise now!!! " * 300]


@pytest.fixture(scope="module")
def truth(api):
    """The answers of /v1/predict for TEXTS."""
    return api.predict(inputs=TEXTS).json()["predictions"]


def test_predict_response_fields(api, spam_folder, emails):
    text = max(emails["text"].to_pylist()[:40], key=len)
    answer = api.predict(inputs=[text], windows=True).json()
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


def test_request_thresholds(api):
    for thresholds in (0.0, [0.0], {"spam": 0.0}):
        (prediction,) = api.predict(inputs=["hello"], thresholds=thresholds).json()["predictions"]
        assert prediction["label"] == "spam"
        assert prediction["thresholds"] == {"spam": 0.0}
    (prediction,) = api.predict(inputs=["hello"], thresholds=1.0).json()["predictions"]
    assert prediction["label"] == "ham"
    (pair,) = api.predict(inputs=[{"text": "hello", "text_pair": "you"}]).json()["predictions"]
    assert pair["num_tokens"] > prediction["num_tokens"]


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 422, "JSON"),
        (b"[]", 422, "body"),
        (b'{"inputs":[]}', 422, "at least 1 item"),
        (b'{"inputs":"hello"}', 422, "inputs"),
        (b'{"inputs":[1]}', 422, "inputs"),
        (
            b'{"inputs":["a"],"treshold":1}',
            422,
            "body: a field that is not known here; the body takes inputs, thresholds, windows",
        ),
        (b'{"inputs":["a"],"thresholds":[0.1,0.2]}', 422, "one for each label"),
        (b'{"inputs":["a"],"thresholds":{"eggs":0.1}}', 422, "by label; labels: spam"),
        (b'{"inputs":["a"],"thresholds":2}', 422, "thresholds"),
        (b'{"inputs":["\\ud800"]}', 422, "lone surrogate"),
        (b'{"inputs":["a",{"text":"a","text_pair":"b"}]}', 422, "in separate requests"),
        (
            b'{"inputs":[' + b",".join([b'"a"'] * 41) + b"]}",
            422,
            "41 inputs; one request takes at least 1 and at most 40",
        ),
        (b'{"inputs":["' + b"word " * 6000 + b'"]}', 422, "tokens; at most 5000"),
        (b'{"inputs":["' + b"a" * 5_000_000 + b'"]}', 413, "at most 4194304"),
    ],
)
def test_bad_request_status_and_message(api, content, status, message):
    answer = api.post("/v1/predict", content=content, headers={**api.headers, "content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]
    assert answer.json()["error_type"]


def test_bad_request_is_not_echoed(api):
    secret = "the-patient-is-called"
    for body in ({"inputs": secret}, {"inputs": [{"text": secret, "more": secret}]}, {"inputs": [[secret]]},
                 {"inputs": ["a"], "thresholds": secret}, {"inputs": ["a"], "thresholds": {secret: 0.5}},
                 {"inputs": ["a"], secret: 1}, {"inputs": [{"text": "a", secret: 1}]}):  # fmt: skip
        answer = api.predict(**body)
        assert answer.status_code == 422
        assert secret not in answer.text
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": secret}}
    bodies = {
        "/v1/moderations": {"input": [{"type": secret}]},
        "/v2/models/spam/infer": {"inputs": [tensor]},
        "/classify": {"input": {secret: secret}},
        "/predict": {"inputs": "a", "parameters": secret},
    }
    for path, body in bodies.items():
        answer = api.post(path, json=body)
        assert answer.status_code == 422
        assert secret not in answer.text


def test_other_models_are_not_found(api):
    for path, body in (("/models/other", {"inputs": "a"}), ("/v2/models/other/infer", {})):
        answer = api.post(path, json=body)
        assert answer.status_code == 404
        assert answer.json()["error"] == "this server has one model, spam"


def test_missing_or_wrong_key_is_401(api):
    body = {"inputs": ["hello"]}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEYS[0]}, {"x-api-key": ""},
                    {"authorization": f"Bearer {hashlib.sha256(KEYS[0].encode()).hexdigest()}"}):  # fmt: skip
        answer = api.post("/v1/predict", json=body, headers=headers)
        assert answer.status_code == 401
        assert answer.json() == {"error": "the API key is missing or wrong; send Authorization: Bearer KEY",
                                 "error_type": "unauthorized"}  # fmt: skip
        assert answer.headers["www-authenticate"] == "Bearer"
    of_another = {"authorization": "Bearer hf_other"}
    for headers in (
        {"authorization": f"bearer {KEYS[0]}"},
        {"x-api-key": KEYS[0]},
        {**of_another, "x-api-key": KEYS[0]},
    ):
        assert api.post("/v1/predict", json=body, headers=headers).status_code == 200
    for path, status in (("/health", 200), ("/livez", 200), ("/readyz", 200), ("/info", 401), ("/docs", 401)):
        assert api.get(path, headers={}).status_code == status


def test_public_host_needs_keys():
    for host in ("0.0.0.0", "192.0.2.7", "::", "127.example.com", "localhost.example.com", "::1234"):
        with pytest.raises(SettingsError, match="lets other machines send requests without a key; set api_keys"):
            check_exposure(ServeSettings(host=host))
    key = hashlib.sha256(b"key").hexdigest()
    for settings in ({"host": "localhost"}, {"host": "127.0.0.2"}, {"host": "::1"},
                     {"host": "0.0.0.0", "api_keys": [key]},
                     {"host": "0.0.0.0", "allow_without_key": True}):  # fmt: skip
        check_exposure(ServeSettings(**settings))
    with pytest.raises(SettingsError, match="api_keys takes SHA-256"):
        ServeSettings(api_keys=("my-key",))


@pytest.mark.parametrize("empty", [b"", b"\n", b"\r\n", b" "])
def test_no_key_is_no_key(empty):
    """`printf %s "$KEY" | sha256sum` prints a hash also if the variable is not set."""
    key_hash = hashlib.sha256(empty).hexdigest()
    with pytest.raises(SettingsError, match="SHA-256 of an empty key"):
        ServeSettings(api_keys=(f"sha256:{key_hash}",))
    for headers in ({}, {"x-api-key": ""}, {"authorization": "Bearer"}, {"authorization": "Bearer  "}):
        assert not is_admitted(headers, [key_hash])


def test_keys_outside_ascii():
    key_hash = hashlib.sha256("schlüssel".encode()).hexdigest()
    for sent in ("schlüssel".encode(), "schlüssel".encode("latin-1")):
        assert is_admitted({"x-api-key": sent.decode("latin-1")}, [key_hash])
        assert is_admitted({"authorization": f"Bearer {sent.decode('latin-1')}"}, [key_hash])
    assert not is_admitted({"x-api-key": "schl?ssel"}, [key_hash])


def test_health_readiness_info_and_docs(api, spam_folder):
    assert api.get("/health").json() == {"status": "ok"}
    assert api.get("/readyz").status_code == 200
    info = api.get("/info").json()
    assert info["model_hash"] == spam_folder.weights_hash
    assert info["dtype"] == "float32"
    assert info["packed"] is True
    assert info["limits"]["max_documents"] == 40
    assert "/v1/predict" in api.get("/openapi.json").json()["paths"]
    page = api.get("/docs").text
    assert "POST /v1/predict" in page
    assert "list of string or Pair" in page
    assert not re.search(r"<script|https?://|src=", page), "it needs no network"


def test_page_needs_no_key_and_loads_nothing(api):
    answer = api.get("/", headers={})
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; ")
    assert set(re.findall(r"(?:src|href)=\S+", answer.text)) == {'href="docs">docs</a>.</p>'}
    assert not re.search(r"@import|https?://", answer.text)
    assert ".innerHTML" not in answer.text, "texts and labels are never inserted as HTML"


def test_text_embeddings_inference_route(api, truth):
    def ask(inputs, **more):
        return api.post("/predict", json={"inputs": inputs, **more})

    one = ask(TEXTS[0], truncate=True).json()
    assert ask([TEXTS[0]]).json() == one
    assert {item["label"]: item["score"] for item in one} == pytest.approx(truth[0]["scores"], abs=1e-5)
    batch = ask([[text] for text in TEXTS]).json()
    assert [answer[0]["label"] for answer in batch] == [expected["label"] for expected in truth]
    (pair,) = ask([["a", "b"]]).json()
    assert len(pair) == 2
    for inputs, message in (
        (["a", "b"], '[["a"], ["b"]] for two texts'),
        ([["a", "b", "c"]], "has 3 texts"),
        ([], "0 inputs"),
    ):
        answer = ask(inputs)
        assert answer.status_code == 422
        assert message in answer.json()["error"]
    assert "raw_scores" in ask("a", raw_scores=True).json()["error"]
    for top_k in (0, -1, "one", True):
        assert "top_k is a number" in ask("a", parameters={"top_k": top_k}).json()["error"]


def test_vllm_route(api, truth):
    for route in ("/classify", "/v1/classify"):
        answer = api.post(route, json={"model": "spam", "input": TEXTS}).json()
        assert answer["object"] == "list"
        assert [item["label"] for item in answer["data"]] == [expected["label"] for expected in truth]
        for item, expected in zip(answer["data"], truth, strict=True):
            assert item["probs"] == pytest.approx(list(expected["scores"].values()), abs=1e-5)
            assert item["num_classes"] == 2
        assert answer["usage"]["prompt_tokens"] == sum(expected["num_tokens"] for expected in truth)
    assert api.post("/classify", json={"input": "one"}).json()["data"][0]["index"] == 0


def test_long_text_is_not_truncated(api, truth):
    assert truth[1]["num_windows"] > 3
    answer = api.post("/classify", json={"input": TEXTS[1]}).json()
    assert answer["usage"]["prompt_tokens"] == truth[1]["num_tokens"]


def test_protocol_routes_need_key(api):
    for route in ("/predict", "/models/spam", "/classify", "/v1/classify", "/v1/moderations"):
        assert api.post(route, json={"inputs": "a", "input": "a"}, headers={}).status_code == 401


def test_short_texts_do_not_wait_for_long_ones(api, monkeypatch):
    """Long texts have a thread of their own to be tokenized, and only so many bytes of them may wait."""
    release, began = threading.Event(), threading.Event()
    tokenizer = api.predictor._scorer.tokenizer
    documents = tokenizer.documents

    def slow(table, *names):
        if table.nbytes >= predictor.INLINE_BYTES:
            began.set()
            assert release.wait(60)
        return documents(table, *names)

    monkeypatch.setattr(tokenizer, "documents", slow)
    monkeypatch.setattr(predictor, "MOST_LONG_BYTES", 1000)
    long = "word" * 20_000
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(api.predict, inputs=[long])
        try:
            assert began.wait(60)
            assert api.predict(inputs=["short"]).status_code == 200
            monkeypatch.setattr(api.predictor, "settings", replace(api.predictor.settings, max_body_bytes=10**5))
            refused = api.predict(inputs=[long])
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert "bytes of long texts wait to be tokenized" in refused.json()["error"]
        finally:
            release.set()
        assert waiting.result().status_code == 200
    assert api.predict(inputs=[long]).status_code == 200


def test_too_many_words_are_refused_before_they_are_tokenized(api, monkeypatch):
    monkeypatch.setattr(api.predictor._scorer.tokenizer, "documents", lambda *_: pytest.fail("tokenized"))
    answer = api.predict(inputs=["word " * 20_000])
    assert answer.status_code == 422
    assert "an input has at least 20000 tokens; at most 5000" in answer.json()["error"]


def test_a_tokenizer_that_fails_is_no_500(api, monkeypatch):
    def fails(*_):
        raise ModelFolderError("the tokenizer cannot read a text: secret")

    monkeypatch.setattr(api.predictor._scorer.tokenizer, "documents", fails)
    answer = api.predict(inputs=["a"])
    assert (answer.status_code, answer.json()["error"]) == (424, "the tokenizer cannot read a text")
