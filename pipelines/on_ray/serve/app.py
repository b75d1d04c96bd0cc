"""The deployment: FastAPI routes in the replica that holds the model, one hop from the proxy.

Nothing that blocks runs on the event loop: tokenizing and the forward pass each have a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve import Application

from pipelines import __version__
from pipelines.errors import SettingsError
from pipelines.labels import resolve_thresholds, thresholds_array
from pipelines.model_folder import read_model_folder
from pipelines.on_ray.serve.batcher import Batcher, QueueFullError
from pipelines.on_ray.serve.schema import (
    ErrorResponse,
    Pair,
    Prediction,
    PredictRequest,
    PredictResponse,
    Usage,
    WindowEvidence,
    without_none,
)
from pipelines.scoring import DocumentScores, Scorer
from pipelines.settings import ComputeSettings, DecisionSettings, ServePaths, ServeSettings, parse
from pipelines.tokenization import Documents

ERRORS: dict[int | str, dict[str, Any]] = {
    413: {"model": ErrorResponse, "description": "The body is too large."},
    422: {"model": ErrorResponse, "description": "The request does not fit the schema or a limit."},
    424: {"model": ErrorResponse, "description": "The model failed on this batch."},
    429: {"model": ErrorResponse, "description": "Too much is waiting; see Retry-After."},
}
api = FastAPI(title="pipelines", version=__version__, docs_url="/docs", redoc_url=None)


@dataclass(frozen=True)
class ServeJob:
    """One server, from a model folder."""

    model: str
    serve: ServeSettings = field(default_factory=ServeSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> ServeJob:
        """A job from a flat mapping of settings, as YAML, Serve's configuration and the command line give it."""
        paths, serve_settings, compute = parse(values, ServePaths, ServeSettings, ComputeSettings)
        return cls(paths.model, serve_settings, compute)


class RequestError(Exception):
    """A request that cannot be answered with a result."""

    def __init__(self, status: int, error_type: str, message: str) -> None:
        super().__init__(message)
        self.status, self.error_type = status, error_type


@serve.deployment(name="predictor")
@serve.ingress(api)
class Predictor:
    """A replica: model, tokenizer thread, batcher."""

    async def __init__(self, job: ServeJob) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._settings = job.serve
        self._folder = read_model_folder(job.model)
        self._name = job.serve.name or Path(job.model.rstrip("/")).name
        self._scorer = Scorer.load(self._folder, compute=job.compute)
        self._scorer.predict(["warm up"])
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._batcher = Batcher(
            self._scorer.score_documents,
            batch_tokens=self._scorer.model.batch_tokens,
            max_queued_tokens=job.serve.max_queued_tokens,
        )

    async def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        if not self._batcher.is_alive:
            raise RuntimeError("the batcher stopped")

    @api.post("/v1/predict", response_model=PredictResponse, responses=ERRORS)
    async def predict(self, body: PredictRequest) -> Response:
        """Classify texts of any length: scores, decided labels, and on request what each window says."""
        decision = self._decision(body)
        scores, texts = await self._score(body)
        predictions = await self._in_tokenizer(_predictions, self._scorer, decision, scores, body.windows, texts)
        response = PredictResponse(
            model=self._name,
            model_hash=self._folder.weights_hash,
            labels=list(decision.labels),
            predictions=predictions,
            usage=Usage(num_tokens=int(scores.num_tokens_D.sum()), num_windows=int(scores.num_windows_D.sum())),
        )
        return JSONResponse(without_none(response))

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """Whether this replica works."""
        await self.check_health()
        return {"status": "ok"}

    @api.get("/readyz")
    async def ready(self) -> dict[str, str]:
        """Whether this replica can answer; it is routed to only after its model is loaded."""
        return {"status": "ready"}

    @api.get("/info")
    async def info(self) -> dict[str, Any]:
        """The model, how it decides, and this server's limits."""
        return {
            "model": self._name,
            "version": __version__,
            "model_hash": self._folder.weights_hash,
            "settings_hash": self._folder.settings_hash,
            "decision": asdict(self._folder.decision),
            "windows": asdict(self._folder.windows),
            "dtype": str(self._scorer.model.dtype).removeprefix("torch."),
            "device": str(self._scorer.model.device),
            "packed": self._scorer.model.is_packed,
            "limits": {name: value for name, value in asdict(self._settings).items() if name.startswith("max_")},
        }

    def _decision(self, body: PredictRequest) -> DecisionSettings:
        thresholds = tuple(body.thresholds) if isinstance(body.thresholds, list) else body.thresholds
        try:
            return resolve_thresholds(thresholds, self._folder.decision)
        except SettingsError as error:
            raise RequestError(422, "validation", str(error)) from error

    async def _score(self, body: PredictRequest) -> tuple[DocumentScores, list[str]]:
        """Scores, and the texts that were cut into windows."""
        if len(body.inputs) > self._settings.max_documents:
            raise RequestError(
                422, "validation", f"{len(body.inputs)} inputs; at most {self._settings.max_documents} in one request"
            )
        table = _as_table(body.inputs)
        documents: Documents = await self._in_tokenizer(self._scorer.tokenizer.documents, table, *table.column_names)
        longest = int(documents.num_tokens_D.max())
        if longest > self._settings.max_document_tokens:
            raise RequestError(
                422, "validation", f"an input has {longest} tokens; at most {self._settings.max_document_tokens}"
            )
        try:
            scores = await self._batcher.submit(documents)
        except QueueFullError as error:
            raise RequestError(429, "overloaded", str(error)) from error
        except Exception as error:
            raise RequestError(424, "inference", f"the model failed: {type(error).__name__}") from error
        bad = next((message for message in scores.errors if message is not None), None)
        if bad is not None:
            raise RequestError(424, "inference", bad)
        return scores, table.column(table.column_names[-1]).to_pylist()

    async def _in_tokenizer(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function, *arguments)


def build(args: dict[str, Any]) -> Application:
    """Application builder for Serve configuration files: `model`, and any serve or compute setting beside it."""
    return application(ServeJob.parse(args))


def application(job: ServeJob, *, num_gpus: float = 0) -> Application:
    """The Serve application of a job; the model folder is read first, so that a bad one fails here."""
    read_model_folder(job.model)
    api.state.max_body_bytes = job.serve.max_body_bytes
    app: Application = Predictor.options(  # type: ignore[attr-defined]
        num_replicas=job.serve.num_replicas,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 1, "num_gpus": num_gpus},
        health_check_period_s=5,
    ).bind(job)
    return app


@api.exception_handler(RequestError)
async def answer_request_error(_: Request, error: RequestError) -> JSONResponse:
    """Our own refusals; overload says when to come back."""
    headers = {"Retry-After": "1"} if error.status == 429 else None
    content = ErrorResponse(error=str(error), error_type=error.error_type).model_dump()
    return JSONResponse(content, status_code=error.status, headers=headers)


@api.exception_handler(RequestValidationError)
async def answer_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
    """Where the body does not fit the schema; the input itself is not echoed."""
    problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    content = ErrorResponse(error="; ".join(problems[:3]), error_type="validation").model_dump()
    return JSONResponse(content, status_code=422)


@api.middleware("http")
async def limit_body(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuse a body above the limit, by its announced length or by counting it."""
    limit = ServeSettings.max_body_bytes if not hasattr(api.state, "max_body_bytes") else api.state.max_body_bytes
    announced = request.headers.get("content-length", "0")
    size = int(announced) if announced.isdigit() else 0
    if size <= limit:
        size = len(await request.body())
    if size > limit:
        content = ErrorResponse(error=f"the body has {size} bytes; at most {limit}", error_type="too_large")
        return JSONResponse(content.model_dump(), status_code=413)
    return await call_next(request)


def _as_table(inputs: list[str | Pair]) -> pa.Table:
    """Inputs as columns text (and text_pair). Raises RequestError for a mixture and for lone surrogates."""
    rows = [item if isinstance(item, Pair) else Pair(text=item) for item in inputs]
    columns = {"text": [row.text for row in rows]}
    pairs = [row.text_pair for row in rows if row.text_pair is not None]
    if pairs:
        if len(pairs) < len(rows):
            raise RequestError(422, "validation", "some inputs have a text_pair and some have none; send them apart")
        columns["text_pair"] = pairs
    try:
        return pa.table({name: pa.array(texts, pa.string()) for name, texts in columns.items()})
    except UnicodeEncodeError as error:
        raise RequestError(422, "validation", "an input is not valid Unicode: it holds a lone surrogate") from error


def _predictions(
    scorer: Scorer, decision: DecisionSettings, scores: DocumentScores, with_windows: bool, texts: list[str]
) -> list[Prediction]:
    decided = scorer.decide(scores, decision)
    names = list(decision.labels) or ["value"]
    limits = thresholds_array(decision).tolist()
    thresholds = dict(zip(names[-len(limits) :], limits, strict=True)) if limits else {}
    predictions = []
    for row, document_scores in enumerate(scores.scores_DL.tolist()):
        prediction = Prediction(
            scores=dict(zip(names, document_scores, strict=True)),
            thresholds=thresholds,
            num_tokens=int(scores.num_tokens_D[row]),
            num_windows=int(scores.num_windows_D[row]),
            truncated=bool(scores.truncated_D[row]),
            windows=_evidence(scorer, scores.part(row, row + 1), texts[row], names) if with_windows else None,
        )
        if decided.value_D is not None:
            prediction.value = float(decided.value_D[row])
        elif decided.positive_DL is not None:
            prediction.labels = [name for name, holds in zip(names, decided.positive_DL[row], strict=True) if holds]
        elif decided.label_D is not None and decided.score_D is not None and decided.label_D[row] >= 0:
            prediction.label = names[int(decided.label_D[row])]
            prediction.score = float(decided.score_D[row])
        predictions.append(prediction)
    return predictions


def _evidence(scorer: Scorer, scores: DocumentScores, text: str, names: list[str]) -> list[WindowEvidence]:
    """Each window's code points and scores."""
    spans = scorer.tokenizer.character_spans(text)
    evidence = []
    windows = zip(scores.windows.start_W, scores.windows.stop_W, scores.window_scores_WL.tolist(), strict=True)
    for start, stop, window_scores in windows:
        first, last = (int(spans[start, 0]), int(spans[stop - 1, 1])) if stop > start else (0, 0)
        evidence.append(WindowEvidence(start=first, end=last, scores=dict(zip(names, window_scores, strict=True))))
    return evidence
