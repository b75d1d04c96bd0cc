"""Coalesce concurrent requests into one forward pass: gather while the model is busy, go at once when it is idle.

A request waits only for the pass that is running, never for a timer. Knows documents and a function that scores
them; no HTTP, no Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from pipelines.scoring import DocumentScores
from pipelines.tokenization import Documents, concat_documents


class QueueFullError(Exception):
    """More tokens wait than may."""

    def __init__(self, queued: int, limit: int) -> None:
        super().__init__(f"{queued:,} tokens are waiting and at most {limit:,} may; try again later")


class Clock(Protocol):
    """Where a request's waiting and the pass that answered it are noted, in seconds."""

    queue: float
    inference: float


@dataclass(eq=False)
class _Waiting:
    documents: Documents
    num_tokens: int
    answer: asyncio.Future[DocumentScores]
    clock: Clock | None
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """A queue of tokenized requests in front of one model. Lives on one event loop."""

    def __init__(
        self,
        score: Callable[[Documents], DocumentScores],
        *,
        batch_tokens: int,
        max_queued_tokens: int,
        on_pass: Callable[[int, float], None] = lambda num_tokens, seconds: None,
    ) -> None:
        """on_pass hears of every forward pass: tokens and seconds."""
        self._score, self._on_pass = score, on_pass
        self._busy_seconds, self._pass_began = 0.0, 0.0
        self._batch_tokens, self._max_queued_tokens = batch_tokens, max_queued_tokens
        self._queue: deque[_Waiting] = deque()
        self._queued_tokens = 0
        self._is_closing = False
        self._arrived = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for a forward pass."""
        return self._queued_tokens

    @property
    def busy_seconds(self) -> float:
        """Time so far in which a forward pass ran."""
        return self._busy_seconds + (time.perf_counter() - self._pass_began if self._pass_began else 0.0)

    @property
    def is_alive(self) -> bool:
        """Whether anything will still be answered."""
        return not self._task.done()

    async def submit(self, documents: Documents, clock: Clock | None = None) -> DocumentScores:
        """Scores of one request's documents. Raises QueueFullError, or what the forward pass raised.

        A caller that is cancelled while it waits is dropped before its turn.
        """
        num_tokens = int(documents.num_tokens_D.sum()) + len(documents)
        if self._queue and self._queued_tokens + num_tokens > self._max_queued_tokens:
            raise QueueFullError(self._queued_tokens, self._max_queued_tokens)
        waiting = _Waiting(documents, num_tokens, asyncio.get_running_loop().create_future(), clock)
        self._queue.append(waiting)
        self._queued_tokens += num_tokens
        self._arrived.set()
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            self._forget(waiting)
            raise

    async def close(self) -> None:
        """Finish the pass that is running; requests that still wait are cancelled."""
        self._is_closing = True
        self._arrived.set()
        await asyncio.gather(self._task, return_exceptions=True)
        for waiting in list(self._queue):
            waiting.answer.cancel()
        self._executor.shutdown(wait=True)

    def _forget(self, waiting: _Waiting) -> None:
        """Make room at once where a caller went away before its turn."""
        if waiting in self._queue:
            self._queue.remove(waiting)
            self._queued_tokens -= waiting.num_tokens

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if self._is_closing:
                return
            batch = self._gather()
            if not batch:
                self._arrived.clear()
                continue
            documents = concat_documents([waiting.documents for waiting in batch])
            self._pass_began = time.perf_counter()
            try:
                scores = await loop.run_in_executor(self._executor, self._score, documents)
            except Exception as error:  # noqa: BLE001  one bad pass must not end the loop: its requests are told
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                continue
            finally:
                began, seconds = self._pass_began, time.perf_counter() - self._pass_began
                self._busy_seconds, self._pass_began = self._busy_seconds + seconds, 0.0
            for waiting in batch:
                if waiting.clock is not None:
                    waiting.clock.queue, waiting.clock.inference = began - waiting.since, seconds
            self._on_pass(sum(waiting.num_tokens for waiting in batch), seconds)
            _answer(batch, scores)

    def _gather(self) -> list[_Waiting]:
        """Requests in order of arrival, up to batch_tokens but at least one; single texts and pairs apart."""
        batch: list[_Waiting] = []
        tokens = 0
        while self._queue:
            first = self._queue[0]
            is_other_form = bool(batch) and batch[0].documents.is_pair != first.documents.is_pair
            if batch and (tokens + first.num_tokens > self._batch_tokens or is_other_form):
                break
            self._queue.popleft()
            self._queued_tokens -= first.num_tokens
            if not first.answer.done():  # done: its caller went away
                batch.append(first)
                tokens += first.num_tokens
        return batch


def _answer(batch: list[_Waiting], scores: DocumentScores) -> None:
    start = 0
    for waiting in batch:
        stop = start + len(waiting.documents)
        if not waiting.answer.done():
            waiting.answer.set_result(scores.part(start, stop))
        start = stop
