"""Connect to a Ray cluster, or start a local Ray. Only this module calls ray.init."""

from __future__ import annotations

import builtins
import logging
import os
import re
import secrets
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import ray

from pipelines import errors
from pipelines.errors import JobError, SettingsError, first_line
from pipelines.storage.locations import LASTING

logger = logging.getLogger(__name__)
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20
RAISED = re.compile(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception|Died\w*|Interrupt|Exit))(?:: (.*))?$", re.MULTILINE)
"""A line of a traceback that names an exception and its message."""
WRAPPERS = ("UserCodeException", "RayTaskError")
"""Exceptions of Ray around the exception of a task."""
ANNOUNCEMENT = b"Set ray log level from environment variable"
JOIN_SECONDS = 1.0
SPARE_CPUS = 2
"""A local Ray declares this many extra CPUs, so that small tasks can run while a model uses all real ones."""


class _State:
    """Whether this process uses a local Ray that it started itself."""

    is_local = False


_state = _State()


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Connect to Ray for the duration of a job.

    If this process is connected to Ray already, use that connection. Otherwise connect to the cluster at address or
    RAY_ADDRESS. Without either, start a local Ray.

    Args:
        address: Address of a cluster. None means RAY_ADDRESS.

    Raises:
        JobError: The cluster cannot be reached, or the local Ray cannot be started.
        SettingsError: The cluster has another version of Ray or Python.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    _quiet()
    try:
        with _without_announcement():
            _start(address)
    except Exception as error:  # Ray raises plain exceptions if a local Ray does not start
        if "Version mismatch" in str(error):
            raise SettingsError(
                f"{' '.join(str(error).split())}: install the cluster's Ray and Python here, or submit the job instead "
                "(ray job submit), which runs it on the cluster"
            ) from error
        where = "a local Ray cannot be started" if address is None else f"no Ray cluster answers at {address}"
        is_open = address is None or "RAY_AUTH_MODE" in os.environ
        hint = "" if is_open else "; clusters of `ray start` require a token, which RAY_AUTH_MODE=token sends"
        raise JobError(f"{where}: {error}; `ray status` shows the state of the cluster{hint}") from error
    _state.is_local = address is None
    try:
        yield
    finally:
        _state.is_local = False
        ray.shutdown()


def _start(address: str | None) -> None:
    """Connect to a cluster, or start a local Ray."""
    if address is not None:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return
    make_token()
    ray.init(
        address="local",
        num_cpus=(os.cpu_count() or 1) + SPARE_CPUS,
        include_dashboard=False,
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def make_token() -> None:
    """Create the token of local clusters, which only this user can read. Ray itself would let the umask decide."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    with suppress(OSError, RuntimeError):  # there is a token, or Ray says why there can be none
        folder = Path.home() / ".ray"
        folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder) as file:  # only this user can read it
            file.write(secrets.token_hex(32))
            file.flush()
            os.link(file.name, folder / "auth_token")


@contextmanager
def _without_announcement() -> Iterator[None]:
    """Hide the line with which Ray says on stderr that it has read RAY_BACKEND_LOG_LEVEL. Other lines pass.

    The line comes from Ray's C++ part, before the level holds, so no setting of Ray hides it.
    """
    try:
        real = os.dup(2)
    except OSError:  # a daemon without stderr
        yield
        return
    reading, writing = os.pipe()

    def forward() -> None:
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                if ANNOUNCEMENT not in line:
                    os.write(real, line)

    sys.stderr.flush()
    os.dup2(writing, 2)
    os.close(writing)
    thread = threading.Thread(target=forward, daemon=True, name="stderr")
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(real, 2)
        thread.join(timeout=JOIN_SECONDS)  # a process that Ray has started may still have the pipe
        if not thread.is_alive():
            os.close(real)


def uses_gpus(device: str) -> bool:
    """Whether models run on GPUs: by the device, or for auto, whether any node of the cluster has GPUs now."""
    if device == "auto":
        return bool(ray.cluster_resources().get("GPU", 0) > 0)
    return device.startswith("cuda")


def check_resources(needed: Mapping[str, float]) -> None:
    """Compare the resources that a job needs at the same time with those of the cluster.

    If the cluster has too few, the job waits for new nodes, and this function logs it. Ray itself would wait without a
    message, and without an autoscaler it would wait forever.

    Args:
        needed: Amount of each resource that the job needs at the same time.

    Raises:
        SettingsError: A local Ray has too few resources. It never gets more.
    """
    there = ray.cluster_resources()
    short = [name for name, amount in needed.items() if amount > there.get(name, 0)]
    if short:
        asked = ", ".join(f"{needed[name]:g} {name}" for name in short)
        found = ", ".join(f"{there.get(name, 0):g} {name}" for name in short)
        if _state.is_local:
            raise SettingsError(
                f"this needs {asked} at once, and the local Ray has {found}: ask for less, or use a cluster"
            )
        logger.warning(
            "this needs %s at once, and the cluster has %s: it waits until nodes that have them join", asked, found
        )


@dataclass(frozen=True)
class RootCause:
    """An error on a worker, without Ray's wrappers."""

    type_name: str
    message: str

    def __str__(self) -> str:
        return self.message if hasattr(errors, self.type_name) else f"{self.type_name}: {self.message}".rstrip(": ")

    @property
    def may_pass(self) -> bool:
        """Whether another start may help: files, network, memory or machines failed, but not the code or the input."""
        is_of_ray = hasattr(ray.exceptions, self.type_name)
        error_type = getattr(builtins, self.type_name, None) or getattr(errors, self.type_name, None)
        if isinstance(error_type, type):
            return issubclass(error_type, (OSError, MemoryError, errors.JobError)) and not issubclass(
                error_type, LASTING
            )
        return is_of_ray or "OutOfMemory" in self.type_name


def root_cause(error: BaseException) -> RootCause:
    """Return the error of a task. Ray's message contains the traceback of the worker, with the task's error first."""
    while error.__cause__ is not None and str(error.__cause__).strip():
        error = error.__cause__
    found = [match for match in RAISED.finditer(str(error)) if match[1] not in WRAPPERS]
    if found:
        return RootCause(found[-1][1], found[-1][2] or "")
    return RootCause(getattr(type(error), "__name__", "Error"), first_line(error))


def _quiet() -> None:
    """Set what Ray reads when it starts, so that users see only our messages. Ray's other processes log to files."""
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; otherwise Ray warns
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name in ("ray.data", "ray.train", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
