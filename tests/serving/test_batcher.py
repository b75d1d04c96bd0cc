import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipelines.model.scorer import DocumentScores
from pipelines.serving.batcher import Batcher, QueueFullError
from pipelines.text.tokenization import Documents, Template, Tokens, cut_documents, offsets_of
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

    def merge(self, batch, cut, logits_WL):
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


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario(), 20))


async def settle():
    for _ in range(20):
        await asyncio.sleep(0.005)


def test_requests_are_batched_while_model_is_busy():
    async def scenario():
        model = Slow()
        batcher = Batcher(model, ThreadPoolExecutor(1), batch_tokens=1000, max_queued_tokens=10_000)
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
        await batcher.close()

    run(scenario)


def test_pass_token_limit():
    async def scenario():
        for batch_tokens, most in ((50, 4), (5, 1)):
            model = Slow()
            model.release.release(100)
            batcher = Batcher(model, ThreadPoolExecutor(1), batch_tokens=batch_tokens, max_queued_tokens=10_000)
            await asyncio.gather(*(batcher.submit(documents(30)) for _ in range(5)), batcher.submit(documents(300)))
            assert max(map(len, model.passes)) == most
            assert sum(map(len, model.passes)) == 5 * 3 + 30
            assert batcher.queued_tokens == 0
            await batcher.close()

    run(scenario)


def test_long_document_does_not_block_short_ones():
    async def scenario():
        model = Slow()
        batcher = Batcher(model, ThreadPoolExecutor(1), batch_tokens=50, max_queued_tokens=100_000)
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
        await batcher.close()

    run(scenario)


def test_pass_size_follows_pass_time(monkeypatch):
    monkeypatch.setattr("pipelines.serving.batcher.PASS_SECONDS", 0.2)

    class Timed(Slow):
        def window_logits(self, cut, index_W):
            time.sleep(0.01 * len(index_W))
            return super().window_logits(cut, index_W)

    async def scenario():
        model = Timed()
        model.release.release(1000)
        batcher = Batcher(model, ThreadPoolExecutor(1), batch_tokens=100_000, max_queued_tokens=100_000)
        await batcher.submit(documents(10))
        await batcher.submit(documents(1000))
        assert len(model.passes[0]) == 1
        assert 10 <= len(model.passes[1]) <= 20, "about 20 windows in 0.2 s"
        await batcher.close()

    run(scenario)


def test_empty_request_is_answered():
    async def scenario():
        model = Slow()
        batcher = Batcher(model, ThreadPoolExecutor(1), batch_tokens=50, max_queued_tokens=100)
        model.release.release()
        assert (await batcher.submit(documents())).scores_DL.shape == (0, 1)
        assert batcher.queued_tokens == 0
        await batcher.close()

    run(scenario)


def test_cancelled_requests_leave_no_queued_tokens():
    async def scenario():
        model = Model()
        batcher = Batcher(model, ThreadPoolExecutor(1), batch_tokens=30, max_queued_tokens=1_000_000)
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
        await batcher.close()

    run(scenario)


def test_large_request_leaves_queue_room():
    async def scenario():
        model = Slow()
        batcher = Batcher(model, ThreadPoolExecutor(1), batch_tokens=20, max_queued_tokens=200)
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
        await batcher.close()

    run(scenario)


def test_singles_and_pairs_alternate():
    async def scenario():
        model = Slow()
        batcher = Batcher(model, ThreadPoolExecutor(1), batch_tokens=40, max_queued_tokens=10_000)
        singles = documents(100, start=1000)
        pairs = Documents(documents(3, start=5).tokens, documents(60).tokens, [None])
        tasks = [asyncio.create_task(batcher.submit(some)) for some in (singles, pairs)]
        await settle()
        model.release.release(3)
        await settle()
        assert [windows[0] for windows in model.passes[:4]] == [1000, 5, 1000, 5]
        model.release.release(100)
        await asyncio.gather(*tasks)
        await batcher.close()

    run(scenario)


def test_failed_batch_raises_and_next_works():
    async def scenario():
        model = Slow()
        model.release.release(100)
        batcher = Batcher(model, ThreadPoolExecutor(1), batch_tokens=50, max_queued_tokens=10_000)
        with pytest.raises(ValueError, match="a bad batch"):
            await batcher.submit(documents(3, start=-1))
        assert (await batcher.submit(documents(3, start=7))).scores_DL.item() == 7
        assert batcher.is_alive
        await batcher.close()
        assert not batcher.is_alive

    run(scenario)


def test_queue_limit_and_cancelled_requests():
    async def scenario():
        model = Slow()
        batcher = Batcher(model, ThreadPoolExecutor(1), batch_tokens=100, max_queued_tokens=120)
        running = asyncio.create_task(batcher.submit(documents(5)))
        await settle()
        waiting = [asyncio.create_task(batcher.submit(documents(40, start=n))) for n in (0, 50)]
        await settle()
        with pytest.raises(QueueFullError, match="96 tokens are waiting, and the limit is 120"):
            await batcher.submit(documents(40))
        waiting[0].cancel()
        await settle()
        assert batcher.queued_tokens == 48, "a cancelled request frees its tokens immediately"
        model.release.release(100)
        await running
        assert (await waiting[1]).scores_DL.item() == 50
        assert [set(windows) for windows in model.passes] == [{0}, {50}], "the cancelled request is never scored"
        assert batcher.queued_tokens == 0
        await batcher.close()

    run(scenario)


def test_close_finishes_running_pass():
    async def scenario():
        model = Slow()
        batcher = Batcher(model, ThreadPoolExecutor(1), batch_tokens=10, max_queued_tokens=100)
        running = asyncio.create_task(batcher.submit(documents(5)))
        await settle()
        waiting = asyncio.create_task(batcher.submit(documents(5)))
        closing = asyncio.create_task(batcher.close())
        await settle()
        model.release.release(100)
        await closing
        assert (await running).scores_DL.shape == (1, 1)
        assert (await asyncio.gather(waiting, return_exceptions=True))[0].__class__ is asyncio.CancelledError

    run(scenario)
