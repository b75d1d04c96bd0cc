"""`Predictor`: texts in, predictions out, within the server's limits. Opens no socket and imports no Ray.

Blocking work does not run on the event loop: the forward pass has a thread, and tokenizing has two, so that short texts
do not wait for long ones.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.decisions.labels import resolve_thresholds, thresholds_by_label
from pipelines.errors import DataError, ModelFolderError, SettingsError
from pipelines.fields import parse, parse_range
from pipelines.model.scorer import DocumentScores, Scorer
from pipelines.model_folder import ModelFolder, read_model_folder
from pipelines.serving.answers import as_table, predictions_of
from pipelines.serving.batcher import Batcher, QueueFullError, TooLongError
from pipelines.serving.job import ServeJob
from pipelines.serving.rate import Rate
from pipelines.serving.schema import Pair, Prediction, Usage
from pipelines.serving.settings import ServeSettings
from pipelines.serving.timings import Metrics, NoMetrics, current_timings
from pipelines.settings import ComputeSettings, DecisionSettings, EarlyExit
from pipelines.text.tokenization import Documents
from pipelines.version import VERSION

INLINE_BYTES = 2**16
"""Texts up to this size are split into words on the event loop, which is faster than a switch to a thread."""
LONG_PASS_SECONDS = 0.1
"""When the speed is measured at the start, passes grow up to this duration."""
QUICK_BYTES, QUICK_DOCUMENTS = 4096, 16
"""Small requests are also tokenized and answered on the event loop, in less time than a switch to a thread takes."""
MOST_LONG_BYTES = 16 * 2**20
"""Bytes of longer texts that may wait to be tokenized, or one request of the maximum size. Further ones get 429."""
FULL_COLLECTION = 1000
"""Number of collections of the middle generation before a full garbage collection. With Python's default of 10, a full
collection stops the event loop for 0.2 s every two seconds while hundreds of requests wait. Nearly all objects of a
request are freed without a full collection."""
logger = logging.getLogger(__name__)


class RequestError(Exception):
    """A request that is answered with an error. It has the HTTP status and the error type of the response."""

    def __init__(self, status: int, error_type: str, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.status, self.error_type = status, error_type
        self.retry_after = retry_after
        """For an overload: seconds after which a new try makes sense."""


class Predictor:
    """One model with a queue in front of it. It belongs to one event loop. Create it with `open`."""

    def __init__(
        self,
        job: ServeJob,
        folder: ModelFolder,
        scorer: Scorer,
        computing: ThreadPoolExecutor,
        *,
        metrics: Metrics,
        rate: Rate | None = None,
    ) -> None:
        """The scorer must have been loaded in the only thread of `computing`."""
        self.folder, self.decision = folder, folder.decision
        self.name = job.serve.name or Path(job.model.rstrip("/")).name
        self.metrics = metrics
        self.settings = job.serve
        self._scorer = scorer
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._tokenizing_long = ThreadPoolExecutor(1, thread_name_prefix="tokenize-long")
        self._long_bytes = 0
        self._busy_before, self._asked_at = 0.0, time.perf_counter()
        self._batcher = Batcher(
            scorer,
            computing,
            batch_tokens=scorer.model.batch_tokens,
            max_queued_tokens=job.serve.max_queued_tokens,
            rate=rate,
            on_pass=lambda tokens, seconds: metrics.count_pass(tokens, seconds, self._batcher.queued_tokens),
        )

    @classmethod
    async def open(cls, job: ServeJob, make_metrics: Callable[[Scorer], Metrics] | None = None) -> Predictor:
        """Load and warm up the model of a job. Without num_threads, it uses its share of the machine's cores."""
        gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTION)
        folder = read_model_folder(job.model)
        _, most = parse_range("num_replicas", job.serve.num_replicas)
        threads = job.compute.num_threads or max(1, (os.cpu_count() or 1) // most)
        compute = replace(job.compute, num_threads=threads)
        computing = ThreadPoolExecutor(1, thread_name_prefix="forward")
        scorer, rate = await asyncio.get_running_loop().run_in_executor(
            computing, _load, folder, compute, job.serve.early_exit
        )
        metrics = NoMetrics() if make_metrics is None else make_metrics(scorer)
        predictor = cls(job, folder, scorer, computing, metrics=metrics, rate=rate)
        predictor.set_thresholds(job.serve.thresholds)
        return predictor

    async def close(self) -> None:
        """Finish the current forward pass, and stop."""
        await self._batcher.close()
        self._tokenizing.shutdown(wait=True)
        self._tokenizing_long.shutdown(wait=True)

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
            "guarantees": self._guarantees,
            "early_exit": {"mode": self.settings.early_exit, **self.folder.early_exit},
            "windows": {**asdict(self.folder.windows), "max_length": self._scorer.plan.max_length},
            "reads_pairs": self.folder.reads_pairs,
            "engine": model.name,
            "dtype": model.dtype_name,
            "device": model.device_name,
            "packed": model.is_packed,
            "limits": {name: value for name, value in asdict(self.settings).items() if name.startswith("max_")},
        }

    @property
    def is_alive(self) -> bool:
        """Whether the predictor still answers requests."""
        return self._batcher.is_alive

    def load(self) -> tuple[int, float]:
        """Return the waiting tokens, and the share of the time since the last call in which a forward pass ran."""
        busy, now = self._batcher.busy_seconds, time.perf_counter()
        share = (busy - self._busy_before) / max(now - self._asked_at, 1e-3)
        self._busy_before, self._asked_at = busy, now
        return self._batcher.queued_tokens, min(share, 1.0)

    def set_thresholds(self, thresholds: float | tuple[float, ...] | Mapping[str, float] | None) -> None:
        """Use other thresholds from now on. Raises SettingsError if they do not fit the labels."""
        self.decision = resolve_thresholds(thresholds, self.folder.decision)
        self._guarantees = self.folder.guarantees_of(self.decision, early_exit=self.settings.early_exit)
        if self.settings.early_exit == "certified" and self.decision != self.folder.decision:
            logger.warning("early_exit=certified has no margin for these thresholds: texts are read as for exact")

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Use the thresholds in Ray Serve's user_config. Raises SettingsError if it contains anything else."""
        (settings,) = parse({"thresholds": self.settings.thresholds, **user_config}, ServeSettings)
        if others := user_config.keys() - {"thresholds"}:
            raise SettingsError(f"user_config takes only thresholds, and not {', '.join(sorted(others))}")
        self.set_thresholds(settings.thresholds)

    def decision_with(self, thresholds: float | list[float] | Mapping[str, float] | None) -> DecisionSettings:
        """Return the decision with a request's own thresholds. Raises RequestError if they do not fit the labels."""
        if thresholds == {}:
            return self.decision
        given = tuple(thresholds) if isinstance(thresholds, list) else thresholds
        try:
            return resolve_thresholds(given, self.decision)
        except SettingsError as error:
            names = ", ".join(thresholds_by_label(self.decision)) or "none, because this kind has no thresholds"
            message = f"thresholds must be a number from 0 to 1, one for each label, or by label; labels: {names}"
            raise RequestError(422, "validation", message) from error

    async def predict(
        self, inputs: list[str | Pair], decision: DecisionSettings | None = None, *, with_windows: bool = False
    ) -> tuple[list[Prediction], Usage]:
        """Return the predictions of texts or pairs, in order, and the number of tokens and windows.

        Raises:
            RequestError: The inputs break a limit, too many tokens wait, or the model fails.
        """
        decision = decision or self.decision
        scores, texts = await self._score(inputs, decision)
        lane: ThreadPoolExecutor | None = self._lane(sum(map(len, texts)) if with_windows else 0)
        if len(inputs) <= QUICK_DOCUMENTS and not with_windows:
            lane = None
        try:
            predictions = await _in(lane, predictions_of, self._scorer, decision, scores, with_windows, texts)
        except ModelFolderError as error:  # a tokenizer that gives no character positions
            raise RequestError(422, "validation", str(error)) from error
        await _in(lane and self._tokenizing, self.metrics.count_predictions, predictions)
        usage = Usage(num_tokens=int(scores.num_tokens_D.sum()), num_windows=int(scores.num_windows_D.sum()))
        return predictions, usage

    async def score_documents(self, documents: Documents) -> DocumentScores:
        """Score tokenized documents of a bulk job on the cluster. If the queue is full, wait instead of failing."""
        while True:
            try:
                return await self._batcher.submit(documents)
            except QueueFullError:
                await asyncio.sleep(0.1)

    async def _score(self, inputs: list[str | Pair], decision: DecisionSettings) -> tuple[DocumentScores, list[str]]:
        """Return the scores, and the texts that were cut into windows (for pairs: the second texts)."""
        table = self._checked_table(inputs)
        timings = current_timings()
        await self._refuse_early(table)
        with timings.tokenizing():
            documents = await self._tokenized(table)
        longest, most = int(documents.num_tokens_D.max()), self.settings.max_document_tokens
        if longest > most:
            raise RequestError(422, "validation", f"an input has {longest} tokens; at most {most}")
        try:
            with self._refusing():
                scores = await self._batcher.submit(documents, timings, decision=decision)
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(424, "inference", f"the model failed: {type(error).__name__}") from error
        bad = next((message for message in scores.errors if message is not None), None)
        if bad is not None:
            raise RequestError(424, "inference", bad)
        return scores, table.column(table.column_names[-1]).to_pylist()

    def _checked_table(self, inputs: list[str | Pair]) -> pa.Table:
        """Return the inputs as columns text (and text_pair). Raises RequestError if they are invalid or too many."""
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
        """Refuse a request before tokenizing if it certainly breaks a limit: a word has at least one token."""
        plan = self._scorer.plan
        reads_all = plan.sliding and plan.max_windows is None and table.num_columns == 1
        is_quick = table.nbytes < INLINE_BYTES
        has_room = self._batcher.queued_tokens < self.settings.max_queued_tokens // 2
        if not reads_all or (is_quick and has_room):
            return
        texts = table.column(0).to_pylist()

        def count() -> list[int]:
            return [len(text.split()) for text in texts]

        words = count() if is_quick else await asyncio.get_running_loop().run_in_executor(None, count)
        longest, most = max(words), self.settings.max_document_tokens
        if longest > most:
            raise RequestError(422, "validation", f"an input has at least {longest} tokens; at most {most}")
        with self._refusing():
            self._batcher.check_room(sum(words))
            if self.settings.early_exit == "off":
                self._batcher.check_time(sum(words), current_timings().left)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn what the batcher refuses into answers: 429 if a later try can succeed, and else 422."""
        try:
            yield
        except QueueFullError as error:
            raise RequestError(429, "overloaded", str(error), retry_after=error.seconds) from error
        except TooLongError as error:
            limit = current_timings().deadline_name
            problem = f"{error}, and the limit is {limit}; send fewer or shorter texts at once, or score them in bulk"
            raise RequestError(422, "validation", problem) from error

    async def _tokenized(self, table: pa.Table) -> Documents:
        """Tokenize texts. Raises RequestError if too many long ones wait already."""
        size = int(table.nbytes)
        lane = None if size < QUICK_BYTES else self._lane(size)
        long_bytes = size if lane is self._tokenizing_long else 0
        most = max(MOST_LONG_BYTES, self.settings.max_body_bytes)
        if long_bytes and self._long_bytes + long_bytes > most:
            problem = f"{self._long_bytes:,} bytes of long texts wait to be tokenized, and the limit is {most:,}"
            raise RequestError(429, "overloaded", f"{problem}; try again later")
        self._long_bytes += long_bytes
        try:
            documents: Documents = await _in(lane, self._scorer.tokenizer.documents, table, *table.column_names)
        except ModelFolderError as error:
            raise RequestError(424, "inference", "the tokenizer cannot read a text") from error
        finally:
            self._long_bytes -= long_bytes
        return documents

    def _lane(self, size: int) -> ThreadPoolExecutor:
        """Return the thread for texts of this size."""
        return self._tokenizing if size < INLINE_BYTES else self._tokenizing_long


async def _in(lane: ThreadPoolExecutor | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a thread. None means on the event loop, which is quicker for what is short."""
    if lane is None:
        return function(*arguments)
    return await asyncio.get_running_loop().run_in_executor(lane, function, *arguments)


def _load(folder: ModelFolder, compute: ComputeSettings, early_exit: EarlyExit) -> tuple[Scorer, Rate]:
    """Load and warm up the scorer, and measure its speed. This runs in the thread that later computes.

    GNU OpenMP keeps a team of threads for every thread that has computed something. If the teams have more threads than
    there are cores, idle threads sleep instead of spinning, and a short text takes 18 ms instead of 11.
    """
    scorer = Scorer.load(folder, compute=compute, early_exit=early_exit)
    scorer.warm_up()
    rate = Rate()
    for num_windows, length in ((1, 1), *((count, scorer.plan.budget) for count in (1, 2, 4, 8, 16, 32))):
        began = time.perf_counter()
        num_tokens = scorer.run_windows(num_windows, length)
        seconds = time.perf_counter() - began
        rate.add(num_tokens, seconds)
        if length > 1 and seconds >= LONG_PASS_SECONDS:
            break
    return scorer, rate
