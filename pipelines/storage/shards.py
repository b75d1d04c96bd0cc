"""Input files, and how their rows are split into work units.

A work unit is an ordered list of row ranges of row groups, from one or more files. Its output is one file, whose name
depends only on the unit. `WorkUnits` stores the units as numbers, so that hundreds of thousands need little memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.storage.text_files import Format

MOST_UNIT_ROWS = 200_000
"""Maximum number of rows of a unit, whatever a footer claims about their size."""
SMALLEST_UNIT_BYTES = 64 * 2**10
USUAL_UNIT_BYTES = 64 * 2**20
USUAL_NUM_UNITS = 2_000
MOST_UNITS = 100_000
"""These constants set the default unit size. As the input grows, first the number of units grows to USUAL_NUM_UNITS,
then their size to USUAL_UNIT_BYTES, then their number to MOST_UNITS, and then their size again.
"""


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
    run: str = ""
    """Id of the run, which is part of the name: no run can write or take a file of another one."""

    @property
    def num_rows(self) -> int:
        """Number of input rows."""
        return sum(span.num_rows for span in self.spans)

    @property
    def output_name(self) -> str:
        """Name of the output file. It is the same for the same rows of the same files in a run."""
        spans = self.planned_spans or self.spans
        rows = [(span.file.url, span.row_group, span.start, span.stop) for span in spans]
        digest = hashlib.sha256((json.dumps(rows) + self.run).encode()).hexdigest()[:12]
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
    run: str = ""
    """Id of the run in the names of the units."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> WorkUnit:
        rows = self.spans[self.offsets[index] : self.offsets[index + 1]].tolist()
        spans = tuple(Span(self.files[file], *rest) for file, *rest in rows)
        if not self.replaced:
            return WorkUnit(self.first_number + index, spans, run=self.run)
        left = tuple(span for span in spans if span.file.url not in self.replaced)
        return WorkUnit(self.first_number + index, left, spans, self.run)

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
    filled = rows = 0
    for span, span_bytes in _limited(_split_row_groups(files, size), limit):
        num_rows = span[4] - span[3]
        if filled and (filled + span_bytes > size or rows + num_rows > MOST_UNIT_ROWS):
            offsets.append(len(spans))
            filled = rows = 0
        spans.append(span)
        filled += max(span_bytes, 1)
        rows += num_rows
    if spans:
        offsets.append(len(spans))
    return WorkUnits(files, np.asarray(spans, np.int64).reshape(-1, 5), np.asarray(offsets, np.int64), first_number)


def usual_unit_bytes(files: Sequence[InputFile]) -> int:
    """Return the default bytes per unit. It grows with the input, so that the number of units stays bounded."""
    return _unit_bytes(sum(sum(file.row_group_bytes) for file in files))


def _unit_bytes(total: int) -> int:
    usual = min(max(total // USUAL_NUM_UNITS, SMALLEST_UNIT_BYTES), USUAL_UNIT_BYTES)
    return max(usual, total // MOST_UNITS)


def fingerprint(files: Iterable[tuple[str, int, str]]) -> str:
    """Return a hash that changes if the name, size or version of any file changes."""
    digest = hashlib.sha256()
    for url, size, version in files:
        digest.update(json.dumps({"url": url, "size": size, "version": version}).encode())
    return f"sha256:{digest.hexdigest()}"


def _split_row_groups(files: Sequence[InputFile], size: int) -> Iterator[tuple[tuple[int, int, int, int, int], int]]:
    """Yield spans of at most about size bytes and the bytes of each, over all row groups in order."""
    for index, file in enumerate(files):
        first_row = 0
        for number, (rows, group_bytes) in enumerate(zip(file.row_group_rows, file.row_group_bytes, strict=True)):
            pieces = max(1, min(rows, max(-(-group_bytes // size), -(-rows // MOST_UNIT_ROWS))))
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
