"""The actor of a scoring job: it holds one model, and scores and commits units.

A unit that kills its actor several times is halved until the deadly rows stand alone; those come out with an error.
The actor `CrashRecord` outlives the replicas and remembers what they were scoring.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray

from pipelines.bulk.unit import ReplicaSetup, RowsToScore, UnitScorer, load_scorer
from pipelines.settings import DecisionSettings
from pipelines.text.stage import TokenizedUnit
from pipelines.text.tokenization import Documents

CRASHES_BEFORE_HALVING = 2
"""Crashes after which a unit is halved; the first ones may be the fault of a lost node."""
COUNTS = "counts"
"""Column of what the actor returns: the counts of each unit, as JSON."""


@dataclass
class _UnitRecord:
    ranges: list[tuple[int, int]]
    deadly: list[int] = field(default_factory=list)
    current: tuple[int, int] | None = None
    crashes: int = 0


class CrashRecord:
    """Which rows of which unit are being scored now. A range that begins a second time has killed its actor."""

    def __init__(self) -> None:
        self._units: dict[int, _UnitRecord] = {}

    def begin(self, unit: int, num_rows: int) -> RowsToScore:
        """How the rows of a unit are scored; the first range counts as begun."""
        record = self._units.setdefault(unit, _UnitRecord([(0, num_rows)]))
        if record.current is not None:
            record.crashes += 1
            if record.crashes > CRASHES_BEFORE_HALVING:
                _halve(record)
        record.current = record.ranges[0] if record.ranges else None
        return RowsToScore(tuple(record.ranges), tuple(record.deadly))

    def begin_range(self, unit: int, rows: tuple[int, int]) -> None:
        """Another range of the unit begins; ignored where this record was lost since the unit began."""
        if unit in self._units:
            self._units[unit].current = rows

    def end(self, unit: int) -> None:
        """All rows of the unit are scored."""
        self._units.pop(unit, None)


CrashRecordActor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(CrashRecord)


class _RemoteAttempts:
    """`bulk.unit.Attempts`, kept by the actor of a job."""

    def __init__(self, record: Any) -> None:
        self._record = record

    def begin(self, unit: int, num_rows: int) -> RowsToScore:
        rows: RowsToScore = ray.get(self._record.begin.remote(unit, num_rows))
        return rows

    def begin_range(self, unit: int, rows: tuple[int, int]) -> None:
        ray.get(self._record.begin_range.remote(unit, rows))

    def end(self, unit: int) -> None:
        self._record.end.remote(unit)


class ServeScorer:
    """A Serve application in place of a `Scorer`; it must serve the same model folder."""

    def __init__(self, application: str, decision: DecisionSettings) -> None:
        from ray import serve

        self._handle, self.decision = serve.get_app_handle(application), decision

    def score_documents(self, documents: Documents) -> Any:
        """Scores of tokenized documents by the application's model."""
        return self._handle.score_documents.remote(documents).result()

    def results(self, scores: Any, *, prefix: str = "") -> pa.Table:
        """The output columns, decided here."""
        from pipelines.model.scorer import results_of

        return results_of(scores, self.decision, prefix=prefix)


class ScoreUnits:
    """The class of the actor pool: rows of tokenized units in, their counts out."""

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
            counts = [self._units.score_unit(unit) for unit in TokenizedUnit.from_rows(rows)]
        counts[0] = replace(counts[0], seconds={**counts[0].seconds, "wait": waited})
        return pa.table({COUNTS: [json.dumps(one.to_json()) for one in counts]})


def _unit_scorer(setup: ReplicaSetup, crash_record: Any) -> UnitScorer:
    scorer = load_scorer(setup) if setup.via_serve is None else ServeScorer(setup.via_serve, setup.decision)
    return UnitScorer(setup, scorer, None if crash_record is None else _RemoteAttempts(crash_record))


class _IdleClock:
    """Measures how long no call was under way before each call; calls come from several threads."""

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
