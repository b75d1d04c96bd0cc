"""Tables and sections of the report as HTML. All texts are escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST_SHOWN = 60
"""Characters of a path or a hash that are shown. The rest is in its tooltip."""


def escape(value: object) -> str:
    """Return a value as text in HTML."""
    return html.escape(str(value), quote=True)


def section(name: str, body: str, *, folded: bool = False) -> str:
    """Return a section with a heading that the contents link to. A folded one opens with a click."""
    head = f"<h2>{escape(name)}</h2>"
    if folded:
        return f'<section id="{anchor(name)}"><details><summary>{head}</summary>{body}</details></section>'
    return f'<section id="{anchor(name)}">{head}{body}</section>'


def anchor(name: str) -> str:
    """Return the id of a section."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def fact_table(values: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{_shortened(value)}</td></tr>" for name, value in values.items())
    return f"<table>{rows}</table>"


def row_table(rows: Sequence[Mapping[str, Any]], *, bold: int | None = None, sorts: bool = False) -> str:
    """Return a table with a row for each mapping.

    Args:
        rows: The rows. All have the same names.
        bold: Index of a row in bold.
        sorts: Whether a click on a heading sorts the rows.
    """
    if not rows:
        return "<p>None.</p>"
    numeric = {name for name in rows[0] if any(_is_number(row[name]) for row in rows)}
    shares = {name for name in numeric if all(_is_share(row[name]) for row in rows)}
    kinds = {name: " class=number" if name in numeric else "" for name in rows[0]}
    names = [f"<button>{escape(name)}</button>" if sorts else escape(name) for name in rows[0]]
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(names, kinds.values(), strict=True))
    body = ""
    for number, row in enumerate(rows):
        texts = {name: f"{value:.4f}" if name in shares and value is not None else value for name, value in row.items()}
        cells = "".join(f"<td{kinds[name]}>{_shortened(text)}</td>" for name, text in texts.items())
        body += f"<tr{' class=bold' if number == bold else ''}>{cells}</tr>"
    return f"<table{' class=sorts' if sorts else ''}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def shown(value: Any) -> str:
    """Return a value as it is shown to people."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(number)}" for name, number in value.items()) or "none"
    return str(value)


def shortened(text: str) -> str:
    """Return a long path or hash without its beginning."""
    if len(text) <= LONGEST_SHOWN or " " in text:
        return text
    kept = text[-LONGEST_SHOWN:]
    return "…" + (kept[kept.index("/") :] if "/" in kept else kept)


def _is_share(value: Any) -> bool:
    return value is None or (isinstance(value, float) and 0 <= value <= 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shortened(value: Any) -> str:
    text = shown(value)
    short = shortened(text)
    return escape(text) if short == text else f'<span title="{escape(text)}">{escape(short)}</span>'
