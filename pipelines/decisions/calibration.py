"""Fit a temperature for the logits, so that a score of 0.9 is right in about 9 of 10 cases.

The method is that of Guo et al. 2017, "On Calibration of Modern Neural Networks", but the loss is computed from the
merged scores of documents instead of the scores of single windows.

Shapes: D documents, W windows, L labels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.decisions.labels import activate
from pipelines.errors import SettingsError
from pipelines.settings import DecisionSettings
from pipelines.text.windows import merge_windows

LOWEST, HIGHEST = 0.05, 20.0
"""Range of temperatures that is searched."""
LEAST = 1e-7
"""Lower limit of a probability in the loss. The loss of a probability of 0 would be infinite."""


def check_calibration(decision: DecisionSettings) -> None:
    """Raise SettingsError if the kind has no probabilities."""
    if decision.kind == "regression":
        raise SettingsError("calibrate=true needs probabilities, and kind regression has none")


def fit_temperature(
    logits_WL: NDArray[np.float32], offsets: NDArray[np.int64], targets: NDArray[np.generic], decision: DecisionSettings
) -> float:
    """Find the temperature that minimizes the log loss of document scores.

    The temperature divides the logits of the windows. The search uses finer and finer grids from LOWEST to HIGHEST.

    Args:
        logits_WL: Logits of windows.
        offsets: Document d owns the windows from offsets[d] up to but excluding offsets[d + 1].
        targets: Targets from `labels.encode_labels`.
        decision: Decision settings.

    Raises:
        SettingsError: The kind is regression.
    """
    check_calibration(decision)
    low, high = np.log(LOWEST), np.log(HIGHEST)
    best = 0.0
    for _ in range(3):
        grid = np.linspace(low, high, 25)
        losses = [log_loss(logits_WL, offsets, targets, decision, float(np.exp(point))) for point in grid]
        place = int(np.argmin(losses))
        best, low, high = grid[place], grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
    return float(np.exp(best))


def log_loss(
    logits_WL: NDArray[np.float32],
    offsets: NDArray[np.int64],
    targets: NDArray[np.generic],
    decision: DecisionSettings,
    temperature: float,
) -> float:
    """Return the mean negative log probability of the true labels, from merged scores with a temperature."""
    how = "max" if decision.merge == "max" else "mean"
    scores_DL = merge_windows(activate(logits_WL, decision.kind, temperature), offsets, how)  # type: ignore[arg-type]
    if decision.kind == "multilabel":
        chances = np.where(targets == 1, scores_DL, 1 - scores_DL)
    else:
        chances = scores_DL[np.arange(len(targets)), targets.astype(np.int64)]
    return float(-np.log(np.maximum(chances, LEAST)).mean())
