"""The Open Inference Protocol v2 of KServe and Triton clients, with the binary extension for requests.

Input tensors are `text` (BYTES, [n]) and, for pairs, `text_pair`. Output tensors are `scores` (FP32, [n, labels]) and
`num_windows` (INT32, [n]). There are also `label` (BYTES) and `score` (FP32) for single-label kinds, `held` (BOOL,
[n, labels]) for multilabel, or `value` (FP32) for regression. An empty label means abstention. Responses are JSON
without binary data. Imports no Ray.

Specification: https://github.com/kserve/open-inference-protocol.
Binary data: https://github.com/triton-inference-server/server.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import DataError
from pipelines.serving.schema import Pair, Prediction
from pipelines.settings import DecisionSettings

HEADER_LENGTH = "inference-header-content-length"
MOST_DIGITS = 18
INPUTS = ("text", "text_pair")


class ShapeError(DataError):
    """A tensor whose shape does not fit its data."""


@dataclass(frozen=True)
class TensorRequest:
    """What a request asks for."""

    request_id: str | None
    inputs: list[str | Pair]
    outputs: tuple[str, ...]
    """Names of the tensors that are wanted. Empty: all."""
    options: tuple[Mapping[str, Any], ...]
    """Parameters of the request and of its tensors."""


def read_tensors(body: bytes, header_length: str | None) -> TensorRequest:
    """Read the texts of a request, its id, and what it asks for.

    Args:
        body: Request body: JSON, then binary tensors if there are any.
        header_length: Value of the HTTP header HEADER_LENGTH, which is the length of the JSON in bytes. None means that
            the whole body is JSON.

    Raises:
        DataError: The body is not a valid request for texts.
        ShapeError: A tensor's shape does not fit its data, or the outputs are not described as the protocol says.
    """
    digits = str(len(body)) if header_length is None else header_length
    if not digits.isdecimal() or len(digits) > MOST_DIGITS or int(digits) > len(body):
        raise DataError(f"{HEADER_LENGTH} must be a number from 0 to {len(body)}, the bytes of the body")
    split = int(digits)
    try:
        request = json.loads(body[:split])
    except (ValueError, RecursionError) as error:
        raise DataError("the body is not valid JSON, or is nested too deeply") from error
    tensors = request.get("inputs") if isinstance(request, dict) else None
    if not isinstance(tensors, list) or not all(isinstance(tensor, dict) for tensor in tensors):
        raise DataError("the body must have `inputs`, a list of tensors")
    columns: dict[str, list[str]] = {}
    rest = body[split:]
    for tensor in tensors:
        name = tensor.get("name")
        if name not in INPUTS or name in columns:
            raise DataError("`inputs` must be `text` and, for pairs, `text_pair`, each once")
        columns[name], rest = _texts(tensor, rest)
        _check_shape(tensor.get("shape"), len(columns[name]))
    if rest:
        raise DataError(f"{len(rest)} unexpected bytes follow the last tensor")
    if "text" not in columns or len({len(column) for column in columns.values()}) != 1:
        raise DataError("`text` is missing, or `text_pair` has a different length")
    found: list[str | Pair] = list(columns["text"])
    if "text_pair" in columns:
        both = zip(columns["text"], columns["text_pair"], strict=True)
        found = [Pair(text=text, text_pair=text_pair) for text, text_pair in both]
    request_id = request.get("id")
    if request_id is not None and not (isinstance(request_id, str) and request_id.isprintable()):
        raise DataError("`id` must be a string without control characters and lone surrogates")
    names = _outputs_of(request)
    options = [part.get("parameters") or {} for part in (request, *tensors, *(request.get("outputs") or []))]
    if not all(isinstance(part, dict) for part in options):
        raise DataError("`parameters` must be an object")
    return TensorRequest(request_id, found, names, tuple(options))


def _outputs_of(request: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the tensors that a request wants."""
    outputs = request.get("outputs")
    if outputs is None:
        return ()
    if not isinstance(outputs, list) or not all(isinstance(item, dict) for item in outputs):
        raise ShapeError("`outputs` must be a list of objects with a `name`")
    for item in outputs:
        parameters = item.get("parameters")
        if isinstance(parameters, dict) and parameters.get("classification"):
            raise ShapeError("the extension `classification` is not supported; ask for `label` and `scores`")
    return tuple(str(item.get("name")) for item in outputs)


def check_outputs(names: Sequence[str], decision: DecisionSettings) -> None:
    """Raise ShapeError if a name is not that of an output tensor."""
    known = [output["name"] for output in described(decision, "")["outputs"]]
    if not set(names) <= set(known):
        raise ShapeError(f"`outputs` names an unknown tensor; this model has {', '.join(known)}")


def answered(
    predictions: Sequence[Prediction], decision: DecisionSettings, model: str, request: TensorRequest
) -> dict[str, Any]:
    """Return the JSON of a response.

    Args:
        predictions: One per input.
        decision: Kind and labels.
        model: Name of the model.
        request: The request. The response has its id and the outputs that it asks for.
    """
    scores = [list(prediction.scores.values()) for prediction in predictions]
    outputs = [_tensor("scores", "FP32", scores)]
    if decision.kind == "regression":
        outputs.append(_tensor("value", "FP32", [prediction.value for prediction in predictions]))
    elif decision.kind == "multilabel":
        held = [[label in (prediction.labels or []) for label in decision.labels] for prediction in predictions]
        outputs.append(_tensor("held", "BOOL", held))
    else:
        outputs.append(_tensor("label", "BYTES", [prediction.label or "" for prediction in predictions]))
        outputs.append(_tensor("score", "FP32", [prediction.score or 0.0 for prediction in predictions]))
    outputs.append(_tensor("num_windows", "INT32", [prediction.num_windows for prediction in predictions]))
    wanted = [output for output in outputs if not request.outputs or output["name"] in request.outputs]
    answer = {"model_name": model, "model_version": "1", "outputs": wanted}
    return answer if request.request_id is None else {"id": request.request_id, **answer}


def described(decision: DecisionSettings, model: str) -> dict[str, Any]:
    """Return the model's metadata: its tensors, and the labels in the order of `scores`."""
    width = max(len(decision.labels), 1)
    of_kind = {"regression": [("value", "FP32", [-1])], "multilabel": [("held", "BOOL", [-1, width])]}
    outputs = [
        ("scores", "FP32", [-1, width]),
        *of_kind.get(decision.kind, [("label", "BYTES", [-1]), ("score", "FP32", [-1])]),
        ("num_windows", "INT32", [-1]),
    ]
    return {
        "name": model,
        "versions": ["1"],
        "platform": "ray_text_classification",
        "inputs": [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in INPUTS],
        "outputs": [{"name": name, "datatype": kind, "shape": shape} for name, kind, shape in outputs],
        "parameters": {"labels": list(decision.labels)},
    }


def _texts(tensor: dict[str, Any], rest: bytes) -> tuple[list[str], bytes]:
    """Return the strings of a tensor, and the binary data that remains.

    The strings are in the tensor's JSON, or at the start of the binary data.
    """
    if tensor.get("datatype") != "BYTES":
        raise DataError("an input tensor must have the datatype BYTES")
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        data = tensor.get("data")
        while isinstance(data, list) and data and all(isinstance(item, list) for item in data):  # nested by its shape
            data = [item for part in data for item in part]
        if not isinstance(data, list) or not all(isinstance(text, str) for text in data):
            raise DataError("a tensor's `data` must be a list of strings, flat or nested by its shape")
        return data, rest
    if not isinstance(size, int) or not 0 <= size <= len(rest):
        raise DataError(f"a tensor's binary_data_size must be a number of bytes, at most the {len(rest)} that remain")
    return _unpacked(rest[:size]), rest[size:]


def _check_shape(shape: Any, size: int) -> None:
    """Raise ShapeError unless a shape is absent, or a list of sizes whose product is the number of strings."""
    if shape is None:
        return
    is_list = isinstance(shape, list) and all(isinstance(part, int) and not isinstance(part, bool) for part in shape)
    if not is_list or not shape or min(shape) < 0 or math.prod(shape) != size:
        raise ShapeError(f"a tensor's `shape` does not fit its {size} strings; a batch of n texts has the shape [n]")


def _unpacked(content: bytes) -> list[str]:
    """Return the strings of a binary tensor. Each follows its length in 4 little-endian bytes."""
    texts, place = [], 0
    while place < len(content):
        if place + 4 > len(content):
            raise DataError("a binary tensor ends inside a length")
        (length,) = struct.unpack_from("<I", content, place)
        place += 4
        if place + length > len(content):
            raise DataError("a binary tensor ends inside a string")
        try:
            texts.append(content[place : place + length].decode())
        except UnicodeDecodeError as error:
            raise DataError("a string is not valid UTF-8") from error
        place += length
    return texts


def _tensor(name: str, datatype: str, rows: Sequence[Any]) -> dict[str, Any]:
    is_matrix = bool(rows) and isinstance(rows[0], list)
    shape = [len(rows), len(rows[0])] if is_matrix else [len(rows)]
    data = [value for row in rows for value in row] if is_matrix else list(rows)
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}
