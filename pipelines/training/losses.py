"""Training losses per window. They are not averaged here, so that the mean can be taken over the global batch.

The loss of a step is sum(loss_W * share_W) / sum(normalizer_W * share_W) over the windows of all workers. share_W is 1,
or 1 / number of windows of the text. normalizer_W is the class weight (cross-entropy, and focal with one alpha per
label), or 1.

A loss is a function here, with its name in `LOSSES` and in `loss_type` of settings.py.

Shapes: W windows, L labels, D documents. p is the probability of a label, y the true label.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines.decisions.labels import Scaling
from pipelines.errors import DataError, SettingsError
from pipelines.model.devices import to_device
from pipelines.settings import DecisionSettings, Kind
from pipelines.text.windows import Windows
from pipelines.training_settings import TrainSettings


def cross_entropy(
    logits_WL: Tensor, target_W: Tensor, weight_L: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy times the weight of the true label, (W,).

    Args:
        logits_WL: Logits.
        target_W: Label ids.
        weight_L: Class weights. None means 1.
        smoothing: Share of the target that is spread evenly over all labels.
    """
    return F.cross_entropy(logits_WL, target_W, weight=weight_L, label_smoothing=smoothing, reduction="none")


def focal(
    logits_WL: Tensor, target_W: Tensor, *, gamma: float = 2.0, alpha: float | Sequence[float] | None = None
) -> Tensor:
    """Focal loss (Lin et al. 2017), (W,): -alpha_y (1 - p_y)^gamma log p_y.

    Args:
        logits_WL: Logits.
        target_W: Label ids.
        gamma: Windows with a high p_y count less where gamma is larger.
        alpha: One factor per label. A single number is the factor of label 0; the other labels get 1 - alpha. None
            means 1.
    """
    log_p_W = F.log_softmax(logits_WL, dim=1).gather(1, target_W[:, None])[:, 0]
    losses_W = -_power(1 - log_p_W.exp(), gamma) * log_p_W
    alpha_L = focal_alpha(alpha, logits_WL.shape[1])
    return losses_W if alpha_L is None else losses_W * to_device(alpha_L, logits_WL.device)[target_W]


def dice(
    logits_WL: Tensor,
    target_W: Tensor,
    *,
    gamma: float = 0.0,
    scale: float = 1.0,
    smooth: float = 0.0,
    eps: float = 1e-6,
) -> Tensor:
    """Dice loss (Li et al. 2020), (W,): 1 - (2 q_y + smooth) / (sum q + 1 + eps + smooth).

    Here q = scale (1 - p)^gamma p.
    """
    q_WL, q_true_W = _shaped(logits_WL, target_W, gamma, scale)
    return 1 - (2 * q_true_W + smooth) / (q_WL.sum(dim=1) + 1 + eps + smooth)


def tversky(
    logits_WL: Tensor,
    target_W: Tensor,
    *,
    alpha: float,
    beta: float,
    gamma: float = 0.0,
    scale: float = 1.0,
    smooth: float = 0.0,
    eps: float = 1e-6,
) -> Tensor:
    """Tversky loss, (W,): 1 - (q_y + smooth) / (q_y + alpha * others + beta (1 - q_y) + eps + smooth).

    Here q is that of `dice`, and others is the sum of q over all labels except y.
    """
    q_WL, q_true_W = _shaped(logits_WL, target_W, gamma, scale)
    others_W = q_WL.sum(dim=1) - q_true_W
    return 1 - (q_true_W + smooth) / (q_true_W + alpha * others_W + beta * (1 - q_true_W) + eps + smooth)


def binary_focal(
    logits_WL: Tensor, target_WL: Tensor, *, gamma: float = 2.0, alpha: float | Sequence[float] | None = None
) -> Tensor:
    """Binary focal loss of each label, mean over labels, (W,).

    Args:
        logits_WL: Logits.
        target_WL: 1 where the label holds, else 0.
        gamma: As in `focal`.
        alpha: Factor of positive targets, one number or one per label. Negative targets get 1 - alpha. None means 1.
    """
    log_p_WL = F.logsigmoid(torch.where(target_WL == 1, logits_WL, -logits_WL))
    losses_WL = -_power(1 - log_p_WL.exp(), gamma) * log_p_WL
    if alpha is not None:
        alpha_L = to_device(np.atleast_1d(np.asarray(alpha, np.float32)), logits_WL.device)
        losses_WL = losses_WL * torch.where(target_WL == 1, alpha_L, 1 - alpha_L)
    return losses_WL.mean(dim=1)


def asymmetric(
    logits_WL: Tensor, target_WL: Tensor, *, gamma_pos: float = 1.0, gamma_neg: float = 4.0, clip: float = 0.05
) -> Tensor:
    """Asymmetric loss (Ridnik et al. 2021), mean over labels, (W,).

    Easy negatives count less. Negatives with a probability up to clip do not count.

    Args:
        logits_WL: Logits.
        target_WL: 1 where the label holds, else 0.
        gamma_pos: Focal exponent of positive targets.
        gamma_neg: Focal exponent of negative targets.
        clip: Subtracted from the probability of negative targets.
    """
    p_WL = logits_WL.sigmoid()
    shifted_WL = (p_WL - clip).clamp(min=0)
    yes_WL = _power(1 - p_WL, gamma_pos) * F.logsigmoid(logits_WL)
    no_WL = _power(shifted_WL, gamma_neg) * torch.log1p(-shifted_WL.clamp(max=1 - 1e-7))
    return -torch.where(target_WL == 1, yes_WL, no_WL).mean(dim=1)


def mae(logits_WL: Tensor, target_W: Tensor) -> Tensor:
    """Absolute error, (W,)."""
    return F.l1_loss(logits_WL[:, 0], target_W, reduction="none")


def huber(logits_WL: Tensor, target_W: Tensor, *, delta: float = 1.0) -> Tensor:
    """Huber loss, (W,): squared error up to delta, linear above."""
    return F.huber_loss(logits_WL[:, 0], target_W, delta=delta, reduction="none")


LOSSES: dict[Kind, dict[str, Callable[..., Tensor]]] = {
    "binary": {"focal": focal, "dice": dice, "tversky": tversky},
    "multiclass": {"focal": focal, "dice": dice, "tversky": tversky},
    "multilabel": {"focal": binary_focal, "asymmetric": asymmetric},
    "regression": {"mae": mae, "huber": huber},
}


@dataclass(frozen=True)
class Loss:
    """The loss of one training job: its settings, resolved for the labels and targets."""

    kind: Kind
    weight_L: NDArray[np.float32] | None = None
    """Class weights. For kind multilabel: pos_weight."""
    loss_type: str | None = None
    loss_args: dict[str, Any] | None = None
    label_smoothing: float = 0.0
    window_weight: Literal["window", "document"] = "window"
    """Whether each window or each document counts once (see `shares`)."""
    scale: float = 1.0
    """Regression: logits and targets are divided by this number before the error is computed."""

    def __call__(self, logits_WL: Tensor, targets: Tensor) -> Tensor:
        """Return the loss (W,) of each window in float32.

        Args:
            logits_WL: Logits, in any dtype.
            targets: Targets as `labels.encode_labels` returns them, but one per window.
        """
        logits_WL = logits_WL.float()
        if self.kind == "regression":
            logits_WL, targets = logits_WL / self.scale, targets / self.scale
        if self.loss_type is not None:
            return LOSSES[self.kind][self.loss_type](logits_WL, targets, **(self.loss_args or {}))
        weight_L = None if self.weight_L is None else to_device(self.weight_L, logits_WL.device)
        if self.kind == "regression":
            return F.mse_loss(logits_WL[:, 0], targets, reduction="none")
        if self.kind == "multilabel":
            losses_WL = F.binary_cross_entropy_with_logits(logits_WL, targets, pos_weight=weight_L, reduction="none")
            return losses_WL.mean(dim=1)
        return cross_entropy(logits_WL, targets, weight_L, self.label_smoothing)

    def shares(self, windows: Windows) -> NDArray[np.float32]:
        """Return the weight of each window in the mean, (W,): 1, or 1 / number of windows of its document."""
        if self.window_weight == "window":
            return np.ones(len(windows.document_W), np.float32)
        return (1.0 / windows.num_windows_D[windows.document_W]).astype(np.float32)

    def normalizers(self, targets: NDArray[np.generic]) -> NDArray[np.float64]:
        """Return what each target adds to the denominator of the weighted mean (see the module docstring)."""
        if self.kind not in ("binary", "multiclass"):
            return np.ones(len(targets))
        by_label = self.weight_L
        if self.loss_type == "focal" and isinstance((self.loss_args or {}).get("alpha"), (list, tuple)):
            by_label = np.asarray((self.loss_args or {})["alpha"], np.float32)
        if by_label is None:
            return np.ones(len(targets))
        return np.asarray(by_label[targets.astype(np.int64)], dtype=np.float64)


def resolve_loss(settings: TrainSettings, decision: DecisionSettings, targets: NDArray[np.generic]) -> Loss:
    """Build the loss from settings.

    Args:
        settings: Loss, its arguments and weights.
        decision: Kind and labels.
        targets: All training targets, from which "balanced" weights are computed.

    Raises:
        SettingsError: The kind does not have this loss, argument or weight.
        DataError: Weights are "balanced", and a label never occurs.
    """
    weight_L = _resolve_weight(settings, decision, targets)
    if settings.label_smoothing and (decision.kind not in ("binary", "multiclass") or settings.loss_type):
        raise SettingsError("label_smoothing is for cross-entropy: kind binary or multiclass without a loss_type")
    is_scaled = settings.standardize_labels and decision.kind == "regression"
    scale = Scaling.of(targets).scale if is_scaled else 1.0
    if settings.loss_type is None:
        if settings.loss_args:
            raise SettingsError("loss_args without loss_type; set loss_type to the loss of these arguments")
        return Loss(
            decision.kind, weight_L, label_smoothing=settings.label_smoothing,
            window_weight=settings.window_weight, scale=scale,
        )  # fmt: skip
    known = LOSSES[decision.kind]
    if settings.loss_type not in known:
        raise SettingsError(
            f"loss_type={settings.loss_type} is not for kind {decision.kind}; it has: {', '.join(known)}"
        )
    if weight_L is not None:
        raise SettingsError(f"loss_type={settings.loss_type} takes no class weights; see its loss_args")
    _check_arguments(settings.loss_type, known[settings.loss_type], settings.loss_args or {}, len(decision.labels))
    return Loss(
        decision.kind, None, settings.loss_type, settings.loss_args, window_weight=settings.window_weight, scale=scale
    )


def focal_alpha(alpha: float | Sequence[float] | None, num_labels: int) -> NDArray[np.float32] | None:
    """Return alpha per label, (L,), or None. A single alpha is for label 0; the other labels get 1 - alpha."""
    if alpha is None:
        return None
    if isinstance(alpha, (list, tuple)):
        return np.asarray(alpha, np.float32)
    assert isinstance(alpha, (int, float))
    return np.asarray([alpha] + [1 - alpha] * (num_labels - 1), np.float32)


def _power(base: Tensor, gamma: float) -> Tensor:
    """Return base^gamma for a probability.

    For gamma below 1, the slope at 0 is infinite and would spoil the model's weights. Clamping makes this slope 0.
    """
    return base.clamp(min=torch.finfo(base.dtype).eps) ** gamma


def _shaped(logits_WL: Tensor, target_W: Tensor, gamma: float, scale: float) -> tuple[Tensor, Tensor]:
    p_WL = logits_WL.softmax(dim=1)
    q_WL = scale * _power(1 - p_WL, gamma) * p_WL
    return q_WL, q_WL.gather(1, target_W[:, None])[:, 0]


def _check_arguments(name: str, loss: Callable[..., Tensor], arguments: dict[str, Any], num_labels: int) -> None:
    known = {n: p for n, p in inspect.signature(loss).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for argument, value in arguments.items():
        if argument not in known:
            raise SettingsError(f"loss {name} has no argument {argument!r}; it has: {', '.join(known)}")
        if value is None and known[argument].default is None:
            continue
        is_by_label = isinstance(value, (list, tuple)) and "Sequence" in str(known[argument].annotation)
        values = value if is_by_label else [value]
        if is_by_label and len(values) != num_labels:
            raise SettingsError(f"loss_args {argument} has {len(values)} values; there are {num_labels} labels")
        if not all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in values):
            raise SettingsError(f"loss_args {argument}={value!r} must be a finite number that is not negative")
    missing = [n for n, parameter in known.items() if parameter.default is parameter.empty and n not in arguments]
    if missing:
        raise SettingsError(f"loss {name} needs loss_args {', '.join(missing)}")


def _resolve_weight(
    settings: TrainSettings, decision: DecisionSettings, targets: NDArray[np.generic]
) -> NDArray[np.float32] | None:
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
    if isinstance(weight, dict):
        unknown = [label for label in weight if label not in decision.labels]
        if unknown:
            raise SettingsError(
                f"{name} names {', '.join(unknown)}; the labels of the data are {', '.join(decision.labels)}"
            )
        weight = tuple(weight.get(label, 1.0) for label in decision.labels)
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
