"""Read the data that scripts pass to the facades: frames, Parquet paths and lists.

The result is texts, second texts and labels. Does not import pandas: a frame is any object with columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from pipelines.errors import DataError, first_line
from pipelines.settings import DecisionSettings
from pipelines.storage.columns import string_array


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, second texts (None unless the rows are pairs) and labels (None if there are none), row by row."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[Any] | None


def read_rows(data: Any) -> LabelledTexts:
    """Read texts, second texts and labels.

    Args:
        data: A frame, an Arrow table, a path (Parquet, .tsv or .csv), or a list of rows [text, label] or
            [text_a, text_b, label]. Columns are named text, or text_a and text_b, and labels if there are any. With
            other names, the first column is the text and the second is the label.

    Raises:
        DataError: The data cannot be read, or has other columns.
    """
    if isinstance(data, (str, Path)):
        data = _read_file(Path(data))
    if isinstance(data, (list, tuple)):
        width = {len(row) for row in data}
        if len(width) > 1 or not width <= {2, 3}:
            raise DataError("the rows of a list must all be [text, label], or all [text_a, text_b, label]")
        columns: list[list[Any]] = [list(column) for column in zip(*data, strict=True)]
        return (
            LabelledTexts(columns[0], columns[1] if len(columns) == 3 else None, columns[-1])
            if columns
            else LabelledTexts([], None, [])
        )
    names = list(data.column_names if isinstance(data, pa.Table) else data.columns)

    def column(name: Any) -> list[Any]:
        values = data[name]
        return list(values.to_pylist() if isinstance(data, pa.Table) else values.tolist())

    labels = column("labels") if "labels" in names else None
    if "text" in names:
        return LabelledTexts(column("text"), None, labels)
    if "text_a" in names and "text_b" in names:
        return LabelledTexts(column("text_a"), column("text_b"), labels)
    if len(names) < 2:
        raise DataError(f"the data has the columns {names}; it needs text and labels, or text_a, text_b and labels")
    return LabelledTexts(column(names[0]), None, column(names[1]))


def split_pairs(rows: list[Any]) -> tuple[list[str], list[str] | None]:
    """Split the input of `predict` into texts and second texts.

    Args:
        rows: Texts, or pairs [text_a, text_b].

    Returns:
        The texts and the second texts. The latter is None if rows are single texts.

    Raises:
        DataError: A pair does not have exactly two texts.
    """
    if rows and isinstance(rows[0], (list, tuple)):
        if any(len(row) != 2 for row in rows):
            raise DataError("every pair must be [text_a, text_b]")
        return [row[0] for row in rows], [row[1] for row in rows]
    return rows, None


def text_array(texts: list[Any]) -> pa.Array:
    """Convert texts to an Arrow array. Numbers become strings; missing values become null."""
    return string_array([None if _is_missing(text) else str(text) for text in texts])


def _is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, or one of pandas' own missing values."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, (float, np.generic, Decimal)) and bool(value != value)


def label_array(labels: list[Any], decision: DecisionSettings, names: list[Any] | None = None) -> pa.Array:
    """Convert labels to an Arrow array. Several labels of a text become a list.

    Args:
        labels: One label per row.
        decision: Kind and labels.
        names: The labels as the caller spells them, in the order of their ids. None means as in decision.

    Raises:
        DataError: A label is missing or not in names, or the labels have mixed types.
    """
    bad = next((row for row, label in enumerate(labels) if _is_missing(label)), None)
    if bad is not None:
        raise DataError(f"row {bad} has no label")
    if names is not None:
        spelled = dict(zip(names, decision.labels, strict=True))
        unknown = list(dict.fromkeys(str(label) for label in labels if label not in spelled))
        if unknown:
            raise DataError(f"labels outside the label set: {', '.join(map(repr, unknown[:5]))}; the set is: {names}")
        return pa.array([spelled[label] for label in labels], pa.string())
    try:
        if decision.kind == "multilabel":
            return pa.array([list(row) for row in labels])
        return pa.array(labels)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError) as error:
        raise DataError(f"the labels have mixed or unusable types: {first_line(error)}") from error


def _read_file(path: Path) -> pa.Table:
    """Read a Parquet file or folder, or a tab-separated (.tsv) or comma-separated (.csv) file with a header."""
    if not path.exists():
        raise DataError(f"{path} does not exist; give a Parquet, .tsv or .csv file, a frame, or a list of rows")
    delimiter = {".tsv": "\t", ".csv": ","}.get(path.suffix)
    try:
        if delimiter is None:
            return pq.read_table(path)
        return csv.read_csv(path, parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True))
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
