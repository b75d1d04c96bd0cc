"""Find the input files of a job in folders and by globs: Parquet by its content, JSON Lines and CSV by their names.

Names that begin with `_` or `.` are not data, as Spark and Hive mark it.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import DataError, SettingsError
from pipelines.storage.lakes import DELTA_LOG, HUDI
from pipelines.storage.locations import filesystem_of, retried, shown, store_errors
from pipelines.storage.text_files import format_of, is_plain_json

FOOTER_THREADS = 16
"""Number of threads that read the first bytes or the footer of files."""
MAGIC = (b"PAR1", b"PARE")
"""First bytes of every Parquet file, and of one whose footer is encrypted."""
USUAL_SUFFIXES = (".parquet", ".pq", ".parq")
GLOB_CHARACTERS = "*?["
RUN_MANIFEST = "_manifest.json"
"""A folder with this file is the output of a scoring job."""
logger = logging.getLogger(__name__)


def list_files(location: str, *, also_in_tables: bool = False) -> list[str]:
    """Return the sorted paths of the input files at a location.

    A file is taken if its name ends in .parquet, .pq or .parq, if it begins with PAR1, or if a glob names it. If there
    is none, JSON Lines and CSV files are taken. Names that begin with `_` or `.` are skipped.

    Args:
        location: File, folder (searched recursively) or glob.
        also_in_tables: Whether files of a Delta or Iceberg table may be listed, such as the output of a job in it.

    Raises:
        DataError: The location does not exist, contains no input file, or contains a table that has to be read in
            another way.
    """
    entries = list_entries(location, refuse_runs=False, refuse_tables=not also_in_tables)
    return [str(entry["name"]) for entry in entries]


def list_entries(
    location: str, *, without: str | None = None, refuse_runs: bool = True, refuse_tables: bool = True
) -> list[dict[str, Any]]:
    """Return the fsspec entries of the files that `list_files` returns.

    Args:
        location: File, folder or glob.
        without: Folder whose files are left out: the output of the job.
        refuse_runs: Whether the output of another scoring job below the location is an error.
        refuse_tables: Whether files of a Delta or Iceberg table are an error.

    Raises:
        DataError: As `list_files`.
        SettingsError: The location itself is in the folder `without`.
    """
    with store_errors(DataError, f"{shown(location)} cannot be read"):
        return _find_entries(location, without, refuse_runs=refuse_runs, refuse_tables=refuse_tables)


def _find_entries(
    location: str, without: str | None, *, refuse_runs: bool, refuse_tables: bool
) -> list[dict[str, Any]]:
    filesystem, path = filesystem_of(location)
    filesystem.invalidate_cache()
    output = None if without is None else _folder_in(without, filesystem)
    if output is not None and _is_below(_fixed(path, filesystem), output, filesystem):
        raise SettingsError(
            f"--output {shown(str(without))} contains the --input {shown(location)}, so the next run would read its "
            "own output; give an output folder of its own"
        )
    if retried(lambda: filesystem.isfile(path)):
        if refuse_tables:
            _refuse_tables({path: {}}, path, filesystem)
        return [filesystem.info(path)]
    found, named = _matches(filesystem, path, location)
    if isinstance(filesystem, LocalFileSystem):
        found = _followed(filesystem, found, path)
    if output is not None:
        found = {name: entry for name, entry in found.items() if not _is_below(name, output, filesystem)}
    if refuse_tables:
        _refuse_tables(found, path, filesystem)
    if refuse_runs:
        _refuse_runs(found, path, filesystem)
    data = {name: entry for name, entry in sorted(found.items()) if _is_data(name, path)}
    taken = _data_names(filesystem, data, named)
    skipped = [name for name in data if name not in taken]
    if not taken:
        raise DataError(f"{shown(location)} contains no Parquet, JSON Lines or CSV files ({len(found)} other files)")
    if skipped:
        logger.info("%d other files are skipped, such as %s", len(skipped), skipped[0])
    return [entry for name, entry in data.items() if name in taken]


def _matches(filesystem: AbstractFileSystem, path: str, location: str) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Return the entries of all files in a folder or of a glob, and the names of the files that the glob names."""
    if filesystem.isdir(path):  # also a folder whose name contains a bracket
        return retried(lambda: filesystem.find(path, detail=True)), set()
    if not any(character in path for character in GLOB_CHARACTERS):
        raise DataError(
            f"{shown(location)} does not exist; give a file (Parquet, JSON Lines, CSV), a folder of them, or a glob"
        )
    matches = retried(lambda: filesystem.glob(path, detail=True))
    found = {name: entry for name, entry in matches.items() if entry["type"] != "directory"}
    named = set(found)
    for folder in matches.keys() - named:
        found |= retried(lambda folder=folder: filesystem.find(folder, detail=True))  # type: ignore[misc]
    return found, named


def _followed(
    filesystem: LocalFileSystem, entries: Mapping[str, dict[str, Any]], root: str
) -> dict[str, dict[str, Any]]:
    """Follow links, which fsspec does not do in folders. Data that is reached a second time is left out."""
    found = {name: entry for name, entry in entries.items() if not entry.get("islink")}
    places = {os.path.realpath(name) for name in found if _is_data(name, root)}
    links = sorted(name for name in entries.keys() - found.keys() if _is_data(name, root))
    again: list[str] = []
    entered: set[str] = set()
    while links:
        link = links.pop(0)
        target = os.path.realpath(link)
        own = {link: target} if os.path.isfile(target) else {}
        is_loop = os.path.isdir(target) and (
            target in entered or _is_below(posixpath.dirname(link), target, filesystem)
        )
        if os.path.isdir(target) and not is_loop:
            entered.add(target)
            inside = filesystem.find(target, detail=True)
            names = {f"{link}{name[len(target) :]}": entry for name, entry in inside.items()}
            links += [name for name, entry in names.items() if entry.get("islink") and _is_data(name, root)]
            own = {name: os.path.realpath(name) for name, entry in names.items() if not entry.get("islink")}
        new = {name: place for name, place in own.items() if place not in places or not _is_data(name, root)}
        again += [link] if is_loop or len(new) < len(own) else []
        found |= {name: {**filesystem.info(place), "name": name} for name, place in new.items()}
        places |= {place for name, place in new.items() if _is_data(name, root)}
    if again:
        logger.warning(
            "%d links are not followed, because they lead to files that are read already or to a folder above: %s",
            len(again),
            again[0],
        )
    return found


def _data_names(filesystem: AbstractFileSystem, entries: Mapping[str, dict[str, Any]], named: set[str]) -> set[str]:
    """Return the names of the files that a glob names, or that are Parquet by their suffix or by their first bytes.

    If a folder has no Parquet file, its JSON Lines and CSV files are taken. Those named .json, which are often no data,
    are taken only if there are no others.
    """
    unknown = [name for name in entries if name not in named and not name.lower().endswith(USUAL_SUFFIXES)]
    empty = {name for name in unknown if entries[name].get("size") == 0}  # a store refuses to read a range of it
    unknown = [name for name in unknown if name not in empty]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        begins = dict(zip(unknown, pool.map(lambda name: first_bytes(filesystem, name), unknown), strict=True))
    parquet = {name for name in entries if name not in empty and begins.get(name, MAGIC[0]) in MAGIC}
    texts = [name for name in entries if name not in empty | parquet and format_of(name)]
    if parquet or not texts:
        if texts:
            logger.warning(
                "%d JSON Lines or CSV files beside Parquet files are skipped, such as %s; name them by a glob to read "
                "them", len(texts), texts[0],
            )  # fmt: skip
        return parquet
    return {name for name in texts if not is_plain_json(name)} or set(texts)


def first_bytes(filesystem: AbstractFileSystem, name: str) -> bytes:
    """Return the first four bytes of a file."""
    return bytes(retried(lambda: filesystem.cat_file(name, start=0, end=4)))


def _refuse_tables(found: Mapping[str, dict[str, Any]], root: str, filesystem: AbstractFileSystem) -> None:
    """Raise DataError if files are in a Delta, Hudi or Iceberg table."""
    folders = {posixpath.dirname(name) for name in found} | {_fixed(root, filesystem)}
    if isinstance(filesystem, LocalFileSystem):  # links lead to other folders
        folders |= {os.path.realpath(folder) for folder in folders}
    is_whole = filesystem.isdir(root)  # then what is below root is in `found`
    above = {parent for folder in folders for parent in _parents(folder) if not (is_whole and parent in folders)}
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        tables = [folder for folder in pool.map(lambda folder: _table_at(filesystem, folder), sorted(above)) if folder]
    tables += [posixpath.dirname(folder) for folder in folders if posixpath.basename(folder) == DELTA_LOG]
    tables += [posixpath.dirname(posixpath.dirname(name)) for name in found if _is_iceberg(name)]
    tables += [name.partition(f"/{HUDI}/")[0] for name in found if f"/{HUDI}/" in name]
    if tables and filesystem.isdir(posixpath.join(tables[0], HUDI)):
        raise DataError(
            f"{tables[0]} is a Hudi table: some of its files are older versions of others, so they are not read one by "
            "one; write its rows to Parquet first, for example with spark.read.format('hudi')"
        )
    if tables:
        raise DataError(
            f"{tables[0]} is a Delta or Iceberg table: some of its files may be deleted ones, so they are not read one "
            "by one; give the folder of the Delta table alone, or iceberg:CATALOG.NAMESPACE.TABLE"
        )


def _refuse_runs(found: Mapping[str, dict[str, Any]], root: str, filesystem: AbstractFileSystem) -> None:
    """Raise DataError if files are in the output of a scoring job below root."""
    for name in found:
        folder = posixpath.dirname(name)
        is_manifest = posixpath.basename(name) == RUN_MANIFEST and folder.rstrip("/") != root.rstrip("/")
        if is_manifest and _json_keys(filesystem, name) & {"generations", "relabelled_from"}:
            raise DataError(
                f"{folder} in the input is the output of a scoring job; move it out of the input, or name the files to "
                "score by a glob"
            )


def _parents(folder: str) -> list[str]:
    """Return a folder and all folders above it."""
    parents = []
    while folder and folder != "/":
        parents.append(folder)
        folder = posixpath.dirname(folder)
    return parents


def _table_at(filesystem: AbstractFileSystem, folder: str) -> str | None:
    """Return the folder if it is a Delta, Hudi or Iceberg table."""
    try:
        if any(filesystem.isdir(posixpath.join(folder, name)) for name in (DELTA_LOG, HUDI)):
            return folder
        metadata = posixpath.join(folder, "metadata")
        if filesystem.isdir(metadata) and any(_is_iceberg(name) for name in filesystem.ls(metadata, detail=False)):
            return folder
    except PermissionError:  # a folder above the input, which this user cannot list
        return None
    return None


def _is_iceberg(name: str) -> bool:
    """Whether a file is the metadata of an Iceberg table."""
    return name.endswith(".metadata.json") and posixpath.basename(posixpath.dirname(name)) == "metadata"


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

    If root is a glob, it counts up to its first wildcard. A component that begins with `_` or `.` is data if the glob
    itself writes that `_` or `.`.
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
