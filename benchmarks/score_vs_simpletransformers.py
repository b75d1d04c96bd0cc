"""Compare `pipelines score` with Simple Transformers' predict on the same weights, emails and windows of 256 tokens.

    python benchmarks/score_vs_simpletransformers.py runs/demo/model st/bin/python

The second argument is the Python of a virtual environment with Simple Transformers
(benchmarks/simpletransformers_run.py describes how to create it). Wall time is the time from the start of the command
to its exit. The steady phase does not include the start: for `pipelines score` it is the time from the first finished
unit to the last, and for Simple Transformers it is the predict call. Memory is the peak over the whole process tree.
Shared pages are counted once (PSS).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent
EMAILS = ROOT / "docs" / "demo" / "emails" / "test"


def tree_megabytes(process: psutil.Process) -> float:
    """Return the memory of a process and all its descendants, in megabytes."""
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            try:
                total += member.memory_full_info().pss
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return total / 2**20


def measure(command: list[str]) -> tuple[float, float, str]:
    """Return the wall seconds, the peak megabytes and the stdout of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, tree_megabytes(psutil.Process(process.pid)))
        time.sleep(3)  # a more frequent reading would slow the measured processes down
    seconds = time.perf_counter() - started
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with {process.returncode}")
    return seconds, peak, output


def steady_rate(output: str) -> float:
    """Return the rows per second between the first finished unit and the last."""
    parts = sorted((path.stat().st_mtime, pq.read_metadata(path).num_rows) for path in Path(output).glob("part-*"))
    return sum(rows for _, rows in parts[1:]) / (parts[-1][0] - parts[0][0])


def ours(folder: str, dtype: str) -> dict[str, object]:
    """Measure `pipelines score` with one dtype."""
    output = f"{tempfile.mkdtemp()}/scored"
    command = [sys.executable, "-m", "pipelines", "score", folder, "--input", str(EMAILS), "--output", output, "--json"]
    seconds, peak, _ = measure([*command, "--set", f"dtype={dtype}"])
    return {"wall_s": round(seconds, 1), "steady_rows_per_s": round(steady_rate(output), 1), "peak_mb": round(peak)}


def main() -> None:
    """Print one line of JSON per system."""
    folder, python = sys.argv[1:3]
    os.environ["HF_HUB_OFFLINE"] = "1"
    num_rows = sum(pq.read_metadata(path).num_rows for path in EMAILS.glob("*.parquet"))
    script = str(ROOT / "benchmarks" / "simpletransformers_run.py")
    seconds, peak, output = measure([python, script, "predict", folder])
    theirs = json.loads(output.strip().splitlines()[-1])
    rate = round(num_rows / theirs["predict_seconds"], 1)
    print(json.dumps({"simpletransformers": {"wall_s": round(seconds, 1), "steady_rows_per_s": rate,
                                             "peak_mb": round(peak)}}))  # fmt: skip
    for dtype in ("float32", "auto"):
        print(json.dumps({f"pipelines {dtype}": ours(folder, dtype)}))


if __name__ == "__main__":
    main()
