"""Print results for people: values by name, aligned tables, and the commands that usually come next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def value_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each value: name: value."""
    for name, value in values.items():
        yield f"{name}: {shown(value)}"


def table_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table: a heading, then the rows. Columns are aligned, numbers to the right.

    All rows have the same names. Columns in which no row has a value are left out.
    """
    if not rows:
        return
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(names))]
    numeric = [any(isinstance(row[name], (int, float)) for row in rows) for name in names]
    for line in cells:
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        )
        yield "  ".join(padded).rstrip()


def renamed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of a label with the names that all tables have: rows, precision, recall, f1."""
    names = {"support": "rows", "precision": "precision", "recall": "recall", "f1_score": "f1"}
    return {name: metrics.get(key) for key, name in names.items()}


def shown(value: Any) -> str:
    """Return a value as it is shown to people."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if value in ({}, [], ()):
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    return str(value)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
