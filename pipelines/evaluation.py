"""How good scores are: metrics, and the thresholds that serve an objective best.

What follows from counts is computed from a confusion matrix, which adds up over shards; curves and ranks come
from scikit-learn. Knows no model, no torch, no ray.

Shapes: D documents, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import SettingsError
from pipelines.labels import DEFAULT_THRESHOLD, Decisions, thresholds_by_label
from pipelines.settings import DecisionSettings

HEADLINE = {"binary": "mcc", "multiclass": "mcc", "multilabel": "f1_macro", "regression": "rmse"}
"""The metric by which evaluations are compared, unless another is asked for."""
METRICS = {
    "binary": ("mcc", "accuracy", "f1_score", "tp", "tn", "fp", "fn", "auroc", "auprc"),
    "multiclass": ("mcc", "accuracy", "f1_macro", "f1_weighted"),
    "multilabel": ("lrap", "f1_micro", "f1_macro", "per_label"),
    "regression": ("mae", "rmse", "pearson", "r2"),
}
"""What `evaluate` returns for each kind."""
FEWEST_POSITIVES = 10
"""Of a label's own threshold; with fewer, chance would set it."""
EXACT_SCORES = 10_000_000
"""More scores than that are rounded to SCORE_DECIMALS for a curve, which then is one of a histogram."""
SCORE_DECIMALS = 4
LESS_IS_BETTER = frozenset({"loss", "eval_loss", "mae", "rmse", "fp", "fn"})


def evaluate(
    targets: NDArray[np.generic], scores_DL: NDArray[np.float32], decisions: Decisions, decision: DecisionSettings
) -> dict[str, Any]:
    """Metrics of decisions and scores against targets (`labels.encode_labels`), as JSON-ready numbers.

    binary: mcc, accuracy, f1_score (macro), tp, tn, fp, fn, auroc, auprc. multiclass: mcc, accuracy, f1_macro,
    f1_weighted. multilabel: lrap, f1_micro, f1_macro, per_label. regression: mae, rmse, pearson, r2. A metric that
    is undefined on the data (one class only, say) is None.
    """
    if decisions.value_D is not None:
        return _regression(targets.astype(np.float64), decisions.value_D.astype(np.float64))
    if decisions.positive_DL is not None:
        return _multilabel(targets, scores_DL, decisions.positive_DL, decision.labels)
    assert decisions.label_D is not None
    matrix = confusion_matrix(targets.astype(np.int64), decisions.label_D, len(decision.labels))
    if decision.kind == "binary":
        return {**_binary(matrix), **curve_areas(targets == 1, scores_DL[:, 1])}
    f1_L, support_L = f1_per_label(matrix), matrix.sum(axis=1)
    return {
        "mcc": matthews(matrix),
        "accuracy": accuracy(matrix),
        "f1_macro": float(f1_L.mean()),
        "f1_weighted": float(f1_L @ support_L / max(support_L.sum(), 1)),
    }


def confusion_matrix(target_D: NDArray[np.int64], label_D: NDArray[np.int64], num_labels: int) -> NDArray[np.int64]:
    """Counts (L, L + 1): rows are the truth, columns what was decided, the last one where nothing was.

    Adds up over parts of the data.
    """
    column_D = np.where(label_D < 0, num_labels, label_D)
    cells = np.bincount(target_D * (num_labels + 1) + column_D, minlength=num_labels * (num_labels + 1))
    return cells.reshape(num_labels, num_labels + 1)


def accuracy(matrix: NDArray[np.int64]) -> float:
    """Share of rows decided right."""
    return float(np.trace(matrix) / max(matrix.sum(), 1))


def f1_per_label(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    """F1 (L,) of each label, 0 where it neither occurs nor is predicted."""
    hits = np.diag(matrix)
    f1_L: NDArray[np.float64] = 2.0 * hits / np.maximum(matrix.sum(axis=1) + matrix.sum(axis=0)[:-1], 1)
    return f1_L


def matthews(matrix: NDArray[np.int64]) -> float:
    """Matthews correlation for any number of labels (Gorodkin 2004); 0 where truth or decision is constant."""
    counts = matrix.astype(np.float64)
    total, right = counts.sum(), np.trace(counts)
    true_L, decided = counts.sum(axis=1), counts.sum(axis=0)
    covariance = right * total - true_L @ decided[:-1]
    spread = (total**2 - decided @ decided) * (total**2 - true_L @ true_L)
    return float(covariance / math.sqrt(spread)) if spread > 0 else 0.0


def curve_areas(positive_D: NDArray[np.bool_], score_D: NDArray[np.float32]) -> dict[str, float | None]:
    """Areas under the ROC and the precision-recall curve (average precision); None with one class only.

    With more than EXACT_SCORES they are of a histogram, whose number of bins is then there as histogram_bins.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score  # a second of imports, only where needed

    if positive_D.all() or not positive_D.any():
        return {"auroc": None, "auprc": None}
    count_D: NDArray[np.int64] | None = None
    named = {}
    if len(score_D) > EXACT_SCORES:
        positive_D, score_D, count_D = _histogram(positive_D, score_D)
        named = {"histogram_bins": 10**SCORE_DECIMALS + 1}
    return {
        "auroc": float(roc_auc_score(positive_D, score_D, sample_weight=count_D)),
        "auprc": float(average_precision_score(positive_D, score_D, sample_weight=count_D)),
        **named,
    }


def _histogram(
    positive_D: NDArray[np.bool_], score_D: NDArray[np.float32]
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.int64]]:
    """Truth, score and count of each bin of rounded scores that has any: as many rows as say the same."""
    last = 10**SCORE_DECIMALS
    bin_D = np.rint(score_D * np.float32(last)).astype(np.int64)
    counts = np.bincount(bin_D + positive_D * (last + 1), minlength=2 * (last + 1))
    bins = np.flatnonzero(counts)
    return bins > last, (bins % (last + 1) / last).astype(np.float32), counts[bins]


def parse_objective(text: str) -> tuple[str, float]:
    """f1, fbeta=B, precision=P or recall=R as (name, number)."""
    name, _, number = text.partition("=")
    try:
        value = float(number) if number else 1.0
    except ValueError:
        value = math.nan
    low_high = {"f1": (1.0, 1.0), "fbeta": (0.01, 100.0), "precision": (0.0, 1.0), "recall": (0.0, 1.0)}
    if name not in low_high or (name != "f1" and not number) or not low_high[name][0] <= value <= low_high[name][1]:
        raise SettingsError(
            f"objective {text!r} is none of: f1, fbeta=B (B from 0.01 to 100), precision=P, recall=R (0 to 1)"
        )
    return name, value


@dataclass(frozen=True)
class Tuned:
    """Thresholds per label, and the labels that keep theirs because the data says the same of every row."""

    thresholds: tuple[float, ...]
    untuned: tuple[str, ...]
    missed: tuple[str, ...] = ()
    """Labels for which no threshold reaches the precision or recall that was asked for."""
    pooled: tuple[str, ...] = ()
    """Labels with too few positives for a threshold of their own: they have the one that is best for all labels."""
    few: int = 0
    """Positives, fewer than FEWEST_POSITIVES, by which the only threshold that there is was set; else 0."""

    def remarks(self, objective: str) -> list[str]:
        """What a person should know of it."""
        lines = []
        if self.untuned:
            lines.append(
                f"thresholds of {', '.join(self.untuned)} stay as they are: the data says the same of every row"
            )
        if self.pooled:
            lines.append(
                f"{', '.join(self.pooled)}: fewer than {FEWEST_POSITIVES} positives, so that the threshold is the one "
                "that is best for all labels together"
            )
        if self.few:
            lines.append(
                f"only {self.few} positives: the threshold is little better than chance, so check it on more data"
            )
        if self.missed:
            lines.append(f"no threshold reaches {objective} for {', '.join(self.missed)}: what comes nearest was taken")
        return lines


def tune_thresholds(
    targets: NDArray[np.generic], scores_DL: NDArray[np.float32], decision: DecisionSettings, objective: str = "f1"
) -> Tuned:
    """The best threshold per label (multilabel) or of the positive label (binary), from document scores.

    f1 and fbeta take their maximum; precision=P the highest recall at a precision of at least P; recall=R the
    highest precision at a recall of at least R. Each threshold lies midway between the scores that it parts.
    A label of several that has fewer than FEWEST_POSITIVES takes the threshold that is best for all labels together.
    Raises SettingsError for kinds without thresholds and for an unknown objective.
    """
    goal = parse_objective(objective)
    if decision.kind not in ("binary", "multilabel"):
        raise SettingsError(f"kind {decision.kind} has no thresholds to tune; binary and multilabel do")
    if decision.kind == "binary":
        labels, targets, scores_DL = decision.labels[1:], targets[:, None], scores_DL[:, 1:]
    else:
        labels = decision.labels
    current = thresholds_by_label(decision)
    thresholds: list[float] = []
    untuned: list[str] = []
    missed: list[str] = []
    pooled: list[str] = []
    together, is_met = 0.0, True
    if len(labels) > 1 and (targets == 1).any():
        together, is_met = _best_threshold((targets == 1).ravel(), scores_DL.ravel(), goal)
    for column, label in enumerate(labels):
        positive_D = targets[:, column] == 1
        if len(labels) > 1 and positive_D.sum() < FEWEST_POSITIVES and (targets == 1).any():
            thresholds.append(together)
            pooled.append(label)
            missed += [] if is_met else [label]
        elif positive_D.all() or not positive_D.any():
            thresholds.append(current.get(label, DEFAULT_THRESHOLD))
            untuned.append(label)
        else:
            threshold, is_reached = _best_threshold(positive_D, scores_DL[:, column], goal)
            thresholds.append(threshold)
            missed += [] if is_reached else [label]
    positives = int((targets == 1).sum())
    few = positives if len(labels) == 1 and positives < FEWEST_POSITIVES else 0
    return Tuned(tuple(thresholds), tuple(untuned), tuple(missed), tuple(pooled), few)


def _best_threshold(
    positive_D: NDArray[np.bool_], score_D: NDArray[np.float32], goal: tuple[str, float]
) -> tuple[float, bool]:
    """The best threshold, and whether it reaches the goal's side condition."""
    order = np.argsort(-score_D, kind="stable")
    ranked = score_D[order]
    last_of_score = np.append(ranked[1:] != ranked[:-1], True)  # a threshold takes all equal scores or none
    true_positives = np.cumsum(positive_D[order])[last_of_score].astype(np.float64)
    chosen = (np.flatnonzero(last_of_score) + 1).astype(np.float64)
    precision, recall = true_positives / chosen, true_positives / positive_D.sum()
    worth = _worth(precision, recall, goal)
    best = int(np.argmax(worth))
    scores = ranked[last_of_score]
    threshold = _midway(scores[best], scores[best + 1] if best + 1 < len(scores) else np.float32(0))
    return threshold, goal[0] not in ("precision", "recall") or bool(worth[best] >= 1)


def _worth(precision: NDArray[np.float64], recall: NDArray[np.float64], goal: tuple[str, float]) -> NDArray[np.float64]:
    """Value of every candidate; the side condition of precision= and recall= counts before the rest."""
    name, number = goal
    if name == "precision":
        return np.where(precision >= number, 1 + recall, precision)
    if name == "recall":
        return np.where(recall >= number, 1 + precision, recall)
    square = number**2
    return (1 + square) * precision * recall / np.maximum(square * precision + recall, 1e-12)


def _midway(score: np.float32, next_lower: np.float32) -> float:
    """A float32 above the lower score and at most the higher one."""
    middle = np.float32((np.float64(score) + np.float64(next_lower)) / 2)
    return float(middle if middle > next_lower else score)


def _binary(matrix: NDArray[np.int64]) -> dict[str, Any]:
    return {
        "mcc": matthews(matrix),
        "accuracy": accuracy(matrix),
        "f1_score": float(f1_per_label(matrix).mean()),
        "tp": int(matrix[1, 1]),
        "tn": int(matrix[0, 0]),
        "fp": int(matrix[0, 1]),
        "fn": int(matrix[1, 0]),
    }


def _multilabel(
    targets: NDArray[np.generic],
    scores_DL: NDArray[np.float32],
    positive_DL: NDArray[np.bool_],
    labels: Sequence[str],
) -> dict[str, Any]:
    from sklearn.metrics import label_ranking_average_precision_score  # a second of imports, only where needed

    true_DL = targets.astype(bool)
    hits_L, true_L, positive_L = (true_DL & positive_DL).sum(0), true_DL.sum(0), positive_DL.sum(0)
    f1_L = 2.0 * hits_L / np.maximum(true_L + positive_L, 1)
    per_label = {
        label: {
            "f1_score": float(f1_L[column]),
            "precision": float(hits_L[column] / max(positive_L[column], 1)),
            "recall": float(hits_L[column] / max(true_L[column], 1)),
            "support": int(true_L[column]),
            **curve_areas(true_DL[:, column], scores_DL[:, column]),
        }
        for column, label in enumerate(labels)
    }
    return {
        "lrap": float(label_ranking_average_precision_score(true_DL, scores_DL)),
        "f1_micro": float(2.0 * hits_L.sum() / max(true_L.sum() + positive_L.sum(), 1)),
        "f1_macro": float(f1_L.mean()),
        "per_label": per_label,
    }


def _regression(target_D: NDArray[np.float64], value_D: NDArray[np.float64]) -> dict[str, Any]:
    errors = value_D - target_D
    spread = target_D.std() * value_D.std()
    total = ((target_D - target_D.mean()) ** 2).sum()
    covariance = ((target_D - target_D.mean()) * (value_D - value_D.mean())).mean()
    return {
        "mae": float(np.abs(errors).mean()),
        "rmse": float(np.sqrt((errors**2).mean())),
        "pearson": float(covariance / spread) if spread > 0 else None,
        "r2": float(1 - (errors**2).sum() / total) if total > 0 else None,
    }
