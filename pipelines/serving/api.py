"""The HTTP application: one group of routes for each protocol, all of them answered by one `Predictor`.

The bodies of other servers' protocols are in protocols.py. Every path needs a key, except for those of `auth.is_open`.

Imports no Ray. Ray Serve runs the application in every replica, and the tests call it directly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Match

from pipelines.errors import DataError
from pipelines.serving.errors import add_error_handlers, error_answer
from pipelines.serving.inference_protocol import (
    HEADER_LENGTH,
    ShapeError,
    answered,
    check_outputs,
    described,
    read_tensors,
)
from pipelines.serving.middleware import ID_HEADER, Guard
from pipelines.serving.predictor import Predictor, RequestError
from pipelines.serving.protocols import (
    ClassifyRequest,
    InferenceRequest,
    Instance,
    InstancesRequest,
    ModerationRequest,
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
    408: {"model": ErrorResponse, "description": "The body, or the answer, came later than the client waits."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    415: {"model": ErrorResponse, "description": "The body is not JSON, or compressed in an unknown way."},
    422: {"model": ErrorResponse, "description": "The request does not fit the schema or a limit."},
    424: {"model": ErrorResponse, "description": "The model failed on this batch."},
    429: {"model": ErrorResponse, "description": "Too many tokens wait; see Retry-After."},
    503: {"model": ErrorResponse, "description": "Too many requests at once; see Retry-After."},
    504: {"model": ErrorResponse, "description": "The request took too long."},
}
SHAPE_ERROR: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "A tensor's shape does not fit its data, or an output is unknown."}
}
TENSORS_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "id": {"type": "string"},
                        "inputs": {"type": "array", "items": {"type": "object"}},
                        "outputs": {"type": "array", "items": {"type": "object"}},
                        "parameters": {"type": "object"},
                    },
                    "example": {
                        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["Noon, as usual."]}]
                    },
                }
            }
        },
    }
}
"""The body of the Open Inference Protocol, which is read without a model because it may have binary parts."""
READABLE_HEADERS = (
    "retry-after", ID_HEADER, "x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time",
)  # fmt: skip
"""Headers of answers that pages of other origins may read."""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def build_api(predictor: Predictor, *, replica: str = "local", is_alone: bool = False) -> FastAPI:
    """Build the HTTP application of a predictor.

    Args:
        predictor: The model with its queue.
        replica: Name of this process, which /info returns.
        is_alone: Whether no proxy of Ray Serve is in front, which gives requests an id and logs them.
    """
    api = FastAPI(title="pipelines", version=VERSION, docs_url=None, redoc_url=None, redirect_slashes=False)
    api.add_middleware(GZipMiddleware, minimum_size=FEWEST_COMPRESSED, compresslevel=5)
    api.add_middleware(
        Guard,
        api_keys=predictor.settings.api_keys,
        max_body_bytes=predictor.settings.max_body_bytes,
        body_timeout_s=predictor.settings.body_timeout_s,
        request_timeout_s=predictor.settings.request_timeout_s,
        metrics=predictor.metrics,
        logs_requests=is_alone,
        is_route=lambda scope: any(route.matches(scope)[0] != Match.NONE for route in api.router.routes),
    )
    if predictor.settings.cors_allow_origins:
        api.add_middleware(
            _Cors,
            allow_origins=predictor.settings.cors_allow_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=READABLE_HEADERS,
        )
    add_error_handlers(api)
    for routes in (_own_routes, _hub_routes, _classify_routes, _inference_protocol_routes):
        api.include_router(routes(predictor))
    api.include_router(_operating_routes(predictor, replica))
    page = reference_page(_with_keys(api))

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
        top_k = _labels_wanted(predictor, body.options(), body.parameters)
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
    async def predict_instances(body: InstancesRequest) -> Response:
        """Vertex AI's route: labels with scores for each instance."""
        inner = [item.options() for item in body.instances if isinstance(item, Instance)]
        top_k = _labels_wanted(predictor, body.options(), body.parameters, *inner)
        texts = _read(partial(texts_of_instances, reads_pairs=predictor.folder.reads_pairs), body)
        predictions, _ = await predictor.predict(texts)
        return JSONResponse({"predictions": [ranked(prediction, top_k=top_k) for prediction in predictions]})

    @routes.post("/v1/models/{name:path}:predict", include_in_schema=False)
    async def predict_instances_of(name: str, body: InstancesRequest) -> Response:
        """The same as version 1 of KServe's protocol asks for it."""
        _check_name(predictor, name)
        return await predict_instances(body)

    return routes


def _classify_routes(predictor: Predictor) -> APIRouter:
    """Routes of vLLM's classification and OpenAI's moderation."""
    routes = APIRouter()

    @routes.post("/classify", responses=ERRORS)
    @routes.post("/v1/classify", responses=ERRORS)
    async def classify(body: ClassifyRequest) -> Response:
        """The route of vLLM and Infinity."""
        _labels_wanted(predictor, body.options(), body.parameters)
        inputs: list[str | Pair] = [body.input] if isinstance(body.input, str) else list(body.input)
        predictions, usage = await predictor.predict(inputs)
        return JSONResponse(classified(predictions, usage, predictor.name))

    def model() -> dict[str, Any]:
        return {"id": predictor.name, "object": "model", "created": 0, "owned_by": "pipelines"}

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The only model of this server, as OpenAI lists models."""
        return {"object": "list", "data": [model()]}

    @routes.get("/v1/models/{name:path}", responses=ERRORS)
    async def show_model(name: str) -> dict[str, Any]:
        """Whether the model can answer, as version 1 of KServe's protocol asks, with OpenAI's description of it."""
        _check_name(predictor, name)
        _check_health(predictor)
        return {"name": predictor.name, "ready": True, **model()}

    @routes.post("/v1/moderations", responses=ERRORS)
    async def moderate(body: ModerationRequest) -> Response:
        """OpenAI's route: a category for each label. An input is flagged if the model decides for any of them."""
        _labels_wanted(predictor, body.options(), body.parameters)
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

    @routes.post("/models/{name:path}/versions/{version}/infer", include_in_schema=False)
    async def infer_with_version(name: str, version: str, request: Request) -> Response:
        check_name(name, version)
        return await infer_tensors(predictor.name, request)

    @routes.post("/models/{name:path}/infer", responses=ERRORS | SHAPE_ERROR, openapi_extra=TENSORS_SCHEMA)
    async def infer_tensors(name: str, request: Request) -> Response:
        """The Open Inference Protocol's route: tensors of texts in, tensors of scores and labels out."""
        check_name(name)
        content = await request.body()
        asked = _read(lambda body: read_tensors(body, request.headers.get(HEADER_LENGTH)), content)
        _labels_wanted(predictor, *asked.options)
        _read(lambda names: check_outputs(names, predictor.decision), asked.outputs)
        predictions, _ = await predictor.predict(asked.inputs)
        return JSONResponse(answered(predictions, predictor.decision, predictor.name, asked))

    @routes.get("")
    async def describe_server() -> dict[str, Any]:
        """Name, version and extensions of this server."""
        return {"name": "pipelines", "version": VERSION, "extensions": ["binary_tensor_data"]}

    @routes.get("/health/ready")
    @routes.get("/health/live")
    async def protocol_health() -> dict[str, bool]:
        """Whether this replica works."""
        _check_health(predictor)
        return {"live": True, "ready": True}

    @routes.get("/models/{name:path}/versions/{version}/ready", include_in_schema=False)
    async def readiness_with_version(name: str, version: str) -> dict[str, Any]:
        check_name(name, version)
        return await protocol_readiness(predictor.name)

    @routes.get("/models/{name:path}/ready", responses=ERRORS)
    async def protocol_readiness(name: str) -> dict[str, Any]:
        """Whether this replica works and has the model of this name."""
        check_name(name)
        return {"name": predictor.name, **await protocol_health()}

    @routes.get("/models/{name:path}/versions/{version}", include_in_schema=False)
    async def describe_version(name: str, version: str) -> dict[str, Any]:
        check_name(name, version)
        return await describe_model(predictor.name)

    @routes.get("/models/{name:path}", responses=ERRORS)
    async def describe_model(name: str) -> dict[str, Any]:
        """The model's tensors and labels."""
        check_name(name)
        return described(predictor.decision, predictor.name)

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

    @routes.get("/metrics", response_class=PlainTextResponse)
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


def _labels_wanted(predictor: Predictor, *levels: Mapping[str, Any] | None) -> int | None:
    """Return the number of labels that a request asks for. Raises RequestError for options that are not honoured."""
    found: int | None = _read(lambda options: labels_wanted(predictor.decision.kind, *options), levels)
    return found


def _with_keys(api: FastAPI) -> dict[str, Any]:
    """Return the schema of an application, which it returns from now on, with the headers that take a key."""
    schema = api.openapi()
    schemes = {"bearer": {"type": "http", "scheme": "bearer"},
               "key": {"type": "apiKey", "in": "header", "name": "x-api-key"}}  # fmt: skip
    schema.setdefault("components", {})["securitySchemes"] = schemes
    schema["security"] = [{}, *({name: []} for name in schemes)]
    api.openapi = lambda: schema  # type: ignore[method-assign]  # FastAPI's documented way to change it
    return schema


class _Cors(CORSMiddleware):
    """Starlette's middleware, with our form of errors."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        problem = bytes(response.body).decode()
        return error_answer(400, "origin", f"{problem}; see the setting cors_allow_origins", kept)


def _read(function: Callable[[Any], Any], content: Any) -> Any:
    """Apply function to a request's content. A DataError becomes a RequestError with status 422."""
    try:
        return function(content)
    except ShapeError as error:
        raise RequestError(400, "validation", str(error)) from error
    except DataError as error:
        raise RequestError(422, "validation", str(error)) from error
