"""Choose the proxy in front of the replicas. Ray Serve reads the choice from the environment at import and start."""

from __future__ import annotations

import os
from typing import Literal

from pipelines.errors import SettingsError

HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
DEFAULTS = {
    # Log lines that are written at once. The 1000 of throughput mode block a replica's loop for 50 ms.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "100",
    # Seconds after which a silent client is cut, such as one that sends no complete headers. Ray's default is an hour.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "300",
}


def prepare_proxy(proxy: str) -> None:
    """Set the environment for the proxy, for this process and a local Ray that it starts.

    Call this before Ray Serve is imported.
    """
    if proxy == "haproxy":
        os.environ.update(HAPROXY)
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)


def check_proxy(proxy: Literal["python", "haproxy"]) -> None:
    """Check that the environment has the variables that the proxy needs.

    Raises:
        SettingsError: The proxy is haproxy, and its variables are not set.
    """
    if proxy == "haproxy" and any(os.environ.get(name) != value for name, value in HAPROXY.items()):
        needed = " ".join(f"{name}={value}" for name, value in HAPROXY.items())
        raise SettingsError(f"proxy=haproxy needs {needed} in the environment of every Ray node and of this process")
