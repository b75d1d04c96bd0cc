"""Only what the first token needs is computed: the same logits, and nothing is cut off that is used."""

import importlib

import numpy as np
import pytest

from pipelines.model.first_token import keep_first_token
from pipelines.model.openvino_model import core

openvino = pytest.importorskip("openvino", reason="in the openvino extra")
ops = importlib.import_module("openvino.opset13")
HIDDEN = 8
RNG = np.random.default_rng(0)


def weights(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def hidden():
    return ops.parameter([-1, -1, HIDDEN], np.float32, name="hidden")


def first_of(node, axis=1):
    return ops.gather(node, np.int64(0), np.int64(axis))


def by_token(node):
    """The feed-forward part of a layer."""
    inner = ops.gelu(ops.matmul(node, weights(HIDDEN, 16), False, False), "erf")
    outer = ops.add(ops.matmul(inner, weights(16, HIDDEN), False, False), node)
    return ops.mvn(outer, np.array([-1]), True, 1e-6, "inside_sqrt")


def attention(node, mask=None, *, causal=False):
    """Two heads."""

    def heads(own):
        return ops.transpose(ops.reshape(own, np.array([0, 0, 2, 4]), True), np.array([0, 2, 1, 3]))

    parts = [heads(ops.matmul(node, weights(HIDDEN, HIDDEN), False, False)) for _ in range(3)]
    found = ops.scaled_dot_product_attention(*parts, *([] if mask is None else [mask]), causal=causal)
    return ops.reshape(ops.transpose(found, np.array([0, 2, 1, 3])), np.array([0, 0, HIDDEN]), True)


def written_out(node):
    """The same with matrix products and a softmax, and a bias for each pair of positions."""
    query, key, value = (ops.matmul(node, weights(HIDDEN, HIDDEN), False, False) for _ in range(3))
    logits = ops.matmul(query, key, False, True)
    bias = ops.matmul(node, ops.multiply(node, np.float32(0.1)), False, True)
    return ops.matmul(ops.softmax(ops.add(logits, bias), -1), value, False, False)


def halves(node):
    """A gated unit."""
    gate, value = ops.split(node, np.int64(2), 2).outputs()
    return ops.multiply(ops.sigmoid(gate), value)


def pair(node):
    return ops.reduce_sum(node, np.array([1]), True)


def over_all(node):
    return ops.mvn(node, np.array([1, 2]), True, 1e-6, "inside_sqrt")


def times_vector(node):
    """A product with a vector has one axis less."""
    return ops.matmul(by_token(node), weights(HIDDEN), False, False)


def mean_and_first(node):
    return ops.concat([ops.reduce_mean(node, np.array([1])), first_of(node)], 1)


CASES = {
    "feed-forward": (lambda node: first_of(by_token(node)), 1),
    "layer": (lambda node: first_of(by_token(attention(node))), 1),
    "two layers": (lambda node: first_of(by_token(attention(by_token(attention(node))))), 1),
    "written out": (lambda node: first_of(by_token(written_out(node))), 1),
    "gated": (lambda node: first_of(halves(by_token(node))), 1),
    "causal": (lambda node: first_of(by_token(attention(node, causal=True))), 1),
    "sum over all tokens": (lambda node: first_of(ops.add(node, pair(by_token(node)))), 1),
    "norm over all tokens": (lambda node: first_of(over_all(by_token(node))), 1),
    "softmax over tokens": (lambda node: first_of(ops.softmax(by_token(node), 1)), 1),
    "first row of the batch": (lambda node: first_of(by_token(node), axis=0), 1),
    "first of the hidden": (lambda node: first_of(by_token(node), axis=2), 1),
    "another token": (lambda node: ops.gather(by_token(node), np.int64(1), np.int64(1)), 0),
    "product with a vector": (lambda node: first_of(times_vector(node)), 1),
    "first row of a product with a vector": (lambda node: first_of(times_vector(node), axis=0), 1),
    "mean and first": (lambda node: mean_and_first(by_token(node)), 1),
    "nothing to cut": (lambda node: ops.reduce_mean(by_token(node), np.array([1])), 0),
    "other shape": (lambda node: first_of(ops.reshape(by_token(node), np.array([0, -1, 4]), True)), 1),
}  # fmt: skip


def outputs(model, batches):
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [compiled(batch)[0].copy() for batch in batches]


@pytest.mark.parametrize("case", CASES)
def test_result_is_the_same(case):
    build, cuts = CASES[case]
    node = hidden()
    model = openvino.Model([build(node)], [node], case)
    batches = [weights(3, 5, HIDDEN), weights(1, 1, HIDDEN), weights(2, 17, HIDDEN)]
    if case == "another token":
        batches = [batch for batch in batches if batch.shape[1] > 1]
    expected = outputs(model.clone(), batches)
    assert keep_first_token(model) == cuts
    for found, wanted in zip(outputs(model, batches), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert keep_first_token(model) in (0, cuts), "a second time changes nothing"


def test_work_for_the_other_tokens_is_gone():
    node = hidden()
    model = openvino.Model([first_of(by_token(attention(by_token(attention(node)))))], [node], "two layers")
    keep_first_token(model)
    whole = [each for each in model.get_ordered_ops() if each.get_type_name() == "MatMul"]
    is_first = [each.get_output_partial_shape(0)[1].get_max_length() == 1 for each in whole]
    assert is_first.count(True) == 3, "the query and the feed-forward part of the last layer"
    assert is_first.count(False) == 3 + 2 + 2, "all of the first layer, and keys and values of the last one"
