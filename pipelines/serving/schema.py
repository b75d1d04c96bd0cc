"""Request and response bodies of the server's own routes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1, strict=True)]


class Pair(BaseModel):
    """A text, or a pair of texts that the model reads together."""

    model_config = ConfigDict(extra="forbid")

    text: str
    text_pair: str | None = None


class PredictRequest(BaseModel):
    """Texts to classify. The thresholds of the request replace those of the model folder."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"inputs": ["Subject: lunch?\n\nNoon at the usual place."]},
                {"inputs": [{"text": "first", "text_pair": "second"}], "thresholds": 0.7, "windows": False},
            ]
        },
    )

    inputs: list[str | Pair] = Field(min_length=1)
    thresholds: Probability | list[Probability] | dict[str, Probability] | None = None
    windows: Annotated[bool, Field(strict=True)] = False


class WindowEvidence(BaseModel):
    """One window: its code points [start, end) in the text (in the second text of a pair), and its scores."""

    start: int
    end: int
    scores: dict[str, float]


class Prediction(BaseModel):
    """The result for one input: `label` for single-label kinds, `labels` for multilabel, `value` for regression."""

    label: str | None = None
    labels: list[str] | None = None
    value: float | None = None
    score: float | None = None
    scores: dict[str, float]
    thresholds: dict[str, float] = {}
    num_tokens: int
    num_windows: int
    windows_read: int | None = None
    truncated: bool
    windows: list[WindowEvidence] | None = None


class Usage(BaseModel):
    """Number of tokens and windows of the request."""

    num_tokens: int
    num_windows: int


class PredictResponse(BaseModel):
    """Predictions in the order of the inputs."""

    model_config = ConfigDict(protected_namespaces=())

    model: str
    model_hash: str
    labels: list[str]
    predictions: list[Prediction]
    usage: Usage


class ErrorResponse(BaseModel):
    """The body of every error response."""

    error: str
    error_type: str


def without_none(response: BaseModel) -> dict[str, Any]:
    """Return the response as JSON content, without the fields of other kinds.

    A label that is null is kept where the kind has a single label: it means abstention.
    """
    content = response.model_dump()
    for prediction in content.get("predictions", []):
        unused = [name for name in ("labels", "value", "windows", "windows_read") if prediction[name] is None]
        if prediction["labels"] is not None or prediction["value"] is not None:
            unused += ["label", "score"]
        for name in unused:
            del prediction[name]
    return content
