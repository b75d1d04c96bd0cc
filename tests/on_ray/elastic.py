"""A node joins a training run, gets a preemption notice and is removed. test_train.py runs this as a script."""

import json
import logging
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 200_000_000}
NOTICE = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "120"]


def main(settings: str) -> None:
    """Train with one worker per CPU while the number of CPUs changes. Print the summary."""
    from pipelines.on_ray.train import train
    from pipelines.progress import ROOT, show_logs
    from pipelines.training.job import TrainJob

    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    show_logs()
    ROOT.addHandler(Collect())

    def seen(start: str, run: Future[Any], after: int) -> int:
        """Wait for a line that starts with `start`. Return the number of lines up to it."""
        while not run.done():
            for number in range(after, len(lines)):
                if lines[number].startswith(start):
                    return number + 1
            time.sleep(0.1)
        raise AssertionError(f"the run ended without another {start!r}: {run.exception()}")

    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    with ThreadPoolExecutor(1) as pool:
        request = TrainJob.parse(json.loads(settings))
        run = pool.submit(train, request, address=cluster.address)
        place = seen("trained ", run, seen("training on 1", run, 0))
        guest = cluster.add_node(**NODE)
        place = seen("trained ", run, seen("training on 2", run, place))
        drain = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "drain-node",
            "--address",
            cluster.address,
            "--node-id",
            guest.node_id,
            *NOTICE,
        ]
        subprocess.run(drain, check=True, stdout=sys.stderr)
        seen("a machine", run, place)
        time.sleep(3)  # time to write the checkpoint
        cluster.remove_node(guest, allow_graceful=False)
        print(json.dumps(run.result().to_json()))
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
