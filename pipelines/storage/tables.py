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
        return _as_table(data)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"the table cannot be read: {first_line(error)}") from error


def _as_table(data: Any) -> pa.Table:
    if isinstance(data, pa.Table):
        return data
    if isinstance(data, Mapping):
        single = next((name for name, values in data.items() if isinstance(values, (str, bytes))), None)
        if single is not None:
            raise DataError(f"column {single!r} is one text; give a list of texts, such as {{{single!r}: ['...']}}")
        return pa.table({str(name): pa.array(list(values)) for name, values in data.items()})
    if isinstance(data, (list, tuple)):
        if not all(isinstance(row, Mapping) for row in data):
            raise DataError("a list must hold rows as mappings of column names to values, such as {'text': ...}")
        return pa.Table.from_pylist(list(data))
    if hasattr(data, "iloc"):  # pandas: the index does not become a column
        return pa.Table.from_pandas(data, preserve_index=False)
    if hasattr(data, "with_format"):  # a Hugging Face dataset
        return data.with_format("arrow")[:]
    if hasattr(data, "__arrow_c_stream__"):
        return pa.table(data)
    raise DataError(
        f"{type(data).__name__} is not a table: give an Arrow table, a pandas or polars frame, a mapping of columns, "
        "or a list of rows"
    )
