"""Remove the rows of input files that changed, after their new versions are scored (`--replace-changed`).

The order keeps every row: first the new rows are committed, then the old ones are removed, then the summary is written.
A job that is killed in between has no summary, and its next start does the rest.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.bulk.run_folder import FOOTER_THREADS, Run, commit_unit, read_counts
from pipelines.bulk.summary import Counts, count_table
from pipelines.settings import DecisionSettings
from pipelines.storage.columns import SOURCE_COLUMNS
from pipelines.storage.locations import filesystem_of, from_parquet, remove
from pipelines.storage.shards import WorkUnit


def remove_replaced_rows(run: Run, decision: DecisionSettings, *, prefix: str = "") -> Iterator[Counts]:
    """Remove the rows of replaced files from the units that were finished before. Yields the counts of what is left."""

    def clean(unit: WorkUnit) -> Counts | None:
        return _clean(run, unit, decision, prefix)

    before = [unit for unit in run.with_replaced_rows() if unit.output_name in run.finished or not unit.spans]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        yield from (counts for counts in pool.map(clean, before) if counts is not None)


def _clean(run: Run, unit: WorkUnit, decision: DecisionSettings, prefix: str) -> Counts | None:
    """Return the counts of the unit's file without replaced rows, or None if there is nothing left of it."""
    location = run.location
    if not unit.spans:
        remove(location, unit.output_name)
        return None
    (counts,) = read_counts(location, [unit.output_name])
    if counts.rows_in == unit.num_rows:  # an earlier start of the job has done it
        return counts
    filesystem, folder = filesystem_of(location)
    table = from_parquet(filesystem, posixpath.join(folder, unit.output_name), lambda file: file.read())
    kept = pa.array(sorted({span.file.url for span in unit.spans}), pa.string())
    left = table.filter(pc.is_in(table.column(prefix + SOURCE_COLUMNS[0]), kept))
    counts = replace(
        count_table(left, decision, prefix=prefix),
        rows_in=unit.num_rows,
        rows_filtered=unit.num_rows - len(left),
        values_lost=counts.values_lost,
        seconds=counts.seconds,
    )
    return commit_unit(location, unit.output_name, left, counts, change=run.manifest.changes)
