"""Read JSON Lines and CSV files, also compressed with gzip or zstd, with an error for each row that is not valid.

Python's own parsers are used, because they say of each row whether it is valid; a model is slower than they are. A file
is parsed once when a job starts: its rows are counted, and the types of its columns are inferred from all rows. If the
values of a column have no common type, it is a string column, and its other values are in it as JSON.

Imports none of torch, transformers and Ray.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import posixpath
import zlib
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import pyarrow as pa
from fsspec import AbstractFileSystem

from pipelines.storage.columns import type_at
from pipelines.storage.locations import WatchedFile
from pipelines.storage.text_types import CsvTypes, JsonTypes, column_of, known_type, texts_of

Format = Literal["parquet", "json", "csv", "tsv"]
SUFFIXES: dict[str, Format] = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv",
}  # fmt: skip
"""Formats by the end of a file's name. `.gz` or `.zst` may follow it."""
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
DELIMITERS = (",", "\t", ";", "|")
GROUP_BYTES = 32 * 2**20
"""Bytes after which a new group of rows begins in a JSON Lines file without compression. Groups are read apart."""
MOST_ROW_BYTES = 2**28
ROWS_AT_ONCE, BYTES_AT_ONCE = 4096, 4 * 2**20
"""Rows of a scan that are in memory at once, and about how many bytes of them."""


@dataclass(frozen=True)
class TextScan:
    """What a scan of a file has found."""

    schema: pa.Schema
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]
    group_starts: tuple[int, ...]
    """Offset of each group's first byte in the file."""


@dataclass(frozen=True)
class Row:
    """The values of a row by column, or why it is not valid."""

    values: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class TextRows:
    """Rows that were read."""

    table: pa.Table
    errors: list[str | None]
    """Why a row is not valid, or None. The columns of such a row are null."""
    values_lost: dict[str, int]
    """By column: values that are null because they do not fit the column's type."""


def format_of(name: str) -> Format | None:
    """Return the format of a JSON Lines or CSV file by its name, or None for any other name."""
    stem = name.lower().removesuffix(".gz").removesuffix(".zst")
    return SUFFIXES.get(posixpath.splitext(stem)[1])


def is_plain_json(name: str) -> bool:
    """Whether a file is named .json, as many files are that are no JSON Lines."""
    return name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".json")


def scan(filesystem: AbstractFileSystem, path: str, kind: Format, *, texts: Collection[str] = ()) -> TextScan:
    """Count the rows of a file, and find the types of its columns.

    Args:
        filesystem: Filesystem of the file.
        path: Path within it.
        kind: "json", "csv" or "tsv".
        texts: Columns of a CSV file that are texts, also where they look like numbers.

    Raises:
        ValueError: The file is not of this format.
        OSError: It cannot be read.
    """
    with closing(_opened(filesystem, path)) as file:
        source = _source(file, kind)
        learned: JsonTypes | CsvTypes = JsonTypes() if kind == "json" else CsvTypes(texts)
        learned.add([dict.fromkeys(source.names)])
        rows, sizes, starts = [0], [0], [source.position]
        first_error = ""
        is_valid = False
        for batch in _batches(source):
            for position, _ in batch:
                if sizes[-1] >= GROUP_BYTES and kind == "json" and not file.is_compressed:
                    starts.append(starts[-1] + sizes[-1])
                    rows.append(0)
                    sizes.append(0)
                rows[-1] += 1
                sizes[-1] = position - starts[-1]
            parsed = [source.parse(raw) for _, raw in batch]
            is_valid = is_valid or any(row.error is None for row in parsed)
            first_error = first_error or str(parsed[0].error)
            learned.add([row.values for row in parsed])
    if rows[-1] and not is_valid:
        raise ValueError(f"none of its {sum(rows):,} rows is valid; of the first, {first_error}")
    return TextScan(learned.schema(), tuple(rows), tuple(max(1, size) for size in sizes), tuple(starts))


def _batches(source: _Source) -> Iterator[list[tuple[int, Any]]]:
    """Yield the rows of a source, a limited number of rows and bytes at once."""
    batch: list[tuple[int, Any]] = []
    start = source.position
    for position, raw in source.raw_rows():
        batch.append((position, raw))
        if len(batch) >= ROWS_AT_ONCE or position - start >= BYTES_AT_ONCE:
            yield batch
            batch, start = [], position
    if batch:
        yield batch


def read_whole(filesystem: AbstractFileSystem, path: str, kind: Format, *, texts: Collection[str] = ()) -> TextRows:
    """Read all rows of a file. Parameters and errors are those of `scan`."""
    found = scan(filesystem, path, kind, texts=texts)
    schema = pa.schema([(column.name, known_type(column.type)) for column in found.schema])
    reader = TextReader(filesystem, schema, keep_bytes_of=texts)
    groups = [
        reader.read(path, kind, found.schema, (number, start), (0, rows))
        for number, (start, rows) in enumerate(zip(found.group_starts, found.group_rows, strict=True))
    ]
    reader.close()
    lost: dict[str, int] = {}
    for name, count in (item for group in groups for item in group.values_lost.items()):
        lost[name] = lost.get(name, 0) + count
    tables = [group.table.cast(schema) if len(schema) else group.table for group in groups]
    return TextRows(pa.concat_tables(tables), [error for group in groups for error in group.errors], lost)


class TextReader:
    """Reads ranges of rows. A range that follows the previous one is read on from there."""

    def __init__(
        self,
        filesystem: AbstractFileSystem,
        schema: pa.Schema,
        texts: Collection[str] = (),
        *,
        keep_bytes_of: Collection[str] = (),
    ) -> None:
        """Create a reader of columns with their types, of which `texts` must be strings in the file.

        Strings of other columns that are not valid Unicode are lost, except in `keep_bytes_of`.
        """
        self.filesystem, self._schema, self._texts = filesystem, schema, set(texts)
        self._raw = set(keep_bytes_of)
        self._key: tuple[str, int] | None = None
        self._file: _File | None = None
        self._source: _Source | None = None
        self._row = 0

    def read(
        self, path: str, kind: Format, schema: pa.Schema, group: tuple[int, int], rows: tuple[int, int]
    ) -> TextRows:
        """Read rows [start, stop) of a group.

        Args:
            path: Path of the file.
            kind: "json", "csv" or "tsv".
            schema: Schema of the file, as `scan` found it.
            group: Number of the group, and the offset of its first byte.
            rows: Start and stop.

        Raises:
            ValueError: The file is not of this format.
            OSError: It cannot be read.
        """
        start, stop = rows
        try:
            if self._key != (path, group[0]) or self._row > start:
                self.close()
                self._file = _opened(self.filesystem, path)
                self._source = _source(self._file, kind, group[1] if group[0] else 0)
                self._key, self._row = (path, group[0]), 0
            assert self._source is not None
            raw_rows = self._source.raw_rows()
            for _ in itertools.islice(raw_rows, start - self._row):
                pass
            found = [self._source.parse(raw) for _, raw in itertools.islice(raw_rows, stop - start)]
            self._row = start + len(found)
        except BaseException:
            self.close()
            raise
        return self._table(found, kind, schema)

    def is_open(self, path: str) -> bool:
        """Whether a file is open."""
        return self._key is not None and self._key[0] == path

    def close(self) -> None:
        """Close the open file."""
        if self._file is not None:
            with suppress(OSError):  # it was only read
                self._file.close()
        self._key, self._file, self._source = None, None, None

    def _table(self, rows: Sequence[Row], kind: Format, schema: pa.Schema) -> TextRows:
        errors = [row.error for row in rows]
        lost: dict[str, int] = {}
        columns: dict[str, pa.Array] = {}
        for column in self._schema:
            name, found = column.name, type_at(schema, column.name)
            if found is None:
                continue
            path = [name] if name in schema.names else name.split(".")
            values = [_value_at(row.values, path) for row in rows]
            if name in self._texts and not pa.types.is_list(found):
                columns[name] = texts_of(values, errors)
                continue
            wanted = found if name in self._texts else column.type
            columns[name], count = column_of(values, wanted, is_csv=kind != "json", keeps_bytes=name in self._raw)
            if count:
                lost[name] = count
        return TextRows(pa.table(columns) if columns else pa.table({"": [None] * len(rows)}), errors, lost)


class _Source(Protocol):
    """The rows of an open file."""

    names: Sequence[str]
    """Columns that are known before any row."""
    position: int
    """Number of bytes read."""

    def raw_rows(self) -> Iterator[tuple[int, Any]]:
        """Yield the position behind each row, and its content. A second call continues after the last row."""

    def parse(self, raw: Any) -> Row:
        """Return a row."""


class _File:
    """An open file without its compression."""

    def __init__(self, raw: Any, file: Any, *, is_compressed: bool) -> None:
        self._raw, self._file, self.is_compressed = raw, file, is_compressed

    def lines(self, start: int) -> Iterator[bytes]:
        """Yield the lines from an offset on, each with its line break.

        Raises:
            ValueError: The file is damaged, is not UTF-8, or has a line longer than MOST_ROW_BYTES.
        """
        if start:
            self._file.seek(start)
        number = 0
        while True:
            try:
                line = self._file.readline(MOST_ROW_BYTES + 1)
            except (EOFError, zlib.error, OSError) as error:
                if self._raw.failure is not None:
                    raise
                raise ValueError(f"its compression is damaged: {error}") from error
            if not line:
                return
            number += 1
            if len(line) > MOST_ROW_BYTES:
                raise ValueError(f"line {number} has more than {MOST_ROW_BYTES:,} bytes")
            if number == 1 and not start and line.startswith(UTF16_MARKS):
                raise ValueError("it is in UTF-16; convert it to UTF-8")
            yield line

    def close(self) -> None:
        """Close the file."""
        self._raw.close()


def _opened(filesystem: AbstractFileSystem, path: str) -> _File:
    raw = WatchedFile(filesystem, path)
    magic = raw.read(4)
    raw.seek(0)
    if magic.startswith(GZIP):
        return _File(raw, gzip.GzipFile(fileobj=raw, mode="rb"), is_compressed=True)
    if magic == ZSTD:
        stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        return _File(raw, io.BufferedReader(stream, 2**20), is_compressed=True)
    return _File(raw, io.BufferedReader(raw, 2**20), is_compressed=False)


def _source(file: _File, kind: Format, start: int = 0) -> _Source:
    return _JsonLines(file, start) if kind == "json" else _CsvRows(file, "\t" if kind == "tsv" else None)


class _JsonLines:
    """JSON Lines: an object in each line. Empty lines are no rows."""

    def __init__(self, file: _File, start: int) -> None:
        self.names: Sequence[str] = ()
        self.position = start
        self._lines = file.lines(start)

    def raw_rows(self) -> Iterator[tuple[int, bytes]]:
        """Yield the lines that are not empty."""
        for line in self._lines:
            row = line if self.position else line.removeprefix(UTF8_MARK)
            if not self.position and row.lstrip().startswith(b"["):
                raise ValueError("it is a JSON array; write one object in each line, for example with: jq -c '.[]'")
            self.position += len(line)
            if row.strip():
                yield self.position, row

    def parse(self, raw: bytes) -> Row:
        """Return the object in a line."""
        try:
            found = json.loads(raw.decode())
        except UnicodeDecodeError as error:
            return Row(error=f"the line is not valid UTF-8 (byte {error.start})")
        except json.JSONDecodeError as error:
            return Row(error=f"the line is not valid JSON ({error.msg} at character {error.pos})")
        except RecursionError:
            return Row(error="the line is not valid JSON (nested too deeply)")
        except ValueError:  # Python refuses integers of thousands of digits
            return Row(error="the line has a number with too many digits")
        if not isinstance(found, dict):
            return Row(error="the line is valid JSON, but not an object")
        try:
            "".join(found).encode()
        except UnicodeEncodeError:
            return Row(error="a name in the line is not valid Unicode")
        return Row(found)


class _CsvRows:
    """CSV with a header. Texts in quotes may contain line breaks. Empty lines are no rows.

    A line whose quotes are not those of CSV does not take the next lines with it: they are read again on their own. In
    tab-separated files, such quotes are characters like others. In CSV they may be escaped by backslashes, as by Spark.
    """

    def __init__(self, file: _File, delimiter: str | None) -> None:
        """Read the header. If delimiter is None, it is the one that the header has most often."""
        csv.field_size_limit(max(csv.field_size_limit(), MOST_ROW_BYTES))
        self.position = 0
        self._lines, self._again, self._of_row = file.lines(0), deque[bytes](), list[bytes]()
        self._number = 0
        first = next(self._lines, b"").removeprefix(UTF8_MARK)
        header = first.decode("utf-8", "surrogateescape")
        if "\r" in header.rstrip("\r\n"):
            raise ValueError("its lines end with CR alone; convert its line breaks to LF")
        self._delimiter = delimiter or max(DELIMITERS, key=lambda mark: header.count(mark))
        self._is_tsv = delimiter == "\t"
        self._again.append(first)
        self._reader = self._new_reader()
        try:
            names: list[str] = next(self._reader, [])
        except csv.Error as error:
            raise ValueError(f"its header is not valid CSV: {error}") from error
        self.names: Sequence[str] = [name or f"unnamed_{place}" for place, name in enumerate(names)]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"its header has several columns named {twice[0]!r}; rename them")

    def _new_reader(self) -> Any:
        return csv.reader(self._decoded(), delimiter=self._delimiter, strict=True)

    def _decoded(self) -> Iterator[str]:
        while (line := self._again.popleft() if self._again else next(self._lines, b"")) != b"":
            self.position += len(line)
            self._number += 1
            self._of_row.append(line)
            yield line.decode("utf-8", "surrogateescape")

    def raw_rows(self) -> Iterator[tuple[int, list[str] | str]]:
        """Yield the fields of each row, or why they cannot be read."""
        while True:
            self._of_row = []
            start = self._number + 1
            try:
                fields = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                is_endless = "end of data" in str(error) or "larger than" in str(error)
                if is_endless and not self._is_tsv:  # the rest of the file is in one field
                    raise ValueError(
                        f"a quote that opens in line {start} is never closed ({error}); close it, double quotes inside "
                        f"of texts, or convert the file to Parquet"
                    ) from error
                problem = f"the row is not valid CSV ({error})"
                found = self._with_backslashes(self._of_row) or self._first_line_alone(problem)
            else:
                is_merged = self._is_tsv and len(self._of_row) > 1 and all(map(self._has_all_fields, self._of_row))
                found = self._first_line_alone("") if is_merged else fields
            if found:
                yield self.position, found

    def _has_all_fields(self, line: bytes) -> bool:
        return line.count(b"\t") == len(self.names) - 1

    def _first_line_alone(self, problem: str) -> list[str] | str:
        """Return the fields of the first line of the row that was read, or the problem. Its other lines come again."""
        first, *others = self._of_row
        self._again.extendleft(reversed(others))
        self.position -= sum(map(len, others))
        self._number -= len(others)
        self._reader = self._new_reader()
        if not self._is_tsv:
            return self._with_backslashes([first]) or problem
        fields = first.decode("utf-8", "surrogateescape").rstrip("\r\n").split("\t")
        return fields if len(fields) == len(self.names) else problem or fields

    def _with_backslashes(self, lines: Sequence[bytes]) -> list[str]:
        """Return the fields of one row whose quotes are escaped by backslashes. Empty if it is not such a row."""
        if self._is_tsv or not any(b'\\"' in line for line in lines):
            return []
        texts = [line.decode("utf-8", "surrogateescape") for line in lines]
        try:
            (fields,) = csv.reader(texts, delimiter=self._delimiter, escapechar="\\", doublequote=False, strict=True)
        except (csv.Error, ValueError):
            return []
        return fields if len(fields) == len(self.names) else []

    def parse(self, raw: list[str] | str) -> Row:
        """Return the fields by the names of the header."""
        if isinstance(raw, str):
            return Row(error=raw)
        if len(raw) != len(self.names):
            counts = f"{len(raw)}, not {len(self.names)}"
            return Row(error=f"the row has another number of fields than the header ({counts})")
        return Row(dict(zip(self.names, raw, strict=True)))


def _value_at(values: Mapping[str, Any], path: Sequence[str]) -> Any:
    """Return a value, or one inside objects (`meta.text`)."""
    found: Any = values
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
