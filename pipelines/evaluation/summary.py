"""Say in a sentence how good a classifier is, and beside which constant answer.

Shapes: D documents, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.decisions.labels import Decisions, thresholds_by_label
from pipelines.settings import NEVER, DecisionSettings


def sentence(
    targets: NDArray[np.generic], decisions: Decisions, decision: DecisionSettings, metrics: Mapping[str, Any]
) -> str:
    """Return what the decisions are worth, for people who do not know the metrics' names.

    Args:
        targets: Targets from `labels.encode_labels`.
        decisions: Decisions for the same documents.
        decision: Decision settings.
        metrics: Metrics from `metrics.evaluate`.
    """
    if decisions.value_D is not None:
        truth_D = targets.astype(float)
        mean_error, spread = metrics["mae"], float(np.abs(truth_D - np.median(truth_D)).mean())
        return (
            f"On {len(targets):,} documents, the value is wrong by {mean_error:.4g} on average (mean absolute error). "
            f"Always answering the median would be wrong by {spread:.4g}."
        )
    if decisions.positive_DL is not None:
        return _of_many_labels(targets.astype(bool), decisions.positive_DL, metrics)
    assert decisions.label_D is not None
    target_D, label_D = targets.astype(np.int64), decisions.label_D
    if decision.kind == "binary":
        return _of_two_labels(target_D == 1, label_D == 1, decision, metrics)
    most = np.bincount(target_D, minlength=len(decision.labels))
    abstained = float((label_D < 0).mean())
    return (
        f"{_percent(float((target_D == label_D).mean()))} of {len(target_D):,} documents get their label "
        f"(one of {len(decision.labels)}), MCC {metrics['mcc']:.3f}. "
        f"Always answering {decision.labels[int(most.argmax())]} would be right for "
        f"{_percent(float(most.max() / max(len(target_D), 1)))}."
        + (f" {_percent(abstained)} get no label." if abstained else "")
    )


def uselessness(targets: NDArray[np.generic], decisions: Decisions, decision: DecisionSettings) -> str | None:
    """Return why the decisions are worth no more than a constant answer. None if they are worth more."""
    if len(targets) < 2:
        return None
    if decisions.value_D is not None:
        truth_D = targets.astype(float)
        if float(((decisions.value_D - truth_D) ** 2).mean()) < float(truth_D.var()):
            return None
        return "its values are no better than the mean of all values"
    if decisions.positive_DL is not None:
        if not decisions.positive_DL.any():
            return "it assigns no label to any document"
        same = bool((decisions.positive_DL == decisions.positive_DL[0]).all())
        return "it assigns the same labels to every document" if same and len(np.unique(targets, axis=0)) > 1 else None
    assert decisions.label_D is not None
    found = np.unique(decisions.label_D)
    if len(found) > 1 or len(np.unique(targets)) < 2:
        return None
    return "it gives no document a label" if found[0] < 0 else f"it calls every document {decision.labels[found[0]]!r}"


def _of_two_labels(
    true_D: NDArray[np.bool_], found_D: NDArray[np.bool_], decision: DecisionSettings, metrics: Mapping[str, Any]
) -> str:
    label, hits = decision.labels[1], float((true_D & found_D).sum())
    threshold = thresholds_by_label(decision).get(label)
    if not true_D.any():
        return f"None of {len(true_D):,} documents is {label}; {_percent(float(found_D.mean()))} are called so."
    called = (
        f"{_percent(hits / found_D.sum())} of what it calls {label} is {label} (precision)"
        if found_D.any()
        else f"it calls no document {label}"
    )
    at = f"; threshold {threshold:.4g}" if threshold not in (None, NEVER) else ""
    return (
        f"Of {len(true_D):,} documents, {_percent(float(true_D.mean()))} are {label}. The classifier finds "
        f"{_percent(hits / float(true_D.sum()))} of them (recall), and {called}. MCC {metrics['mcc']:.3f}{at}."
    )


def _of_many_labels(true_DL: NDArray[np.bool_], found_DL: NDArray[np.bool_], metrics: Mapping[str, Any]) -> str:
    hits, exact = float((true_DL & found_DL).sum()), float((true_DL == found_DL).all(axis=1).mean())
    return (
        f"{len(true_DL):,} documents have {true_DL.sum() / len(true_DL):.3g} of {true_DL.shape[1]} labels each. "
        f"The classifier finds {_percent(hits / max(float(true_DL.sum()), 1))} of them (recall), "
        f"{_percent(hits / max(float(found_DL.sum()), 1))} of the labels that it gives are right (precision), and "
        f"{_percent(exact)} of the documents have exactly their labels. F1 {metrics['f1_micro']:.3f} (micro)."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
