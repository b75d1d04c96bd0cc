"""Send log records of workers to the driver, export numbers to Prometheus, and log what a job waits for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.util import placement_group_table
from ray.util.metrics import Gauge

from pipelines.progress import ROOT, repeated

WAIT_SECONDS = 30.0
"""Seconds between two log messages of a job that waits for machines."""
logger = logging.getLogger(__name__)


class Gauges:
    """Exports numbers by name. Ray's agents pass them to Prometheus as ray_pipelines_KIND_NAME."""

    def __init__(self, kind: str, tags: dict[str, str]) -> None:
        self._kind, self._tags = kind, tags
        self._gauges: dict[str, Gauge] = {}

    def __call__(self, values: Mapping[str, float]) -> None:
        """Export the newest values."""
        for name, value in values.items():
            if name not in self._gauges:
                full = f"pipelines_{self._kind}_{name}"
                self._gauges[name] = Gauge(full, "The same number as in the progress line.", tuple(self._tags))
            self._gauges[name].set(value, self._tags)


@ray.remote(num_cpus=0)
class LogRelay:
    """Actor between the driver and the workers: log records one way, interruptions the other. There is one per job."""

    def __init__(self) -> None:
        self._records: list[tuple[str, int, str]] = []
        self._is_interrupted = self._was_asked = False

    def add(self, name: str, level: int, message: str) -> None:
        """Store a record."""
        self._records.append((name, level, message))

    def take(self) -> list[tuple[str, int, str]]:
        """Return the records since the last call."""
        records, self._records = self._records, []
        return records

    def interrupt(self) -> bool:
        """Tell the workers that the job is to end. Return whether any of them asked for it before."""
        self._is_interrupted = True
        return self._was_asked

    def is_interrupted(self) -> bool:
        """Return whether the job is to end."""
        self._was_asked = True
        return self._is_interrupted


class RelayHandler(logging.Handler):
    """Sends a worker's log records to the driver."""

    def __init__(self, relay: Any) -> None:
        super().__init__(logging.INFO)
        self._relay = relay

    def emit(self, record: logging.LogRecord) -> None:
        """Send the formatted message."""
        self._relay.add.remote(record.name, record.levelno, record.getMessage())


def relay_logs(relay: Any) -> None:
    """Send this worker's log to the driver from now on."""
    ROOT.handlers = [RelayHandler(relay)]
    ROOT.setLevel(logging.INFO)
    ROOT.propagate = False


@contextmanager
def interruptions(relay: Any) -> Iterator[Callable[[], bool]]:
    """Ask the relay every second inside the context. Yields whether the job is to end."""
    noted = threading.Event()

    def ask() -> None:
        if ray.get(relay.is_interrupted.remote(), timeout=5):
            noted.set()

    with repeated(_unless_ray_fails(ask), 1.0):
        yield noted.is_set


@contextmanager
def relayed_logs(relay: Any) -> Iterator[None]:
    """Log the workers' records in this process inside the context, and the last ones after it."""

    def show() -> None:
        for name, level, message in ray.get(relay.take.remote(), timeout=5):
            logging.getLogger(name).log(level, "%s", message)

    try:
        with repeated(_unless_ray_fails(show), 1.0):
            yield
    finally:
        with suppress(ray.exceptions.RayError):  # in that case only log lines are lost
            show()
        with suppress(ray.exceptions.RayError):
            ray.kill(relay)


@contextmanager
def waits_logged(needed: Mapping[str, float]) -> Iterator[None]:
    """Inside the context, log every WAIT_SECONDS if workers wait for resources. Ray itself logs nothing."""
    job = ray.get_runtime_context().get_job_id()

    def show() -> None:
        groups = placement_group_table()
        is_waiting = any(group["state"] == "PENDING" and name.endswith(job) for name, group in groups.items())
        total, free = ray.cluster_resources(), ray.available_resources()
        if is_waiting or any(amount > total.get(name, 0) for name, amount in needed.items()):
            found = [
                f"{amount:g} {name}, of which the cluster has {total.get(name, 0):g} and {free.get(name, 0):g} free"
                for name, amount in needed.items()
            ]
            logger.warning("still waiting for %s", "; ".join(found))

    with repeated(_unless_ray_fails(show), WAIT_SECONDS):
        yield


def _unless_ray_fails(action: Callable[[], None]) -> Callable[[], None]:
    """Return the action without Ray's errors. If the cluster fails, the job itself reports it."""

    def run() -> None:
        with suppress(ray.exceptions.RayError):
            action()

    return run
