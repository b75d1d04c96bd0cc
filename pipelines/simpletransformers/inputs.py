"""Read the data that scripts pass to the facades: frames, Parquet paths and lists.

The result is texts, second texts and labels. Does not import pandas: a frame is any object with columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import DataError, first_line
from pipelines.settings import DecisionSettings
from pipelines.storage.columns import string_array
from pipelines.storage.tables import is_read_later
from pipelines.storage.text_files import format_of, read_whole

TEXT_NAMES = ("text", "text_a", "text_b", "text_pair")
"""Usual names of text columns. In a CSV file, what they contain is never taken for numbers."""


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, second texts (None unless the rows are pairs) and labels (None if there are none), row by row."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[Any] | None


def read_rows(data: Any, label_columns: Sequence[str] = ()) -> LabelledTexts:
    """Read texts, second texts and labels.

    Args:
        data: A pandas or polars frame, a Hugging Face dataset, an Arrow table, columns by name, rows by name, a path
            (Parquet, .csv, .tsv or .jsonl, also .gz), or a list of rows [text, label] or [text_a, text_b, label].
            Columns are named text, or text_a and text_b. The labels are in the column labels or label, or in the only
            other column. With other names, the first column is the text and the second is the label.
        label_columns: Columns with 0 or 1 for each label. They replace the label column.

    Raises:
        DataError: The data cannot be read, or has other columns.
    """
    if isinstance(data, (str, Path)):
        data = read_file(Path(data))
    is_rows = isinstance(data, (list, tuple, np.ndarray))
    if is_rows and not (len(data) and isinstance(data[0], Mapping)):
        return _of_rows(data)
    columns = read_columns(data)
    names = list(columns)
    texts = _text_columns(names)
    if not texts:
        if label_columns or len(names) < 2:
            raise DataError(f"the data has the columns {names}; it needs text and labels, or text_a, text_b and labels")
        if any(isinstance(name, str) and not name.isdigit() for name in names[:2]):
            warnings.warn(
                f"the data has no column 'text': {names[0]!r} is read as the texts, and {names[1]!r} as the labels",
                UserWarning,
                stacklevel=4,
            )
        return LabelledTexts(columns[names[0]], None, columns[names[1]])
    labels = _labels(columns, texts, label_columns)
    return LabelledTexts(columns[texts[0]], columns[texts[1]] if len(texts) > 1 else None, labels)


def _text_columns(names: Sequence[Any]) -> list[Any]:
    """Return the text columns of a table by their usual names: one, or two for pairs, or none."""
    for pair in (["text_a", "text_b"], ["text", "text_pair"]):
        if all(name in names for name in pair):
            return list(pair)
    return ["text"] if "text" in names else []


def read_columns(data: Any) -> dict[Any, list[Any]]:
    """Return the columns of a table in memory, as lists of Python values.

    Raises:
        DataError: The data is not a table, or two columns have the same name.
    """
    if isinstance(data, (list, tuple, np.ndarray)):
        if not all(isinstance(row, Mapping) for row in data):
            raise DataError("the rows of a list must all be mappings of column names to values")
        names = list(dict.fromkeys(name for row in data for name in row))
        return {name: [row.get(name) for row in data] for name in names}
    if isinstance(data, Mapping):
        names = list(data)
    elif is_read_later(data):
        raise DataError(f"{type(data).__name__} is read only later: collect it first, as a frame or a list of rows")
    else:
        found = getattr(data, "column_names", None)
        found = getattr(data, "columns", None) if found is None else found
        if found is None or isinstance(found, dict):  # a dict: a DatasetDict of several datasets
            raise DataError(f"{type(data).__name__} is not a table: give a frame, columns by name, or a list of rows")
        names = list(found)
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise DataError(f"the data has several columns named {twice[0]!r}; rename them")
    columns = {name: _values(data[name], name) for name in names}
    if len({len(values) for values in columns.values()}) > 1:
        raise DataError(f"the columns have different lengths: { {name: len(v) for name, v in columns.items()} }")
    return columns


def _values(column: Any, name: Any) -> list[Any]:
    """Return a column as a list of Python values."""
    if isinstance(column, (str, bytes)):
        raise DataError(f"column {name!r} is one text; give a list of texts")
    if isinstance(column, (Mapping, set, frozenset)):  # of a mapping, the keys would be read
        raise DataError(f"column {name!r} is a {type(column).__name__}; give a list, such as one of df.to_dict('list')")
    for method in ("to_pylist", "to_list", "tolist"):  # Arrow, pandas and polars, numpy
        if hasattr(column, method):
            return list(getattr(column, method)())
    return list(column)


def _labels(columns: Mapping[Any, list[Any]], texts: Sequence[Any], label_columns: Sequence[str]) -> list[Any] | None:
    """Return the labels of a table, or None if no column or several columns could be the labels."""
    missing = [name for name in label_columns if name not in columns]
    if missing:
        raise DataError(f"the data has no column {missing[0]!r}, which label_columns names; it has {list(columns)}")
    if label_columns:
        return [list(row) for row in zip(*(columns[name] for name in label_columns), strict=True)]
    others = [name for name in columns if name not in texts]
    named = [name for name in ("labels", "label") if name in others]
    if named or len(others) == 1:
        return columns[(named or others)[0]]
    return None


def _of_rows(rows: Any) -> LabelledTexts:
    """Read rows [text, label] or [text_a, text_b, label]."""
    if any(isinstance(row, (str, bytes, Mapping)) or not hasattr(row, "__len__") for row in rows):
        raise DataError("the rows of a list must all be [text, label], or all [text_a, text_b, label]")
    width = {len(row) for row in rows}
    if len(width) > 1 or not width <= {2, 3}:
        raise DataError("the rows of a list must all be [text, label], or all [text_a, text_b, label]")
    columns: list[list[Any]] = [list(column) for column in zip(*rows, strict=True)]
    if not columns:
        return LabelledTexts([], None, [])
    return LabelledTexts(columns[0], columns[1] if len(columns) == 3 else None, columns[-1])


def read_texts(to_predict: Any) -> tuple[list[Any], list[Any] | None]:
    """Read the input of `predict`: texts and second texts. The latter are None if there are only single texts.

    Args:
        to_predict: A list, series or array of texts or of pairs [text_a, text_b]; or a table with a column text, or
            text_a and text_b.

    Raises:
        DataError: It is a single text, a table without these columns, or a pair does not have exactly two texts.
    """
    if isinstance(to_predict, (str, bytes)) or not hasattr(to_predict, "__iter__"):
        raise DataError("predict takes a list of texts; put the text into a list")
    is_table = isinstance(to_predict, Mapping) or hasattr(to_predict, "columns") or hasattr(to_predict, "column_names")
    if is_table:
        return _of_table(read_columns(to_predict))
    if getattr(to_predict, "ndim", 1) == 0:
        raise DataError("predict takes a list of texts; put the text into a list")
    rows = _values(to_predict, "texts")
    if rows and isinstance(rows[0], Mapping):
        return _of_table(read_columns(rows))
    is_pair = [isinstance(row, (list, tuple, np.ndarray)) for row in rows]
    if any(is_pair):
        if not all(is_pair) or any(len(row) != 2 for row in rows):
            raise DataError("every pair must be [text_a, text_b]")
        return [row[0] for row in rows], [row[1] for row in rows]
    return rows, None


def _of_table(columns: Mapping[Any, list[Any]]) -> tuple[list[Any], list[Any] | None]:
    """Return the texts and second texts of a table."""
    names = _text_columns(list(columns)) or (list(columns) if len(columns) == 1 else [])
    if not names:
        raise DataError(
            f"predict takes texts: the table has no column text, or text_a and text_b; it has {list(columns)}"
        )
    return columns[names[0]], columns[names[1]] if len(names) > 1 else None


def text_array(texts: list[Any]) -> pa.Array:
    """Convert texts to an Arrow array. Numbers become strings; missing values become null.

    Raises:
        DataError: A value is neither a text nor a number.
    """
    return string_array([_text(row, text) for row, text in enumerate(texts)])


def _text(row: int, value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if _is_missing(value):
        return None
    if isinstance(value, (Number, np.generic)):
        return str(value)
    raise DataError(f"text {row} is a {type(value).__name__}, not a text: {str(value)[:40]!r}")


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
        several = next((row for row, label in enumerate(labels) if not isinstance(label, Hashable)), None)
        if several is not None:
            raise DataError(f"the label of row {several} is {labels[several]!r}; give one label for each text")
        unknown = list(dict.fromkeys(str(label) for label in labels if label not in spelled))
        if unknown:
            raise DataError(f"labels outside the label set: {', '.join(map(repr, unknown[:5]))}; the set is: {names}")
        return pa.array([spelled[label] for label in labels], pa.string())
    try:
        if decision.kind == "multilabel":
            text = next((row for row, label in enumerate(labels) if isinstance(label, (str, bytes))), None)
            if text is not None:
                raise DataError(
                    f"the labels of row {text} are the text {labels[text]!r}; give a list, such as [1, 0, 1]"
                )
            if decision.num_labels > 1 and all(is_digits(row, decision.num_labels) for row in labels):
                raise DataError(f"the labels of row 0 are the texts {labels[0]!r}; give numbers, such as [1, 0, 1]")
            return pa.array([[int(v) if isinstance(v, (bool, np.bool_)) else v for v in row] for row in labels])
        return pa.array(labels)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError) as error:
        raise DataError(f"the labels have mixed or unusable types: {first_line(error)}") from error


def is_digits(row: Any, count: int) -> bool:
    """Whether a row of labels has one text "0" or "1" for each label. As names of labels, they would be wrong."""
    return len(row) == count and all(isinstance(value, str) and value in ("0", "1") for value in row)


def read_file(path: Path) -> pa.Table:
    """Read a Parquet file or folder, or a .csv, .tsv or .jsonl file, which may be compressed (.gz, .zst)."""
    if not path.exists():
        raise DataError(f"{path} does not exist; give a Parquet, .csv, .tsv or .jsonl file, a frame, or a list of rows")
    kind = format_of(path.name)
    try:
        if kind is None:
            return pq.read_table(path)
        found = read_whole(LocalFileSystem(), str(path), kind, texts=TEXT_NAMES)
        found.table.validate(full=True)  # bytes that are not UTF-8
    except (pa.ArrowException, ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    bad = next(((row, error) for row, error in enumerate(found.errors) if error), None)
    if bad is not None:
        raise DataError(f"{path} cannot be read: in row {bad[0]}, {bad[1]}")
    return found.table
