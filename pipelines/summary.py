"""What a scored output says of itself: counts, score histograms and positive rates, which add up over its files.

Knows Arrow tables of output columns; no files, no models, no torch, no ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.settings import DecisionSettings

HISTOGRAM_BINS = 20


def summarize(table: pa.Table, decision: DecisionSettings, *, prefix: str = "") -> dict[str, Any]:
    """What the summary says of one output file; parts add up with `add_parts`.

    Histograms count document scores in 20 equal bins of [0, 1], per label.
    """
    error = table.column(prefix + "error")
    part: dict[str, Any] = {
        "rows_out": len(table),
        "rows_in_error": len(table) - error.null_count,
        "rows_truncated": int(np.sum(table.column(prefix + "truncated").to_numpy())),
        "tokens": int(np.sum(table.column(prefix + "num_tokens").to_numpy())),
        "windows": int(np.sum(table.column(prefix + "num_windows").to_numpy())),
    }
    if decision.kind == "regression":
        return part
    good = table.filter(error.is_null())
    scores_DL = np.asarray(good.column(prefix + "scores").combine_chunks().flatten()).reshape(-1, decision.num_labels)
    part["histograms"] = {
        label: np.histogram(scores_DL[:, column], HISTOGRAM_BINS, (0, 1))[0].tolist()
        if len(good)
        else [0] * HISTOGRAM_BINS
        for column, label in enumerate(decision.labels)
    }
    name = "predicted_labels" if decision.kind == "multilabel" else "predicted_label"
    column = good.column(prefix + name).combine_chunks()
    values = column.flatten() if decision.kind == "multilabel" else column
    counts = {item["values"]: item["counts"] for item in values.value_counts().to_pylist()}
    part["positives"] = {label: int(counts.get(label, 0)) for label in decision.labels}
    return part


def add_parts(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum of parts: numbers and lists of numbers add, mappings add by key."""
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = _add(total[key], value) if key in total else value
    return total


def finish_summary(
    total: dict[str, Any], decision: DecisionSettings, *, rows_in: int, seconds: float
) -> dict[str, Any]:
    """The content of _summary.json."""
    scored = max(rows_in - total["rows_in_error"], 1)
    rates = {label: count / scored for label, count in total.pop("positives", {}).items()}
    return {
        "rows_in": rows_in,
        **total,
        "seconds": round(seconds, 2),
        "rows_per_second": round(rows_in / seconds, 2),
        **({"positive_rates": rates} if decision.kind != "regression" else {}),
    }


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, dict):
        return {key: _add(left[key], right[key]) for key in left}
    if isinstance(left, list):
        return [_add(first, second) for first, second in zip(left, right, strict=True)]
    return left + right
