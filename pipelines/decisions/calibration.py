"""Fit how logits become probabilities, so that a score of 0.9 is right in about 9 of 10 cases.

The temperature is that of Guo et al. 2017, "On Calibration of Modern Neural Networks". A scale and a bias per label are
Platt scaling for binary and multilabel, and vector scaling (same paper) for multiclass. The loss is computed from the
merged scores of documents instead of the scores of single windows.

Shapes: D documents, W windows, L labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.decisions.labels import merged_scores
from pipelines.decisions.metrics import FEWEST_POSITIVES
from pipelines.errors import SettingsError
from pipelines.settings import UNCALIBRATED, Calibration, CalibrationMethod, DecisionSettings

LOWEST, HIGHEST = 0.05, 20.0
"""Range of temperatures and scales that is searched."""
LARGEST_BIAS = 20.0
LEAST = 1e-7
"""Lower limit of a probability in the loss. The loss of a probability of 0 would be infinite."""
BINS = 10
"""Number of bins of equal width in `reliability`."""
LossAndSlope = tuple[float, NDArray[np.float64]]


@dataclass(frozen=True)
class WindowLogits:
    """Logits of the windows of D labelled documents."""

    logits_WL: NDArray[np.float32]
    offsets: NDArray[np.int64]
    """Document d owns the windows from offsets[d] up to but excluding offsets[d + 1]."""
    targets: NDArray[np.generic]
    """Targets from `labels.encode_labels`."""


@dataclass(frozen=True)
class Fitted:
    """A fitted calibration."""

    calibration: Calibration
    few: tuple[str, ...] = ()
    """Labels with too few documents for a scale and a bias of their own."""

    @property
    def remarks(self) -> list[str]:
        """What was fitted, and warnings, one line each."""
        lines = [f"temperature {self.calibration.temperature:.3f}"]
        if self.few:
            lines.append(
                f"{', '.join(self.few)}: fewer than {FEWEST_POSITIVES} documents with or without the label, so only "
                "the temperature calibrates the scores"
            )
        return lines


def check_calibration(method: CalibrationMethod, decision: DecisionSettings) -> None:
    """Raise SettingsError if the kind has no probabilities to calibrate."""
    if decision.kind == "regression" and method != "none":
        raise SettingsError(f"calibrate={method} needs probabilities, and kind regression has none")


def fit_calibration(method: CalibrationMethod, found: WindowLogits, decision: DecisionSettings) -> Fitted:
    """Fit the calibration that minimizes the log loss of document scores.

    Args:
        method: none, temperature, or per_label (a scale and a bias for each label, after the temperature).
        found: Logits and targets of labelled documents.
        decision: Decision settings.

    Raises:
        SettingsError: The kind is regression.
    """
    check_calibration(method, decision)
    if method == "none":
        return Fitted(UNCALIBRATED)
    shared = Calibration(fit_temperature(found, decision))
    return Fitted(shared) if method == "temperature" else _fit_per_label(found, decision, shared)


def fit_temperature(found: WindowLogits, decision: DecisionSettings) -> float:
    """Find the temperature that minimizes the log loss.

    If all documents are right, the log loss has no minimum: all scores would become 0 or 1. Then each target counts as
    wrong with a chance of 1 / (D + 2), as in Platt's method.
    """
    best = _best_temperature(found, decision, doubt=0.0)
    return best if best > 1.01 * LOWEST else _best_temperature(found, decision, doubt=1 / (len(found.targets) + 2))


def _best_temperature(found: WindowLogits, decision: DecisionSettings, *, doubt: float) -> float:
    """Search on finer and finer grids from LOWEST to HIGHEST."""
    low, high = np.log(LOWEST), np.log(HIGHEST)
    best = 0.0
    for _ in range(3):
        grid = np.linspace(low, high, 25)
        losses = [log_loss(found, decision, Calibration(float(np.exp(point))), doubt=doubt) for point in grid]
        place = int(np.argmin(losses))
        best, low, high = grid[place], grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
    return float(np.exp(best))


def log_loss(found: WindowLogits, decision: DecisionSettings, calibration: Calibration, *, doubt: float = 0.0) -> float:
    """Return the mean negative log probability of the true labels, from merged scores.

    Args:
        found: Logits and targets of labelled documents.
        decision: Decision settings.
        calibration: The calibration of the scores.
        doubt: Chance that a target is wrong, and any other one right.
    """
    scores_DL, _ = merged_scores(found.logits_WL, found.offsets, decision, calibration)
    if decision.kind == "multilabel":
        right = np.where(found.targets == 1, scores_DL, 1 - scores_DL)
        wrong = 1 - right
    else:
        is_target_DL = np.eye(scores_DL.shape[1], dtype=bool)[found.targets.astype(np.int64)]
        right, wrong = scores_DL[is_target_DL], scores_DL[~is_target_DL]
    losses = [-np.log(np.maximum(chances, LEAST)).mean() for chances in (right, wrong)]
    return float((1 - doubt) * losses[0] + doubt * losses[1])


def calibration_error(
    targets: NDArray[np.generic], scores_DL: NDArray[np.float32], decision: DecisionSettings
) -> float | None:
    """Return the expected calibration error (ECE) of document scores, in BINS bins.

    binary: of the positive label. multiclass: of the label with the highest score. multilabel: mean over the labels.
    regression has none.
    """
    if decision.kind == "regression":
        return None
    if decision.kind == "binary":
        return reliability(targets == 1, scores_DL[:, 1])[1]
    if decision.kind == "multiclass":
        best_D = scores_DL.argmax(axis=1)
        return reliability(targets == best_D, scores_DL.max(axis=1))[1]
    columns = range(len(decision.labels))
    return float(np.mean([reliability(targets[:, column] == 1, scores_DL[:, column])[1] for column in columns]))


def reliability(positive_D: NDArray[np.bool_], score_D: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
    """Compare scores with observed frequencies, in bins of equal width.

    Args:
        positive_D: Whether the label holds for each document, (D,).
        score_D: Score of the label, (D,), from 0 to 1.

    Returns:
        Mean score, share of positives and count of each bin that is not empty, (bins, 3); and the expected calibration
        error (ECE).
    """
    bin_D = np.minimum((score_D * BINS).astype(int), BINS - 1)
    count = np.bincount(bin_D, minlength=BINS).astype(float)
    score = np.bincount(bin_D, weights=score_D, minlength=BINS) / np.maximum(count, 1)
    share = np.bincount(bin_D, weights=positive_D, minlength=BINS) / np.maximum(count, 1)
    error = float((np.abs(score - share) * count).sum() / max(count.sum(), 1))
    return np.stack([score, share, count], axis=1)[count > 0], error


def _fit_per_label(found: WindowLogits, decision: DecisionSettings, shared: Calibration) -> Fitted:
    """Fit a scale and a bias per label after the shared temperature. A label with few documents keeps 1 and 0."""
    from scipy.optimize import minimize  # the import takes a second

    few_L = _labels_with_few(found.targets, decision)
    num_labels = len(decision.labels)
    bounds = [(1.0, 1.0) if few else (LOWEST, HIGHEST) for few in few_L]
    bounds += [(0.0, 0.0) if few else (-LARGEST_BIAS, LARGEST_BIAS) for few in few_L]
    start = np.concatenate([np.ones(num_labels), np.zeros(num_labels)])
    loss = _multilabel_loss if decision.kind == "multilabel" else _softmax_loss
    result = minimize(_objective, start, (loss, found, decision, shared), jac=True, method="L-BFGS-B", bounds=bounds)
    scales, biases = (tuple(map(float, half)) for half in np.split(result.x, 2))
    kept = tuple(label for label, few in zip(decision.labels, few_L, strict=True) if few)
    return Fitted(Calibration(shared.temperature, scales, biases), kept)


def _labels_with_few(targets: NDArray[np.generic], decision: DecisionSettings) -> list[bool]:
    """Return for each label whether too few documents have it, or too few do not have it."""
    columns = range(len(decision.labels))
    is_multi = decision.kind == "multilabel"
    counts = [int((targets[:, column] == 1).sum() if is_multi else (targets == column).sum()) for column in columns]
    few = [min(count, len(targets) - count) < FEWEST_POSITIVES for count in counts]
    return [any(few)] * 2 if decision.kind == "binary" else few


def _objective(
    parameters: NDArray[np.float64],
    loss: Callable[[WindowLogits, DecisionSettings, Calibration], LossAndSlope],
    found: WindowLogits,
    decision: DecisionSettings,
    shared: Calibration,
) -> LossAndSlope:
    """Return the loss and its gradient. A prior that weighs as much as one document keeps scales at 1, biases at 0."""
    scales, biases = np.split(parameters, 2)
    calibration = Calibration(shared.temperature, tuple(scales), tuple(biases))
    value, slope_WL = loss(found, decision, calibration)
    of_scales = (slope_WL * found.logits_WL / shared.temperature).sum(axis=0)
    of_biases = slope_WL.sum(axis=0)
    prior = np.concatenate([scales - 1, biases]) / len(found.targets)
    value += 0.5 * float(((scales - 1) ** 2).sum() + (biases**2).sum()) / len(found.targets)
    return value, np.concatenate([of_scales, of_biases]) + prior


def _softmax_loss(found: WindowLogits, decision: DecisionSettings, calibration: Calibration) -> LossAndSlope:
    """Return the log loss of binary or multiclass documents, and its slope by the logits of the windows (W, L)."""
    scores_DL, of_windows_WL = merged_scores(found.logits_WL, found.offsets, decision, calibration)
    target_D = found.targets.astype(np.int64)
    rows_D = np.arange(len(target_D))
    chance_D = np.maximum(scores_DL[rows_D, target_D], LEAST).astype(np.float64)
    document_W = np.repeat(rows_D, np.diff(found.offsets))
    target_W = target_D[document_W]
    share_W = _shares(scores_DL, of_windows_WL, found.offsets, decision)[np.arange(len(target_W)), target_W]
    of_target_W = of_windows_WL[np.arange(len(target_W)), target_W]
    slope_WL = of_windows_WL.astype(np.float64) * of_target_W[:, None]
    slope_WL[np.arange(len(target_W)), target_W] -= of_target_W
    slope_WL *= (share_W / chance_D[document_W])[:, None] / len(target_D)
    return float(-np.log(chance_D).mean()), slope_WL


def _multilabel_loss(found: WindowLogits, decision: DecisionSettings, calibration: Calibration) -> LossAndSlope:
    """Return the log loss of multilabel documents, summed over labels, and its slope by the window logits (W, L)."""
    scores_DL, of_windows_WL = merged_scores(found.logits_WL, found.offsets, decision, calibration)
    true_DL = found.targets == 1
    chance_DL = np.maximum(np.where(true_DL, scores_DL, 1 - scores_DL), LEAST).astype(np.float64)
    slope_DL = np.where(true_DL, -1.0, 1.0) / chance_DL / len(true_DL)
    document_W = np.repeat(np.arange(len(true_DL)), np.diff(found.offsets))
    share_WL = _shares(scores_DL, of_windows_WL, found.offsets, decision)
    slope_WL = slope_DL[document_W] * share_WL * of_windows_WL * (1 - of_windows_WL).astype(np.float64)
    return float(-np.log(chance_DL).sum(axis=1).mean()), slope_WL


def _shares(
    scores_DL: NDArray[np.float32],
    of_windows_WL: NDArray[np.float32],
    offsets: NDArray[np.int64],
    decision: DecisionSettings,
) -> NDArray[np.float64]:
    """Return by how much each window's score moves that of its document (W, L)."""
    counts = np.diff(offsets)
    document_W = np.repeat(np.arange(len(counts)), counts)
    if decision.merge == "max":
        return np.where(of_windows_WL == scores_DL[document_W], 1.0, 0.0)
    return np.broadcast_to((1.0 / counts[document_W])[:, None], of_windows_WL.shape)
