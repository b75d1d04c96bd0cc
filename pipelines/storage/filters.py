"""Parse row filters, such as `language == 'en' and year >= 2020`, into Arrow expressions.

A filter may contain column names, numbers, strings, true, false, null, the comparisons == != < <= > >=, `in [...]`,
`not in [...]`, `is null`, `is not null`, the operators `and`, `or`, `not`, and parentheses. Everything else is
rejected. Nothing is evaluated as code.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
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
CONSTANTS = {"true": True, "false": False, "null": None, "None": None}


def parse_filter(text: str) -> tuple[Any, list[str]]:
    """Parse a filter.

    Returns:
        The Arrow expression, and the names of the columns that it reads.

    Raises:
        SettingsError: The filter is not valid. The message names the rejected expression.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise SettingsError(
            f"--filter {text!r} cannot be read: {reason}; an example: language == 'en' and year >= 2020"
        ) from error
    columns: list[str] = []
    expression = _expression(tree.body, columns, text)
    if not columns:
        raise SettingsError(f"--filter {text!r} names no column")
    return expression, list(dict.fromkeys(columns))


def check_filter(text: str, schema: pa.Schema) -> None:
    """Check that a filter fits the types of its columns, before work starts.

    Raises:
        SettingsError: A column cannot be compared with this value, or the result is not true or false.
    """
    expression, columns = parse_filter(text)
    try:
        schema.empty_table().filter(expression)
    except pa.ArrowException as error:
        types = ", ".join(f"{name} is {schema.field(name).type}" for name in columns)
        raise SettingsError(f"--filter {text!r} does not fit the types of the columns ({types})") from error


def kept_rows(table: pa.Table, text: str) -> pa.Array:
    """Return for each row of the table whether it passes the filter.

    A row does not pass if the result is null, for example because a value is missing.

    Raises:
        DataError: A value cannot be compared, such as an unsigned integer that is too large.
    """
    expression, columns = parse_filter(text)
    numbered = table.select(columns).append_column("", pa.array(range(len(table)), pa.int64()))
    try:
        passed = numbered.filter(expression).column("")
    except pa.ArrowException as error:
        raise DataError(f"--filter {text!r} cannot be applied: {first_line(error)}") from error
    return pc.is_in(numbered.column("").combine_chunks(), value_set=passed.combine_chunks())


def _expression(node: ast.expr, columns: list[str], text: str) -> Any:
    if isinstance(node, ast.BoolOp):
        parts = [_expression(value, columns, text) for value in node.values]
        joined = parts[0]
        for part in parts[1:]:
            joined = joined & part if isinstance(node.op, ast.And) else joined | part
        return joined
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ~_expression(node.operand, columns, text)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _comparison(node, columns, text)
    if isinstance(node, ast.Name) and node.id not in CONSTANTS:
        return _value(node, columns, text)
    raise SettingsError(f"--filter {text!r}: {ast.unparse(node)!r} is not a comparison of a column")


def _comparison(node: ast.Compare, columns: list[str], text: str) -> Any:
    (kind,), (right,) = node.ops, node.comparators
    if isinstance(kind, (ast.Is, ast.IsNot)):
        if not isinstance(right, (ast.Name, ast.Constant)) or _value(right, [], text) is not None:
            raise SettingsError(f"--filter {text!r}: {ast.unparse(node)!r} is neither `is null` nor `is not null`")
        column = _column(node.left, columns, text)
        return column.is_null() if isinstance(kind, ast.Is) else column.is_valid()
    if isinstance(kind, (ast.In, ast.NotIn)):
        if not isinstance(right, (ast.List, ast.Tuple)):
            raise SettingsError(f"--filter {text!r}: `in` needs a list, such as in ['en', 'de']")
        inside = _column(node.left, columns, text).isin(_constants(right, text))
        return inside if isinstance(kind, ast.In) else ~inside
    sides = [_value(side, columns, text) for side in (node.left, right)]
    if not any(isinstance(side, pc.Expression) for side in sides):
        raise SettingsError(f"--filter {text!r}: {ast.unparse(node)!r} compares no column")
    if None in [side for side in sides if not isinstance(side, pc.Expression)]:
        raise SettingsError(f"--filter {text!r}: {ast.unparse(node)!r} is never true; write `is null` or `is not null`")
    return COMPARISONS[type(kind)](*sides)


def _column(node: ast.expr, columns: list[str], text: str) -> pc.Expression:
    column = _value(node, columns, text)
    if not isinstance(column, pc.Expression):
        raise SettingsError(f"--filter {text!r}: {ast.unparse(node)!r} is no column")
    return column


def _constants(node: ast.List | ast.Tuple, text: str) -> pa.Array:
    values = [_value(item, [], text) for item in node.elts]
    if not values:
        raise SettingsError(f"--filter {text!r}: the list after `in` is empty")
    if any(isinstance(value, pc.Expression) for value in values):
        raise SettingsError(f"--filter {text!r}: {ast.unparse(node)!r} may contain numbers and strings, but no columns")
    try:
        return pa.array(values)
    except pa.ArrowException as error:
        raise SettingsError(f"--filter {text!r}: the values in {ast.unparse(node)!r} have different types") from error


def _value(node: ast.expr, columns: list[str], text: str) -> Any:
    """A column, or a constant of Python."""
    if isinstance(node, ast.Name):
        if node.id in CONSTANTS:
            return CONSTANTS[node.id]
        columns.append(node.id)
        return pc.field(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = node.operand.value
        value = -value if isinstance(value, (int, float)) and not isinstance(value, bool) else ...
    else:
        value = node.value if isinstance(node, ast.Constant) else ...
    if not isinstance(value, (int, float, str, bool, type(None))):
        raise SettingsError(f"--filter {text!r}: {ast.unparse(node)!r} is neither a column nor a value")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise SettingsError(f"--filter {text!r}: {value} is outside the range of 64-bit integers")
    return value
