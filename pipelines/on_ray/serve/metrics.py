"""Keep the metrics of the server's replicas with Ray, whose agents export them to Prometheus."""

from __future__ import annotations

import http.client
import urllib.request
from collections.abc import Mapping
from typing import Any

import ray
from ray.serve import metrics

from pipelines.serving.metrics import COUNTERS, GAUGES, HISTOGRAMS

SCRAPE_S = 2.0


class RaySeries:
    """`Series` of one replica. Ray Serve adds the application, deployment and replica to each."""

    def __init__(self) -> None:
        # Ray annotates tag_keys as a tuple of one name, but takes any number.
        counter: Any = metrics.Counter
        histogram: Any = metrics.Histogram
        self._counters = {name: counter(name, one.about, one.tags) for name, one in COUNTERS.items()}
        self._gauges = {name: metrics.Gauge(name, one.about) for name, one in GAUGES.items()}
        self._histograms = {
            name: histogram(name, one.about, boundaries=list(one.bounds), tag_keys=one.tags)
            for name, one in HISTOGRAMS.items()
        }

    def add(self, name: str, amount: float = 1, **tags: str) -> None:
        """Add to a counter."""
        self._counters[name].inc(amount, tags=tags)

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._gauges[name].set(value)

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Put a value into a histogram."""
        self._histograms[name].observe(value, tags=tags)

    def text(self) -> str:
        """Return the values of all replicas in Prometheus' text format."""
        return collect()


def collect() -> str:
    """Return the metrics of all replicas in Prometheus' text format, from Ray's agents on all nodes.

    A node that does not answer is omitted. The replicas send their counts to the agents every few seconds.
    """
    found: list[str] = []
    for node in ray.nodes():
        if node["Alive"] and node.get("MetricsExportPort"):
            found += _scraped(node)
    kept: dict[str, None] = dict.fromkeys(line for line in found if "ray_pipelines_" in line)  # each comment only once
    return "\n".join([*kept, ""])


def _scraped(node: Mapping[str, object]) -> list[str]:
    try:
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=SCRAPE_S) as answer:
            return str(answer.read().decode()).splitlines()
    except (OSError, http.client.HTTPException):
        return []
