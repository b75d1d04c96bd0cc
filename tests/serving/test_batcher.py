import asyncio
import contextlib
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipelines.model.scorer import DocumentScores
from pipelines.serving.batcher import Batcher, QueueFullError, TooLongError
from pipelines.serving.rate import Rate
from pipelines.serving.timings import Timings
from pipelines.text.template import Template
from pipelines.text.tokenization import Documents, Tokens, cut_documents, offsets_of
from pipelines.text.windows import WindowPlan

PLAN = WindowPlan(12, 10, 10)


def documents(*lengths, start=0):
    lengths = np.array(lengths, dtype=np.int64)
    ids = np.arange(start, start + lengths.sum(), dtype=np.int32)
    return Documents(Tokens(ids, offsets_of(lengths)), None, [None] * len(lengths))


class Model:
    """A fake scorer. The logit of a window is the first token id of its document."""

    def cut(self, batch):
        return cut_documents(batch.tokens, PLAN, Template((2,), (3,)), batch.pair_tokens)

    def window_logits(self, cut, index_W):
        document_W = cut.windows.document_W[index_W]
        return cut.tokens.ids[cut.tokens.offsets[document_W]].astype(np.float32)[:, None]

    def merge(self, batch, cut, logits_WL, reading=None):
        offsets = cut.windows.offsets
        assert len(logits_WL) == offsets[-1], "every window has exactly one logit"
        return DocumentScores(logits_WL[offsets[:-1]], None, cut.windows, logits_WL, logits_WL, batch.num_tokens_D,
                              list(batch.errors))  # fmt: skip


class Slow(Model):
    """Waits for `release` before it scores. Records the first document id of each window in each pass."""

    def __init__(self):
        self.release = threading.Semaphore(0)
        self.passes = []

    def window_logits(self, cut, index_W):
        logits_WL = super().window_logits(cut, index_W)
        self.passes.append(logits_WL[:, 0].astype(int).tolist())
        assert self.release.acquire(timeout=10)
        if -1 in cut.tokens.ids:
            raise ValueError("a bad batch")
        return logits_WL


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Disables the time limit of passes. Only batch_tokens limits their size."""
    monkeypatch.setattr("pipelines.serving.batcher.PASS_SECONDS", 1e9)


def in_loop(test):
    """Run an async test in an event loop of its own, for at most 20 seconds."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 20))

    return run


@contextlib.asynccontextmanager
async def batching(model, *, batch_tokens, max_queued_tokens=100_000, rate=None):
    """A batcher, which is closed at the end."""
    batcher = Batcher(
        model, ThreadPoolExecutor(1), batch_tokens=batch_tokens, max_queued_tokens=max_queued_tokens, rate=rate
    )
    try:
        yield batcher
    finally:
        if isinstance(model, Slow):
            model.release.release(1000)  # also if the test failed
        await batcher.close()


async def settle():
    for _ in range(20):
        await asyncio.sleep(0.005)


@in_loop
async def test_requests_are_batched_while_model_is_busy():
    model = Slow()
    async with batching(model, batch_tokens=1000, max_queued_tokens=10_000) as batcher:
        tasks = [asyncio.create_task(batcher.submit(documents(3, 25)))]
        await settle()
        tasks += [asyncio.create_task(batcher.submit(documents(3, 25, start=100 * n))) for n in range(1, 6)]
        await settle()
        assert model.passes == [[0, 3, 3, 3]], "the first request runs immediately and alone"
        model.release.release(6)
        for n, task in enumerate(tasks):
            scores = await task
            assert scores.scores_DL[:, 0].tolist() == [100 * n, 100 * n + 3]
            assert scores.num_windows_D.tolist() == [1, 3]
        assert len(model.passes) == 2, "the other requests share one pass"
        assert len(model.passes[1]) == 20


@in_loop
async def test_pass_token_limit():
    for batch_tokens, most in ((50, 4), (5, 1)):
        model = Slow()
        model.release.release(100)
        async with batching(model, batch_tokens=batch_tokens, max_queued_tokens=10_000) as batcher:
            await asyncio.gather(*(batcher.submit(documents(30)) for _ in range(5)), batcher.submit(documents(300)))
            assert max(map(len, model.passes)) == most
            assert sum(map(len, model.passes)) == 5 * 3 + 30
            assert batcher.queued_tokens == 0


@in_loop
async def test_long_document_does_not_block_short_ones():
    model = Slow()
    async with batching(model, batch_tokens=50, max_queued_tokens=100_000) as batcher:
        long = asyncio.create_task(batcher.submit(documents(4000, start=100_000)))
        await settle()
        short = [asyncio.create_task(batcher.submit(documents(10, start=20 * n))) for n in range(8)]
        await settle()
        for _ in range(5):
            model.release.release()
            await settle()
        assert all(task.done() for task in short), "short documents get half of each later pass"
        assert not long.done()
        assert all(windows.count(100_000) >= 2 for windows in model.passes), "the long document also advances"
        model.release.release(1000)
        assert (await long).scores_DL.item() == 100_000


@in_loop
async def test_pass_size_follows_pass_time(monkeypatch):
    monkeypatch.setattr("pipelines.serving.batcher.PASS_SECONDS", 0.2)

    class Timed(Slow):
        def window_logits(self, cut, index_W):
            time.sleep(0.01 * len(index_W))
            return super().window_logits(cut, index_W)

    model = Timed()
    model.release.release(1000)
    async with batching(model, batch_tokens=100_000, max_queued_tokens=100_000) as batcher:
        await batcher.submit(documents(10))
        await batcher.submit(documents(1000))
        assert len(model.passes[0]) == 1
        assert 10 <= len(model.passes[1]) <= 20, "about 20 windows in 0.2 s"


@in_loop
async def test_empty_request_is_answered():
    model = Slow()
    async with batching(model, batch_tokens=50, max_queued_tokens=100) as batcher:
        model.release.release()
        assert (await batcher.submit(documents())).scores_DL.shape == (0, 1)
        assert batcher.queued_tokens == 0


@in_loop
async def test_cancelled_requests_leave_no_queued_tokens():
    model = Model()
    async with batching(model, batch_tokens=30, max_queued_tokens=1_000_000) as batcher:
        random = np.random.default_rng(0)
        for _ in range(200):
            tasks = [asyncio.create_task(batcher.submit(documents(int(n)))) for n in random.integers(1, 60, 8)]
            for _ in range(int(random.integers(0, 6))):
                await asyncio.sleep(0)
            for number in random.permutation(8)[:5]:
                tasks[number].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.submit(documents(1))
        assert batcher.queued_tokens == 0
        assert batcher.is_alive


@in_loop
async def test_large_request_leaves_queue_room():
    model = Slow()
    async with batching(model, batch_tokens=20, max_queued_tokens=200) as batcher:
        large = asyncio.create_task(batcher.submit(documents(3000)))
        await settle()
        assert batcher.queued_tokens == 100
        small = asyncio.create_task(batcher.submit(documents(60)))
        await settle()
        with pytest.raises(QueueFullError):
            await batcher.submit(documents(60))
        model.release.release(1000)
        await asyncio.gather(large, small)
        assert batcher.queued_tokens == 0


@in_loop
async def test_singles_and_pairs_alternate():
    model = Slow()
    async with batching(model, batch_tokens=40, max_queued_tokens=10_000) as batcher:
        singles = documents(100, start=1000)
        pairs = Documents(documents(3, start=5).tokens, documents(60).tokens, [None])
        tasks = [asyncio.create_task(batcher.submit(some)) for some in (singles, pairs)]
        await settle()
        model.release.release(3)
        await settle()
        assert [windows[0] for windows in model.passes[:4]] == [1000, 5, 1000, 5]
        model.release.release(100)
        await asyncio.gather(*tasks)


@in_loop
async def test_failed_batch_raises_and_next_works():
    model = Slow()
    model.release.release(100)
    async with batching(model, batch_tokens=50, max_queued_tokens=10_000) as batcher:
        with pytest.raises(ValueError, match="a bad batch"):
            await batcher.submit(documents(3, start=-1))
        assert (await batcher.submit(documents(3, start=7))).scores_DL.item() == 7
        assert batcher.is_alive
        await batcher.close()
        assert not batcher.is_alive


@in_loop
async def test_queue_limit_and_cancelled_requests():
    model = Slow()
    async with batching(model, batch_tokens=100, max_queued_tokens=120) as batcher:
        running = asyncio.create_task(batcher.submit(documents(5)))
        await settle()
        waiting = [asyncio.create_task(batcher.submit(documents(40, start=n))) for n in (0, 50)]
        await settle()
        with pytest.raises(QueueFullError, match="96 tokens are waiting, and the limit is max_queued_tokens=120"):
            await batcher.submit(documents(40))
        waiting[0].cancel()
        await settle()
        assert batcher.queued_tokens == 48, "a cancelled request frees its tokens immediately"
        model.release.release(100)
        await running
        assert (await waiting[1]).scores_DL.item() == 50
        assert [set(windows) for windows in model.passes] == [{0}, {50}], "the cancelled request is never scored"
        assert batcher.queued_tokens == 0


@in_loop
async def test_close_finishes_running_pass():
    model = Slow()
    async with batching(model, batch_tokens=10, max_queued_tokens=100) as batcher:
        running = asyncio.create_task(batcher.submit(documents(5)))
        await settle()
        waiting = asyncio.create_task(batcher.submit(documents(5)))
        closing = asyncio.create_task(batcher.close())
        await settle()
        model.release.release(100)
        await closing
        assert (await running).scores_DL.shape == (1, 1)
        with pytest.raises(asyncio.CancelledError):
            await waiting


@in_loop
async def test_what_comes_too_late_is_refused_before_work():
    model = Slow()
    async with batching(model, batch_tokens=10**6, max_queued_tokens=10**6, rate=Rate(100.0)) as batcher:
        running = asyncio.create_task(batcher.submit(documents(5)))
        await settle()
        with pytest.raises(TooLongError, match=r"1,200 tokens take about 12 s .*100 tokens per second"):
            await batcher.submit(documents(1000), within(10))
        long = asyncio.create_task(batcher.submit(documents(500), within(10)))  # 600 tokens with the special ones
        await settle()
        with pytest.raises(QueueFullError, match="about 12 s, because 600 tokens are waiting") as refused:
            await batcher.submit(documents(500, start=500), within(10))
        assert refused.value.seconds == pytest.approx(2, abs=0.1)
        short = asyncio.create_task(batcher.submit(documents(10), within(1)))  # it does not wait for the long one
        patient = asyncio.create_task(batcher.submit(documents(5000)))
        await settle()
        model.release.release(1000)
        await asyncio.gather(running, long, short, patient)


def within(seconds):
    timings = Timings()
    timings.deadline = timings.started + seconds
    return timings


def test_rate_believes_long_passes_and_fast_ones():
    rate = Rate()
    assert rate.seconds(10**9) == 0
    rate.add(100, 0.01)
    assert rate.tokens_per_second == pytest.approx(10_000)
    rate.add(5, 0.005)
    assert rate.tokens_per_second == pytest.approx(10_000), "a short pass says nothing about long ones"
    rate.add(3000, 0.2)
    assert rate.tokens_per_second == pytest.approx(15_000)
    rate.add(1000, 0.2)
    assert rate.tokens_per_second == pytest.approx(10_000)
    assert rate.seconds(1000) == pytest.approx(0.1)
