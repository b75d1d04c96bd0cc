"""The actor of a scoring job: one model, scoring one unit while the next is made ready and the last is written.

A unit that kills its actor again and again is cut in halves until the guilty rows stand alone; those come out with an
error. `Attempts` outlives the actors and remembers what was being tried.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pipelines.on_ray.tokenize import ERROR, IDS, PAIR_IDS, documents_of, stats_of, unpack
from pipelines.outputs import commit_unit
from pipelines.settings import ComputeSettings, DecisionSettings
from pipelines.summary import summarize
from pipelines.tables import error_columns
from pipelines.tokenization import Documents

CRASHES_BEFORE_HALVING = 2
"""A unit is tried whole once more than this: a node that is lost is not its fault."""
PART = "part"
"""Column of what the actor returns: per unit, what it adds to the summary, as JSON."""


@dataclass(frozen=True)
class ReplicaSetup:
    """What an actor needs to know."""

    model: str
    output: str
    decision: DecisionSettings
    metadata: Mapping[bytes, bytes]
    """Of the schema of every output file."""
    compute: ComputeSettings
    prefix: str = ""
    replicas_per_node: int = 1
    via_serve: str | None = None
    """A Serve application that scores, instead of a model in the actor."""


@dataclass
class _Tried:
    ranges: list[tuple[int, int]]
    guilty: list[int]
    trying: tuple[int, int] | None = None
    crashes: int = 0


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Attempts:
    """What is being scored right now, by unit; one per job. A range that is begun again has killed its actor."""

    def __init__(self) -> None:
        self._units: dict[int, _Tried] = {}

    def begin(self, unit: int, num_rows: int) -> tuple[list[tuple[int, int]], list[int]]:
        """Row ranges to score one by one, and rows to leave alone; the first range counts as begun."""
        tried = self._units.setdefault(unit, _Tried([(0, num_rows)], []))
        if tried.trying is not None:
            tried.crashes += 1
            if tried.crashes > CRASHES_BEFORE_HALVING:
                _halve(tried)
        tried.trying = tried.ranges[0] if tried.ranges else None
        return list(tried.ranges), list(tried.guilty)

    def trying(self, unit: int, rows: tuple[int, int]) -> None:
        """The unit's next range is begun; forgotten where this actor was lost since the unit was."""
        if unit in self._units:
            self._units[unit].trying = rows

    def end(self, unit: int) -> None:
        """The unit's forward passes are over."""
        self._units.pop(unit, None)


def _halve(tried: _Tried) -> None:
    assert tried.trying is not None
    start, stop = tried.trying
    place = tried.ranges.index((start, stop))
    if stop - start == 1:
        tried.guilty.append(start)
        tried.ranges.pop(place)
        return
    middle = (start + stop) // 2
    tried.ranges[place : place + 1] = [(start, middle), (middle, stop)]


class Served:
    """A Serve application in the place of a scorer; it must serve the same model folder."""

    def __init__(self, application: str, decision: DecisionSettings) -> None:
        from ray import serve

        self._handle, self.decision = serve.get_app_handle(application), decision

    def score_documents(self, documents: Documents) -> Any:
        """What the application's model says of tokenized documents."""
        return self._handle.score_documents.remote(documents).result()

    def results(self, scores: Any, *, prefix: str = "") -> pa.Table:
        """The output columns, decided here."""
        from pipelines.scoring import results_of

        return results_of(scores, self.decision, prefix=prefix)


class ScoreUnit:
    """Tokenized units in, scored files committed, what they add to the summary out."""

    def __init__(self, setup: ReplicaSetup, attempts: Any = None) -> None:
        """Load the model. Without attempts nothing is remembered of crashes, as in a process of one's own."""
        self._setup, self._attempts = setup, attempts
        self._scorer = _load(setup) if setup.via_serve is None else Served(setup.via_serve, setup.decision)
        self._forward = threading.Lock()
        self._idle_since = time.perf_counter()
        self._active = 0
        self._counting = threading.Lock()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Score and commit the units of a block."""
        waited = self._enter()
        try:
            parts = [self.score_unit(number, name, table) for number, name, table in unpack(block)]
        finally:
            self._leave()
        parts[0]["seconds"]["wait"] = waited
        return pa.table({PART: [json.dumps(part) for part in parts]})

    def score_unit(self, number: int, name: str, table: pa.Table) -> dict[str, Any]:
        """Commit a unit's output file under its name; what it adds to the summary."""
        results, forward_seconds = self._results(number, documents_of(table))
        scored = table.drop_columns([name for name in (IDS, PAIR_IDS, ERROR) if name in table.column_names])
        for field, column in zip(results.schema, results.columns, strict=True):
            scored = scored.append_column(field, column)
        scored = scored.replace_schema_metadata(dict(self._setup.metadata))
        part = {**stats_of(table), **summarize(scored, self._setup.decision, prefix=self._setup.prefix)}
        part["seconds"]["forward"] = forward_seconds
        started = time.perf_counter()
        commit_unit(self._setup.output, name, scored, part)
        part["seconds"]["write"] = time.perf_counter() - started
        return part

    def _results(self, number: int, documents: Documents) -> tuple[pa.Table, float]:
        """Output columns of a unit, one forward at a time however many units are under way."""
        with self._forward:
            ranges, guilty = [(0, len(documents))], list[int]()
            if self._attempts is not None:
                ranges, guilty = ray.get(self._attempts.begin.remote(number, len(documents)))
            started = time.perf_counter()
            tables: dict[int, pa.Table] = {}
            for place, (start, stop) in enumerate(ranges):
                if place and self._attempts is not None:
                    ray.get(self._attempts.trying.remote(number, (start, stop)))
                tables[start] = self._score(documents.take(np.arange(start, stop)) if len(ranges) > 1 else documents)
            seconds = time.perf_counter() - started
            if self._attempts is not None:
                self._attempts.end.remote(number)
        for row in guilty:
            tables[row] = self._error("the model's process died over this row, again and again")
        return pa.concat_tables([tables[start] for start in sorted(tables)]), seconds

    def _score(self, documents: Documents) -> pa.Table:
        """Output columns; where scoring raises, halves are tried, down to the rows that it is about."""
        try:
            return self._scorer.results(self._scorer.score_documents(documents), prefix=self._setup.prefix)
        except Exception as error:  # noqa: BLE001  # whatever it is, it must cost no row but its own
            if "CUDA error" in str(error):  # after which nothing works in this process
                os._exit(1)
            if len(documents) > 1:
                halves = np.array_split(np.arange(len(documents)), 2)
                return pa.concat_tables([self._score(documents.take(half)) for half in halves])
            return self._error(f"scoring failed: {type(error).__name__}")

    def _error(self, error: str) -> pa.Table:
        return error_columns([error], decision=self._setup.decision, prefix=self._setup.prefix)

    def _enter(self) -> float:
        """Count this call in; how long no call was under way before it."""
        with self._counting:
            waited = time.perf_counter() - self._idle_since if not self._active else 0.0
            self._active += 1
            return waited

    def _leave(self) -> None:
        with self._counting:
            self._active -= 1
            if not self._active:
                self._idle_since = time.perf_counter()


def _load(setup: ReplicaSetup) -> Any:
    from pipelines.scoring import Scorer  # torch is loaded where the model is, not in every task that reads

    threads = setup.compute.num_threads or max(1, (os.cpu_count() or 1) // setup.replicas_per_node)
    scorer = Scorer.load(setup.model, compute=replace(setup.compute, num_threads=threads))
    scorer.decision = setup.decision
    return scorer
