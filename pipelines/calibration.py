"""A temperature for scores that say how often they are right. Knows no model, no torch, no ray.

Guo et al. 2017, "On Calibration of Modern Neural Networks", with the documents' merged scores in place of single ones.

Shapes: D documents, W windows, L labels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import SettingsError
from pipelines.labels import activate
from pipelines.settings import DecisionSettings
from pipelines.windows import merge_windows

LOWEST, HIGHEST = 0.05, 20.0
LEAST = 1e-7
"""A probability of 0 would cost infinitely much."""


def check_calibration(decision: DecisionSettings) -> None:
    """Raise SettingsError for a kind without probabilities."""
    if decision.kind == "regression":
        raise SettingsError("calibrate=true needs probabilities, and kind regression has none")


def fit_temperature(
    logits_WL: NDArray[np.float32], offsets: NDArray[np.int64], targets: NDArray[np.generic], decision: DecisionSettings
) -> float:
    """What the logits of windows are to be divided by, for the least log loss of the documents' scores.

    Document d owns windows offsets[d] to offsets[d + 1]. Searched on ever finer grids between LOWEST and HIGHEST.
    Raises SettingsError for a regression.
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
    """Mean negative log probability of what is true, of merged scores under a temperature."""
    how = "max" if decision.merge == "max" else "mean"
    scores_DL = merge_windows(activate(logits_WL, decision.kind, temperature), offsets, how)  # type: ignore[arg-type]
    if decision.kind == "multilabel":
        chances = np.where(targets == 1, scores_DL, 1 - scores_DL)
    else:
        chances = scores_DL[np.arange(len(targets)), targets.astype(np.int64)]
    return float(-np.log(np.maximum(chances, LEAST)).mean())
