"""Read the rows of work units from Parquet, JSON Lines and CSV files.

Every row of a unit is returned: a row that cannot be read is null and has an error that says why. Row groups are
decoded batch by batch, so that a row group of several gigabytes needs only the memory of its batches.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from pipelines.errors import DataError, first_line
from pipelines.storage.columns import SOURCE_COLUMNS, as_strings, text_column_problem, type_at, with_fields
from pipelines.storage.footers import INT96_UNIT, check_unchanged, no_memory, store_failed
from pipelines.storage.locations import ICEBERG, WatchedFile, filesystem_of, retried
from pipelines.storage.shards import InputFile, Span, WorkUnit
from pipelines.storage.text_files import TextReader, TextRows
from pipelines.storage.text_types import known_type

BATCH_ROWS, BATCH_BYTES = 4096, 16 * 2**20
"""Maximum number of rows that are decoded at once, and of their bytes in the file, without compression."""


@dataclass(frozen=True)
class Rows:
    """The rows of one unit, in order."""

    table: pa.Table
    """The requested columns, then source_file and source_row (int64). The prefix is added to these two names."""
    errors: list[str | None]
    """Why a row could not be read, or None. The requested columns of a row with an error are null."""
    seconds: float
    """Time that reading took, in seconds."""
    values_lost: Mapping[str, int] = field(default_factory=dict)
    """By column: values that are null because they do not fit the column's type, or could not be read."""


def read_tables(
    location: str,
    units: Iterable[WorkUnit],
    schema: pa.Schema,
    *,
    text_columns: Sequence[str] = (),
    prefix: str = "",
) -> Iterator[pa.Table]:
    """Yield the rows of each unit, as `read_units` does, but raise an error for a row or value that cannot be read.

    Raises:
        DataError: A row cannot be read. The message names the file and the row.
    """
    units, read_ahead = itertools.tee(units)
    found = read_units(location, read_ahead, schema, text_columns=text_columns, prefix=prefix)
    for unit, rows in zip(units, found, strict=True):
        bad = next(((row, error) for row, error in enumerate(rows.errors) if error is not None), None)
        if bad is not None:
            file, number = (rows.table.column(prefix + name)[bad[0]].as_py() for name in SOURCE_COLUMNS)
            raise DataError(f"{file}, row {number}: {bad[1]}")
        for name, count in rows.values_lost.items():
            raise DataError(
                f"{count} values of column {name!r} of {unit.spans[0].file.url} cannot be read or converted"
            )
        yield rows.table


def read_units(
    location: str,
    units: Iterable[WorkUnit],
    schema: pa.Schema,
    *,
    text_columns: Sequence[str] = (),
    filter_columns: Sequence[str] = (),
    prefix: str = "",
) -> Iterator[Rows]:
    """Read units one after another. Consecutive spans of the same row group are decoded once.

    Every row of a unit is returned. If a row group cannot be read, or a file lacks a text column, its rows are null and
    have an error. The columns are cast to the schema. Another column never costs a row its text: values of it that do
    not fit the schema, or cannot be read, are null and counted.

    Args:
        location: Location of the input.
        units: Units to read.
        schema: Names and types of the columns to read.
        text_columns: Columns that every file must have as string columns.
        filter_columns: Columns that the filter compares. If one of their values is lost, the rows of its row group have
            an error.
        prefix: Prefix for the names of the source columns.

    Yields:
        The rows of each unit.
    """
    units = iter(units)
    first = next(units, None)
    if first is None:
        return
    is_in_catalog = location.startswith(ICEBERG)  # then the files name their own place
    filesystem, _ = filesystem_of(first.spans[0].file.url if is_in_catalog else location)
    readers = _Readers(_GroupReader(filesystem, schema.names), TextReader(filesystem, schema, text_columns))
    for unit in itertools.chain([first], units):
        started = time.perf_counter()
        tables: list[pa.Table] = []
        errors: list[str | None] = []
        lost: dict[str, int] = {}
        for span in unit.spans:
            table, reasons = _read_span(readers, span, schema, (text_columns, filter_columns), lost)
            row = span.first_row + span.start
            columns = (pa.array([span.file.url] * len(table), pa.string()), pa.array(range(row, row + len(table))))
            for name, column in zip(SOURCE_COLUMNS, columns, strict=True):
                table = table.append_column(prefix + name, column)
            tables.append(table)
            errors += reasons
        yield Rows(pa.concat_tables(tables).combine_chunks(), errors, time.perf_counter() - started, lost)


def together(
    files: Sequence[InputFile],
    names: Sequence[str] | None = None,
    *,
    remedy: str = "convert it to one type in all files",
) -> pa.Schema:
    """Return one schema for the columns and Hive partitions of all files.

    Dictionary types become their value types. Partition values are integers or dates if all of them are, else strings.

    Args:
        files: Files to combine. Files without a schema are skipped, and those without rows if others have rows.
        names: Columns to include, in this order. None includes all columns, in order of first appearance.
        remedy: What the caller can do if types do not fit, for the error message.

    Raises:
        DataError: The types of a column in different files cannot be unified.
    """
    found = pa.schema([])
    wanted = None if names is None else set(names)
    files = [file for file in files if file.num_rows] or files
    types = _partition_types(files)
    before: Any = None
    for file in files:
        if file.schema is None or before == (file.schema, file.partitions.keys()):
            continue
        before = (file.schema, file.partitions.keys())
        own = [plain_field(column) for column in file.schema if wanted is None or column.name in wanted]
        here = {column.name for column in own}
        nested = [(name, type_at(file.schema, name)) for name in names or () if name not in here]
        own += [plain_field(pa.field(name, kind)) for name, kind in nested if kind is not None]
        keys = [key for key in file.partitions if key not in here and (wanted is None or key in wanted)]
        own += [pa.field(key, types[key]) for key in keys]
        try:
            found = _unified(found, pa.schema(own), is_inferred=file.format != "parquet")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"a column of {file.url} does not fit that of the previous files: {error}; {remedy}"
            ) from error
    if any(file.format != "parquet" for file in files):
        found = pa.schema([(column.name, known_type(column.type)) for column in found])
    if names is None:
        return found
    by_name = {column.name: column for column in found}
    return pa.schema([by_name[name] for name in names if name in by_name])


def _unified(before: pa.Schema, own: pa.Schema, *, is_inferred: bool) -> pa.Schema:
    """Return one schema for both. A column whose types were inferred and do not fit becomes a string column."""
    try:
        return pa.unify_schemas([before, own], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        if not is_inferred:
            raise
    for name in set(before.names) & set(own.names):
        one, other = before.field(name), own.field(name)
        try:
            pa.unify_schemas([pa.schema([one]), pa.schema([other])], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            before = before.set(before.get_field_index(name), pa.field(name, pa.string()))
            own = own.set(own.get_field_index(name), pa.field(name, pa.string()))
    return pa.unify_schemas([before, own], promote_options="permissive")


def _partition_types(files: Sequence[InputFile]) -> dict[str, pa.DataType]:
    """Return the type of each Hive partition: that of all its values."""
    values: dict[str, set[str]] = {}
    for file in files:
        for key, value in file.partitions.items():
            values.setdefault(key, set()).update([] if value is None else [value])
    defined = {column.name: column.type for file in files for column in file.partition_schema or ()}
    return {key: defined.get(key) or _type_of(texts) for key, texts in values.items()}


def _type_of(texts: Collection[str]) -> pa.DataType:
    for pattern, kind in ((r"-?\d{1,18}", pa.int64()), (r"\d{4}-\d\d-\d\d", pa.date32())):
        if texts and all(re.fullmatch(pattern, text) for text in texts):
            try:
                pa.array(list(texts), pa.string()).cast(kind)
            except pa.ArrowInvalid:  # the 31st of February
                continue
            return kind
    return pa.string()


def plain_field(column: pa.Field) -> pa.Field:
    """Return a field with its output type: the value type for a dictionary, large_string for a string view."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string_view(kind):
        kind = pa.large_string()
    return pa.field(column.name, kind)


def _read_span(
    readers: _Readers, span: Span, schema: pa.Schema, needed: tuple[Sequence[str], Sequence[str]], lost: dict[str, int]
) -> tuple[pa.Table, list[str | None]]:
    """Return exactly the span's rows in the schema, and the error of each row. Rows with an error are null.

    A filesystem that fails is an error of the job, and not of the rows. `lost` counts the lost values of columns other
    than the texts.
    """
    assert span.file.schema is not None
    text_columns, filter_columns = needed
    for name in text_columns:
        problem = text_column_problem(span.file.schema, name)
        if problem is not None:
            return _nothing(span, schema), [f"{span.file.url} {problem}"] * span.num_rows
    read = _read_parquet if span.file.format == "parquet" else _read_text
    lost_here: dict[str, int] = {}
    try:
        table, errors = read(readers, span, schema, text_columns, lost_here)
        unknown = next((name for name in filter_columns if name in lost_here), None)
        if unknown is not None:
            raise ValueError(f"{lost_here[unknown]} values of {unknown}, which the filter compares, are lost")
    except OSError as error:
        raise store_failed(span.file.url, error) from error
    except MemoryError as error:  # pyarrow's is an ArrowException too
        raise no_memory(f"to read row group {span.row_group} of {span.file.url}") from error
    except (pa.ArrowException, ValueError) as error:
        reason = f"row group {span.row_group} of {span.file.url} cannot be read: {first_line(error)}"
        return _nothing(span, schema), [reason] * span.num_rows
    for name, count in lost_here.items():
        lost[name] = lost.get(name, 0) + count
    return table, errors


def _read_parquet(
    readers: _Readers, span: Span, schema: pa.Schema, text_columns: Sequence[str], lost: dict[str, int]
) -> tuple[pa.Table, list[str | None]]:
    """Read a span of a Parquet file. If its columns cannot be read together, the texts are read alone."""
    reader = readers.groups
    try:
        table = _fitted(retried(lambda: reader.read(span)), span, schema, lost)
    except MemoryError:
        raise
    except (pa.ArrowException, ValueError) as error:
        reader.close()
        lost.clear()
        try:
            table = _fitted(_read_apart(reader, span, text_columns), span, schema, lost)
        except MemoryError:
            raise
        except (pa.ArrowException, ValueError):
            raise error from None
    return table, [None] * span.num_rows


def _read_text(
    readers: _Readers, span: Span, schema: pa.Schema, _: Sequence[str], lost: dict[str, int]
) -> tuple[pa.Table, list[str | None]]:
    """Read a span of a JSON Lines or CSV file."""
    file, reader = span.file, readers.texts
    group = (span.row_group, file.group_starts[span.row_group])

    def read() -> TextRows:
        if not reader.is_open(file.path):
            check_unchanged(reader.filesystem, file)
        return reader.read(file.path, file.format, file.schema, group, (span.start, span.stop))

    found = retried(read)
    lost.update(found.values_lost)
    return _fitted(found.table, span, schema, lost), found.errors


def _read_apart(reader: _GroupReader, span: Span, text_columns: Sequence[str]) -> pa.Table:
    """Read the texts, and add every other column that can be read. Raises the error of a text column."""
    if not text_columns:
        raise ValueError("there is no text column to read alone")
    table = reader.of(text_columns).read(span).select(list(text_columns))
    for name in reader.names:
        if name not in text_columns:
            try:
                other = reader.of([name]).read(span)
            except MemoryError:
                raise
            except (pa.ArrowException, ValueError):  # its values are lost, and counted
                continue
            if len(other) == len(table) and other.column_names == [name]:
                table = table.append_column(name, other.column(0))
    return table


def _fitted(table: pa.Table, span: Span, schema: pa.Schema, lost: dict[str, int]) -> pa.Table:
    if len(table) != span.num_rows:
        raise ValueError(f"it has {len(table)} rows from row {span.start} on, but its footer says {span.num_rows}")
    columns = []
    own = set(span.file.schema.names)  # type: ignore[union-attr]
    read = enumerate(table.column_names)  # a table may have dropped a column that is in its file
    places = {name: place for place, name in read if type_at(span.file.schema, name) is not None}
    for column in schema:
        if column.name in places:
            values, count = cast_values(table.column(places[column.name]), column.type)
        elif column.name in span.file.partitions and column.name not in own:
            value = pa.scalar(span.file.partitions[column.name], pa.string())
            values, count = pa.repeat(value, len(table)).cast(column.type), 0
        else:  # the file does not have the column, or could not be read with it
            values, count = pa.nulls(len(table), column.type), len(table) if column.name in own else 0
        columns.append(values)
        if count:
            lost[column.name] = lost.get(column.name, 0) + count
    return pa.table(columns, schema=schema)


def cast_values(column: pa.ChunkedArray, kind: pa.DataType) -> tuple[pa.ChunkedArray, int]:
    """Convert a column to a type. Return it, and the number of values that do not fit the type and are null."""
    if column.type == kind:
        return column, 0
    if pa.types.is_large_string(kind):  # a text column, whose invalid bytes become errors of the row later
        column = as_strings(column)
    try:
        return _cast(column, kind), 0
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    try:
        found, fits = _cast_numbers(column, kind)
        found = pc.if_else(fits, found, pa.scalar(None, kind))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # no numbers: value by value
        found = pa.chunked_array([_cast_value(column.slice(row, 1), kind) for row in range(len(column))], kind)
    return found, found.null_count - column.null_count


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Cast as Arrow does, but integers to decimals by their values: Arrow asks for all digits of the integer type."""
    if pa.types.is_decimal(kind) and pa.types.is_integer(column.type):
        return column.cast(pa.decimal256(76, kind.scale)).cast(kind)
    return column.cast(kind)


def _cast_numbers(column: pa.ChunkedArray, kind: pa.DataType) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Return the values in another type, and which of them keep their value: they come back, and keep their sign."""
    found = column.cast(kind, safe=False)
    fits = pc.equal(found.cast(column.type, safe=False), column)
    if pa.types.is_integer(kind) and pa.types.is_integer(column.type):  # the sign of an unsigned integer may appear
        fits = pc.and_(fits, pc.equal(pc.less(found, 0), pc.less(column, 0)))
    return found, pc.fill_null(fits, False)


def _cast_value(value: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """Return one value in another type, or null if it does not fit."""
    try:
        return _cast(value, kind).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(1, kind)


def _nothing(span: Span, schema: pa.Schema) -> pa.Table:
    return pa.table([pa.nulls(span.num_rows, column.type) for column in schema], schema=schema)


@dataclass(frozen=True)
class _Readers:
    """What reads the files of each format."""

    groups: _GroupReader
    texts: TextReader


class _GroupReader:
    """Reads spans of an open file. Spans that follow each other in one row group are decoded once.

    The file stays open, and its footer is read once, until a span of another file is read.
    """

    def __init__(self, filesystem: AbstractFileSystem, names: Sequence[str]) -> None:
        self._filesystem, self.names = filesystem, names
        self._key: tuple[str, int] | None = None
        self._path: str | None = None
        self._file: WatchedFile | None = None
        self._parquet: Any = None
        self._columns: list[str] = []
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._row = 0
        self._rest: pa.Table | None = None

    def of(self, names: Sequence[str]) -> _GroupReader:
        """Return a new reader of other columns."""
        return _GroupReader(self._filesystem, names)

    def read(self, span: Span) -> pa.Table:
        """Return the span's rows, or fewer if the row group ends early.

        Raises:
            OSError: The filesystem failed.
            ValueError: The content is damaged.
            pyarrow.ArrowException: The same.
            JobError: The file has changed since the job began.
        """
        try:
            if self._key != (span.file.path, span.row_group) or self._row > span.start:
                self._open(span)
            self._advance(span.start)
            return with_fields(self._take(span.num_rows), self.names)
        except Exception as error:
            is_damaged = self._file is not None and self._file.failure is None
            self.close()
            if is_damaged and isinstance(error, OSError):
                raise ValueError(first_line(error)) from error
            raise

    def close(self) -> None:
        """Close the open file."""
        self._key, self._batches, self._rest = None, iter(()), None
        self._path = self._parquet = None
        if self._file is not None:
            with suppress(OSError):  # it was only read
                self._file.close()
            self._file = None

    def _open(self, span: Span) -> None:
        if self._path != span.file.path:
            self.close()
            check_unchanged(self._filesystem, span.file)
            self._file = WatchedFile(self._filesystem, span.file.path)
            self._parquet = pq.ParquetFile(self._file, buffer_size=2**20, coerce_int96_timestamp_unit=INT96_UNIT)
            self._path = span.file.path
            found = [name for name in self.names if type_at(span.file.schema, name) is not None]
            self._columns = found or self._parquet.schema_arrow.names[:1]  # at least one, to count rows
        row_bytes = span.file.row_group_bytes[span.row_group] / max(span.file.row_group_rows[span.row_group], 1)
        num_rows = int(min(max(BATCH_BYTES / max(row_bytes, 1), 1), BATCH_ROWS))
        self._batches = iter(
            self._parquet.iter_batches(num_rows, row_groups=[span.row_group], columns=self._columns, use_threads=False)
        )
        self._key, self._row, self._rest = (span.file.path, span.row_group), 0, None

    def _advance(self, row: int) -> None:
        while self._row < row:
            if not len(self._take(min(row - self._row, BATCH_ROWS))):
                return

    def _take(self, count: int) -> pa.Table:
        """Return the next rows of the row group, at most count."""
        tables = [] if self._rest is None else [self._rest]
        have = sum(map(len, tables))
        while have < count:
            batch = next(self._batches, None)
            if batch is None:
                break
            tables.append(pa.Table.from_batches([batch]))
            have += len(batch)
        if not tables:
            return pa.table({})
        table = pa.concat_tables(tables)
        self._rest = table.slice(count) if len(table) > count else None
        self._row += min(count, len(table))
        return table.slice(0, count)
