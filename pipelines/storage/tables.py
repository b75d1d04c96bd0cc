"""Convert tables in memory to Arrow: pandas and polars frames, Hugging Face datasets, columns by name, rows by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipelines.errors import DataError, first_line


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
        return pa.table(
            {str(name): pa.array(values if hasattr(values, "dtype") else list(values)) for name, values in data.items()}
        )
    if isinstance(data, (list, tuple)):
        if not all(isinstance(row, Mapping) for row in data):
            raise DataError("a list must hold rows as mappings of column names to values, such as {'text': ...}")
        return pa.Table.from_pylist(list(data))
    if hasattr(data, "iloc") and hasattr(data, "columns"):  # pandas: the index does not become a column
        return pa.Table.from_pandas(data, preserve_index=False)
    if hasattr(data, "with_format"):  # a Hugging Face dataset
        return data.with_format("arrow")[:]
    if hasattr(data, "__arrow_c_stream__"):
        return pa.table(data)
    raise DataError(
        f"{type(data).__name__} is not a table: give an Arrow table, a pandas or polars frame, a mapping of columns, "
        "or a list of rows"
    )
