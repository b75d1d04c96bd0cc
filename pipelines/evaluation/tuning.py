"""Tune the thresholds of a model folder on labelled data, and calibrate its scores."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.decisions.calibration import calibration_error, fit_calibration
from pipelines.decisions.early_exit import check_fit, check_promise, fit_margin
from pipelines.decisions.guarantees import Guarantees, check_confidence, guarantee_thresholds
from pipelines.decisions.labels import merged_scores, thresholds_by_label
from pipelines.decisions.metrics import Tuned, evaluate, histograms_of, tune_thresholds
from pipelines.errors import ModelFolderError, SettingsError
from pipelines.evaluation.labelled import (
    LabelledScores,
    labelled_input,
    open_for,
    promises_of,
    score_labelled,
    shown_number,
)
from pipelines.fields import check_types
from pipelines.model_folder import ModelFolder, write_pipeline_file
from pipelines.printing import renamed
from pipelines.settings import NEVER, CalibrationMethod, ComputeSettings, DataSettings, DecisionSettings
from pipelines.storage.locations import shown

MOST_REMARKS = 5
"""Remarks about labels that are logged one by one."""
USUAL_CONFIDENCE = 0.95
"""Confidence of a fitted early exit, if none is given."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuneOptions:
    """What `tune_folder` tunes for."""

    objective: str = "f1"
    """f1, fbeta=B, precision=P or recall=R."""
    confidence: float | None = None
    """Probability with which the precision or recall holds on new documents. None promises nothing."""
    joint: bool = False
    """Whether the confidence is that of all labels together."""
    calibrate: CalibrationMethod | None = None
    """How scores are calibrated before: none, temperature or per_label. None keeps the calibration of the folder."""
    early_exit: float | None = None
    """Instead of tuning thresholds, fit when to stop reading, such that this share of labels is that of a full read."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.early_exit is not None:
            if self.objective != "f1" or self.joint or self.calibrate is not None:
                raise SettingsError(
                    "early exit is fitted for the thresholds that the folder has; tune them first, in a run of its own"
                )
            check_promise(self.early_exit, self.early_exit_confidence)
            return
        check_confidence(self.objective, self.confidence)
        if self.joint and self.confidence is None:
            raise SettingsError("joint is for a confidence; give one, such as --confidence 0.95")

    @property
    def early_exit_confidence(self) -> float:
        """The confidence, or the usual one if none is given."""
        return USUAL_CONFIDENCE if self.confidence is None else self.confidence


@dataclass(frozen=True)
class TuneResult:
    """Thresholds that were tuned and written into a model folder."""

    model: str
    rows_in_error: int
    objective: str
    labels: tuple[str, ...]
    """Labels of the thresholds."""
    thresholds: tuple[float, ...]
    thresholds_before: float | tuple[float, ...] | None
    untuned: tuple[str, ...] = ()
    """Labels that keep their old threshold, because all rows have them or no row has them."""
    missed: tuple[str, ...] = ()
    """Labels for which no threshold reaches the objective."""
    pooled: tuple[str, ...] = ()
    """Labels with too few positives for a threshold of their own."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Metrics with the new thresholds."""
    guarantees: Mapping[str, Any] = field(default_factory=dict)
    """What is promised of the thresholds, if a confidence was given (`guarantees.Guarantees`)."""
    early_exit: Mapping[str, Any] = field(default_factory=dict)
    """When to stop reading, if this was fitted instead of thresholds (`early_exit.Margin`)."""

    def __repr__(self) -> str:
        tuned = zip(self.labels, self.thresholds, strict=True)
        lines = [
            f"TuneResult of {self.model} for {self.objective}",
            *(f"  {name} {value:.4g}" for name, value in tuned),
        ]
        lines += [f"  {name} {shown_number(value)}" for name, value in self.metrics.items() if name != "per_label"]
        lines += [f"  {name}: {text}" for name, text in self.promises.items()]
        lines += [f"  early_exit {name}: {shown_number(value)}" for name, value in self.early_exit.items()]
        return "\n".join(lines)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The thresholds before and after, what is promised of them, and the metrics of each label."""
        before = self.thresholds_before
        old = before if isinstance(before, tuple) else (before,) * len(self.labels)
        promises, per_label = self.promises, self.metrics.get("per_label", {})
        return [
            {
                "label": label,
                "before": "never" if was == NEVER else was,
                "threshold": "never" if threshold == NEVER else threshold,
                **renamed(per_label.get(label, {})),
                "promise": promises.get(label),
            }
            for label, was, threshold in zip(self.labels, old, self.thresholds, strict=True)
        ]

    @property
    def promises(self) -> dict[str, str]:
        """What is promised of each label's threshold, in words. Empty without promises."""
        return promises_of(self.guarantees)

    def to_json(self) -> dict[str, Any]:
        """Return the result as `pipelines tune --json` prints it."""
        before = self.thresholds_before
        return {
            "rows_in_error": self.rows_in_error,
            "objective": self.objective,
            "thresholds": list(self.thresholds),
            "thresholds_before": list(before) if isinstance(before, tuple) else before,
            "untuned": list(self.untuned),
            "missed": list(self.missed),
            "pooled": list(self.pooled),
            **({"guarantees": dict(self.guarantees)} if self.guarantees else {}),
            **({"early_exit": dict(self.early_exit)} if self.early_exit else {}),
            **self.metrics,
        }


def tune_folder(
    model: str, source: str | pa.Table, data: DataSettings, compute: ComputeSettings, options: TuneOptions
) -> TuneResult:
    """Tune thresholds for the objective, or fit when to stop reading, and replace the folder's pipeline.json.

    Args:
        model: Local model folder.
        source: Labelled file, folder or glob; or a table in memory.
        data: Which columns are read, and how many rows.
        compute: How the forward pass runs.
        options: What is tuned.

    Raises:
        UsageError: The folder is not local, its kind has no thresholds, or the data does not fit.
    """
    folder = _open_to_tune(model, data, needs_thresholds=options.early_exit is None)
    labelled = labelled_input(source, data, folder.decision)
    if options.early_exit is not None:
        promise = {"share": options.early_exit, "confidence": options.early_exit_confidence}
        check_fit(folder.decision, labelled.num_rows, **promise)
    scored = score_labelled(folder, labelled, data, compute)
    if options.early_exit is not None:
        return _fit_early_exit(folder, scored, options)
    had_early_exit = bool(folder.early_exit)
    folder, scored, errors = _calibrated(folder, scored, options.calibrate)
    tuned = _tuned(scored, folder.decision, options)
    decision = tuned.applied_to(folder.decision)
    guarantees = tuned.to_json() if isinstance(tuned, Guarantees) else {}
    metrics = {**evaluate(scored.targets, scored.scores_DL, scored.decide(decision), decision), **errors}
    histograms = histograms_of(scored.scores_DL, decision)
    write_pipeline_file(
        replace(
            folder,
            decision=decision,
            metrics=metrics,
            histograms=histograms,
            measured={"documents": len(scored.row_D), "fingerprint": labelled.fingerprint},
            guarantees=guarantees,
            early_exit={},
        )
    )
    if had_early_exit:
        logger.warning("early_exit=certified needs a new fit for these thresholds: pipelines tune --early-exit")
    _say_remarks(tuned, folder.decision, options.objective)
    return TuneResult(
        model=shown(model),
        rows_in_error=scored.rows_in_error,
        objective=options.objective,
        labels=folder.decision.labels[-len(tuned.thresholds) :],
        thresholds=tuned.thresholds,
        thresholds_before=folder.decision.thresholds,
        untuned=tuned.untuned if isinstance(tuned, Tuned) else (),
        missed=tuned.missed,
        pooled=tuned.pooled if isinstance(tuned, Tuned) else (),
        metrics=metrics,
        guarantees=guarantees,
    )


def _say_remarks(tuned: Tuned | Guarantees, before: DecisionSettings, objective: str) -> None:
    """Log what is special about the new thresholds."""
    remarks = tuned.remarks(objective)
    for line in remarks[:MOST_REMARKS]:
        logger.warning("%s", line)
    if len(remarks) > MOST_REMARKS:
        logger.warning("%d more remarks of this kind; the table has all labels", len(remarks) - MOST_REMARKS)
    if all(threshold == NEVER for threshold in tuned.thresholds):
        logger.warning(
            "no label is assigned any more: ask for less, or tune on more documents. The old thresholds were %s",
            thresholds_by_label(before),
        )


def _fit_early_exit(folder: ModelFolder, scored: LabelledScores, options: TuneOptions) -> TuneResult:
    """Fit a margin, and write it into the folder."""
    assert options.early_exit is not None
    decision = folder.decision
    fitted = fit_margin(
        scored.windows,
        decision,
        folder.calibration,
        share=options.early_exit,
        confidence=options.early_exit_confidence,
    )
    write_pipeline_file(replace(folder, early_exit=fitted.to_json()))
    logger.info("%s", fitted.in_words)
    thresholds = thresholds_by_label(decision)
    return TuneResult(
        model=shown(str(folder.path)),
        rows_in_error=scored.rows_in_error,
        objective=f"early_exit={options.early_exit:g}",
        labels=tuple(thresholds),
        thresholds=tuple(thresholds.values()),
        thresholds_before=decision.thresholds,
        metrics=evaluate(scored.targets, scored.scores_DL, scored.decide(decision), decision),
        early_exit=fitted.to_json(),
    )


def _tuned(scored: LabelledScores, decision: DecisionSettings, options: TuneOptions) -> Tuned | Guarantees:
    """Return the thresholds, with promises if there is a confidence."""
    if options.confidence is None:
        return tune_thresholds(scored.targets, scored.scores_DL, decision, options.objective)
    return guarantee_thresholds(
        scored.targets,
        scored.scores_DL,
        decision,
        objective=options.objective,
        confidence=options.confidence,
        joint=options.joint,
    )


def _calibrated(
    folder: ModelFolder, scored: LabelledScores, method: CalibrationMethod | None
) -> tuple[ModelFolder, LabelledScores, dict[str, float | None]]:
    """Return folder and scores with a new calibration, and its error before and after. None changes nothing."""
    if method is None:
        return folder, scored, {}
    decision, found = folder.decision, scored.windows
    fitted = fit_calibration(method, found, decision)
    for line in fitted.remarks:
        logger.info("%s", line)
    scores_DL, _ = merged_scores(found.logits_WL, found.offsets, decision, fitted.calibration)
    errors = {
        "calibration_error_before": calibration_error(scored.targets, scored.scores_DL, decision),
        "calibration_error": calibration_error(scored.targets, scores_DL, decision),
    }
    return replace(folder, calibration=fitted.calibration), replace(scored, scores_DL=scores_DL), errors


def _open_to_tune(model: str, data: DataSettings, *, needs_thresholds: bool) -> ModelFolder:
    """Open a folder that can be written to, and whose kind has thresholds if they are needed."""
    if "://" in model:
        raise ModelFolderError(f"{shown(model)} is a URL; tune a local folder and upload it")
    if not os.access(Path(model).expanduser(), os.W_OK):
        raise ModelFolderError(
            f"{shown(model)} is not a folder that can be written to; make one: pipelines convert {shown(model)} NEW"
        )
    folder = open_for(model, data)
    if needs_thresholds and folder.decision.kind not in ("binary", "multilabel"):
        raise SettingsError(
            f"thresholds are for kinds binary and multilabel; {shown(model)} is of kind {folder.decision.kind}, "
            "which has no thresholds"
        )
    return folder
