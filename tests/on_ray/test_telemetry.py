"""Gauges of a run are exported to Prometheus."""

import time

from pipelines.on_ray.serve.metrics import collect
from pipelines.on_ray.telemetry import Gauges


def test_gauges_reach_node_agent(local_ray):
    gauges = Gauges("train", {"model": "runs/spam"})
    gauges({"loss": 0.5, "step": 10})
    gauges({"loss": 0.25})
    deadline = time.monotonic() + 60
    while not {"loss", "step"} <= (found := series()).keys():
        assert time.monotonic() < deadline
        time.sleep(1)
    assert found == {"loss": 0.25, "step": 10.0}


def series():
    """The latest value of each gauge of the run."""
    lines = [line for line in collect().splitlines() if 'model="runs/spam"' in line]
    names = [line.split("{")[0].removeprefix("ray_pipelines_train_") for line in lines]
    return dict(zip(names, (float(line.split()[-1]) for line in lines), strict=True))
