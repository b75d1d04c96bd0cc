"""Join the cluster that was named, or start a local Ray; the only place that calls ray.init."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import ray

from pipelines.errors import JobError, SettingsError

LOCAL_OBJECT_STORE_BYTES = 512 * 2**20
REMARKS = ("Failed to apply UDF transform", "To change retry attempts")
"""Lines that Ray Data puts after what went wrong."""
SPARE_CPUS = 2
"""A local Ray declares this many CPUs more than there are: small tasks run beside a model that uses them all."""


class _State:
    """Whether this process started the Ray that it uses."""

    is_local = False


_state = _State()


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Ray for the time of a job: the one at address or RAY_ADDRESS, one already connected, or a local one.

    Raises JobError where the named cluster cannot be reached, SettingsError where it runs another Ray or Python.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    _quiet(is_local=address is None)
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
    except Exception as error:  # Ray raises bare ones where a local Ray does not come up
        if "Version mismatch" in str(error):
            raise SettingsError(
                f"{' '.join(str(error).split())}: install the cluster's Ray and Python here, or submit the job instead "
                "(ray job submit), which runs it on the cluster"
            ) from error
        where = "a local Ray cannot be started" if address is None else f"no Ray cluster answers at {address}"
        is_open = address is None or "RAY_AUTH_MODE" in os.environ
        hint = "" if is_open else "; clusters of `ray start` want a token, which RAY_AUTH_MODE=token sends"
        raise JobError(f"{where}: {error}; `ray status` tells what runs{hint}") from error
    _state.is_local = address is None
    try:
        yield
    finally:
        _state.is_local = False
        ray.shutdown()


def uses_gpus(device: str) -> bool:
    """Whether models run on GPUs: as the device says, or where it is auto, whether any node declares them now."""
    if device == "auto":
        return bool(ray.cluster_resources().get("GPU", 0) > 0)
    return device.startswith("cuda")


def check_resources(needed: Mapping[str, float], report: Callable[[str], None]) -> None:
    """Say what a job will wait for: Ray itself would wait for it in silence, and for ever without an autoscaler.

    Raises SettingsError on a local Ray, to which nothing ever comes.
    """
    there = ray.cluster_resources()
    short = [name for name, amount in needed.items() if amount > there.get(name, 0)]
    if short:
        asked = ", ".join(f"{needed[name]:g} {name}" for name in short)
        found = ", ".join(f"{there.get(name, 0):g} {name}" for name in short)
        if _state.is_local:
            raise SettingsError(
                f"this needs {asked} at once, and the local Ray has {found}: ask for less, or name a cluster"
            )
        report(f"this needs {asked} at once, and the cluster has {found}: it waits until nodes come that bring them")


def root_cause(error: BaseException) -> str:
    """The line that says what went wrong on a worker: Ray puts the worker's whole traceback into its message."""
    while error.__cause__ is not None and str(error.__cause__).strip():
        error = error.__cause__
    lines = [line for line in str(error).strip().splitlines() if not line.startswith(REMARKS)]
    return lines[-1].strip() if lines else type(error).__name__


def _quiet(*, is_local: bool) -> None:
    """What must be set before Ray starts; its own logs go on into files, and people see ours."""
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own future default, told every start
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if is_local:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name in ("ray.data", "ray.train", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
