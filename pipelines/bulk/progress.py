"""The running totals of a scoring job, and the line that shows them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from pipelines.bulk.run_folder import Run
from pipelines.bulk.summary import Counts, sum_counts
from pipelines.errors import JobError
from pipelines.progress import HINT_AFTER_SECONDS, LONG_SECONDS, Progress, duration
from pipelines.settings import DecisionSettings

logger = logging.getLogger(__name__)


class RunTotals:
    """Counts of all finished units, and of those that this process finished. The driver keeps them."""

    def __init__(self, run: Run, decision: DecisionSettings, max_errors: float | int | None) -> None:
        """The job stops if more rows have errors than max_errors: a number (int) or a share of all rows (float)."""
        self.total = sum_counts(decision, [])
        self.rows_here = 0
        """Rows that this process finished, without those of earlier starts of the job."""
        self._num_rows, self._num_units, self._max_errors = run.num_rows, run.num_units, max_errors
        self._started = time.monotonic()
        self._tokens_before = 0
        self._has_hinted = False
        self.progress = Progress(logger, "scored", total=run.num_rows, unit="rows", measure_from_first=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the job began."""
        return time.monotonic() - self._started

    def add_finished(self, counts: Iterable[Counts]) -> None:
        """Count the units that an earlier start of the job finished."""
        self.total = sum(counts, start=self.total)
        self.progress.done = self.total.rows_in

    def add(self, counts: Counts) -> None:
        """Count a unit. Raises JobError if more rows have errors than max_errors allows."""
        is_first = not self.rows_here
        self.total = self.total + counts
        self.rows_here += counts.rows_in
        if is_first:
            self._tokens_before = self.total.tokens
        self.progress.advance(counts.rows_in, self._details())
        self._hint()
        self._check_errors()

    def show(self) -> None:
        """Show the progress of the job. Before the first unit is finished, show that the job is starting."""
        if not self.rows_here:
            logger.info("starting for %.0f s: loading the model, scoring the first units", self.elapsed)
        else:
            self.progress.show_if_due()

    @property
    def numbers(self) -> dict[str, float]:
        """The counts that are exported while the job runs, by name."""
        total = self.total
        return {
            "rows": total.rows_in,
            "rows_total": self._num_rows,
            "rows_in_error": total.rows_in_error,
            "tokens": total.tokens,
            "units": total.units,
            "seconds_left": self.progress.seconds_left or 0.0,
        }

    def _hint(self) -> None:
        """Say once what makes a long job quicker."""
        left = self.progress.seconds_left
        if self._has_hinted or left is None or self.progress.measured_seconds < HINT_AFTER_SECONDS:
            return
        self._has_hinted = True
        if left > LONG_SECONDS:
            logger.info(
                "about %s to go. Quicker: a GPU, more --replicas on a cluster, an int8 model (pipelines quantize), "
                "--early-exit exact. The job can be stopped: the same command resumes it",
                duration(left),
            )

    def _details(self) -> list[str]:
        """Return the units, the token rate, the errors, and each stage's share of the seconds of all stages."""
        details = [f"{self.total.units:,}/{self._num_units:,} units"]
        if seconds := self.progress.measured_seconds:
            details.append(f"{(self.total.tokens - self._tokens_before) / seconds:,.0f} tokens/s")
        if self.total.rows_in_error:
            details.append(f"{self.total.rows_in_error:,} rows in error")
        stages = {name: value for name, value in self.total.seconds.items() if name != "wait"}
        whole = sum(stages.values()) or 1.0
        return [*details, *(f"{name} {value / whole:.0%}" for name, value in stages.items())]

    def _check_errors(self) -> None:
        bad, limit = self.total.rows_in_error, self._max_errors
        if limit is None:
            return
        most = limit * self._num_rows if isinstance(limit, float) else limit
        if bad > most:
            kinds = sorted(self.total.errors.items(), key=lambda item: -item[1])[:3]
            named = "; ".join(f"{count:,}: {kind}" for kind, count in kinds)
            raise JobError(
                f"stopped: {bad:,} of {self.total.rows_in:,} rows have errors and max_errors={limit} allows "
                f"{most:,.0f} ({named})"
            )
