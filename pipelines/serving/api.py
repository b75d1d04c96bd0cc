"""The HTTP application: one group of routes for each protocol, all of them answered by one `Predictor`.

The bodies of other servers' protocols are in protocols.py. Every path needs a key, except for those of `auth.is_open`.

Imports no Ray. Ray Serve runs the application in every replica, and the tests call it directly.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import Any, get_type_hints

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware

from pipelines.errors import DataError
from pipelines.serving.inference_protocol import HEADER_LENGTH, ShapeError, answered, described, texts_of_tensors
from pipelines.serving.middleware import TIMEOUT_HEADER, Guard
from pipelines.serving.predictor import Predictor, RequestError
from pipelines.serving.protocols import (
    ClassifyRequest,
    InferenceRequest,
    InstancesRequest,
    ModerationRequest,
    check_activation,
    classified,
    labels_wanted,
    moderated,
    ranked,
    texts_of_inference,
    texts_of_instances,
    texts_of_moderation,
)
from pipelines.serving.reference import reference_page
from pipelines.serving.schema import ErrorResponse, Pair, PredictRequest, PredictResponse, without_none
from pipelines.version import VERSION

VERSION_OF_MODEL = "1"
FEWEST_COMPRESSED = 1024
"""Bytes of an answer from which on it is compressed, for clients that accept gzip."""
ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorResponse, "description": "The API key is missing or wrong."},
    404: {"model": ErrorResponse, "description": "This server has one model, and it has another name."},
    408: {"model": ErrorResponse, "description": "The body did not arrive in time."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    415: {"model": ErrorResponse, "description": "The body is not JSON, or compressed in another way than gzip."},
    422: {"model": ErrorResponse, "description": "The request does not fit the schema or a limit."},
    424: {"model": ErrorResponse, "description": "The model failed on this batch."},
    429: {"model": ErrorResponse, "description": "Too many tokens wait; see Retry-After."},
    503: {"model": ErrorResponse, "description": "Too many requests at once; see Retry-After."},
    504: {"model": ErrorResponse, "description": "The request took too long."},
}
FIELDS = {
    "body",
    *(
        name
        for model in (PredictRequest, Pair, InferenceRequest, InstancesRequest, ClassifyRequest, ModerationRequest)
        for name in model.model_fields
    ),
}
"""Names of fields in messages."""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def build_api(predictor: Predictor, *, replica: str = "local") -> FastAPI:
    """Build the HTTP application of a predictor.

    Args:
        predictor: The model with its queue.
        replica: Name of this process, which /info returns.
    """
    api = FastAPI(title="pipelines", version=VERSION, docs_url=None, redoc_url=None)
    api.add_middleware(GZipMiddleware, minimum_size=FEWEST_COMPRESSED, compresslevel=5)
    api.add_middleware(
        Guard,
        api_keys=predictor.settings.api_keys,
        max_body_bytes=predictor.settings.max_body_bytes,
        body_timeout_s=predictor.settings.body_timeout_s,
        request_timeout_s=predictor.settings.request_timeout_s,
        metrics=predictor.metrics,
    )
    if predictor.settings.cors_allow_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=predictor.settings.cors_allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key", TIMEOUT_HEADER],
        )
    api.add_exception_handler(RequestError, _answer_request_error)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.add_exception_handler(RequestValidationError, _answer_validation_error)
    for routes in (_own_routes, _hub_routes, _classify_routes, _inference_protocol_routes):
        api.include_router(routes(predictor))
    api.include_router(_operating_routes(predictor, replica))
    page = reference_page(api.openapi())

    @api.get("/docs", include_in_schema=False)
    async def show_reference() -> Response:
        """The routes of this server."""
        return Response(page, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    return api


def _own_routes(predictor: Predictor) -> APIRouter:
    """Routes of the server's own protocol, and a web page to try it."""
    routes = APIRouter()
    page = resources.files("pipelines").joinpath("serving/page.html").read_bytes()

    @routes.get("/", include_in_schema=False)
    async def show_page() -> Response:
        """A web page to try the model."""
        return Response(page, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    @routes.post("/v1/predict", response_model=PredictResponse, responses=ERRORS)
    async def predict(body: PredictRequest) -> Response:
        """Classify texts of any length: scores, labels, and on request the scores of each window."""
        decision = predictor.decision_with(body.thresholds)
        predictions, usage = await predictor.predict(body.inputs, decision, with_windows=body.windows)
        response = PredictResponse(
            model=predictor.name,
            model_hash=predictor.folder.weights_hash,
            labels=list(decision.labels),
            predictions=predictions,
            usage=usage,
        )
        return JSONResponse(without_none(response))

    return routes


def _hub_routes(predictor: Predictor) -> APIRouter:
    """Routes of text-embeddings-inference and Hugging Face."""
    routes = APIRouter()

    async def infer(body: InferenceRequest, *, is_nested: bool) -> Response:
        inputs, is_batch = _read(partial(texts_of_inference, reads_pairs=predictor.folder.reads_pairs), body)
        top_k = _read(partial(labels_wanted, kind=predictor.decision.kind), body.parameters)
        predictions, _ = await predictor.predict(inputs)
        answers = [ranked(prediction, top_k=top_k) for prediction in predictions]
        return JSONResponse(answers if is_batch or is_nested else answers[0])

    @routes.post("/", include_in_schema=False)
    @routes.post("/invocations", include_in_schema=False)
    @routes.post("/predict", responses=ERRORS)
    async def predict_as_inference(body: InferenceRequest) -> Response:
        """text-embeddings-inference's route: labels with scores, predicted labels first. Nested for a batch.

        The same at / (Hugging Face's endpoints) and /invocations (SageMaker).
        """
        return await infer(body, is_nested=body.parameters is not None)

    @routes.post("/models/{name:path}", responses=ERRORS)
    async def predict_as_hub(name: str, body: InferenceRequest) -> Response:
        """Hugging Face's route. The answer is always nested."""
        _check_name(predictor, name)
        return await infer(body.model_copy(update={"parameters": body.parameters or {}}), is_nested=True)

    @routes.post("/vertex", responses=ERRORS)
    @routes.post("/v1/models/{name}:predict", include_in_schema=False)
    async def predict_instances(body: InstancesRequest, name: str | None = None) -> Response:
        """Vertex AI's route, and that of version 1 of KServe's protocol: labels with scores for each instance."""
        if name is not None:
            _check_name(predictor, name)
        top_k = _read(partial(labels_wanted, kind=predictor.decision.kind), body.parameters)
        predictions, _ = await predictor.predict(texts_of_instances(body))
        return JSONResponse({"predictions": [ranked(prediction, top_k=top_k) for prediction in predictions]})

    return routes


def _classify_routes(predictor: Predictor) -> APIRouter:
    """Routes of vLLM's classification and OpenAI's moderation."""
    routes = APIRouter()

    @routes.post("/classify", responses=ERRORS)
    @routes.post("/v1/classify", responses=ERRORS)
    async def classify(body: ClassifyRequest) -> Response:
        """The route of vLLM."""
        _read(check_activation, body)
        inputs: list[str | Pair] = [body.input] if isinstance(body.input, str) else list(body.input)
        predictions, usage = await predictor.predict(inputs)
        return JSONResponse(classified(predictions, usage, predictor.name))

    def model() -> dict[str, Any]:
        return {"id": predictor.name, "object": "model", "created": 0, "owned_by": "pipelines"}

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The only model of this server, as OpenAI lists models."""
        return {"object": "list", "data": [model()]}

    @routes.get("/v1/models/{name}", responses=ERRORS)
    async def show_model(name: str) -> dict[str, Any]:
        """Whether the model can answer, as version 1 of KServe's protocol asks, with OpenAI's description of it."""
        _check_name(predictor, name)
        _check_health(predictor)
        return {"name": predictor.name, "ready": True, **model()}

    @routes.post("/v1/moderations", responses=ERRORS)
    async def moderate(body: ModerationRequest) -> Response:
        """OpenAI's route: a category for each label."""
        decision = predictor.decision
        if decision.kind == "regression":
            raise RequestError(422, "validation", "a regression model has no categories; use /v1/predict")
        predictions, _ = await predictor.predict(_read(texts_of_moderation, body), decision)
        return JSONResponse(moderated(predictions, decision.labels, decision.kind, predictor.name))

    return routes


def _inference_protocol_routes(predictor: Predictor) -> APIRouter:
    """Routes of the Open Inference Protocol, which clients of KServe and Triton use."""
    routes = APIRouter(prefix="/v2")
    check_name = partial(_check_name, predictor)

    @routes.post("/models/{name}/infer", responses=ERRORS)
    @routes.post("/models/{name}/versions/{version}/infer", include_in_schema=False)
    async def infer_tensors(name: str, request: Request, version: str = VERSION_OF_MODEL) -> Response:
        """The Open Inference Protocol's route: tensors of texts in, tensors of scores and labels out."""
        check_name(name, version)
        content = await request.body()
        request_id, inputs = _read(lambda body: texts_of_tensors(body, request.headers.get(HEADER_LENGTH)), content)
        predictions, _ = await predictor.predict(inputs)
        return JSONResponse(answered(predictions, predictor.decision, predictor.name, request_id))

    @routes.get("")
    async def describe_server() -> dict[str, Any]:
        """Name, version and extensions of this server."""
        return {"name": "pipelines", "version": VERSION, "extensions": ["binary_tensor_data"]}

    @routes.get("/models/{name}", responses=ERRORS)
    @routes.get("/models/{name}/versions/{version}", include_in_schema=False)
    async def describe_model(name: str, version: str = VERSION_OF_MODEL) -> dict[str, Any]:
        """The model's tensors and labels."""
        check_name(name, version)
        return described(predictor.decision, predictor.name)

    @routes.get("/health/ready")
    @routes.get("/health/live")
    async def protocol_health() -> dict[str, bool]:
        """Whether this replica works."""
        _check_health(predictor)
        return {"live": True, "ready": True}

    @routes.get("/models/{name}/ready", responses=ERRORS)
    @routes.get("/models/{name}/versions/{version}/ready", include_in_schema=False)
    async def protocol_readiness(name: str, version: str = VERSION_OF_MODEL) -> dict[str, bool]:
        """Whether this replica works and has the model of this name."""
        check_name(name, version)
        return await protocol_health()

    return routes


def _operating_routes(predictor: Predictor, replica: str) -> APIRouter:
    """Routes for operators: probes, metrics and information about the server."""
    routes = APIRouter()

    @routes.get("/livez")
    @routes.get("/ping", include_in_schema=False)
    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Whether this replica works."""
        _check_health(predictor)
        return {"status": "ok"}

    @routes.get("/readyz")
    async def ready() -> dict[str, str]:
        """Whether this replica is ready. Always true: requests reach a replica only after its model is loaded."""
        return {"status": "ready"}

    @routes.get("/metrics")
    async def metrics() -> Response:
        """The metrics of all replicas, for Prometheus."""
        text = await asyncio.get_running_loop().run_in_executor(None, predictor.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4")

    @routes.get("/info")
    async def info() -> dict[str, Any]:
        """The model, its decision settings, and this server's limits."""
        return {**predictor.info, "replica": replica}

    return routes


def _check_name(predictor: Predictor, name: str, version: str = VERSION_OF_MODEL) -> None:
    if name != predictor.name:
        raise RequestError(404, "route", f"this server has one model, {predictor.name}")
    if version != VERSION_OF_MODEL:
        raise RequestError(404, "route", f"{predictor.name} has one version, {VERSION_OF_MODEL}")


def _check_health(predictor: Predictor) -> None:
    if not predictor.is_alive:
        raise RequestError(503, "unhealthy", "the batcher stopped; this replica will be replaced")


def _read(function: Callable[[Any], Any], content: Any) -> Any:
    """Apply function to a request's content. A DataError becomes a RequestError with status 422."""
    try:
        return function(content)
    except ShapeError as error:
        raise RequestError(400, "validation", str(error)) from error
    except DataError as error:
        raise RequestError(422, "validation", str(error)) from error


def _error(status: int, error_type: str, message: str, headers: Any = None) -> JSONResponse:
    content = ErrorResponse(error=message, error_type=error_type).model_dump()
    return JSONResponse(content, status_code=status, headers=headers)


async def _answer_request_error(_: Request, error: Exception) -> Response:
    """Answer a RequestError. For an overload, the header Retry-After tells the client when to try again."""
    assert isinstance(error, RequestError)
    headers = {"Retry-After": str(math.ceil(max(1.0, error.retry_after)))} if error.status == 429 else None
    return _error(error.status, error.error_type, str(error), headers)


async def _answer_http_exception(_: Request, error: Exception) -> Response:
    """Answer an unknown route or method. FastAPI raises status 400 for a body that is not JSON."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400:
        return _error(422, "validation", "the body is not JSON in UTF-8")
    return _error(error.status_code, "route", f"{error.detail}; the routes are at /docs", error.headers)


def _fields_of(request: Request) -> str:
    """Return the fields that a body of this request may have, as text."""
    body = get_type_hints(request.scope.get("endpoint", _fields_of)).get("body")
    fields = getattr(body, "model_fields", {})
    return f"; the body takes {', '.join(fields)}" if fields else ""


async def _answer_validation_error(request: Request, error: Exception) -> Response:
    """Answer a body that does not fit the schema. The message contains nothing of it, not even its field names."""
    assert isinstance(error, RequestValidationError)
    problems = []
    for item in error.errors():
        if item["type"] == "extra_forbidden":
            route = item["loc"][:-1]
            place = ".".join(str(part) for part in route if part in FIELDS)
            known = _fields_of(request) if place == "body" else ""
            problems.append(f"{place}: a field that is not known here{known}")
            continue
        place = ".".join(str(part) for part in item["loc"] if isinstance(part, int) or part in FIELDS)
        problems.append(f"{place}: {item['msg']}")
    return _error(422, "validation", "; ".join(problems[:3]))
