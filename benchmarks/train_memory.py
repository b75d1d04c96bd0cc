"""Measure the memory of a training process on 1x, 4x and 20x the same emails.

    python benchmarks/train_memory.py [--num-workers 1]

The model is a tiny random BERT without attention dropout, because the masks of attention dropout would be most of the
memory. The shuffle buffer has 2,048 windows of 512 tokens, which are 4 MB of ids. A process holds two buffers, and a
third one while it is assembled. The peak is that of anonymous memory, sampled every quarter of a second. Anonymous
memory is the memory that the system cannot simply drop, so it does not include the mapped files of tokens. With a
worker, the tokens are in the object store of a separate Ray, which has 80 MB and spills the rest to disk. The peak is
then that of the worker.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from bulk_memory import watched
from random_model import make_model

EMAILS = Path(__file__).parent.parent / "docs" / "demo" / "emails" / "test"
PORT = 26377
OBJECT_STORE_BYTES = 80_000_000  # about the smallest size that Ray accepts


def anonymous_mb(process):
    """Return the megabytes of anonymous memory that Linux reports."""
    return sum(area.anonymous for area in process.memory_maps()) >> 20


@contextlib.contextmanager
def small_ray(folder):
    """Start a Ray cluster on this machine and yield the environment variables that select it."""
    ray = str(Path(sys.executable).with_name("ray"))
    environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{PORT}", "RAY_AUTH_MODE": "disabled"}
    start = [ray, "start", "--head", f"--port={PORT}", "--num-cpus=4", f"--object-store-memory={OBJECT_STORE_BYTES}",
             f"--temp-dir={folder}", "--include-dashboard=false", "--disable-usage-stats"]  # fmt: skip
    subprocess.run(start, check=True, capture_output=True, env={**environment, "RAY_ADDRESS": ""})
    try:
        yield environment
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if any(folder in word for word in process.info["cmdline"] or ()):
                process.kill()


def spilled_mb(folder):
    """Return the megabytes that the object store has spilled to disk so far."""
    return sum(file.stat().st_size for file in Path(folder).glob("session_*/ray_spilled_objects*/*")) >> 20


def of_workers(folder):
    """Return a function that samples the workers' anonymous memory and the spilled megabytes."""

    def sample(_):
        workers = [p for p in psutil.process_iter(["cmdline"]) if "TrainWorker" in " ".join(p.info["cmdline"] or ())]
        return max([anonymous_mb(worker) for worker in workers], default=0), spilled_mb(folder)

    return sample


def main():
    """Print one line of JSON per input size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-workers", type=int, choices=[0, 1], default=0)
    num_workers = parser.parse_args().num_workers
    with tempfile.TemporaryDirectory() as base:
        make_model(Path(base) / "model", hidden=32, layers=1, max_length=512, attention_probs_dropout_prob=0.0)
        emails = pa.concat_tables([pq.read_table(EMAILS).select(["text", "label"])] * 8).combine_chunks()
        for times in (1, 4, 20):
            source = Path(base) / f"in{times}"
            source.mkdir()
            for number in range(times):
                pq.write_table(emails, source / f"{number}.parquet", row_group_size=200)
            command = [sys.executable, "-m", "pipelines", "train", "--train", str(source), "--model", f"{base}/model",
                       "--kind", "binary", "--output", f"{base}/out{times}", "--json", "--num-workers",
                       str(num_workers), "--set", "train_dtype=float32", "--set", "epochs=1", "--set", "batch_size=64",
                       "--set", "shuffle_buffer=2048"]  # fmt: skip
            if num_workers:
                with tempfile.TemporaryDirectory(prefix="r") as folder, small_ray(folder) as environment:
                    summary, found = watched(command, of_workers(folder), environment)
                    peaks = {"peak_mb": max(peak for peak, _ in found), "spilled_mb": max(mb for _, mb in found)}
            else:
                summary, found = watched(command, anonymous_mb)
                peaks = {"peak_mb": max(found)}
            print(json.dumps({"times": times, "windows": summary["windows"], "steps": summary["steps"],
                              "ids_mb": summary["tokens_per_epoch"] * 4 >> 20, **peaks,
                              "seconds": summary["seconds"]}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
