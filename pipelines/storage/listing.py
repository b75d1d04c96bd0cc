"""Find the input files of a job: Parquet files by their content, in folders and by globs.

Names that begin with `_` or `.` are not data, as Spark and Hive mark it.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import DataError, SettingsError
from pipelines.storage.locations import filesystem_of, retried, shown, store_errors

FOOTER_THREADS = 16
"""Number of threads that read the begin or the footer of files."""
MAGIC = b"PAR1"
"""First bytes of every Parquet file."""
USUAL_SUFFIXES = (".parquet", ".pq", ".parq")
GLOB_CHARACTERS = "*?["
RUN_MANIFEST, DELTA_LOG = "_manifest.json", "_delta_log"
"""A folder with the first is the output of a scoring job. A folder with the second is a Delta table."""
logger = logging.getLogger(__name__)


def list_files(location: str) -> list[str]:
    """Return the sorted paths of the Parquet files at a location.

    A file is Parquet if it begins with PAR1, whatever its name. Every file that a glob names is taken. Names that begin
    with `_` or `.` are skipped.

    Args:
        location: File, folder (searched recursively) or glob.

    Raises:
        DataError: The location does not exist, contains no Parquet file, or contains a table that has to be read in
            another way.
    """
    return [str(entry["name"]) for entry in list_entries(location, refuse_runs=False)]


def list_entries(location: str, *, without: str | None = None, refuse_runs: bool = True) -> list[dict[str, Any]]:
    """Return the fsspec entries of the files that `list_files` returns.

    Args:
        location: File, folder or glob.
        without: Folder whose files are left out: the output of the job.
        refuse_runs: Whether the output of another scoring job below the location is an error.

    Raises:
        DataError: As `list_files`.
        SettingsError: The location itself is in the folder `without`.
    """
    with store_errors(DataError, f"{shown(location)} cannot be read"):
        return _find_entries(location, without, refuse_runs=refuse_runs)


def _find_entries(location: str, without: str | None, *, refuse_runs: bool) -> list[dict[str, Any]]:
    filesystem, path = filesystem_of(location)
    filesystem.invalidate_cache()
    output = None if without is None else _folder_in(without, filesystem)
    if output is not None and _is_below(_fixed(path, filesystem), output, filesystem):
        raise SettingsError(
            f"--output {shown(str(without))} contains the --input {shown(location)}, so the next run would read its "
            "own output; give an output folder of its own"
        )
    if retried(lambda: filesystem.isfile(path)):
        _refuse_tables([], posixpath.dirname(path), filesystem, refuse_runs=False)
        return [filesystem.info(path)]
    found: dict[str, dict[str, Any]] = {}
    named: set[str] = set()
    if filesystem.isdir(path):  # also a folder whose name contains a bracket
        found = retried(lambda: filesystem.find(path, detail=True))
    elif any(character in path for character in GLOB_CHARACTERS):
        for match in retried(lambda: filesystem.glob(path)):
            below = filesystem.find(match, detail=True)
            if match in below or not below:  # a file, which is taken at its word
                named.add(match)
            found |= below or {match: filesystem.info(match)}
    else:
        raise DataError(f"{shown(location)} does not exist; give a Parquet file, a folder of them, or a glob")
    if output is not None:
        found = {name: entry for name, entry in found.items() if not _is_below(name, output, filesystem)}
    _refuse_tables(found, path, filesystem, refuse_runs=refuse_runs)
    if isinstance(filesystem, LocalFileSystem):
        found = _followed(filesystem, found)
    data = {name: entry for name, entry in sorted(found.items()) if _is_data(name, path)}
    taken = _parquet_names(filesystem, data, named)
    skipped = [name for name in data if name not in taken]
    if not taken:
        raise DataError(f"{shown(location)} contains no Parquet files ({len(found)} other files)")
    if skipped:
        logger.info("%d files that are not Parquet are skipped, such as %s", len(skipped), skipped[0])
    return [entry for name, entry in data.items() if name in taken]


def _followed(filesystem: LocalFileSystem, entries: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Follow links, which fsspec does not do in folders. What is reached a second time is left out."""
    found = {name: entry for name, entry in entries.items() if not entry.get("islink")}
    places = {os.path.realpath(name) for name in found}
    links = sorted(entries.keys() - found.keys())
    again: list[str] = []
    while links:
        link = links.pop(0)
        target = os.path.realpath(link)
        if os.path.isdir(target):
            is_loop = _is_below(posixpath.dirname(link), target, filesystem)
            inside = {} if is_loop else filesystem.find(target, detail=True)
            named = {f"{link}{name[len(target) :]}": entry for name, entry in inside.items()}
        else:
            is_loop, named = False, {link: entries.get(link, {})} if os.path.exists(target) else {}
        links += [name for name, entry in named.items() if entry.get("islink") and name != link]
        own = {name: os.path.realpath(name) for name, entry in named.items() if name == link or not entry.get("islink")}
        new = {name: place for name, place in own.items() if place not in places}
        again += [link] if is_loop or len(new) < len(own) else []
        found |= {name: {**named[name], "name": name} for name in new}
        places |= set(new.values())
    if again:
        logger.warning("%d links lead to files that are read already, such as %s", len(again), again[0])
    return found


def _parquet_names(filesystem: AbstractFileSystem, entries: Mapping[str, dict[str, Any]], named: set[str]) -> set[str]:
    """Return the names of the files that are Parquet: by their suffix, by a glob, or by their first bytes."""
    unknown = [name for name in entries if name not in named and not name.lower().endswith(USUAL_SUFFIXES)]
    empty = {name for name in unknown if entries[name].get("size") == 0}  # a store refuses to read a range of it
    unknown = [name for name in unknown if name not in empty]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        begins = dict(zip(unknown, pool.map(lambda name: _begin(filesystem, name), unknown), strict=True))
    return {name for name in entries if name not in empty and begins.get(name, MAGIC) == MAGIC}


def _begin(filesystem: AbstractFileSystem, name: str) -> bytes:
    return bytes(retried(lambda: filesystem.cat_file(name, start=0, end=len(MAGIC))))


def _refuse_tables(names: Iterable[str], root: str, filesystem: AbstractFileSystem, *, refuse_runs: bool) -> None:
    """Raise DataError if the input is in a Delta table, or contains one or the output of a scoring job."""
    fixed = _fixed(root, filesystem)
    if filesystem.isdir(posixpath.join(fixed, DELTA_LOG)):
        raise _delta_error(fixed)
    for name in names:
        folder = posixpath.dirname(name)
        if posixpath.basename(folder) == DELTA_LOG:
            raise _delta_error(posixpath.dirname(folder))
        is_manifest = (
            refuse_runs and posixpath.basename(name) == RUN_MANIFEST and folder.rstrip("/") != root.rstrip("/")
        )
        if is_manifest and "generations" in _json_keys(filesystem, name):
            raise DataError(
                f"{folder} in the input is the output of a scoring job; move it out of the input, or name the files to "
                "score by a glob"
            )


def _delta_error(folder: str) -> DataError:
    return DataError(
        f"{folder} is a Delta table: some of its files may be deleted ones, so they are not read one by one; give a "
        "copy of the table as Parquet"
    )


def _json_keys(filesystem: AbstractFileSystem, name: str) -> set[str]:
    try:
        content = json.loads(retried(lambda: filesystem.cat_file(name)))
    except ValueError:
        return set()
    return set(content) if isinstance(content, dict) else set()


def _folder_in(location: str, filesystem: AbstractFileSystem) -> str | None:
    """Return the path of a location, or None if it is in another filesystem."""
    other, path = filesystem_of(location)
    return path if type(other) is type(filesystem) else None


def _fixed(path: str, filesystem: AbstractFileSystem) -> str:
    """Return a path up to its first component with a wildcard. A folder may have wildcards in its name."""
    while set(path) & set(GLOB_CHARACTERS) and not filesystem.exists(path):
        path = posixpath.dirname(path)
    return path


def _is_below(name: str, folder: str, filesystem: AbstractFileSystem) -> bool:
    """Whether a file is in a folder. On this machine, links are followed."""
    place = os.path.realpath if isinstance(filesystem, LocalFileSystem) else str
    return f"{place(name).rstrip('/')}/".startswith(f"{place(folder).rstrip('/')}/")


def _is_data(name: str, root: str) -> bool:
    """Return whether no component of a name below root begins with `_` or `.`.

    If root is a glob, it counts up to its first wildcard, and what its own components name with a `_` or `.` is data.
    """
    below, pattern = [[part for part in path.split("/") if part] for path in (name, root)]
    fixed = next((place for place, part in enumerate(pattern) if set(part) & set(GLOB_CHARACTERS)), len(pattern))
    for place, part in enumerate(below[fixed:], fixed):
        if part.startswith(("_", ".")):
            matched = pattern[place : place + 1]
            if "**" in pattern:
                matched = pattern[-1:] if place == len(below) - 1 else pattern[fixed:-1]
            if not any(one.startswith(("_", ".")) and fnmatchcase(part, one) for one in matched):
                return False
    return True
