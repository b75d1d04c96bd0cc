"""Before work: can every node reach the model, the input and the output?"""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.errors import PipelinesError, SettingsError
from pipelines.locations import filesystem_of, is_local, list_names, shown
from pipelines.model_folder import read_model_folder
from pipelines.outputs import MANIFEST

SECONDS_TO_ANSWER = 300
"""The model may have to be fetched first."""


def check_nodes(model: str, first_file: str, output: str) -> None:
    """Raise SettingsError naming a node that lacks the package, the model, the input or the output.

    The model is fetched on each node on this occasion, once for all of its processes.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0}
    asked = {}
    for node_id in nodes:
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        asked[node_id] = _look.options(scheduling_strategy=there, num_cpus=0, max_retries=0).remote(
            model, first_file, output
        )
    for node_id, answer in asked.items():
        problem = _answer(answer)
        if problem is not None:
            name = nodes[node_id].get("NodeManagerHostname") or nodes[node_id].get("NodeManagerAddress")
            raise SettingsError(f"node {name} ({node_id[:8]}) {problem}")


def _answer(answer: Any) -> str | None:
    try:
        problem: str | None = ray.get(answer, timeout=SECONDS_TO_ANSWER)
    except ray.exceptions.GetTimeoutError:
        return f"did not answer within {SECONDS_TO_ANSWER} s"
    except (ray.exceptions.RaySystemError, ray.exceptions.RayTaskError) as error:
        return f"cannot run this package: {str(error).strip().splitlines()[-1]}; install the same version on every node"
    except ray.exceptions.RayError:
        return None  # the node has gone since; what ran there will run elsewhere
    return problem


@ray.remote
def _look(model: str, first_file: str, output: str) -> str | None:
    remedy = "; use a path that every node shares, or a URL such as s3://"
    try:
        read_model_folder(model)
    except PipelinesError as error:
        return f"cannot read the model {shown(model)}: {error}{remedy if is_local(model) else ''}"
    filesystem, path = filesystem_of(first_file)
    if not filesystem.exists(path):
        return f"cannot see the input {shown(first_file)}{remedy}"
    if MANIFEST not in list_names(output):
        return f"cannot see the output {shown(output)}{remedy}"
    return None
