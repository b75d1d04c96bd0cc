"""Labelled Parquet as corpora: tokenized into files by this process, or by Ray Data while workers train.

Whoever asks for a part that is still on its way waits for it. Tokenizing goes in the order in which the first epoch
takes the parts, so that training begins when its first shuffle buffer is there. Knows no model.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import ExecutionResources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.corpus import Corpus, Part
from pipelines.errors import JobError, PipelinesError
from pipelines.locations import shown
from pipelines.loop import PROGRESS_SECONDS
from pipelines.on_ray.cluster import root_cause
from pipelines.on_ray.telemetry import WAIT_SECONDS, repeated
from pipelines.on_ray.tokenize import TOKENIZE_CPUS, TokenizeStage, documents_of, group_units, tokenized, unpack
from pipelines.shards import Plan, fingerprint
from pipelines.tables import SOURCE_COLUMNS
from pipelines.tokenization import Documents

Report = Callable[[str], None]


@dataclass(frozen=True)
class Split:
    """One labelled input: how to tokenize it, its work units, and its targets in the same row order."""

    stage: TokenizeStage
    units: Plan
    targets: NDArray[np.generic]
    seed: int
    """Draws the order of tokenizing."""

    @property
    def order(self) -> list[int]:
        """Units as they are tokenized: in runs that share a row group, so that it is decoded once for all of a run."""
        runs = group_units(self.units)
        drawn = np.random.default_rng([self.seed, 0]).permutation(len(runs))
        return [unit.number for run in drawn for unit in runs[run]]

    @property
    def fingerprint(self) -> str:
        """Changes with any file or target."""
        files = fingerprint((file.url, file.size, file.version) for file in self.units.files)
        digest = hashlib.sha256(files.encode())
        digest.update(np.ascontiguousarray(self.targets).data)
        return digest.hexdigest()

    def corpus(self, survey: Callable[[int], Part], table: Callable[[int], pa.Table]) -> Corpus:
        """A corpus whose parts are the units, from what is known of them and their tokenized tables."""
        documents = _Documents(table)
        source = f"{shown(self.stage.location)}, column {self.stage.text_columns[0]!r}"
        return Corpus(
            [unit.num_rows for unit in self.units], self.targets, survey, documents,
            fingerprint=self.fingerprint, source=source, name=documents.name, order=self.order,
        )  # fmt: skip


@dataclass(frozen=True)
class _Documents:
    """What a part's table holds: its documents, and what people call them."""

    table: Callable[[int], pa.Table]

    def __call__(self, number: int) -> Documents:
        return documents_of(self.table(number))

    def name(self, number: int, row: int) -> str:
        file, source_row = (self.table(number).column(name)[row] for name in SOURCE_COLUMNS)
        return f"{shown(str(file))} row {source_row}"


def in_files(split: Split, folder: Path) -> Corpus:
    """A corpus tokenized in this process; its parts are files that are mapped into memory when they are read."""
    folder.mkdir()
    parts = []
    for number, table in enumerate(split.stage(split.units)):
        with pa.OSFile(str(folder / f"{number}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        parts.append(Part.of(documents_of(table)))
    corpus = split.corpus(parts.__getitem__, lambda number: _mapped(folder / f"{number}.arrow"))
    corpus.check_texts()
    return corpus


def _mapped(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


@contextmanager
def on_their_way(
    splits: Mapping[str, Split], report: Report, *, num_cpus: float | None
) -> Iterator[tuple[dict[str, Corpus], Future[None]]]:
    """Corpora that Ray Data tokenizes while the body runs, one after another; the future is done when all have come.

    Any process of the cluster may read them. Ray Data takes so many CPUs at most, or all. Raises JobError, in whoever
    waits for a part and in the future, where tokenizing fails.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    arrivals = {name: _Arrivals.options(scheduling_strategy=here).remote() for name in splits}  # type: ignore[attr-defined]
    done: Future[None] = Future()
    stop = threading.Event()

    def tokenize() -> None:
        try:
            for name, split in splits.items():
                _tokenize(split, arrivals[name], report, stop, num_cpus)
            done.set_result(None)
        except Exception as error:  # noqa: BLE001  # of a thread: whatever it is, people wait for it
            if stop.is_set():  # nobody waits any more, and Ray may be gone
                return
            known = isinstance(error, PipelinesError)
            reason = error if known else JobError(f"tokenizing failed: {root_cause(error)}")
            done.set_exception(reason)
            for its in arrivals.values():
                its.fail.remote(reason)

    thread = threading.Thread(target=tokenize, daemon=True, name="tokenizing")
    thread.start()
    corpora = {}
    for name, split in splits.items():
        coming = _Coming(arrivals[name])
        corpora[name] = split.corpus(coming.survey, coming.table)
    try:
        yield corpora, done
    finally:
        stop.set()
        thread.join(timeout=PROGRESS_SECONDS)


def _tokenize(split: Split, arrivals: Any, report: Report, stop: threading.Event, num_cpus: float | None) -> None:
    """Tokenize all units, and say of each where it is as soon as it is there."""
    dataset = tokenized(split.stage, [split.units[number] for number in split.order])
    dataset.context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=num_cpus)
    survey: Any = ray.remote(_survey).options(num_cpus=TOKENIZE_CPUS, num_returns=2)
    added: list[Any] = []
    started = told = time.monotonic()

    def tell_wait() -> None:
        if stop.is_set():  # Ray may be gone, and would be started anew by who asks
            return
        there, free = (found.get("CPU", 0) for found in (ray.cluster_resources(), ray.available_resources()))
        report(f"no unit is tokenized yet; the cluster has {there:g} CPU, of which {free:g} are free")

    with repeated(tell_wait, WAIT_SECONDS):
        bundles = iter(dataset.iter_internal_ref_bundles())
        first = next(bundles)
    for bundle in itertools.chain([first], bundles):
        for entry in bundle.blocks:
            number, part = survey.remote(entry.ref)
            added.append(arrivals.add.remote(number, [part, entry.ref]))
        if stop.is_set():
            raise JobError("tokenizing was stopped")
        now = time.monotonic()
        if now - told > PROGRESS_SECONDS:
            told = now
            left = (now - started) / len(added) * (len(split.units) - len(added))
            report(f"tokenized {len(added):,} of {len(split.units):,} units, {left:.0f} s to go")
    ray.get(added)


def _survey(block: pa.Table) -> tuple[int, Part]:
    """A block's unit number, and what is known of it without loading it."""
    ((number, _, table),) = unpack(block)
    return number, Part.of(documents_of(table))


@ray.remote(num_cpus=0)
class _Arrivals:
    """Which parts of a corpus have come and where they are; any number of processes wait here."""

    def __init__(self) -> None:
        self._come: list[tuple[int, list[Any]]] = []
        self._numbers: set[int] = set()
        self._error: PipelinesError | None = None
        self._changed = asyncio.Condition()

    async def add(self, number: int, refs: list[Any]) -> None:
        """A part has come: what is known of it, and its block."""
        async with self._changed:
            self._come.append((number, refs))
            self._numbers.add(number)
            self._changed.notify_all()

    async def fail(self, error: PipelinesError) -> None:
        """No more will come."""
        async with self._changed:
            self._error = error
            self._changed.notify_all()

    async def since(self, seen: int, number: int) -> tuple[list[tuple[int, list[Any]]], PipelinesError | None]:
        """All that came after the first `seen`, once that part is there or will not come."""
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._numbers or self._error is not None)
            return self._come[seen:], self._error


class _Coming:
    """The parts of a corpus, from any process of the cluster and from several of its threads."""

    def __init__(self, arrivals: Any) -> None:
        self._arrivals = arrivals
        self._seen = 0
        self._parts: dict[int, Part] = {}
        self._blocks: dict[int, Any] = {}

    def survey(self, number: int) -> Part:
        """What is known of a part."""
        self._wait_for(number)
        return self._parts[number]

    def table(self, number: int) -> pa.Table:
        """The tokenized table of a part."""
        self._wait_for(number)
        ((_, _, table),) = unpack(ray.get(self._blocks[number]))
        return table

    def _wait_for(self, number: int) -> None:
        while number not in self._parts:
            seen = self._seen
            news, error = ray.get(self._arrivals.since.remote(seen, number))
            self._blocks.update({come: block for come, (_, block) in news})
            parts = ray.get([part for _, (part, _) in news])
            self._parts.update(zip((come for come, _ in news), parts, strict=True))
            self._seen = seen + len(news)  # another thread's may have been the same
            if error is not None and number not in self._parts:
                raise error
