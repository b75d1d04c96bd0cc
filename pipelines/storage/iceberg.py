"""Iceberg tables, with the library pyiceberg.

A table is named iceberg:CATALOG.NAMESPACE.TABLE. pyiceberg finds the catalog in ~/.pyiceberg.yaml or in PYICEBERG_*
variables. Data files are read with fsspec, as all inputs are.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import DataError, JobError, OutputError, PipelinesError, SettingsError, first_line
from pipelines.storage.lakes import FinishedFiles, Snapshot, is_nanoseconds, refuse_types
from pipelines.storage.locations import ICEBERG, filesystem_of

COMMITS = 10
"""Number of attempts to commit, if other writers commit at the same time."""
REFUSED_TYPES = {
    "unsigned integers": pa.types.is_unsigned_integer,
    "16-bit floats": pa.types.is_float16,
    "nanoseconds": is_nanoseconds,
    "time zones except UTC": lambda kind: pa.types.is_timestamp(kind) and kind.tz not in (None, "UTC", "+00:00"),
    "durations": pa.types.is_duration,
    "32-bit times": pa.types.is_time32,
    "64-bit dates": pa.types.is_date64,
    "256-bit decimals": pa.types.is_decimal256,
    "null type": pa.types.is_null,
}


def snapshot(location: str, version: str | None) -> Snapshot:
    """Return the live files of an Iceberg table (`lakes.snapshot_of`)."""
    table = _load(location, DataError)
    found = table.current_snapshot() if version is None else table.snapshot_by_id(int(version))
    if found is None and version is None:
        raise DataError(f"{location} has no rows yet")
    if found is None:
        raise DataError(
            f"{location} does not have the snapshot {version} any more, with which the run in --output began; give a "
            f"new folder, or --overwrite to score the current rows"
        )
    try:
        return _live_files(location, table, found)
    except (ValueError, OSError, NotImplementedError) as error:
        raise DataError(f"{location} cannot be read: {first_line(error)}") from error


def _live_files(location: str, table: Any, found: Any) -> Snapshot:
    from pyiceberg.manifest import FileFormat, ManifestContent

    manifests = found.manifests(table.io)
    if any(
        one.content == ManifestContent.DELETES and (one.has_added_files() or one.has_existing_files())
        for one in manifests
    ):
        raise DataError(
            f"{location} has deletes in files of their own (merge on read), which cannot be applied; rewrite the "
            f"table's data files first"
        )
    scan = table.scan(snapshot_id=found.snapshot_id)
    files = sorted((task.file for task in scan.plan_files()), key=lambda file: str(file.file_path))
    if not files:
        raise DataError(f"{location} has no files")
    other = next((file for file in files if file.file_format != FileFormat.PARQUET), None)
    if other is not None:
        raise DataError(f"{location} has a file that is not Parquet ({other.file_path}); rewrite the table as Parquet")
    filesystem, _ = filesystem_of(_url(files[0].file_path))
    entries = [
        {"name": str(filesystem._strip_protocol(_url(file.file_path))), "size": int(file.file_size_in_bytes)}
        for file in files
    ]
    schema = table.schema()
    columns = {number: schema.find_field(number).name for number in schema.field_ids}
    mapping = table.name_mapping()
    ids = {name: one.field_id for one in mapping or () if one.field_id is not None for name in one.names}
    partitions = {str(entry["name"]): _partitions_of(table, file) for entry, file in zip(entries, files, strict=True)}
    defined = {name: kind for part in partitions.values() for name, (_, kind) in part.items()}
    return Snapshot(
        str(found.snapshot_id),
        filesystem,
        entries,
        {path: {name: value for name, (value, _) in part.items()} for path, part in partitions.items()},
        pa.schema(list(defined.items())),
        column_names=columns,
        column_ids=ids,
    )


def _partitions_of(table: Any, file: Any) -> dict[str, tuple[str | None, pa.DataType]]:
    """Return the values and types of the columns by which a file is partitioned as they are.

    The files of tables that came from Hive do not contain these columns.
    """
    from pyiceberg.io.pyarrow import schema_to_pyarrow
    from pyiceberg.transforms import IdentityTransform

    found = {}
    for place, field in enumerate(table.specs()[file.spec_id].fields):
        column = table.schema().find_field(field.source_id) if field.source_id in table.schema().field_ids else None
        if column is not None and isinstance(field.transform, IdentityTransform):
            kind = schema_to_pyarrow(column.field_type)
            value = pa.scalar(file.partition[place])  # of a date or time: the number of days or microseconds
            stored = {pa.int32(): pa.int32(), pa.date32(): pa.int32()}.get(kind, value.type)
            typed = value.cast(stored).cast(kind)
            text = typed.cast(pa.string()).as_py() if typed.is_valid else None
            found[column.name] = (text, kind)
    return found


class IcebergOutput:
    """An Iceberg table that receives the files of an output folder (`lakes.OutputTable`)."""

    def __init__(self, name: str) -> None:
        self._name = name

    def check(self, output: str, schema: pa.Schema) -> None:
        """Check that the table can have the schema."""
        refuse_types(schema, REFUSED_TYPES, "Iceberg")
        table = self._existing()
        if table is None:
            return
        if table.spec().fields:
            raise OutputError(f"--table {self._name} is partitioned; give another table")
        own, given = (
            {column.name: _plain(column.type) for column in one} for one in (table.schema().as_arrow(), schema)
        )
        if own != given:
            raise OutputError(
                f"--table {self._name} has other columns: {_shown(own)}; the output has {_shown(given)}; give another "
                f"table"
            )

    def find(self, run: str, generation: int) -> str | None:
        """Return the table's snapshot, if it has this many generations of the run."""
        table = self._existing()
        return None if table is None else _version_with(table, run, generation)

    def add(self, output: str, schema: pa.Schema, files: FinishedFiles) -> str:
        """Add the files that the table does not have, in one commit with the id of the run.

        The id is a property of the table too, because snapshots expire. pyiceberg's own attempts to commit are switched
        off: they would not see that another process of the same run has committed.
        """
        from pyiceberg.exceptions import CommitFailedException, TableAlreadyExistsError

        catalog, name = _catalog(self._name, OutputError)
        reason = ""
        with suppress(Exception):  # two processes at once; if there is no namespace, the commit says so
            catalog.create_namespace_if_not_exists(name.rpartition(".")[0])
        for _ in range(COMMITS):
            table = self._existing()
            found = None if table is None else _version_with(table, files.run, files.generation)
            if found is not None:
                return found
            places = _locations(output, files, 0 if table is None else _generations_of(table, files.run))
            try:
                if table is None:
                    transaction = catalog.create_table_transaction(name, schema=schema)
                else:
                    retries = {**table.metadata.properties, "commit.retry.num-retries": "0"}
                    table.metadata = table.metadata.model_copy(update={"properties": retries})
                    transaction = table.transaction()
                transaction.add_files(places, snapshot_properties={"run": files.run}, check_duplicate_files=True)
                transaction.set_properties(**{_key(files.run): str(files.generation)})
                return _version(transaction.commit_transaction())
            except (CommitFailedException, TableAlreadyExistsError) as error:
                reason = first_line(error)
            except Exception as error:  # those of the catalog's own database or server
                raise self._failed(first_line(error)) from error
        raise self._failed(reason)

    def _failed(self, reason: str) -> JobError:
        return JobError(
            f"the files could not be added to --table {self._name}: {reason}; start the job again to add them"
        )

    def _existing(self) -> Any:
        """Return the table, or None if it does not exist yet."""
        from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError

        catalog, name = _catalog(self._name, OutputError)
        try:
            return catalog.load_table(name)
        except (NoSuchTableError, NoSuchNamespaceError):
            return None
        except Exception as error:
            raise OutputError(f"--table {self._name} cannot be opened: {first_line(error)}") from error


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type that Iceberg makes of an Arrow type."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_int8(kind) or pa.types.is_int16(kind):
        return pa.int32()
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", None if kind.tz is None else "UTC")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_map(kind):
        return pa.map_(_plain(kind.key_type), _plain(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct([(part.name, _plain(part.type)) for part in kind])
    return kind


def _shown(types: Mapping[str, pa.DataType]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in types.items())


def _locations(output: str, files: FinishedFiles, before: int) -> list[str]:
    """Return the places of the files that the table does not have."""
    filesystem, folder = filesystem_of(output)
    names = [name for generation in files.names[before : files.generation] for name in generation]
    paths = [posixpath.join(folder, name) for name in names]
    return paths if isinstance(filesystem, LocalFileSystem) else [str(filesystem.unstrip_protocol(p)) for p in paths]


def _key(run: str) -> str:
    """Return the property of a table with the number of a run's generations that it has."""
    return f"pipelines.run.{run}"


def _generations_of(table: Any, run: str) -> int:
    return int(table.properties.get(_key(run), 0))


def _version_with(table: Any, run: str, generation: int) -> str | None:
    """Return the table's snapshot, if it has this many generations of the run."""
    return _version(table) if _generations_of(table, run) >= generation else None


def _version(table: Any) -> str:
    current = table.current_snapshot()
    return "no snapshot" if current is None else f"snapshot {current.snapshot_id}"


def _url(path: str) -> str:
    """Return the place of a data file as a path or URL."""
    return path.removeprefix("file://") if path.startswith("file://") else path


def _load(location: str, error_type: type[PipelinesError]) -> Any:
    catalog, name = _catalog(location, error_type)
    try:
        return catalog.load_table(name)
    except Exception as error:  # those of the catalog's own database or server
        raise error_type(f"{location} cannot be opened: {first_line(error)}") from error


def _catalog(location: str, error_type: type[PipelinesError]) -> tuple[Any, str]:
    """Return the catalog of a table, and the table's name in it."""
    try:
        from pyiceberg.catalog import load_catalog
    except ImportError as error:
        raise error_type("Iceberg tables need pyiceberg: pip install 'ray-text-classification[iceberg]'") from error
    catalog, _, name = location.removeprefix(ICEBERG).partition(".")
    if "." not in name:
        raise SettingsError(f"{location} must be iceberg:CATALOG.NAMESPACE.TABLE")
    try:
        return load_catalog(catalog), name
    except Exception as error:  # a wrong configuration, or what the catalog's server answers
        raise error_type(
            f"the catalog {catalog!r} of {location} cannot be opened: {first_line(error)}; define it in "
            f"~/.pyiceberg.yaml or in variables such as PYICEBERG_CATALOG__{catalog.upper()}__URI"
        ) from error
