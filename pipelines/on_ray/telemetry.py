"""Counts from the workers, and the progress line that people watch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray


@ray.remote(num_cpus=0)
class Counter:
    """Adds up what workers report; one per job."""

    def __init__(self) -> None:
        self._totals: dict[str, int] = {}

    def add(self, counts: dict[str, int]) -> None:
        """Add counts by name."""
        for name, count in counts.items():
            self._totals[name] = self._totals.get(name, 0) + count

    def totals(self) -> dict[str, int]:
        """Sums so far."""
        return dict(self._totals)


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
def progress(
    counter: Any, num_rows: int, report: Callable[[str], None], *, every_seconds: float = 5.0
) -> Iterator[None]:
    """Report rows done, rate, tokens, errors and time to go while the body runs."""
    started = time.monotonic()

    def show() -> None:
        totals = ray.get(counter.totals.remote(), timeout=every_seconds)
        report(progress_line(totals, num_rows, time.monotonic() - started))

    with _repeated(show, every_seconds):
        yield


@contextmanager
def relayed(relay: Any, report: Callable[[str], None]) -> Iterator[None]:
    """Report the relay's lines while the body runs, and the last of them after it."""

    def show() -> None:
        for line in ray.get(relay.take.remote(), timeout=5):
            report(line)

    with _repeated(show, 1.0):
        yield
    with suppress(ray.exceptions.RayError):  # only lines are lost
        show()


@contextmanager
def _repeated(show: Callable[[], None], every_seconds: float) -> Iterator[None]:
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


def progress_line(totals: dict[str, int], num_rows: int, seconds: float) -> str:
    """One line for people: done, rate, errors, time to go."""
    rows, tokens = totals.get("rows", 0), totals.get("tokens", 0)
    line = f"{rows:,}/{num_rows:,} rows ({rows / max(num_rows, 1):.0%}), {totals.get('units', 0)} units"
    if not rows:
        return f"{line}, {seconds:.0f} s: loading the model and scoring the first unit"
    line += f", {rows / seconds:,.1f} rows/s, {tokens / seconds:,.0f} tokens/s"
    if totals.get("errors"):
        line += f", {totals['errors']:,} rows in error"
    return f"{line}, {(num_rows - rows) * seconds / rows:,.0f} s to go"
