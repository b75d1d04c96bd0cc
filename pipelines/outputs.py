"""What a scored folder says of itself, and what is left to do in it: a committed file is a finished unit.

`_manifest.json` is written before any unit: model, settings and one plan per generation of input, whose listing lies
beside it (`_inputs-0000.parquet`, ...). Which units are done is seen from the names of the files that are there, and
what they add to the summary from their own footers; nothing else keeps account. `_summary.json` comes last. Knows no
models, no torch, no ray.
"""

from __future__ import annotations

import json
import os
import posixpath
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import OutputError
from pipelines.locations import (
    commit_json,
    commit_table,
    filesystem_of,
    list_names,
    read_bytes,
    read_json,
    remove,
    retried,
    shown,
)
from pipelines.shards import InputFile, Plan, fingerprint, plan_units, usual_unit_bytes

MANIFEST, SUMMARY = "_manifest.json", "_summary.json"
FORMAT_VERSION = 2
PART_METADATA = b"pipelines.part"
"""Key of a scored file's schema metadata: what it adds to the summary, as JSON."""
HEARTBEAT_SECONDS = 15.0
FOOTER_THREADS = 32


@dataclass(frozen=True)
class Run:
    """A scored folder in the making: every unit there is to be, and the names of those that are done."""

    location: str
    manifest: dict[str, Any]
    plans: list[Plan]
    done: frozenset[str]

    @property
    def num_units(self) -> int:
        """Units of all generations."""
        return sum(map(len, self.plans))

    @property
    def num_rows(self) -> int:
        """Input rows of all units."""
        return sum(plan.num_rows for plan in self.plans)

    @property
    def files_in_error(self) -> dict[str, str]:
        """Input files that could not be opened, and why."""
        files = {file.url: file for plan in self.plans for file in plan.files}
        return {url: file.error for url, file in files.items() if file.error is not None}


def open_run(
    location: str,
    files: Sequence[InputFile],
    columns: pa.Schema,
    identity: Mapping[str, Any],
    *,
    input: str,
    unit_bytes: int | None = None,
    overwrite: bool = False,
    append: bool = False,
) -> Run:
    """Begin a scored folder, or go on with the one that is there.

    identity is what makes a run this run beside its input: hashes and settings (limit among them), JSON-ready.
    Raises OutputError, naming the difference, where the folder holds another run or anything else, unless overwrite;
    new input files join a run under append.
    """
    make_folder(location)
    names = list_names(location)
    if overwrite:
        _clear(location, names)
        names = {}
    if MANIFEST not in names:
        _check_is_empty(location, names)
        return _begin(location, files, columns, identity, input, unit_bytes)
    manifest = read_json(location, MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise OutputError(f"{shown(location)} was written by another version of pipelines; give a new folder")
    _check_identity(location, manifest, identity)
    generations = [_read_listing(location, item["listing"]) for item in manifest["generations"]]
    new = _check_files(location, generations, files, append=append)
    _check_columns(location, manifest, columns)
    if new:
        manifest = _add_generation(location, manifest, new, unit_bytes, first_number=_num_units(manifest))
        generations.append(new)
    plans = _plans(manifest, generations)
    return Run(location, manifest, plans, _done(plans, list_names(location)))


def read_parts(location: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """What the given finished files of a folder add to the summary, from their footers."""
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        found = pool.map(lambda name: read_metadata(location, name)[PART_METADATA], names)
        return [dict(json.loads(part)) for part in found]


def read_metadata(location: str, name: str) -> dict[bytes, bytes]:
    """The schema metadata of a Parquet file in a folder."""
    filesystem, folder = filesystem_of(location)

    def read() -> dict[bytes, bytes]:
        with filesystem.open(posixpath.join(folder, name), "rb") as file:
            return dict(pq.ParquetFile(file).schema_arrow.metadata or {})

    return retried(read)


def commit_unit(location: str, name: str, table: pa.Table, part: Mapping[str, Any]) -> None:
    """Write a unit's scored file, which says in its footer what it adds to the summary."""
    metadata = {**(table.schema.metadata or {}), PART_METADATA: json.dumps(part)}
    commit_table(location, name, table.replace_schema_metadata(metadata))


def finished_summary(run: Run) -> dict[str, Any] | None:
    """The summary of a folder with nothing left to do; None where there is none yet."""
    if len(run.done) < run.num_units or SUMMARY not in list_names(run.location):
        return None
    return dict(read_json(run.location, SUMMARY))


@contextmanager
def heartbeat(location: str) -> Iterator[list[str]]:
    """Say in the folder that a job runs, and take it back at the end; yields the other jobs that say so now."""
    name = f"_running-{uuid.uuid4().hex}.json"
    content = {"host": socket.gethostname(), "pid": os.getpid()}
    stop = threading.Event()

    def beat() -> None:
        while True:
            with suppress(OSError):  # it is a courtesy; the job itself says what is wrong with the folder
                commit_json(location, name, {**content, "time": time.time()})
            if stop.wait(HEARTBEAT_SECONDS):
                return

    others = _others(location)
    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield others
    finally:
        stop.set()
        thread.join()
        with suppress(OSError):
            remove(location, name)


def sweep(location: str) -> None:
    """Remove what killed jobs left: files that they never finished, heartbeats; not while another job runs."""
    if not _others(location):
        for name in list_names(location):
            if name.startswith((".part-", "._", "_running-")):
                remove(location, name)


def make_folder(location: str) -> None:
    """Make an output folder where there is none. Raises OutputError where it cannot be written."""
    filesystem, path = filesystem_of(location)
    try:
        if filesystem.isfile(path):
            raise OutputError(f"--output {shown(location)} is a file; give a folder")
        filesystem.makedirs(path, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output {shown(location)} cannot be written: {error}") from error


def _check_is_empty(location: str, names: Mapping[str, int]) -> None:
    others = sorted(name for name in names if not name.startswith((".", "_inputs-", "_running-")))
    if others:
        raise OutputError(
            f"--output {shown(location)} is not empty and holds no scoring run (it has {others[0]}); give a new folder"
        )


def _clear(location: str, names: Mapping[str, int]) -> None:
    """Remove a run; its manifest goes last, so that a kill leaves something that is known to be a run."""
    if MANIFEST not in names:
        _check_is_empty(location, names)
    rest = [name for name in names if name not in (MANIFEST, SUMMARY) and not name.startswith("_running-")]
    for name in [SUMMARY, *rest, MANIFEST]:
        remove(location, name)


def _begin(
    location: str,
    files: Sequence[InputFile],
    columns: pa.Schema,
    identity: Mapping[str, Any],
    input: str,
    unit_bytes: int | None,
) -> Run:
    manifest = {
        "format_version": FORMAT_VERSION,
        "input": shown(input),
        **identity,
        "columns": _types(columns),
        "generations": [],
    }
    manifest = _add_generation(location, manifest, files, unit_bytes, first_number=0)
    plans = _plans(manifest, [list(files)])
    return Run(location, manifest, plans, frozenset())


def _add_generation(
    location: str,
    manifest: dict[str, Any],
    files: Sequence[InputFile],
    unit_bytes: int | None,
    *,
    first_number: int,
) -> dict[str, Any]:
    """Write the listing of new input, then the manifest that counts it in."""
    table = _listing(files)
    name = f"_inputs-{len(manifest['generations']):04d}.parquet"
    size = unit_bytes or usual_unit_bytes(files)
    plan = plan_units(files, unit_bytes=size, limit=manifest["limit"], first_number=first_number)
    generation = {
        "listing": name,
        "fingerprint": _fingerprint(table),
        "files": len(files),
        "rows": plan.num_rows,
        "unit_bytes": size,
        "units": len(plan),
    }
    remove(location, SUMMARY)
    commit_table(location, name, table)
    manifest = {**manifest, "generations": [*manifest["generations"], generation]}
    commit_json(location, MANIFEST, manifest)
    return manifest


def _plans(manifest: Mapping[str, Any], generations: Sequence[Sequence[InputFile]]) -> list[Plan]:
    plans: list[Plan] = []
    for item, files in zip(manifest["generations"], generations, strict=True):
        first = sum(map(len, plans))
        plans.append(plan_units(files, unit_bytes=item["unit_bytes"], limit=manifest["limit"], first_number=first))
    return plans


def _num_units(manifest: Mapping[str, Any]) -> int:
    return sum(item["units"] for item in manifest["generations"])


def _done(plans: Sequence[Plan], names: Mapping[str, int]) -> frozenset[str]:
    if not any(name.startswith("part-") for name in names):
        return frozenset()
    return frozenset(unit.output_name for plan in plans for unit in plan if unit.output_name in names)


def _check_identity(location: str, manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    mine = json.loads(json.dumps(identity))
    for name, value in mine.items():
        if manifest.get(name) != value:
            raise OutputError(
                f"--output {shown(location)} holds a run of another kind: {name} was {manifest.get(name)!r} and is "
                f"{value!r}; give a new folder, or --overwrite to remove what is there"
            )


def _check_columns(location: str, manifest: Mapping[str, Any], columns: pa.Schema) -> None:
    """Every file of a run carries the same columns, those of appended input too."""
    before, now = manifest["columns"], _types(columns)
    if before != now:
        raise OutputError(
            f"--output {shown(location)} carries the columns {before} along and the input now gives {now}; make the "
            f"new files alike, or give a new folder"
        )


def _types(columns: pa.Schema) -> dict[str, str]:
    return {column.name: str(column.type) for column in columns}


def _check_files(
    location: str, generations: Sequence[Sequence[InputFile]], files: Sequence[InputFile], *, append: bool
) -> list[InputFile]:
    """The input files that are new, where append allows them. Raises OutputError for any other difference."""
    known = {file.url: file for generation in generations for file in generation}
    here = {file.url: file for file in files}
    gone = [url for url in known if url not in here]
    changed = [url for url, file in here.items() if url in known and not _same(file, known[url])]
    new = [file for url, file in here.items() if url not in known]
    named = {"gone": gone, "changed": changed, "new": [] if append else [file.url for file in new]}
    problems = [f"{len(urls)} input files are {what} ({urls[0]})" for what, urls in named.items() if urls]
    if problems:
        remedy = "--append to score them too" if new and len(problems) == 1 else "--overwrite to score all anew"
        raise OutputError(
            f"--output {shown(location)} was begun on another input: {', '.join(problems)}; give a new folder, "
            f"or {remedy}"
        )
    return new


def _same(left: InputFile, right: InputFile) -> bool:
    return (left.size, left.version) == (right.size, right.version)


def _listing(files: Sequence[InputFile]) -> pa.Table:
    return pa.table(
        {
            "path": pa.array([file.path for file in files], pa.string()),
            "url": pa.array([file.url for file in files], pa.string()),
            "size": pa.array([file.size for file in files], pa.int64()),
            "version": pa.array([file.version for file in files], pa.string()),
            "row_group_rows": pa.array([file.row_group_rows for file in files], pa.list_(pa.int64())),
            "row_group_bytes": pa.array([file.row_group_bytes for file in files], pa.list_(pa.int64())),
            "schema": pa.array(
                [None if file.schema is None else file.schema.serialize().to_pybytes() for file in files], pa.binary()
            ).dictionary_encode(),
            "partitions": pa.array([json.dumps(file.partitions) for file in files], pa.string()),
            "error": pa.array([file.error for file in files], pa.string()),
        }
    )


def _read_listing(location: str, name: str) -> list[InputFile]:
    table = pq.read_table(pa.BufferReader(read_bytes(location, name)))
    schemas: dict[bytes, pa.Schema] = {}

    def schema_of(content: bytes | None) -> pa.Schema | None:
        if content is None:
            return None
        if content not in schemas:
            schemas[content] = pa.ipc.read_schema(pa.py_buffer(content))
        return schemas[content]

    return [
        InputFile(
            **{
                **row,
                "schema": schema_of(row["schema"]),
                "row_group_rows": tuple(row["row_group_rows"]),
                "row_group_bytes": tuple(row["row_group_bytes"]),
                "partitions": json.loads(row["partitions"]),
            }
        )
        for row in table.to_pylist()
    ]


def _fingerprint(listing: pa.Table) -> str:
    return fingerprint((row["url"], row["size"], row["version"]) for row in listing.to_pylist())


def _others(location: str) -> list[str]:
    found = []
    for name in list_names(location):
        if name.startswith("_running-"):
            with suppress(OSError, ValueError):
                content = read_json(location, name)
                if time.time() - content["time"] < 3 * HEARTBEAT_SECONDS and not _is_dead(content):
                    found.append(f"process {content['pid']} on {content['host']}")
    return found


def _is_dead(content: Mapping[str, Any]) -> bool:
    """Whether a heartbeat is of a process of this machine that is no more; of another machine nobody can say."""
    if content["host"] != socket.gethostname():
        return False
    try:
        os.kill(content["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is there, and somebody else's
        return False
    return False
