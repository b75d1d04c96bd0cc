"""The settings of a server: name, type, default, limits and help text (see `pipelines.settings`)."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from pipelines.errors import SettingsError
from pipelines.fields import check_range, check_types, parse_range
from pipelines.settings import EarlyExit

NO_KEY = {hashlib.sha256(text).hexdigest() for text in (b"", b"\n", b"\r\n", b" ")}
"""Hashes of what a shell has if the variable of a key is not set."""


@dataclass(frozen=True, kw_only=True)
class ServePaths:
    """What a server reads."""

    model: str
    """Model folder written by `pipelines train`, or its URL."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """One online server."""

    name: str | None = None
    """Model name in the responses (field `model`). Default: the name of the model folder."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on."""
    api_keys: tuple[str, ...] = ()
    (
        "SHA-256 of each accepted key, in hex (printf %s KEY | sha256sum). "
        "Without keys, every client that reaches the port is accepted."
    )
    allow_without_key: bool = False
    """Accept connections from other machines although api_keys is empty."""
    local: bool = False
    """Serve from this process, without Ray: one replica, ready as soon as its model is loaded."""
    cors_allow_origins: tuple[str, ...] = ()
    """Origins (https://example.org) whose pages may send requests from a browser. "*" allows all. Default: none."""
    num_replicas: int | str = 1
    """Number of model replicas: N, or MIN:MAX to scale with the load. MIN may be 0."""
    target_queued_tokens: int = 100_000
    (
        "With MIN:MAX: one replica per this many waiting tokens. "
        "More replicas start if the models run more than 80 % of the time."
    )
    upscale_delay_s: float = 5.0
    """With MIN:MAX: start more replicas after they have been needed for this many seconds."""
    downscale_delay_s: float = 120.0
    """With MIN:MAX: stop replicas after fewer have been enough for this many seconds."""
    proxy: Literal["python", "haproxy"] = "python"
    (
        "HTTP proxy in front of the replicas: Ray Serve's own (python) or HAProxy. "
        "With haproxy, the proxy and the replicas listen on every network interface."
    )
    thresholds: float | tuple[float, ...] | dict[str, float] | None = None
    (
        "Replaces the thresholds of the model folder. In a Serve configuration file they belong in user_config. "
        "There they can change without a restart."
    )
    early_exit: EarlyExit = "off"
    (
        "Read a text only until its label is sure. exact: labels are those of a full read. certified: by the margin of "
        "`pipelines tune --early-exit`. The scores are those of the windows read."
    )
    gpus_per_replica: float | None = None
    """GPUs per replica. Default: 1 with device=cuda, or with device=auto if the cluster has a GPU now; else 0."""
    max_body_bytes: int = 4 * 2**20
    """Maximum size of a request body in bytes. The answer to a larger one is HTTP 413."""
    body_timeout_s: float = 30.0
    """Maximum time in which the body of a request must arrive, in seconds. The answer to a later one is HTTP 408."""
    request_timeout_s: float = 300.0
    """Maximum time of a request in seconds, its body and its waiting included. The answer after it is HTTP 504."""
    max_documents: int = 256
    """Maximum number of documents in one request. The answer to more is HTTP 422."""
    max_document_tokens: int = 200_000
    """Maximum number of tokens in one document. The answer to a longer one is HTTP 422."""
    max_queued_tokens: int = 1_000_000
    """Maximum number of tokens that wait in one replica. The answer to further requests is HTTP 429."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "port", self.port, low=0, high=65535)
        for key in self.api_keys:
            if not re.fullmatch(r"(sha256:)?[0-9a-f]{64}", key):
                raise SettingsError(
                    "api_keys takes SHA-256 hashes in hex, one per key, as printed by: printf %s KEY | sha256sum"
                )
            if key.removeprefix("sha256:") in NO_KEY:
                raise SettingsError(
                    "api_keys has the SHA-256 of an empty key; is the variable with the key set? "
                    "A key can be made with: openssl rand -hex 32"
                )
        if self.name is not None and self.name.strip("/ ") != self.name.strip():
            raise SettingsError(f"name={self.name!r} begins or ends with a slash, and it is part of paths")
        if self.name is not None and not self.name.strip():
            raise SettingsError("name is empty; leave it out for the name of the model folder")
        for origin in self.cors_allow_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise SettingsError(
                    f"cors_allow_origins={origin!r} is no origin: write scheme and host, such as https://app.example, "
                    f"without a path, or *"
                )
        if parse_range("num_replicas", self.num_replicas)[1] < 1:
            raise SettingsError(
                f"num_replicas={self.num_replicas} serves nothing; use 1, or 0:1 to start at the first request"
            )
        for name in ("max_body_bytes", "max_documents", "max_document_tokens", "max_queued_tokens",
                     "target_queued_tokens"):  # fmt: skip
            check_range(self, name, getattr(self, name), low=1)
        for name in ("body_timeout_s", "request_timeout_s"):
            check_range(self, name, getattr(self, name), low=0.1)
        for name in ("upscale_delay_s", "downscale_delay_s", "gpus_per_replica"):
            check_range(self, name, getattr(self, name), low=0)
