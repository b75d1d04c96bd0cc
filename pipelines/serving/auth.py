"""API keys of the server. The settings contain hashes of the keys; requests contain the keys. Imports no Ray."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence

from pipelines.errors import SettingsError
from pipelines.serving.settings import ServeSettings

READING = ("GET", "HEAD", "OPTIONS")
"""Methods without a body."""
PAGE = "/"
"""Path of the web page, which is static and sends the key that a user types into it. A POST to it is a prediction."""
PROBES = frozenset({"/health", "/livez", "/readyz", "/ping", "/v2/health/live", "/v2/health/ready"})
"""Paths that need no key, whatever the method, and no body."""


def is_open(method: str, path: str) -> bool:
    """Whether a request needs no key."""
    return path in PROBES or (path == PAGE and method in READING)


def is_admitted(headers: Mapping[str, str], key_hashes: Sequence[str]) -> bool:
    """Whether a request is allowed: no keys are set, or its headers contain one of the keys.

    The headers are `Authorization: Bearer KEY` or `x-api-key: KEY`. All hashes are compared, each in constant time.

    Args:
        headers: HTTP headers, with names in lower case.
        key_hashes: SHA-256 of each key in hex, with or without the prefix `sha256:`. Empty means that no keys are set.
    """
    if not key_hashes:
        return True
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    found = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
    return sum(hmac.compare_digest(found, known.removeprefix("sha256:")) for known in key_hashes) > 0


def check_exposure(settings: ServeSettings) -> None:
    """Check that a server without keys is reachable only from this machine, unless allow_without_key is set.

    Raises:
        SettingsError: Other machines could use the server without a key.
    """
    if settings.api_keys or settings.allow_without_key:
        return
    if _is_loopback(settings.host) and settings.proxy == "python":
        return
    where = f"host={settings.host}" if settings.proxy == "python" else "proxy=haproxy, which binds every interface,"
    raise SettingsError(
        f"{where} lets other machines send requests without a key; set api_keys to the SHA-256 of each key "
        "(printf %s KEY | sha256sum), or set allow_without_key if a proxy in front of the server checks requests"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name; what it stands for may change
        return False
