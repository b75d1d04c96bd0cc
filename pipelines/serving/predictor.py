"""`Predictor`: texts in, predictions out, within the server's limits. Knows neither HTTP nor Ray.

Nothing that blocks runs on the event loop: tokenizing and the forward pass each have a thread.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.decisions.labels import resolve_thresholds
from pipelines.errors import DataError, ModelFolderError, SettingsError
from pipelines.fields import parse
from pipelines.model.scorer import DocumentScores, Scorer
from pipelines.model_folder import ModelFolder, read_model_folder
from pipelines.serving.answers import as_table, predictions_of
from pipelines.serving.batcher import Batcher, QueueFullError
from pipelines.serving.job import ServeJob
from pipelines.serving.schema import Pair, Prediction, Usage
from pipelines.serving.timings import Metrics, NoMetrics, current_timings
from pipelines.settings import ComputeSettings, DecisionSettings, ServeSettings, parse_range
from pipelines.text.tokenization import Documents
from pipelines.version import VERSION

INLINE_BYTES = 2**16
"""Texts up to this size are split into words on the event loop: that takes less time than a switch to a thread."""
FULL_COLLECTION = 1000
"""One of so many garbage collections is full. Python's default of 10 stops the event loop for 0.2 s every other second
while hundreds of requests wait; a request leaves little behind, and nearly all of it is freed without."""


class RequestError(Exception):
    """A request that cannot be answered with a result."""

    def __init__(self, status: int, error_type: str, message: str) -> None:
        super().__init__(message)
        self.status, self.error_type = status, error_type


class Predictor:
    """One model with a queue in front of it. Lives on one event loop; `open` makes one."""

    def __init__(
        self, job: ServeJob, folder: ModelFolder, scorer: Scorer, computing: ThreadPoolExecutor, metrics: Metrics
    ) -> None:
        """The scorer was loaded in the one thread of `computing`."""
        self.folder, self.decision = folder, folder.decision
        self.name = job.serve.name or Path(job.model.rstrip("/")).name
        self.metrics = metrics
        self.settings = job.serve
        self._scorer = scorer
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._busy_before, self._asked_at = 0.0, time.perf_counter()
        self._batcher = Batcher(
            scorer,
            computing,
            batch_tokens=scorer.model.batch_tokens,
            max_queued_tokens=job.serve.max_queued_tokens,
            on_pass=lambda tokens, seconds: metrics.count_pass(tokens, seconds, self._batcher.queued_tokens),
        )

    @classmethod
    async def open(cls, job: ServeJob, make_metrics: Callable[[Scorer], Metrics] | None = None) -> Predictor:
        """Load and warm up the model of a job; a fixed share of the machine's cores is used where none is set."""
        gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTION)
        folder = read_model_folder(job.model)
        _, most = parse_range("num_replicas", job.serve.num_replicas)
        threads = job.compute.num_threads or max(1, (os.cpu_count() or 1) // most)
        compute = replace(job.compute, num_threads=threads)
        computing = ThreadPoolExecutor(1, thread_name_prefix="forward")
        scorer = await asyncio.get_running_loop().run_in_executor(computing, _load, folder, compute)
        predictor = cls(job, folder, scorer, computing, NoMetrics() if make_metrics is None else make_metrics(scorer))
        predictor.set_thresholds(job.serve.thresholds)
        return predictor

    async def close(self) -> None:
        """Finish the forward pass that is running, and stop."""
        await self._batcher.close()
        self._tokenizing.shutdown(wait=True)

    @property
    def info(self) -> dict[str, Any]:
        """The model, how it decides, and this server's limits."""
        model = self._scorer.model
        return {
            "model": self.name,
            "version": VERSION,
            "model_hash": self.folder.weights_hash,
            "settings_hash": self.folder.settings_hash,
            "decision": asdict(self.decision),
            "windows": asdict(self.folder.windows),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "packed": model.is_packed,
            "limits": {name: value for name, value in asdict(self.settings).items() if name.startswith("max_")},
        }

    @property
    def is_alive(self) -> bool:
        """Whether requests will still be answered."""
        return self._batcher.is_alive

    def load(self) -> tuple[int, float]:
        """Tokens that wait, and the share of the time since the last call in which a forward pass ran."""
        busy, now = self._batcher.busy_seconds, time.perf_counter()
        share = (busy - self._busy_before) / max(now - self._asked_at, 1e-3)
        self._busy_before, self._asked_at = busy, now
        return self._batcher.queued_tokens, min(share, 1.0)

    def set_thresholds(self, thresholds: float | tuple[float, ...] | Mapping[str, float] | None) -> None:
        """Decide by other thresholds from now on. Raises SettingsError where they do not fit the labels."""
        self.decision = resolve_thresholds(thresholds, self.folder.decision)

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Take the thresholds of Ray Serve's user_config. Raises SettingsError for anything else in it."""
        (settings,) = parse({"thresholds": self.settings.thresholds, **user_config}, ServeSettings)
        if others := user_config.keys() - {"thresholds"}:
            raise SettingsError(f"user_config takes only thresholds, and not {', '.join(sorted(others))}")
        self.set_thresholds(settings.thresholds)

    def decision_with(self, thresholds: float | list[float] | Mapping[str, float] | None) -> DecisionSettings:
        """The decision under a request's own thresholds. Raises RequestError where they do not fit the labels."""
        given = tuple(thresholds) if isinstance(thresholds, list) else thresholds
        try:
            return resolve_thresholds(given, self.decision)
        except SettingsError as error:
            raise RequestError(422, "validation", str(error)) from error

    async def predict(
        self, inputs: list[str | Pair], decision: DecisionSettings | None = None, *, with_windows: bool = False
    ) -> tuple[list[Prediction], Usage]:
        """Predictions of texts or pairs, in order, and what they cost.

        Raises:
            RequestError: The inputs break a limit, too many tokens wait, or the model fails.
        """
        scores, texts = await self._score(inputs)
        decision = decision or self.decision
        try:
            predictions = await self._in_tokenizer(predictions_of, self._scorer, decision, scores, with_windows, texts)
        except ModelFolderError as error:  # a tokenizer that gives no character positions
            raise RequestError(422, "validation", str(error)) from error
        await self._in_tokenizer(self.metrics.count_predictions, predictions)
        usage = Usage(num_tokens=int(scores.num_tokens_D.sum()), num_windows=int(scores.num_windows_D.sum()))
        return predictions, usage

    async def score_documents(self, documents: Documents) -> DocumentScores:
        """Scores of tokenized documents, for a bulk job of the cluster; it waits where a request would be refused."""
        while True:
            try:
                return await self._batcher.submit(documents)
            except QueueFullError:
                await asyncio.sleep(0.1)

    async def _score(self, inputs: list[str | Pair]) -> tuple[DocumentScores, list[str]]:
        """Scores, and the texts that were cut into windows."""
        table = self._checked_table(inputs)
        timings = current_timings()
        await self._refuse_early(table)
        with timings.tokenizing():
            documents: Documents = await self._in_tokenizer(
                self._scorer.tokenizer.documents, table, *table.column_names
            )
        longest, most = int(documents.num_tokens_D.max()), self.settings.max_document_tokens
        if longest > most:
            raise RequestError(422, "validation", f"an input has {longest} tokens; at most {most}")
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

    def _checked_table(self, inputs: list[str | Pair]) -> pa.Table:
        """The inputs as columns text (and text_pair). Raises RequestError where there are too many, or unfit ones."""
        most = self.settings.max_documents
        if not 1 <= len(inputs) <= most:
            message = f"{len(inputs)} inputs; one request takes at least 1 and at most {most}"
            raise RequestError(422, "validation", message)
        try:
            table = as_table(inputs)
            self.folder.check_texts(are_pairs=table.num_columns == 2)
        except DataError as error:
            raise RequestError(422, "validation", str(error)) from error
        return table

    async def _refuse_early(self, table: pa.Table) -> None:
        """Refuse before tokenizing what certainly finds no room in the queue: a word is at least one token."""
        plan = self._scorer.plan
        reads_all = plan.sliding and plan.max_windows is None and table.num_columns == 1
        if not reads_all or self._batcher.queued_tokens < self.settings.max_queued_tokens // 2:
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


def _load(folder: ModelFolder, compute: ComputeSettings) -> Scorer:
    """The scorer, ready to answer, loaded in the thread that will compute.

    GNU OpenMP keeps a team of threads for every thread that ever computed. Where they are more than the cores, no team
    waits awake for its next piece of work: a short text then takes 18 ms instead of 11.
    """
    scorer = Scorer.load(folder, compute=compute)
    scorer.warm_up()
    return scorer
