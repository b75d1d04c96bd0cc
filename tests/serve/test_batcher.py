import asyncio
import threading

import numpy as np
import pytest

from pipelines.on_ray.serve.batcher import Batcher, QueueFullError
from pipelines.scoring import DocumentScores
from pipelines.tokenization import Documents, Tokens, offsets_of
from pipelines.windows import WindowPlan, plan_windows

PLAN = WindowPlan(12, 10, 10)


def documents(*lengths, start=0):
    lengths = np.array(lengths, dtype=np.int64)
    ids = np.arange(start, start + lengths.sum(), dtype=np.int32)
    return Documents(Tokens(ids, offsets_of(lengths)), None, [None] * len(lengths))


def first_ids(batch):
    """Stands in for a model: a document's score is its first id."""
    windows = plan_windows(batch.num_tokens_D, PLAN)
    scores = batch.tokens.ids[batch.tokens.offsets[:-1]].astype(np.float32)[:, None]
    zeros = np.zeros((windows.offsets[-1], 1), np.float32)
    return DocumentScores(scores, None, windows, zeros, zeros, batch.num_tokens_D, list(batch.errors))


class Slow:
    """Scores when it is released, and remembers the batches."""

    def __init__(self):
        self.release = threading.Semaphore(0)
        self.batches = []

    def __call__(self, batch):
        self.batches.append(len(batch))
        assert self.release.acquire(timeout=10)
        if -1 in batch.tokens.ids:
            raise ValueError("a bad batch")
        return first_ids(batch)


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario(), 20))


async def settle():
    for _ in range(20):
        await asyncio.sleep(0.005)


def test_requests_gather_while_the_model_is_busy_and_each_gets_its_own():
    async def scenario():
        model = Slow()
        batcher = Batcher(model, batch_tokens=1000, max_queued_tokens=10_000)
        tasks = [asyncio.create_task(batcher.submit(documents(3, 25)))]
        await settle()
        tasks += [asyncio.create_task(batcher.submit(documents(3, 25, start=100 * n))) for n in range(1, 6)]
        await settle()
        assert model.batches == [2], "the first goes at once, alone"
        model.release.release(6)
        for n, task in enumerate(tasks):
            scores = await task
            assert scores.scores_DL[:, 0].tolist() == [100 * n, 100 * n + 3]
            assert scores.num_windows_D.tolist() == [1, 3]
        assert model.batches == [2, 10], "the rest went together"
        await batcher.close()

    run(scenario)


def test_a_batch_stays_within_its_tokens_but_takes_one_request_of_any_size():
    async def scenario():
        model = Slow()
        model.release.release(100)
        batcher = Batcher(model, batch_tokens=50, max_queued_tokens=10_000)
        await asyncio.gather(*(batcher.submit(documents(30)) for _ in range(5)), batcher.submit(documents(500)))
        assert model.batches == [1] * 6
        await batcher.close()

    run(scenario)


def test_a_failing_batch_tells_its_requests_and_the_next_one_works():
    async def scenario():
        model = Slow()
        model.release.release(100)
        batcher = Batcher(model, batch_tokens=50, max_queued_tokens=10_000)
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
        batcher = Batcher(model, batch_tokens=10, max_queued_tokens=100)
        running = asyncio.create_task(batcher.submit(documents(5)))
        await settle()
        waiting = [asyncio.create_task(batcher.submit(documents(40, start=n))) for n in (0, 50)]
        await settle()
        with pytest.raises(QueueFullError, match="82 tokens are waiting and at most 100 may"):
            await batcher.submit(documents(40))
        waiting[0].cancel()
        await settle()
        assert batcher.queued_tokens == 41, "the room is free at once"
        model.release.release(100)
        await running
        assert (await waiting[1]).scores_DL.item() == 50
        assert model.batches == [1, 1], "the abandoned request was never scored"
        assert batcher.queued_tokens == 0
        await batcher.close()

    run(scenario)


def test_closing_finishes_the_running_pass_and_cancels_the_rest():
    async def scenario():
        model = Slow()
        batcher = Batcher(model, batch_tokens=10, max_queued_tokens=100)
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
