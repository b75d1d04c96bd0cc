"""Request and response formats of other servers: text-embeddings-inference, Hugging Face, vLLM, OpenAI moderation.

The functions convert request bodies to texts, and predictions to response bodies. Like those servers, they ignore
unknown fields. Imports no Ray.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipelines.errors import DataError
from pipelines.serving.schema import Pair, Prediction, Usage
from pipelines.settings import Kind

FUNCTIONS: dict[Kind, str] = {
    "binary": "softmax", "multiclass": "softmax", "multilabel": "sigmoid", "regression": "none",
}  # fmt: skip
"""Hugging Face's names of the functions that make scores of logits, by kind."""


class InferenceRequest(BaseModel):
    """text-embeddings-inference's /predict. With `parameters`: Hugging Face's text classification."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": "Noon at the usual place."}]})

    inputs: str | list[str] | list[list[str]]
    raw_scores: bool = False
    parameters: dict[str, Any] | None = None


class Instance(BaseModel):
    """An input of Vertex AI as text-embeddings-inference takes it."""

    inputs: str


class InstancesRequest(BaseModel):
    """The request of Vertex AI, and of version 1 of KServe's protocol."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"instances": ["Noon at the usual place."]}]})

    instances: list[str | Pair | Instance]
    parameters: dict[str, Any] | None = None


class ClassifyRequest(BaseModel):
    """vLLM's /classify."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": ["Noon at the usual place."]}]})

    input: str | list[str]
    model: str | None = None
    activation: bool | None = None
    use_activation: bool | None = None


class TextPart(BaseModel):
    """One item of an OpenAI input. Images have no text and are rejected."""

    type: str
    text: str | None = None


class ModerationRequest(BaseModel):
    """OpenAI's /v1/moderations."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": "Noon at the usual place."}]})

    input: str | list[str] | list[TextPart]
    model: str | None = None


def texts_of_inference(body: InferenceRequest, *, reads_pairs: bool | None = None) -> tuple[list[str | Pair], bool]:
    """Return the texts of a request, and whether they are a batch.

    "x" and ["x"] are one text, [["a"], ["b"]] are two texts, and [["a", "b"]] is one pair. ["a", "b"] is one pair if
    the model reads pairs. Otherwise, two or more bare strings are ambiguous: some servers read them as a pair, others
    as a batch. With `parameters`, bare strings are always a batch, as Hugging Face's client sends them.

    Args:
        body: The request body.
        reads_pairs: Whether the model was trained on pairs. None means unknown.

    Raises:
        DataError: raw_scores is set, bare strings are ambiguous, or an input has more than two texts.
    """
    if body.raw_scores:
        raise DataError("raw_scores=true is not supported: a document's scores are merged probabilities of its windows")
    if isinstance(body.inputs, str):
        return [body.inputs], False
    bare = [item for item in body.inputs if isinstance(item, str)]
    if body.parameters is not None and bare:  # from Hugging Face's client, a list is a batch
        return list(bare), True
    if reads_pairs and len(bare) == len(body.inputs) == 2:
        return [_text_or_pair(bare)], False
    if len(bare) > 1:
        raise DataError(
            'bare strings may be a pair or a batch: send [["a"], ["b"]] for two texts, [["a", "b"]] for a pair'
        )
    if bare:
        return list(bare), False
    return [_text_or_pair(item) for item in body.inputs if not isinstance(item, str)], True


def texts_of_instances(body: InstancesRequest) -> list[str | Pair]:
    """Return the texts of a request."""
    return [item.inputs if isinstance(item, Instance) else item for item in body.instances]


def check_activation(body: ClassifyRequest) -> None:
    """Raise DataError if a request asks for logits."""
    if body.activation is False or body.use_activation is False:
        raise DataError(
            "activation=false is not supported: a document's scores are merged probabilities of its windows"
        )


def labels_wanted(parameters: dict[str, Any] | None, kind: Kind) -> int | None:
    """Return the number of labels that Hugging Face's parameters ask for. None means all.

    Raises:
        DataError: top_k is no number of labels, or function_to_apply is not the function of the model's kind.
    """
    parameters = parameters or {}
    top_k, function = parameters.get("top_k"), parameters.get("function_to_apply")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        raise DataError("top_k is a number of labels, at least 1")
    if function not in (None, "default", FUNCTIONS[kind]):
        raise DataError(f"function_to_apply must be {FUNCTIONS[kind]} for this model, which is of kind {kind}")
    return top_k


def texts_of_moderation(body: ModerationRequest) -> list[str | Pair]:
    """Return the texts of a request.

    Raises:
        DataError: An item is not a text.
    """
    if isinstance(body.input, str):
        return [body.input]
    texts: list[str | Pair] = []
    for part in body.input:
        if isinstance(part, TextPart) and part.text is None:
            raise DataError("an input has no text; send only inputs with a text")
        texts.append(part if isinstance(part, str) else str(part.text))
    return texts


def ranked(prediction: Prediction, *, top_k: int | None = None) -> list[dict[str, Any]]:
    """Return labels with their scores: first the predicted labels, then the others, each by descending score.

    Args:
        prediction: Prediction for one input.
        top_k: Maximum number of labels. None means all labels.
    """
    decided = {prediction.label, *(prediction.labels or [])}
    order = sorted(prediction.scores.items(), key=lambda item: (item[0] not in decided, -item[1]))
    return [{"label": label, "score": score} for label, score in order[:top_k]]


def classified(predictions: Sequence[Prediction], usage: Usage, model: str) -> dict[str, Any]:
    """Return the response of vLLM's /classify.

    For multilabel, `label` is the predicted label with the highest score, or null if none is predicted.
    """
    data = []
    for index, prediction in enumerate(predictions):
        probabilities = list(prediction.scores.values())
        held = prediction.labels or []
        label = max(held, key=prediction.scores.__getitem__) if held else prediction.label
        data.append({"index": index, "label": label, "probs": probabilities, "num_classes": len(probabilities)})
    counts = {"prompt_tokens": usage.num_tokens, "total_tokens": usage.num_tokens, "completion_tokens": 0}
    head = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model}
    return {**head, "data": data, "usage": counts}


def moderated(predictions: Sequence[Prediction], labels: Sequence[str], kind: str, model: str) -> dict[str, Any]:
    """Return the response of OpenAI's /v1/moderations.

    Each label is a category; for kind binary, only the positive label is one. An input is flagged if any category
    applies.
    """
    names = labels[1:] if kind == "binary" else labels
    results = []
    for prediction in predictions:
        decided = {prediction.label, *(prediction.labels or [])}
        categories = {name: name in decided for name in names}
        scores = {name: prediction.scores[name] for name in names}
        results.append({"flagged": any(categories.values()), "categories": categories, "category_scores": scores})
    return {"id": f"modr-{uuid.uuid4().hex}", "model": model, "results": results}


def _text_or_pair(item: list[str]) -> str | Pair:
    if len(item) not in (1, 2):
        raise DataError(f"an input has {len(item)} texts; a text is [text], a pair [text, text_pair]")
    return item[0] if len(item) == 1 else Pair(text=item[0], text_pair=item[1])
