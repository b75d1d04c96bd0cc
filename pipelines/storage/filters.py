"""Parse row filters, such as `language == 'en' and year >= 2020`, into Arrow expressions.

A filter may contain column names, numbers, strings, true, false, null, the comparisons == != < <= > >=, `in [...]`,
`not in [...]`, `is null`, `is not null`, the operators `and`, `or`, `not`, and parentheses. Dates and times are written
as strings. Names with spaces or dots, and keywords, are written in backticks: `sent at` >= '2026-01-31'. Everything
else is rejected. Nothing is evaluated as code.

Values are compared in the type of their column: 0.1 equals a float32 that was stored as 0.1.
"""

from __future__ import annotations

import ast
import datetime
import io
import itertools
import operator
import re
import tokenize
import unicodedata
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import DataError, SettingsError, first_line

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
QUOTED = "column_in_backticks_"
"""Start of the plain names that stand for names in backticks."""
CONSTANTS = {"true": True, "false": False, "null": None, "None": None}
EXAMPLE = "an example: language == 'en' and year >= 2020 (operators are and, or, not, ==, != in lower case)"


def parse_filter(text: str, schema: pa.Schema | None = None) -> tuple[Any, list[str]]:
    """Parse a filter.

    Args:
        text: The filter.
        schema: Types of the columns. With None, the filter's form is checked, but not its values.

    Returns:
        The Arrow expression, and the names of the columns that it reads.

    Raises:
        SettingsError: The filter is not valid, or does not fit the types. The message names the rejected part.
    """
    if QUOTED in text:
        raise SettingsError(f"--filter {text!r} contains the reserved name {QUOTED}; rename the column")
    plain, quoted = _without_backticks(text.strip())
    try:
        tree = ast.parse(plain, mode="eval")
        parser = _Parser(text, schema, quoted)
        expression = parser.expression(tree.body)
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else first_line(error)
        raise SettingsError(f"--filter {text!r} cannot be read: {reason}; {EXAMPLE}") from error
    except RecursionError as error:
        raise SettingsError("--filter is nested too deeply") from error
    if not parser.columns:
        raise SettingsError(f"--filter {text!r} names no column")
    found = list(tokenize.generate_tokens(io.StringIO(plain).readline))
    odd = [token.string for token in found if unicodedata.normalize("NFKC", token.string) != token.string]
    if [token for token in found if token.type == tokenize.NAME and token.string in odd]:
        raise SettingsError(f"--filter {text!r}: write {odd[0]!r} in backticks, because its letters have two forms")
    tokens = [token.type for token in found]
    if tokenize.COMMENT in tokens:
        raise SettingsError(f"--filter {text!r} contains a #, after which nothing would be read; remove it")
    if any(left == right == tokenize.STRING for left, right in itertools.pairwise(tokens)):
        raise SettingsError(f"--filter {text!r} has two strings side by side; put a comma or an operator between them")
    return expression, list(dict.fromkeys(parser.columns))


def check_filter(text: str, schema: pa.Schema) -> None:
    """Check that a filter fits the types of its columns, before work starts.

    Raises:
        SettingsError: A column cannot be compared with this value, or the result is not true or false.
    """
    expression, columns = parse_filter(text, schema)
    try:
        pa.table({name: pa.nulls(1, schema.field(name).type) for name in columns}).filter(expression)
    except pa.ArrowException as error:
        types = ", ".join(f"{name} is {schema.field(name).type}" for name in columns)
        raise SettingsError(f"--filter {text!r} does not fit the types of the columns ({types})") from error


def kept_rows(table: pa.Table, text: str) -> pa.Array:
    """Return for each row of the table whether it passes the filter: a boolean array without nulls.

    A row does not pass if the result is null, for example because a value is missing.

    Raises:
        DataError: A value cannot be compared, such as an unsigned integer that is too large.
    """
    expression, columns = parse_filter(text, table.schema)
    numbered = table.select(columns).append_column("", pa.array(range(len(table)), pa.int64()))
    try:
        passed = numbered.filter(expression).column("")
    except pa.ArrowException as error:
        raise DataError(f"--filter {text!r} cannot be applied: {first_line(error)}") from error
    return pc.is_in(numbered.column("").combine_chunks(), value_set=passed.combine_chunks())


def _without_backticks(text: str) -> tuple[str, dict[str, str]]:
    """Return the filter with a plain name for each name in backticks, and the names by their plain names."""
    quoted: dict[str, str] = {}

    def plain(match: re.Match[str]) -> str:
        if match["name"] is None:  # a string, in which backticks are text
            return match[0]
        name = f"{QUOTED}{len(quoted)}"
        quoted[name] = match["name"]
        return name

    return re.sub(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|`(?P<name>[^`]+)`", plain, text), quoted


class _Parser:
    """Converts the syntax tree of one filter."""

    def __init__(self, text: str, schema: pa.Schema | None, quoted: Mapping[str, str]) -> None:
        self.columns: list[str] = []
        self._text, self._schema, self._quoted = text, schema, quoted

    def expression(self, node: ast.expr) -> Any:
        """Return the expression of a node that is true or false."""
        if isinstance(node, ast.BoolOp):
            parts = [self.expression(value) for value in node.values]
            joined = parts[0]
            for part in parts[1:]:
                joined = joined & part if isinstance(node.op, ast.And) else joined | part
            return joined
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.expression(node.operand)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return self._comparison(node)
        if self._is_column(node):
            return self._column(node)
        raise self._refused(node, "is not a comparison of a column")

    def _comparison(self, node: ast.Compare) -> Any:
        (kind,), left, (right,) = node.ops, node.left, node.comparators
        if isinstance(kind, (ast.Is, ast.IsNot)):
            if self._is_column(right) or _constant(right) is not None:
                raise self._refused(node, "is neither `is null` nor `is not null`")
            column = self._column(left)
            return column.is_null() if isinstance(kind, ast.Is) else column.is_valid()
        if isinstance(kind, (ast.In, ast.NotIn)):
            if not isinstance(right, (ast.List, ast.Tuple)):
                raise SettingsError(f"--filter {self._text!r}: `in` needs a list, such as in ['en', 'de']")
            inside = self._in_list(left, right)
            return inside if isinstance(kind, ast.In) else ~inside
        compare = COMPARISONS[type(kind)]
        if self._is_column(left) and self._is_column(right):
            return compare(self._column(left), self._column(right))
        if not self._is_column(left) and not self._is_column(right):
            raise self._refused(node, "compares no column")
        name, value = (left, right) if self._is_column(left) else (right, left)
        column, (constant,) = self._compared(name, [value])
        if constant is None:
            raise self._refused(node, "is never true; write `is null` or `is not null`")
        return compare(column, constant) if name is left else compare(constant, column)

    def _in_list(self, name: ast.expr, values: ast.List | ast.Tuple) -> Any:
        if not values.elts:
            raise SettingsError(f"--filter {self._text!r}: the list after `in` is empty")
        column, constants = self._compared(name, self._possible(name, values.elts))
        types = {value.type for value in constants if isinstance(value, pa.Scalar)}
        try:
            plain = [value.as_py() if isinstance(value, pa.Scalar) else value for value in constants]
            listed = pa.array(plain, types.pop() if len(types) == 1 else None)  # decimals have one type per precision
        except pa.ArrowException as error:
            raise self._refused(values, "contains values of different types") from error
        if None in constants:
            return column.isin(listed)
        return pc.if_else(column.is_valid(), column.isin(listed), pa.scalar(None, pa.bool_()))

    def _possible(self, name: ast.expr, values: list[ast.expr]) -> list[ast.expr]:
        """Leave out fractions that are compared with an integer column: no integer equals one."""
        if self._schema is None or not isinstance(name, ast.Name) or not self._is_column(name):
            return values
        if self._name(name) not in self._schema.names or not pa.types.is_integer(
            self._schema.field(self._name(name)).type
        ):
            return values
        return [value for value in values if not isinstance(_constant(value), float) or _constant(value).is_integer()]

    def _compared(self, name: ast.expr, values: list[ast.expr]) -> tuple[Any, list[Any]]:
        """Return a column and the constants that it is compared with, in a common type."""
        column = self._column(name)
        constants = [self._constant(value) for value in values]
        if self._schema is None or not isinstance(name, ast.Name):
            return column, constants
        kind = self._schema.field(self._name(name)).type
        numbers = [value for value in constants if _is_number(value)]
        is_exact = all(float(value).is_integer() for value in numbers)
        if pa.types.is_float16(kind):  # Arrow cannot compare them
            column, kind = column.cast(pa.float32()), pa.float32()
        if pa.types.is_integer(kind) and len(numbers) == len([value for value in constants if value is not None]):
            if not is_exact or (kind == pa.uint64() and any(value < 0 for value in numbers)):
                column, kind = column.cast(pa.float64(), safe=False), pa.float64()
            else:
                kind = pa.uint64() if kind == pa.uint64() else pa.int64()
                column = column.cast(kind)
        try:
            return column, [None if value is None else _in_type(value, kind) for value in constants]
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            example = _example_of(kind)
            shown = ", ".join(map(ast.unparse, values))
            raise SettingsError(
                f"--filter {self._text!r}: {shown} does not fit the types of the columns ({self._name(name)} is "
                f"{self._schema.field(self._name(name)).type}){example}"
            ) from error

    def _column(self, node: ast.expr) -> pc.Expression:
        if not isinstance(node, ast.Name) or not self._is_column(node):
            raise self._refused(node, "is no column")
        self.columns.append(self._name(node))
        return pc.field(self._name(node))

    def _name(self, node: ast.Name) -> str:
        """Return the name of a column, as the table has it."""
        return self._quoted.get(node.id, node.id)

    def _is_column(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id not in CONSTANTS

    def _constant(self, node: ast.expr) -> Any:
        value = _constant(node)
        if value is ...:
            raise self._refused(node, "is neither a number nor a string nor true, false or null")
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise SettingsError(f"--filter {self._text!r}: {value} is outside the range of 64-bit integers")
        if isinstance(value, str):
            value.encode()  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
        return value

    def _refused(self, node: ast.expr, reason: str) -> SettingsError:
        shown = re.sub(rf"{QUOTED}\d+", lambda match: f"`{self._quoted[match[0]]}`", ast.unparse(node))
        return SettingsError(f"--filter {self._text!r}: {shown!r} {reason}")


def _constant(node: ast.expr) -> Any:
    """Return the value of a constant, or ... for anything else."""
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _constant(node.operand)
        return -value if _is_number(value) else ...
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool, type(None))):
        return node.value
    return ...


def _example_of(kind: pa.DataType) -> str:
    """Return how a value of a temporal type is written, to complete a message."""
    if pa.types.is_time(kind):
        return "; write it as a string, such as '03:15:00'"
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        return "; write it as a string with a zone, such as '2026-01-31T12:00:00Z' or '2026-01-31T12:00:00+01:00'"
    if pa.types.is_timestamp(kind):
        return "; write it as a string without a zone, such as '2026-01-31' or '2026-01-31T12:00:00'"
    if pa.types.is_duration(kind):
        return "; durations cannot be compared: keep the column as numbers"
    return "; write it as a string, such as '2026-01-31'" if pa.types.is_temporal(kind) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _in_type(value: Any, kind: pa.DataType) -> pa.Scalar:
    """Convert a constant to the type of the column. Raises TypeError or an error of Arrow if it does not fit."""
    if pa.types.is_boolean(kind) != isinstance(value, bool):
        raise TypeError(value)
    if isinstance(value, str):
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_temporal(kind)):
            raise TypeError(value)
        if pa.types.is_time(kind):
            return pa.scalar(datetime.time.fromisoformat(value), kind)
        return pa.scalar(value).cast(kind)
    if pa.types.is_integer(kind):
        return pa.scalar(int(value), kind)
    if pa.types.is_decimal(kind):
        return pa.scalar(Decimal(str(value)))
    if pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return pa.scalar(value, kind)
    raise TypeError(value)
