"""The stage that scoring and training share: work units in, tokenized tables out.

Imports neither torch nor Ray, so that a task that only tokenizes starts quickly. `TokenizedUnit.to_row` puts a whole
unit into one row of an Arrow table, in which it travels between processes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.errors import JobError
from pipelines.model_files import is_hub_name, local_folder
from pipelines.storage.columns import SOURCE_COLUMNS
from pipelines.storage.filters import kept_rows, parse_filter
from pipelines.storage.rows import Rows, read_units
from pipelines.storage.shards import WorkUnit
from pipelines.text.attempts import Attempts, NoAttempts
from pipelines.text.pretrained import load_tokenizer
from pipelines.text.tokenization import Documents, Tokenizer, Tokens, concat_documents

UNIT, NAME, TABLE = "unit", "name", "table"
"""Columns of `TokenizedUnit.to_row`: the unit's number, its output name, and its table in Arrow's stream format."""
IDS, PAIR_IDS, ERROR = "__pipelines_ids__", "__pipelines_pair_ids__", "__pipelines_error__"
"""Columns of a tokenized table: token ids, token ids of the second text, and why a row cannot be scored."""
STATS_METADATA = b"pipelines.stats"
"""Key in a tokenized table's schema metadata. The value is its `TokenizeStats`, as JSON."""


@dataclass(frozen=True)
class TokenizeStats:
    """Row counts and times of reading and tokenizing one unit."""

    rows_in: int
    rows_filtered: int
    """Number of rows that did not pass the filter."""
    read_seconds: float
    tokenize_seconds: float
    values_lost: Mapping[str, int] = field(default_factory=dict)
    """By column: values that are null because they do not fit the column's type, or could not be read."""

    @classmethod
    def of(cls, table: pa.Table) -> TokenizeStats:
        """Read the statistics from the metadata of a tokenized table."""
        return cls(**json.loads(table.schema.metadata[STATS_METADATA]))


@dataclass(frozen=True)
class TokenizedUnit:
    """A work unit's tokenized table, with its number and the name of its output file."""

    number: int
    output_name: str
    table: pa.Table

    def to_row(self) -> pa.Table:
        """Return a table with one row, which contains the whole unit."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.table.schema) as stream:
            stream.write_table(self.table)
        content = sink.getvalue()
        offsets = pa.array([0, content.size], pa.int64())
        column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets.buffers()[1], content])
        return pa.table({UNIT: pa.array([self.number], pa.int32()), NAME: [self.output_name], TABLE: column})

    @classmethod
    def from_rows(cls, rows: pa.Table) -> Iterator[TokenizedUnit]:
        """Yield the units of a table of rows from `to_row`. The data is not copied."""
        for number, name, content in zip(rows.column(UNIT), rows.column(NAME), rows.column(TABLE), strict=True):
            with pa.ipc.open_stream(content.as_buffer()) as stream:
                yield cls(number.as_py(), name.as_py(), stream.read_all())


@dataclass(frozen=True)
class TokenizeStage:
    """Reads and tokenizes work units; it is sent to every read task."""

    location: str
    text_columns: tuple[str, ...]
    """The text column, or the two text columns of pairs."""
    schema: pa.Schema
    """Schema of all columns to read."""
    tokenizer_folder: str
    keep: tuple[str, ...] = ()
    """Columns to copy to the result."""
    prefix: str = ""
    """Prefix for the names of the source columns."""
    lead_space: bool = False
    """Put a space before each text (`windows.leads_with_space`)."""
    most_tokens: int | None = None
    """Tokens of a very long text after which reading stops (`windows.most_tokens_of`)."""
    filter: str | None = None
    """Expression of `storage.filters`. Rows that do not pass are omitted and counted."""

    def __call__(self, units: Iterable[WorkUnit], attempts: Attempts | None = None) -> Iterator[pa.Table]:
        """Yield the table of each unit: kept columns, source columns, then IDS, PAIR_IDS (pairs only), ERROR.

        Args:
            units: Units to read and tokenize.
            attempts: Records which rows are being worked on. Rows that killed their process get an error.
        """
        compared = parse_filter(self.filter)[1] if self.filter else []
        guard = attempts or NoAttempts()
        units, read_ahead = itertools.tee(units)
        found = read_units(
            self.location,
            _begun(read_ahead, guard),
            self.schema,
            text_columns=self.text_columns,
            filter_columns=compared,
            prefix=self.prefix,
        )
        for unit, rows in zip(units, found, strict=True):
            guard.end(_reading(unit))
            yield self._tokenize(rows, unit.number, guard)

    def _tokenize(self, rows: Rows, number: int, attempts: Attempts) -> pa.Table:
        started = time.perf_counter()
        table, errors = self._filtered(rows)
        documents = self._documents(table, number, attempts)
        result = table.select([*self.keep, *(self.prefix + name for name in SOURCE_COLUMNS)])
        result = result.append_column(IDS, documents.tokens.to_arrow())
        if documents.pair_tokens is not None:
            result = result.append_column(PAIR_IDS, documents.pair_tokens.to_arrow())
        reasons = [unread or bad for unread, bad in zip(errors, documents.errors, strict=True)]
        result = result.append_column(ERROR, pa.array(reasons, pa.string()))
        seconds = time.perf_counter() - started
        stats = TokenizeStats(len(rows.table), len(rows.table) - len(table), rows.seconds, seconds, rows.values_lost)
        return result.replace_schema_metadata({STATS_METADATA: json.dumps(dataclasses.asdict(stats))})

    def _documents(self, table: pa.Table, number: int, attempts: Attempts) -> Documents:
        """Tokenize the rows of a unit, without those that killed their process before."""
        rows = attempts.begin(number, len(table))
        parts: dict[int, Documents] = {}
        for place, (start, stop) in enumerate(rows.ranges):
            if place:
                attempts.begin_range(number, (start, stop))
            parts[start] = self._tokenizer().documents(table.slice(start, stop - start), *self.text_columns)
        attempts.end(number)
        for row in rows.deadly:
            nothing = Tokens(np.zeros(0, np.int32), np.zeros(2, np.int64))
            error = "the process died several times while it tokenized this row"
            parts[row] = Documents(nothing, nothing if len(self.text_columns) > 1 else None, [error])
        return concat_documents([parts[start] for start in sorted(parts)])

    def _tokenizer(self) -> Tokenizer:
        """Return the tokenizer. It is loaded once per process, and again if its files change."""
        folder = _local(self.tokenizer_folder)
        changed = max(file.stat().st_mtime_ns for file in folder.iterdir() if file.is_file())
        return _loaded(folder, changed, self.lead_space).with_most_tokens(self.most_tokens)

    def _filtered(self, rows: Rows) -> tuple[pa.Table, list[str | None]]:
        """Return the rows that pass the filter, and their errors. Rows that could not be read are kept."""
        if self.filter is None:
            return rows.table, rows.errors
        passed = kept_rows(rows.table, self.filter).to_pylist()
        kept = [number for number, ok in enumerate(passed) if ok or rows.errors[number] is not None]
        return rows.table.take(pa.array(kept, pa.int64())), [rows.errors[number] for number in kept]


def _begun(units: Iterable[WorkUnit], attempts: Attempts) -> Iterator[WorkUnit]:
    """Yield the units. Each is recorded when it is about to be read.

    Raises:
        JobError: The process died each time it read the unit.
    """
    for unit in units:
        if attempts.begin(_reading(unit), 1).deadly:
            names = ", ".join(dict.fromkeys(span.file.url for span in unit.spans))
            raise JobError(
                f"the process died several times while it read rows of {names}; leave the file out of the input, or "
                f"write it anew"
            )
        yield unit


def _reading(unit: WorkUnit) -> int:
    """Return the number under which the reading of a unit is recorded."""
    return -1 - unit.number


def documents_of(table: pa.Table) -> Documents:
    """Return the documents of a tokenized table."""
    pair = Tokens.from_arrow(table.column(PAIR_IDS)) if PAIR_IDS in table.column_names else None
    return Documents(Tokens.from_arrow(table.column(IDS)), pair, table.column(ERROR).to_pylist())


def _local(location: str) -> Path:
    """Return the local path of a model folder. The Hub is asked once per process, and not for every unit."""
    return _of_hub(location) if is_hub_name(location) else local_folder(location)


_of_hub = cache(local_folder)


@cache
def _loaded(folder: Path, _changed: int, lead_space: bool) -> Tokenizer:
    return load_tokenizer(folder, lead_space=lead_space)
