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
    """Stands in for a scorer: a window's logit is the first id of its document."""

    def cut(self, batch):
        return cut_documents(batch.tokens, PLAN, Template((2,), (3,)), batch.pair_tokens)

    def window_logits(self, cut, index_W):
        document_W = cut.windows.document_W[index_W]
        return cut.tokens.ids[cut.tokens.offsets[document_W]].astype(np.float32)[:, None]

    def merge(self, batch, cut, logits_WL):
        offsets = cut.windows.offsets
        assert len(logits_WL) == offsets[-1], "every window, once"
        return DocumentScores(logits_WL[offsets[:-1]], None, cut.windows, logits_WL, logits_WL, batch.num_tokens_D,
                              list(batch.errors))  # fmt: skip


class Slow(Model):
    """Scores when it is released, and remembers the windows of each pass by the first id of their document."""

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
    """Passes are as large as batch_tokens says, however long a test holds them."""
    monkeypatch.setattr("pipelines.serving.batcher.PASS_SECONDS", 1e9)


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario(), 20))


async def settle():
    for _ in range(20):
        await asyncio.sleep(0.005)


def test_requests_gather_while_the_model_is_busy_and_each_gets_its_own():
    async def scenario():
        model = Slow()
        batcher = Batcher(model, ThreadPoolExecutor(1), batch_tokens=1000, max_queued_tokens=10_000)
        tasks = [asyncio.create_task(batcher.submit(documents(3, 25)))]
        await settle()
        tasks += [asyncio.create_task(batcher.submit(documents(3, 25, start=100 * n))) for n in range(1, 6)]
        await settle()
        assert model.passes == [[0, 3, 3, 3]], "the first goes at once, alone"
        model.release.release(6)
        for n, task in enumerate(tasks):
            scores = await task
            assert scores.scores_DL[:, 0].tolist() == [100 * n, 100 * n + 3]
            assert scores.num_windows_D.tolist() == [1, 3]
        assert len(model.passes) == 2, "the rest went together"
        assert len(model.passes[1]) == 20
        await batcher.close()

    run(scenario)


def test_a_pass_stays_within_its_tokens_but_takes_one_window_of_any_size():
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


def test_a_long_document_keeps_no_short_one_waiting():
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
        assert all(task.done() for task in short), "in the passes after the one that ran, half of each"
        assert not long.done()
        assert all(windows.count(100_000) >= 2 for windows in model.passes), "and it goes on itself"
        model.release.release(1000)
        assert (await long).scores_DL.item() == 100_000
        await batcher.close()

    run(scenario)


def test_a_pass_holds_what_the_model_does_in_its_time(monkeypatch):
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


def test_nothing_to_score_is_answered_at_once():
    async def scenario():
        model = Slow()
        batcher = Batcher(model, ThreadPoolExecutor(1), batch_tokens=50, max_queued_tokens=100)
        model.release.release()
        assert (await batcher.submit(documents())).scores_DL.shape == (0, 1)
        assert batcher.queued_tokens == 0
        await batcher.close()

    run(scenario)


def test_callers_who_go_away_at_any_moment_leave_no_tokens_behind():
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


def test_one_large_request_leaves_room_for_others():
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


def test_singles_and_pairs_take_turns():
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


def test_a_failing_batch_tells_its_requests_and_the_next_one_works():
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


def test_too_much_waiting_is_refused_and_abandoned_requests_make_room():
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
        assert batcher.queued_tokens == 48, "the room is free at once"
        model.release.release(100)
        await running
        assert (await waiting[1]).scores_DL.item() == 50
        assert [set(windows) for windows in model.passes] == [{0}, {50}], "the abandoned request was never scored"
        assert batcher.queued_tokens == 0
        await batcher.close()

    run(scenario)


def test_closing_finishes_the_running_pass_and_cancels_the_rest():
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
