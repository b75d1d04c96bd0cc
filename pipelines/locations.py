"""Where files lie: any fsspec filesystem, names that people may see, retries, and commits that are whole or absent.

Local files are written beside their place, synced and renamed; object stores receive one atomic upload. Knows no
Parquet contents, no models, no torch, no ray.
"""

from __future__ import annotations

import json
import os
import posixpath
import random
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import DataError

ATTEMPTS = 5
"""How often a filesystem call is tried before its error counts."""
FIRST_PAUSE_SECONDS = 0.2
"""Before the second attempt; each later pause is three times as long, and drawn from half to one and a half of that."""
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
"""Errors that another attempt would only repeat."""
Result = TypeVar("Result")


def absolute(location: str) -> str:
    """A local path as every process sees it, whatever its working folder; URLs as they are."""
    return location if "://" in location else os.path.abspath(os.path.expanduser(location))


def is_local(location: str) -> bool:
    """Whether a location is a path on this machine."""
    return "://" not in location or location.startswith(("file://", "local://"))


def shown(location: str) -> str:
    """A location without user, password or query, fit for logs and files."""
    if "://" not in location:
        return location
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def filesystem_of(location: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec filesystem of a path or URL, and the path within it. Raises DataError for an unknown protocol."""
    try:
        filesystem, path = fsspec.core.url_to_fs(location)
    except (ValueError, ImportError) as error:
        raise DataError(
            f"{shown(location)} cannot be opened: {error}; extras are ray-text-classification[s3|gcs|azure]"
        ) from error
    return filesystem, str(path)


def retried(action: Callable[[], Result]) -> Result:
    """What action returns; it is tried again where a filesystem fails in a way that may pass."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except LASTING:
            raise
        except OSError:
            if attempt == ATTEMPTS:
                raise
            time.sleep(FIRST_PAUSE_SECONDS * 3 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def list_names(location: str) -> dict[str, int]:
    """Names of the files right in a folder, with their sizes; empty where there is no such folder."""
    filesystem, path = filesystem_of(location)
    filesystem.invalidate_cache()
    try:
        entries = retried(lambda: filesystem.ls(path, detail=True))
    except FileNotFoundError:
        return {}
    return {posixpath.basename(entry["name"]): int(entry["size"] or 0) for entry in entries if entry["type"] == "file"}


def is_empty(location: str) -> bool:
    """Whether a folder holds nothing, or is not there: object stores have none without files."""
    filesystem, path = filesystem_of(location)
    filesystem.invalidate_cache()
    try:
        return not retried(lambda: filesystem.ls(path))
    except FileNotFoundError:
        return True


def read_bytes(location: str, name: str) -> bytes:
    """The content of a file in a folder."""
    filesystem, folder = filesystem_of(location)
    return bytes(retried(lambda: filesystem.cat_file(posixpath.join(folder, name))))


def read_json(location: str, name: str) -> Any:
    """The content of a JSON file in a folder."""
    return json.loads(read_bytes(location, name))


def remove(location: str, name: str) -> None:
    """Remove a file from a folder, if it is there."""
    filesystem, folder = filesystem_of(location)
    try:
        retried(lambda: filesystem.rm_file(posixpath.join(folder, name)))
    except FileNotFoundError:
        return


def commit_table(location: str, name: str, table: pa.Table) -> int:
    """Write a Parquet file (zstd) under its final name in one step; the bytes written."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    content = buffer.getvalue()
    commit_bytes(location, name, memoryview(content))
    return int(content.size)


def commit_json(location: str, name: str, content: dict[str, Any]) -> None:
    """Write a JSON file under its final name in one step."""
    commit_bytes(location, name, (json.dumps(content, indent=2) + "\n").encode())


def commit_bytes(location: str, name: str, content: bytes | memoryview) -> None:
    """Put content under its final name: readers see all of it or nothing, whenever the writer is killed."""
    filesystem, folder = filesystem_of(location)
    target = posixpath.join(folder, name)
    if isinstance(filesystem, LocalFileSystem):
        retried(lambda: _commit_locally(target, content))
    else:
        retried(lambda: filesystem.pipe_file(target, bytes(content)))


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make a local folder's files and names survive a power loss."""
    for name in [*(entry.path for entry in os.scandir(folder) if entry.is_file()), folder]:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _commit_locally(target: str, content: bytes | memoryview) -> None:
    folder, name = posixpath.split(target)
    partial = posixpath.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError:
        if os.path.exists(partial):
            os.unlink(partial)
        raise
