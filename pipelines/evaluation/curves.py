"""Curves over the threshold of a label, and the numbers of each label.

Shapes: D documents, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.decisions.calibration import reliability
from pipelines.decisions.labels import Decisions, thresholds_by_label
from pipelines.decisions.metrics import EXACT_SCORES, SCORE_DECIMALS, curve_areas
from pipelines.settings import NEVER, DecisionSettings

RECALLS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""Recalls whose thresholds are shown."""


def curve(positive_D: NDArray[np.bool_], score_D: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    """Compute precision, recall and false positive rate at every threshold, from the highest score down.

    Args:
        positive_D: Whether the label holds for each document, (D,).
        score_D: Score of the label, (D,). More than EXACT_SCORES scores are rounded to SCORE_DECIMALS decimals.

    Returns:
        Arrays named threshold, precision, recall and false_positive_rate, with one value per distinct score. A
        threshold selects all documents with equal scores, or none of them.
    """
    if len(score_D) > EXACT_SCORES:
        score_D = np.round(score_D, SCORE_DECIMALS)
    order = np.argsort(-score_D, kind="stable")
    ranked, hits = score_D[order], np.cumsum(positive_D[order])
    last = np.append(ranked[1:] != ranked[:-1], True)
    true, chosen = hits[last].astype(float), (np.flatnonzero(last) + 1).astype(float)
    return {
        "threshold": ranked[last].astype(float),
        "precision": true / chosen,
        "recall": true / max(positive_D.sum(), 1),
        "false_positive_rate": (chosen - true) / max((~positive_D).sum(), 1),
    }


def thresholds_of_recalls(found: dict[str, NDArray[np.float64]], recalls: Sequence[float] = RECALLS) -> list[float]:
    """Return the highest threshold that reaches each recall, without repetitions, from the lowest up.

    Args:
        found: A curve.
        recalls: The recalls to reach.
    """
    index = np.searchsorted(found["recall"], np.asarray(recalls) - 1e-9)
    return sorted(set(found["threshold"][np.minimum(index, len(found["threshold"]) - 1)].tolist()))


def threshold_costs(
    positive_D: NDArray[np.bool_], score_D: NDArray[np.float32], thresholds: Sequence[float]
) -> list[dict[str, float]]:
    """Return the effect of each threshold on one label.

    Args:
        positive_D: Whether the label holds for each document, (D,).
        score_D: Score of the label, (D,).
        thresholds: A document is selected if its score is at least the threshold.

    Returns:
        One row per threshold: threshold, taken (share of documents that are selected), precision, recall, f1, and the
        numbers of false positives and false negatives.
    """
    rows = []
    for threshold in thresholds:
        taken_D = score_D >= np.float32(threshold)
        true, false, missed = (
            int(both.sum()) for both in (taken_D & positive_D, taken_D & ~positive_D, ~taken_D & positive_D)
        )
        rows.append(
            {
                "threshold": float(threshold),
                "taken": float(taken_D.mean()),
                "precision": true / max(true + false, 1),
                "recall": true / max(true + missed, 1),
                "f1": 2 * true / max(2 * true + false + missed, 1),
                "false positives": false,
                "false negatives": missed,
            }
        )
    return rows


def label_rows(
    targets: NDArray[np.generic],
    scores_DL: NDArray[np.float32],
    decisions: Decisions,
    decision: DecisionSettings,
    metrics: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return the numbers of each label: rows, precision, recall, F1, areas, calibration error and threshold.

    The most frequent labels come first. The list is empty for regression. What is undefined is None: areas and the
    calibration error of a label that all rows or none have, the precision of one that is never predicted.

    Args:
        targets: Targets from `labels.encode_labels`.
        scores_DL: Document scores.
        decisions: Decisions for the same documents.
        decision: Decision settings.
        metrics: Their metrics (`metrics.evaluate`). Areas that are there are not computed again.
    """
    if decision.kind == "regression":
        return []
    thresholds, rows = thresholds_by_label(decision), []
    for column, label in enumerate(decision.labels):
        positive_D, score_D = positives(targets, decision, column), scores_DL[:, column]
        if decisions.positive_DL is not None:
            taken_D = decisions.positive_DL[:, column]
        else:
            assert decisions.label_D is not None
            taken_D = decisions.label_D == column
        hits, has_both = int((positive_D & taken_D).sum()), bool(positive_D.any() and not positive_D.all())
        num_rows, num_taken = int(positive_D.sum()), int(taken_D.sum())
        threshold, known = thresholds.get(label), metrics.get("per_label", {}).get(label, {})
        rows.append(
            {
                "label": label,
                "rows": num_rows,
                "predicted": num_taken,
                "precision": hits / num_taken if num_taken else None,
                "recall": hits / num_rows if num_rows else None,
                "f1": 2 * hits / (num_rows + num_taken) if num_rows + num_taken else None,
                "auprc": known["auprc"] if "auprc" in known else curve_areas(positive_D, score_D)["auprc"],
                "calibration error": reliability(positive_D, score_D)[1] if has_both else None,
                "threshold": "never" if threshold == NEVER else threshold,
            }
        )
    return sorted(rows, key=lambda row: (-row["rows"], row["label"]))


def positives(targets: NDArray[np.generic], decision: DecisionSettings, column: int) -> NDArray[np.bool_]:
    """Return whether a label, given by index, holds for each document, (D,)."""
    if decision.kind == "multilabel":
        return np.asarray(targets[:, column] == 1)
    return np.asarray(targets == column)
