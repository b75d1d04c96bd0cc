"""Answers to requests that fail: always the same JSON, with nothing of the request in it. Imports no Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from pipelines.serving.predictor import RequestError
from pipelines.serving.protocols import ClassifyRequest, InferenceRequest, InstancesRequest, ModerationRequest
from pipelines.serving.schema import ErrorResponse, Pair, PredictRequest

BODIES = (PredictRequest, Pair, InferenceRequest, InstancesRequest, ClassifyRequest, ModerationRequest)
FIELDS = {"body", *(name for model in BODIES for name in model.model_fields)}
"""Names of fields in messages."""
PAIR = '{"text": "...", "text_pair": "..."}'
FORMS: dict[tuple[type | None, str], str] = {
    (PredictRequest, "inputs"): f"must be a list of texts, or of pairs {PAIR}",
    (PredictRequest, "thresholds"): "must be a number from 0 to 1, a list with one for each label, or an object with "
    "numbers by label",
    (InferenceRequest, "inputs"): f'must be a text, a pair {PAIR}, or a list: [["a"], ["b"]] are two texts, '
    f'[["a", "b"]] is one pair',
    (InstancesRequest, "instances"): f'must be a list of texts, of pairs {PAIR}, or of {{"inputs": "..."}}',
    (ClassifyRequest, "input"): "must be a text or a list of texts",
    (ModerationRequest, "input"): 'must be a text, a list of texts, or a list of {"type": "text", "text": "..."}',
}
"""What fields take that may have several forms."""
ROUTES = {"inputs": "/predict or /v1/predict", "instances": "/vertex", "input": "/classify or /v1/moderations"}
"""Where a body with this field belongs."""
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def add_error_handlers(api: FastAPI) -> None:
    """Answer all errors of an application in the same form."""
    api.add_exception_handler(RequestError, _answer_request_error)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.add_exception_handler(RequestValidationError, _answer_validation_error)
    api.add_exception_handler(Exception, _answer_exception)


def error_answer(status: int, error_type: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an answer with an error."""
    content = ErrorResponse(error=message, error_type=error_type).model_dump()
    return JSONResponse(content, status_code=status, headers=dict(headers or {}))


async def _answer_request_error(_: Request, error: Exception) -> Response:
    """Answer a RequestError. For an overload, the header Retry-After tells the client when to try again."""
    assert isinstance(error, RequestError)
    headers = {"Retry-After": str(math.ceil(max(1.0, error.retry_after)))} if error.status == 429 else None
    return error_answer(error.status, error.error_type, str(error), headers)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Answer an unknown route or method. FastAPI raises status 400 for a body that is not JSON."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400:
        return error_answer(422, "validation", "the body is not JSON in UTF-8")
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods_of(request)))
    return error_answer(error.status_code, "route", f"{error.detail}; the routes are at /docs", headers)


async def _answer_exception(_: Request, error: Exception) -> Response:
    """Answer an error of ours. The traceback is logged by the server."""
    return error_answer(500, "internal", f"{type(error).__name__} in the server; its log has the details")


def _methods_of(request: Request) -> set[str]:
    """Return the methods with which a path is answered."""
    routes = request.app.router.routes
    found = {
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] == Match.FULL for route in routes)
    }
    return found | {"HEAD"} if "GET" in found else found


def _body_of(request: Request) -> type | None:
    """Return the class of the body of a request."""
    endpoint = request.scope.get("endpoint")
    found = None if endpoint is None else get_type_hints(endpoint).get("body")
    return found if isinstance(found, type) else None


async def _answer_validation_error(request: Request, error: Exception) -> Response:
    """Answer a body that does not fit the schema. The message contains nothing of it, not even its field names."""
    assert isinstance(error, RequestValidationError)
    problems = list(dict.fromkeys(_problems(error, _body_of(request))))
    return error_answer(422, "validation", "; ".join(problems[:3]))


def _problems(error: RequestValidationError, model: type | None) -> Iterator[str]:
    fields = ", ".join(getattr(model, "model_fields", {}))
    for item in error.errors():
        where, kind = item["loc"], item["type"]
        form = FORMS.get((model, str(where[1]))) if len(where) > 1 else None
        if kind == "missing" and len(where) == 2 and fields:
            yield f"body.{where[1]}: Field required; the body takes {fields}{_elsewhere(error.body, fields)}"
        elif kind == "extra_forbidden" and form is None:
            yield f"body: a field that is not known here; the body takes {fields}"
        elif form is not None and kind != "too_short":
            index = next((f".{part}" for part in where[2:] if isinstance(part, int)), "")
            yield f"body.{where[1]}{index}: {form}"
        else:
            place = ".".join(str(part) for part in where if isinstance(part, int) or part in FIELDS)
            yield f"{place}: {item['msg']}"


def _elsewhere(body: Any, fields: str) -> str:
    """Return where a body belongs that has the main field of another protocol."""
    other = [
        ROUTES[name] for name in ROUTES if isinstance(body, dict) and name in body and name not in fields.split(", ")
    ]
    return f"; a body like this one goes to {other[0]}" if other else ""
