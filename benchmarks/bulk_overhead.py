"""Measure the cost of Ray and the driver per unit, and how busy replicas are, with a sleep instead of the forward pass.

    python benchmarks/bulk_overhead.py MODEL --units 100000  # no-op units: rate and the driver's memory
    python benchmarks/bulk_overhead.py MODEL --units 600 --seconds 0.5 --actors 8  # how busy replicas are

Tokenizing is real, with one short text per unit. Nothing is written.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.bulk.job import ScoreJob, check_job
from pipelines.bulk.run_folder import open_run
from pipelines.bulk.summary import Counts
from pipelines.on_ray import score as bulk
from pipelines.on_ray.cluster import connected
from pipelines.on_ray.replica import ScoreUnits
from pipelines.text.stage import TokenizeStats


def sleeper(seconds):
    """Return a replica class without a model. Ray pickles a local class by value."""

    class SleepingUnits:
        def __init__(self):
            self._forward = threading.Lock()

        def score_unit(self, unit):
            with self._forward:
                started = time.perf_counter()
                time.sleep(seconds)
                busy = time.perf_counter() - started
            rows = TokenizeStats.of(unit.table).rows_in
            return Counts(units=1, rows_in=rows, rows_out=rows, seconds={"forward": busy})

    class Sleeper(ScoreUnits):
        def __init__(self, setup, crash_record=None):
            super().__init__(setup, crash_record, make_scorer=lambda *_: SleepingUnits())

    return Sleeper


def main():
    """Print one line of JSON every 20 seconds, and one at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="any finished model folder; only its tokenizer is used")
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.0, help="seconds of sleep instead of a forward pass")
    parser.add_argument("--actors", type=int, default=1)
    options = parser.parse_args()
    bulk.ScoreUnits = sleeper(options.seconds)
    bulk.ACTOR_CPUS = min(0.5, 1.0 / options.actors)
    driver = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        texts = pa.table({"text": [f"number {row}" for row in range(options.units)]})
        pq.write_table(texts, Path(folder) / "in.parquet", row_group_size=5_000)
        job = ScoreJob.parse({"model": options.model, "input": f"{folder}/in.parquet", "output": f"{folder}/out",
                                   "unit_bytes": 1, "replicas": options.actors})  # fmt: skip
        started = time.perf_counter()
        checked = check_job(job)
        run = open_run(job.output, checked.files, checked.carried, checked.identity, input=job.input, unit_bytes=1)
        planned = {"units": run.num_units, "plan_s": round(time.perf_counter() - started, 1),
                   "driver_mb": driver.memory_info().rss >> 20}  # fmt: skip
        print(json.dumps(planned), flush=True)
        done, busy, first, shown = 0, 0.0, 0.0, time.perf_counter()
        done_before, busy_before = 0, 0.0
        with connected():
            units = (unit for generation in run.generations for unit in generation)
            for counts in bulk._score_units(checked, units, address=None):
                done += 1
                now = time.perf_counter()
                if done == 2 * options.actors:  # from here on, the pipeline is full
                    first, busy_before, done_before = now - 1e-9, busy, done
                busy += counts.seconds["forward"]
                if first and now - shown > 20:
                    shown = now
                    print(json.dumps({"done": done, "units_per_s": round((done - done_before) / (now - first), 1),
                                      "driver_mb": driver.memory_info().rss >> 20}), flush=True)  # fmt: skip
            seconds = time.perf_counter() - first
        print(json.dumps({"done": done, "seconds": round(seconds, 1),
                          "units_per_s": round((done - done_before) / seconds, 1),
                          "busy": round((busy - busy_before) / seconds / options.actors, 3),
                          "driver_mb": driver.memory_info().rss >> 20}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
