"""Delta Lake tables, with the library deltalake.

deltalake opens tables that use deletion vectors or column mapping without a word. Reading their files one by one would
give deleted rows or wrong columns, so such tables are refused.
"""

from __future__ import annotations

import json
import posixpath
import time
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from pipelines.errors import DataError, JobError, OutputError, PipelinesError, SettingsError, first_line
from pipelines.storage.lakes import FinishedFiles, Snapshot, is_nanoseconds, refuse_types
from pipelines.storage.locations import absolute, filesystem_of, shown

READABLE = {"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck"}
"""Reader features of a table that do not affect how its data files are read."""
NO_MAPPING = ("none", None)
COMMITS = 10
"""Number of attempts to commit, if other writers commit at the same time."""
REFUSED_TYPES = {
    "unsigned integers": pa.types.is_unsigned_integer,
    "nanoseconds": is_nanoseconds,
    "null type": pa.types.is_null,
}
"""Types that deltalake accepts, but that other readers of the table do not get back."""


def snapshot(location: str, version: str | None) -> Snapshot:
    """Return the live files of a Delta table (`lakes.snapshot_of`)."""
    table = _open(location, version)
    reason = _unsupported(table)
    if reason is not None:
        raise DataError(
            f"{shown(location)} is a Delta table with {reason}, which cannot be read file by file; "
            f"rewrite it without, or give a copy of it as Parquet"
        )
    found = pa.table(table.get_add_actions(flatten=True)).sort_by("path")
    filesystem, root = filesystem_of(location)
    paths = [_place(filesystem, root, path) for path in found["path"].to_pylist()]
    if not paths:
        raise DataError(f"{shown(location)} is a Delta table without files")
    entries = [
        {"name": path, "size": size, "mtime": modified}
        for path, size, modified in zip(
            paths, found["size_bytes"].to_pylist(), found["modification_time"].to_pylist(), strict=True
        )
    ]
    schema = pa.schema(table.schema())
    names = table.metadata().partition_columns
    partition_schema = pa.schema([schema.field(name) for name in names])
    values = {name: found[f"partition.{name}"].cast(pa.string()).to_pylist() for name in names}
    partitions = {path: {name: values[name][row] for name in names} for row, path in enumerate(paths)}
    return Snapshot(str(table.version()), filesystem, entries, partitions, partition_schema)


class DeltaOutput:
    """A Delta table that receives the files of an output folder below it (`lakes.OutputTable`)."""

    def __init__(self, folder: str) -> None:
        self._folder = absolute(folder)

    def check(self, output: str, schema: pa.Schema) -> None:
        """Check that the output is below the table, and that the table can have the schema."""
        if not _below(output, self._folder):
            raise SettingsError(
                f"--output {shown(output)} must be a folder in the table {shown(self._folder)}, because a Delta table "
                f"has its files below it; for example {shown(self._folder).rstrip('/')}/scored"
            )
        _check_name(self._folder, SettingsError)
        refuse_types(schema, REFUSED_TYPES, "Delta")
        library = _library(OutputError)
        try:
            wanted = library.Schema.from_arrow(schema)
        except Exception as error:  # the library raises no more specific exception
            raise OutputError(
                f"--table {shown(self._folder)}: {first_line(error)}; exclude columns with --keep"
            ) from error
        table = self._existing()
        if table is None:
            return
        if table.metadata().partition_columns:
            raise OutputError(f"--table {shown(self._folder)} is partitioned; give another table")
        if _plain(table.schema()) != _plain(wanted):
            raise OutputError(
                f"--table {shown(self._folder)} has other columns: {_shown(_plain(table.schema()))}; the output has "
                f"{_shown(_plain(wanted))}; give another table"
            )

    def find(self, run: str, generation: int) -> str | None:
        """Return the table's version, if it has this many generations of the run."""
        table = self._existing()
        return None if table is None else _version_with(table, run, generation)

    def add(self, output: str, schema: pa.Schema, files: FinishedFiles) -> str:
        """Add the files that the table does not have, in one commit with the id of the run.

        Commits of others in between are looked at: deltalake's own attempts would not see that another process of the
        same run has committed.
        """
        library = _library(OutputError)
        from deltalake.exceptions import CommitFailedError, DeltaError

        reason = ""
        for _ in range(COMMITS):
            table = self._existing()
            found = None if table is None else _version_with(table, files.run, files.generation)
            if found is not None:
                return found
            before = 0 if table is None else table.transaction_version(files.run) or 0
            try:
                self._commit(library, table, schema, self._actions(output, files, before), files)
            except (DeltaError, OSError) as error:
                reason = first_line(error)
                if isinstance(error, CommitFailedError) or (table is None and self._existing() is not None):
                    continue  # another writer was quicker
                raise self._failed(reason) from error
            return f"version {self._existing().version()}"
        raise self._failed(reason)

    def _failed(self, reason: str) -> JobError:
        return JobError(
            f"the files could not be added to --table {shown(self._folder)}: {reason}; start the job again to add them"
        )

    def _existing(self) -> Any:
        """Return the table, or None if it does not exist yet."""
        library = _library(OutputError)
        from deltalake.exceptions import DeltaError, TableNotFoundError

        try:
            return library.DeltaTable(self._folder)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            raise OutputError(f"--table {shown(self._folder)} cannot be opened: {first_line(error)}") from error

    def _actions(self, output: str, files: FinishedFiles, before: int) -> list[Any]:
        """Return what adds the files of all generations from number `before` on."""
        from deltalake.transaction import AddAction

        below = _below(output, self._folder) or ""
        return [
            AddAction(
                path=posixpath.join(below, name),
                size=files.sizes[name],
                partition_values={},
                modification_time=int(time.time() * 1000),
                data_change=True,
                stats=json.dumps({"numRecords": files.rows[name]}),
            )
            for generation in files.names[before : files.generation]
            for name in generation
        ]

    def _commit(self, library: Any, table: Any, schema: pa.Schema, actions: list[Any], files: FinishedFiles) -> None:
        from deltalake.transaction import create_table_with_add_actions

        properties = library.CommitProperties(
            app_transactions=[library.Transaction(files.run, files.generation)],
            max_commit_retries=0,
            custom_metadata={"run": files.run},
        )
        hooks = library.PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
        options = {"commit_properties": properties, "post_commithook_properties": hooks}
        wanted = library.Schema.from_arrow(schema)
        if table is None:
            create_table_with_add_actions(self._folder, wanted, actions, mode="error", **options)
        else:
            table.create_write_transaction(actions, mode="append", schema=wanted, partition_by=[], **options)


def _open(location: str, version: str | None) -> Any:
    library = _library(DataError)
    _check_name(location, DataError)
    from deltalake.exceptions import DeltaError

    try:
        return library.DeltaTable(location, version=None if version is None else int(version))
    except (DeltaError, OSError) as error:
        wanted = "" if version is None else f" at version {version}, with which the run in --output began"
        raise DataError(f"the Delta table {shown(location)} cannot be opened{wanted}: {first_line(error)}") from error


def _check_name(location: str, error_type: type[PipelinesError]) -> None:
    """Refuse names that deltalake itself confuses: it reads `a%20b`, and then looks for files in `a b`."""
    if unquote(location) != location:
        raise error_type(
            f"the Delta table {shown(location)} has an escaped character (% and two digits) in its name, which the "
            f"library deltalake cannot open; rename the folder"
        )


def _version_with(table: Any, run: str, generation: int) -> str | None:
    """Return the table's version, if it has this many generations of the run."""
    return f"version {table.version()}" if (table.transaction_version(run) or 0) >= generation else None


def _unsupported(table: Any) -> str | None:
    """Return what a table uses that its data files alone do not show, or None."""
    more = set(table.protocol().reader_features or ()) - READABLE
    if more:
        return f"the reader features {', '.join(sorted(more))}"
    if table.metadata().configuration.get("delta.columnMapping.mode") not in NO_MAPPING:
        return "column mapping"
    return None


def _place(filesystem: Any, root: str, path: str) -> str:
    """Return the path of a data file. The log has it percent-encoded, and below the table or as a URL."""
    plain = unquote(path)
    if "://" in plain or plain.startswith("/"):
        return str(filesystem._strip_protocol(plain))
    return posixpath.join(root, plain)


def _below(folder: str, above: str) -> str | None:
    """Return the path of a folder relative to a folder above it. None if it is not below."""
    (own, path), (other, root) = filesystem_of(folder), filesystem_of(above)
    if type(own) is not type(other):
        return None
    path, root = path.rstrip("/"), root.rstrip("/")
    if path == root:
        return ""
    return path.removeprefix(f"{root}/") if path.startswith(f"{root}/") else None


def _plain(schema: Any) -> pa.Schema:
    return pa.schema(schema).remove_metadata()


def _shown(schema: pa.Schema) -> str:
    return ", ".join(f"{column.name} {column.type}" for column in schema)


def _library(error_type: Any) -> Any:
    try:
        import deltalake
    except ImportError as error:
        raise error_type("Delta tables need deltalake: pip install 'ray-text-classification[delta]'") from error
    return deltalake
