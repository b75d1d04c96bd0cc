"""Convert tables in memory to Arrow: pandas and polars frames, Hugging Face datasets, columns by name, rows by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipelines.errors import DataError, first_line
from pipelines.storage.columns import string_array


def is_location(data: Any) -> bool:
    """Whether data is a path or a URL."""
    return isinstance(data, str) or hasattr(data, "__fspath__")


def as_table(data: Any) -> pa.Table:
    """Convert data to an Arrow table.

    Args:
        data: An Arrow table, a pandas or polars frame, a Hugging Face dataset, a mapping of columns by name, or a list
            of rows as mappings.

    Raises:
        DataError: The data is none of these, or its columns do not fit into Arrow.
    """
    try:
        table = _as_table(data)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"the table cannot be read: {first_line(error)}") from error
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise DataError(f"the table has several columns named {', '.join(map(repr, twice))}; rename them")
    return table


def _as_table(data: Any) -> pa.Table:
    if isinstance(data, pa.Table):
        return data
    if isinstance(data, Mapping):
        single = next((name for name, values in data.items() if isinstance(values, (str, bytes))), None)
        if single is not None:
            raise DataError(f"column {single!r} is one text; give a list of texts, such as {{{single!r}: ['...']}}")
        return pa.table({str(name): _array(values) for name, values in data.items()})
    if isinstance(data, (list, tuple)):
        if not all(isinstance(row, Mapping) for row in data):
            raise DataError("a list must hold rows as mappings of column names to values, such as {'text': ...}")
        names = list(dict.fromkeys(name for row in data for name in row))
        return pa.table({str(name): _array([row.get(name) for row in data]) for name in names})
    if hasattr(data, "iloc") and hasattr(data, "columns"):  # pandas: the index does not become a column
        try:
            return pa.Table.from_pandas(data, preserve_index=False)
        except UnicodeEncodeError:  # a lone surrogate
            return pa.table({str(name): _array(data[name]) for name in data.columns})
    if hasattr(data, "with_format"):  # a Hugging Face dataset
        return data.with_format("arrow")[:]
    if hasattr(data, "__arrow_c_stream__"):
        return pa.table(data)
    raise DataError(
        f"{type(data).__name__} is not a table: give an Arrow table, a pandas or polars frame, a mapping of columns, "
        "or a list of rows"
    )


def _array(values: Any) -> Any:
    """Convert a column to Arrow. None, NaN among other values, and pandas' NA become null."""
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return values
    is_one = hasattr(values, "dtype") and getattr(values, "ndim", 1) == 1
    values = values if is_one else list(values)  # the rows of a two-dimensional array
    try:
        return pa.array(values, from_pandas=True)
    except UnicodeEncodeError:  # a lone surrogate
        return string_array(values)


def single_label_column(table: pa.Table, texts: Sequence[str]) -> str | None:
    """Return the label column of a table: "label", "labels", or the only one beside the texts. None if unclear."""
    others = [name for name in table.column_names if name not in texts]
    named = [name for name in ("label", "labels") if name in others]
    if named:
        return named[0]
    return others[0] if len(others) == 1 else None
