"""Measure the peak memory of the driver and its workers while a job scores 1x, 4x and 16x the same input.

    python benchmarks/bulk_memory.py

The model is a tiny random BERT, so the job mostly reads, tokenizes and moves data. Peaks are proportional set sizes,
sampled four times per second. One peak is that of the driver alone, the other that of all processes that Ray started.
Both include the object store, which is shared memory.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from random_model import make_model

EMAILS = Path(__file__).parent.parent / "docs" / "demo" / "emails" / "test"


def watched(command, sample, environment=None):
    """Run a command. Return the summary that it prints as JSON, and the samples of sample(its psutil.Process)."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    found = []

    def watch():
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                found.append(sample(psutil.Process(process.pid)))
            time.sleep(0.25)

    watcher = threading.Thread(target=watch)
    watcher.start()
    summary = json.loads(process.communicate()[0])
    watcher.join()
    return summary, found


def proportional_mb(root):
    """Return the megabytes of the driver and of all its descendants."""
    workers = sum(member.memory_full_info().pss for member in root.children(recursive=True))
    return root.memory_full_info().pss >> 20, workers >> 20


def main():
    """Print one line of JSON per input size."""
    with tempfile.TemporaryDirectory() as base:
        make_model(Path(base) / "model", hidden=32, layers=1, max_length=256)
        texts = pq.read_table(EMAILS).select(["text"])
        block = pa.concat_tables([texts] * 8).combine_chunks()
        for times in (1, 4, 16):
            source = Path(base) / f"in{times}"
            source.mkdir()
            for number in range(times):
                pq.write_table(block, source / f"{number}.parquet", row_group_size=1000)
            command = [sys.executable, "-m", "pipelines", "score", f"{base}/model", "--input", str(source), "--json",
                       "--replicas", "1",
                       "--output", f"{base}/out{times}", "--set", "unit_bytes=1000000"]  # fmt: skip
            summary, found = watched(command, proportional_mb)
            driver, workers = (max(peaks) for peaks in zip(*found, strict=True))
            size = sum(file.stat().st_size for file in source.iterdir())
            print(json.dumps({"times": times, "parquet_mb": size >> 20, "text_mb": block["text"].nbytes * times >> 20,
                              "units": summary["units"], "driver_mb": driver, "workers_mb": workers,
                              "wall_s": summary["wall_seconds"]}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
