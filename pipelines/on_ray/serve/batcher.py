"""Coalesce concurrent requests into forward passes: gather while the model is busy, go at once when it is idle.

A request waits only for the pass that is running, never for a timer. What is shared out are windows, so that a long
document does not keep short ones waiting, and a pass holds what the model does in PASS_SECONDS. Knows windows and who
computes their logits; no HTTP, no Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.scoring import DocumentScores
from pipelines.tokenization import CutDocuments, Documents, concat_documents

PASS_SECONDS = 0.2
"""Of forward pass at most, as far as the passes before tell: what a short request may have to wait for."""


class QueueFullError(Exception):
    """More tokens wait than may."""

    def __init__(self, queued: int, limit: int) -> None:
        super().__init__(f"{queued:,} tokens are waiting and at most {limit:,} may; try again later")


class WindowScorer(Protocol):
    """What the batcher needs of a `Scorer`."""

    def cut(self, documents: Documents) -> CutDocuments:
        """The windows of documents."""

    def window_logits(self, cut: CutDocuments, index_W: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of some windows, in the order given."""

    def merge(self, documents: Documents, cut: CutDocuments, logits_WL: NDArray[np.float32]) -> DocumentScores:
        """Scores of documents from the logits of all their windows."""


class Clock(Protocol):
    """Where a request's waiting and the passes that answered it are noted, in seconds."""

    queue: float
    inference: float


@dataclass(eq=False)
class _Waiting:
    """A request, and how far it is."""

    documents: Documents
    cut: CutDocuments
    answer: asyncio.Future[DocumentScores]
    clock: Clock | None
    lengths: list[int]
    """Tokens of each window."""
    taken: int = 0
    """Windows that are, or have been, in a pass."""
    tokens_left: int = 0
    """Of the windows that are not."""
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    inference: float = 0.0
    since: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class _Share:
    """Windows [first, last) of a request, in a pass."""

    waiting: _Waiting
    first: int
    last: int


class Batcher:
    """A queue of tokenized requests in front of one model. Lives on one event loop."""

    def __init__(
        self,
        scorer: WindowScorer,
        executor: ThreadPoolExecutor,
        *,
        batch_tokens: int,
        max_queued_tokens: int,
        on_pass: Callable[[int, float], None] = lambda num_tokens, seconds: None,
    ) -> None:
        """The executor has the one thread that computes, and ends with the batcher.

        batch_tokens is the most that a pass holds; on_pass hears of every pass: tokens and seconds.
        """
        self._scorer, self._executor, self._on_pass = scorer, executor, on_pass
        self._batch_tokens, self._max_queued_tokens = batch_tokens, max_queued_tokens
        self._tokens_per_second: float | None = None
        self._busy_seconds, self._pass_began = 0.0, 0.0
        self._queue: list[_Waiting] = []
        self._queued_tokens = 0
        self._takes_pairs = True
        self._is_closing = False
        self._arrived = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def queued_tokens(self) -> int:
        """Tokens, of windows, that wait for a forward pass."""
        return self._queued_tokens

    @property
    def busy_seconds(self) -> float:
        """Time so far in which a forward pass ran."""
        return self._busy_seconds + (time.perf_counter() - self._pass_began if self._pass_began else 0.0)

    @property
    def is_alive(self) -> bool:
        """Whether anything will still be answered."""
        return not self._task.done()

    def check_room(self, num_tokens: int) -> None:
        """Raise QueueFullError where a request of so many tokens, or of more, would be refused."""
        if self._queue and self._queued_tokens + self._counted(num_tokens) > self._max_queued_tokens:
            raise QueueFullError(self._queued_tokens, self._max_queued_tokens)

    async def submit(self, documents: Documents, clock: Clock | None = None) -> DocumentScores:
        """Scores of one request's documents. Raises QueueFullError, or what a forward pass raised.

        A caller that is cancelled while it waits is dropped before its turn.
        """
        cut = self._scorer.cut(documents)
        lengths = cut.length_W.tolist()
        num_tokens = sum(lengths)
        if not lengths:
            return self._scorer.merge(documents, cut, self._scorer.window_logits(cut, np.arange(0)))
        self.check_room(num_tokens)
        answer: asyncio.Future[DocumentScores] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(documents, cut, answer, clock, lengths, tokens_left=num_tokens)
        self._queue.append(waiting)
        self._queued_tokens += self._counted(num_tokens)
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
        for waiting in self._queue:
            waiting.answer.cancel()
        self._executor.shutdown(wait=True)

    def _counted(self, num_tokens: int) -> int:
        """What a request counts in the queue: half of it at most, so that one alone does not shut out all others."""
        return min(num_tokens, self._max_queued_tokens // 2)

    def _forget(self, waiting: _Waiting) -> None:
        """Make room at once where a caller went away, or was told of an error."""
        if waiting in self._queue:
            self._queue.remove(waiting)
            self._queued_tokens -= self._counted(waiting.tokens_left)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if self._is_closing:
                return
            shares = self._gather()
            if not shares:
                self._arrived.clear()
                continue
            self._pass_began = time.perf_counter()
            try:
                scores = await loop.run_in_executor(self._executor, self._compute, shares)
            except Exception as error:  # noqa: BLE001  one bad pass must not end the loop: its requests are told
                for share in shares:
                    self._forget(share.waiting)
                    if not share.waiting.answer.done():
                        share.waiting.answer.set_exception(error)
                continue
            finally:
                seconds = time.perf_counter() - self._pass_began
                self._busy_seconds, self._pass_began = self._busy_seconds + seconds, 0.0
            self._end(shares, scores, seconds)

    def _gather(self) -> list[_Share]:
        """Half of a pass, and one window at least, for who waits longest, the rest for who has least left.

        Single texts and pairs take turns.
        """
        for waiting in [waiting for waiting in self._queue if waiting.answer.done()]:
            self._forget(waiting)  # its caller went away, and has not had its turn to say so
        if not self._queue:
            return []
        alike = [waiting for waiting in self._queue if waiting.documents.is_pair != self._takes_pairs] or self._queue
        self._takes_pairs = alike[0].documents.is_pair
        room = self._batch_tokens
        if self._tokens_per_second is not None:
            room = min(room, max(int(self._tokens_per_second * PASS_SECONDS), 1))
        ends: dict[_Waiting, int] = {}
        least_left = sorted(alike, key=lambda waiting: waiting.tokens_left)
        for order, kept_back in ((alike, room // 2), (least_left, 0)):
            for waiting in order:
                end = ends.get(waiting, waiting.taken)
                while end < len(waiting.lengths) and (waiting.lengths[end] <= room - kept_back or not ends):
                    room -= waiting.lengths[end]
                    end += 1
                    ends[waiting] = end
                if room <= kept_back:
                    break
        return [self._take(waiting, end) for waiting, end in ends.items()]

    def _take(self, waiting: _Waiting, end: int) -> _Share:
        """Windows of a request up to an end leave the queue, and the request with the last of them."""
        share = _Share(waiting, waiting.taken, end)
        tokens = sum(waiting.lengths[share.first : end])
        before = self._counted(waiting.tokens_left)
        waiting.taken, waiting.tokens_left = end, waiting.tokens_left - tokens
        self._queued_tokens -= before - self._counted(waiting.tokens_left)
        if end == len(waiting.lengths):
            self._queue.remove(waiting)
        return share

    def _compute(self, shares: Sequence[_Share]) -> list[DocumentScores | None]:
        """One pass, in the executor's thread: the scores of the requests that it finishes."""
        starts = np.cumsum([0, *(len(share.waiting.lengths) for share in shares)])
        index_W = np.concatenate(
            [np.arange(share.first, share.last) + start for share, start in zip(shares, starts, strict=False)]
        )
        together = self._scorer.cut(concat_documents([share.waiting.documents for share in shares]))
        logits_WL = self._scorer.window_logits(together, index_W)
        scores: list[DocumentScores | None] = []
        begin = 0
        for share in shares:
            waiting, end = share.waiting, begin + share.last - share.first
            waiting.logits.append(logits_WL[begin:end])
            begin = end
            is_finished = share.last == len(waiting.lengths)
            scores.append(
                self._scorer.merge(waiting.documents, waiting.cut, np.concatenate(waiting.logits))
                if is_finished
                else None
            )
        return scores

    def _end(self, shares: Sequence[_Share], scores: Sequence[DocumentScores | None], seconds: float) -> None:
        """A pass is over: note how long it took, and answer the requests that it finished."""
        num_tokens = sum(sum(share.waiting.lengths[share.first : share.last]) for share in shares)
        rate = num_tokens / max(seconds, 1e-6)
        self._tokens_per_second = rate if self._tokens_per_second is None else (self._tokens_per_second + rate) / 2
        self._on_pass(num_tokens, seconds)
        for share, found in zip(shares, scores, strict=True):
            waiting = share.waiting
            waiting.inference += seconds
            if found is None or waiting.answer.done():
                continue
            if waiting.clock is not None:
                waiting.clock.inference = waiting.inference
                waiting.clock.queue = max(time.perf_counter() - waiting.since - waiting.inference, 0.0)
            waiting.answer.set_result(found)
