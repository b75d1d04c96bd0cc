"""Read Parquet files of unusual shapes beside pyarrow: many row groups, many columns, wide rows.

Each shape is read in a new process, once by pyarrow (`pq.read_table`, one thread) and once as a scoring job reads it
(footers, units, rows). The table shows the seconds and the peak memory of each.

    python benchmarks/read_shapes.py [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def _texts(rows: int) -> pa.Array:
    return pa.array([f"text {row}" for row in range(rows)])


def _groups() -> tuple[pa.Table, int]:
    return pa.table({"text": _texts(4000)}), 1


def _columns() -> tuple[pa.Table, int]:
    return pa.table({"text": _texts(1000), **{f"c{number}": np.arange(1000) for number in range(999)}}), 10


def _most_columns() -> tuple[pa.Table, int]:
    return pa.table({"text": _texts(5), **{f"c{number}": np.arange(5) for number in range(9999)}}), 5


def _wide_rows() -> tuple[pa.Table, int]:
    random = np.random.default_rng(0)
    html = [random.bytes(25_000).hex() for _ in range(4000)]
    return pa.table({"text": _texts(4000), "html": html}), 4000


def _repeated() -> tuple[pa.Table, int]:
    texts = [f"word{number} " * 1500 for number in range(20)]
    return pa.table({"text": [texts[row % 20] for row in range(40_000)]}), 40_000


SHAPES: dict[str, Callable[[], tuple[pa.Table, int]]] = {
    "4,000 row groups of one row": _groups,
    "1,000 columns, 100 row groups": _columns,
    "10,000 columns, 5 rows": _most_columns,
    "4,000 rows with 50 KB of html each": _wide_rows,
    "40,000 rows that repeat 20 texts of 9 KB": _repeated,
}


def read(engine: str, folder: Path) -> None:
    """Read a folder in this process, and print seconds, rows and peak memory as JSON."""
    started = time.perf_counter()
    if engine == "pyarrow":
        rows = len(pq.read_table(folder, use_threads=False))
    else:
        from pipelines.storage.footers import read_footers
        from pipelines.storage.rows import read_units, together
        from pipelines.storage.shards import split_into_units

        files = read_footers(str(folder), ["text"])
        schema, units = together(files), split_into_units(files)
        rows = sum(len(found.table) for found in read_units(str(folder), units, schema, text_columns=("text",)))
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()  # the peak of getrusage is inherited from the parent
    print(json.dumps([seconds, rows, int(status.split("VmHWM:")[1].split()[0]) / 1024]))


def main() -> None:
    """Write the files, and read each with both engines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to keep the files; default: a temporary folder")
    parser.add_argument("--read", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read(options.read[0], Path(options.read[1]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        print("| shape | pyarrow, s | here, s | pyarrow, MB | here, MB |\n|---|---|---|---|---|")
        for number, (name, shape) in enumerate(SHAPES.items()):
            folder = (options.folder or Path(scratch)) / str(number)
            if not folder.exists():
                folder.mkdir(parents=True)
                table, size = shape()
                pq.write_table(table, folder / "a.parquet", row_group_size=size)
            found = {}
            for engine in ("pyarrow", "pipelines"):
                command = [sys.executable, __file__, "--read", engine, str(folder)]
                found[engine] = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
            theirs, ours = found["pyarrow"], found["pipelines"]
            assert theirs[1] == ours[1], "the same rows"
            print(f"| {name} | {theirs[0]:.2f} | {ours[0]:.2f} | {theirs[2]:.0f} | {ours[2]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
