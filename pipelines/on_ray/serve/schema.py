"""What goes over the wire: request and response bodies of the server's own routes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1)]


class Pair(BaseModel):
    """A text, or a pair of texts that the model reads together."""

    model_config = ConfigDict(extra="forbid")

    text: str
    text_pair: str | None = None


class PredictRequest(BaseModel):
    """Texts to classify; the thresholds of this request replace the model folder's."""

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
    windows: bool = False


class WindowEvidence(BaseModel):
    """One window: code points [start, end) of the text (of a pair's second text), and its scores."""

    start: int
    end: int
    scores: dict[str, float]


class Prediction(BaseModel):
    """The answer for one input; `label` for one label, `labels` for many, `value` for regression."""

    label: str | None = None
    labels: list[str] | None = None
    value: float | None = None
    score: float | None = None
    scores: dict[str, float]
    thresholds: dict[str, float] = {}
    num_tokens: int
    num_windows: int
    truncated: bool
    windows: list[WindowEvidence] | None = None


class Usage(BaseModel):
    """What the request cost."""

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
    """Every answer that is no result."""

    error: str
    error_type: str


def without_none(response: BaseModel) -> dict[str, Any]:
    """As JSON content: fields of other kinds left out, but a label that is null (abstention) kept."""
    content = response.model_dump()
    for prediction in content.get("predictions", []):
        unused = [name for name in ("labels", "value", "windows") if prediction[name] is None]
        if prediction["labels"] is not None or prediction["value"] is not None:
            unused += ["label", "score"]
        for name in unused:
            del prediction[name]
    return content
