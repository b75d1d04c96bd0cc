"""Metrics of a server in one process, for Prometheus. They have the names that Ray gives those of its replicas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipelines.serving.schema import Prediction
from pipelines.serving.timings import Timings

PREFIX = "pipelines_"
MOST_LABELS = 100
"""Maximum number of labels with their own series. Every replica and Prometheus keep one series per label."""
SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
SHARES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


class LocalMetrics:
    """`Metrics` of this process. They contain counts, times and scores, but no texts and no keys."""

    def __init__(self, labels: Sequence[str], batch_tokens: int) -> None:
        self._labels = frozenset(labels[:MOST_LABELS])
        self._batch_tokens = batch_tokens
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Number of responses by route and status.", "route", "status")
        self._seconds = self._histogram("request_seconds", "Seconds of a request in the replica.", SECONDS, "route")
        self._queue = self._histogram("queue_seconds", "Seconds in the queue.", SECONDS)
        about = "Tokens that waited when the last forward pass ended."
        self._queued = Gauge(f"ray_{PREFIX}queued_tokens", about, registry=self._registry)
        self._inference = self._histogram("inference_seconds", "Seconds of a pass.", SECONDS)
        self._fill = self._histogram("batch_fill", "Tokens of a forward pass, as a share of batch_tokens.", SHARES)
        self._tokens = self._counter("tokens", "Number of scored tokens.")
        self._decided = self._counter("decided", "Number of documents by predicted label.", "label")
        self._documents = self._counter("documents", "Number of documents with a prediction.")
        self._scores = self._histogram("score", "Scores of documents by label.", SHARES, "label")

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"ray_{PREFIX}{name}", about, labels, registry=self._registry)

    def _histogram(self, name: str, about: str, bounds: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"ray_{PREFIX}{name}", about, labels, registry=self._registry, buckets=bounds)

    def count_request(self, route: str, status: int, timings: Timings) -> None:
        """Count a response that was sent."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(timings.total)
        if timings.inference:
            self._queue.observe(timings.queue)

    def count_pass(self, num_tokens: int, seconds: float, queued_tokens: int) -> None:
        """Count a forward pass. queued_tokens is the number of tokens that wait after it."""
        self._queued.set(queued_tokens)
        self._inference.observe(seconds)
        self._fill.observe(min(num_tokens / self._batch_tokens, 1.0))
        self._tokens.inc(max(num_tokens, 1))

    def count_predictions(self, predictions: Iterable[Prediction]) -> None:
        """Count the documents, their predicted labels and their scores."""
        for prediction in predictions:
            self._documents.inc()
            for label in {prediction.label, *(prediction.labels or [])} & self._labels:
                self._decided.labels(label).inc()
            for label in prediction.scores.keys() & self._labels:
                self._scores.labels(label).observe(prediction.scores[label])

    def text(self) -> str:
        """Return all counts in Prometheus' text format."""
        return generate_latest(self._registry).decode()
