"""The deployment: FastAPI routes in the replica that holds the model, one hop from the proxy.

Nothing that blocks runs on the event loop: tokenizing and the forward pass each have a thread. Ray Serve copies
`api` where the deployment is decorated: handlers and what routes call must stand before that, and annotations must
be no strings.
"""

import asyncio
import gc
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig
from starlette.exceptions import HTTPException

from pipelines import __version__
from pipelines.errors import DataError, ModelFolderError, SettingsError
from pipelines.fields import parse
from pipelines.labels import resolve_thresholds
from pipelines.locations import absolute
from pipelines.model_folder import ModelFolder, read_model_folder
from pipelines.on_ray.cluster import uses_gpus
from pipelines.on_ray.serve.answers import as_table, predictions_of
from pipelines.on_ray.serve.auth import check_exposure
from pipelines.on_ray.serve.autoscaling import BUSY, QUEUED, autoscaling_of
from pipelines.on_ray.serve.batcher import Batcher, QueueFullError
from pipelines.on_ray.serve.guard import Guard
from pipelines.on_ray.serve.inference_protocol import HEADER_LENGTH, answered, described, texts_of_tensors
from pipelines.on_ray.serve.metrics import Metrics, collect, current_timings
from pipelines.on_ray.serve.protocols import (
    ClassifyRequest,
    InferenceRequest,
    ModerationRequest,
    classified,
    moderated,
    ranked,
    texts_of_inference,
    texts_of_moderation,
)
from pipelines.on_ray.serve.schema import (
    ErrorResponse,
    Pair,
    Prediction,
    PredictRequest,
    PredictResponse,
    Usage,
    without_none,
)
from pipelines.scoring import DocumentScores, Scorer
from pipelines.settings import ComputeSettings, DecisionSettings, ServePaths, ServeSettings, parse_range
from pipelines.tokenization import Documents

ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorResponse, "description": "No key, or a wrong one."},
    404: {"model": ErrorResponse, "description": "There is one model here, and it has another name."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    422: {"model": ErrorResponse, "description": "The request does not fit the schema or a limit."},
    424: {"model": ErrorResponse, "description": "The model failed on this batch."},
    429: {"model": ErrorResponse, "description": "Too much is waiting; see Retry-After."},
}
INLINE_BYTES = 2**16
"""Of text whose words are counted on the event loop: that takes less than another thread's turn."""
FULL_COLLECTION = 1000
"""Of how many smaller collections of garbage one is full. Python's 10 stop the loop for 0.2 s every other second where
hundreds of requests wait; what a request leaves behind is small, and nearly all of it gone without."""
PAGE = resources.files("pipelines").joinpath("on_ray/serve/page.html").read_bytes()
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
api = FastAPI(title="pipelines", version=__version__, docs_url="/docs", redoc_url=None)
api.add_middleware(Guard)


@dataclass(frozen=True)
class ServeJob:
    """One server, from a model folder."""

    model: str
    serve: ServeSettings = field(default_factory=ServeSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> "ServeJob":
        """A job from a flat mapping of settings, as YAML, Serve's configuration and the command line give it."""
        paths, serve_settings, compute = parse(values, ServePaths, ServeSettings, ComputeSettings)
        return cls(absolute(paths.model), serve_settings, compute)


class RequestError(Exception):
    """A request that cannot be answered with a result."""

    def __init__(self, status: int, error_type: str, message: str) -> None:
        super().__init__(message)
        self.status, self.error_type = status, error_type


@api.exception_handler(RequestError)
async def answer_request_error(_: Request, error: RequestError) -> JSONResponse:
    """Our own refusals; overload says when to come back."""
    headers = {"Retry-After": "1"} if error.status == 429 else None
    content = ErrorResponse(error=str(error), error_type=error.error_type).model_dump()
    return JSONResponse(content, status_code=error.status, headers=headers)


@api.exception_handler(HTTPException)
async def answer_http_exception(_: Request, error: HTTPException) -> JSONResponse:
    """No such route, or not by this method; FastAPI's 400 is a body that is no JSON."""
    if error.status_code == 400:
        content = ErrorResponse(error="the body is no JSON in UTF-8", error_type="validation").model_dump()
        return JSONResponse(content, status_code=422)
    content = ErrorResponse(error=f"{error.detail}; the routes are at /docs", error_type="route").model_dump()
    return JSONResponse(content, status_code=error.status_code, headers=error.headers)


@api.exception_handler(RequestValidationError)
async def answer_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
    """Where the body does not fit the schema; the input itself is not echoed."""
    problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    content = ErrorResponse(error="; ".join(problems[:3]), error_type="validation").model_dump()
    return JSONResponse(content, status_code=422)


def _read(function: Callable[[Any], Any], content: Any) -> Any:
    """What function makes of a request's content; a DataError is the caller's mistake."""
    try:
        return function(content)
    except DataError as error:
        raise RequestError(422, "validation", str(error)) from error


def _load(folder: ModelFolder, compute: ComputeSettings) -> Scorer:
    """The scorer, ready to answer, made in the thread that will compute.

    GNU OpenMP keeps a team of threads for every thread that ever computed, and where they are more than the cores no
    team waits awake for its next piece of work: a short text then takes 18 ms where it took 11.
    """
    scorer = Scorer.load(folder, compute=compute)
    scorer.warm_up()
    return scorer


@serve.deployment(name="predictor")
@serve.ingress(api)
class Predictor:
    """A replica: a thread for the model, one for the tokenizer, and the batcher between."""

    async def __init__(self, job: ServeJob) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._settings = job.serve
        api.state.max_body_bytes, api.state.api_keys = job.serve.max_body_bytes, job.serve.api_keys
        self._folder = read_model_folder(job.model)
        self._decision = self._folder.decision
        self._name = job.serve.name or Path(job.model.rstrip("/")).name
        _, most = parse_range("num_replicas", job.serve.num_replicas)
        threads = job.compute.num_threads or max(1, (os.cpu_count() or 1) // most)
        compute = replace(job.compute, num_threads=threads)
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="forward")
        loop = asyncio.get_running_loop()
        self._scorer = await loop.run_in_executor(self._computing, _load, self._folder, compute)
        self._metrics = Metrics(self._decision.labels, self._scorer.model.batch_tokens)
        api.state.metrics = self._metrics
        gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTION)
        self._busy_before, self._asked_before = 0.0, time.perf_counter()
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._batcher = Batcher(
            self._scorer,
            self._computing,
            batch_tokens=self._scorer.model.batch_tokens,
            max_queued_tokens=job.serve.max_queued_tokens,
            on_pass=lambda tokens, seconds: self._metrics.count_pass(tokens, seconds, self._batcher.queued_tokens),
        )

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take other thresholds while running: Ray Serve calls this with `user_config`, at first and when it changes.

        Raises SettingsError for thresholds that do not fit the labels, and for anything else in it.
        """
        (settings,) = parse({"thresholds": self._settings.thresholds, **user_config}, ServeSettings)
        if others := user_config.keys() - {"thresholds"}:
            raise SettingsError(f"user_config takes thresholds, and not {', '.join(sorted(others))}")
        self._decision = resolve_thresholds(settings.thresholds, self._folder.decision)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy reads: tokens that wait, and the share of the time since in which a pass ran."""
        busy, now = self._batcher.busy_seconds, time.perf_counter()
        share = (busy - self._busy_before) / max(now - self._asked_before, 1e-3)
        self._busy_before, self._asked_before = busy, now
        return {QUEUED: self._batcher.queued_tokens, BUSY: min(share, 1.0)}

    async def score_documents(self, documents: Documents) -> DocumentScores:
        """Scores of tokenized documents, for a bulk job of the cluster; it waits where a request would be refused."""
        while True:
            try:
                return await self._batcher.submit(documents)
            except QueueFullError:
                await asyncio.sleep(0.1)

    async def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        if not self._batcher.is_alive:
            raise RuntimeError("the batcher stopped")

    @api.get("/", include_in_schema=False)
    async def page(self) -> Response:
        """A page to try the model on."""
        return Response(PAGE, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    @api.post("/v1/predict", response_model=PredictResponse, responses=ERRORS)
    async def predict(self, body: PredictRequest) -> Response:
        """Classify texts of any length: scores, decided labels, and on request what each window says."""
        predictions, usage = await self._predictions(body.inputs, self._decision_for(body), with_windows=body.windows)
        response = PredictResponse(
            model=self._name,
            model_hash=self._folder.weights_hash,
            labels=list(self._decision.labels),
            predictions=predictions,
            usage=usage,
        )
        return JSONResponse(without_none(response))

    @api.post("/predict", responses=ERRORS)
    async def predict_as_inference(self, body: InferenceRequest) -> Response:
        """text-embeddings-inference's route: labels with scores, the decided first; nested for a batch."""
        return await self._infer(body, is_nested=body.parameters is not None)

    @api.post("/models/{name:path}", responses=ERRORS)
    async def predict_as_hub(self, name: str, body: InferenceRequest) -> Response:
        """Hugging Face's route: always nested."""
        return await self._infer(body.model_copy(update={"parameters": body.parameters or {}}), is_nested=True)

    @api.post("/classify", responses=ERRORS)
    @api.post("/v1/classify", responses=ERRORS)
    async def classify(self, body: ClassifyRequest) -> Response:
        """The route of vLLM."""
        inputs: list[str | Pair] = [body.input] if isinstance(body.input, str) else list(body.input)
        predictions, usage = await self._predictions(inputs, self._decision)
        return JSONResponse(classified(predictions, usage, self._name))

    @api.post("/v1/moderations", responses=ERRORS)
    async def moderate(self, body: ModerationRequest) -> Response:
        """OpenAI's route: a category per label."""
        decision = self._decision
        if decision.kind == "regression":
            raise RequestError(422, "validation", "a regression model has no categories; ask /v1/predict")
        inputs = _read(texts_of_moderation, body)
        predictions, _ = await self._predictions(inputs, decision)
        return JSONResponse(moderated(predictions, decision.labels, decision.kind, self._name))

    @api.post("/v2/models/{name}/infer", responses=ERRORS)
    @api.post("/v2/models/{name}/versions/{version}/infer", include_in_schema=False)
    async def infer_tensors(self, name: str, request: Request) -> Response:
        """The Open Inference Protocol's route: tensors of texts in, of scores and labels out."""
        self._check_name(name)
        content = await request.body()
        request_id, inputs = _read(lambda body: texts_of_tensors(body, request.headers.get(HEADER_LENGTH)), content)
        predictions, _ = await self._predictions(inputs, self._decision)
        return JSONResponse(answered(predictions, self._decision, self._name, request_id))

    @api.get("/v2")
    async def describe_server(self) -> dict[str, Any]:
        """The Open Inference Protocol's word on this server."""
        return {"name": "pipelines", "version": __version__, "extensions": ["binary_tensor_data"]}

    @api.get("/v2/models/{name}", responses=ERRORS)
    async def describe_model(self, name: str) -> dict[str, Any]:
        """The Open Inference Protocol's word on the model: its tensors and labels."""
        self._check_name(name)
        return described(self._decision, self._name)

    @api.get("/v2/health/ready")
    @api.get("/v2/health/live")
    async def protocol_health(self) -> dict[str, bool]:
        """Whether this replica works, as the Open Inference Protocol asks it."""
        await self.check_health()
        return {"live": True, "ready": True}

    @api.get("/v2/models/{name}/ready", responses=ERRORS)
    async def protocol_readiness(self, name: str) -> dict[str, bool]:
        """Whether this replica works and has that model."""
        self._check_name(name)
        return await self.protocol_health()

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """Whether this replica works."""
        await self.check_health()
        return {"status": "ok"}

    @api.get("/livez")
    async def alive(self) -> dict[str, str]:
        """Whether this replica works, by the name that probes use."""
        return await self.health()

    @api.get("/readyz")
    async def ready(self) -> dict[str, str]:
        """Whether this replica can answer; it is routed to only after its model is loaded."""
        return {"status": "ready"}

    @api.get("/metrics")
    async def metrics(self) -> Response:
        """What all replicas have counted, for Prometheus."""
        text = await asyncio.get_running_loop().run_in_executor(None, collect)
        return Response(text, media_type="text/plain; version=0.0.4")

    @api.get("/info")
    async def info(self) -> dict[str, Any]:
        """The model, how it decides, and this server's limits."""
        return {
            "model": self._name,
            "version": __version__,
            "replica": serve.get_replica_context().replica_id.unique_id,
            "model_hash": self._folder.weights_hash,
            "settings_hash": self._folder.settings_hash,
            "decision": asdict(self._decision),
            "windows": asdict(self._folder.windows),
            "dtype": str(self._scorer.model.dtype).removeprefix("torch."),
            "device": str(self._scorer.model.device),
            "packed": self._scorer.model.is_packed,
            "limits": {name: value for name, value in asdict(self._settings).items() if name.startswith("max_")},
        }

    async def _infer(self, body: InferenceRequest, *, is_nested: bool) -> Response:
        inputs, is_batch = _read(partial(texts_of_inference, reads_pairs=self._folder.reads_pairs), body)
        top_k = (body.parameters or {}).get("top_k")
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise RequestError(422, "validation", "top_k is a number of labels, 1 at least")
        predictions, _ = await self._predictions(inputs, self._decision)
        answers = [ranked(prediction, top_k=top_k) for prediction in predictions]
        return JSONResponse(answers if is_batch or is_nested else answers[0])

    async def _predictions(
        self, inputs: list[str | Pair], decision: DecisionSettings, *, with_windows: bool = False
    ) -> tuple[list[Prediction], Usage]:
        scores, texts = await self._score(inputs)
        try:
            predictions = await self._in_tokenizer(predictions_of, self._scorer, decision, scores, with_windows, texts)
        except ModelFolderError as error:  # a tokenizer that tells no character positions
            raise RequestError(422, "validation", str(error)) from error
        await self._in_tokenizer(self._metrics.count_predictions, predictions)
        usage = Usage(num_tokens=int(scores.num_tokens_D.sum()), num_windows=int(scores.num_windows_D.sum()))
        return predictions, usage

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise RequestError(404, "route", f"there is one model here, {self._name}")

    def _decision_for(self, body: PredictRequest) -> DecisionSettings:
        thresholds = tuple(body.thresholds) if isinstance(body.thresholds, list) else body.thresholds
        try:
            return resolve_thresholds(thresholds, self._decision)
        except SettingsError as error:
            raise RequestError(422, "validation", str(error)) from error

    async def _score(self, inputs: list[str | Pair]) -> tuple[DocumentScores, list[str]]:
        """Scores, and the texts that were cut into windows."""
        most = self._settings.max_documents
        if not 1 <= len(inputs) <= most:
            raise RequestError(
                422, "validation", f"{len(inputs)} inputs; at most {most} in one request, and one at least"
            )
        table = _read(as_table, inputs)
        _read(lambda table: self._folder.check_texts(are_pairs=table.num_columns == 2), table)
        timings = current_timings()
        await self._refuse_early(table)
        with timings.tokenizing():
            documents: Documents = await self._in_tokenizer(
                self._scorer.tokenizer.documents, table, *table.column_names
            )
        longest = int(documents.num_tokens_D.max())
        if longest > self._settings.max_document_tokens:
            raise RequestError(
                422, "validation", f"an input has {longest} tokens; at most {self._settings.max_document_tokens}"
            )
        try:
            scores = await self._batcher.submit(documents, timings)
        except QueueFullError as error:
            raise RequestError(429, "overloaded", str(error)) from error
        except Exception as error:
            raise RequestError(424, "inference", f"the model failed: {type(error).__name__}") from error
        bad = next((message for message in scores.errors if message is not None), None)
        if bad is not None:
            raise RequestError(424, "inference", bad)
        return scores, table.column(table.column_names[-1]).to_pylist()

    async def _refuse_early(self, table: pa.Table) -> None:
        """Refuse before it is tokenized what surely cannot wait here: a word is a token at least, where none is cut."""
        plan = self._scorer.plan
        is_whole = plan.sliding and plan.max_windows is None and table.num_columns == 1
        if not is_whole or self._batcher.queued_tokens < self._settings.max_queued_tokens // 2:
            return
        texts = table.column(0).to_pylist()

        def count() -> int:
            return sum(len(text.split()) for text in texts)

        is_quick = table.nbytes < INLINE_BYTES
        words = count() if is_quick else await asyncio.get_running_loop().run_in_executor(None, count)
        try:
            self._batcher.check_room(words)
        except QueueFullError as error:
            raise RequestError(429, "overloaded", str(error)) from error

    async def _in_tokenizer(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function, *arguments)


def build(args: dict[str, Any]) -> Application:
    """Application builder for Serve configuration files: `model`, and any serve or compute setting beside it."""
    job = ServeJob.parse(args)
    if job.serve.proxy == "haproxy":
        check_exposure(job.serve)
    return application(job)


def check_job(job: ServeJob) -> None:
    """Raise a UsageError where the model folder is none, or the thresholds do not fit its labels."""
    resolve_thresholds(job.serve.thresholds, read_model_folder(job.model).decision)


def application(job: ServeJob) -> Application:
    """The Serve application of a job; what does not fit fails here (`check_job`)."""
    check_job(job)
    num_gpus = job.serve.gpus_per_replica
    if num_gpus is None:
        num_gpus = 1.0 if uses_gpus(job.compute.device) else 0.0
    autoscaling = autoscaling_of(job.serve)
    fewest, _ = parse_range("num_replicas", job.serve.num_replicas)
    app: Application = Predictor.options(  # type: ignore[attr-defined]
        **({"num_replicas": fewest} if autoscaling is None else {"autoscaling_config": autoscaling}),
        user_config={"thresholds": job.serve.thresholds},
        logging_config=LoggingConfig(encoding="JSON"),
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 1, "num_gpus": num_gpus},
        health_check_period_s=5,
    ).bind(job)
    return app
