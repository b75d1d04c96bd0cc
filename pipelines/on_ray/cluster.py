"""Join the cluster that was named, or start a local Ray; the only place that calls ray.init."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from pipelines.errors import JobError

LOCAL_OBJECT_STORE_BYTES = 512 * 2**20
SPARE_CPUS = 2
"""A local Ray declares this many CPUs more than there are: small tasks run beside a model that uses them all."""


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Ray for the time of a job: the one at address or RAY_ADDRESS, one already connected, or a local one.

    Raises JobError where the named cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    _quiet_environment()
    try:
        if address is None:
            ray.init(
                address="local",
                num_cpus=(os.cpu_count() or 1) + SPARE_CPUS,
                include_dashboard=False,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "a local Ray cannot be started" if address is None else f"no Ray cluster answers at {address}"
        raise JobError(f"{where}: {error}; `ray status` tells what runs") from error
    try:
        yield
    finally:
        ray.shutdown()


def has_gpus() -> bool:
    """Whether any node of the cluster declares GPUs."""
    return bool(ray.cluster_resources().get("GPU", 0) > 0)


def _quiet_environment() -> None:
    """Settings of Ray that must be in the environment before it starts."""
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own future default, told every start
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
