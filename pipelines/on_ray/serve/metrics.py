"""What the server says of itself: timings in headers, and metrics that Ray's agents export to Prometheus.

No texts, no keys: counts, times, scores. The headers have the names of text-embeddings-inference's, in milliseconds.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import ray
from ray.serve import metrics

from pipelines.on_ray.serve.schema import Prediction

PREFIX = "pipelines_"
MOST_LABELS = 100
"""Of those that have series of their own; a series per label is held by every replica and by Prometheus."""
SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
SHARES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
SCRAPE_S = 2.0


@dataclass
class Timings:
    """Of one request, in seconds."""

    started: float = field(default_factory=time.perf_counter)
    tokenization: float = 0.0
    queue: float = 0.0
    inference: float = 0.0

    @contextmanager
    def tokenizing(self) -> Iterator[None]:
        """Count what is done inside as tokenization, its wait for the thread too."""
        begun = time.perf_counter()
        yield
        self.tokenization += time.perf_counter() - begun

    @property
    def total(self) -> float:
        """Since the request came to the replica."""
        return time.perf_counter() - self.started

    def headers(self) -> dict[str, str]:
        """As text-embeddings-inference says it."""
        seconds = {"total": self.total, "tokenization": self.tokenization, "queue": self.queue,
                   "inference": self.inference}  # fmt: skip
        return {f"x-{name}-time": f"{1000 * value:.1f}" for name, value in seconds.items()}


_TIMINGS: ContextVar[Timings] = ContextVar("timings")


def begin_timings() -> Timings:
    """For the request that comes now. (A function, because Ray Serve ships handlers by value and no ContextVar.)"""
    timings = Timings()
    _TIMINGS.set(timings)
    return timings


def current_timings() -> Timings:
    """Of the request that is being answered."""
    return _TIMINGS.get()


class Metrics:
    """A replica's counters. Ray Serve adds its application, deployment and replica to each series."""

    def __init__(self, labels: Sequence[str], batch_tokens: int) -> None:
        self._labels = frozenset(labels[:MOST_LABELS])
        self._batch_tokens = batch_tokens
        self._requests = metrics.Counter(
            f"{PREFIX}requests",
            "Answers by route and status.",
            ("route", "status"),  # type: ignore[arg-type]  # Ray's annotation says one key, and it takes any number
        )
        self._seconds = metrics.Histogram(
            f"{PREFIX}request_seconds", "Time in the replica.", boundaries=SECONDS, tag_keys=("route",)
        )
        self._queue = metrics.Histogram(f"{PREFIX}queue_seconds", "Waiting for a pass.", boundaries=SECONDS)
        self._queued = metrics.Gauge(f"{PREFIX}queued_tokens", "Tokens that waited when the last pass ended.")
        self._inference = metrics.Histogram(f"{PREFIX}inference_seconds", "A forward pass.", boundaries=SECONDS)
        self._fill = metrics.Histogram(
            f"{PREFIX}batch_fill", "Tokens of a pass, as a share of batch_tokens.", boundaries=SHARES
        )
        self._tokens = metrics.Counter(f"{PREFIX}tokens", "Tokens that were scored.")
        self._decided = metrics.Counter(f"{PREFIX}decided", "Documents that were given a label.", ("label",))
        self._documents = metrics.Counter(f"{PREFIX}documents", "Documents that were answered.")
        self._scores = metrics.Histogram(
            f"{PREFIX}score", "Documents' scores by label.", boundaries=SHARES, tag_keys=("label",)
        )

    def count_request(self, route: str, status: int, timings: Timings) -> None:
        """An answer left."""
        self._requests.inc(tags={"route": route, "status": str(status)})
        self._seconds.observe(timings.total, tags={"route": route})
        if timings.inference:
            self._queue.observe(timings.queue)

    def count_pass(self, num_tokens: int, seconds: float, queued_tokens: int) -> None:
        """A forward pass ended, and so many tokens wait for the next."""
        self._queued.set(queued_tokens)
        self._inference.observe(seconds)
        self._fill.observe(min(num_tokens / self._batch_tokens, 1.0))
        self._tokens.inc(max(num_tokens, 1))

    def count_predictions(self, predictions: Iterable[Prediction]) -> None:
        """Documents were decided: how often each label, at what scores."""
        for prediction in predictions:
            self._documents.inc()
            for label in {prediction.label, *(prediction.labels or [])} & self._labels:
                self._decided.inc(tags={"label": str(label)})
            for label in prediction.scores.keys() & self._labels:
                self._scores.observe(prediction.scores[label], tags={"label": label})


def collect() -> str:
    """Prometheus' text of every replica's metrics, from Ray's agents on all nodes; a node that is silent is left out.

    Counts reach the agents every few seconds.
    """
    found: list[str] = []
    for node in ray.nodes():
        if node["Alive"] and node.get("MetricsExportPort"):
            found += _scraped(node)
    kept: dict[str, None] = dict.fromkeys(line for line in found if f"ray_{PREFIX}" in line)  # comments but once
    return "\n".join([*kept, ""])


def _scraped(node: Mapping[str, object]) -> list[str]:
    try:
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=SCRAPE_S) as answer:
            return str(answer.read().decode()).splitlines()
    except OSError:
        return []
