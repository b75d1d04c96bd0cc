"""A cluster loses a raylet during a job. test_cluster_faults.py runs this as a script."""

import json
import sys
import threading
import time

from ray.cluster_utils import Cluster


def main(model: str, source: str, output: str) -> None:
    """Score with replicas on two nodes, kill the second node after three units and print the summary."""
    from pathlib import Path

    from pipelines.bulk.job import ScoreJob
    from pipelines.on_ray.score import score
    from pipelines.progress import show_logs

    show_logs()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "object_store_memory": 200_000_000})
    doomed = cluster.add_node(num_cpus=3, object_store_memory=200_000_000)
    cluster.wait_for_nodes()
    lost = threading.Event()

    def lose() -> None:
        while len(list(Path(output).glob("part-*"))) < 3:
            time.sleep(0.05)
        cluster.remove_node(doomed, allow_graceful=False)
        lost.set()

    threading.Thread(target=lose, daemon=True).start()
    values = {"model": model, "input": source, "output": output, "dtype": "float32", "device": "cpu", "replicas": 2,
              "unit_bytes": 6000, "num_threads": 1}  # fmt: skip
    summary = score(ScoreJob.parse(values), address=cluster.address)
    print(json.dumps({"lost": lost.is_set(), **summary.to_json()}))
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
