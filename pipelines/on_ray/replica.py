"""The actor of a scoring job: it has one model, and scores and commits units.

A unit that kills its process several times is halved repeatedly, until the rows that cause this are isolated. These
rows get an error. The actor `CrashRecord` survives the processes and records which rows they are scoring. Another one
records which rows are being tokenized.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray

from pipelines.bulk.unit import BrokenDeviceError, ReplicaSetup, UnitScorer, load_scorer
from pipelines.settings import DecisionSettings
from pipelines.text.attempts import RowsToTry
from pipelines.text.stage import TokenizedUnit
from pipelines.text.tokenization import Documents

CRASHES_BEFORE_HALVING = 2
"""A unit is halved after more crashes than this. The first ones may be caused by a lost node."""
COUNTS = "counts"
"""Column of the actor's result: the counts of each unit, as JSON."""


@dataclass
class _UnitRecord:
    ranges: list[tuple[int, int]]
    deadly: list[int] = field(default_factory=list)
    current: tuple[int, int] | None = None
    crashes: int = 0


class CrashRecord:
    """Records which rows of which unit are being worked on. A unit that begins again without an end has crashed."""

    def __init__(self) -> None:
        self._units: dict[int, _UnitRecord] = {}

    def begin(self, unit: int, num_rows: int) -> RowsToTry:
        """Record that the first range of the unit begins. Returns how its rows are worked on."""
        record = self._units.setdefault(unit, _UnitRecord([(0, num_rows)]))
        if record.current is not None:
            record.crashes += 1
            if record.crashes > CRASHES_BEFORE_HALVING:
                _halve(record)
        record.current = record.ranges[0] if record.ranges else None
        return RowsToTry(tuple(record.ranges), tuple(record.deadly))

    def begin_range(self, unit: int, rows: tuple[int, int]) -> None:
        """Record that another range begins. Ignored if this actor was restarted after the unit began."""
        if unit in self._units:
            self._units[unit].current = rows

    def end(self, unit: int) -> None:
        """Record that all rows of the unit are done."""
        self._units.pop(unit, None)


CrashRecordActor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(CrashRecord)


class RemoteAttempts:
    """`Attempts` that calls a `CrashRecord` actor."""

    def __init__(self, record: Any) -> None:
        self._record = record

    def begin(self, unit: int, num_rows: int) -> RowsToTry:
        rows: RowsToTry = ray.get(self._record.begin.remote(unit, num_rows))
        return rows

    def begin_range(self, unit: int, rows: tuple[int, int]) -> None:
        ray.get(self._record.begin_range.remote(unit, rows))

    def end(self, unit: int) -> None:
        self._record.end.remote(unit)


class ServeScorer:
    """Scores with a Serve application instead of a `Scorer`. The application must serve the same model folder."""

    def __init__(self, application: str, decision: DecisionSettings) -> None:
        from ray import serve

        self._handle, self.decision = serve.get_app_handle(application), decision

    def score_documents(self, documents: Documents) -> Any:
        """Score tokenized documents with the application's model."""
        return self._handle.score_documents.remote(documents).result()

    def results(self, scores: Any, *, prefix: str = "") -> pa.Table:
        """Return the output columns. Labels are decided here, not in the application."""
        from pipelines.model.scorer import results_of

        return results_of(scores, self.decision, prefix=prefix)


class ScoreUnits:
    """The class of Ray Data's actors: rows of tokenized units in, their counts out."""

    def __init__(
        self,
        setup: ReplicaSetup,
        crash_record: Any = None,
        make_scorer: Callable[[ReplicaSetup, Any], UnitScorer] | None = None,
    ) -> None:
        """Load the model; make_scorer replaces what scores and commits a unit, for measurements without a model."""
        self._units = (make_scorer or _unit_scorer)(setup, crash_record)
        self._idle = _IdleClock()

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Score and commit the units of a block."""
        with self._idle as waited:
            try:
                counts = [self._units.score_unit(unit) for unit in TokenizedUnit.from_rows(rows)]
            except BrokenDeviceError:
                os._exit(1)  # Ray starts the actor in a new process
        counts[0] = replace(counts[0], seconds={**counts[0].seconds, "wait": waited})
        return pa.table({COUNTS: [json.dumps(one.to_json()) for one in counts]})


def _unit_scorer(setup: ReplicaSetup, crash_record: Any) -> UnitScorer:
    scorer = load_scorer(setup) if setup.via_serve is None else ServeScorer(setup.via_serve, setup.decision)
    return UnitScorer(setup, scorer, None if crash_record is None else RemoteAttempts(crash_record))


class _IdleClock:
    """Measures the idle time before each call. Several threads may call at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active, self._idle_since = 0, time.perf_counter()

    def __enter__(self) -> float:
        with self._lock:
            waited = 0.0 if self._active else time.perf_counter() - self._idle_since
            self._active += 1
            return waited

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._active -= 1
            if not self._active:
                self._idle_since = time.perf_counter()


def _halve(record: _UnitRecord) -> None:
    assert record.current is not None
    start, stop = record.current
    place = record.ranges.index((start, stop))
    if stop - start == 1:
        record.deadly.append(start)
        record.ranges.pop(place)
        return
    middle = (start + stop) // 2
    record.ranges[place : place + 1] = [(start, middle), (middle, stop)]
