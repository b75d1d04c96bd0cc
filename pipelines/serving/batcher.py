"""Combine concurrent requests into forward passes.

Requests are collected while the model is busy. When the model is idle, a forward pass starts at once: no request waits
for a timer. A pass takes windows rather than whole requests, so that a long document does not block short ones. A pass
takes as many tokens as the model processes in about PASS_SECONDS, or more if most of that is fixed. Imports no Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.serving.rate import Rate
from pipelines.text.tokenization import CutDocuments, Documents, concat_documents

if TYPE_CHECKING:
    from pipelines.decisions.early_exit import Reading
    from pipelines.model.scorer import DocumentScores
    from pipelines.settings import DecisionSettings

PASS_SECONDS = 0.2
"""Target duration of a forward pass, estimated from earlier passes. A short request may have to wait this long."""


class QueueFullError(Exception):
    """Too much waits already. A later try can succeed."""

    def __init__(self, message: str, seconds: float = 1.0) -> None:
        super().__init__(f"{message}; try again later")
        self.seconds = seconds
        """Estimated seconds until there is room."""


class TooLongError(Exception):
    """A request takes longer than its client or the server waits, even alone."""


class WindowScorer(Protocol):
    """The methods of `Scorer` that the batcher uses."""

    def cut(self, documents: Documents) -> CutDocuments:
        """Cut documents into windows."""

    def window_logits(self, cut: CutDocuments, index_W: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits of some windows, in the order of index_W."""

    def reading(self, cut: CutDocuments, decision: DecisionSettings) -> Reading | None:
        """Begin to read documents until their labels under a decision are sure. None: all windows are read."""

    def merge(
        self,
        documents: Documents,
        cut: CutDocuments,
        logits_WL: NDArray[np.float32],
        reading: Reading | None = None,
    ) -> DocumentScores:
        """Return the scores of documents, from the logits of all their windows, or of those that count."""


class Clock(Protocol):
    """Receives the times of a request, in seconds: waiting in the queue, and in its forward passes."""

    queue: float
    inference: float

    @property
    def left(self) -> float:
        """Seconds until the deadline of the request."""


@dataclass(eq=False)
class _Waiting:
    """A request in the queue, and its progress."""

    documents: Documents
    cut: CutDocuments
    answer: asyncio.Future[DocumentScores]
    clock: Clock | None
    reading: Reading | None
    """With early exit: which windows are needed. Without: None, and all windows are."""
    index: list[int]
    """Windows that are needed, as far as this is known, in the order in which they are taken."""
    lengths: list[int]
    """Tokens of each of them."""
    taken: int = 0
    """Number of windows that are in a forward pass now, or were in an earlier one."""
    tokens_left: int = 0
    """Tokens of the other windows, needed or not."""
    read: int = 0
    """Number of windows whose logits `reading` has."""
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    inference: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def needs_more(self) -> bool:
        """Return whether windows are left to score, after a pass. `reading` may now know more of them, or stop."""
        if self.reading is not None and self.taken == len(self.index):
            new = np.concatenate(self.logits)[self.read :]
            self.reading.add(np.asarray(self.index[self.read :], np.int64), new)
            self.read = len(self.index)
            self._add(self.reading.next_windows())
        return self.taken < len(self.index)

    def _add(self, index_W: NDArray[np.int64]) -> None:
        self.index += index_W.tolist()
        self.lengths += self.cut.length_W[index_W].tolist()

    @property
    def all_logits_WL(self) -> NDArray[np.float32]:
        """Logits of all windows, and 0 for windows that were not needed."""
        found = np.concatenate(self.logits)
        logits_WL = np.zeros((len(self.cut.length_W), found.shape[1]), np.float32)
        logits_WL[self.index] = found
        return logits_WL


@dataclass(frozen=True)
class _Share:
    """Windows [first, last) of a request, which are in one forward pass."""

    waiting: _Waiting
    first: int
    last: int


class Batcher:
    """A queue of tokenized requests in front of one model. Belongs to one event loop."""

    def __init__(
        self,
        scorer: WindowScorer,
        executor: ThreadPoolExecutor,
        *,
        batch_tokens: int,
        max_queued_tokens: int,
        rate: Rate | None = None,
        on_pass: Callable[[int, float], None] = lambda num_tokens, seconds: None,
    ) -> None:
        """Start the batcher on the running event loop.

        Args:
            scorer: Computes the scores.
            executor: Runs the forward passes in its only thread. `close` shuts it down.
            batch_tokens: Maximum number of tokens in a forward pass. A longer window has a pass of its own.
            max_queued_tokens: Maximum number of tokens that wait. See `submit`.
            rate: What is known of the model's speed.
            on_pass: Called after every forward pass with its number of tokens and its seconds.
        """
        self._scorer, self._executor, self._on_pass = scorer, executor, on_pass
        self._batch_tokens, self._max_queued_tokens = batch_tokens, max_queued_tokens
        self._rate = rate or Rate()
        self._busy_seconds, self._pass_began = 0.0, 0.0
        self._queue: list[_Waiting] = []
        self._queued_tokens = 0
        self._takes_pairs = True
        self._is_closing = False
        self._arrived = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def queued_tokens(self) -> int:
        """Tokens of all windows that wait for a forward pass, where each request counts as in `_counted`."""
        return self._queued_tokens

    @property
    def busy_seconds(self) -> float:
        """Seconds spent in forward passes so far, including the current one."""
        return self._busy_seconds + (time.perf_counter() - self._pass_began if self._pass_began else 0.0)

    @property
    def is_alive(self) -> bool:
        """Whether the batcher still answers requests."""
        return not self._task.done()

    def check_room(self, num_tokens: int) -> None:
        """Check that the queue has room for a request of this many tokens.

        Raises:
            QueueFullError: `submit` would reject such a request.
        """
        if self._queue and self._queued_tokens + self._counted(num_tokens) > self._max_queued_tokens:
            waiting, most = self._queued_tokens, self._max_queued_tokens
            problem = f"{waiting:,} tokens are waiting, and the limit is max_queued_tokens={most:,}"
            raise QueueFullError(problem, self._rate.seconds(waiting))

    def check_time(self, num_tokens: int, seconds_left: float) -> None:
        """Check, before any work, that a request of this many tokens can be answered in time.

        Half of each pass goes to the requests with the fewest tokens left, so a request waits at most for twice the
        tokens of the shorter ones, and at most for all tokens.

        Raises:
            TooLongError: It would take longer even alone.
            QueueFullError: It would take longer because of the requests that wait.
        """
        alone = self._rate.seconds(num_tokens)
        if alone > seconds_left:
            per_second = self._rate.tokens_per_second
            raise TooLongError(
                f"{num_tokens:,} tokens take about {alone:.3g} s on this server ({per_second:,.0f} tokens per second)"
            )
        shorter = sum(waiting.tokens_left for waiting in self._queue if waiting.tokens_left <= num_tokens)
        all_tokens = sum(waiting.tokens_left for waiting in self._queue)
        seconds = self._rate.seconds(min(all_tokens + num_tokens, 2 * (shorter + num_tokens)))
        if self._queue and seconds > seconds_left:
            problem = f"this request would take about {seconds:.3g} s, because {all_tokens:,} tokens are waiting"
            raise QueueFullError(problem, seconds - seconds_left)

    async def submit(
        self, documents: Documents, clock: Clock | None = None, *, decision: DecisionSettings | None = None
    ) -> DocumentScores:
        """Return the scores of the documents of one request.

        A request leaves the queue if its caller is cancelled.

        Args:
            documents: Tokenized texts or pairs.
            clock: Receives the times of the request.
            decision: The decision for which documents may stop early. None reads all windows.

        Raises:
            QueueFullError: The queue has no room for the tokens of the request, or its answer would come too late.
            TooLongError: Its answer would come too late even if nothing else waited.
            Exception: Any exception of a forward pass with this request.
        """
        cut = self._scorer.cut(documents)
        num_tokens = int(cut.length_W.sum())
        if not len(cut.length_W):
            return self._scorer.merge(documents, cut, self._scorer.window_logits(cut, np.arange(0)))
        self.check_room(num_tokens)
        answer: asyncio.Future[DocumentScores] = asyncio.get_running_loop().create_future()
        reading = None if decision is None else self._scorer.reading(cut, decision)
        index_W = np.arange(len(cut.length_W)) if reading is None else reading.next_windows()
        lengths = cut.length_W[index_W].tolist()
        if clock is not None:
            self.check_time(sum(lengths), clock.left)
        waiting = _Waiting(documents, cut, answer, clock, reading, index_W.tolist(), lengths, tokens_left=num_tokens)
        self._queue.append(waiting)
        self._queued_tokens += self._counted(num_tokens)
        self._arrived.set()
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            self._forget(waiting)
            raise

    async def close(self) -> None:
        """Finish the current forward pass, and cancel all requests that still wait."""
        self._is_closing = True
        self._arrived.set()
        await asyncio.gather(self._task, return_exceptions=True)
        for waiting in self._queue:
            waiting.answer.cancel()
        self._executor.shutdown(wait=True)

    def _counted(self, num_tokens: int) -> int:
        """Return the tokens for which a request counts in the queue: at most half of the limit.

        Otherwise, a single large request could block all others.
        """
        return min(num_tokens, self._max_queued_tokens // 2)

    def _forget(self, waiting: _Waiting) -> None:
        """Remove a request from the queue, because its caller was cancelled or has received an error."""
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
            except Exception as error:  # noqa: BLE001  a failed pass must not end the loop: its requests get the error
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
        """Choose the windows of the next forward pass.

        Half of the pass, and at least one window, goes to the requests that have waited longest. The other half goes to
        the requests with the fewest tokens left. A pass has only single texts or only pairs; the two kinds alternate.
        """
        for waiting in [waiting for waiting in self._queue if waiting.answer.done()]:
            self._forget(waiting)  # its caller was cancelled, but `submit` has not run since then
        if not self._queue:
            return []
        alike = [waiting for waiting in self._queue if waiting.documents.is_pair != self._takes_pairs] or self._queue
        self._takes_pairs = alike[0].documents.is_pair
        room = int(min(self._batch_tokens, self._rate.pass_tokens(PASS_SECONDS)))
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
        """Take the windows of a request up to end. After its last window, the request leaves the queue.

        With early exit, it stays until it is known that no more windows are needed (`_end`).
        """
        share = _Share(waiting, waiting.taken, end)
        tokens = sum(waiting.lengths[share.first : end])
        before = self._counted(waiting.tokens_left)
        waiting.taken, waiting.tokens_left = end, waiting.tokens_left - tokens
        self._queued_tokens -= before - self._counted(waiting.tokens_left)
        if end == len(waiting.lengths) and waiting.reading is None:
            self._queue.remove(waiting)
        return share

    def _compute(self, shares: Sequence[_Share]) -> list[DocumentScores | None]:
        """Run one forward pass, in the executor's thread.

        Returns:
            The scores of each share's request, or None if the request has windows left.
        """
        starts = np.cumsum([0, *(len(share.waiting.cut.length_W) for share in shares)])
        index_W = np.concatenate(
            [
                np.asarray(share.waiting.index[share.first : share.last], np.int64) + start
                for share, start in zip(shares, starts, strict=False)
            ]
        )
        together = self._scorer.cut(concat_documents([share.waiting.documents for share in shares]))
        logits_WL = self._scorer.window_logits(together, index_W)
        scores: list[DocumentScores | None] = []
        begin = 0
        for share in shares:
            waiting, end = share.waiting, begin + share.last - share.first
            waiting.logits.append(logits_WL[begin:end])
            begin = end
            scores.append(
                None
                if waiting.needs_more()
                else self._scorer.merge(waiting.documents, waiting.cut, waiting.all_logits_WL, waiting.reading)
            )
        return scores

    def _end(self, shares: Sequence[_Share], scores: Sequence[DocumentScores | None], seconds: float) -> None:
        """After a forward pass, update the rate and the times, and answer the requests that are complete."""
        num_tokens = sum(sum(share.waiting.lengths[share.first : share.last]) for share in shares)
        self._rate.add(num_tokens, seconds)
        self._on_pass(num_tokens, seconds)
        for share, found in zip(shares, scores, strict=True):
            waiting = share.waiting
            waiting.inference += seconds
            if found is None or waiting.answer.done():
                continue
            self._forget(waiting)
            if waiting.clock is not None:
                waiting.clock.inference = waiting.inference
                waiting.clock.queue = max(time.perf_counter() - waiting.since - waiting.inference, 0.0)
            waiting.answer.set_result(found)
