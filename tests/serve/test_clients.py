"""Clients of other servers, unchanged, over a real socket; and what their protocols say where they differ."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import httpx
import numpy as np
import openai
import pytest
import schemathesis
import tritonclient.http
import tritonclient.utils
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from pipelines.errors import DataError
from pipelines.on_ray.serve.inference_protocol import answered, texts_of_tensors
from pipelines.on_ray.serve.protocols import (
    InferenceRequest,
    ModerationRequest,
    classified,
    moderated,
    ranked,
    texts_of_inference,
    texts_of_moderation,
)
from pipelines.on_ray.serve.schema import Pair, Prediction, Usage
from pipelines.settings import DecisionSettings
from tests.serve.test_server import KEYS, predict, server  # noqa: F401 (a fixture)

CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
NPM_PACKAGE = "@huggingface/inference@4.13.30"
TEXTS = ["Noon at the usual place?", "WIN a free cruise now!!! " * 300]


@pytest.fixture
def truth(server):  # noqa: F811
    """What our own route says of the texts."""
    return predict(server, inputs=TEXTS).json()["predictions"]


HUB = """
import json, sys
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
url, key, *texts = sys.argv[1:]
client = InferenceClient(model=url, token=key)
for text in texts:
    print(json.dumps([[item.label, item.score] for item in client.text_classification(text)]))
print(len(client.text_classification("x", top_k=1)))
try:
    InferenceClient(model=url, token="wrong").text_classification("x")
except HfHubHTTPError as error:
    print(error.response.status_code)
"""


def test_huggingfaces_client(server, truth):  # noqa: F811
    """In a process of its own, where it may reach a network, which is loopback."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    for route in ("/models/spam", "/predict"):
        command = [sys.executable, "-c", HUB, f"{server.base_url}{route}", KEYS[0], *TEXTS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        *answers, top, refused = map(json.loads, done.stdout.splitlines())
        for answer, expected in zip(answers, truth, strict=True):
            assert dict(answer) == pytest.approx(expected["scores"], abs=1e-5)
            assert answer[0][0] == expected["label"], "the decided label comes first"
        assert (top, refused) == (1, 401)


NPM = """
import { InferenceClient } from "@huggingface/inference";
const [url, key, ...texts] = process.argv.slice(2);
const client = new InferenceClient(key);
const more = url.endsWith("/predict") ? { parameters: {} } : {};
for (const inputs of texts)
  console.log(JSON.stringify(await client.textClassification({ endpointUrl: url, inputs, ...more })));
try {
  await new InferenceClient("hf_wrong").textClassification({ endpointUrl: url, inputs: "x" });
} catch (error) {
  console.log(error.httpResponse.status);
}
"""


def test_huggingfaces_client_for_javascript(server, truth, tmp_path):  # noqa: F811
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs Node.js")
    install = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(tmp_path), NPM_PACKAGE]
    if subprocess.run(install, capture_output=True, timeout=120, check=False).returncode:
        pytest.skip(f"npm cannot get {NPM_PACKAGE}")
    (tmp_path / "ask.mjs").write_text(NPM)
    for route in ("/models/spam", "/predict"):
        command = ["node", str(tmp_path / "ask.mjs"), f"{server.base_url}{route}", KEYS[0], *TEXTS]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        *answers, refused = map(json.loads, done.stdout.splitlines())
        for answer, expected in zip(answers, truth, strict=True):
            scores = {item["label"]: item["score"] for item in answer}
            assert scores == pytest.approx(expected["scores"], abs=1e-5)
            assert answer[0]["label"] == expected["label"]
        assert refused == 401


@pytest.mark.parametrize("mode", GenerationMode)
def test_nothing_that_fits_the_schema_or_does_not_breaks_the_server(server, mode):  # noqa: F811
    headers = dict(server.headers)
    schema = schemathesis.openapi.from_url(f"{server.base_url}/openapi.json", headers=headers)
    asked = 0
    for operation in schema.get_all_operations():
        try:
            cases = operation.ok().as_strategy(generation_mode=mode)

            @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(cases)
            def check(case):
                nonlocal asked
                asked += 1
                case.call_and_validate(headers=headers, checks=CHECKS)

            check()
        except Unsatisfiable:
            continue
    assert asked > 100


def test_openais_client(server, truth):  # noqa: F811
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEYS[0], max_retries=0)
    for texts in (TEXTS, [{"type": "text", "text": text} for text in TEXTS]):
        answer = client.moderations.create(input=texts, model="spam")
        assert answer.model == "spam"
        for found, expected in zip(answer.results, truth, strict=True):
            assert found.flagged == (expected["label"] == "spam")
            assert found.categories.model_extra == {"spam": found.flagged}
            assert found.category_scores.model_extra["spam"] == pytest.approx(expected["scores"]["spam"], abs=1e-5)
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.moderations.create(input=[{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}])
    assert "has no text" in refused.value.response.json()["error"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="wrong", max_retries=0).moderations.create(input="x")


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client(server, truth, binary):  # noqa: F811
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    with contextlib.closing(tritonclient.http.InferenceServerClient(server.base_url.netloc.decode())) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("spam", headers=headers)
        metadata = client.get_model_metadata("spam", headers=headers)
        assert metadata["parameters"]["labels"] == ["ham", "spam"]
        tensor = tritonclient.http.InferInput("text", [2], "BYTES")
        tensor.set_data_from_numpy(np.array(TEXTS, dtype=object), binary_data=binary)
        answer = client.infer("spam", [tensor], request_id="mine", headers=headers)
        assert answer.get_response()["id"] == "mine"
        for output in metadata["outputs"]:
            found = answer.as_numpy(output["name"])
            assert list(found.shape) == [2, *output["shape"][1:]]
        expected = [list(prediction["scores"].values()) for prediction in truth]
        np.testing.assert_allclose(answer.as_numpy("scores"), expected, atol=1e-5)
        assert answer.as_numpy("label").tolist() == [prediction["label"] for prediction in truth]
        assert answer.as_numpy("num_windows").tolist() == [prediction["num_windows"] for prediction in truth]
        with pytest.raises(tritonclient.utils.InferenceServerException, match="there is one model here, spam"):
            client.infer("ham", [tensor], headers=headers)
        with pytest.raises(tritonclient.utils.InferenceServerException, match="no API key"):
            client.infer("spam", [tensor])


@given(st.binary(max_size=200), st.one_of(st.none(), st.text(max_size=5), st.integers(0, 250).map(str)))
@example(b'{"inputs":[{"name":"text","datatype":"BYTES","parameters":{"binary_data_size":4}}]}\xff\xff\xff\xff', "83")
@example(b'{"inputs":[{"name":["text"],"datatype":"BYTES"}]}', None)
@example(b'{"inputs":[{"name":"text","datatype":"BYTES","parameters":{"binary_data_size":true}}]}x', "83")
@example(b"[" * 200_000, None)
@example(b"{}", "9" * 5000)
def test_no_tensors_break_the_protocol(body, header_length):
    with contextlib.suppress(DataError):
        texts_of_tensors(body, header_length)


def test_tensors_of_every_kind():
    many = Prediction(labels=["b"], scores={"a": 0.1, "b": 0.9}, num_tokens=1, num_windows=2, truncated=False)
    decision = DecisionSettings(kind="multilabel", labels=("a", "b"))
    outputs = {output["name"]: output for output in answered([many, many], decision, "m", None)["outputs"]}
    assert outputs["held"] == {"name": "held", "datatype": "BOOL", "shape": [2, 2], "data": [False, True] * 2}
    value = Prediction(value=2.5, scores={"value": 2.5}, num_tokens=1, num_windows=1, truncated=False)
    answer = answered([value], DecisionSettings(kind="regression"), "m", "7")
    assert answer["id"] == "7"
    assert {"name": "value", "datatype": "FP32", "shape": [1], "data": [2.5]} in answer["outputs"]
    pairs = {
        "inputs": [{"name": name, "datatype": "BYTES", "shape": [1], "data": [name]} for name in ("text", "text_pair")]
    }
    assert texts_of_tensors(json.dumps(pairs).encode(), None)[1] == [Pair(text="text", text_pair="text_pair")]


def test_text_embeddings_inferences_route(server, truth):  # noqa: F811
    def ask(inputs, **more):
        return server.post("/predict", json={"inputs": inputs, **more})

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


def test_vllms_route(server, truth):  # noqa: F811
    for route in ("/classify", "/v1/classify"):
        answer = server.post(route, json={"model": "spam", "input": TEXTS}).json()
        assert answer["object"] == "list"
        assert [item["label"] for item in answer["data"]] == [expected["label"] for expected in truth]
        for item, expected in zip(answer["data"], truth, strict=True):
            assert item["probs"] == pytest.approx(list(expected["scores"].values()), abs=1e-5)
            assert item["num_classes"] == 2
        assert answer["usage"]["prompt_tokens"] == sum(expected["num_tokens"] for expected in truth)
    assert server.post("/classify", json={"input": "one"}).json()["data"][0]["index"] == 0


def test_a_long_text_is_not_truncated_by_any_of_them(server, truth):  # noqa: F811
    assert truth[1]["num_windows"] > 3
    answer = server.post("/classify", json={"input": TEXTS[1]}).json()
    assert answer["usage"]["prompt_tokens"] == truth[1]["num_tokens"]


def test_without_a_key_no_route_answers(server):  # noqa: F811
    for route in ("/predict", "/models/x", "/classify", "/v1/classify", "/v1/moderations"):
        assert (
            httpx.post(f"{server.base_url}{route}", json={"inputs": "a", "input": "a"}, timeout=30).status_code == 401
        )


def prediction(**more):
    return Prediction(scores={"a": 0.2, "b": 0.7, "c": 0.6}, num_tokens=3, num_windows=1, truncated=False, **more)


def test_several_labels():
    several = prediction(labels=["a", "c"])
    assert [item["label"] for item in ranked(several)] == ["c", "a", "b"], "what holds comes before what does not"
    (found,) = classified([several], Usage(num_tokens=3, num_windows=1), "m")["data"]
    assert (found["label"], found["probs"]) == ("c", [0.2, 0.7, 0.6])
    (found,) = moderated([several], ["a", "b", "c"], "multilabel", "m")["results"]
    assert found["categories"] == {"a": True, "b": False, "c": True}
    (found,) = moderated([prediction(labels=[])], ["a", "b", "c"], "multilabel", "m")["results"]
    assert not found["flagged"]


def test_inputs_of_all_shapes():
    def read(reads_pairs=None, **body):
        return texts_of_inference(InferenceRequest(**body), reads_pairs=reads_pairs)

    assert read(inputs="a") == (["a"], False)
    assert read(inputs=["a"], parameters={}) == (["a"], True)
    assert read(inputs=["a", "b"], parameters={}) == (["a", "b"], True)
    assert read(inputs=[["a"], ["b", "c"]]) == (["a", Pair(text="b", text_pair="c")], True)
    for reads_pairs in (None, False):
        with pytest.raises(DataError, match="may be a pair or a batch"):
            read(inputs=["a", "b"], reads_pairs=reads_pairs)
    assert read(inputs=["a", "b"], reads_pairs=True) == ([Pair(text="a", text_pair="b")], False)
    with pytest.raises(DataError, match="may be a pair or a batch"):
        read(inputs=["a", "b", "c"], reads_pairs=True)
    assert texts_of_moderation(ModerationRequest(input="a")) == ["a"]
