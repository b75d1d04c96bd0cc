"""Fine-tuning on documents: open the model, train, tune the decision on valid, write the model folder.

In an evaluation, each rank scores its share of the documents with `Scorer`.

Shapes: D documents, W windows, L labels.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipelines.decisions.labels import Decisions, Scaling, decide
from pipelines.decisions.metrics import evaluate
from pipelines.errors import JobError
from pipelines.model.lora import load_trained
from pipelines.model.scorer import DocumentScores, concat_scores, plan_of
from pipelines.model.torch_scorer import TorchScorer
from pipelines.model.weights import describe, new_classifier
from pipelines.model.window_model import WindowModel
from pipelines.model_files import PIPELINE_FILE
from pipelines.settings import ComputeSettings
from pipelines.storage.locations import shown
from pipelines.text.pretrained import save_tokenizer, uses_type_ids
from pipelines.text.tokenization import Tokenizer
from pipelines.training.checkpoints import Checkpoints, check_start, fetch_newest, publish
from pipelines.training.corpus import Corpus
from pipelines.training.finish import REPORT_FILE, page_of, result_of, summary_of, write_folder
from pipelines.training.loop import NAMES_SHOWN, Hooks, TrainLoop
from pipelines.training.losses import Loss, resolve_loss
from pipelines.training.order import TrainingWindows, training_windows
from pipelines.training.ranks import barrier, rank, shared_dtype, worker_device, world_size
from pipelines.training.run import RunSpec, TrainSummary
from pipelines.training.state import BestMetric, Evaluation
from pipelines.training.tracking import tracked
from pipelines.training_settings import TrainSettings

OwnMetrics = Callable[[NDArray[np.generic], Decisions, DocumentScores], dict[str, Any]]
"""Function that computes the caller's own metrics, by name, from targets, decisions and scores."""
logger = logging.getLogger(__name__)


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
        is_interrupted: Returns whether the run is to end with a checkpoint. Rank 0 decides.
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
        check_start(spec.output, spec.start)  # it may have slept, and missed the checkpoints of another one
        scorer = _open(spec, train, folder, checkpoint)
        data = training_windows(scorer, train, spec.train)
        loss = resolve_loss(spec.train, spec.decision, train.all_targets)
        evaluate_valid = None if valid is None else partial(measure, scorer, valid, loss, spec.compute)
        checkpoints = Checkpoints(spec.output, keep=spec.train.keep_checkpoints, start=spec.start)
        hooks = Hooks(
            evaluate=evaluate_valid,
            on_checkpoint=lambda loop: _save_checkpoint(loop, scorer.model, checkpoints, spec.train),
            is_preempted=is_preempted,
            is_interrupted=is_interrupted,
            on_metrics=on_metrics,
            on_scalars=tracking.log,
        )
        if not dist.is_initialized():  # with workers, units still arrive
            _say_sizes(train, data)
        loop = TrainLoop(scorer.model, data, spec.train, loss, BestMetric.of(spec.train, spec.decision), hooks=hooks)
        first_step = _resume(loop, checkpoint)
        with closing(checkpoints):
            state = loop.run()
        scores = None if evaluate_valid is None else loop.best_scores or evaluate_valid().scores
        result = result_of(spec, valid, scores, state)
        if rank() == 0:
            seconds = time.perf_counter() - started
            page = page_of(spec, result, train, valid, state=state, steps_here=state.step - first_step, seconds=seconds)
            write_folder(spec, result, scorer, folder, corpora=(train, valid), page=page)
            tracking.log({f"final_{name}": value for name, value in result.metrics.items()}, state.step)
            tracking.log_files(folder / REPORT_FILE, folder / PIPELINE_FILE)
        barrier()
        return summary_of(spec, result, (train, valid), data, state, packed=scorer.model.is_packed, started=started)


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
