"""Counts from the workers, and the progress line that people watch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.util import placement_group_table
from ray.util.metrics import Gauge

from pipelines.errors import JobError
from pipelines.outputs import Run
from pipelines.settings import DecisionSettings
from pipelines.summary import add_parts, empty_part

WAIT_SECONDS = 30.0
"""How often a job that waits for machines says so."""


class Tally:
    """What a scoring job has done so far, unit by unit; kept by the driver."""

    def __init__(self, run: Run, decision: DecisionSettings, max_errors: float | int | None) -> None:
        self.total: dict[str, Any] = add_parts([empty_part(decision)])
        self.rows_now = 0
        """Rows done by this process, without those of earlier ones."""
        self._num_rows, self._num_units, self._max_errors = run.num_rows, run.num_units, max_errors
        self._started = time.monotonic()
        self._first: float | None = None
        self._at_first = (0, 0, 0.0)

    @property
    def elapsed(self) -> float:
        """Seconds since the job began."""
        return time.monotonic() - self._started

    def add_done(self, parts: Sequence[dict[str, Any]]) -> None:
        """Count in units that an earlier process finished."""
        self.total = add_parts([self.total, *parts])

    def add(self, part: dict[str, Any]) -> None:
        """Count in a unit. Raises JobError where there are more errors than may be."""
        self.total = add_parts([self.total, part])
        self.rows_now += part["rows_in"]
        if self._first is None:  # what came before was the start: Ray, models, the first units
            self._first = time.monotonic()
            self._at_first = (self.rows_now, self.total["tokens"], self.total["seconds"].get("forward", 0.0))
        self._check_errors()

    def line(self) -> str:
        """One line for people: done, rate, errors, what the replicas do, time to go."""
        done = self.total["rows_in"]
        line = f"{done:,}/{self._num_rows:,} rows ({done / max(self._num_rows, 1):.0%})"
        line += f", {self.total['units']:,}/{self._num_units:,} units"
        if self._first is None:
            return f"{line}, {self.elapsed:.0f} s: starting, loading the model, scoring the first units"
        seconds = max(time.monotonic() - self._first, 1e-9)
        rows, tokens = self.rows_now - self._at_first[0], self.total["tokens"] - self._at_first[1]
        if self.total["rows_in_error"]:
            line += f", {self.total['rows_in_error']:,} rows in error"
        if not rows:
            return line
        line += f", {rows / seconds:,.1f} rows/s, {tokens / seconds:,.0f} tokens/s, {self._busy()}"
        return f"{line}, {(self._num_rows - done) * seconds / rows:,.0f} s to go"

    def _busy(self) -> str:
        """What the job spends its time on, as shares of all stages' seconds."""
        seconds = {name: value for name, value in self.total["seconds"].items() if name != "wait"}
        whole = sum(seconds.values()) or 1.0
        return ", ".join(f"{name} {value / whole:.0%}" for name, value in seconds.items())

    def _check_errors(self) -> None:
        bad, limit = self.total["rows_in_error"], self._max_errors
        if limit is None:
            return
        most = limit * self._num_rows if isinstance(limit, float) else limit
        if bad > most:
            kinds = sorted(self.total["errors"].items(), key=lambda item: -item[1])[:3]
            named = "; ".join(f"{count:,}: {kind}" for kind, count in kinds)
            raise JobError(
                f"stopped: {bad:,} of {self.total['rows_in']:,} rows have errors and max_errors={limit} allows "
                f"{most:,.0f} ({named})"
            )


class Gauges:
    """Numbers by name, which Ray's agents export to Prometheus as pipelines_KIND_NAME."""

    def __init__(self, kind: str, tags: dict[str, str]) -> None:
        self._kind, self._tags = kind, tags
        self._gauges: dict[str, Gauge] = {}

    def __call__(self, values: Mapping[str, float]) -> None:
        """The newest values."""
        for name, value in values.items():
            if name not in self._gauges:
                full = f"pipelines_{self._kind}_{name}"
                self._gauges[name] = Gauge(full, "As the progress line has it.", tuple(self._tags))
            self._gauges[name].set(value, self._tags)


@ray.remote(num_cpus=0)
class Relay:
    """Carries workers' lines to the driver; one per job."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def say(self, line: str) -> None:
        """Leave a line."""
        self._lines.append(line)

    def take(self) -> list[str]:
        """Lines left since the last time."""
        lines, self._lines = self._lines, []
        return lines


@contextmanager
def watched(tally: Tally, report: Callable[[str], None], *, every_seconds: float = 5.0) -> Iterator[None]:
    """Report the tally's line while the body runs."""
    with repeated(lambda: report(tally.line()), every_seconds):
        yield


@contextmanager
def relayed(relay: Any, report: Callable[[str], None]) -> Iterator[None]:
    """Report the relay's lines while the body runs, and the last of them after it."""

    def show() -> None:
        for line in ray.get(relay.take.remote(), timeout=5):
            report(line)

    with repeated(show, 1.0):
        yield
    with suppress(ray.exceptions.RayError):  # only lines are lost
        show()


@contextmanager
def waits_told(needed: Mapping[str, float], report: Callable[[str], None]) -> Iterator[None]:
    """While the body runs, say every WAIT_SECONDS that its workers have no place: Ray waits for one in silence."""
    job = ray.get_runtime_context().get_job_id()

    def show() -> None:
        groups = placement_group_table()
        is_waiting = any(group["state"] == "PENDING" and name.endswith(job) for name, group in groups.items())
        there, free = ray.cluster_resources(), ray.available_resources()
        if is_waiting or any(amount > there.get(name, 0) for name, amount in needed.items()):
            found = [
                f"{amount:g} {name}, of which the cluster has {there.get(name, 0):g} and {free.get(name, 0):g} free"
                for name, amount in needed.items()
            ]
            report(f"still waiting for {'; '.join(found)}")

    with repeated(show, WAIT_SECONDS):
        yield


@contextmanager
def repeated(show: Callable[[], None], every_seconds: float) -> Iterator[None]:
    """Call show from a thread every few seconds while the body runs."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(every_seconds):
            try:
                show()
            except ray.exceptions.RayError:
                continue  # the cluster is busy or going down; the job itself will say

    watcher = threading.Thread(target=watch, daemon=True, name="progress")
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
