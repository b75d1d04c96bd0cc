"""`TorchScorer`: a `Scorer` whose model runs with PyTorch, and can be trained."""

from __future__ import annotations

from pipelines.model.scorer import Scorer
from pipelines.model.window_model import WindowModel


class TorchScorer(Scorer):
    """A scorer whose module and weights are at hand."""

    model: WindowModel
