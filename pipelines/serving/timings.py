"""Times of a request, and the interface of the server's metrics.

The response headers have the same names as those of text-embeddings-inference. Their unit is milliseconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from pipelines.serving.schema import Prediction


@dataclass
class Timings:
    """Times of one request, in seconds."""

    started: float = field(default_factory=time.perf_counter)
    tokenization: float = 0.0
    queue: float = 0.0
    inference: float = 0.0
    deadline: float = math.inf
    """Time at which the request is given up."""
    deadline_name: str = ""
    """The setting or header that says so."""

    @contextmanager
    def tokenizing(self) -> Iterator[None]:
        """Count the time inside the context as tokenization, including the wait for the thread."""
        begun = time.perf_counter()
        yield
        self.tokenization += time.perf_counter() - begun

    @property
    def total(self) -> float:
        """Seconds since the request arrived at the replica."""
        return time.perf_counter() - self.started

    @property
    def left(self) -> float:
        """Seconds until the request is given up."""
        return self.deadline - time.perf_counter()

    def headers(self) -> dict[str, str]:
        """Return the response headers."""
        seconds = {
            "total": self.total,
            "tokenization": self.tokenization,
            "queue": self.queue,
            "inference": self.inference,
        }
        return {f"x-{name}-time": f"{1000 * value:.1f}" for name, value in seconds.items()}


_current: ContextVar[Timings | None] = ContextVar("timings", default=None)


def begin_timings() -> Timings:
    """Start the timings of the request that this task answers."""
    timings = Timings()
    _current.set(timings)
    return timings


def current_timings() -> Timings:
    """Return the timings of the request that this task answers. Outside of a request, they are new."""
    return _current.get() or begin_timings()


class Metrics(Protocol):
    """Counts what a server does."""

    def count_request(self, route: str, status: int, timings: Timings) -> None:
        """Count a response that was sent."""

    def count_pass(self, num_tokens: int, seconds: float, queued_tokens: int) -> None:
        """Count a forward pass. queued_tokens is the number of tokens that wait after it."""

    def count_predictions(self, predictions: Iterable[Prediction]) -> None:
        """Count documents by their predicted labels."""

    def text(self) -> str:
        """Return all counts in Prometheus' text format."""


class NoMetrics:
    """`Metrics` that count nothing."""

    def count_request(self, route: str, status: int, timings: Timings) -> None:
        """Do nothing."""

    def count_pass(self, num_tokens: int, seconds: float, queued_tokens: int) -> None:
        """Do nothing."""

    def count_predictions(self, predictions: Iterable[Prediction]) -> None:
        """Do nothing."""

    def text(self) -> str:
        """Return an empty text."""
        return ""
