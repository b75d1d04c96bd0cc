"""Seconds from the start of a command to its end (ten short texts), or to its readiness (a server), and its memory.

    python benchmarks/startup.py runs/demo/model [runs/demo/int8]

Each is the median of three. The first start with OpenVINO converts the model; later ones take it from the cache.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

COMMAND = [sys.executable, "-m", "pipelines"]


def megabytes(process):
    """Memory of a process and its descendants. Shared pages are counted once."""
    members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return round(sum(member.memory_full_info().pss for member in members) / 2**20)


def scored(folder, source, *options):
    """Seconds of scoring the texts."""
    with tempfile.TemporaryDirectory() as output:
        command = [*COMMAND, "score", folder, "--input", source, "--output", f"{output}/scored", "-q", *options]
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return {"seconds": round(time.perf_counter() - started, 2)}


def served(folder, *options):
    """Seconds until a server is ready, and its memory."""
    started = time.perf_counter()
    command = [*COMMAND, "serve", folder, "--port", "8917", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if line.startswith("ready"):
                return {"seconds": round(time.perf_counter() - started, 2), "megabytes": megabytes(process)}
        raise SystemExit("the server did not start")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def main():
    """Print a line of JSON per folder and way."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    scratch = tempfile.mkdtemp()
    source = str(Path(scratch) / "ten.parquet")
    pq.write_table(pa.table({"text": [f"Lunch at noon, place {number}?" for number in range(10)]}), source)
    ways = {
        "score, torch": lambda folder: scored(folder, source, "--set", "engine=torch"),
        "score": lambda folder: scored(folder, source),
        "score --replicas 1 (Ray)": lambda folder: scored(folder, source, "--replicas", "1"),
        "serve --local": lambda folder: served(folder, "--local"),
        "serve (Ray Serve)": lambda folder: served(folder),
    }
    for folder in sys.argv[1:]:
        scored(folder, source)
        for name, run in ways.items():
            if "torch" in name and (Path(folder) / "openvino_model.xml").exists():
                continue
            found = [run(folder) for _ in range(3)]
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            print(json.dumps({"folder": folder, "what": name, **middle}), flush=True)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
