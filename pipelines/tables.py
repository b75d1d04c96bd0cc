"""Arrow columns in and out: what is asked of an input table, and how results become output columns.

Every check names the column, its type and the remedy. Knows no files, no models, no torch, no ray.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.labels import Decisions, decide, thresholds_by_label
from pipelines.settings import DecisionSettings

SOURCE_COLUMNS = ("source_file", "source_row")
DECISION_METADATA, PREFIX_METADATA = b"pipelines.decision", b"pipelines.prefix"
"""Keys of a scored file's schema metadata."""


@dataclass(frozen=True)
class Texts:
    """The texts of a column: always valid Unicode, the bad ones replaced by "" and accounted for."""

    texts: list[str]
    errors: list[str | None]
    """Why a row cannot be scored; None where it can."""


def check_text_column(schema: pa.Schema, name: str, *, where: str) -> None:
    """Raise DataError unless the schema has a column of texts of that name; where names the file."""
    problem = text_column_problem(schema, name)
    if problem is not None:
        raise DataError(f"{where} {problem}; name the text column with --text-column")


def text_column_problem(schema: pa.Schema, name: str) -> str | None:
    """Why a schema's column of that name gives no texts, as the rest of a sentence about its file; None if it does."""
    if name not in schema.names:
        return f"has no column {name!r}; it has: {', '.join(schema.names)}"
    kind = schema.field(name).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return None
    return f"has a column {name!r} of type {kind}, not string"


def check_label_column(schema: pa.Schema, name: str, *, where: str) -> None:
    """Raise DataError unless the schema has a column of that name."""
    if name not in schema.names:
        raise DataError(
            f"{where} has no column {name!r}; name the label column with --label-column; "
            f"it has: {', '.join(schema.names)}"
        )


def read_texts(column: pa.ChunkedArray) -> Texts:
    """Texts of a string column of any Arrow kind; null and invalid UTF-8 become errors of their rows."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string_view(column.type):  # for which pyarrow has no fill_null
        column = column.cast(pa.large_string())
    null_D = column.is_null().to_pylist() if column.null_count else [False] * len(column)
    errors = ["the text is null" if null else None for null in null_D]
    if column.null_count:
        column = pc.fill_null(column, pa.scalar("", column.type))
    try:
        return Texts(column.to_pylist(), errors)
    except UnicodeDecodeError:
        return _decode_each(column, errors)


def check_output_columns(names: Sequence[str], keep: Sequence[str], outputs: Sequence[str], *, prefix: str) -> None:
    """Raise DataError where a kept column is absent or bears the name of an output column."""
    missing = [name for name in keep if name not in names]
    if missing:
        raise DataError(f"--keep names {missing[0]!r}, which is no input column; those are: {', '.join(names)}")
    clashes = [name for name in keep if name in outputs]
    if clashes:
        raise DataError(
            f"input column {clashes[0]!r} bears the name of an output column; leave it out with --keep "
            f"{','.join(name for name in keep if name not in outputs)!r}, or rename the outputs with --prefix "
            f"(now {prefix!r})"
        )


def output_fields(decision: DecisionSettings, *, prefix: str = "") -> list[pa.Field]:
    """Fields of the output columns in order, source columns first; names carry the prefix."""
    kind, num_labels = decision.kind, decision.num_labels
    prediction = {
        "multilabel": pa.field(prefix + "predicted_labels", pa.list_(pa.string())),
        "regression": pa.field(prefix + "predicted_value", pa.float32()),
    }.get(kind, pa.field(prefix + "predicted_label", pa.string()))
    names = list(decision.labels) or ["value"]
    scores = pa.field(prefix + "scores", pa.list_(pa.float32(), num_labels), metadata={"labels": json.dumps(names)})
    return [
        pa.field(prefix + "source_file", pa.string()),
        pa.field(prefix + "source_row", pa.int64()),
        prediction,
        pa.field(prefix + "score", pa.float32()),
        scores,
        pa.field(prefix + "num_tokens", pa.int32()),
        pa.field(prefix + "num_windows", pa.int32()),
        pa.field(prefix + "truncated", pa.bool_()),
        pa.field(prefix + "error", pa.string()),
    ]


def result_columns(
    decisions: Decisions,
    scores_DL: NDArray[np.float32],
    *,
    decision: DecisionSettings,
    num_tokens_D: NDArray[np.int64],
    num_windows_D: NDArray[np.int64],
    truncated_D: NDArray[np.bool_],
    errors: Sequence[str | None],
    prefix: str = "",
) -> pa.Table:
    """The output columns after the source columns, one row per document; null scores where there is an error."""
    bad_D = np.asarray([error is not None for error in errors], dtype=bool)
    fields = output_fields(decision, prefix=prefix)[len(SOURCE_COLUMNS) :]
    flat = pa.array(scores_DL.reshape(-1), pa.float32())
    columns = [
        *(column for _, column in decided_columns(decisions, decision, bad_D)),
        pa.FixedSizeListArray.from_arrays(flat, decision.num_labels, mask=pa.array(bad_D)),
        pa.array(num_tokens_D, pa.int32()),
        pa.array(num_windows_D, pa.int32()),
        pa.array(truncated_D, pa.bool_()),
        pa.array(errors, pa.string()),
    ]
    arrays = [column.cast(field.type) for column, field in zip(columns, fields, strict=True)]
    return pa.table(arrays, schema=pa.schema(fields))


def decided_columns(
    decisions: Decisions, decision: DecisionSettings, bad_D: NDArray[np.bool_], *, prefix: str = ""
) -> list[tuple[pa.Field, pa.Array]]:
    """The two output columns that follow from decisions: what is predicted, and its score; null where bad."""
    fields = output_fields(decision, prefix=prefix)[len(SOURCE_COLUMNS) :][:2]
    columns = (_predictions(decisions, decision.labels, bad_D), _document_score(decisions, bad_D))
    return [(field, column.cast(field.type)) for field, column in zip(fields, columns, strict=True)]


def error_columns(errors: Sequence[str | None], *, decision: DecisionSettings, prefix: str = "") -> pa.Table:
    """The output columns of documents that could not be scored, one row per error."""
    nothing_DL = np.zeros((len(errors), decision.num_labels), np.float32)
    zero_D = np.zeros(len(errors), np.int64)
    return result_columns(
        decide(nothing_DL, decision, nothing_DL.astype(np.int64)),
        nothing_DL,
        decision=decision,
        num_tokens_D=zero_D,
        num_windows_D=zero_D,
        truncated_D=zero_D.astype(bool),
        errors=errors,
        prefix=prefix,
    )


def schema_metadata(
    decision: DecisionSettings, *, weights_hash: str, settings_hash: str, prefix: str = ""
) -> dict[bytes, bytes]:
    """What a scored file says about how it was made, under keys of its own."""
    hashes = {b"pipelines.weights_hash": weights_hash.encode(), b"pipelines.settings_hash": settings_hash.encode()}
    return {**hashes, PREFIX_METADATA: prefix.encode(), **decision_metadata(decision)}


def decision_metadata(decision: DecisionSettings) -> dict[bytes, bytes]:
    """The part of it that says how scores became labels."""
    values = {
        b"pipelines.kind": decision.kind,
        b"pipelines.labels": json.dumps(decision.labels),
        b"pipelines.thresholds": json.dumps(thresholds_by_label(decision)),
        b"pipelines.merge": decision.merge,
        DECISION_METADATA: json.dumps(dataclasses.asdict(decision)),
    }
    return {name: value.encode() for name, value in values.items()}


def _decode_each(column: pa.ChunkedArray, errors: list[str | None]) -> Texts:
    """Row by row, for the rare column that holds invalid UTF-8."""
    texts = []
    for row, value in enumerate(column.cast(pa.large_binary()).to_pylist()):
        try:
            texts.append(value.decode())
        except UnicodeDecodeError as error:
            texts.append("")
            errors[row] = f"the text is not valid UTF-8 (byte {error.start}: {error.reason})"
    return Texts(texts, errors)


def _predictions(decisions: Decisions, labels: tuple[str, ...], bad_D: NDArray[np.bool_]) -> pa.Array:
    if decisions.value_D is not None:
        return pa.array(decisions.value_D, pa.float32(), mask=bad_D)
    names = pa.array(labels, pa.string())
    if decisions.positive_DL is not None:
        rows, held = np.nonzero(decisions.positive_DL)
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(bad_D)))])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names.take(pa.array(held)), mask=pa.array(bad_D))
    assert decisions.label_D is not None
    absent_D = bad_D | (decisions.label_D < 0)
    return names.take(pa.array(decisions.label_D, mask=absent_D))


def _document_score(decisions: Decisions, bad_D: NDArray[np.bool_]) -> pa.Array:
    if decisions.score_D is None:
        return pa.nulls(len(bad_D), pa.float32())
    return pa.array(decisions.score_D, pa.float32(), mask=bad_D | np.isnan(decisions.score_D))
