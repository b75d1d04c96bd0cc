"""Fine-tuning on documents: open the model, train, tune the decision on valid, write the model folder.

In an evaluation, each rank scores its share of the documents with `Scorer`.

Shapes: D documents, W windows, L labels.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipelines.decisions.calibration import WindowLogits, calibration_error, fit_calibration
from pipelines.decisions.labels import Decisions, Scaling, decide
from pipelines.decisions.metrics import count_distinct, evaluate, histograms_of, tie_warning, tune_thresholds
from pipelines.errors import JobError
from pipelines.evaluation.curves import label_rows
from pipelines.evaluation.report import ReportData, render
from pipelines.evaluation.summary import uselessness
from pipelines.model.lora import has_adapter, load_trained, merge_adapter, save_adapter
from pipelines.model.scorer import DocumentScores, concat_scores, plan_of, rescored
from pipelines.model.torch_scorer import TorchScorer
from pipelines.model.weights import describe, new_classifier
from pipelines.model.window_model import WindowModel
from pipelines.model_files import PIPELINE_FILE
from pipelines.model_folder import COLUMNS, ModelFolder, seal
from pipelines.settings import (
    UNCALIBRATED,
    Calibration,
    ComputeSettings,
    DataSettings,
    DecisionSettings,
    WindowSettings,
)
from pipelines.storage.locations import shown
from pipelines.text.pretrained import save_tokenizer, uses_type_ids
from pipelines.text.tokenization import Tokenizer
from pipelines.training.checkpoints import Checkpoints, fetch_newest, publish, remove_all
from pipelines.training.corpus import Corpus
from pipelines.training.loop import NAMES_SHOWN, Hooks, TrainLoop
from pipelines.training.losses import Loss, resolve_loss
from pipelines.training.order import TrainingWindows, training_windows
from pipelines.training.ranks import barrier, rank, shared_dtype, worker_device, world_size
from pipelines.training.state import BestMetric, Evaluation, TrainState
from pipelines.training.tracking import tracked
from pipelines.training_settings import TrainSettings
from pipelines.version import VERSION

REPORT_FILE = "report.html"
ADAPTER_FOLDER = "adapter"
"""Folder in a model folder with the LoRA adapter, whose weights the model contains already."""
OwnMetrics = Callable[[NDArray[np.generic], Decisions, DocumentScores], dict[str, Any]]
"""Function that computes the caller's own metrics, by name, from targets, decisions and scores."""
logger = logging.getLogger(__name__)


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
            f"  {self.documents:,} documents, {self.windows:,} windows, {self.steps:,} steps in {self.seconds:,.0f} s",
        ]
        shown_metrics = [f"{name} {value:.4g}" for name, value in self.valid.items() if isinstance(value, (int, float))]
        return "\n".join([*lines, *([f"  valid: {', '.join(shown_metrics)}"] if shown_metrics else [])])

    def to_json(self) -> dict[str, Any]:
        """Return the summary as `pipelines train --json` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class _Result:
    """The decision of the finished model, and its metrics and scores on valid."""

    decision: DecisionSettings
    calibration: Calibration = UNCALIBRATED
    metrics: Mapping[str, Any] = field(default_factory=dict)
    histograms: Mapping[str, Any] = field(default_factory=dict)
    scores: DocumentScores | None = None


def fit(
    spec: RunSpec,
    train: Corpus,
    valid: Corpus | None,
    *,
    is_preempted: Callable[[], bool] | None = None,
    is_interrupted: Callable[[], bool] | None = None,
    on_metrics: Callable[[Mapping[str, float]], None] | None = None,
) -> TrainSummary:
    """Fine-tune, keep the best weights, tune thresholds on valid, and write the model folder.

    A run with checkpoints under spec.output is resumed from the newest one. Every rank calls this with the same
    arguments and returns the same summary. Rank 0 writes the files.

    Args:
        spec: Everything that defines the run, except its data.
        train: The training data.
        valid: The validation data, or None.
        is_preempted: Returns whether a machine of the run will be taken away.
        is_interrupted: For a run in one process, whose data is complete: returns whether it is to end with a
            checkpoint.
        on_metrics: Receives numbers by name during the run, on rank 0.
    """
    started = time.perf_counter()
    values = {"model": shown(spec.model), **asdict(spec.decision), **asdict(spec.windows), **asdict(spec.train)}
    with (
        tempfile.TemporaryDirectory(prefix="pipelines-train-") as scratch,
        tracked(spec.train, spec.output, values, is_shown=rank() == 0) as tracking,
    ):
        folder = Path(scratch, "model")
        checkpoint = fetch_newest(spec.output, Path(scratch))
        scorer = _open(spec, train, folder, checkpoint)
        data = training_windows(scorer, train, spec.train)
        loss = resolve_loss(spec.train, spec.decision, train.all_targets)
        evaluate_valid = None if valid is None else partial(measure, scorer, valid, loss, spec.compute)
        checkpoints = Checkpoints(spec.output, keep=spec.train.keep_checkpoints)
        hooks = Hooks(
            evaluate=evaluate_valid,
            on_checkpoint=lambda loop: _save_checkpoint(loop, scorer.model, checkpoints, spec.train),
            is_preempted=is_preempted,
            is_interrupted=is_interrupted,
            on_metrics=on_metrics,
            on_scalars=tracking.log,
        )
        if is_interrupted is not None:
            _say_sizes(train, data)
        loop = TrainLoop(scorer.model, data, spec.train, loss, BestMetric.of(spec.train, spec.decision), hooks=hooks)
        first_step = _resume(loop, checkpoint)
        try:
            state = loop.run()
        finally:
            checkpoints.close()
        scores = None if evaluate_valid is None else loop.best_scores or evaluate_valid().scores
        result = _result_of(spec, valid, scores, state)
        if rank() == 0:
            seconds = time.perf_counter() - started
            page = _page(spec, result, train, valid, state=state, steps_here=state.step - first_step, seconds=seconds)
            training = _training_of(spec, train, valid)
            _write_folder(spec, result, scorer, folder, has_pairs=train.has_pairs, page=page, training=training)
            tracking.log({f"final_{name}": value for name, value in result.metrics.items()}, state.step)
            tracking.log_files(folder / REPORT_FILE, folder / PIPELINE_FILE)
        barrier()
        return _summary(spec, result, (train, valid), data, state, packed=scorer.model.is_packed, started=started)


def prepare_folder(spec: RunSpec) -> Tokenizer:
    """Write the tokenizer to the output folder, and return it. The data is tokenized before any model is loaded.

    Raises:
        ModelFolderError: The tokenizer does not belong to the pretrained weights.
    """
    pretrained = describe(spec.model)
    with tempfile.TemporaryDirectory(prefix="pipelines-train-") as scratch:
        tokenizer = save_tokenizer(pretrained.tokenizer, Path(scratch))
        tokenizer.check_vocabulary(pretrained.vocabulary, where=f"--model {spec.model}")
        publish(Path(scratch), spec.output, last="tokenizer.json")
    return tokenizer


def measure(
    scorer: TorchScorer, valid: Corpus, loss: Loss, compute: ComputeSettings, own_metrics: OwnMetrics | None = None
) -> Evaluation:
    """Compute the loss (mean over windows, weighted as in training) and the metrics of valid, the same on every rank.

    The forward pass runs under autocast, in the number format in which this machine would score the finished folder.

    Raises:
        JobError: The model's output is not finite. The message names documents.
    """
    share = np.linspace(0, len(valid), world_size() + 1).astype(int)
    dtype = shared_dtype(compute.dtype, scorer.model.device)
    with torch.autocast(scorer.model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        found = [scorer.score_documents(some) for some in valid.between(share[rank()], share[rank() + 1])]
    if world_size() > 1:
        of_ranks = [found] * world_size()
        dist.all_gather_object(of_ranks, found)
        found = [scores for of_rank in of_ranks for scores in of_rank]
    scores = concat_scores(found)
    bad = [document for document, error in enumerate(scores.errors) if error is not None]
    if bad:
        names = ", ".join(valid.name(int(valid.rows_D[document])) for document in bad[:NAMES_SHOWN])
        raise JobError(
            f"{scores.errors[bad[0]]} for {len(bad)} of {len(valid)} valid documents ({names}): lower learning_rate, "
            f"or use dtype=float32"
        )
    decisions = decide(scores.scores_DL, scorer.decision, scores.votes_DL)
    metrics = evaluate(valid.targets, scores.scores_DL, decisions, scorer.decision)
    own = {} if own_metrics is None else own_metrics(valid.targets, decisions, scores)
    return Evaluation({"loss": mean_loss(scores, valid.targets, loss), **metrics, **own}, scores)


def mean_loss(scores: DocumentScores, targets: NDArray[np.generic], loss: Loss) -> float:
    """Compute the mean loss over the windows of documents, weighted as in training."""
    targets_W = targets[scores.windows.document_W]
    losses_W = loss(torch.from_numpy(scores.window_logits_WL), torch.from_numpy(targets_W)).numpy()
    share_W = loss.shares(scores.windows)
    return float((losses_W * share_W).sum()) / (float((loss.normalizers(targets_W) * share_W).sum()) or 1.0)


def _open(spec: RunSpec, train: Corpus, folder: Path, checkpoint: Path | None) -> TorchScorer:
    """Open the model to train: pretrained weights, or those of the checkpoint. Writes the tokenizer to the folder."""
    pretrained = describe(spec.model)
    tokenizer = save_tokenizer(pretrained.tokenizer, folder)
    is_lora = bool(spec.train.lora_rank) or pretrained.base != spec.model
    start = spec.model if is_lora or checkpoint is None else str(checkpoint)
    module, has_new_head = new_classifier(start, spec.decision, pad_id=tokenizer.template.pad_id, settings=spec.train)
    if is_lora and checkpoint is not None:
        load_trained(module, checkpoint)
    compute = replace(spec.compute, dtype="float32", device=worker_device(spec.compute.device))
    model = WindowModel(module, tokenizer.template, compute, uses_type_ids=uses_type_ids(folder))
    if spec.decision.kind == "regression" and spec.train.standardize_labels:
        is_scaled = has_new_head or checkpoint is not None
        if not model.learn_scaled(Scaling.of(train.all_targets), is_scaled=is_scaled) and rank() == 0:
            logger.warning(
                "labels are learned as they are: %s has no bias that could hold their mean", model.model_type
            )
    plan = plan_of(spec.windows, tokenizer, model_type=model.model_type, model_limit=model.row_limit)
    return TorchScorer(model, tokenizer, plan, spec.decision)


def _resume(loop: TrainLoop, checkpoint: Path | None) -> int:
    """Resume from the checkpoint, if there is one. Return the step at which this process begins."""
    if checkpoint is not None:
        loop.restore(checkpoint)
        if rank() == 0:
            logger.info("resuming from step %d, in epoch %d", loop.state.step, loop.state.epoch + 1)
    return loop.state.step


def _say_sizes(train: Corpus, data: TrainingWindows) -> None:
    """Log how much there is to train on."""
    longest = int(np.argmax(train.num_tokens_D))
    logger.info(
        "training on %s windows of %s documents; the longest has %s tokens (%s)",
        f"{data.num_windows(range(data.num_units)):,}",
        f"{len(train):,}",
        f"{int(train.num_tokens_D[longest]):,}",
        train.name(int(train.rows_D[longest])),
    )


def _save_checkpoint(loop: TrainLoop, model: WindowModel, checkpoints: Checkpoints, settings: TrainSettings) -> None:
    """Write a checkpoint while training continues, unless the run is finished."""
    if rank() > 0 or loop.state.epoch == settings.epochs or loop.state.stopped:
        return
    write_weights, write_state = model.snapshot(), loop.snapshot()

    def write(folder: Path) -> None:
        write_weights(folder)
        write_state(folder)

    checkpoints.save(loop.state.step, write)


def _result_of(spec: RunSpec, valid: Corpus | None, scores: DocumentScores | None, state: TrainState) -> _Result:
    """Return the decision of the finished model: without valid, that of the settings."""
    if valid is None or scores is None:
        return _Result(spec.decision, metrics=state.best_metrics)
    return _tune_decision(spec, valid, scores, state.best_metrics)


def _tune_decision(spec: RunSpec, valid: Corpus, scores: DocumentScores, best_metrics: Mapping[str, Any]) -> _Result:
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
    return _Result(decision, calibration, metrics, histograms_of(scores.scores_DL, decision), scores)


def _has_tunable_thresholds(decision: DecisionSettings) -> bool:
    """Whether the kind has thresholds, none were given, and the merge is not vote, which thresholds would replace."""
    return decision.kind in ("binary", "multilabel") and decision.thresholds is None and decision.merge != "vote"


def _write_folder(
    spec: RunSpec,
    result: _Result,
    scorer: TorchScorer,
    folder: Path,
    *,
    has_pairs: bool,
    page: str | None,
    training: Mapping[str, Any],
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
            reads_pairs=has_pairs,
            training=training,
        )
    )
    publish(folder, spec.output, last=PIPELINE_FILE)
    remove_all(spec.output)


def _training_of(spec: RunSpec, train: Corpus, valid: Corpus | None) -> dict[str, Any]:
    """Return what the model folder remembers of its training."""
    usual = TrainSettings()
    return {
        "version": VERSION,
        "model": shown(spec.model),
        "columns": {name: value for name, value in asdict(spec.data).items() if name in COLUMNS and value},
        "settings": {name: value for name, value in asdict(spec.train).items() if value != getattr(usual, name)},
        "documents": len(train),
        "fingerprint": train.fingerprint,
        "valid_documents": 0 if valid is None else len(valid),
        "valid_fingerprint": None if valid is None else valid.fingerprint,
    }


def _page(
    spec: RunSpec,
    result: _Result,
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


def _summary(
    spec: RunSpec,
    result: _Result,
    corpora: tuple[Corpus, Corpus | None],
    data: TrainingWindows,
    state: TrainState,
    *,
    packed: bool,
    started: float,
) -> TrainSummary:
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


def _labels(valid: Corpus, result: _Result) -> list[dict[str, Any]]:
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
    return label_rows(valid.targets, scores_DL, decisions, decision)


def _log_once(message: str, value: object) -> None:
    """Log on rank 0 only."""
    if rank() == 0:
        logger.info(message, value)
