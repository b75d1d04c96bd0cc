"""Metrics of a server: what is counted, once for all servers, and how a server in one process keeps it for Prometheus.

They contain counts, times and scores, but no texts and no keys. Imports no Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipelines.serving.schema import Prediction
from pipelines.serving.timings import Timings

MOST_LABELS = 100
"""Maximum number of labels with their own series. Every replica and Prometheus keep one series per label."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metric(NamedTuple):
    """A metric: its help text, the names of its tags, and the upper bounds of a histogram's buckets."""

    about: str
    tags: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


COUNTERS = {
    "pipelines_requests": Metric("Number of responses by route and status.", ("route", "status")),
    "pipelines_tokens": Metric("Number of scored tokens."),
    "pipelines_decided": Metric("Number of documents by predicted label.", ("label",)),
    "pipelines_documents": Metric("Number of documents with a prediction."),
}
GAUGES = {"pipelines_queued_tokens": Metric("Tokens that waited when the last forward pass ended.")}
HISTOGRAMS = {
    "pipelines_request_seconds": Metric("Seconds of a request in the replica.", ("route",), SECONDS),
    "pipelines_queue_seconds": Metric("Seconds in the queue.", (), SECONDS),
    "pipelines_inference_seconds": Metric("Seconds of a pass.", (), SECONDS),
    "pipelines_batch_fill": Metric("Tokens of a forward pass, as a share of batch_tokens.", (), SHARES),
    "pipelines_score": Metric("Scores of documents by label.", ("label",), SHARES),
}


class Series(Protocol):
    """Keeps the values of the metrics above."""

    def add(self, name: str, amount: float = 1, **tags: str) -> None:
        """Add to a counter."""

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Put a value into a histogram."""

    def text(self) -> str:
        """Return all values in Prometheus' text format."""


class ServerMetrics:
    """`Metrics` of a replica or of a server in one process."""

    def __init__(self, series: Series, labels: Sequence[str], batch_tokens: int) -> None:
        """Count into series. The first MOST_LABELS labels have their own."""
        self._series = series
        self._labels = frozenset(labels[:MOST_LABELS])
        self._batch_tokens = batch_tokens

    def count_request(self, route: str, status: int, timings: Timings) -> None:
        """Count a response that was sent."""
        self._series.add("pipelines_requests", route=route, status=str(status))
        self._series.observe("pipelines_request_seconds", timings.total, route=route)
        if timings.inference:
            self._series.observe("pipelines_queue_seconds", timings.queue)

    def count_pass(self, num_tokens: int, seconds: float, queued_tokens: int) -> None:
        """Count a forward pass.

        Args:
            num_tokens: Tokens of the forward pass.
            seconds: Duration of the forward pass.
            queued_tokens: Tokens that wait after it.
        """
        self._series.set("pipelines_queued_tokens", queued_tokens)
        self._series.observe("pipelines_inference_seconds", seconds)
        self._series.observe("pipelines_batch_fill", min(num_tokens / self._batch_tokens, 1.0))
        self._series.add("pipelines_tokens", max(num_tokens, 1))

    def count_predictions(self, predictions: Iterable[Prediction]) -> None:
        """Count the documents, their predicted labels and their scores."""
        for prediction in predictions:
            self._series.add("pipelines_documents")
            for label in {prediction.label, *(prediction.labels or [])} & self._labels:
                self._series.add("pipelines_decided", label=str(label))
            for label in prediction.scores.keys() & self._labels:
                self._series.observe("pipelines_score", prediction.scores[label], label=label)

    def text(self) -> str:
        """Return all counts in Prometheus' text format."""
        return self._series.text()


class LocalSeries:
    """`Series` of this process, with the names that Ray gives those of its replicas."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._counters = {name: Counter(f"ray_{name}", *one[:2], registry=registry) for name, one in COUNTERS.items()}
        self._gauges = {name: Gauge(f"ray_{name}", one.about, registry=registry) for name, one in GAUGES.items()}
        self._histograms = {
            name: Histogram(f"ray_{name}", *one[:2], registry=registry, buckets=one.bounds)
            for name, one in HISTOGRAMS.items()
        }

    def add(self, name: str, amount: float = 1, **tags: str) -> None:
        """Add to a counter."""
        counter = self._counters[name]
        (counter.labels(**tags) if tags else counter).inc(amount)

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._gauges[name].set(value)

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Put a value into a histogram."""
        histogram = self._histograms[name]
        (histogram.labels(**tags) if tags else histogram).observe(value)

    def text(self) -> str:
        """Return all values in Prometheus' text format."""
        return generate_latest(self._registry).decode()
