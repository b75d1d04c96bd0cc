"""The types of the columns of JSON Lines and CSV files, and their values in these types.

The types are inferred from all rows of a file. If the values of a column have no common type, it is a string column.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa

from pipelines.errors import DataError
from pipelines.storage.columns import string_array

INTEGER = re.compile(r"-?(0|[1-9]\d{0,18})")
FLOAT = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
LARGEST_EXACT = 2**53
"""Largest integer up to which a float has every integer."""
BOOLEANS = {"true": True, "false": False, "True": True, "False": False}


class JsonTypes:
    """The types of the columns of JSON Lines."""

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType | None] = {}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Learn from more rows, each with its values by column."""
        for name in dict.fromkeys(name for row in rows for name in row):
            before = self._types.get(name, pa.null())
            values = [row.get(name) for row in rows]
            self._types[name] = None if before is None else _common(before, values)

    def schema(self) -> pa.Schema:
        """Return the columns, in the order in which they were first seen."""
        return pa.schema([(name, pa.string() if kind is None else kind) for name, kind in self._types.items()])


def _common(before: pa.DataType, values: list[Any]) -> pa.DataType | None:
    """Return a type for values of this and an earlier type, or None if there is none."""
    try:
        found = pa.array(values).type
        both = pa.unify_schemas([pa.schema([("", before)]), pa.schema([("", found)])], promote_options="permissive")
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        has_text = all(value is None or isinstance(value, str) for value in values)  # with a lone surrogate
        return pa.string() if has_text and before in (pa.null(), pa.string()) else None
    return both.field(0).type


def known_type(kind: pa.DataType) -> pa.DataType:
    """Return an inferred type as a column can have it: what has no value in any row is a string."""
    if pa.types.is_null(kind) or (pa.types.is_struct(kind) and not kind.num_fields):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(known_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(part.name, known_type(part.type)) for part in kind])
    return kind


class CsvTypes:
    """The types of the columns of CSV: the first of integer, float, Boolean and string that all values have.

    An integer that would lose digits, such as 007 or an id of 20 digits, is a string.
    """

    def __init__(self, texts: Collection[str]) -> None:
        self._texts = set(texts)
        self._left: dict[str, list[pa.DataType]] = {}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Learn from more rows, each with its values by column."""
        for name in dict.fromkeys(name for row in rows for name in row):
            left = self._left.setdefault(name, [] if name in self._texts else [pa.int64(), pa.float64(), pa.bool_()])
            if left:
                values = {row[name] for row in rows if row.get(name)}
                self._left[name] = [kind for kind in left if all(_is_of(value, kind) for value in values)]

    def schema(self) -> pa.Schema:
        """Return the columns, in the order of the header."""
        return pa.schema([(name, self._type_of(name)) for name in self._left])

    def _type_of(self, name: str) -> pa.DataType:
        left = self._left[name]
        if len(left) == 3:  # no row has a value
            return pa.null()
        return left[0] if left else pa.string()


def _is_of(value: str, kind: pa.DataType) -> bool:
    if pa.types.is_boolean(kind):
        return value in BOOLEANS
    if pa.types.is_integer(kind):
        return INTEGER.fullmatch(value) is not None and -(2**63) <= int(value) < 2**63
    if FLOAT.fullmatch(value) is None or not math.isfinite(float(value)):
        return False
    return not value.lstrip("-").isdecimal() or abs(int(value)) <= LARGEST_EXACT


def texts_of(values: list[Any], errors: list[str | None]) -> pa.Array:
    """Return texts as strings. Values that are no texts become errors. Bytes that are not UTF-8 stay as they are."""
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            errors[row] = errors[row] or f"the text is not a string ({type(value).__name__})"
            values[row] = None
    return _strings(values)


def _strings(values: list[Any]) -> pa.Array:
    if any(isinstance(value, str) and not value.isascii() and _has_bytes(value) for value in values):
        with suppress(UnicodeEncodeError):  # other surrogates, from the escapes of JSON
            encoded = [None if value is None else value.encode("utf-8", "surrogateescape") for value in values]
            return pa.array(encoded, pa.binary()).view(pa.string())
    return string_array(values)


def _is_valid(value: Any) -> bool:
    """Whether a value has no lone surrogate, of JSON or of bytes that are not UTF-8."""
    return not isinstance(value, str) or value.isascii() or not any("\ud800" <= one <= "\udfff" for one in value)


def _has_bytes(text: str) -> bool:
    """Whether a text has bytes that were not UTF-8, as "surrogateescape" marks them."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def column_of(values: list[Any], kind: pa.DataType, *, is_csv: bool, keeps_bytes: bool = False) -> tuple[pa.Array, int]:
    """Convert values to a type.

    Args:
        values: Values as JSON or CSV has them. In CSV, an empty value is null, except in a string column.
        kind: The type of the column.
        is_csv: Whether the values are those of CSV, which are all strings.
        keeps_bytes: Whether strings that are not valid Unicode stay as they are.

    Returns:
        The values, and how many of them do not fit the type and are null.
    """
    if is_csv and not _is_string(kind):
        values = [_parsed(value, kind) for value in values]
    try:
        if not _is_string(kind):
            return pa.array(values, kind), 0
        if keeps_bytes:
            return _strings(values), 0
        valid = [value if value is None or _is_valid(value) else None for value in values]
        return string_array(valid), valid.count(None) - values.count(None)
    except (pa.ArrowException, OverflowError, TypeError, ValueError, DataError):
        pieces = [_one(value, kind) for value in values]
    found = pa.concat_arrays(pieces) if pieces else pa.nulls(0, kind)
    return found, found.null_count - sum(value is None for value in values)


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _parsed(value: str | None, kind: pa.DataType) -> Any:
    """Return a value of CSV as Python has it, or as it is if it does not fit the type."""
    if not value:
        return None
    if pa.types.is_boolean(kind):
        return BOOLEANS.get(value, value)
    number = int if pa.types.is_integer(kind) else float if pa.types.is_floating(kind) else str
    try:
        return number(value)
    except ValueError:
        return value


def _shaped(value: Any, kind: pa.DataType) -> Any:
    """Return a value with JSON in each place where the type has a string and the value has none."""
    if _is_string(kind) and value is not None and not isinstance(value, str):
        return json.dumps(value)
    if pa.types.is_list(kind) and isinstance(value, list):
        return [_shaped(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind) and isinstance(value, Mapping):
        return {part.name: _shaped(value.get(part.name), part.type) for part in kind}
    return value


def _one(value: Any, kind: pa.DataType) -> pa.Array:
    """Return one value in a type, or null if it does not fit."""
    shaped = _shaped(value, kind)
    if _is_string(kind):
        return string_array([shaped if _is_valid(shaped) else None])
    with suppress(pa.ArrowException, OverflowError, TypeError, ValueError):
        return pa.array([shaped], kind)
    with suppress(pa.ArrowException, OverflowError, TypeError, ValueError):
        return pa.array([value]).cast(kind)  # a string that is a date
    return pa.nulls(1, kind)
