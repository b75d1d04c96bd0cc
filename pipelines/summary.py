"""What a scored output says of itself: counts, score histograms and positive rates, which add up over its files.

Knows Arrow tables of output columns; no files, no models, no torch, no ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.settings import DecisionSettings

HISTOGRAM_BINS = 20
MOST_ERRORS = 20


def summarize(table: pa.Table, decision: DecisionSettings, *, prefix: str = "") -> dict[str, Any]:
    """What the summary says of one output file; parts add up with `add_parts`.

    Histograms count document scores in 20 equal bins of [0, 1], per label.
    """
    error = table.column(prefix + "error")
    part: dict[str, Any] = {
        "units": 1,
        "rows_out": len(table),
        "rows_in_error": len(table) - error.null_count,
        "errors": _error_kinds(error),
        "rows_truncated": int(np.sum(table.column(prefix + "truncated").to_numpy())),
        "tokens": int(np.sum(table.column(prefix + "num_tokens").to_numpy())),
        "windows": int(np.sum(table.column(prefix + "num_windows").to_numpy())),
    }
    if decision.kind == "regression":
        return part
    good = table.filter(error.is_null())
    scores_DL = np.asarray(good.column(prefix + "scores").combine_chunks().flatten()).reshape(-1, decision.num_labels)
    part["histograms"] = histograms_of(scores_DL, decision)
    name = "predicted_labels" if decision.kind == "multilabel" else "predicted_label"
    column = good.column(prefix + name).combine_chunks()
    values = column.flatten() if decision.kind == "multilabel" else column
    counts = {item["values"]: item["counts"] for item in values.value_counts().to_pylist()}
    part["positives"] = {label: int(counts.get(label, 0)) for label in decision.labels}
    return part


def histograms_of(scores_DL: NDArray[np.float32], decision: DecisionSettings) -> dict[str, list[int]]:
    """How many scores of each label lie in each of 20 equal bins of [0, 1]; none for regression."""
    return {
        label: np.histogram(scores_DL[:, column], HISTOGRAM_BINS, (0, 1))[0].tolist()
        for column, label in enumerate(decision.labels)
    }


def empty_part(decision: DecisionSettings) -> dict[str, Any]:
    """What a unit without rows adds: every key of the sum."""
    names = ("units", "rows_in", "rows_filtered", "rows_out", "rows_in_error", "rows_truncated", "tokens", "windows")
    part: dict[str, Any] = {**dict.fromkeys(names, 0), "errors": {}, "seconds": {}}
    if decision.kind != "regression":
        part["histograms"] = {label: [0] * HISTOGRAM_BINS for label in decision.labels}
        part["positives"] = dict.fromkeys(decision.labels, 0)
    return part


def add_parts(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum of parts: numbers and lists of numbers add, mappings add by key."""
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = _add(total[key], value) if key in total else value
    return total


def finish_summary(total: dict[str, Any], decision: DecisionSettings) -> dict[str, Any]:
    """What _summary.json says of all parts: shares instead of counts of positives, the commonest errors."""
    scored = max(total["rows_out"] - total["rows_in_error"], 1)
    rates = {label: count / scored for label, count in total.get("positives", {}).items()}
    commonest = sorted(total["errors"].items(), key=lambda item: -item[1])[:MOST_ERRORS]
    seconds = {name: round(value, 2) for name, value in total["seconds"].items()}
    rest = {name: value for name, value in total.items() if name != "positives"}
    shares = {"positive_rates": rates} if decision.kind != "regression" else {}
    return {**rest, "errors": dict(commonest), "seconds": seconds, **shares}


def _error_kinds(error: pa.ChunkedArray) -> dict[str, int]:
    """How many rows have each error, without what a message adds in parentheses."""
    counts = error.drop_null().value_counts().to_pylist()
    return add_parts([{item["values"].partition(" (")[0]: item["counts"]} for item in counts])


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, dict):
        both = {key: _add(left[key], right[key]) for key in left.keys() & right.keys()}
        return {**left, **right, **both}
    if isinstance(left, list):
        return [_add(first, second) for first, second in zip(left, right, strict=True)]
    return left + right
