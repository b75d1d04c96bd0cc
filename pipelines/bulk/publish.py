"""Add the files of a finished run to a Delta or Iceberg table (setting `table`), in one commit.

The commit is the last step before the summary. It carries the id of the run, and the table is asked for this id first.
A job that is killed at any moment therefore leaves a table with all rows of the run or none, and its next start adds
them if they are missing.
"""

from __future__ import annotations

import logging
import posixpath

import pyarrow as pa

from pipelines.bulk.manifest import add_table
from pipelines.bulk.run_folder import Run, read_counts
from pipelines.storage.lakes import FinishedFiles, output_table
from pipelines.storage.locations import filesystem_of, from_parquet, list_names, shown

logger = logging.getLogger(__name__)


def publish(run: Run, table: str) -> str:
    """Add the run's files to a table, unless it has them. Returns the table with its version, to be shown.

    Raises:
        OutputError: The table cannot have these files.
        JobError: The commit failed. The next start of the job tries again.
    """
    target = output_table(table)
    found = target.find(run.manifest.run, len(run.generations))
    if found is not None:
        return f"{shown(table)} at {found}"
    names = [[unit.output_name for unit in units] for units in run.generations]
    flat = [name for generation in names for name in generation]
    rows = dict(zip(flat, (counts.rows_out for counts in read_counts(run.location, flat)), strict=True))
    names = [[name for name in generation if rows[name]] for generation in names]
    if not any(names):
        return f"{shown(table)}: no rows to add"
    schema = _schema(run.location, next(name for generation in names for name in generation))
    target.check(run.location, schema)
    add_table(run.location, table)
    files = FinishedFiles(run.manifest.run, len(names), names, rows, list_names(run.location))
    found = f"{shown(table)} at {target.add(run.location, schema, files)}"
    logger.info("the rows are in %s", found)
    return found


def _schema(location: str, name: str) -> pa.Schema:
    filesystem, folder = filesystem_of(location)
    schema = from_parquet(filesystem, posixpath.join(folder, name), lambda file: file.schema_arrow)
    return pa.schema([column.remove_metadata() for column in schema])
