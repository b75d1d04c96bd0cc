"""Fine-tuning on documents: windows, loop, thresholds, and the finished model folder.

Evaluation is `Scorer`'s, on documents, each rank scoring its share.
Knows no files but the folder it writes, no ray.

Shapes: D documents, W windows, L labels.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipelines.calibration import fit_temperature
from pipelines.checkpoints import Checkpoints, fetch_newest, publish, remove_all
from pipelines.corpus import Corpus, Part
from pipelines.errors import JobError, SettingsError
from pipelines.evaluation import HEADLINE, LESS_IS_BETTER, METRICS, evaluate, tune_thresholds
from pipelines.labels import Decisions, Scaling, decide, resolve_thresholds
from pipelines.locations import shown
from pipelines.loop import NAMES_SHOWN, Evaluation, Report, TrainLoop, TrainState, Watch
from pipelines.losses import Loss, resolve_loss
from pipelines.model import WindowModel, new_classifier
from pipelines.model_folder import PIPELINE_FILE, ModelFolder, seal
from pipelines.pretrained import save_tokenizer, uses_type_ids
from pipelines.report import ReportData, render
from pipelines.scoring import DocumentScores, Scorer, concat_scores, plan_of, rescored
from pipelines.settings import ComputeSettings, DecisionSettings, TrainSettings, WindowSettings
from pipelines.steps import LabelledWindows, PartCounts, WindowParts, rank, shared_dtype, world_size
from pipelines.summary import histograms_of
from pipelines.tokenization import Tokenizer, Tokens, concat_documents, cut_documents, offsets_of

REPORT_FILE = "report.html"
MoreMetrics = Callable[[NDArray[np.generic], Decisions, DocumentScores], dict[str, Any]]
"""Metrics of one's own: targets, decisions and scores to numbers by name."""


@dataclass(frozen=True)
class TrainJob:
    """Everything that fixes a run but its data."""

    model: str
    output: str
    windows: WindowSettings
    decision: DecisionSettings
    train: TrainSettings
    compute: ComputeSettings


def fit(
    job: TrainJob,
    train: Corpus,
    valid: Corpus | None,
    report: Report,
    is_preempted: Callable[[], bool] | None = None,
    on_progress: Callable[[Mapping[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune, keep the best weights, tune thresholds on valid, write the model folder (rank 0), return a summary.

    A run that has checkpoints under job.output goes on from the newest. is_preempted says whether a machine of the run
    will be taken away; on_progress gets numbers by name as the run goes, on rank 0. Every rank calls this with the
    same arguments; the summary is the same on each.
    """
    with tempfile.TemporaryDirectory(prefix="pipelines-train-") as scratch:
        return _fit(job, train, valid, report, is_preempted, on_progress, Path(scratch))


def _fit(
    job: TrainJob,
    train: Corpus,
    valid: Corpus | None,
    report: Report,
    is_preempted: Callable[[], bool] | None,
    on_progress: Callable[[Mapping[str, float]], None] | None,
    scratch: Path,
) -> dict[str, Any]:
    started = time.perf_counter()
    folder = scratch / "model"
    tokenizer = save_tokenizer(job.model, folder)
    checkpoint = fetch_newest(job.output, scratch)
    module, has_new_head = new_classifier(
        str(checkpoint or job.model), job.decision, seed=job.train.seed, attention_dropout=job.train.attention_dropout
    )
    compute = replace(job.compute, dtype="float32", device=_rank_device(job.compute.device))
    model = WindowModel(module, tokenizer.template, compute, uses_type_ids=uses_type_ids(folder))
    if job.decision.kind == "regression" and job.train.standardize_labels:
        is_scaled = has_new_head or checkpoint is not None
        if not model.learn_scaled(Scaling.of(train.all_targets), is_scaled=is_scaled) and rank() == 0:
            report(f"labels are learnt as they are: {model.model_type} has no bias that could take up their mean")
    plan = plan_of(job.windows, tokenizer, model_type=model.model_type, model_limit=model.row_limit)
    scorer = Scorer(model, tokenizer, plan, job.decision)
    data = window_parts(scorer, train, job.train)
    loss = resolve_loss(job.train, job.decision, train.all_targets)

    def evaluation() -> Evaluation:
        assert valid is not None
        return measure(scorer, valid, loss, job.compute)

    checkpoints = Checkpoints(job.output, keep=job.train.keep_checkpoints)
    loop = TrainLoop(
        model, data, job.train, loss,
        watch=watch_of(job.train, job.decision), evaluate=None if valid is None else evaluation, report=report,
        on_checkpoint=lambda loop: _save_checkpoint(loop, model, checkpoints, job.train), is_preempted=is_preempted,
        on_progress=on_progress,
    )  # fmt: skip
    if checkpoint is not None:
        loop.restore(checkpoint)
        if rank() == 0:
            report(f"going on from step {loop.state.step}")
    first_step = loop.state.step
    try:
        state = loop.run()
    finally:
        checkpoints.close()
    decision, metrics, histograms = job.decision, state.best_metrics, {}
    scores, temperature, steps_here = None, 1.0, state.step - first_step
    if valid is not None:
        scores = loop.best_scores or evaluation().scores
        assert scores is not None
        say = report if rank() == 0 else lambda line: None
        if job.train.calibrate:
            temperature = fit_temperature(scores.window_logits_WL, scores.windows.offsets, valid.targets, decision)
            say(f"temperature {temperature:.3f}")
            scores = rescored(scores, decision, temperature)
        histograms = histograms_of(scores.scores_DL, decision)
        if _has_tunable_thresholds(decision):
            decision = _tune(decision, valid.targets, scores.scores_DL, job.train.objective, say)
        decided = decide(scores.scores_DL, decision, scores.votes_DL)
        metrics = {**metrics, **evaluate(valid.targets, scores.scores_DL, decided, decision)}
    if rank() == 0:
        model.save(folder)
        windows = replace(job.windows, max_length=plan.max_length)
        if valid is not None and scores is not None:
            page = _page(job, decision, valid, scores, metrics, state, train, steps_here, time.perf_counter() - started)
            (folder / REPORT_FILE).write_text(page)
        seal(
            ModelFolder(
                folder, windows, decision, temperature, metrics=metrics, histograms=histograms,
                reads_pairs=train.has_pairs,
            )
        )  # fmt: skip
        publish(folder, job.output, last=PIPELINE_FILE)
        remove_all(job.output)
    _barrier()
    counts = [data.counts(number) for number in range(data.num_parts)]
    return {
        "model": shown(job.output),
        "documents": len(train),
        "rows_in_error": train.num_errors + (0 if valid is None else valid.num_errors),
        "documents_truncated": sum(part.num_truncated for part in counts),
        "windows": sum(part.num_windows for part in counts),
        "tokens_per_epoch": sum(part.num_tokens for part in counts),
        "steps": state.step,
        "losses": state.losses,
        "evaluations": state.evaluations,
        "best": state.best,
        "stopped_early": state.stopped,
        "thresholds": decision.thresholds,
        "temperature": temperature,
        "valid": metrics,
        "workers": world_size(),
        "packed": model.is_packed,
        "seconds": round(time.perf_counter() - started, 2),
        "settings": asdict(job.train),
    }


def prepare_folder(job: TrainJob) -> Tokenizer:
    """Put the tokenizer into the output folder and return it: what tokenizing needs before any model is loaded."""
    with tempfile.TemporaryDirectory(prefix="pipelines-train-") as scratch:
        tokenizer = save_tokenizer(job.model, Path(scratch))
        publish(Path(scratch), job.output, last="tokenizer.json")
    return tokenizer


def _page(
    job: TrainJob,
    decision: DecisionSettings,
    valid: Corpus,
    scores: DocumentScores,
    metrics: dict[str, Any],
    state: TrainState,
    train: Corpus,
    steps_here: int,
    seconds: float,
) -> str:
    """The report on valid and on the run."""
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
        "Settings": {"model": shown(job.model), **asdict(decision), **asdict(job.windows), **asdict(job.train)},
    }
    data = ReportData(
        f"{Path(job.output).name} on its validation data", decision, valid.targets, scores.scores_DL,
        decide(scores.scores_DL, decision, scores.votes_DL),
        metrics, valid.num_tokens_D, lambda number: valid.name(int(valid.rows_D[number])),
        losses=state.losses, evaluations=state.evaluations, facts=facts,
    )  # fmt: skip
    return render(data)


def _save_checkpoint(loop: TrainLoop, model: WindowModel, checkpoints: Checkpoints, settings: TrainSettings) -> None:
    """Copy weights and state off the device, and have them written while training goes on; not at the very end."""
    if rank() > 0 or loop.state.epoch == settings.epochs or loop.state.stopped:
        return
    write_weights, write_state = model.snapshot(), loop.snapshot()

    def write(folder: Path) -> None:
        write_weights(folder)
        write_state(folder)

    checkpoints.save(loop.state.step, write)


def window_parts(scorer: Scorer, train: Corpus, settings: TrainSettings) -> WindowParts:
    """The training windows of a corpus, under the scorer's plan and the settings' cap.

    They are counted from the documents' lengths, and cut when a buffer is loaded. Raises DataError where no document
    has a text.
    """
    train.check_texts()
    plan, template = scorer.plan, scorer.tokenizer.template
    if settings.train_max_windows is not None:
        plan = plan.with_max_windows(settings.train_max_windows)
    digest = hashlib.sha256(f"{train.fingerprint} {plan}".encode()).hexdigest()

    @cache
    def counts(number: int) -> PartCounts:
        part = train.survey(number)
        cut = cut_documents(_lengths_alone(part.num_tokens_D), plan, template, _pairs_alone(part))
        return PartCounts(len(cut.windows.document_W), int(cut.length_W.sum()), int(cut.windows.truncated_D.sum()))

    @lru_cache(maxsize=1)  # data that fits one buffer is loaded once
    def load(numbers: tuple[int, ...]) -> LabelledWindows:
        parts = [train.part(number) for number in numbers]
        documents = concat_documents([part.documents for part in parts])
        cut = cut_documents(documents.tokens, plan, template, documents.pair_tokens)
        rows = [train.rows(number) for number in numbers]
        return LabelledWindows(cut, np.concatenate([part.targets for part in parts]), np.concatenate(rows))

    return WindowParts(np.diff(train.first_P), counts, digest, load, train.name, train.order)


def _lengths_alone(num_tokens_D: NDArray[np.integer]) -> Tokens:
    """Texts of the given lengths, for who asks for their lengths only."""
    return Tokens(np.zeros(0, np.int32), offsets_of(num_tokens_D))


def _pairs_alone(part: Part) -> Tokens | None:
    return None if part.pair_num_tokens_D is None else _lengths_alone(part.pair_num_tokens_D)


def watch_of(settings: TrainSettings, decision: DecisionSettings, more: tuple[str, ...] = ()) -> Watch:
    """The metric that chooses the best weights; more names the caller's own metrics.

    Raises SettingsError for one that this kind does not have.
    """
    name = settings.metric or HEADLINE[decision.kind]
    known = ["loss", *(metric for metric in METRICS[decision.kind] if metric != "per_label"), *more]
    if name not in known:
        raise SettingsError(f"metric={name!r} is no metric of kind {decision.kind}; it has {', '.join(known)}")
    minimize = name in LESS_IS_BETTER if settings.metric_minimize is None else settings.metric_minimize
    return Watch(name, minimize, settings.early_stopping_delta)


def measure(
    scorer: Scorer,
    valid: Corpus,
    loss: Loss,
    compute: ComputeSettings,
    more: MoreMetrics | None = None,
) -> Evaluation:
    """Loss (mean over windows, weighted as in training) and metrics of valid, the same on every rank.

    In the arithmetic in which the finished folder will be scored on this machine, by autocast. Raises JobError where
    the model's output is not finite, naming documents.
    """
    share = np.linspace(0, len(valid), world_size() + 1).astype(int)
    dtype = shared_dtype(compute.dtype, scorer.model.device)
    with torch.autocast(scorer.model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        parts = [scorer.score_documents(some) for some in valid.between(share[rank()], share[rank() + 1])]
    if world_size() > 1:
        of_ranks = [parts] * world_size()
        dist.all_gather_object(of_ranks, parts)
        parts = [part for parts in of_ranks for part in parts]
    scores = concat_scores(parts)
    bad = [document for document, error in enumerate(scores.errors) if error is not None]
    if bad:
        names = ", ".join(valid.name(int(valid.rows_D[document])) for document in bad[:NAMES_SHOWN])
        raise JobError(
            f"{scores.errors[bad[0]]} for {len(bad)} of {len(valid)} valid documents ({names}): lower learning_rate, "
            f"or use dtype=float32"
        )
    decisions = decide(scores.scores_DL, scorer.decision, scores.votes_DL)
    metrics = evaluate(valid.targets, scores.scores_DL, decisions, scorer.decision)
    own = {} if more is None else more(valid.targets, decisions, scores)
    return Evaluation({"loss": mean_loss(scores, valid.targets, loss), **metrics, **own}, scores)


def mean_loss(scores: DocumentScores, targets: NDArray[np.generic], loss: Loss) -> float:
    """Mean loss over the windows of documents, weighted as in training."""
    targets_W = targets[scores.windows.document_W]
    losses_W = loss(torch.from_numpy(scores.window_logits_WL), torch.from_numpy(targets_W)).numpy()
    share_W = loss.shares(scores.windows)
    return float((losses_W * share_W).sum()) / (float((loss.normalizers(targets_W) * share_W).sum()) or 1.0)


def _has_tunable_thresholds(decision: DecisionSettings) -> bool:
    """Whether thresholds apply, were not given, and may replace the merge that was asked for."""
    return decision.kind in ("binary", "multilabel") and decision.thresholds is None and decision.merge != "vote"


def _tune(
    decision: DecisionSettings,
    targets: NDArray[np.generic],
    scores_DL: NDArray[np.float32],
    objective: str,
    report: Report,
) -> DecisionSettings:
    """The decision with thresholds for the best evaluation's scores."""
    tuned = tune_thresholds(targets, scores_DL, decision, objective)
    for line in tuned.remarks(objective):
        report(line)
    if len(tuned.untuned) < len(tuned.thresholds):
        decision = resolve_thresholds(tuned.thresholds, decision)
    return decision


def _rank_device(device: str) -> str:
    """Auto on a machine of several GPUs is the worker's own, which Ray Train made current."""
    if device == "auto" and world_size() > 1 and torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"
    return device


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
