"""Corpora that Ray Data tokenizes while workers already train on them.

A process that needs a unit waits until it has arrived. Units are tokenized in the order in which the first epoch needs
them, so that training begins when the first shuffle buffer is complete. Does not import torch.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
from ray.data import ExecutionResources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.errors import JobError, PipelinesError
from pipelines.on_ray.cluster import root_cause
from pipelines.on_ray.datasets import TOKENIZE_CPUS, tokenized_units
from pipelines.on_ray.telemetry import WAIT_SECONDS
from pipelines.progress import PROGRESS_SECONDS, Progress, repeated
from pipelines.text.stage import TokenizedUnit, documents_of
from pipelines.training.corpus import Corpus, UnitLengths
from pipelines.training.splits import Split

logger = logging.getLogger(__name__)


@contextmanager
def arriving_corpora(
    splits: Mapping[str, Split], *, num_cpus: float | None
) -> Iterator[tuple[dict[str, Corpus], Future[None]]]:
    """Tokenize corpora with Ray Data, one after another, while the body of the with statement runs.

    Any process of the cluster may read them. If tokenizing fails, every process that waits for a unit raises a
    JobError, and the future contains the error.

    Args:
        splits: The inputs by name.
        num_cpus: Maximum number of CPUs that Ray Data uses. None means all.

    Yields:
        The corpora by name, and a future that is done when all units have arrived.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    arrivals = {name: Arrivals.options(scheduling_strategy=here).remote() for name in splits}  # type: ignore[attr-defined]
    done: Future[None] = Future()
    stop = threading.Event()

    def tokenize() -> None:
        try:
            for name, split in splits.items():
                _tokenize(split, arrivals[name], stop, num_cpus)
            done.set_result(None)
        except Exception as error:  # noqa: BLE001  # any error: other processes wait for these units
            if stop.is_set():  # no process waits any more, and Ray may have ended
                return
            known = isinstance(error, PipelinesError)
            reason = error if known else JobError(f"tokenizing failed: {root_cause(error)}")
            done.set_exception(reason)
            for actor in arrivals.values():
                actor.fail.remote(reason)

    thread = threading.Thread(target=tokenize, daemon=True, name="tokenizing")
    thread.start()
    corpora = {}
    for name, split in splits.items():
        units = _ArrivingUnits(arrivals[name])
        corpora[name] = split.corpus(units.lengths, units.table)
    try:
        yield corpora, done
    finally:
        stop.set()
        thread.join(timeout=PROGRESS_SECONDS)
        for actor in arrivals.values():
            ray.kill(actor)


def _tokenize(split: Split, arrivals: Any, stop: threading.Event, num_cpus: float | None) -> None:
    """Tokenize all units, and announce each one when it is tokenized."""
    dataset = tokenized_units(split.stage, [split.units[number] for number in split.order])
    dataset.context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=num_cpus)
    measure: Any = ray.remote(_measure).options(num_cpus=TOKENIZE_CPUS, num_returns=2)
    announced: list[Any] = []

    def log_wait() -> None:
        if stop.is_set():  # Ray may have ended, and a call would start it again
            return
        total, free = (found.get("CPU", 0) for found in (ray.cluster_resources(), ray.available_resources()))
        logger.info("no unit is tokenized yet; the cluster has %g CPU, of which %g are free", total, free)

    with repeated(log_wait, WAIT_SECONDS):
        bundles = iter(dataset.iter_internal_ref_bundles())
        first = next(bundles)
    with Progress(logger, "tokenized", total=len(split.units), unit="units") as progress:
        for bundle in itertools.chain([first], bundles):
            for entry in bundle.blocks:
                number, lengths = measure.remote(entry.ref)
                announced.append(arrivals.add.remote(number, [lengths, entry.ref]))
                progress.advance()
            if stop.is_set():
                raise JobError("tokenizing was stopped")
    ray.get(announced)


def _measure(block: pa.Table) -> tuple[int, UnitLengths]:
    """Return the unit number of a block, and the lengths of its documents."""
    (unit,) = TokenizedUnit.from_rows(block)
    return unit.number, UnitLengths.of(documents_of(unit.table))


@ray.remote(num_cpus=0)
class Arrivals:
    """Actor that knows which units of a corpus have arrived, and where they are. Any number of processes can wait."""

    def __init__(self) -> None:
        self._arrived: list[tuple[int, list[Any]]] = []
        self._numbers: set[int] = set()
        self._error: PipelinesError | None = None
        self._changed = asyncio.Condition()

    async def add(self, number: int, refs: list[Any]) -> None:
        """Add a unit that has arrived: references to its lengths and to its block."""
        async with self._changed:
            self._arrived.append((number, refs))
            self._numbers.add(number)
            self._changed.notify_all()

    async def fail(self, error: PipelinesError) -> None:
        """Set the error after which no more units will arrive."""
        async with self._changed:
            self._error = error
            self._changed.notify_all()

    async def since(self, seen: int, number: int) -> tuple[list[tuple[int, list[Any]]], PipelinesError | None]:
        """Wait for a unit or an error. Return all units that arrived after the first `seen` ones, and the error."""
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._numbers or self._error is not None)
            return self._arrived[seen:], self._error


class _ArrivingUnits:
    """The units of a corpus. Any process of the cluster, and several threads of it, can use this."""

    def __init__(self, arrivals: Any) -> None:
        self._arrivals = arrivals
        self._seen = 0
        self._lengths: dict[int, UnitLengths] = {}
        self._blocks: dict[int, Any] = {}

    def lengths(self, number: int) -> UnitLengths:
        """Return the lengths of a unit's documents. Waits until it has arrived."""
        self._wait_for(number)
        return self._lengths[number]

    def table(self, number: int) -> pa.Table:
        """Return the tokenized table of a unit. Waits until it has arrived."""
        self._wait_for(number)
        (unit,) = TokenizedUnit.from_rows(ray.get(self._blocks[number]))
        return unit.table

    def _wait_for(self, number: int) -> None:
        while number not in self._lengths:
            seen = self._seen
            news, error = ray.get(self._arrivals.since.remote(seen, number))
            self._blocks.update({unit: block for unit, (_, block) in news})
            lengths = ray.get([ref for _, (ref, _) in news])
            self._lengths.update(zip((unit for unit, _ in news), lengths, strict=True))
            self._seen = seen + len(news)  # another thread may have received the same ones
            if error is not None and number not in self._lengths:
                raise error
