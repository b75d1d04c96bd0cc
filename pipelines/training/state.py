"""The state of a run: its steps, losses and evaluations, and which evaluation is the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.decisions.metrics import LESS_IS_BETTER, METRICS, default_metric
from pipelines.errors import JobError, SettingsError
from pipelines.model.lora import has_adapter, trained_weights
from pipelines.model.scorer import DocumentScores
from pipelines.settings import DecisionSettings
from pipelines.training.ranks import world_size
from pipelines.training_settings import TrainSettings


@dataclass(frozen=True)
class Evaluation:
    """Metrics of the validation data with the current weights."""

    metrics: Mapping[str, Any]
    scores: DocumentScores | None = None


@dataclass(frozen=True)
class BestMetric:
    """The metric that chooses the best weights."""

    name: str
    minimize: bool
    delta: float = 0.0
    """Minimum improvement over the best evaluation so far."""

    @classmethod
    def of(cls, settings: TrainSettings, decision: DecisionSettings, own_metrics: tuple[str, ...] = ()) -> BestMetric:
        """Return the metric in the settings, or the default of the kind.

        Args:
            settings: Training settings.
            decision: Kind and labels.
            own_metrics: Names of the caller's own metrics.

        Raises:
            SettingsError: This kind does not have the metric.
        """
        name = settings.metric or default_metric(decision)
        known = ["loss", *(metric for metric in METRICS[decision.kind] if metric != "per_label"), *own_metrics]
        if name not in known:
            raise SettingsError(f"metric={name!r} is not a metric of kind {decision.kind}; it has {', '.join(known)}")
        minimize = name in LESS_IS_BETTER if settings.metric_minimize is None else settings.metric_minimize
        return cls(name, minimize, settings.early_stopping_delta)

    def equal_everywhere(self, evaluations: Sequence[Mapping[str, Any]]) -> bool:
        """Whether several evaluations all have the same value, so that the metric cannot choose among them."""
        return len(evaluations) > 1 and len({str(metrics.get(self.name)) for metrics in evaluations}) == 1

    def improves(self, metrics: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
        """Whether metrics are better than the best so far by more than delta.

        A finite value is better than an undefined one. An undefined value is never better, except in the first
        evaluation.

        Raises:
            SettingsError: The metric is not in metrics.
        """
        if self.name not in metrics:
            raise SettingsError(f"metric={self.name!r} is none of the metrics of valid: {', '.join(metrics)}")
        value, other = metrics[self.name], None if best is None else best[self.name]
        if other is None or not np.isfinite(other):
            return best is None or (value is not None and bool(np.isfinite(value)))
        if value is None:
            return False
        return bool((other - value if self.minimize else value - other) > self.delta)


@dataclass
class TrainState:
    """The state of a run. All values are JSON content."""

    epoch: int = 0
    """Number of finished epochs."""
    step: int = 0
    """Number of optimizer steps done."""
    losses: list[float] = field(default_factory=list)
    """Loss of each step, averaged over all ranks."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of each evaluation, with its step and epoch."""
    best: int | None = None
    """Index of the best evaluation."""
    flat: int = 0
    """Number of evaluations since the best one that count for early stopping."""
    stopped: bool = False
    """Whether early stopping ended the run."""

    @property
    def best_metrics(self) -> dict[str, Any]:
        """Metrics of the best evaluation. Empty before the first evaluation."""
        best = {} if self.best is None else self.evaluations[self.best]
        return {name: value for name, value in best.items() if name not in ("step", "epoch")}

    def add_evaluation(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Record an evaluation, and return its metrics as JSON content."""
        plain = {key: _plain(value) for key, value in metrics.items()}
        self.evaluations.append({"step": self.step, "epoch": self.epoch, **plain})
        return plain


class BestWeights:
    """A copy of the weights of the best evaluation, and its scores."""

    def __init__(self, metric: BestMetric) -> None:
        self.metric = metric
        self.weights: dict[str, Tensor] | None = None
        self.scores: DocumentScores | None = None
        """Scores of the best evaluation, or None if an earlier process computed them."""

    def consider(self, evaluation: Evaluation, state: TrainState, module: nn.Module) -> bool:
        """Record an evaluation in the state, and copy the weights if it is the best. Return whether it is."""
        improves = self.metric.improves(evaluation.metrics, state.best_metrics or None)
        state.add_evaluation(evaluation.metrics)
        if improves:
            state.best, state.flat = len(state.evaluations) - 1, 0
            self.scores = evaluation.scores
            self.weights = {name: tensor.detach().clone() for name, tensor in trained_weights(module).items()}
        return improves

    def restore(self, module: nn.Module) -> None:
        """Load the best weights into the module, if there was an evaluation."""
        if self.weights is not None:
            module.load_state_dict(self.weights, strict=not has_adapter(module))


class LossLog:
    """Losses of the last steps. They stay on the device until their values are needed."""

    def __init__(self, describe_step: Callable[[int], str]) -> None:
        """describe_step returns the documents of a step, for the error message if a loss is not finite."""
        self._describe_step = describe_step
        self._pending: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Add this rank's share of the loss of a step."""
        self._pending.append(loss)

    def flush(self, state: TrainState) -> None:
        """Move the pending losses into the state, with one reduction over ranks and one synchronization.

        Raises:
            JobError: A loss or a gradient is not finite.
        """
        if not self._pending:
            return
        together = torch.stack(self._pending)
        self._pending = []
        if world_size() > 1:
            dist.all_reduce(together)
        first = len(state.losses)
        state.losses += together.tolist()
        bad = np.flatnonzero(~np.isfinite(state.losses[first:]))
        if len(bad):
            number = first + int(bad[0])
            raise JobError(
                f"the loss or its gradient is not finite at step {number + 1}: lower learning_rate, or train in "
                f"float32 (train_dtype=float32; in Simple Transformers: fp16=False); the step saw "
                f"{self._describe_step(number)}"
            )


def _plain(value: Any) -> Any:
    """Convert Numpy numbers and arrays to Python ones, for JSON."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
