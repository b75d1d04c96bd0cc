"""Request and response formats of other servers: text-embeddings-inference, Hugging Face, vLLM, OpenAI moderation.

The functions convert request bodies to texts, and predictions to response bodies. Like those servers, they ignore
unknown fields, but not options that change the scores: these are honoured or refused. Imports no Ray.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipelines.errors import DataError
from pipelines.serving.schema import Pair, Prediction, Usage
from pipelines.settings import Kind

FUNCTIONS: dict[Kind, str] = {
    "binary": "softmax", "multiclass": "softmax", "multilabel": "sigmoid", "regression": "none",
}  # fmt: skip
"""Hugging Face's names of the functions that make scores of logits, by kind."""
FOR_LOGITS = {"raw_scores": True, "activation": False, "use_activation": False, "softmax": False}
"""Options of other servers and their values that ask for logits."""


class ForeignRequest(BaseModel):
    """A body of another server's protocol. Unknown fields are kept, so that options can be found among them."""

    model_config = ConfigDict(extra="allow")

    def options(self) -> dict[str, Any]:
        """Return the fields that are not declared, and those in Hugging Face's `options`."""
        found = dict(self.model_extra or {})
        inner = found.get("options")
        return {**inner, **found} if isinstance(inner, dict) else found


class InferenceRequest(ForeignRequest):
    """text-embeddings-inference's /predict. With `parameters`: Hugging Face's text classification."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": "Noon at the usual place."}]})

    inputs: str | Pair | list[str] | list[Pair] | list[list[str]]
    parameters: dict[str, Any] | None = None


class Instance(ForeignRequest):
    """An input of Vertex AI as text-embeddings-inference takes it."""

    inputs: str | Pair | list[str] | list[list[str]]


class InstancesRequest(ForeignRequest):
    """The request of Vertex AI, and of version 1 of KServe's protocol."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"instances": ["Noon at the usual place."]}]})

    instances: list[str | Pair | Instance]
    parameters: dict[str, Any] | None = None


class ClassifyRequest(ForeignRequest):
    """vLLM's and Infinity's /classify."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": ["Noon at the usual place."]}]})

    input: str | list[str]
    model: str | None = None
    parameters: dict[str, Any] | None = None


class TextPart(BaseModel):
    """One item of an OpenAI input. Images have no text and are rejected."""

    type: str
    text: str | None = None


class ModerationRequest(ForeignRequest):
    """OpenAI's /v1/moderations."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": "Noon at the usual place."}]})

    input: str | list[str] | list[TextPart]
    model: str | None = None
    parameters: dict[str, Any] | None = None


def labels_wanted(kind: Kind, *levels: Mapping[str, Any] | None) -> int | None:
    """Return the number of labels that a request asks for. None means all.

    Args:
        kind: Kind of the model.
        levels: The options of a request, wherever they may stand: in the body, in its `parameters`, in its inputs.

    Raises:
        DataError: An option cannot be honoured: it asks for logits, for another function than that of the model's kind,
            for other labels, or top_k is no number of labels.
    """
    found: int | None = None
    for options in levels:
        for name, value in (options or {}).items():
            if name in FOR_LOGITS and value is not None and value != (not FOR_LOGITS[name]):
                asked = str(FOR_LOGITS[name]).lower()
                raise DataError(
                    f"{name}={asked} is not supported: a document's scores are merged probabilities of its windows"
                )
            if name == "function_to_apply" and value not in (None, "default", FUNCTIONS[kind]):
                raise DataError(f"function_to_apply must be {FUNCTIONS[kind]} for this model, which is of kind {kind}")
            if name in ("candidate_labels", "hypothesis_template") and value is not None:
                raise DataError(f"{name} is for zero-shot models; this one was trained on its own labels: see /info")
            if name == "return_all_scores" and value is False:  # Hugging Face's older name for top_k=1
                found = 1
            if name == "top_k" and value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise DataError("top_k is a number of labels, at least 1")
                found = value if found is None else min(found, value)
    return found


def texts_of_inference(body: InferenceRequest, *, reads_pairs: bool | None = None) -> tuple[list[str | Pair], bool]:
    """Return the texts of a request, and whether they are a batch.

    "x" and ["x"] are one text, [["a"], ["b"]] are two texts, and [["a", "b"]] is one pair. ["a", "b"] is one pair if
    the model reads pairs. Otherwise, two or more bare strings are ambiguous: some servers read them as a pair, others
    as a batch. With `parameters`, bare strings are always a batch, as Hugging Face's client sends them.

    Args:
        body: The request body.
        reads_pairs: Whether the model was trained on pairs. None means unknown.

    Raises:
        DataError: Bare strings are ambiguous, or an input has more than two texts.
    """
    return _texts_of(body.inputs, reads_pairs=reads_pairs, is_batch=body.parameters is not None)


def _texts_of(
    inputs: str | Pair | list[str] | list[Pair] | list[list[str]], *, reads_pairs: bool | None, is_batch: bool
) -> tuple[list[str | Pair], bool]:
    if isinstance(inputs, str | Pair):
        return [inputs], False
    bare = [item for item in inputs if isinstance(item, str)]
    if is_batch and bare:  # from Hugging Face's client, a list is a batch
        return list(bare), True
    if reads_pairs and len(bare) == len(inputs) == 2:
        return [_text_or_pair(bare)], False
    if len(bare) > 1:
        raise DataError(
            'bare strings may be a pair or a batch: send [["a"], ["b"]] for two texts, [["a", "b"]] for a pair'
        )
    if bare:
        return list(bare), False
    return [
        item if isinstance(item, Pair) else _text_or_pair(item) for item in inputs if not isinstance(item, str)
    ], True


def texts_of_instances(body: InstancesRequest, *, reads_pairs: bool | None = None) -> list[str | Pair]:
    """Return the texts of a request, one for each instance.

    Raises:
        DataError: An instance has several texts, or more than a pair.
    """
    found: list[str | Pair] = []
    for item in body.instances:
        if isinstance(item, Instance):
            texts, _ = _texts_of(item.inputs, reads_pairs=reads_pairs, is_batch=False)
            if len(texts) != 1:
                raise DataError(f"an instance has {len(texts)} inputs; send one text or pair in each instance")
            found += texts
        else:
            found.append(item)
    return found


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
