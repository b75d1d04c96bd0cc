"""Request and response bodies of other servers' protocols, without HTTP."""

import contextlib
import json
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.errors import DataError
from pipelines.serving.inference_protocol import TensorRequest, answered, read_tensors
from pipelines.serving.protocols import (
    InferenceRequest,
    ModerationRequest,
    classified,
    moderated,
    ranked,
    texts_of_inference,
    texts_of_moderation,
)
from pipelines.serving.schema import Pair, Prediction, Usage
from pipelines.settings import DecisionSettings

ASKED = TensorRequest(None, [], (), ())


@given(st.binary(max_size=200), st.one_of(st.none(), st.text(max_size=5), st.integers(0, 250).map(str)))
@example(b'{"inputs":[{"name":"text","datatype":"BYTES","parameters":{"binary_data_size":4}}]}\xff\xff\xff\xff', "83")
@example(b'{"inputs":[{"name":["text"],"datatype":"BYTES"}]}', None)
@example(b'{"inputs":[{"name":"text","datatype":"BYTES","parameters":{"binary_data_size":true}}]}x', "83")
@example(b"[" * 200_000, None)
@example(b"{}", "9" * 5000)
def test_malformed_tensors_raise_data_error(body, header_length):
    with contextlib.suppress(DataError):
        read_tensors(body, header_length)


def test_tensors_of_every_kind():
    many = Prediction(labels=["b"], scores={"a": 0.1, "b": 0.9}, num_tokens=1, num_windows=2, truncated=False)
    decision = DecisionSettings(kind="multilabel", labels=("a", "b"))
    outputs = {output["name"]: output for output in answered([many, many], decision, "m", ASKED)["outputs"]}
    assert outputs["held"] == {"name": "held", "datatype": "BOOL", "shape": [2, 2], "data": [False, True] * 2}
    value = Prediction(value=2.5, scores={"value": 2.5}, num_tokens=1, num_windows=1, truncated=False)
    answer = answered([value], DecisionSettings(kind="regression"), "m", replace(ASKED, request_id="7"))
    assert answer["id"] == "7"
    assert {"name": "value", "datatype": "FP32", "shape": [1], "data": [2.5]} in answer["outputs"]
    pairs = {
        "inputs": [{"name": name, "datatype": "BYTES", "shape": [1], "data": [name]} for name in ("text", "text_pair")]
    }
    assert read_tensors(json.dumps(pairs).encode(), None).inputs == [Pair(text="text", text_pair="text_pair")]


def prediction(**more):
    return Prediction(scores={"a": 0.2, "b": 0.7, "c": 0.6}, num_tokens=3, num_windows=1, truncated=False, **more)


def test_several_labels():
    several = prediction(labels=["a", "c"])
    assert [item["label"] for item in ranked(several)] == ["c", "a", "b"], "predicted labels come before the others"
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


@pytest.mark.parametrize("request_id", ["\ud800", float("nan"), float("inf"), 7, [], {"a": 1}, True, "a\nb", "\x00"])
def test_ids_that_cannot_be_repeated_are_refused(request_id):
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}
    body = json.dumps({"id": request_id, "inputs": [tensor]}).encode()
    with pytest.raises(DataError, match="`id` must be a string"):
        read_tensors(body, None)
    for right in ("x-1", "", "ü 😀", None):
        assert read_tensors(json.dumps({"id": right, "inputs": [tensor]}).encode(), None).request_id == right
