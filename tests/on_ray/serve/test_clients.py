"""Unchanged client libraries of other servers, over a real socket."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import openai
import pytest
import schemathesis
import tritonclient.http
import tritonclient.utils
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.on_ray.serve.servers import predict
from tests.serving.keys import KEYS

pytestmark = pytest.mark.ray
CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
NPM_PACKAGE = "@huggingface/inference@4.13.30"
TEXTS = ["Noon at the usual place?", "WIN a free cruise now!!! " * 300]


@pytest.fixture
def truth(server):
    """The answers of /v1/predict for TEXTS."""
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


def test_huggingface_client(server, truth):
    """Runs in a new process without HF_HUB_OFFLINE. The client connects only to loopback."""
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


def test_huggingface_javascript_client(server, truth, tmp_path):
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
def test_openapi_schema_fuzzing(server, mode):
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


def test_openai_client(server, truth):
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
def test_triton_client(server, truth, binary):
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
        with pytest.raises(tritonclient.utils.InferenceServerException, match="this server has one model, spam"):
            client.infer("ham", [tensor], headers=headers)
        with pytest.raises(tritonclient.utils.InferenceServerException, match="the API key is missing or wrong"):
            client.infer("spam", [tensor])
