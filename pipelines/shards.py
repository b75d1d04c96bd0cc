"""Input files, work units, output names, and the commit of a unit's output.

A work unit is an ordered list of row ranges of row groups, of one or more files; its output is one file whose name
is a function of the unit alone. A file under its final name is complete: local files are written beside it, synced
and renamed, and object stores receive one atomic upload. Knows Parquet footers, no models, no torch, no ray.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import posixpath
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import DataError, OutputError

MANIFEST = "_manifest.json"
SUMMARY = "_summary.json"
SMALLEST_UNIT_BYTES = 64 * 2**10
LARGEST_UNIT_BYTES = 64 * 2**20
TARGET_NUM_UNITS = 2_000
FOOTER_THREADS = 16
MOST_PIECES = 16
"""A row group is read whole by each unit that has a piece of it: it is cut into no more than these."""


@dataclass(frozen=True)
class InputFile:
    """A Parquet file and what its footer says."""

    path: str
    """As its filesystem names it, without protocol."""
    url: str
    """As people name it: a path, or with its protocol."""
    schema: pa.Schema
    row_group_rows: tuple[int, ...]
    row_group_bytes: tuple[int, ...]
    """Uncompressed bytes of the text column in each row group."""

    @property
    def num_rows(self) -> int:
        """Rows of the whole file."""
        return sum(self.row_group_rows)


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of one row group; first_row is the row group's first row within the file."""

    path: str
    url: str
    row_group: int
    first_row: int
    start: int
    stop: int


@dataclass(frozen=True)
class WorkUnit:
    """One task's worth of rows, and the name of its output."""

    number: int
    spans: tuple[Span, ...]

    @property
    def num_rows(self) -> int:
        """Input rows, and so output rows."""
        return sum(span.stop - span.start for span in self.spans)

    @property
    def output_name(self) -> str:
        """Name of the output file: the same for the same rows of the same files."""
        rows = [(span.url, span.row_group, span.start, span.stop) for span in self.spans]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
        return f"part-{self.number:06d}-{digest}.parquet"


def absolute(location: str) -> str:
    """A local path as every process sees it, whatever its working folder; URLs as they are."""
    return location if "://" in location else os.path.abspath(os.path.expanduser(location))


def filesystem_of(location: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec filesystem of a path or URL, and the path within it. Raises DataError for an unknown protocol."""
    try:
        filesystem, path = fsspec.core.url_to_fs(location)
    except (ValueError, ImportError) as error:
        raise DataError(
            f"{location} cannot be opened: {error}; extras are ray-text-classification[s3|gcs|azure]"
        ) from error
    return filesystem, str(path)


def list_files(location: str) -> list[str]:
    """Paths of the Parquet files of a file, folder (recursively) or glob, sorted.

    Raises DataError where there is nothing, or nothing that ends in .parquet. Names that begin with `_` or `.` are
    no data.
    """
    filesystem, path = filesystem_of(location)
    if filesystem.isfile(path):
        return [path]
    if any(character in path for character in "*?["):
        matches = filesystem.glob(path)
        found = [name for match in matches for name in (filesystem.find(match) or [match])]
    elif filesystem.isdir(path):
        found = filesystem.find(path)
    else:
        raise DataError(f"{location} does not exist; give a Parquet file, a folder of them, or a glob")
    files = sorted(name for name in found if name.endswith(".parquet") and _is_data(name, path))
    if not files:
        raise DataError(f"{location} holds no *.parquet files ({len(found)} other files)")
    return files


def read_footers(location: str, text_column: str) -> list[InputFile]:
    """Footers of all input files, read in parallel; a file that is no Parquet is a DataError that names it."""
    filesystem, _ = filesystem_of(location)
    files = list_files(location)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return list(pool.map(lambda path: _read_footer(filesystem, path, text_column), files))


def plan_units(
    files: Sequence[InputFile], *, unit_bytes: int | None = None, limit: int | None = None
) -> list[WorkUnit]:
    """Pack row groups into units of about unit_bytes of text: large ones are split, small ones joined.

    The default size grows with the input, so that the number of units stays bounded. limit takes only the first
    rows. Every row is in exactly one unit, and units are in input order.
    """
    size = unit_bytes or _unit_bytes(sum(sum(file.row_group_bytes) for file in files))
    units: list[WorkUnit] = []
    spans: list[Span] = []
    filled = 0
    for span, span_bytes in _limited(_split_row_groups(files, size), limit):
        if spans and filled + span_bytes > size:
            units.append(WorkUnit(len(units), tuple(spans)))
            spans, filled = [], 0
        spans.append(span)
        filled += span_bytes
    if spans:
        units.append(WorkUnit(len(units), tuple(spans)))
    return units


def read_unit(location: str, unit: WorkUnit, columns: Sequence[str], *, prefix: str = "") -> pa.Table:
    """The unit's rows in order: the columns asked for, then source_file and source_row (int64), with the prefix.

    A column that a file lacks is null in its rows. Raises DataError where a row group cannot be read.
    """
    filesystem, _ = filesystem_of(location)
    tables = []
    for span in unit.spans:
        rows = _read_span(filesystem, span, columns)
        first = span.first_row + span.start
        rows = rows.append_column(prefix + "source_file", pa.array([span.url] * len(rows), pa.string()))
        rows = rows.append_column(prefix + "source_row", pa.array(range(first, first + len(rows)), pa.int64()))
        tables.append(rows)
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    for name in columns:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table)))
    return table.select([*columns, prefix + "source_file", prefix + "source_row"])


def prepare_output(location: str) -> None:
    """Make the output folder. Raises OutputError where it holds anything or cannot be written."""
    filesystem, path = filesystem_of(location)
    try:
        if filesystem.isfile(path):
            raise OutputError(f"--output {location} is a file; give a folder that does not exist yet")
        if filesystem.isdir(path) and filesystem.ls(path):
            raise OutputError(f"--output {location} is not empty; give a new folder, or remove it first")
        filesystem.makedirs(path, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output {location} cannot be written: {error}") from error


def commit_table(location: str, name: str, table: pa.Table) -> int:
    """Write a Parquet file (zstd) under its final name in one step; the bytes written."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    content = buffer.getvalue()
    commit_bytes(location, name, memoryview(content))
    return int(content.size)


def commit_json(location: str, name: str, content: dict[str, Any]) -> None:
    """Write a JSON file under its final name in one step."""
    commit_bytes(location, name, (json.dumps(content, indent=2) + "\n").encode())


def commit_bytes(location: str, name: str, content: bytes | memoryview) -> None:
    """Put content under its final name: readers see all of it or nothing, whenever the writer is killed."""
    filesystem, folder = filesystem_of(location)
    target = posixpath.join(folder, name)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(target, bytes(content))
        return
    partial = posixpath.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError:
        if os.path.exists(partial):
            os.unlink(partial)
        raise


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make a local folder's files and names survive a power loss."""
    for name in [*(entry.path for entry in os.scandir(folder) if entry.is_file()), folder]:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_span(filesystem: AbstractFileSystem, span: Span, columns: Sequence[str]) -> pa.Table:
    try:
        with filesystem.open(span.path, "rb") as file:
            parquet = pq.ParquetFile(file)
            present = [name for name in columns if name in parquet.schema_arrow.names]
            group = parquet.read_row_group(span.row_group, columns=present)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"row group {span.row_group} of {span.url} cannot be read: {error}") from error
    return group.select(present).slice(span.start, span.stop - span.start)


def _read_footer(filesystem: AbstractFileSystem, path: str, text_column: str) -> InputFile:
    url = path if isinstance(filesystem, LocalFileSystem) else str(filesystem.unstrip_protocol(path))
    try:
        with filesystem.open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            metadata, schema = parquet.metadata, parquet.schema_arrow
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{url} is no readable Parquet file: {error}") from error
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = [_text_bytes(group, text_column) for group in groups]
    return InputFile(path, url, schema, tuple(group.num_rows for group in groups), tuple(sizes))


def _text_bytes(group: pq.RowGroupMetaData, text_column: str) -> int:
    columns = [group.column(number) for number in range(group.num_columns)]
    own = [column.total_uncompressed_size for column in columns if column.path_in_schema == text_column]
    return int(max(1, sum(own) or group.total_byte_size))


def _unit_bytes(total: int) -> int:
    return min(max(total // TARGET_NUM_UNITS, SMALLEST_UNIT_BYTES), LARGEST_UNIT_BYTES)


def _split_row_groups(files: Sequence[InputFile], size: int) -> Iterator[tuple[Span, int]]:
    """Spans of at most about size bytes, with their bytes, over all row groups in order."""
    for file in files:
        first_row = 0
        for number, (rows, group_bytes) in enumerate(zip(file.row_group_rows, file.row_group_bytes, strict=True)):
            pieces = max(1, min(rows, -(-group_bytes // size), MOST_PIECES))
            bounds = [rows * piece // pieces for piece in range(pieces + 1)]
            for start, stop in itertools.pairwise(bounds):
                if stop > start:
                    span = Span(file.path, file.url, number, first_row, start, stop)
                    yield span, group_bytes * (stop - start) // rows
            first_row += rows


def _limited(spans: Iterator[tuple[Span, int]], limit: int | None) -> Iterator[tuple[Span, int]]:
    left = limit
    for span, span_bytes in spans:
        if left is None:
            yield span, span_bytes
        elif left > 0:
            stop = min(span.stop, span.start + left)
            left -= stop - span.start
            yield Span(span.path, span.url, span.row_group, span.first_row, span.start, stop), span_bytes


def _is_data(name: str, root: str) -> bool:
    """Whether no part of a name below the root begins with `_` or `.`, as Spark and Hive mark what is no data."""
    below = name[len(root) :] if name.startswith(root) else posixpath.basename(name)
    return not any(part.startswith(("_", ".")) for part in below.split("/"))
