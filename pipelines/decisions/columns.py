"""Check the names of output columns, and convert decisions to output columns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.decisions.labels import Decisions, decide, thresholds_by_label
from pipelines.errors import DataError
from pipelines.settings import DecisionSettings
from pipelines.storage.columns import SOURCE_COLUMNS

DECISION_METADATA, PREFIX_METADATA = b"pipelines.decision", b"pipelines.prefix"
GUARANTEES_METADATA, EARLY_EXIT_METADATA = b"pipelines.guarantees", b"pipelines.early_exit"
COLUMNS_METADATA = b"pipelines.columns"
WEIGHTS_METADATA, SETTINGS_METADATA = b"pipelines.weights_hash", b"pipelines.settings_hash"
"""Keys in the schema metadata of a scored file."""


def check_output_columns(names: Sequence[str], keep: Sequence[str], outputs: Sequence[str], *, prefix: str) -> None:
    """Check the input columns that are copied to the output.

    Args:
        names: Names of the input columns.
        keep: Names of the input columns to copy.
        outputs: Names of the output columns, with prefix.
        prefix: Prefix of the output columns, for the error message.

    Raises:
        DataError: A column to copy is missing, or has the same name as an output column.
    """
    missing = [name for name in keep if name not in names]
    if missing:
        raise DataError(
            f"--keep names {missing[0]!r}, which is not an input column; the input columns are: {', '.join(names)}"
        )
    clashes = [name for name in keep if name in outputs]
    if clashes:
        raise DataError(
            f"input column {clashes[0]!r} has the same name as an output column; exclude it with --keep "
            f"{','.join(name for name in keep if name not in outputs)!r}, or rename the outputs with --prefix "
            f"(now {prefix!r})"
        )


def output_fields(decision: DecisionSettings, *, prefix: str = "", early_exit: bool = False) -> list[pa.Field]:
    """Return the fields of the output columns in order, source columns first. The names include the prefix."""
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
        *([pa.field(prefix + "windows_read", pa.int32())] if early_exit else []),
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
    windows_read_D: NDArray[np.int64] | None = None,
    truncated_D: NDArray[np.bool_],
    errors: Sequence[str | None],
    prefix: str = "",
) -> pa.Table:
    """Build the output columns after the source columns, one row per document. Scores are null in rows with errors."""
    bad_D = np.asarray([error is not None for error in errors], dtype=bool)
    fields = output_fields(decision, prefix=prefix, early_exit=windows_read_D is not None)[len(SOURCE_COLUMNS) :]
    flat = pa.array(scores_DL.reshape(-1), pa.float32())
    columns = [
        *(column for _, column in decided_columns(decisions, decision, bad_D)),
        pa.FixedSizeListArray.from_arrays(flat, decision.num_labels, mask=pa.array(bad_D)),
        pa.array(num_tokens_D, pa.int32()),
        pa.array(num_windows_D, pa.int32()),
        *([] if windows_read_D is None else [pa.array(windows_read_D, pa.int32())]),
        pa.array(truncated_D, pa.bool_()),
        pa.array(errors, pa.string()),
    ]
    arrays = [column.cast(field.type) for column, field in zip(columns, fields, strict=True)]
    return pa.table(arrays, schema=pa.schema(fields))


def decided_columns(
    decisions: Decisions, decision: DecisionSettings, bad_D: NDArray[np.bool_], *, prefix: str = ""
) -> list[tuple[pa.Field, pa.Array]]:
    """Build the two output columns that depend on decisions: the prediction and its score. Rows in bad_D are null."""
    fields = output_fields(decision, prefix=prefix)[len(SOURCE_COLUMNS) :][:2]
    columns = (_predictions(decisions, decision.labels, bad_D), _document_score(decisions, bad_D))
    return [(field, column.cast(field.type)) for field, column in zip(fields, columns, strict=True)]


def error_columns(
    errors: Sequence[str | None], *, decision: DecisionSettings, prefix: str = "", early_exit: bool = False
) -> pa.Table:
    """Build the output columns of documents that could not be scored, one row per error."""
    nothing_DL = np.zeros((len(errors), decision.num_labels), np.float32)
    zero_D = np.zeros(len(errors), np.int64)
    return result_columns(
        decide(nothing_DL, decision, nothing_DL.astype(np.int64)),
        nothing_DL,
        decision=decision,
        num_tokens_D=zero_D,
        num_windows_D=zero_D,
        windows_read_D=zero_D if early_exit else None,
        truncated_D=zero_D.astype(bool),
        errors=errors,
        prefix=prefix,
    )


def schema_metadata(
    decision: DecisionSettings,
    *,
    weights_hash: str,
    settings_hash: str,
    prefix: str = "",
    guarantees: Mapping[str, Any] | None = None,
    early_exit: str = "off",
    columns: Mapping[str, Any] | None = None,
) -> dict[bytes, bytes]:
    """Return the schema metadata of a scored file.

    It has the hashes of model and settings, the prefix, the decision settings, what is promised of the thresholds, how
    documents stopped early, and the columns on which the model was trained.
    """
    hashes = {WEIGHTS_METADATA: weights_hash.encode(), SETTINGS_METADATA: settings_hash.encode()}
    promises = {GUARANTEES_METADATA: json.dumps(dict(guarantees)).encode()} if guarantees else {}
    stops = {} if early_exit == "off" else {EARLY_EXIT_METADATA: early_exit.encode()}
    trained = {COLUMNS_METADATA: json.dumps(dict(columns)).encode()} if columns else {}
    return {**hashes, PREFIX_METADATA: prefix.encode(), **promises, **stops, **trained, **decision_metadata(decision)}


def decision_metadata(decision: DecisionSettings) -> dict[bytes, bytes]:
    """Return the schema metadata that describes how scores became labels."""
    values = {
        b"pipelines.kind": decision.kind,
        b"pipelines.labels": json.dumps(decision.labels),
        b"pipelines.thresholds": json.dumps(thresholds_by_label(decision)),
        b"pipelines.merge": decision.merge,
        DECISION_METADATA: json.dumps(dataclasses.asdict(decision)),
    }
    return {name: value.encode() for name, value in values.items()}


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
