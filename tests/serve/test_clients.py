"""Clients of other servers, unchanged, over a real socket; and what their protocols say where they differ."""

import json
import os
import subprocess
import sys

import httpx
import openai
import pytest

from pipelines.errors import DataError
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
from tests.serve.test_server import KEYS, predict, server  # noqa: F401 (a fixture)

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


def test_openais_client(server, truth):  # noqa: F811
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEYS[0], max_retries=0)
    for given in (TEXTS, [{"type": "text", "text": text} for text in TEXTS]):
        answer = client.moderations.create(input=given, model="spam")
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
    def read(**body):
        return texts_of_inference(InferenceRequest(**body))

    assert read(inputs="a") == (["a"], False)
    assert read(inputs=["a"], parameters={}) == (["a"], True)
    assert read(inputs=["a", "b"], parameters={}) == (["a", "b"], True)
    assert read(inputs=[["a"], ["b", "c"]]) == (["a", Pair(text="b", text_pair="c")], True)
    with pytest.raises(DataError, match="may be a pair or a batch"):
        read(inputs=["a", "b"])
    assert texts_of_moderation(ModerationRequest(input="a")) == ["a"]
