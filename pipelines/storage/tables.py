"""Convert tables in memory to Arrow: pandas and polars frames, Hugging Face datasets, columns by name, rows by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import DataError, first_line
from pipelines.storage.columns import string_array

logger = logging.getLogger(__name__)


def is_location(data: Any) -> bool:
    """Whether data is a path or a URL."""
    return isinstance(data, str) or hasattr(data, "__fspath__")


def is_read_later(data: Any) -> bool:
    """Whether data is a table whose rows are not in memory: a lazy frame, or an iterable dataset."""
    return hasattr(data, "collect") or (hasattr(data, "with_format") and not hasattr(data, "__len__"))


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
        except (pa.ArrowException, UnicodeEncodeError, TypeError, ValueError):  # column by column
            names = [str(name) for name in data.columns]
            return pa.table([_pandas_column(data.iloc[:, place], name) for place, name in enumerate(names)], names)
    if is_read_later(data):
        raise DataError(f"{type(data).__name__} is read only later: collect it first, as a frame or a list of rows")
    if hasattr(data, "with_format") and not isinstance(getattr(data, "column_names", None), dict):
        return _with_class_names(data.with_format("arrow")[:], data.features)
    if hasattr(data, "__arrow_c_stream__"):
        return _without_views(pa.table(data))
    raise DataError(
        f"{type(data).__name__} is not a table: give an Arrow table, a pandas or polars frame, a mapping of columns, "
        "or a list of rows"
    )


def _pandas_column(series: Any, name: str) -> pa.Array:
    """Convert a column of a pandas frame. Values of several types, or of none that Arrow has, become texts."""
    try:
        found = pa.array(series, from_pandas=True)
        return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
    except UnicodeEncodeError:  # a lone surrogate
        return string_array(series)
    except (pa.ArrowException, TypeError, ValueError):
        logger.warning(
            "column %r has values of several types, or of one that Arrow does not have: it is read as text", name
        )
        missing = series.isna().tolist()
        values = series.tolist()
        return string_array([None if gone else str(value) for gone, value in zip(missing, values, strict=True)])


def _without_views(table: pa.Table) -> pa.Table:
    """Decode columns of categories whose names are string views (polars): Arrow has no functions for them."""
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type) and pa.types.is_string_view(field.type.value_type):
            chunks = [chunk.dictionary.cast(pa.string()).take(chunk.indices) for chunk in table[place].chunks]
            table = table.set_column(place, field.name, pa.chunked_array(chunks, pa.string()))
    return table


def _with_class_names(table: pa.Table, features: Mapping[str, Any]) -> pa.Table:
    """Replace the ids of a Hugging Face dataset's classes by their names."""
    for place, (name, feature) in enumerate(features.items()):
        names = getattr(feature, "names", None)
        if names and pa.types.is_integer(table.schema.field(name).type):
            ids = pc.if_else(pc.greater_equal(table[name], 0), table[name], None)  # -1: no label
            table = table.set_column(place, name, pa.chunked_array([pa.array(names).take(ids.combine_chunks())]))
        names_in_list = getattr(getattr(feature, "feature", None), "names", None)
        if names_in_list and table.num_rows:
            lists = pa.concat_arrays(table[name].chunks)
            lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
            named = pa.ListArray.from_arrays(
                offsets, pa.array(names_in_list).take(lists.flatten()), mask=lists.is_null()
            )
            table = table.set_column(place, name, pa.chunked_array([named]))
    return table


def _array(values: Any) -> Any:
    """Convert a column to Arrow. None, NaN among other values, and pandas' NA become null."""
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return values
    if isinstance(values, (Mapping, set, frozenset)):  # of a mapping, the keys would be read
        raise DataError(f"a column is a {type(values).__name__}; give lists, such as those of df.to_dict('list')")
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
