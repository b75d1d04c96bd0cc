"""Read the label column of labelled Parquet files, after their columns are checked."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from pipelines.errors import DataError
from pipelines.settings import DataSettings
from pipelines.storage.columns import check_label_column, check_text_column
from pipelines.storage.locations import shown
from pipelines.storage.rows import read_unit, together
from pipelines.storage.shards import InputFile, WorkUnits, read_footers, split_into_units


@dataclass(frozen=True)
class LabelColumn:
    """The labels of an input."""

    files: list[InputFile]
    units: WorkUnits
    """The rows of the files, up to the limit."""
    values: pa.ChunkedArray
    """One label per row of the units, in their order and as the files store it."""


def read_label_column(location: str, data: DataSettings) -> LabelColumn:
    """Check the footers and the columns of an input, and read its labels. No text is read.

    Args:
        location: File, folder or glob.
        data: Names of the columns, and the number of rows to use.

    Raises:
        DataError: A file cannot be read, a column is missing or has the wrong type, or there are no rows.
    """
    files = read_footers(location, data.text_column)
    for file in files:
        assert file.schema is not None, "files without a schema are refused by read_footers"
        for name in data.text_columns:
            check_text_column(file.schema, name, where=file.url)
        check_label_column(file.schema, data.label_column, where=file.url)
    units = split_into_units(files, limit=data.limit)
    if not len(units):
        raise DataError(f"{shown(location)} has no rows")
    schema = together(files, [data.label_column])
    labels = pa.concat_tables([read_unit(location, unit, schema) for unit in units]).column(data.label_column)
    return LabelColumn(files, units, labels)
