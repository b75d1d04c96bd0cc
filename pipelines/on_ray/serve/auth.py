"""API keys of the server: the configuration holds their hashes, a request the key. Knows no HTTP, no Ray."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from pipelines.errors import SettingsError
from pipelines.settings import ServeSettings

OPEN_PATHS = frozenset({"/", "/health", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
"""What needs no key: the probes, and the page, which says nothing and sends the key that is typed into it."""
LOOPBACK = ("127.", "localhost", "::1")


def is_admitted(headers: Mapping[str, str], path: str, key_hashes: Sequence[str]) -> bool:
    """Whether a request may pass: no keys are set, a probe asks, or one of the keys is in its headers.

    `Authorization: Bearer KEY`, or `x-api-key: KEY`. Every hash is compared, each in constant time.
    """
    if not key_hashes or path in OPEN_PATHS:
        return True
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    found = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
    return sum(hmac.compare_digest(found, known.removeprefix("sha256:")) for known in key_hashes) > 0


def check_exposure(settings: ServeSettings) -> None:
    """Raise SettingsError where a server without keys would listen beyond this machine and nobody said that it may."""
    if settings.api_keys or settings.allow_without_key:
        return
    if settings.host.startswith(LOOPBACK) and settings.proxy == "python":
        return
    where = f"host={settings.host}" if settings.proxy == "python" else "proxy=haproxy, which binds every interface,"
    raise SettingsError(
        f"{where} lets other machines ask without a key; set api_keys to the SHA-256 of each key "
        "(printf %s KEY | sha256sum), or allow_without_key where something in front checks who asks"
    )
