"""The stage that score and train share: work units in, token ids out.

A custom Ray Data source, because that is the extension point at which it is ours what a task reads. A unit travels
as one row that holds its table, so that Ray Data can neither split it nor join it with another; a task reads units of
the same row group one after another, so that it is decoded once.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset, Datasource, ReadTask
from ray.data.block import Block, BlockMetadata

from pipelines.filters import kept_rows, parse_filter
from pipelines.model_folder import TOKENIZER_FILES, local_folder
from pipelines.pretrained import load_tokenizer
from pipelines.reading import Rows, read_units
from pipelines.shards import WorkUnit
from pipelines.tables import SOURCE_COLUMNS
from pipelines.tokenization import Documents, Tokenizer, Tokens

UNIT, NAME, TABLE = "unit", "name", "table"
"""Columns of a block between the stages: a unit's number, its output's name, its tokenized table in Arrow's format."""
IDS, PAIR_IDS, ERROR = "__ids", "__pair_ids", "__error"
"""Columns of a tokenized table beside those carried along: ids, those of the second text, why a row is bad."""
STATS = b"pipelines.stats"
"""Key of a tokenized table's metadata: rows_in, rows_filtered, and seconds of reading and tokenizing."""
TOKENIZE_CPUS = 1.0
TASKS_PER_ROW_GROUP = 8


@dataclass(frozen=True)
class TokenizeStage:
    """What a read task needs to know."""

    location: str
    text_columns: tuple[str, ...]
    """The text column, or the two of a pair."""
    schema: pa.Schema
    """Every column to read."""
    tokenizer_folder: str
    keep: tuple[str, ...] = ()
    """Columns to carry along."""
    prefix: str = ""
    """Of the names of the source columns."""
    lead_space: bool = False
    """Whether a space goes before each text (`windows.leads_with_space`)."""
    filter: str | None = None
    """Rows that pass; the others are left out and counted."""

    def __call__(self, units: Iterable[WorkUnit]) -> Iterator[pa.Table]:
        """Each unit's rows in order: kept and source columns, then IDS, PAIR_IDS (pairs only), ERROR."""
        found = read_units(self.location, units, self.schema, text_columns=self.text_columns, prefix=self.prefix)
        for rows in found:
            yield self._tokenize(rows)

    def _tokenize(self, rows: Rows) -> pa.Table:
        started = time.perf_counter()
        table, errors = self._filtered(rows)
        documents = _tokenizer(self.tokenizer_folder, self.lead_space).documents(table, *self.text_columns)
        result = table.select([*self.keep, *(self.prefix + name for name in SOURCE_COLUMNS)])
        result = result.append_column(IDS, documents.tokens.to_arrow())
        if documents.pair_tokens is not None:
            result = result.append_column(PAIR_IDS, documents.pair_tokens.to_arrow())
        reasons = [unread or bad for unread, bad in zip(errors, documents.errors, strict=True)]
        result = result.append_column(ERROR, pa.array(reasons, pa.string()))
        seconds = {"read": rows.seconds, "tokenize": time.perf_counter() - started}
        stats = {"rows_in": len(rows.table), "rows_filtered": len(rows.table) - len(table), "seconds": seconds}
        return result.replace_schema_metadata({STATS: json.dumps(stats)})

    def _filtered(self, rows: Rows) -> tuple[pa.Table, list[str | None]]:
        """Rows that pass the filter; those that could not be read stay, to be accounted for."""
        if self.filter is None:
            return rows.table, rows.errors
        passed = kept_rows(rows.table, parse_filter(self.filter)[0]).to_pylist()
        kept = [number for number, ok in enumerate(passed) if ok or rows.errors[number] is not None]
        return rows.table.take(pa.array(kept, pa.int64())), [rows.errors[number] for number in kept]


class UnitDatasource(Datasource):
    """Read tasks over work units."""

    def __init__(self, stage: TokenizeStage, tasks: Sequence[Sequence[WorkUnit]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stage, self._tasks = stage, tasks

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before tokenizing."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """All tasks, whatever parallelism Ray would like."""
        return [_read_task(self._stage, units) for units in self._tasks]


def tokenized(stage: TokenizeStage, units: Iterable[WorkUnit], **ray_remote_args: Any) -> Dataset:
    """A dataset with one row and block per unit. Sets this process's Ray Data context so that blocks stay so."""
    context = DataContext.get_current()
    context.target_max_block_size = 1  # every row is a block of its own
    context.enable_progress_bars = False
    tasks = group_units(units)
    options = {"num_cpus": TOKENIZE_CPUS, **ray_remote_args}
    dataset: Dataset = ray.data.read_datasource(UnitDatasource(stage, tasks), override_num_blocks=len(tasks), **options)
    return dataset


def group_units(units: Iterable[WorkUnit]) -> list[list[WorkUnit]]:
    """Units of one row group in up to TASKS_PER_ROW_GROUP runs, every other unit alone; in order."""
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


def unpack(block: pa.Table) -> Iterator[tuple[int, str, pa.Table]]:
    """Number, output name and tokenized table of each unit in a block; nothing is copied."""
    for number, name, content in zip(block.column(UNIT), block.column(NAME), block.column(TABLE), strict=True):
        with pa.ipc.open_stream(content.as_buffer()) as stream:
            yield number.as_py(), name.as_py(), stream.read_all()


def documents_of(table: pa.Table) -> Documents:
    """The documents of a tokenized table."""
    pair = Tokens.from_arrow(table.column(PAIR_IDS)) if PAIR_IDS in table.column_names else None
    return Documents(Tokens.from_arrow(table.column(IDS)), pair, table.column(ERROR).to_pylist())


def stats_of(table: pa.Table) -> dict[str, Any]:
    """What reading and tokenizing say of a tokenized table."""
    return dict(json.loads(table.schema.metadata[STATS]))


def packed(unit: WorkUnit, table: pa.Table) -> pa.Table:
    """One row that holds a unit's table."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content = sink.getvalue()
    offsets = pa.array([0, content.size], pa.int64())
    column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets.buffers()[1], content])
    return pa.table({UNIT: pa.array([unit.number], pa.int32()), NAME: [unit.output_name], TABLE: column})


def _read_task(stage: TokenizeStage, units: Sequence[WorkUnit]) -> ReadTask:
    def read() -> Iterable[Block]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there are as many of these processes as cores
        for unit, table in zip(units, stage(units), strict=True):
            yield packed(unit, table)

    metadata = BlockMetadata(num_rows=len(units), size_bytes=None, exec_stats=None, input_files=None)
    return ReadTask(read, metadata)


def _begin(unit: WorkUnit) -> tuple[str, int]:
    return unit.spans[0].file.path, unit.spans[0].row_group


def _end(unit: WorkUnit) -> tuple[str, int]:
    return unit.spans[-1].file.path, unit.spans[-1].row_group


def _tokenizer(location: str, lead_space: bool) -> Tokenizer:
    """Of a model folder at a path or URL, loaded once per worker process and again when it changes."""
    folder = local_folder(location)
    changed = max(file.stat().st_mtime_ns for file in folder.iterdir() if file.name in TOKENIZER_FILES)
    return _loaded(folder, changed, lead_space)


@cache
def _loaded(folder: Path, _changed: int, lead_space: bool) -> Tokenizer:
    return load_tokenizer(folder, lead_space=lead_space)
