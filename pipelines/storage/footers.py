"""Read the footers of Parquet files and scan JSON Lines and CSV files, in parallel, before a job starts.

Sizes of row groups are estimates of what their columns take in memory, because work units are divided by them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import DataError, JobError, first_line
from pipelines.storage.lakes import Snapshot, snapshot_of
from pipelines.storage.listing import FOOTER_THREADS, MAGIC, first_bytes, list_entries
from pipelines.storage.locations import WatchedFile, filesystem_of, retried
from pipelines.storage.shards import InputFile
from pipelines.storage.text_files import Format, format_of, scan

WIDTHS = {"INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 8, "BYTE_ARRAY": 4}
"""Bytes of a decoded value of a physical type; of strings, those beside the text itself."""
SHORT_BYTES, SAMPLED_ROWS = 64, 1024
"""Strings with fewer stored bytes than the first, and a dictionary, may be repeated ones: so many rows are sampled."""
WITH_VERSIONS = {"file", "local", "s3", "s3a", "gs", "gcs", "abfs", "az"}
"""Protocols whose listings and single files have the same sizes and versions."""
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
INT96_UNIT = "us"
"""Old writers store times as INT96. Nanoseconds, which pyarrow takes by default, end in the year 2262."""


def read_footers(
    location: str,
    text_columns: Sequence[str],
    *,
    read: Collection[str] | None = None,
    lenient: bool = False,
    without: str | None = None,
    snapshot: Snapshot | None = None,
    known: Mapping[str, InputFile] | None = None,
) -> list[InputFile]:
    """Read the footers of all input files in parallel. JSON Lines and CSV files are scanned instead.

    Args:
        location: File, folder or glob, or a table (`lakes.snapshot_of`).
        text_columns: The text columns. The nulls of the first one are counted.
        read: Columns whose bytes are counted. None means all columns.
        lenient: Store the error of an unreadable file in `InputFile.error` instead of raising it.
        without: Folder whose files are left out: the output of the job.
        snapshot: Snapshot of the table, if the location is one. By default it is the current one.
        known: Files of an earlier scan, by url. JSON Lines and CSV files that are unchanged are not scanned again.

    Raises:
        DataError: A file cannot be read. If lenient, only if no file can be read.
        JobError: The filesystem failed.
    """
    snapshot = snapshot or snapshot_of(location)
    if snapshot is None:
        filesystem, root = filesystem_of(location)
        entries = list_entries(location, without=without)
    else:
        filesystem, root, entries = snapshot.filesystem, "", snapshot.entries
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        files = list(
            pool.map(
                lambda entry: _read_footer(filesystem, entry, root, text_columns, read=read, known_files=known), entries
            )
        )
    if snapshot is not None:
        files = [_of_table(file, snapshot, location) for file in files]
    bad = [file for file in files if file.error is not None]
    if bad and (not lenient or len(bad) == len(files)):
        names = {"parquet": "Parquet", "json": "JSON Lines", "csv": "CSV", "tsv": "TSV"}
        raise DataError(f"{bad[0].url} is not a readable {names[bad[0].format]} file: {bad[0].error}")
    return files


def _read_footer(
    filesystem: AbstractFileSystem,
    entry: dict[str, Any],
    root: str,
    text_columns: Sequence[str],
    *,
    read: Collection[str] | None,
    known_files: Mapping[str, InputFile] | None,
) -> InputFile:
    path = str(entry["name"])
    url = path if isinstance(filesystem, LocalFileSystem) else str(filesystem.unstrip_protocol(path))
    known: dict[str, Any] = {
        "path": path,
        "url": url,
        "size": int(entry.get("size") or 0),
        "version": _version(entry),
        "partitions": _partitions(path, root),
    }
    kind = format_of(path)
    if kind is not None and not (known["size"] and _is_parquet(filesystem, path, url)):
        before = (known_files or {}).get(url)
        if before is not None and (before.size, before.version) == (known["size"], known["version"]):
            return replace(before, partitions=known["partitions"])
        return _scanned(filesystem, known, kind, text_columns)
    try:
        metadata, schema, is_encrypted, expansion = retried(lambda: _open_footer(filesystem, path, read))
    except OSError as error:
        raise store_failed(url, error) from error
    except MemoryError as error:  # pyarrow's is an ArrowException too
        raise no_memory(f"to open {url}") from error
    except (pa.ArrowException, ValueError, TypeError, KeyError) as error:
        return InputFile(**known, schema=None, error=first_line(error))
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    texts = [] if is_encrypted else leaves_of(metadata, set(text_columns[:1]))
    leaves = None if read is None or is_encrypted else leaves_of(metadata, set(read))
    rows = tuple(group.num_rows for group in groups)
    sizes = tuple(max(1, int(bytes_of(group, leaves) * expansion)) for group in groups)
    num_nulls = sum(_num_nulls([group.column(number) for number in texts]) for group in groups)
    return InputFile(**known, schema=schema, row_group_rows=rows, row_group_bytes=sizes, num_nulls=num_nulls)


def _is_parquet(filesystem: AbstractFileSystem, path: str, url: str) -> bool:
    """Return whether a file that is named as JSON Lines or CSV is Parquet by its first bytes."""
    try:
        return first_bytes(filesystem, path) in MAGIC
    except Exception as error:  # object stores raise the errors of their own libraries
        raise store_failed(url, error) from error


def _of_table(file: InputFile, snapshot: Snapshot, location: str) -> InputFile:
    """Return a file of a table with the table's partitions, and without columns that the table has no more.

    Raises:
        DataError: A column has another name in the table.
    """
    if file.schema is None:
        return file
    schema = file.schema
    file = replace(
        file, partitions=dict(snapshot.partitions.get(file.path, {})), partition_schema=snapshot.partition_schema
    )
    if snapshot.column_names is None:
        return file
    own_ids = {column.name: (column.metadata or {}).get(b"PARQUET:field_id") for column in schema}
    ids = {name: snapshot.column_ids.get(name) if own is None else int(own) for name, own in own_ids.items()}
    if not any(number is not None for number in ids.values()):
        raise DataError(
            f"{file.url} has no ids of columns, and {location} has no schema.name-mapping.default; rewrite the table's "
            f"data files first"
        )
    names = {name: snapshot.column_names.get(number) for name, number in ids.items() if number is not None}
    renamed = {name: new for name, new in names.items() if new not in (None, name)}
    if renamed:
        old, new = next(iter(renamed.items()))
        raise DataError(
            f"the column {new!r} of {location} has the name {old!r} in {file.url}; rewrite the table's data files first"
        )
    kept = pa.schema([column for column in schema if names.get(column.name) is not None])
    for column in kept:
        for part in _parts_of(column.type):
            own = (part.metadata or {}).get(b"PARQUET:field_id")
            if own is not None and snapshot.column_names.get(int(own)) != part.name:
                raise DataError(
                    f"the field {part.name!r} of the column {column.name!r} in {file.url} has another name in "
                    f"{location}, or is not there any more; rewrite the table's data files first"
                )
    return replace(file, schema=kept)


def _parts_of(kind: pa.DataType) -> Iterator[pa.Field]:
    """Yield the fields of the structs in a type."""
    for number in range(kind.num_fields):
        part = kind.field(number)
        if pa.types.is_struct(kind):
            yield part
        yield from _parts_of(part.type)


def _scanned(
    filesystem: AbstractFileSystem, known: dict[str, Any], kind: Format, text_columns: Sequence[str]
) -> InputFile:
    """Return a JSON Lines or CSV file after a scan of all its rows."""
    try:
        found = retried(lambda: scan(filesystem, known["path"], kind, texts=text_columns))
    except OSError as error:
        raise store_failed(known["url"], error) from error
    except MemoryError as error:
        raise no_memory(f"to read {known['url']}") from error
    except ValueError as error:
        return InputFile(**known, schema=None, error=first_line(error), format=kind)
    return InputFile(
        **known,
        schema=found.schema,
        row_group_rows=found.group_rows,
        row_group_bytes=found.group_bytes,
        format=kind,
        group_starts=found.group_starts,
    )


def _open_footer(
    filesystem: AbstractFileSystem, path: str, read: Collection[str] | None
) -> tuple[pq.FileMetaData, pa.Schema, bool, float]:
    file = WatchedFile(filesystem, path)
    try:
        parquet = pq.ParquetFile(file, coerce_int96_timestamp_unit=INT96_UNIT)
        is_encrypted = has_encrypted_columns(file, parquet.metadata)
        expansion = 1.0 if is_encrypted else _expansion(file, parquet.metadata, read)
        return parquet.metadata, parquet.schema_arrow, is_encrypted, expansion
    except OSError as error:
        if file.failure is None:  # its content is damaged
            raise ValueError(first_line(error)) from error
        raise
    finally:
        file.close()


def store_failed(url: str, error: BaseException) -> JobError:
    """Return the error of a job whose filesystem failed: this is no fault of the data."""
    reason = first_line(error) if isinstance(error, OSError) else f"{type(error).__name__}: {first_line(error)}"
    return JobError(f"{url} could not be read: {reason}; no row is lost: start the job again when the storage works")


def no_memory(purpose: str) -> JobError:
    """Return the error of a job for which an allocation failed: this is no fault of the data."""
    return JobError(f"there is not enough memory {purpose}; no row is lost: start the job again with more memory")


def check_unchanged(filesystem: AbstractFileSystem, file: InputFile) -> None:
    """Raise JobError if a file is another one than when the job listed it. Files of tables never change."""
    protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
    if file.partition_schema is not None or not protocols & WITH_VERSIONS:
        return
    place = os.path.realpath(file.path) if isinstance(filesystem, LocalFileSystem) else file.path
    filesystem.invalidate_cache(place)  # s3fs keeps what it has listed
    entry = filesystem.info(place)
    if (int(entry.get("size") or 0), _version(entry)) != (file.size, file.version):
        raise JobError(
            f"{file.url} has changed since the job began; start the job again: it says what can be done about it"
        )


def _expansion(file: Any, metadata: pq.FileMetaData, read: Collection[str] | None) -> float:
    """Return how many times more bytes the columns have when they are decoded. The largest row group is looked at.

    Values that repeat are stored once, in a dictionary. The length of strings that take only a few bytes in the file is
    that of a sample.
    """
    if not metadata.num_row_groups:
        return 1.0
    number = max(range(metadata.num_row_groups), key=lambda index: int(metadata.row_group(index).num_rows))
    group = metadata.row_group(number)
    leaves = leaves_of(metadata, set(read)) if read is not None else range(metadata.num_columns)
    columns = [group.column(leaf) for leaf in leaves]
    stored = sum(column.total_uncompressed_size for column in columns)
    widths = [column.num_values * WIDTHS.get(column.physical_type, 0) for column in columns]
    decoded = sum(max(column.total_uncompressed_size, width) for column, width in zip(columns, widths, strict=True))
    short = [
        column
        for column in columns
        if column.physical_type == "BYTE_ARRAY"
        and column.has_dictionary_page
        and column.total_uncompressed_size < SHORT_BYTES * column.num_values
    ]
    if short:
        with suppress(pa.ArrowException, OSError, ValueError):  # damaged: reported when the rows are read
            paths = [column.path_in_schema for column in short]
            parquet = pq.ParquetFile(file, read_dictionary=paths, buffer_size=2**16)
            known = set(parquet.schema_arrow.names)
            names = sorted({path if path in known else path.partition(".")[0] for path in paths})
            batch = next(parquet.iter_batches(SAMPLED_ROWS, row_groups=[number], columns=names, use_threads=False))
            repeated = sum(map(_repeated_bytes, batch.columns)) * group.num_rows // max(len(batch), 1)
            decoded += max(repeated - sum(column.total_uncompressed_size for column in short), 0)
    return float(decoded / stored) if stored else 1.0


def _repeated_bytes(column: pa.Array) -> int:
    """Return the bytes of the strings of which a column has only numbers in a dictionary, also inside it."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(column.dictionary).take(column.indices)
        return int(pc.sum(lengths).as_py() or 0)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        return _repeated_bytes(column.values) if not pa.types.is_map(kind) else _repeated_bytes(column.items)
    if pa.types.is_struct(kind):
        return sum(_repeated_bytes(column.field(place)) for place in range(kind.num_fields))
    return 0


def has_encrypted_columns(file: Any, metadata: pq.FileMetaData) -> bool:
    """Whether a file has a readable footer and encrypted columns. Such a footer is followed by a signature.

    pyarrow ends the process if it is asked for the sizes or statistics of an encrypted column.
    """
    file.seek(-8, os.SEEK_END)
    return bool(int.from_bytes(file.read(4), "little") != metadata.serialized_size)


def _version(entry: dict[str, Any]) -> str:
    names = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "created")
    return str(next((entry[name] for name in names if entry.get(name) is not None), ""))


def _partitions(path: str, root: str) -> dict[str, str | None]:
    """Return the key=value folders of a path below root. If root is a glob, they may be anywhere in the path."""
    below = path[len(root) :] if path.startswith(root) else path
    pairs = [part.partition("=") for part in below.split("/")[:-1] if "=" in part]
    return {unquote(key): None if value == HIVE_NULL else unquote(value) for key, _, value in pairs if key}


def leaves_of(metadata: pq.FileMetaData, names: set[str]) -> list[int]:
    """Return the indices of the leaf columns of some columns."""
    paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    return [number for number, path in enumerate(paths) if path.split(".")[0] in names or path in names]


def bytes_of(group: pq.RowGroupMetaData, leaves: list[int] | None) -> int:
    """Return the bytes of some leaf columns of a row group in the file, without compression. None means all."""
    if not leaves:  # all, or none of them is in this file
        return int(group.total_byte_size)
    return int(sum(group.column(number).total_uncompressed_size for number in leaves))


def _num_nulls(columns: Sequence[pq.ColumnChunkMetaData]) -> int:
    statistics = [column.statistics for column in columns]
    return sum(found.null_count for found in statistics if found is not None and found.has_null_count)
