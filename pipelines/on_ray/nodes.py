"""Check before a job starts that every node has this package and can read the model, the input and the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import version as package_version
from pipelines.errors import PipelinesError, SettingsError, first_line
from pipelines.model_folder import read_model_folder
from pipelines.storage.locations import filesystem_of, is_local, list_names, shown

SECONDS_TO_ANSWER = 300
"""Timeout for one node. It may have to fetch the model first."""


def check_nodes(*, model: str | None = None, files: Mapping[str, str] | None = None, output: str | None = None) -> None:
    """Check that every node with CPUs has this package and can read the model, the files and the output.

    The check also fetches the model on each node, once for all processes of the node.

    Args:
        model: Path or URL of a finished model folder.
        files: Locations of files, by what they are (such as "input").
        output: Path or URL of a folder that is not empty.

    Raises:
        SettingsError: A node fails the check, or does not answer in time. The message names the node.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0}
    asked = {}
    for node_id in nodes:
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        asked[node_id] = _look.options(scheduling_strategy=there, num_cpus=0, max_retries=0).remote(
            package_version.VERSION, model, dict(files or {}), output
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
        return None  # the node left the cluster; its work will run on other nodes
    return problem


@ray.remote
def _look(version: str, model: str | None, files: dict[str, str], output: str | None) -> str | None:
    remedy = "; use a path that every node shares, or a URL such as s3://"
    here = package_version.VERSION  # version on the node: Ray sends this function by value, but modules by name
    if version != here:
        return f"has version {here} of this package, but the driver has {version}; install the same on every node"
    if model is not None:
        try:
            read_model_folder(model)
        except PipelinesError as error:
            return f"cannot read the model {shown(model)}: {error}{remedy if is_local(model) else ''}"
    try:
        for name, location in files.items():
            filesystem, path = filesystem_of(location)
            if not filesystem.exists(path):
                return f"cannot see the {name} {shown(location)}{remedy}"
        if output is not None and not list_names(output):
            return f"cannot see the output {shown(output)}{remedy}"
    except Exception as error:  # noqa: BLE001  # stores raise errors of many kinds, such as for missing credentials
        return f"cannot read the input or the output: {type(error).__name__}: {first_line(error)}"
    return None
