"""Check the text and label columns of an input table, and read texts from them.

Every error message names the column, its type and the remedy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import DataError, first_line

SOURCE_COLUMNS = ("source_file", "source_row")
"""Names of the columns that identify an input row, without prefix."""


@dataclass(frozen=True)
class Texts:
    """Texts of a column. Every text is valid Unicode: a bad text is replaced by "" and has an error."""

    texts: list[str]
    errors: list[str | None]
    """Why a row cannot be scored, or None if it can."""


def check_text_column(schema: pa.Schema, name: str, *, where: str) -> None:
    """Check that a schema has a string column for the texts.

    Args:
        schema: Schema of the input.
        name: Name of the text column.
        where: Name of the input, for the error message.

    Raises:
        DataError: The column is missing or is not a string column.
    """
    problem = text_column_problem(schema, name)
    if problem is not None:
        raise DataError(f"{where} {problem}; name the text column with --text-column")


def text_column_problem(schema: pa.Schema, name: str) -> str | None:
    """Return why a column cannot be read as texts, or None if it can.

    The reason completes a sentence that starts with the file name: "has no column 'text'; it has: ...".
    """
    if schema.names.count(name) > 1:
        return f"has several columns named {name!r}"
    kind = type_at(schema, name)
    if kind is None:
        return f"has no column {name!r}; it has: {', '.join(schema.names)}"
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return None
    if pa.types.is_null(kind):  # writers infer this type where no row has a text
        return None
    if _is_bytes(kind) or _is_list_of_strings(kind):
        return None
    return f"has a column {name!r} of type {kind}, not string"


def type_at(schema: pa.Schema, name: str) -> pa.DataType | None:
    """Return the type of a column, or of a field in a struct column (`meta.text`). None if there is none."""
    if places := schema.get_all_field_indices(name):  # an index; a search through the names would be quadratic
        return schema.field(places[0]).type
    top, *path = name.split(".")
    places = schema.get_all_field_indices(top)
    if not path or not places:
        return None
    kind = schema.field(places[0]).type
    for part in path:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return None
        kind = kind.field(part).type
    return kind


def text_schema(names: Sequence[str]) -> pa.Schema:
    """Return the schema with which text columns are read: their texts, whatever the files store them in."""
    return pa.schema([pa.field(name, pa.large_string()) for name in names])


def with_fields(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Return a table with a column for each name that is a field in a struct column (`meta.text`)."""
    known = set(table.column_names)
    for name in names:
        if name not in known and type_at(table.schema, name) is not None:
            top, *path = name.split(".")
            table = table.append_column(name, pc.struct_field(table.column(top), path))
    return table


def with_missing_texts(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Return a table whose text columns without any text have no type: pandas stores them as floats."""
    for name in names:
        places = table.schema.get_all_field_indices(name)
        if len(places) == 1 and table.column(places[0]).null_count == len(table):
            table = table.set_column(places[0], name, pa.nulls(len(table)))
    return table


def check_label_column(schema: pa.Schema, name: str, *, where: str) -> None:
    """Check that a schema has the label column.

    Args:
        schema: Schema of the input.
        name: Name of the label column.
        where: Name of the input, for the error message.

    Raises:
        DataError: The column is missing.
    """
    if name not in schema.names:
        raise DataError(
            f"{where} has no column {name!r}; it has: {', '.join(schema.names)}; name the label column with "
            "--label-column, or with --label-columns A,B,C for one column with 0 or 1 for each label"
        )


def read_texts(column: pa.ChunkedArray) -> Texts:
    """Read the texts of a column of any type that `text_column_problem` accepts.

    Null and invalid UTF-8 become errors of the row.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    column = as_strings(column)
    null_D = column.is_null().to_pylist() if column.null_count else [False] * len(column)
    errors = ["the text is null" if null else None for null in null_D]
    if column.null_count:
        column = pc.fill_null(column, pa.scalar("", column.type))
    try:
        return Texts(column.to_pylist(), errors)
    except UnicodeDecodeError:
        return _decode_each(column, errors)


def as_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the texts of a column as an Arrow string type whose nulls pyarrow can fill.

    The bytes of a binary column are taken for UTF-8, which is not checked here. The strings of a list are joined by
    newlines, without those that are null.
    """
    kind = column.type
    if pa.types.is_string_view(kind) or pa.types.is_null(kind):
        return column.cast(pa.large_string())
    if _is_bytes(kind):
        chunks = [chunk.cast(pa.large_binary()).view(pa.large_string()) for chunk in column.chunks]
        return pa.chunked_array(chunks, pa.large_string())
    if _is_list_of_strings(kind):
        return pa.chunked_array([_joined(chunk) for chunk in column.chunks], pa.large_string())
    return column


def _joined(lists: pa.Array) -> pa.Array:
    """Return the strings of each list, joined by newlines. They are taken as bytes, because they may be no UTF-8."""
    if pa.types.is_fixed_size_list(lists.type):
        lists = lists.cast(pa.list_(lists.type.value_type))
    bounds = lists.offsets.to_pylist()
    values = lists.values.slice(bounds[0], bounds[-1] - bounds[0])
    if pa.types.is_dictionary(values.type):
        values = values.dictionary.take(values.indices)
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.large_string())
    texts = values.cast(pa.large_binary()).to_pylist()
    rows = [texts[start - bounds[0] : stop - bounds[0]] for start, stop in itertools.pairwise(bounds)]
    joined = [
        None if is_null else b"\n".join(text for text in row if text is not None)
        for row, is_null in zip(rows, lists.is_null().to_pylist(), strict=True)
    ]
    return pa.array(joined, pa.large_binary()).view(pa.large_string())


def _is_bytes(kind: pa.DataType) -> bool:
    is_view = pa.types.is_binary_view(kind)
    return bool(
        is_view or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    )


def _is_list_of_strings(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    value = kind.value_type.value_type if pa.types.is_dictionary(kind.value_type) else kind.value_type
    is_string = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    return bool(is_string or pa.types.is_binary(value) or pa.types.is_large_binary(value))


def _decode_each(column: pa.ChunkedArray, errors: list[str | None]) -> Texts:
    """Decode row by row. This slow path is only for a column that contains invalid UTF-8."""
    texts = []
    for row, value in enumerate(column.cast(pa.large_binary()).to_pylist()):
        try:
            texts.append(value.decode())
        except UnicodeDecodeError as error:
            texts.append("")
            errors[row] = f"the text is not valid UTF-8 (byte {error.start}: {error.reason})"
    return Texts(texts, errors)


def string_array(values: Sequence[Any]) -> pa.Array:
    """Convert texts to an Arrow array of strings. None, NaN and pandas' NA become null.

    A text with a lone surrogate has no UTF-8 form. Its bytes are stored as they are, and tokenizing reports the text.

    Raises:
        DataError: A value is not a text.
    """
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        values = values.cast(pa.string()) if pa.types.is_dictionary(values.type) else values
        return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    try:
        return pa.array(values, pa.string(), from_pandas=True)
    except UnicodeEncodeError:
        encoded = [value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value for value in values]
        return pa.array(encoded, pa.binary(), from_pandas=True).view(pa.string())
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"the texts must be strings or None: {first_line(error)}") from error
