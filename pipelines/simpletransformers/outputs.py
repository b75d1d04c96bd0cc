"""Return values and result files of the facades, in the shapes that Simple Transformers has.

Shapes: n texts, W windows of one text, L labels.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.decisions.labels import Decisions, activate
from pipelines.settings import DecisionSettings
from pipelines.simpletransformers.inputs import LabelledTexts
from pipelines.simpletransformers.translate import theirs

if TYPE_CHECKING:
    from pipelines.model.scorer import DocumentScores
    from pipelines.training.state import TrainState


@dataclass(frozen=True)
class InputExample:
    """One text of an evaluation, as `wrong_predictions` returns it."""

    guid: int
    text_a: str
    text_b: str | None
    label: Any


def predicted(decisions: Decisions) -> Any:
    """Return label ids (n,), or for several labels n lists of 0 and 1, or for regression values (n,)."""
    if decisions.positive_DL is not None:
        return decisions.positive_DL.astype(int).tolist()
    return decisions.label_D if decisions.value_D is None else decisions.value_D.astype(np.float64)


def raw_outputs(scores: DocumentScores, decision: DecisionSettings, *, by_window: bool) -> Any:
    """Return raw outputs as float64.

    Args:
        scores: Scored documents.
        decision: Kind and labels.
        by_window: Whether to return the outputs of all windows. If not, each document must have one window.

    Returns:
        Logits (n, L); for several labels probabilities (n, L); for regression values (n,). With by_window, n arrays
        (W, L).
    """
    raw_WL = scores.window_logits_WL
    if decision.kind == "multilabel":
        raw_WL = activate(raw_WL, "multilabel")
    raw_WL = raw_WL.astype(np.float64)
    if by_window:
        return np.split(raw_WL, scores.windows.offsets[1:-1]) if len(scores.errors) else []
    return raw_WL[:, 0] if decision.kind == "regression" else raw_WL


def wrong_predictions(data: LabelledTexts, targets: NDArray[np.generic], found: Any) -> list[InputExample]:
    """Return the rows with a wrong prediction; for several labels, those with at least one wrong label.

    Args:
        data: The evaluated texts and labels.
        targets: True label ids (n,), or 0 and 1 (n, L).
        found: Predictions in the shape of targets.
    """
    labels = data.labels or []
    wrong = np.asarray(targets) != np.asarray(found)
    rows = np.flatnonzero(wrong if wrong.ndim == 1 else wrong.any(axis=1))
    return [
        InputExample(int(row), data.texts[row], None if data.pairs is None else data.pairs[row], labels[row])
        for row in rows
    ]


def progress_lists(state: TrainState) -> dict[str, list[Any]]:
    """Return lists of global_step, train_loss and every metric, with one entry per evaluation."""
    lists: dict[str, list[Any]] = {
        "global_step": [item["step"] for item in state.evaluations],
        "train_loss": [state.losses[item["step"] - 1] for item in state.evaluations],
    }
    for item in state.evaluations:
        for name, value in theirs(item).items():
            if name not in ("step", "epoch"):
                lists.setdefault(name, []).append(value)
    return lists


def write_progress(folder: Path, state: TrainState) -> None:
    """Write training_progress_scores.csv into a folder."""
    lists = progress_lists(state)
    with (folder / "training_progress_scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(lists)
        writer.writerows(zip(*lists.values(), strict=True))


def write_results(folder: Path, result: Mapping[str, Any]) -> None:
    """Write eval_results.txt into a folder, which is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{name} = {result[name]}" for name in sorted(result)]
    (folder / "eval_results.txt").write_text("\n".join(lines) + "\n")
