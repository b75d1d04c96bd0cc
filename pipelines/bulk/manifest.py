"""What a scoring run writes down about itself: `_manifest.json`, and the lists of its input files.

A start that adds input files, or scores units with errors again, creates `_manifest-0001-RUN.json` (then 0002, and so
on) with the whole new content. Of two such starts, only one can create it: a job that was frozen, or did not see the
other one, cannot undo what the other one has changed. `_manifest.json` stays as it was when the run began, and only
`--overwrite` replaces it.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import JobError, OutputError
from pipelines.storage.locations import commit_json, exists, read_bytes, read_json, shown, store_errors
from pipelines.storage.shards import InputFile, fingerprint

MANIFEST = "_manifest.json"
TABLES = "_tables.json"
"""File with the names of the tables that have, or soon will have, the run's files."""
RUN_METADATA = b"pipelines.run"
"""Key in a scored file's schema metadata. The value is the id of the run."""
CHANGE_METADATA = b"pipelines.change"
"""The same, for files that `--retry-errors` wrote: 1 for the first time, and so on."""
BEFORE = {"early_exit": "off", "engine": "auto"}
"""Settings that earlier versions did not have, with the values of their runs."""
FORMAT_VERSION = 2


@dataclass(frozen=True)
class RunIdentity:
    """The settings that must be unchanged for a job to resume a run. The input must be unchanged too."""

    weights_hash: str
    settings_hash: str
    limit: int | None
    text_column: str
    text_pair_column: str | None
    filter: str | None
    keep: tuple[str, ...] | None
    prefix: str
    dtype: str
    early_exit: str = "off"
    engine: str = "auto"

    def to_json(self) -> dict[str, Any]:
        """Return the identity as JSON content, which has no tuples."""
        return {**dataclasses.asdict(self), "keep": None if self.keep is None else list(self.keep)}


@dataclass(frozen=True)
class Generation:
    """Input files that one start of the run added."""

    listing: str
    """Name of the file with the list of these input files."""
    fingerprint: str
    files: int
    rows: int
    unit_bytes: int
    units: int
    replaced: tuple[str, ...] = ()
    """Files of earlier generations that changed. This generation has their new versions, which replace their rows."""
    snapshot: str | None = None
    """Version of the table that was the input, if it was a table."""


@dataclass(frozen=True)
class Manifest:
    """The content of `_manifest.json`."""

    input: str
    identity: Mapping[str, Any]
    columns: Mapping[str, str]
    """Arrow types of the columns that are copied from the input, by name."""
    generations: tuple[Generation, ...] = ()
    run: str = ""
    """Id of the run."""
    retries: int = 0
    """Number of starts with `--retry-errors` that found units with errors."""
    names_of_run: bool = True
    """Whether the names of output files depend on the run. In runs of earlier versions, they do not."""

    @property
    def limit(self) -> int | None:
        """Maximum number of rows that are scored in each generation."""
        limit: int | None = self.identity["limit"]
        return limit

    @property
    def changes(self) -> int:
        """Number of starts that have changed what the run is."""
        return len(self.generations) + self.retries

    @property
    def num_units(self) -> int:
        """Number of units of all generations."""
        return sum(generation.units for generation in self.generations)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `_manifest.json`, with the identity's fields on the top level."""
        return {
            "format_version": FORMAT_VERSION,
            "input": self.input,
            **self.identity,
            "columns": dict(self.columns),
            "generations": [dataclasses.asdict(generation) for generation in self.generations],
            "run": self.run,
            "retries": self.retries,
            "names_of_run": self.names_of_run,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Manifest:
        """Create a manifest from the result of `to_json`."""
        own = ("format_version", "input", "columns", "generations", "run", "retries", "names_of_run")
        identity = {name: value for name, value in content.items() if name not in own}
        generations = tuple(
            Generation(**{**generation, "replaced": tuple(generation.get("replaced", ()))})
            for generation in content["generations"]
        )
        run, retries, names_of_run = content.get("run", ""), content.get("retries", 0), "names_of_run" in content
        return cls(content["input"], identity, content["columns"], generations, run, retries, names_of_run)


def read_manifest(location: str) -> Manifest:
    """Read the manifest of a run. Raises OutputError if it is damaged, or of another version of this package."""
    manifest = _read(location, MANIFEST)
    while exists(location, name := next_name(manifest)):
        manifest = _read(location, name)
    return manifest


def next_name(manifest: Manifest) -> str:
    """Return the name of the file with the next change of a run."""
    return f"_manifest-{manifest.changes:04d}-{manifest.run[:8]}.json"


def check_run(location: str, run: str) -> None:
    """Raise JobError if a folder does not contain the run with this id any more. No id: nothing is checked."""
    if not run:
        return
    try:
        now = _read(location, MANIFEST).run
    except FileNotFoundError:
        now = ""
    if now != run:
        raise JobError(
            f"another job has {'replaced' if now else 'removed'} the run in {shown(location)} while this one was "
            f"working; start this job again with another --output"
        )


def check_unchanged(location: str, change: int) -> None:
    """Check that a job that knows this number of changes may still replace files of its run.

    Raises:
        JobError: Another job has changed the run since, or files of the run are part of a table.
    """
    if read_manifest(location).changes > change:
        raise JobError(f"another job has changed the run in {shown(location)} while this one was working; start again")
    if is_in_table(location):
        raise JobError(
            f"another job has added the files in {shown(location)} to a table ({TABLES} names it) while this one was "
            f"working: they stay as they are"
        )


def _read(location: str, name: str) -> Manifest:
    try:
        content = read_json(location, name)
        if content.get("format_version") == FORMAT_VERSION:
            manifest = Manifest.from_json(content)
            # earlier versions gave runs no id: every process must find the same one, and every folder another
            return manifest if manifest.run else dataclasses.replace(manifest, run=_id_of(location, content))
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise damaged(location, name) from error
    raise OutputError(f"{shown(location)} was written by another version of pipelines; give a new folder")


def damaged(location: str, name: str) -> OutputError:
    """Return the error for a file of a run that is damaged or missing."""
    return OutputError(f"{name} in --output {shown(location)} is damaged or missing; add --overwrite to score again")


def pinned_snapshot(location: str) -> str | None:
    """Return the version of the input table with which the run in a folder began. None if there is none."""
    manifest = _manifest_of(location)
    return None if manifest is None else manifest.generations[-1].snapshot


def run_of(location: str) -> str:
    """Return the id of the run in a folder. Empty if there is none that can be read."""
    manifest = _manifest_of(location)
    return "" if manifest is None else manifest.run


def _manifest_of(location: str) -> Manifest | None:
    """Return the manifest of a run, or None if there is none that can be read: this is reported when it is resumed."""
    with store_errors(OutputError, f"--output {shown(location)} cannot be read"):
        try:
            return read_manifest(location)
        except (OutputError, FileNotFoundError, NotADirectoryError):
            return None


def known_files(location: str) -> dict[str, InputFile]:
    """Return the input files of the run in a folder by their names. Empty if there is no run that can be read."""
    manifest = _manifest_of(location)
    generations = () if manifest is None else manifest.generations
    try:
        return {file.url: file for generation in generations for file in read_listing(location, generation.listing)}
    except OutputError:  # damaged: reported when the run is resumed
        return {}


def is_in_table(location: str) -> bool:
    """Return whether files of the run in a folder are part of a table, and must therefore stay."""
    return exists(location, TABLES)


def check_not_in_table(location: str) -> None:
    """Raise OutputError if files of the run in a folder are part of a table."""
    if is_in_table(location):
        raise OutputError(
            f"the files in --output {shown(location)} are part of a table, so they cannot be removed; give a new "
            f"folder ({TABLES} names the table)"
        )


def add_table(location: str, table: str) -> None:
    """Write down that a table will have the files in a folder."""
    try:
        tables = list(read_json(location, TABLES)["tables"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or damaged: its existence is what counts
        tables = []
    if table not in tables:
        commit_json(location, TABLES, {"tables": [*tables, table]})


def _id_of(location: str, content: Mapping[str, Any]) -> str:
    return uuid.uuid5(uuid.NAMESPACE_URL, location.rstrip("/") + json.dumps(content, sort_keys=True)).hex


def listing_of(files: Sequence[InputFile]) -> pa.Table:
    """Return the table of input files that is stored for a generation."""
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
            "partition_schema": pa.array(
                [
                    None if file.partition_schema is None else file.partition_schema.serialize().to_pybytes()
                    for file in files
                ],
                pa.binary(),
            ).dictionary_encode(),
            "error": pa.array([file.error for file in files], pa.string()),
            "format": pa.array([file.format for file in files], pa.string()),
            "group_starts": pa.array([file.group_starts for file in files], pa.list_(pa.int64())),
        }
    )


def read_listing(location: str, name: str) -> list[InputFile]:
    """Read the table that `listing_of` made. Raises OutputError if it is damaged or missing."""
    try:
        content = read_bytes(location, name)
    except FileNotFoundError as error:
        raise damaged(location, name) from error
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:  # the content is in memory: it is damaged
        raise damaged(location, name) from error
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
                "partition_schema": schema_of(row.get("partition_schema")),
                "group_starts": tuple(row.get("group_starts") or ()),
            }
        )
        for row in table.to_pylist()
    ]


def fingerprint_of(listing: pa.Table) -> str:
    """Return a hash of the names, sizes and versions in a table of input files."""
    return fingerprint((row["url"], row["size"], row["version"]) for row in listing.to_pylist())
