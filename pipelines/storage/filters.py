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

from pipelines.errors import SettingsError

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


def kept_rows(table: pa.Table, expression: Any) -> pa.Array:
    """Return for each row of the table whether it passes the filter.

    A row does not pass if the result is null, for example because a value is missing.
    """
    numbered = table.append_column("", pa.array(range(len(table)), pa.int64()))
    passed = numbered.filter(expression).column("")
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
    left, (kind,), (right,) = _value(node.left, columns, text), node.ops, node.comparators
    if isinstance(kind, (ast.Is, ast.IsNot)):
        if not isinstance(right, (ast.Name, ast.Constant)) or _value(right, columns, text) is not None:
            raise SettingsError(f"--filter {text!r}: {ast.unparse(node)!r} is neither `is null` nor `is not null`")
        return left.is_null() if isinstance(kind, ast.Is) else left.is_valid()
    if isinstance(kind, (ast.In, ast.NotIn)):
        if not isinstance(right, (ast.List, ast.Tuple)):
            raise SettingsError(f"--filter {text!r}: `in` needs a list, such as in ['en', 'de']")
        inside = left.isin([_value(item, columns, text) for item in right.elts])
        return inside if isinstance(kind, ast.In) else ~inside
    return COMPARISONS[type(kind)](left, _value(right, columns, text))


def _value(node: ast.expr, columns: list[str], text: str) -> Any:
    if isinstance(node, ast.Name):
        if node.id in CONSTANTS:
            return CONSTANTS[node.id]
        columns.append(node.id)
        return pc.field(node.id)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool, type(None))):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, columns, text)
    raise SettingsError(f"--filter {text!r}: {ast.unparse(node)!r} is neither a column nor a value")
