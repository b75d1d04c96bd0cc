"""Find the labels in data, encode label columns as training targets, and turn scores into decisions.

This is the only module that compares scores with thresholds, breaks tied votes, or converts logits to probabilities.
Imports neither torch nor Ray.

Shapes: D documents, W windows, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.errors import DataError, SettingsError
from pipelines.settings import UNCALIBRATED, Calibration, DecisionSettings, Kind
from pipelines.text.windows import merge_windows

DEFAULT_THRESHOLD = 0.5
"""Default threshold of a label."""

MISSING_WORDS = frozenset({"nan", "none", "null", "na", "n/a", "<na>"})
"""What libraries write where a value is missing, in lower case."""


@dataclass(frozen=True)
class Decisions:
    """Decisions for D documents. The kind determines which one of label_D, positive_DL and value_D is set."""

    label_D: NDArray[np.int64] | None = None
    """binary and multiclass: label id, or -1 for no label (the best score is below abstain_below)."""
    positive_DL: NDArray[np.bool_] | None = None
    """multilabel: whether each label is assigned."""
    value_D: NDArray[np.float32] | None = None
    """regression: the predicted value."""
    score_D: NDArray[np.float32] | None = None
    """binary and multiclass: document score of the decided label, or NaN for no label."""


@dataclass(frozen=True)
class Scaling:
    """Standardization of regression labels, so that a network learns numbers around 0: (label - mean) / scale."""

    mean: float = 0.0
    scale: float = 1.0
    """A power of two, so that weights do not change when they are multiplied and then divided by it."""

    @classmethod
    def of(cls, targets: NDArray[np.generic]) -> Scaling:
        """Return the labels' mean, and a power of two close to their standard deviation (1 if all labels are equal)."""
        values = targets.astype(np.float64)
        return cls(float(values.mean()), 2.0 ** round(math.log2(values.std())) if values.std() > 0 else 1.0)


def find_labels(columns: list[pa.ChunkedArray], kind: Kind) -> tuple[str, ...]:
    """Return the label names that occur in the columns, sorted. Numbers are sorted by value.

    Lists of 0 and 1 give the names "0" to "L-1". Regression has no labels.

    Args:
        columns: The label columns of all files.
        kind: Kind of task.

    Raises:
        DataError: A label is null or empty, the column type cannot be a label, or too few labels occur. At least 2 are
            required, or 1 for multilabel.
    """
    if kind == "regression":
        return ()
    column = _plain(pa.chunked_array([chunk for column in columns for chunk in column.chunks]))
    _reject_missing(column)
    if kind == "multilabel" and _is_indicator(column.type):
        width = pc.max(pc.list_value_length(column)).as_py() or 0
        return tuple(str(label) for label in range(width))
    values = pc.list_flatten(column) if _is_list(column.type) else column
    labels = tuple(str(value) for value in sorted(_check_label_type(values, kind).unique().to_pylist()))
    if not labels:
        raise DataError("no row has a label; if that is intended, name the labels with --labels")
    if len(labels) < 2 and kind != "multilabel":
        raise DataError(f"the labels are all {labels[0]!r}: a classifier needs at least two different labels")
    return labels


def odd_labels(labels: Sequence[str], kind: Kind) -> list[str]:
    """Return a sentence for each oddity of label names that suggests a mistake in the data."""
    remedy = "split them" if kind == "multilabel" else "use kind multilabel"
    found = []
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(label.strip().casefold(), []).append(label)
    for same in alike.values():
        if len(same) > 1:
            found.append(
                f"labels {', '.join(map(repr, same))} differ only in case or spaces, and are learned as different"
            )
    missing = [label for label in labels if label.strip().casefold() in MISSING_WORDS]
    if missing:
        found.append(
            f"label {missing[0]!r} looks like a missing value that became a text; if it is one, drop or label its rows"
        )
    for mark in (";", "|", ","):
        several = [
            label for label in labels if mark in label and {part.strip() for part in label.split(mark)} <= {*labels}
        ]
        if several:
            found.append(
                f"{len(several)} labels, such as {several[0]!r}, look like several labels in one text; if they are, "
                f"{remedy}"
            )
    return found


def encode_labels(column: pa.ChunkedArray, decision: DecisionSettings) -> NDArray[np.generic]:
    """Convert a label column to training targets.

    Returns:
        binary and multiclass: label ids, int64 (D,). multilabel: 0 and 1, float32 (D, L). regression: values,
        float32 (D,).

    Raises:
        DataError: A label is null, empty, NaN or not in decision.labels (the message names it), or the kind cannot use
            the column type.
    """
    column = _plain(column)
    _reject_missing(column)
    if decision.kind == "regression":
        return _regression_targets(column)
    if decision.kind == "multilabel":
        return _multilabel_targets(column, decision.labels)
    values = _check_label_type(column, decision.kind)
    return _label_ids(values, decision.labels)


def activate(
    logits_WL: NDArray[np.floating], kind: Kind, calibration: Calibration = UNCALIBRATED
) -> NDArray[np.float32]:
    """Convert logits to probabilities.

    The calibration changes the logits first. Then binary and multiclass use softmax, and multilabel uses sigmoid. For
    regression, the logits are returned unchanged.
    """
    if kind == "regression":
        return np.asarray(logits_WL, dtype=np.float32)
    logits = np.asarray(logits_WL, dtype=np.float64) / calibration.temperature
    if calibration.scales:
        logits = logits * calibration.scales + calibration.biases
    if kind == "multilabel":
        halves = np.exp(-np.abs(logits))  # at most 1: no overflow for large negative logits
        return np.asarray(np.where(logits >= 0, 1.0, halves) / (1.0 + halves), dtype=np.float32)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float32)


def merged_scores(
    logits_WL: NDArray[np.float32],
    offsets: NDArray[np.int64],
    decision: DecisionSettings,
    calibration: Calibration = UNCALIBRATED,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the merged scores of documents (D, L), and the scores of their windows (W, L).

    Args:
        logits_WL: Logits of windows.
        offsets: Document d owns the windows from offsets[d] up to but excluding offsets[d + 1].
        decision: Decision settings.
        calibration: How logits are changed before they become probabilities.
    """
    window_scores_WL = activate(logits_WL, decision.kind, calibration)
    return merge_windows(window_scores_WL, offsets, "max" if decision.merge == "max" else "mean"), window_scores_WL


def resolve_thresholds(
    thresholds: float | tuple[float, ...] | Mapping[str, float] | None, decision: DecisionSettings
) -> DecisionSettings:
    """Return the decision settings with other thresholds.

    Args:
        thresholds: One number, one number per label, or a mapping from label names to numbers. Labels that are not in
            the mapping keep their thresholds. None keeps all thresholds, and so do numbers that are the same.
        decision: Decision settings to change.

    Raises:
        SettingsError: The thresholds do not fit the labels.
    """
    if thresholds is None:
        return decision
    if isinstance(thresholds, Mapping):
        thresholds = _thresholds_by_name(thresholds, decision)
    changed = replace(decision, thresholds=thresholds)
    is_same = thresholds_by_label(changed) == thresholds_by_label(decision)
    return decision if is_same else changed


def thresholds_by_label(decision: DecisionSettings) -> dict[str, float]:
    """Return the thresholds in effect, by the label that each decides. Empty if there are none.

    The numbers are those of the settings, not rounded to float32.
    """
    named = {"binary": decision.labels[-1:], "multilabel": decision.labels}.get(decision.kind, ())
    default = DEFAULT_THRESHOLD if decision.kind == "multilabel" else None
    given = default if decision.thresholds is None else decision.thresholds
    if given is None:
        return {}
    return dict(zip(named, given if isinstance(given, tuple) else (given,) * len(named), strict=True))


def decide(
    scores_DL: NDArray[np.float32], decision: DecisionSettings, votes_DL: NDArray[np.int64] | None = None
) -> Decisions:
    """Turn document scores into decisions.

    Thresholds are compared as float32 with >=. A binary threshold replaces vote and argmax.

    Args:
        scores_DL: Document scores.
        decision: Decision settings.
        votes_DL: Votes for each label (`windows.count_votes`). Required for merge=vote without a threshold.
    """
    if decision.kind == "regression":
        return Decisions(value_D=scores_DL.reshape(-1))
    thresholds = np.asarray(list(thresholds_by_label(decision).values()), dtype=np.float32)
    if decision.kind == "multilabel":
        return Decisions(positive_DL=scores_DL >= thresholds)
    if len(thresholds):
        label_D = (scores_DL[:, 1] >= thresholds[0]).astype(np.int64)
    elif decision.merge == "vote":
        assert votes_DL is not None
        label_D = _winners(votes_DL, decision.tie_value)
    else:
        label_D = scores_DL.argmax(axis=1)
    score_D = np.take_along_axis(scores_DL, label_D[:, None], axis=1)[:, 0]
    if decision.abstain_below is not None:
        abstain_D = scores_DL.max(axis=1, initial=-np.inf) < np.float32(decision.abstain_below)
        label_D = np.where(abstain_D, -1, label_D)
        score_D = np.where(abstain_D, np.float32(np.nan), score_D)
    return Decisions(label_D=label_D, score_D=score_D)


def _winners(votes_DL: NDArray[np.int64], tie_value: int) -> NDArray[np.int64]:
    """Return the label with the most votes for each document, or tie_value if the two highest counts are equal."""
    ranked_DL = np.sort(votes_DL, axis=1)
    tied_D = ranked_DL[:, -1] == ranked_DL[:, -2]
    return np.where(tied_D, tie_value, votes_DL.argmax(axis=1))


def _thresholds_by_name(thresholds: Mapping[str, float], decision: DecisionSettings) -> float | tuple[float, ...]:
    named = decision.labels[-1:] if decision.kind == "binary" else decision.labels
    unknown = sorted(set(thresholds) - set(named))
    if unknown:
        raise SettingsError(f"thresholds names {unknown[0]!r}; allowed labels: {', '.join(named) or 'none'}")
    merged = {**dict.fromkeys(named, DEFAULT_THRESHOLD), **thresholds_by_label(decision), **thresholds}
    return tuple(float(value) for value in merged.values())


def _reject_missing(column: pa.ChunkedArray) -> None:
    """Raise DataError if a row has no label: null, or a text without a character, as in an empty cell of CSV."""
    values, rows = column, None
    if not column.null_count and _is_list(column.type):
        values, rows = pc.list_flatten(column), pc.list_parent_indices(column)
    _reject_bytes(values, rows)
    missing = values.is_null()
    if _is_string(values.type):
        missing = pc.or_kleene(missing, pc.equal(pc.utf8_trim_whitespace(values), ""))
    positions = np.flatnonzero(missing.to_numpy(zero_copy_only=False).astype(bool))
    if not len(positions):
        return
    row = positions[0] if rows is None else rows[int(positions[0])].as_py()
    what = "no label" if rows is None else "an empty label"
    count = len(positions) if rows is None else len(np.unique(rows.to_numpy(zero_copy_only=False)[positions]))
    raise DataError(f"{count} rows have {what} (the first is row {row}); drop or label them")


def _reject_bytes(values: pa.ChunkedArray, rows: pa.ChunkedArray | None) -> None:
    """Raise DataError if a label is not valid UTF-8: files of some writers have such strings."""
    if not _is_string(values.type):
        return
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        for place, value in enumerate(values.cast(pa.large_binary()).to_pylist()):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                row = place if rows is None else rows[place].as_py()
                raise DataError(f"row {row}: the label is not valid UTF-8; convert the file to UTF-8") from error


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the column with dictionaries decoded, views of strings as strings, and decimals as floats.

    Lists without a value type (all empty) become lists of strings.
    """
    if pa.types.is_string_view(column.type):
        return column.cast(pa.large_string())
    if pa.types.is_decimal(column.type):  # numbers of databases
        return column.cast(pa.float64())
    if _is_list(column.type) and pa.types.is_string_view(column.type.value_type):
        return column.cast(pa.large_list(pa.large_string()))
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    if _is_list(column.type) and pa.types.is_dictionary(column.type.value_type):
        return column.cast(pa.list_(column.type.value_type.value_type))
    if _is_list(column.type) and pa.types.is_null(column.type.value_type):
        return column.cast(pa.list_(pa.string()))
    return column


def _check_label_type(column: pa.ChunkedArray, kind: Kind) -> pa.ChunkedArray:
    if pa.types.is_floating(column.type):
        return _floats_as_ints(column, kind)
    if not (pa.types.is_integer(column.type) or pa.types.is_boolean(column.type) or _is_string(column.type)):
        if kind == "multilabel":
            raise DataError(_not_a_list(column))
        hint = "; a list of labels is kind multilabel" if _is_list(column.type) else ""
        raise DataError(f"the label column has type {column.type}; kind {kind} takes int or string{hint}")
    return column.cast(pa.int64()) if pa.types.is_boolean(column.type) else column


def _floats_as_ints(column: pa.ChunkedArray, kind: Kind) -> pa.ChunkedArray:
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(
            f"the label column contains numbers that are not whole label ids (NaN or fractions); "
            f"kind {kind} takes int or string labels, and kind regression takes numbers"
        ) from error


def _label_ids(values: pa.ChunkedArray, labels: tuple[str, ...]) -> NDArray[np.int64]:
    texts = values.cast(pa.string())
    ids = pc.index_in(texts, value_set=pa.array(labels, pa.string()))
    if ids.null_count:
        unknown = texts.filter(ids.is_null()).unique().to_pylist()
        shown = ", ".join(repr(label) for label in unknown[:5])
        raise DataError(f"labels outside the label set: {shown}; the set is: {', '.join(labels)}")
    return np.asarray(ids.to_numpy(), dtype=np.int64)


def _multilabel_targets(column: pa.ChunkedArray, labels: tuple[str, ...]) -> NDArray[np.float32]:
    if not _is_list(column.type):
        raise DataError(_not_a_list(column))
    lengths = pc.list_value_length(column).to_numpy()
    flat = pc.list_flatten(column)
    targets = np.zeros((len(column), len(labels)), dtype=np.float32)
    if _is_indicator(column.type):
        if (lengths != len(labels)).any():
            row = int(np.flatnonzero(lengths != len(labels))[0])
            raise DataError(f"row {row} has {lengths[row]} label values; there are {len(labels)} labels")
        values: NDArray[np.float32] = flat.to_numpy().astype(np.float32)
        if not np.isin(values, (0, 1)).all():
            raise DataError("a 0/1 label list contains values other than 0 and 1")
        return values.reshape(targets.shape)
    rows = np.repeat(np.arange(len(column)), lengths)
    targets[rows, _label_ids(_check_label_type(flat, "multilabel"), labels)] = 1
    return targets


def _regression_targets(column: pa.ChunkedArray) -> NDArray[np.float32]:
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise DataError(f"the label column has type {column.type}; kind regression takes numbers")
    values: NDArray[np.float32] = column.to_numpy().astype(np.float32)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(f"the label of row {row} is {values[row]}; kind regression needs finite numbers")
    return values


def _not_a_list(column: pa.ChunkedArray) -> str:
    """Return why a column cannot be the labels of kind multilabel, and how to make one that can."""
    problem = f"the label column has type {column.type}; kind multilabel takes list<string> or a 0/1 list"
    if not _is_string(column.type):
        return f"{problem}. For one column with 0 or 1 for each label: --label-columns A,B,C"
    texts = [text for text in column.slice(0, 1000).to_pylist() if text]
    marks = ("; ", ";", "|", ", ", ",")
    first, mark = next(((text, mark) for mark in marks for text in texts if mark in text), ("a;b", ";"))
    return (
        f"{problem}. To split texts such as {first[:40] + '...' * (len(first) > 40)!r}: frame['label'] = "
        f"frame['label'].fillna('').str.split({mark!r}).map(lambda names: [name for name in names if name]), and write "
        "the frame with to_parquet. For one column with 0 or 1 for each label: --label-columns A,B,C"
    )


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_indicator(kind: pa.DataType) -> bool:
    """Return whether a list type contains numbers (a list of 0 and 1) instead of label names."""
    of = kind.value_type if _is_list(kind) else kind
    is_number = pa.types.is_integer(of) or pa.types.is_floating(of) or pa.types.is_boolean(of)
    return _is_list(kind) and bool(is_number)
