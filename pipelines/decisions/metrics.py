"""Compute metrics of scores and decisions, and find the thresholds that are best for an objective.

Metrics of counts are computed from a confusion matrix, which can be summed over shards. Curves and ranking metrics
come from scikit-learn.

Shapes: D documents, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.decisions.labels import DEFAULT_THRESHOLD, Decisions, resolve_thresholds, thresholds_by_label
from pipelines.errors import SettingsError
from pipelines.settings import DecisionSettings

HEADLINE = {"binary": "mcc", "multiclass": "mcc", "multilabel": "auprc_macro", "regression": "rmse"}
"""Default metric for comparing evaluations, by kind. `default_metric` adapts it to the decision."""
METRICS = {
    "binary": ("mcc", "accuracy", "f1_score", "tp", "tn", "fp", "fn", "auroc", "auprc"),
    "multiclass": ("mcc", "accuracy", "f1_macro", "f1_weighted"),
    "multilabel": ("lrap", "auprc_macro", "f1_micro", "f1_macro", "per_label"),
    "regression": ("mae", "rmse", "pearson", "r2"),
}
"""Metrics that `evaluate` returns, by kind."""
FEWEST_TIED, MOST_DISTINCT = 20, 0.1
"""The scores of a label tie if at least FEWEST_TIED documents have at most MOST_DISTINCT distinct scores a document."""
SATURATED = 0.001
"""Scores closer than this to 0 or 1 are not counted as ties: a sure model has few different float32 numbers there."""
FEWEST_POSITIVES = 10
"""A label with fewer positives gets no threshold of its own, because chance would determine it."""
EXACT_SCORES = 10_000_000
"""Maximum number of scores for exact curves. More scores are rounded to SCORE_DECIMALS and counted in a histogram."""
SCORE_DECIMALS = 4
LESS_IS_BETTER = frozenset({"loss", "eval_loss", "mae", "rmse", "fp", "fn"})
"""Metrics for which a lower value is better."""


def evaluate(
    targets: NDArray[np.generic], scores_DL: NDArray[np.float32], decisions: Decisions, decision: DecisionSettings
) -> dict[str, Any]:
    """Return the metrics of decisions and scores as values that JSON can store.

    Args:
        targets: Targets from `labels.encode_labels`.
        scores_DL: Document scores.
        decisions: Decisions for the same documents.
        decision: Decision settings.

    Returns:
        binary: mcc, accuracy, f1_score (macro), tp, tn, fp, fn, auroc, auprc.
        multiclass: mcc, accuracy, f1_macro, f1_weighted.
        multilabel: lrap, auprc_macro (mean over the labels for which it is defined), f1_micro, f1_macro, per_label.
        regression: mae, rmse, pearson, r2.
        A metric that is undefined for the data, for example because only one class occurs, is None. Means over the
        labels leave out labels that neither occur nor are predicted, as scikit-learn does with zero_division=nan. In
        per_label they have 0.
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
        "f1_macro": _mean(f1_L),
        "f1_weighted": float(np.nan_to_num(f1_L) @ support_L / max(support_L.sum(), 1)),
    }


def default_metric(decision: DecisionSettings) -> str:
    """Return the metric that compares the evaluations of a run, if the settings name none.

    Thresholds are tuned only after training. Before that, labels depend on a threshold that is not tuned, so a metric
    of the order of the scores is used: the average precision. For several labels, it is the mean over the labels.
    """
    if decision.kind == "binary" and decision.thresholds is None and decision.merge != "vote":
        return "auprc"
    return HEADLINE[decision.kind]


def count_distinct(scores_DL: NDArray[np.float32], decision: DecisionSettings) -> dict[str, list[int]]:
    """Count, for each label, the documents with a score that is not saturated, and their distinct scores.

    The counts of several slices of the data can be added. Then the second number is an upper limit. A binary
    classifier has counts only for its positive label.
    """
    if decision.kind == "regression":
        return {}
    first = 1 if decision.kind == "binary" else 0
    found = {}
    for column, label in enumerate(decision.labels[first:], start=first):
        score_D = scores_DL[:, column]
        score_D = score_D[(score_D > SATURATED) & (score_D < 1 - SATURATED)]
        found[label] = [len(score_D), len(np.unique(score_D))]
    return found


def tie_warning(distinct: Mapping[str, Sequence[int]]) -> str | None:
    """Return a warning about labels whose documents share few scores (`count_distinct`), or None if there are none."""
    tied = {
        label: (documents, scores)
        for label, (documents, scores) in distinct.items()
        if documents >= FEWEST_TIED and scores <= MOST_DISTINCT * documents
    }
    if not tied:
        return None
    label, (documents, scores) = min(tied.items(), key=lambda item: item[1][1] / item[1][0])
    return (
        f"the scores of {len(tied)} of {len(distinct)} labels tie: {documents:,} documents have at most {scores:,} "
        f"different scores of {label!r}, so no threshold separates them; if the documents differ, score with "
        "dtype=float32, or train the model longer"
    )


def confusion_matrix(target_D: NDArray[np.int64], label_D: NDArray[np.int64], num_labels: int) -> NDArray[np.int64]:
    """Return counts (L, L + 1): rows are true labels, columns are decided labels. The last column counts "no label".

    Matrices of several slices of the data can be summed.
    """
    column_D = np.where(label_D < 0, num_labels, label_D)
    cells = np.bincount(target_D * (num_labels + 1) + column_D, minlength=num_labels * (num_labels + 1))
    return cells.reshape(num_labels, num_labels + 1)


def accuracy(matrix: NDArray[np.int64]) -> float:
    """Return the share of documents with the correct label."""
    return float(np.trace(matrix) / max(matrix.sum(), 1))


def f1_per_label(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the F1 score (L,) of each label, NaN if the label neither occurs nor is predicted."""
    return _f1(np.diag(matrix), matrix.sum(axis=1) + matrix.sum(axis=0)[:-1])


def _mean(values_L: NDArray[np.float64]) -> float | None:
    """Return the mean of the values that are defined, or None if there is none."""
    return None if np.isnan(values_L).all() else float(np.nanmean(values_L))


def _f1(hits_L: NDArray[np.integer[Any]], true_and_positive_L: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return the F1 score of each label from its hits and the sum of its true and its predicted documents."""
    total_L = true_and_positive_L.astype(np.float64)
    f1_L = np.full(len(total_L), np.nan)
    np.divide(2.0 * hits_L, total_L, out=f1_L, where=total_L > 0)
    return f1_L


def matthews(matrix: NDArray[np.int64]) -> float:
    """Return the Matthews correlation for any number of labels (Gorodkin 2004).

    It is 0 if the true labels or the decisions are all equal.
    """
    counts = matrix.astype(np.float64)
    total, right = counts.sum(), np.trace(counts)
    true_L, decided = counts.sum(axis=1), counts.sum(axis=0)
    covariance = right * total - true_L @ decided[:-1]
    spread = (total**2 - decided @ decided) * (total**2 - true_L @ true_L)
    return float(covariance / math.sqrt(spread)) if spread > 0 else 0.0


def curve_areas(positive_D: NDArray[np.bool_], score_D: NDArray[np.float32]) -> dict[str, float | None]:
    """Return the areas under the ROC curve and the precision-recall curve (average precision).

    Both are None if only one class occurs. With more than EXACT_SCORES scores, they are computed from a histogram, and
    the result contains its number of bins as histogram_bins.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score  # the import takes a second

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
    """Return truth, score and count of each bin of rounded scores that is not empty."""
    last = 10**SCORE_DECIMALS
    bin_D = np.rint(score_D * np.float32(last)).astype(np.int64)
    counts = np.bincount(bin_D + positive_D * (last + 1), minlength=2 * (last + 1))
    bins = np.flatnonzero(counts)
    return bins > last, (bins % (last + 1) / last).astype(np.float32), counts[bins]


def parse_objective(text: str) -> tuple[str, float]:
    """Parse f1, fbeta=B, precision=P or recall=R.

    Returns:
        Name and number. The number of f1 is 1.

    Raises:
        SettingsError: The objective is unknown or its number is out of range.
    """
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
    """Tuned thresholds, and the labels for which tuning had a problem."""

    thresholds: tuple[float, ...]
    """One threshold per label (multilabel), or one for the positive label (binary)."""
    untuned: tuple[str, ...]
    """Labels that keep their threshold, because all rows have the same truth for them."""
    missed: tuple[str, ...] = ()
    """Labels for which no threshold reaches the requested precision or recall."""
    pooled: tuple[str, ...] = ()
    """Labels with too few positives for their own threshold. They get the best threshold for all labels together."""
    few: int = 0
    """Number of positives if there is only one threshold and fewer than FEWEST_POSITIVES positives, else 0."""

    def applied_to(self, decision: DecisionSettings) -> DecisionSettings:
        """The decision with these thresholds; unchanged where no label could be tuned."""
        if len(self.untuned) == len(self.thresholds):
            return decision
        return resolve_thresholds(self.thresholds, decision)

    def remarks(self, objective: str) -> list[str]:
        """Return the warnings about these thresholds, one line each."""
        lines = []
        if self.untuned:
            lines.append(
                f"thresholds of {', '.join(self.untuned)} stay unchanged: all rows have the same truth for them"
            )
        if self.pooled:
            lines.append(
                f"{', '.join(self.pooled)}: fewer than {FEWEST_POSITIVES} positives, so they get the threshold "
                "that is best for all labels together"
            )
        if self.few:
            lines.append(
                f"only {self.few} positives: the threshold is little better than chance, so check it on more data"
            )
        if self.missed:
            lines.append(
                f"no threshold reaches {objective} for {', '.join(self.missed)}: the nearest threshold was used"
            )
        return lines


def tune_thresholds(
    targets: NDArray[np.generic], scores_DL: NDArray[np.float32], decision: DecisionSettings, objective: str = "f1"
) -> Tuned:
    """Find the best threshold per label (multilabel) or for the positive label (binary), from document scores.

    Each threshold is midway between the two scores that it separates. If there are several labels, a label with fewer
    than FEWEST_POSITIVES positives gets the threshold that is best for all labels together.

    Args:
        targets: Targets from `labels.encode_labels`.
        scores_DL: Document scores.
        decision: Decision settings.
        objective: f1 and fbeta=B are maximized. precision=P takes the highest recall with a precision of at least P.
            recall=R takes the highest precision with a recall of at least R.

    Raises:
        SettingsError: The kind has no thresholds, or the objective is unknown.
    """
    goal = parse_objective(objective)
    labels, targets, scores_DL = with_thresholds(targets, scores_DL, decision)
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


def with_thresholds(
    targets: NDArray[np.generic], scores_DL: NDArray[np.float32], decision: DecisionSettings
) -> tuple[tuple[str, ...], NDArray[np.generic], NDArray[np.float32]]:
    """Return the labels that have a threshold, with their targets (D, L) and scores (D, L).

    A binary classifier has a threshold only for its positive label.

    Raises:
        SettingsError: The kind has no thresholds.
    """
    if decision.kind not in ("binary", "multilabel"):
        raise SettingsError(f"kind {decision.kind} has no thresholds to tune; binary and multilabel do")
    if decision.kind == "binary":
        return decision.labels[1:], targets[:, None], scores_DL[:, 1:]
    return decision.labels, targets, scores_DL


def _best_threshold(
    positive_D: NDArray[np.bool_], score_D: NDArray[np.float32], goal: tuple[str, float]
) -> tuple[float, bool]:
    """Return the best threshold, and whether it reaches the precision or recall that the goal requires."""
    order = np.argsort(-score_D, kind="stable")
    ranked = score_D[order]
    last_of_score = np.append(ranked[1:] != ranked[:-1], True)  # a threshold accepts all equal scores or none
    true_positives = np.cumsum(positive_D[order])[last_of_score].astype(np.float64)
    chosen = (np.flatnonzero(last_of_score) + 1).astype(np.float64)
    precision, recall = true_positives / chosen, true_positives / positive_D.sum()
    worth = _worth(precision, recall, goal)
    best = int(np.argmax(worth))
    scores = ranked[last_of_score]
    threshold = _midway(scores[best], scores[best + 1] if best + 1 < len(scores) else np.float32(0))
    return threshold, goal[0] not in ("precision", "recall") or bool(worth[best] >= 1)


def _worth(precision: NDArray[np.float64], recall: NDArray[np.float64], goal: tuple[str, float]) -> NDArray[np.float64]:
    """Return the value of every candidate. Candidates that reach the required precision or recall rank highest."""
    name, number = goal
    if name == "precision":
        return np.where(precision >= number, 1 + recall, precision)
    if name == "recall":
        return np.where(recall >= number, 1 + precision, recall)
    square = number**2
    return (1 + square) * precision * recall / np.maximum(square * precision + recall, 1e-12)


def _midway(score: np.float32, next_lower: np.float32) -> float:
    """Return a float32 that is above the lower score and at most the higher one."""
    middle = np.float32((np.float64(score) + np.float64(next_lower)) / 2)
    return float(middle if middle > next_lower else score)


def _binary(matrix: NDArray[np.int64]) -> dict[str, Any]:
    return {
        "mcc": matthews(matrix),
        "accuracy": accuracy(matrix),
        "f1_score": _mean(f1_per_label(matrix)),
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
    from sklearn.metrics import label_ranking_average_precision_score  # the import takes a second

    true_DL = targets.astype(bool)
    hits_L, true_L, positive_L = (true_DL & positive_DL).sum(0), true_DL.sum(0), positive_DL.sum(0)
    f1_L = _f1(hits_L, true_L + positive_L)
    per_label = {
        label: {
            "f1_score": float(np.nan_to_num(f1_L[column])),
            "precision": float(hits_L[column] / max(positive_L[column], 1)),
            "recall": float(hits_L[column] / max(true_L[column], 1)),
            "support": int(true_L[column]),
            **curve_areas(true_DL[:, column], scores_DL[:, column]),
        }
        for column, label in enumerate(labels)
    }
    areas = [values["auprc"] for values in per_label.values() if values["auprc"] is not None]
    return {
        "lrap": float(label_ranking_average_precision_score(true_DL, scores_DL)),
        "auprc_macro": float(np.mean(areas)) if areas else None,
        "f1_micro": float(2.0 * hits_L.sum() / max(true_L.sum() + positive_L.sum(), 1)),
        "f1_macro": _mean(f1_L),
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


HISTOGRAM_BINS = 20
"""Number of bins in `histograms_of`."""


def histograms_of(scores_DL: NDArray[np.float32], decision: DecisionSettings) -> dict[str, list[int]]:
    """Count the scores of each label in 20 equal bins of [0, 1]. The result is empty for regression."""
    return {
        label: np.histogram(scores_DL[:, column], HISTOGRAM_BINS, (0, 1))[0].tolist()
        for column, label in enumerate(decision.labels)
    }
