"""Access files through fsspec: paths and URLs, names for display, retries, and atomic commits.

A commit to a local folder writes a temporary file in the same folder, syncs it and renames it. A commit to an object
store is one atomic upload.
"""

from __future__ import annotations

import errno
import io
import json
import os
import posixpath
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import DataError, OutputError, PipelinesError, SettingsError, first_line

ATTEMPTS = 5
"""Number of attempts of a filesystem call before its error is raised."""
FIRST_PAUSE_SECONDS = 0.2
"""Pause before the second attempt. Each later pause is 3 times as long. Each is multiplied by a random 0.5 to 1.5."""
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
"""Errors that are not retried, because another attempt would fail too."""
DELTA, ICEBERG = "delta:", "iceberg:"
"""Starts of the names of tables in the setting `table`. An Iceberg table that is the input has such a name too."""
WITH_CONDITIONS = {"s3", "gs", "gcs"}
"""Protocols whose filesystems can write a file only if it does not exist (`pipe_file(mode="create")`)."""
UNFINISHED = "._"
"""Start of the names of files with state that a killed process did not finish to write, in a local folder."""
Result = TypeVar("Result")


def absolute(location: str) -> str:
    """Return an absolute path, which is valid in processes with another working folder. A URL stays unchanged."""
    if not location:
        raise SettingsError("a path is empty; write . for the current folder")
    if location.startswith(DELTA):
        return DELTA + absolute(location.removeprefix(DELTA))
    if "://" in location or location.startswith(ICEBERG):
        return location
    return os.path.abspath(os.path.expanduser(location))


def is_local(location: str) -> bool:
    """Return whether a location is a path on this machine."""
    return "://" not in location or location.startswith(("file://", "local://"))


def shown(location: str) -> str:
    """Return a location without user, password and query, for logs and files."""
    if location.startswith(DELTA):
        return DELTA + shown(location.removeprefix(DELTA))
    if "://" not in location:
        return location
    try:
        parts = urlsplit(location)
    except ValueError:  # a bracket, which is part of a glob and not of an address
        scheme, _, rest = location.partition("://")
        return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def filesystem_of(location: str) -> tuple[AbstractFileSystem, str]:
    """Return the fsspec filesystem of a path or URL, and the path within it.

    Raises:
        DataError: The protocol is unknown, or its package is not installed.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(location)
    except (ValueError, ImportError) as error:
        raise DataError(
            f"{shown(location)} cannot be opened: {error}; "
            f"install the extra for its storage: ray-text-classification[s3|gcs|azure]"
        ) from error
    except OSError as error:  # the archive of a chained URL
        raise DataError(f"{shown(location)} cannot be opened: {first_line(error)}") from error
    return filesystem, str(path)


@contextmanager
def store_errors(error_type: type[PipelinesError], message: str) -> Iterator[None]:
    """Raise any error of a filesystem as error_type, with its first line after the message.

    Object stores raise the errors of their own libraries, such as botocore's for missing credentials.
    """
    try:
        yield
    except PipelinesError:
        raise
    except Exception as error:
        reason = first_line(error) if isinstance(error, OSError) else f"{type(error).__name__}: {first_line(error)}"
        raise error_type(f"{message}: {reason}; check the path, the credentials and the permissions") from error


def retried(action: Callable[[], Result]) -> Result:
    """Call action, and call it again if it fails with a filesystem error that may be temporary.

    The pauses between the attempts grow (`FIRST_PAUSE_SECONDS`).

    Returns:
        The result of action.

    Raises:
        OSError: The error is in `LASTING`, or the last of `ATTEMPTS` attempts failed.
    """
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


class WatchedFile(io.RawIOBase):
    """An open file that remembers the error of its filesystem, which is always raised as OSError.

    pyarrow raises OSError for two reasons: the filesystem failed, or the content is damaged. Only in the second case is
    the file to blame.
    """

    def __init__(self, filesystem: AbstractFileSystem, path: str) -> None:
        self.failure: OSError | None = None
        self._file: Any = None
        self._file = self._watched(filesystem.open, path, "rb")

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int | None = -1) -> bytes:
        """Read at most size bytes, or the rest of the file."""
        return bytes(self._watched(self._file.read, -1 if size is None else size))

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer. Return the number of bytes, which is 0 at the end."""
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Change the position, and return it."""
        return int(self._watched(self._file.seek, offset, whence))

    def tell(self) -> int:
        """Return the position."""
        return int(self._file.tell())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None and not self.closed:
            self._file.close()
        super().close()

    def _watched(self, action: Callable[..., Any], *args: Any) -> Any:
        try:
            return action(*args)
        except OSError as error:
            self.failure = error
            raise
        except Exception as error:  # of an object store's own library
            self.failure = OSError(f"{type(error).__name__}: {first_line(error)}")
            raise self.failure from error


def list_names(location: str) -> dict[str, int]:
    """Return the names and sizes in bytes of the files directly in a folder. Empty if the folder does not exist."""
    filesystem, path = filesystem_of(location)
    filesystem.invalidate_cache()
    try:
        entries = retried(lambda: filesystem.ls(path, detail=True))
    except FileNotFoundError:
        return {}
    return {posixpath.basename(entry["name"]): int(entry["size"] or 0) for entry in entries if entry["type"] == "file"}


def is_empty(location: str, *, besides: str) -> bool:
    """Return whether a folder is empty or does not exist. In an object store, a folder without files does not exist.

    Args:
        location: The folder.
        besides: Start of the names of files that do not count. Files that a killed process did not finish do not count
            either (`commit_bytes`).
    """
    filesystem, path = filesystem_of(location)
    filesystem.invalidate_cache()
    try:
        names = [posixpath.basename(str(name)) for name in retried(lambda: filesystem.ls(path, detail=False))]
        return not [name for name in names if not name.startswith((besides, UNFINISHED))]
    except FileNotFoundError:
        return True


def read_bytes(location: str, name: str) -> bytes:
    """Return the content of a file in a folder."""
    filesystem, folder = filesystem_of(location)
    return bytes(retried(lambda: filesystem.cat_file(posixpath.join(folder, name))))


def read_json(location: str, name: str) -> Any:
    """Return the parsed content of a JSON file in a folder."""
    return json.loads(read_bytes(location, name))


def exists(location: str, name: str) -> bool:
    """Return whether a folder has a file of this name. A listing may be older than that."""
    filesystem, folder = filesystem_of(location)
    filesystem.invalidate_cache()
    return bool(retried(lambda: filesystem.exists(posixpath.join(folder, name))))


def from_parquet(filesystem: AbstractFileSystem, path: str, read: Callable[[pq.ParquetFile], Result]) -> Result:
    """Open a Parquet file, and return what `read` takes from it."""

    def attempt() -> Result:
        with filesystem.open(path, "rb") as file:
            return read(pq.ParquetFile(file))

    return retried(attempt)


def remove(location: str, name: str) -> None:
    """Remove a file from a folder, if it exists."""
    filesystem, folder = filesystem_of(location)
    try:
        retried(lambda: filesystem.rm_file(posixpath.join(folder, name)))
    except FileNotFoundError:
        return


def commit_table(location: str, name: str, table: pa.Table, *, is_new: bool = False) -> int:
    """Write a Parquet file (zstd) atomically, and return its size in bytes.

    Raises:
        FileExistsError: is_new is true, and the file exists (`commit_new_bytes`).
    """
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    content = buffer.getvalue()
    commit = commit_new_bytes if is_new else commit_bytes
    commit(location, name, memoryview(content))
    return int(content.size)


def commit_json(location: str, name: str, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    commit_bytes(location, name, (json.dumps(content, indent=2) + "\n").encode())


def commit_new_json(location: str, name: str, content: dict[str, Any]) -> None:
    """Write a JSON file atomically, unless there is one: of several processes, only one can create it.

    Raises:
        FileExistsError: The file exists. If the answer of an object store was lost, this process may have created it.
    """
    if exists(location, name):  # some stores ignore the condition of a request
        raise FileExistsError(f"{shown(location)}/{name} exists")
    commit_new_bytes(location, name, (json.dumps(content, indent=2) + "\n").encode())


def commit_new_bytes(location: str, name: str, content: bytes | memoryview) -> None:
    """Write a file atomically, unless there is one.

    In object stores without conditional requests, two processes that write at the same time may both succeed.

    Raises:
        FileExistsError: The file exists. If the answer of an object store was lost, this process may have created it.
    """
    filesystem, folder = filesystem_of(location)
    target = posixpath.join(folder, name)
    protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)

    def create() -> None:
        if isinstance(filesystem, LocalFileSystem):
            _commit_locally(target, content, is_new=True)
        elif protocols & WITH_CONDITIONS:
            filesystem.pipe_file(target, bytes(content), mode="create")
        elif exists(location, name):
            raise FileExistsError(f"{shown(location)}/{name} exists")
        else:
            filesystem.pipe_file(target, bytes(content))

    retried(create)


def commit_bytes(location: str, name: str, content: bytes | memoryview) -> None:
    """Write a file atomically: readers see all of the content or none of it, even if the writer is killed."""
    filesystem, folder = filesystem_of(location)
    target = posixpath.join(folder, name)
    if isinstance(filesystem, LocalFileSystem):
        retried(lambda: _commit_locally(target, content))
    else:
        retried(lambda: filesystem.pipe_file(target, bytes(content)))


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Sync a local folder and its files to disk, so that they survive a power loss."""
    for name in [*(entry.path for entry in os.scandir(folder) if entry.is_file()), folder]:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _link(partial: str, target: str) -> None:
    """Give a file its name. Raises FileExistsError if another file has this name."""
    try:
        os.link(partial, target)
    except FileExistsError:
        raise
    except OSError as error:  # a filesystem without links
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if os.path.exists(target):
            raise FileExistsError(f"{target} exists") from error
        os.replace(partial, target)


def _commit_locally(target: str, content: bytes | memoryview, *, is_new: bool = False) -> None:
    """Write a file under another name, and then give it its name. After a power loss, it is there with its content."""
    folder, name = posixpath.split(target)
    partial = posixpath.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            _link(partial, target)
        else:
            os.replace(partial, target)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)
    _sync_names(folder)


def _sync_names(folder: str) -> None:
    """Sync the names of the files in a folder to disk, where the filesystem can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def make_folder(location: str) -> None:
    """Create an output folder if it does not exist.

    Raises:
        OutputError: The location is a file, or cannot be written or listed.
    """
    filesystem, path = filesystem_of(location)
    with store_errors(OutputError, f"--output {shown(location)} cannot be written"):
        if filesystem.isfile(path):
            raise OutputError(f"--output {shown(location)} is a file; give a folder")
        filesystem.makedirs(path, exist_ok=True)
        list_names(location)  # object stores create no folder, so this is their first request
