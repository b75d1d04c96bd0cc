"""Decide whether a job is so small that this process finishes it sooner than Ray starts."""

from __future__ import annotations

import os
import sys

from pipelines.bulk.job import CheckedJob
from pipelines.bulk.manifest import MANIFEST
from pipelines.settings import ScoreSettings
from pipelines.storage.locations import list_names, make_folder

MOST_SECONDS = 60
"""A job with a longer estimate runs on Ray."""
TEXT_BYTES_PER_TOKEN = 3
SPEED = 2.5e11
"""Tokens per second of one core, times the bytes of the model's weights in float32. A cautious guess."""
PLACEMENT = (
    "replicas", "gpus_per_replica", "via_serve", "tokenize_cpus", "tokenize_resources", "tokenize_labels",
    "replica_resources", "replica_labels",
)  # fmt: skip
"""Settings that say how a job runs on Ray."""


def runs_here(checked: CheckedJob, *, address: str | None) -> bool:
    """Whether a job runs in this process, although its settings do not say so.

    A run that is resumed runs on Ray, where a row that kills its process does not kill the job.

    Args:
        checked: The job.
        address: Ray cluster that the caller named.
    """
    settings, usual = checked.job.score, ScoreSettings()
    if any(getattr(settings, name) != getattr(usual, name) for name in PLACEMENT):
        return False
    return not _has_cluster(address) and seconds_here(checked) <= MOST_SECONDS and not _is_resumed(checked)


def seconds_here(checked: CheckedJob) -> float:
    """Estimate the seconds that this process needs for a job, from the sizes of its input and its model."""
    text_bytes = sum(sum(file.row_group_bytes) for file in checked.files)
    weights = sum(file.stat().st_size for file in checked.folder.path.glob("*.safetensors"))
    weights += 4 * sum(file.stat().st_size for file in checked.folder.path.glob("openvino_model.bin"))
    return text_bytes / TEXT_BYTES_PER_TOKEN * weights / (SPEED * (os.cpu_count() or 1))


def _has_cluster(address: str | None) -> bool:
    ray = sys.modules.get("ray")
    is_connected = ray is not None and ray.is_initialized()
    return address is not None or "RAY_ADDRESS" in os.environ or is_connected


def _is_resumed(checked: CheckedJob) -> bool:
    """Whether the output folder has a run that this job continues, or that is finished."""
    make_folder(checked.job.output)
    return MANIFEST in list_names(checked.job.output) and not checked.job.score.overwrite
