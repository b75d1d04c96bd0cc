"""Tables of Delta Lake and Iceberg: the live files of a snapshot are an input, and finished files can be added.

The libraries `deltalake` and `pyiceberg` are imported only where a table is used (extras `[delta]` and `[iceberg]`).
What they cannot honour is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
from fsspec import AbstractFileSystem

from pipelines.errors import DataError, OutputError, SettingsError
from pipelines.storage.locations import DELTA, ICEBERG, filesystem_of, shown, store_errors

DELTA_LOG = "_delta_log"
HUDI = ".hoodie"
"""Folders in the tables of other formats, which hold their logs."""


@dataclass(frozen=True)
class Snapshot:
    """The live files of a table at one version."""

    version: str
    """Delta's version, or the id of Iceberg's snapshot."""
    filesystem: AbstractFileSystem
    entries: list[dict[str, Any]]
    """One entry for each file, as fsspec lists files: name, size, mtime."""
    partitions: Mapping[str, dict[str, str | None]] = field(default_factory=dict)
    """By file: values of partition columns that are not in the file itself."""
    partition_schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    column_names: Mapping[int, str] | None = None
    """Iceberg: the table's columns by their ids. A file may have other names, and columns that were dropped."""
    column_ids: Mapping[str, int] = field(default_factory=dict)
    """Iceberg: the ids of columns in files that do not contain ids, by their names there."""


@dataclass(frozen=True)
class FinishedFiles:
    """Files of a scoring run that become part of a table."""

    run: str
    """Id of the run. A table remembers it, so that no files are added twice."""
    generation: int
    """Number of the run's generations whose files are finished."""
    names: Sequence[Sequence[str]]
    """Names of the files of each generation."""
    rows: Mapping[str, int]
    """Rows of each file."""
    sizes: Mapping[str, int]
    """Bytes of each file."""


class OutputTable(Protocol):
    """A table that receives finished files."""

    def check(self, output: str, schema: pa.Schema) -> None:
        """Raise UsageError if files with this schema in the folder `output` cannot become part of the table."""

    def find(self, run: str, generation: int) -> str | None:
        """Return what to show of the table's version, if the table has this many generations of the run."""

    def add(self, output: str, schema: pa.Schema, files: FinishedFiles) -> str:
        """Add files in one commit, unless the table has them. Return what to show of the table's version."""


def snapshot_of(location: str, version: str | None = None) -> Snapshot | None:
    """Return the live files of a table, or None if the location is not a table.

    Args:
        location: A folder with a Delta table, or iceberg:CATALOG.NAMESPACE.TABLE.
        version: Version to open. None means the current one.

    Raises:
        DataError: The library is not installed, or the table cannot be read or uses what is not supported.
    """
    if location.startswith(ICEBERG):
        from pipelines.storage import iceberg

        return iceberg.snapshot(location, version)
    with store_errors(DataError, f"{shown(location)} cannot be read"):
        filesystem, path = filesystem_of(location)
        if not filesystem.isdir(f"{path.rstrip('/')}/{DELTA_LOG}"):
            return None
    from pipelines.storage import delta

    return delta.snapshot(location, version)


def output_table(name: str) -> OutputTable:
    """Return the table of the setting `table`. Raises SettingsError if it is neither delta: nor iceberg:."""
    if name.startswith(DELTA):
        from pipelines.storage import delta

        return delta.DeltaOutput(name.removeprefix(DELTA))
    if name.startswith(ICEBERG):
        from pipelines.storage import iceberg

        return iceberg.IcebergOutput(name)
    raise SettingsError(f"--table {shown(name)} must be delta:FOLDER or iceberg:CATALOG.NAMESPACE.TABLE")


def refuse_types(schema: pa.Schema, refused: Mapping[str, Any], name: str) -> None:
    """Raise OutputError for a column with a type that a table format does not have.

    Args:
        schema: Schema of the files.
        refused: Functions of a type, by the name of what they recognize.
        name: Name of the format.
    """
    for column in schema:
        for kind in _all_types(column.type):
            for description, is_refused in refused.items():
                if is_refused(kind):
                    raise OutputError(
                        f"column {column.name!r} has the type {column.type}, and {name} tables have no {description}; "
                        f"exclude it with --keep, or convert it"
                    )


def _all_types(kind: pa.DataType) -> list[pa.DataType]:
    """Return a type and the types inside it."""
    inside: list[pa.DataType] = []
    if pa.types.is_struct(kind):
        inside = [part.type for part in kind]
    elif pa.types.is_map(kind):
        inside = [kind.key_type, kind.item_type]
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inside = [kind.value_type]
    return [kind, *(found for part in inside for found in _all_types(part))]


def is_nanoseconds(kind: pa.DataType) -> bool:
    """Whether a type is a timestamp in nanoseconds."""
    return bool(pa.types.is_timestamp(kind) and kind.unit == "ns")
