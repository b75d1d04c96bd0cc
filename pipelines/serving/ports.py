"""Check that a port is free, and keep other servers of this package from it."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.errors import SettingsError, first_line


@contextmanager
def own_port(host: str, port: int) -> Iterator[None]:
    """Keep other servers of this package from a port of this machine, and check that nothing listens on it.

    The proxies open it with SO_REUSEPORT: two of them would both print that they are ready, and get requests at random.

    Raises:
        SettingsError: The port is in use, or cannot be opened.
    """
    with socket.socket(socket.AF_UNIX) as lock:  # released by Linux when this process ends, however it ends
        try:
            if port and sys.platform == "linux":
                lock.bind(f"\0ray-text-classification:{port}")
            if port:
                _probe(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise SettingsError(f"the server cannot listen on {host}:{port}: {first_line(error)}") from error
            remedy = f"stop the server there, or give another one, such as --port {port + 1}"
            raise SettingsError(f"port {port} of {host} is in use; {remedy}") from error
        yield


def _probe(host: str, port: int) -> None:
    """Raise OSError if a port is in use at one of a host's addresses, or if this machine has none of them."""
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    others = []
    for family, kind, _, _, address in addresses:
        try:
            with socket.socket(family, kind) as probe:  # without SO_REUSEPORT, unlike the proxies
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that close do not count
                probe.bind(address)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            others.append(error)  # localhost may have an address that this machine does not use
    if len(others) == len(addresses):
        raise others[0]
