"""Scale the node types of cluster.yaml from zero to a GPU node and back. test_clusters.py runs this as a script.

Nodes are raylets on this machine that declare GPUs without having them. The autoscaler is Ray's own. The script
prints one line of JSON for each change of the cluster and one for the job.
"""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import ray
import yaml
from ray import cluster_utils
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

ROOT = Path(__file__).parent.parent.parent
MARK = f"PIPELINES_TEST_{uuid.uuid4().hex}"
SECONDS = 150
EMPTY = (
    "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
    "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip
"""Setup options of a launcher configuration. All are empty here."""
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
"""Ray's own provider, configured as an external one. The built-in type needs a file that is not in Ray's wheel."""


class LocalCluster(cluster_utils.AutoscalingCluster):
    """Ray's AutoscalingCluster without its base configuration, which is not in Ray's wheel."""

    def _generate_config(self, head_resources, worker_node_types, autoscaler_v2=False, **more):
        head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
        return {
            "cluster_name": "fake_multinode",
            "max_workers": 4,
            "provider": {
                "type": "external",
                "module": PROVIDER,
                "launch_multiple": True,
                "head_node_id": FAKE_HEAD_NODE_ID,
            },
            "available_node_types": {**worker_node_types, "ray.head.default": head},
            "head_node_type": "ray.head.default",
            "upscaling_speed": 1.0,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            **{name: [] for name in EMPTY},
            "idle_timeout_minutes": 0.1,
        }


def main(model: str, source: str, output: str) -> None:
    """Score with a replica that needs a GPU, on a cluster whose head has none."""
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    workers = {
        name: {
            **shape,
            "node_config": {},
            "resources": {**shape["resources"], "CPU": 2},
        }  # two cores cannot run 16 workers
        for name, shape in types.items()
        if name != "head"
    }
    os.environ[MARK] = "1"
    without_ray_stop()
    cluster = LocalCluster({"CPU": 0, "object_store_memory": 150_000_000}, workers, autoscaler_v2=True)
    started, stopped = time.monotonic(), threading.Event()
    try:
        cluster.start()
        ray.init("auto", log_to_driver=False)
        threading.Thread(target=watch, args=(started, stopped), daemon=True).start()
        from pipelines.bulk.job import ScoreJob
        from pipelines.on_ray.score import score
        from pipelines.progress import show_logs

        show_logs()

        values = {"model": model, "input": source, "output": output, "dtype": "float32", "device": "cpu",
                  "gpus_per_replica": 1, "replicas": 1, "num_threads": 1}  # fmt: skip
        summary = score(ScoreJob.parse(values))
        say(started, "done", rows=summary.rows_out)
        while len(alive()) > 1 and time.monotonic() - started < SECONDS:
            time.sleep(1)
        say(started, "end", nodes=alive())
    finally:
        stopped.set()
        ray.shutdown()
        for process in psutil.process_iter():
            if process.pid != os.getpid() and is_ours(process):
                process.kill()


def alive() -> list[str]:
    """Types of the nodes that are alive."""
    return sorted(kind_of(node["Resources"]) for node in ray.nodes() if node["Alive"])


def kind_of(resources: dict[str, float]) -> str:
    if "GPU" in resources:
        return "gpu"
    return "cpu" if "CPU" in resources else "head"


def watch(started: float, stopped: threading.Event) -> None:
    """Print the nodes whenever the cluster changes."""
    last = None
    while not stopped.wait(0.5):
        now = alive()
        if now != last:
            say(started, "nodes", nodes=now)
            last = now


def say(started: float, what: str, **more: object) -> None:
    print(json.dumps({"seconds": round(time.monotonic() - started, 1), "what": what, **more}), flush=True)


def without_ray_stop() -> None:
    """Skip `ray stop --force`. AutoscalingCluster calls it, and it kills every Ray process of the machine."""
    real = subprocess.check_call

    def call(command: list[str], **options: object) -> int:
        return 0 if command[:2] == ["ray", "stop"] else real(command, **options)

    cluster_utils.subprocess.check_call = call


def is_ours(process: psutil.Process) -> bool:
    try:
        return MARK in process.environ()
    except psutil.Error:
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
