"""Metrics of the server, which Ray's agents export to Prometheus.

They contain counts, times and scores, but no texts and no keys.
"""

from __future__ import annotations

import http.client
import urllib.request
from collections.abc import Iterable, Mapping, Sequence

import ray
from ray.serve import metrics

from pipelines.serving.metrics import MOST_LABELS, PREFIX, SECONDS, SHARES
from pipelines.serving.schema import Prediction
from pipelines.serving.timings import Timings

SCRAPE_S = 2.0


class RayMetrics:
    """Metrics of one replica. Ray Serve adds the application, deployment and replica to each series."""

    def __init__(self, labels: Sequence[str], batch_tokens: int) -> None:
        self._labels = frozenset(labels[:MOST_LABELS])
        self._batch_tokens = batch_tokens
        self._requests = metrics.Counter(
            f"{PREFIX}requests",
            "Number of responses by route and status.",
            ("route", "status"),  # type: ignore[arg-type]  # Ray's annotation has one key, but any number is allowed
        )
        self._seconds = metrics.Histogram(
            f"{PREFIX}request_seconds", "Seconds of a request in the replica.", boundaries=SECONDS, tag_keys=("route",)
        )
        self._queue = metrics.Histogram(f"{PREFIX}queue_seconds", "Seconds in the queue.", boundaries=SECONDS)
        self._queued = metrics.Gauge(f"{PREFIX}queued_tokens", "Tokens that waited when the last forward pass ended.")
        self._inference = metrics.Histogram(f"{PREFIX}inference_seconds", "Seconds of a pass.", boundaries=SECONDS)
        self._fill = metrics.Histogram(
            f"{PREFIX}batch_fill", "Tokens of a forward pass, as a share of batch_tokens.", boundaries=SHARES
        )
        self._tokens = metrics.Counter(f"{PREFIX}tokens", "Number of scored tokens.")
        self._decided = metrics.Counter(f"{PREFIX}decided", "Number of documents by predicted label.", ("label",))
        self._documents = metrics.Counter(f"{PREFIX}documents", "Number of documents with a prediction.")
        self._scores = metrics.Histogram(
            f"{PREFIX}score", "Scores of documents by label.", boundaries=SHARES, tag_keys=("label",)
        )

    def count_request(self, route: str, status: int, timings: Timings) -> None:
        """Count a response that was sent."""
        self._requests.inc(tags={"route": route, "status": str(status)})
        self._seconds.observe(timings.total, tags={"route": route})
        if timings.inference:
            self._queue.observe(timings.queue)

    def count_pass(self, num_tokens: int, seconds: float, queued_tokens: int) -> None:
        """Count a forward pass.

        Args:
            num_tokens: Tokens of the forward pass.
            seconds: Duration of the forward pass.
            queued_tokens: Tokens that wait after it.
        """
        self._queued.set(queued_tokens)
        self._inference.observe(seconds)
        self._fill.observe(min(num_tokens / self._batch_tokens, 1.0))
        self._tokens.inc(max(num_tokens, 1))

    def count_predictions(self, predictions: Iterable[Prediction]) -> None:
        """Count the documents, their predicted labels and their scores."""
        for prediction in predictions:
            self._documents.inc()
            for label in {prediction.label, *(prediction.labels or [])} & self._labels:
                self._decided.inc(tags={"label": str(label)})
            for label in prediction.scores.keys() & self._labels:
                self._scores.observe(prediction.scores[label], tags={"label": label})

    def text(self) -> str:
        """The metrics of all replicas in Prometheus' text format."""
        return collect()


def collect() -> str:
    """Return the metrics of all replicas in Prometheus' text format, from Ray's agents on all nodes.

    A node that does not answer is omitted. The replicas send their counts to the agents every few seconds.
    """
    found: list[str] = []
    for node in ray.nodes():
        if node["Alive"] and node.get("MetricsExportPort"):
            found += _scraped(node)
    kept: dict[str, None] = dict.fromkeys(line for line in found if f"ray_{PREFIX}" in line)  # each comment only once
    return "\n".join([*kept, ""])


def _scraped(node: Mapping[str, object]) -> list[str]:
    try:
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=SCRAPE_S) as answer:
            return str(answer.read().decode()).splitlines()
    except (OSError, http.client.HTTPException):
        return []
