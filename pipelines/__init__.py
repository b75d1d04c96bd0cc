"""Train, score and serve text classifiers for texts longer than the model and data larger than one machine.

Importing this package is cheap: neither torch nor Ray is loaded until a name that needs them is used.

Example:
    >>> import pipelines
    >>> pipelines.train(train="train/", valid="valid/", model="bert-base-uncased", output="runs/spam")
    >>> pipelines.evaluate("runs/spam", "test/")
    >>> pipelines.Scorer.load("runs/spam").predict(["a text of any length"])
    >>> pipelines.score("runs/spam", "mail/", "scored/")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipelines.version import VERSION

if TYPE_CHECKING:
    from pipelines.api import convert, evaluate, evaluate_scored, quantize, score, train, tune
    from pipelines.model.scorer import Scorer

__version__ = VERSION
__all__ = ["Scorer", "convert", "evaluate", "evaluate_scored", "quantize", "score", "train", "tune"]

_HOMES = {
    "Scorer": "pipelines.model.scorer",
    "convert": "pipelines.api",
    "evaluate": "pipelines.api",
    "evaluate_scored": "pipelines.api",
    "quantize": "pipelines.api",
    "score": "pipelines.api",
    "train": "pipelines.api",
    "tune": "pipelines.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
