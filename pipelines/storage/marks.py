"""Marks of running jobs in their output folders: a small file that each job renews every few seconds."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from pipelines.storage.locations import commit_json, list_names, read_json, remove

MARK = "_running-"
"""Start of the name of a mark."""
HEARTBEAT_SECONDS = 15.0


@dataclass(frozen=True)
class Mark:
    """The mark of a running job in its output folder."""

    name: str
    others: Sequence[str]
    """The other jobs that used the folder when this one began."""


@contextmanager
def heartbeat(location: str) -> Iterator[Mark]:
    """Mark the folder as in use by a running job inside the context."""
    name = f"{MARK}{uuid.uuid4().hex}.json"
    content = {"host": socket.gethostname(), "pid": os.getpid()}
    stop = threading.Event()

    def beat() -> None:
        with suppress(OSError):  # the mark is only for other jobs; if the folder is broken, committing a unit fails
            commit_json(location, name, {**content, "time": time.time()})

    def keep_beating() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            beat()

    beat()
    others = others_of(location, name)
    thread = threading.Thread(target=keep_beating, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield Mark(name, others)
    finally:
        stop.set()
        thread.join()
        with suppress(OSError):  # an old mark is removed by the next job
            remove(location, name)


def others_of(location: str, mark: str) -> list[str]:
    """Return the jobs that use the folder now, without the one with this mark."""
    found = []
    for name in list_names(location):
        if name.startswith(MARK) and name != mark:
            with suppress(OSError, ValueError):
                content = read_json(location, name)
                if time.time() - content["time"] < 3 * HEARTBEAT_SECONDS and not _is_dead(content):
                    found.append(f"process {content['pid']} on {content['host']}")
    return found


def _is_dead(content: Mapping[str, Any]) -> bool:
    """Whether a heartbeat comes from an ended process of this machine. Other machines' processes count as running."""
    if content["host"] != socket.gethostname():
        return False
    try:
        os.kill(content["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it runs under another user
        return False
    return False
