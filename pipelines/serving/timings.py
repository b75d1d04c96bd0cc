"""How long a request took, and who counts requests.

The headers have the names of text-embeddings-inference's, in milliseconds.
"""

from __future__ import annotations

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

    @contextmanager
    def tokenizing(self) -> Iterator[None]:
        """Count the time of the body as tokenization, its wait for the thread too."""
        begun = time.perf_counter()
        yield
        self.tokenization += time.perf_counter() - begun

    @property
    def total(self) -> float:
        """Time since the request came to the replica."""
        return time.perf_counter() - self.started

    def headers(self) -> dict[str, str]:
        """Response headers."""
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
    """Timings of the request that this task answers; new ones outside of a request."""
    return _current.get() or begin_timings()


class Metrics(Protocol):
    """Counts what a server does."""

    def count_request(self, route: str, status: int, timings: Timings) -> None:
        """A response left."""

    def count_pass(self, num_tokens: int, seconds: float, queued_tokens: int) -> None:
        """A forward pass ended, and so many tokens wait for the next."""

    def count_predictions(self, predictions: Iterable[Prediction]) -> None:
        """Documents got labels."""

    def text(self) -> str:
        """All counts in Prometheus' text format."""


class NoMetrics:
    """`Metrics` that count nothing."""

    def count_request(self, route: str, status: int, timings: Timings) -> None:
        """Do nothing."""

    def count_pass(self, num_tokens: int, seconds: float, queued_tokens: int) -> None:
        """Do nothing."""

    def count_predictions(self, predictions: Iterable[Prediction]) -> None:
        """Do nothing."""

    def text(self) -> str:
        """Nothing was counted."""
        return ""
