"""Read the label column of labelled files, after their columns are checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.errors import DataError, SettingsError
from pipelines.settings import DataSettings, DecisionSettings
from pipelines.storage.columns import check_label_column, check_text_column
from pipelines.storage.footers import read_footers
from pipelines.storage.locations import shown
from pipelines.storage.rows import read_tables, together
from pipelines.storage.shards import InputFile, WorkUnits, split_into_units


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
    files = read_footers(location, data.text_columns, read=data.text_columns)
    for file in files:
        assert file.schema is not None, "files without a schema are refused by read_footers"
        for name in data.text_columns:
            check_text_column(file.schema, name, where=file.url)
        for name in data.target_columns:
            if name not in file.partitions:  # label=ham/ in the path
                check_label_column(file.schema, name, where=file.url)
    units = split_into_units(files, limit=data.limit)
    if not len(units):
        raise DataError(f"{shown(location)} has no rows")
    schema = together(files, data.target_columns)
    labels = label_values(pa.concat_tables(read_tables(location, units, schema)), data)
    return LabelColumn(files, units, labels)


def label_values(table: pa.Table, data: DataSettings) -> pa.ChunkedArray:
    """Return the labels of a table: its label column, or the names of the label_columns that are 1, as lists.

    Raises:
        DataError: A label column contains anything else than 0 and 1 (or false and true).
    """
    if not data.label_columns:
        return table.column(data.label_column)
    chosen_DL = np.zeros((len(table), len(data.label_columns)), dtype=bool)
    for number, name in enumerate(data.label_columns):
        column = table.column(name)
        try:
            values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"label column {name!r} has type {column.type}; it must contain 0 and 1") from error
        bad = np.flatnonzero(~np.isin(values, (0, 1)))
        if len(bad):
            raise DataError(f"label column {name!r} is {column[int(bad[0])]} in row {bad[0]}; it must contain 0 and 1")
        chosen_DL[:, number] = values == 1
    names = pa.array(data.label_columns, pa.string()).take(pa.array(np.nonzero(chosen_DL)[1]))
    offsets = np.concatenate([[0], np.cumsum(chosen_DL.sum(axis=1))])
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names)])


def check_label_columns(data: DataSettings, decision: DecisionSettings) -> None:
    """Check that label_columns are exactly the labels of a multilabel decision.

    Raises:
        SettingsError: The kind is another one, or the names differ.
    """
    if not data.label_columns:
        return
    if decision.kind != "multilabel":
        raise SettingsError(f"label_columns is for kind multilabel; this is {decision.kind}: use label_column")
    if set(data.label_columns) != set(decision.labels):
        raise SettingsError(
            f"label_columns names {', '.join(data.label_columns)}, and the labels are {', '.join(decision.labels)}; "
            "both must have the same names"
        )
