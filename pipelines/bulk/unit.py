"""Score one tokenized work unit and commit its output file.

With several threads, one unit is scored while another is prepared or written. If scoring fails for a row, this row gets
an error, and all other rows still get their scores.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipelines.bulk.run_folder import commit_unit
from pipelines.bulk.summary import Counts, count_table
from pipelines.decisions.columns import error_columns
from pipelines.errors import JobError, first_line, is_out_of_memory
from pipelines.settings import ComputeSettings, DecisionSettings, EarlyExit
from pipelines.text.attempts import Attempts, NoAttempts
from pipelines.text.stage import ERROR, IDS, PAIR_IDS, TokenizedUnit, TokenizeStats, documents_of
from pipelines.text.tokenization import Documents


@dataclass(frozen=True)
class ReplicaSetup:
    """Settings of a replica. They are sent to every actor."""

    model: str
    output: str
    decision: DecisionSettings
    metadata: Mapping[bytes, bytes]
    """Schema metadata of every output file."""
    compute: ComputeSettings
    prefix: str = ""
    replicas_per_node: int = 1
    via_serve: str | None = None
    """Name of a Serve application that scores instead. The replica then has no model of its own."""
    early_exit: EarlyExit = "off"
    change: int = 0
    """If units are scored again, so that their files replace those that are there: the number of changes of the run."""


class DocumentScorer(Protocol):
    """The methods of `Scorer` that a replica uses."""

    def score_documents(self, documents: Documents) -> Any:
        """Return the scores of tokenized documents."""

    def results(self, scores: Any, *, prefix: str = "") -> pa.Table:
        """Return the output columns, one row per document."""


class BrokenDeviceError(JobError):
    """An error after which CUDA cannot be used in this process any more."""


class UnitScorer:
    """Scores tokenized units and commits their files. Several threads may call it."""

    def __init__(self, setup: ReplicaSetup, scorer: DocumentScorer, attempts: Attempts | None = None) -> None:
        self._setup, self._scorer = setup, scorer
        self._attempts: Attempts = NoAttempts() if attempts is None else attempts
        self._forward = threading.Lock()

    def score_unit(self, unit: TokenizedUnit) -> Counts:
        """Score a unit, commit its output file, and return the counts of the unit."""
        results, forward_seconds = self._results(unit.number, documents_of(unit.table))
        scored = unit.table.drop_columns([n for n in (IDS, PAIR_IDS, ERROR) if n in unit.table.column_names])
        for field, column in zip(results.schema, results.columns, strict=True):
            scored = scored.append_column(field, column)
        scored = scored.replace_schema_metadata(dict(self._setup.metadata))
        stats = TokenizeStats.of(unit.table)
        counts = replace(
            count_table(scored, self._setup.decision, prefix=self._setup.prefix),
            rows_in=stats.rows_in,
            rows_filtered=stats.rows_filtered,
            values_lost=stats.values_lost,
            seconds={"read": stats.read_seconds, "tokenize": stats.tokenize_seconds, "forward": forward_seconds},
        )
        started = time.perf_counter()
        counts = commit_unit(self._setup.output, unit.output_name, scored, counts, change=self._setup.change)
        return replace(counts, seconds={**counts.seconds, "write": time.perf_counter() - started})

    def _results(self, number: int, documents: Documents) -> tuple[pa.Table, float]:
        """Return the output columns of a unit, and the seconds of scoring. Only one thread scores at a time."""
        with self._forward:
            rows = self._attempts.begin(number, len(documents))
            started = time.perf_counter()
            tables: dict[int, pa.Table] = {}
            for place, (start, stop) in enumerate(rows.ranges):
                if place:
                    self._attempts.begin_range(number, (start, stop))
                is_whole = len(rows.ranges) == 1 and not rows.deadly
                tables[start] = self._score(documents if is_whole else documents.take(np.arange(start, stop)))
            seconds = time.perf_counter() - started
            self._attempts.end(number)
        for row in rows.deadly:
            tables[row] = self._error("the model's process died several times while it scored this row")
        return pa.concat_tables([tables[start] for start in sorted(tables)]), seconds

    def _score(self, documents: Documents) -> pa.Table:
        """Return the output columns. If scoring raises an error, the two halves are tried, down to single rows."""
        try:
            return self._scorer.results(self._scorer.score_documents(documents), prefix=self._setup.prefix)
        except Exception as error:  # any error: all other rows must still get their scores
            if "CUDA error" in str(error):
                raise BrokenDeviceError(f"the GPU is unusable in this process: {first_line(error)}") from error
            if len(documents) > 1:
                halves = np.array_split(np.arange(len(documents)), 2)
                return pa.concat_tables([self._score(documents.take(half)) for half in halves])
            if is_out_of_memory(error):
                raise JobError(
                    f"there is not enough memory to score a single document ({first_line(error)}); finished units are "
                    f"kept: start the job again with fewer --replicas, --set batch_tokens=4096 or more memory"
                ) from error
            return self._error(f"scoring failed: {type(error).__name__}")

    def _error(self, error: str) -> pa.Table:
        setup = self._setup
        return error_columns(
            [error], decision=setup.decision, prefix=setup.prefix, early_exit=setup.early_exit != "off"
        )


def load_scorer(setup: ReplicaSetup) -> Any:
    """Load the `Scorer` of a replica, with its share of the machine's cores."""
    from pipelines.model.scorer import Scorer  # loads torch, which is needed only where the model runs

    threads = setup.compute.num_threads or max(1, (os.cpu_count() or 1) // setup.replicas_per_node)
    scorer = Scorer.load(setup.model, compute=replace(setup.compute, num_threads=threads), early_exit=setup.early_exit)
    scorer.decision = setup.decision
    return scorer
