"""Read the footers of Parquet files, scan JSON Lines and CSV files, and split their rows into work units.

A work unit is an ordered list of row ranges of row groups, from one or more files. Its output is one file, whose name
depends only on the unit. `WorkUnits` stores the units as numbers, so that hundreds of thousands need little memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from pipelines.errors import DataError, first_line
from pipelines.storage.lakes import Snapshot, snapshot_of
from pipelines.storage.listing import FOOTER_THREADS, MAGIC, first_bytes, list_entries
from pipelines.storage.locations import filesystem_of, retried
from pipelines.storage.text_files import Format, format_of, scan

SMALLEST_UNIT_BYTES = 64 * 2**10
USUAL_UNIT_BYTES = 64 * 2**20
USUAL_NUM_UNITS = 2_000
MOST_UNITS = 100_000
"""These constants set the default unit size. As the input grows, first the number of units grows to USUAL_NUM_UNITS,
then their size to USUAL_UNIT_BYTES, then their number to MOST_UNITS, and then their size again.
"""
WIDTHS = {"INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 8, "BYTE_ARRAY": 4}
"""Bytes of a decoded value of a physical type; of strings, those beside the text itself."""
SHORT_BYTES, SAMPLED_ROWS = 64, 1024
"""Strings with fewer stored bytes than the first, and a dictionary, may be repeated ones: so many rows are sampled."""
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
INT96_UNIT = "us"
"""Old writers store times as INT96. Nanoseconds, which pyarrow takes by default, end in the year 2262."""


OUTPUT_NAME = re.compile(r"part-\d{6,}-[0-9a-f]{12}\.parquet")
"""Names of the output files of work units."""


@dataclass(frozen=True)
class InputFile:
    """An input file and the content of its footer, or what a scan of a JSON Lines or CSV file has found."""

    path: str
    """Path within its filesystem, without protocol."""
    url: str
    """Display name: a local path, or a URL with its protocol."""
    size: int
    version: str
    """Changes when the content changes: an object store's tag, or the modification time."""
    schema: pa.Schema | None
    row_group_rows: tuple[int, ...] = ()
    row_group_bytes: tuple[int, ...] = ()
    """Estimate of the decoded bytes of the columns that are read, in each row group."""
    num_nulls: int = 0
    """Number of rows whose text is null, as far as the footer's statistics count them."""
    partitions: dict[str, str | None] = field(default_factory=dict)
    """Hive partitions: keys and values of the key=value folders in the path. Hive's name for null is None."""
    partition_schema: pa.Schema | None = None
    """Types of the partitions, if a table defines them."""
    error: str | None = None
    """Why the file cannot be read, or None. A file with an error has 0 rows."""
    format: Format = "parquet"
    group_starts: tuple[int, ...] = ()
    """JSON Lines: offset of the first byte of each row group. A row group is then a part of the file."""

    @property
    def num_rows(self) -> int:
        """Number of rows in the file."""
        return sum(self.row_group_rows)

    @property
    def column_names(self) -> list[str]:
        """Names of the columns and Hive partitions, without duplicates."""
        own = [] if self.schema is None else self.schema.names
        return list(dict.fromkeys([*own, *self.partitions]))


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of one row group. first_row is the row number of the row group's first row in the file."""

    file: InputFile
    row_group: int
    first_row: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class WorkUnit:
    """The rows that become one output file."""

    number: int
    spans: tuple[Span, ...]
    planned_spans: tuple[Span, ...] = ()
    """The rows for which the unit was planned, if some of them no longer belong to it. They determine its name."""

    @property
    def num_rows(self) -> int:
        """Number of input rows."""
        return sum(span.num_rows for span in self.spans)

    @property
    def output_name(self) -> str:
        """Name of the output file. It is the same for the same rows of the same files."""
        spans = self.planned_spans or self.spans
        rows = [(span.file.url, span.row_group, span.start, span.stop) for span in spans]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
        return f"part-{self.number:06d}-{digest}.parquet"


@dataclass(frozen=True)
class WorkUnits:
    """The work units of an input, in order. A unit is created when it is accessed."""

    files: Sequence[InputFile]
    spans: NDArray[np.int64]
    """(S, 5), one row per span: file, row group, the row group's first row, start, stop."""
    offsets: NDArray[np.int64]
    """Unit u contains spans[offsets[u]:offsets[u + 1]]."""
    first_number: int = 0
    """Number of the first unit. Earlier generations of input in the same output use the numbers below it."""
    replaced: frozenset[str] = frozenset()
    """Names (url) of files of which there is a later version: their rows no longer belong to the units."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> WorkUnit:
        rows = self.spans[self.offsets[index] : self.offsets[index + 1]].tolist()
        spans = tuple(Span(self.files[file], *rest) for file, *rest in rows)
        if not self.replaced:
            return WorkUnit(self.first_number + index, spans)
        left = tuple(span for span in spans if span.file.url not in self.replaced)
        return WorkUnit(self.first_number + index, left, spans)

    def __iter__(self) -> Iterator[WorkUnit]:
        """Yield the units that have rows."""
        units = (self[index] for index in range(len(self)))
        return (unit for unit in units if unit.spans)

    @property
    def num_rows(self) -> int:
        """Number of rows of all units."""
        rows_S = self.spans[:, 4] - self.spans[:, 3]
        if self.replaced:
            is_left = np.array([file.url not in self.replaced for file in self.files], bool)
            rows_S = rows_S[is_left[self.spans[:, 0]]]
        return int(rows_S.sum())


def read_footers(
    location: str,
    text_columns: Sequence[str],
    *,
    read: Collection[str] | None = None,
    lenient: bool = False,
    without: str | None = None,
    snapshot: Snapshot | None = None,
) -> list[InputFile]:
    """Read the footers of all input files in parallel. JSON Lines and CSV files are scanned instead.

    Args:
        location: File, folder or glob, or a table (`lakes.snapshot_of`).
        text_columns: The text columns. The nulls of the first one are counted.
        read: Columns whose bytes are counted. None means all columns.
        lenient: Store the error of an unreadable file in `InputFile.error` instead of raising it.
        without: Folder whose files are left out: the output of the job.
        snapshot: Snapshot of the table, if the location is one. By default it is the current one.

    Raises:
        DataError: A file cannot be read. If lenient, only if no file can be read.
    """
    snapshot = snapshot or snapshot_of(location)
    if snapshot is None:
        filesystem, root = filesystem_of(location)
        entries = list_entries(location, without=without)
    else:
        filesystem, root, entries = snapshot.filesystem, "", snapshot.entries
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        files = list(pool.map(lambda entry: _read_footer(filesystem, entry, root, text_columns, read), entries))
    if snapshot is not None:
        files = [_of_table(file, snapshot, location) for file in files]
    bad = [file for file in files if file.error is not None]
    if bad and (not lenient or len(bad) == len(files)):
        names = {"parquet": "Parquet", "json": "JSON Lines", "csv": "CSV"}
        raise DataError(f"{bad[0].url} is not a readable {names[bad[0].format]} file: {bad[0].error}")
    return files


def split_into_units(
    files: Sequence[InputFile], *, unit_bytes: int | None = None, limit: int | None = None, first_number: int = 0
) -> WorkUnits:
    """Split the rows of files into units of about unit_bytes.

    Large row groups are split, and small ones are joined. Every row is in exactly one unit. Units are in input order.

    Args:
        files: Input files with their footers.
        unit_bytes: Bytes per unit, of all columns that are read. Default: `usual_unit_bytes`.
        limit: Use only this many rows, from the start of the input.
        first_number: Number of the first unit.
    """
    size = unit_bytes or usual_unit_bytes(files)
    spans: list[tuple[int, int, int, int, int]] = []
    offsets = [0]
    filled = 0
    for span, span_bytes in _limited(_split_row_groups(files, size), limit):
        if filled and filled + span_bytes > size:
            offsets.append(len(spans))
            filled = 0
        spans.append(span)
        filled += max(span_bytes, 1)
    if spans:
        offsets.append(len(spans))
    return WorkUnits(files, np.asarray(spans, np.int64).reshape(-1, 5), np.asarray(offsets, np.int64), first_number)


def usual_unit_bytes(files: Sequence[InputFile]) -> int:
    """Return the default bytes per unit. It grows with the input, so that the number of units stays bounded."""
    return _unit_bytes(sum(sum(file.row_group_bytes) for file in files))


def _unit_bytes(total: int) -> int:
    usual = min(max(total // USUAL_NUM_UNITS, SMALLEST_UNIT_BYTES), USUAL_UNIT_BYTES)
    return max(usual, total // MOST_UNITS)


def _read_footer(
    filesystem: AbstractFileSystem,
    entry: dict[str, Any],
    root: str,
    text_columns: Sequence[str],
    read: Collection[str] | None,
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
    if kind is not None and first_bytes(filesystem, path) not in MAGIC:
        return _scanned(filesystem, known, kind, text_columns)
    try:
        metadata, schema, is_encrypted, expansion = retried(lambda: _open_footer(filesystem, path, read))
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        return InputFile(**known, schema=None, error=first_line(error))
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    texts = [] if is_encrypted else leaves_of(metadata, set(text_columns[:1]))
    leaves = None if read is None or is_encrypted else leaves_of(metadata, set(read))
    rows = tuple(group.num_rows for group in groups)
    sizes = tuple(max(1, int(bytes_of(group, leaves) * expansion)) for group in groups)
    num_nulls = sum(_num_nulls([group.column(number) for number in texts]) for group in groups)
    return InputFile(**known, schema=schema, row_group_rows=rows, row_group_bytes=sizes, num_nulls=num_nulls)


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
    ids = {column.name: (column.metadata or {}).get(b"PARQUET:field_id") for column in schema}
    names = {name: snapshot.column_names.get(int(number)) for name, number in ids.items() if number is not None}
    renamed = {name: new for name, new in names.items() if new not in (None, name)}
    if renamed:
        old, new = next(iter(renamed.items()))
        raise DataError(
            f"the column {new!r} of {location} has the name {old!r} in {file.url}; rewrite the table's data files first"
        )
    known = set(snapshot.column_names.values())
    return replace(file, schema=pa.schema([column for column in schema if column.name in known]))


def _scanned(
    filesystem: AbstractFileSystem, known: dict[str, Any], kind: Format, text_columns: Sequence[str]
) -> InputFile:
    """Return a JSON Lines or CSV file after a scan of all its rows."""
    try:
        found = retried(lambda: scan(filesystem, known["path"], kind, texts=text_columns))
    except (OSError, ValueError) as error:
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
    with filesystem.open(path, "rb") as file:
        parquet = pq.ParquetFile(file, coerce_int96_timestamp_unit=INT96_UNIT)
        is_encrypted = has_encrypted_columns(file, parquet.metadata)
        expansion = 1.0 if is_encrypted else _expansion(file, parquet.metadata, read)
        return parquet.metadata, parquet.schema_arrow, is_encrypted, expansion


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
        with suppress(pa.ArrowException, OSError, ValueError):  # damaged: who reads the rows reports it
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


def fingerprint(files: Iterable[tuple[str, int, str]]) -> str:
    """Return a hash that changes if the name, size or version of any file changes."""
    digest = hashlib.sha256()
    for url, size, version in files:
        digest.update(json.dumps({"url": url, "size": size, "version": version}).encode())
    return f"sha256:{digest.hexdigest()}"


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


def _split_row_groups(files: Sequence[InputFile], size: int) -> Iterator[tuple[tuple[int, int, int, int, int], int]]:
    """Yield spans of at most about size bytes and the bytes of each, over all row groups in order."""
    for index, file in enumerate(files):
        first_row = 0
        for number, (rows, group_bytes) in enumerate(zip(file.row_group_rows, file.row_group_bytes, strict=True)):
            pieces = max(1, min(rows, -(-group_bytes // size)))
            bounds = [rows * piece // pieces for piece in range(pieces + 1)]
            for start, stop in itertools.pairwise(bounds):
                if stop > start:
                    yield (index, number, first_row, start, stop), group_bytes * (stop - start) // rows
            first_row += rows


def _limited(
    spans: Iterator[tuple[tuple[int, int, int, int, int], int]], limit: int | None
) -> Iterator[tuple[tuple[int, int, int, int, int], int]]:
    left = limit
    for (index, number, first_row, start, stop), span_bytes in spans:
        if left is None:
            yield (index, number, first_row, start, stop), span_bytes
        elif left > 0:
            stop = min(stop, start + left)
            left -= stop - start
            yield (index, number, first_row, start, stop), span_bytes


TASKS_PER_ROW_GROUP = 8
"""Maximum number of tasks that read the same row group."""


def group_units(units: Iterable[WorkUnit]) -> list[list[WorkUnit]]:
    """Group units into lists, one list per task, in order.

    Units of the same row group are divided evenly over at most TASKS_PER_ROW_GROUP lists. Every other unit is alone in
    its list.
    """
    joined: list[list[WorkUnit]] = []
    for unit in units:
        if joined and _end(joined[-1][-1]) == _begin(unit):
            joined[-1].append(unit)
        else:
            joined.append([unit])
    runs = []
    for group in joined:
        size = -(-len(group) // TASKS_PER_ROW_GROUP)
        runs += [group[start : start + size] for start in range(0, len(group), size)]
    return runs


def _begin(unit: WorkUnit) -> tuple[str, int]:
    return unit.spans[0].file.path, unit.spans[0].row_group


def _end(unit: WorkUnit) -> tuple[str, int]:
    return unit.spans[-1].file.path, unit.spans[-1].row_group
