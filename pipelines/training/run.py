"""What defines a training run, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.settings import Calibration, ComputeSettings, DataSettings, DecisionSettings, WindowSettings
from pipelines.training_settings import TrainSettings


@dataclass(frozen=True)
class RunSpec:
    """Everything that defines a run, except its data."""

    model: str
    """Pretrained weights: a folder or a Hugging Face hub name."""
    output: str
    windows: WindowSettings
    decision: DecisionSettings
    train: TrainSettings
    compute: ComputeSettings
    data: DataSettings = field(default_factory=DataSettings)
    """The columns of the data, which the model folder remembers."""
    start: str = ""
    """Id of this start of the run, if other trainings may use the output folder."""


@dataclass(frozen=True)
class TrainSummary:
    """The result of a finished run."""

    model: str
    """The finished model folder."""
    documents: int
    rows_in_error: int
    documents_truncated: int
    windows: int
    tokens_per_epoch: int
    steps: int
    losses: list[float]
    """Loss of each step."""
    evaluations: list[dict[str, Any]]
    """Metrics of valid at each evaluation, with its step and epoch."""
    best: int | None
    """Index of the best evaluation."""
    stopped_early: bool
    thresholds: float | tuple[float, ...] | None
    calibration: Calibration
    valid: Mapping[str, Any]
    """Metrics of the finished model on valid. Empty without valid."""
    workers: int
    packed: bool
    seconds: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    labels: Sequence[Mapping[str, Any]] = ()
    """The numbers of each label on valid (`curves.label_rows`), the most frequent first."""
    report: str | None = None
    """Location of the report page, if there is validation data."""

    def __repr__(self) -> str:
        lines = [
            f"TrainSummary of {self.model}",
            f"  {self.documents:,} documents ({self.rows_in_error:,} more rows in error), {self.windows:,} windows, "
            f"{self.steps:,} steps in {self.seconds:,.0f} s",
        ]
        shown_metrics = [f"{name} {value:.4g}" for name, value in self.valid.items() if isinstance(value, (int, float))]
        return "\n".join([*lines, *([f"  valid: {', '.join(shown_metrics)}"] if shown_metrics else [])])

    def to_json(self) -> dict[str, Any]:
        """Return the summary as `pipelines train --json` prints it."""
        return asdict(self)
