"""Training losses, per window and not yet averaged, so that means can be taken over the global batch.

The loss of a step is sum(loss_W * share_W) / sum(normalizer_W * share_W) over the windows of all workers:
share_W is 1, or 1 / number of windows of the text; the normalizer is the class weight (cross-entropy) or 1.

Shapes: W windows, L labels, D documents.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines.errors import DataError, SettingsError
from pipelines.settings import DecisionSettings, Kind, TrainSettings


def window_losses(logits_WL: Tensor, targets: Tensor, kind: Kind, weight_L: Tensor | None = None) -> Tensor:
    """Loss (W,) of each window in float32.

    binary, multiclass: cross-entropy times the weight of the true label, targets (W,) int64.
    multilabel: mean over labels of binary cross-entropy with logits, weight_L being pos_weight, targets (W, L).
    regression: squared error, targets (W,). Formulas as in torch.nn.functional, reduction="none".
    """
    logits_WL = logits_WL.float()
    if kind == "regression":
        return F.mse_loss(logits_WL[:, 0], targets, reduction="none")
    if kind == "multilabel":
        losses_WL = F.binary_cross_entropy_with_logits(logits_WL, targets, pos_weight=weight_L, reduction="none")
        return losses_WL.mean(dim=1)
    return F.cross_entropy(logits_WL, targets, weight=weight_L, reduction="none")


def normalizers(targets: NDArray[np.generic], kind: Kind, weight_L: NDArray[np.float32] | None) -> NDArray[np.float64]:
    """What each target adds to the denominator of a weighted mean: its class weight, or 1."""
    if kind in ("binary", "multiclass") and weight_L is not None:
        return np.asarray(weight_L[targets.astype(np.int64)], dtype=np.float64)
    return np.ones(len(targets))


def resolve_weight(
    settings: TrainSettings, decision: DecisionSettings, targets: NDArray[np.generic]
) -> NDArray[np.float32] | None:
    """The loss weights (L,) that settings ask for, "balanced" counted from the targets.

    Raises SettingsError for the other kind's weights or a wrong number of them, and DataError where a label that
    should be balanced never occurs.
    """
    multilabel = decision.kind == "multilabel"
    name, other = ("pos_weight", "weight") if multilabel else ("weight", "pos_weight")
    if getattr(settings, other) is not None:
        raise SettingsError(f"{other} is not for kind {decision.kind}; use {name}")
    weight = getattr(settings, name)
    if weight is None:
        return None
    if decision.kind == "regression":
        raise SettingsError("weight is for classification; kind regression takes none")
    if weight == "balanced":
        return _balanced(targets, decision)
    if len(weight) != len(decision.labels):
        raise SettingsError(f"{name} has {len(weight)} values; there are {len(decision.labels)} labels")
    return np.asarray(weight, dtype=np.float32)


def _balanced(targets: NDArray[np.generic], decision: DecisionSettings) -> NDArray[np.float32]:
    """Inverse frequencies: N / (L * count) per label, or negatives / positives for pos_weight."""
    num_labels = len(decision.labels)
    if decision.kind == "multilabel":
        counts = np.asarray(targets, np.float64).sum(axis=0)
        weight = (len(targets) - counts) / np.maximum(counts, 1)
    else:
        counts = np.bincount(targets.astype(np.int64), minlength=num_labels).astype(np.float64)
        weight = len(targets) / (num_labels * np.maximum(counts, 1))
    if (counts == 0).any():
        absent = decision.labels[int(np.flatnonzero(counts == 0)[0])]
        raise DataError(f"label {absent!r} never occurs in the training data, so it cannot be balanced")
    return np.asarray(weight, dtype=np.float32)
