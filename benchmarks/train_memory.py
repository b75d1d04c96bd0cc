"""Memory of a training process on 1x, 4x and 20x the same emails.

    python benchmarks/train_memory.py

A tiny random BERT without attention dropout (whose masks would be most of the memory), and a shuffle buffer of 2,048
windows of 512 tokens: 4 MB of ids, of which a process holds two, and a third while it is put together. The peak is of
anonymous memory, sampled every quarter of a second: what the system could not simply drop, so without the mapped files
of tokens.
"""

import json
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from bulk_memory import watched
from random_model import make_model

EMAILS = Path(__file__).parent.parent / "docs" / "demo" / "emails" / "test"


def anonymous_mb(process):
    """Megabytes of anonymous memory, as Linux tells it."""
    return sum(area.anonymous for area in process.memory_maps()) >> 20


def main():
    """One line of JSON per input size."""
    with tempfile.TemporaryDirectory() as base:
        make_model(Path(base) / "model", hidden=32, layers=1, max_length=512, attention_probs_dropout_prob=0.0)
        emails = pa.concat_tables([pq.read_table(EMAILS).select(["text", "label"])] * 8).combine_chunks()
        for times in (1, 4, 20):
            source = Path(base) / f"in{times}"
            source.mkdir()
            for number in range(times):
                pq.write_table(emails, source / f"{number}.parquet", row_group_size=200)
            command = [sys.executable, "-m", "pipelines", "train", "--train", str(source), "--model", f"{base}/model",
                       "--kind", "binary", "--output", f"{base}/out{times}", "--json", "--num-workers", "0",
                       "--set", "train_dtype=float32", "--set", "epochs=1", "--set", "batch_size=64",
                       "--set", "shuffle_buffer=2048"]  # fmt: skip
            summary, found = watched(command, anonymous_mb)
            print(json.dumps({"times": times, "windows": summary["windows"], "steps": summary["steps"],
                              "ids_mb": summary["tokens_per_epoch"] * 4 >> 20, "peak_mb": max(found),
                              "seconds": summary["seconds"]}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
