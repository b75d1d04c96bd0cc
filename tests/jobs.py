"""Helpers that create jobs on tiny models and read their output."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.progress import ROOT
from pipelines.storage.listing import list_files

FLOAT32 = {"dtype": "float32", "device": "cpu"}


def score_job(folder, source, output, **settings):
    """A scoring job in float32. It runs in this process unless `replicas` is set."""
    from pipelines.bulk.job import ScoreJob

    paths = {"model": str(folder.path), "input": str(source), "output": str(output)}
    values = {**paths, "replicas": 0, **FLOAT32, **settings}
    return ScoreJob.parse(values)


def read_scored(output):
    """All rows of a scored folder, in order."""
    tables = [pq.read_table(path) for path in list_files(str(output), also_in_tables=True)]
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables])


def train_values(data, output, **settings):
    """Settings of a short run on `training_data`."""
    return {
        "train": str(data / "data"),
        "valid": str(data / "data" / "1.parquet"),
        "model": str(data / "base"),
        "output": str(output),
        "kind": "binary",
        "epochs": 1,
        "batch_size": 5,
        "max_length": 32,
        "learning_rate": 1e-3,
        "train_dtype": "float32",
        **FLOAT32,
        "weight": [1, 4],
        **settings,
    }


def train_job(data, output, **settings):
    """A training job with the settings of `train_values`."""
    from pipelines.training.job import TrainJob

    return TrainJob.parse(train_values(data, output, **settings))


def write_shards(folder, emails, *, shards, row_group_size):
    """A folder with 60 emails per shard."""
    folder.mkdir()
    for shard in range(shards):
        pq.write_table(emails.slice(shard * 60, 60), folder / f"{shard}.parquet", row_group_size=row_group_size)
    return folder


def wait_until(holds, seconds=120):
    """Wait until holds() is true."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def clean_environment():
    """The environment without the variables of the tests' Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def start_command(*arguments, **options):
    """Start a `pipelines` command in a new process, without the tests' Ray, and without signals that tests ignore."""
    command = [sys.executable, "-m", "pipelines", *map(str, arguments)]
    ignored = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:  # as under nohup
        signal.signal(number, signal.SIG_DFL)
    try:
        return subprocess.Popen(
            command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def free_port():
    """A free port of the loopback interface."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextmanager
def logged():
    """A list that collects the messages that the package logs inside the with block."""
    lines = []

    class Collect(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler, level = Collect(), ROOT.level
    ROOT.addHandler(handler)
    ROOT.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        ROOT.removeHandler(handler)
        ROOT.setLevel(level)
