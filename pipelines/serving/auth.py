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

    The headers are `Authorization: Bearer KEY` or `x-api-key: KEY`; one of them is enough, because some clients always
    send a bearer of their own. All hashes are compared, each in constant time. An empty key is never right.

    Args:
        headers: HTTP headers, with names in lower case.
        key_hashes: SHA-256 of each key in hex, with or without the prefix `sha256:`. Empty means that no keys are set.
    """
    if not key_hashes:
        return True
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    keys = [headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
    found = [hashlib.sha256(form).hexdigest() for key in keys if key for form in _as_sent(key)]
    known = [key_hash.removeprefix("sha256:") for key_hash in key_hashes]
    return sum(hmac.compare_digest(one, other) for one in found for other in known) > 0


def _as_sent(key: str) -> tuple[bytes, bytes]:
    """Return the bytes of a key that a client has sent in UTF-8, or in Latin-1, as which HTTP headers are decoded."""
    return key.encode("latin-1", "replace"), key.encode("utf-8", "surrogateescape")


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
