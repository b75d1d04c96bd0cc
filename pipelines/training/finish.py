"""The end of a training run: thresholds on the validation data, the model folder with its report, the summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.decisions.calibration import WindowLogits, calibration_error, fit_calibration
from pipelines.decisions.labels import decide
from pipelines.decisions.metrics import count_distinct, evaluate, histograms_of, tie_warning, tune_thresholds
from pipelines.evaluation.curves import label_rows
from pipelines.evaluation.report import ReportData, render
from pipelines.evaluation.summary import uselessness
from pipelines.model.lora import has_adapter, merge_adapter, save_adapter
from pipelines.model.scorer import DocumentScores, rescored
from pipelines.model.torch_scorer import TorchScorer
from pipelines.model.weights import describe
from pipelines.model_files import PIPELINE_FILE
from pipelines.model_folder import COLUMNS, ModelFolder, seal
from pipelines.settings import (
    UNCALIBRATED,
    Calibration,
    DecisionSettings,
)
from pipelines.storage.locations import shown
from pipelines.training.checkpoints import check_start, publish, remove_all
from pipelines.training.corpus import Corpus
from pipelines.training.order import TrainingWindows
from pipelines.training.ranks import rank, world_size
from pipelines.training.run import RunSpec, TrainSummary
from pipelines.training.state import TrainState
from pipelines.training_settings import TrainSettings
from pipelines.version import VERSION

REPORT_FILE = "report.html"
ADAPTER_FOLDER = "adapter"
"""Folder in a model folder with the LoRA adapter, whose weights the model contains already."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The decision of the finished model, and its metrics and scores on valid."""

    decision: DecisionSettings
    calibration: Calibration = UNCALIBRATED
    metrics: Mapping[str, Any] = field(default_factory=dict)
    histograms: Mapping[str, Any] = field(default_factory=dict)
    scores: DocumentScores | None = None


def result_of(spec: RunSpec, valid: Corpus | None, scores: DocumentScores | None, state: TrainState) -> Result:
    """Return the decision of the finished model: without valid, that of the settings."""
    if valid is None or scores is None:
        return Result(spec.decision, metrics=state.best_metrics)
    return _tune_decision(spec, valid, scores, state.best_metrics)


def _tune_decision(spec: RunSpec, valid: Corpus, scores: DocumentScores, best_metrics: Mapping[str, Any]) -> Result:
    """Calibrate and tune the thresholds on the scores of the best evaluation, if the settings say so."""
    decision, calibration, errors = spec.decision, UNCALIBRATED, {}
    warning = tie_warning(count_distinct(scores.scores_DL, decision))
    if warning is not None:
        _log_once("warning: %s", warning)
    if spec.train.calibrate != "none":
        errors["calibration_error_before"] = calibration_error(valid.targets, scores.scores_DL, decision)
        found = WindowLogits(scores.window_logits_WL, scores.windows.offsets, valid.targets)
        fitted = fit_calibration(spec.train.calibrate, found, decision)
        for line in fitted.remarks:
            _log_once("%s", line)
        calibration = fitted.calibration
        scores = rescored(scores, decision, calibration)
        errors["calibration_error"] = calibration_error(valid.targets, scores.scores_DL, decision)
    if _has_tunable_thresholds(decision):
        tuned = tune_thresholds(valid.targets, scores.scores_DL, decision, spec.train.objective)
        for line in tuned.remarks(spec.train.objective):
            _log_once("%s", line)
        decision = tuned.applied_to(decision)
    decisions = decide(scores.scores_DL, decision, scores.votes_DL)
    metrics = {**best_metrics, **evaluate(valid.targets, scores.scores_DL, decisions, decision), **errors}
    return Result(decision, calibration, metrics, histograms_of(scores.scores_DL, decision), scores)


def _has_tunable_thresholds(decision: DecisionSettings) -> bool:
    """Whether the kind has thresholds, none were given, and the merge is not vote, which thresholds would replace."""
    return decision.kind in ("binary", "multilabel") and decision.thresholds is None and decision.merge != "vote"


def write_folder(
    spec: RunSpec,
    result: Result,
    scorer: TorchScorer,
    folder: Path,
    *,
    corpora: tuple[Corpus, Corpus | None],
    page: str | None,
) -> None:
    """Finish the model folder, copy it to the output, and then remove the checkpoints."""
    module = scorer.model.module
    if has_adapter(module):
        base, weights = describe(spec.model).base, scorer.model.own_weights()
        windows = replace(spec.windows, max_length=scorer.plan.max_length)
        save_adapter(module, folder / ADAPTER_FOLDER, base, weights=weights, windows=windows, decision=result.decision)
        merge_adapter(module)
    scorer.model.save(folder)
    if page is not None:
        (folder / REPORT_FILE).write_text(page)
    seal(
        ModelFolder(
            folder,
            replace(spec.windows, max_length=scorer.plan.max_length),
            result.decision,
            result.calibration,
            metrics=result.metrics,
            histograms=result.histograms,
            reads_pairs=corpora[0].has_pairs,
            measured=_measured_on(corpora[1]),
            training=_training_of(spec, corpora[0]),
        )
    )
    check_start(spec.output, spec.start)
    publish(folder, spec.output, last=PIPELINE_FILE)
    remove_all(spec.output)


def _measured_on(valid: Corpus | None) -> dict[str, Any]:
    """Return the data of the model folder's metrics."""
    return {} if valid is None else {"documents": len(valid), "fingerprint": valid.fingerprint}


def _training_of(spec: RunSpec, train: Corpus) -> dict[str, Any]:
    """Return what the model folder remembers of its training."""
    usual = TrainSettings()
    return {
        "version": VERSION,
        "model": shown(spec.model),
        "columns": {name: value for name, value in asdict(spec.data).items() if name in COLUMNS and value},
        "settings": {name: value for name, value in asdict(spec.train).items() if value != getattr(usual, name)},
        "documents": len(train),
        "fingerprint": train.fingerprint,
    }


def page_of(
    spec: RunSpec,
    result: Result,
    train: Corpus,
    valid: Corpus | None,
    *,
    state: TrainState,
    steps_here: int,
    seconds: float,
) -> str | None:
    """Render the report page about the run and its validation data, if there is any."""
    if valid is None or result.scores is None:
        return None
    scores, decision = result.scores, result.decision
    tokens = int(train.num_tokens_D.sum())
    facts: dict[str, dict[str, Any]] = {
        "Data": {
            "training documents": len(train),
            "training tokens": tokens,
            "training fingerprint": train.fingerprint,
            "valid documents": len(valid),
            "valid fingerprint": valid.fingerprint,
        },
        "Time": {
            "steps": state.step,
            "steps of the last process": steps_here,
            "its seconds": seconds,
            "its tokens per second": tokens * state.epoch * steps_here / max(state.step, 1) / seconds,
        },
        "Settings": {"model": shown(spec.model), **asdict(decision), **asdict(spec.windows), **asdict(spec.train)},
    }
    data = ReportData(
        title=f"{Path(spec.output).name} on its validation data",
        cost=f"It was trained on {len(train):,} documents ({tokens:,} tokens), in {state.step:,} steps.",
        decision=decision,
        targets=valid.targets,
        scores_DL=scores.scores_DL,
        decisions=decide(scores.scores_DL, decision, scores.votes_DL),
        metrics=result.metrics,
        num_tokens_D=valid.num_tokens_D,
        name_of=lambda number: valid.name(int(valid.rows_D[number])),
        losses=state.losses,
        evaluations=state.evaluations,
        facts=facts,
    )
    return render(data)


def summary_of(
    spec: RunSpec,
    result: Result,
    corpora: tuple[Corpus, Corpus | None],
    data: TrainingWindows,
    state: TrainState,
    *,
    packed: bool,
    started: float,
) -> TrainSummary:
    """Return the summary of a finished run."""
    train, valid = corpora
    counts = [data.counts(unit) for unit in range(data.num_units)]
    return TrainSummary(
        model=shown(spec.output),
        documents=len(train),
        rows_in_error=train.num_errors + (0 if valid is None else valid.num_errors),
        documents_truncated=sum(unit.num_truncated for unit in counts),
        windows=sum(unit.num_windows for unit in counts),
        tokens_per_epoch=sum(unit.num_tokens for unit in counts),
        steps=state.step,
        losses=state.losses,
        evaluations=state.evaluations,
        best=state.best,
        stopped_early=state.stopped,
        thresholds=result.decision.thresholds,
        calibration=result.calibration,
        valid=result.metrics,
        workers=world_size(),
        packed=packed,
        seconds=round(time.perf_counter() - started, 2),
        settings=asdict(spec.train),
        labels=[] if valid is None or result.scores is None else _labels(valid, result),
        report=None if valid is None else f"{shown(spec.output)}/{REPORT_FILE}",
    )


def _labels(valid: Corpus, result: Result) -> list[dict[str, Any]]:
    """Return the numbers of each label on valid. Warns if the model is worth no more than a constant answer."""
    assert result.scores is not None
    decision, scores_DL = result.decision, result.scores.scores_DL
    decisions = decide(scores_DL, decision, result.scores.votes_DL)
    if rank() == 0 and (useless := uselessness(valid.targets, decisions, decision)):
        logger.warning(
            "the model is useless on the validation data: %s; train longer or with more rows (--epochs, "
            "--learning-rate), and check the labels",
            useless,
        )
    return label_rows(valid.targets, scores_DL, decisions, decision, result.metrics)


def _log_once(message: str, value: object) -> None:
    """Log on rank 0 only."""
    if rank() == 0:
        logger.info(message, value)
