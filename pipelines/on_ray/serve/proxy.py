"""Which proxy stands before the replicas. Ray Serve reads it from the environment when it is imported and started."""

from __future__ import annotations

import os
from typing import Literal

from pipelines.errors import SettingsError

HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
LOG_BUFFER = {"RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "100"}
"""Lines of the log that are written at once: throughput mode's 1000 keep a replica's loop for 50 ms."""


def prepare_proxy(proxy: str) -> None:
    """Have this process, and the local Ray that it starts, use HAProxy; before anything imports Ray Serve."""
    if proxy == "haproxy":
        os.environ.update(HAPROXY)
        for name, value in LOG_BUFFER.items():
            os.environ.setdefault(name, value)


def check_proxy(proxy: Literal["python", "haproxy"]) -> None:
    """Raise SettingsError where HAProxy is wanted, and Ray Serve was imported or started without it."""
    if proxy == "haproxy" and any(os.environ.get(name) != value for name, value in HAPROXY.items()):
        needed = " ".join(f"{name}={value}" for name, value in HAPROXY.items())
        raise SettingsError(f"proxy=haproxy needs {needed} in the environment of every node of Ray and of this process")
