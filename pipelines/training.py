"""Fine-tuning: optimizer, schedule, loop, the best epoch, thresholds, and the finished model folder.

The same loop runs in one process and in every worker of a process group: a seeded plan fixes the windows of each
optimizer step, rank r takes every world-size-th of them, and the loss is averaged over the step's windows of all
ranks, so that the number of workers changes nothing but rounding and the draws of dropout. Evaluation is `Scorer`'s,
on documents.
Knows no files but the folder it writes, no ray.

Shapes: D documents, W windows, L labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.batching import token_batches
from pipelines.errors import DataError, JobError
from pipelines.evaluation import HEADLINE, evaluate, is_better, tune_thresholds
from pipelines.labels import decide, resolve_thresholds
from pipelines.losses import Loss, resolve_loss
from pipelines.model import WindowModel, new_classifier, resolve_dtype, save_tokenizer, uses_type_ids
from pipelines.model_folder import ModelFolder, seal
from pipelines.optimization import make_optimizer, make_schedule
from pipelines.scoring import Scorer, plan_of
from pipelines.settings import ComputeSettings, DecisionSettings, TrainSettings, WindowSettings
from pipelines.tokenization import CutDocuments, Documents, InputRows, Tokenizer, assemble, cut_documents

PROGRESS_SECONDS = 5.0
Report = Callable[[str], None]


@dataclass(frozen=True)
class LabelledDocuments:
    """Tokenized documents with their targets: (D,) int64 label ids, (D, L) float32, or (D,) float32 values."""

    documents: Documents
    targets: NDArray[np.generic]


@dataclass(frozen=True)
class TrainJob:
    """Everything that fixes a run but its data."""

    model: str
    output: str
    windows: WindowSettings
    decision: DecisionSettings
    train: TrainSettings
    compute: ComputeSettings


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank."""

    index_W: NDArray[np.int64]
    """This rank's windows of the step; where there are fewer than ranks, one window that counts nothing."""
    share_W: NDArray[np.float32]
    """Weight of each in the mean."""
    normalizer: float
    """Denominator of the mean over all ranks."""


class _Forward(nn.Module):
    """The window model as a module, so that DistributedDataParallel sees its parameters and its call."""

    def __init__(self, model: WindowModel) -> None:
        super().__init__()
        self.module = model.module
        self._model = model

    def forward(self, rows: InputRows) -> Tensor:
        return self._model(rows)


def fit(job: TrainJob, train: LabelledDocuments, valid: LabelledDocuments | None, report: Report) -> dict[str, Any]:
    """Fine-tune, keep the best epoch, tune thresholds on valid, write the model folder (rank 0), return a summary.

    job.output must be an empty local folder that holds nothing but the tokenizer (`prepare_folder`). Every rank
    calls this with the same arguments; the summary is the same on each.
    """
    started = time.perf_counter()
    if _rank() > 0:
        report = _silent
    folder = Path(job.output)
    tokenizer = Tokenizer.load(folder)
    module = new_classifier(job.model, job.decision, seed=job.train.seed)
    compute = replace(job.compute, dtype="float32", device=_rank_device(job.compute.device))
    model = WindowModel(module, tokenizer.template, compute, uses_type_ids=uses_type_ids(folder))
    plan = plan_of(job.windows, tokenizer, model_type=model.model_type, model_limit=model.row_limit)
    scorer = Scorer(model, tokenizer, plan, job.decision)
    capped = plan if job.train.train_max_windows is None else plan.with_max_windows(job.train.train_max_windows)
    usable = _usable(train)
    cut = cut_documents(usable.documents.tokens, capped, tokenizer.template, usable.documents.pair_tokens)
    rows_in_error = len(train.documents) - len(usable.documents)
    if valid is not None:
        rows_in_error += len(valid.documents)
        valid = _usable(valid)
        rows_in_error -= len(valid.documents)
    history = run_epochs(scorer, cut, usable.targets, valid, job.train, job.compute, report)
    decision, metrics = job.decision, history["epochs"][history["best_epoch"]] if history["epochs"] else {}
    if valid is not None and _has_tunable_thresholds(decision):
        decision, metrics = _tune(decision, valid, history["best_scores"], report)
    max_length = replace(job.windows, max_length=plan.max_length)
    if _rank() == 0:
        model.save(folder)
        seal(ModelFolder(folder, max_length, decision, metrics=metrics))
    _barrier()
    return {
        "model": job.output,
        "documents": len(usable.documents),
        "rows_in_error": rows_in_error,
        "documents_truncated": int(cut.windows.truncated_D.sum()),
        "windows": len(cut.length_W),
        "tokens_per_epoch": int(cut.length_W.sum()),
        "steps": len(history["losses"]),
        "losses": history["losses"],
        "epochs": history["epochs"],
        "best_epoch": history["best_epoch"],
        "thresholds": decision.thresholds,
        "valid": metrics,
        "workers": _world_size(),
        "packed": model.is_packed,
        "seconds": round(time.perf_counter() - started, 2),
        "settings": asdict(job.train),
    }


def prepare_folder(job: TrainJob) -> Tokenizer:
    """Put the tokenizer into the output folder and return it: what tokenizing needs before any model is loaded."""
    Path(job.output).mkdir(parents=True, exist_ok=True)
    return save_tokenizer(job.model, Path(job.output))


def plan_steps(
    cut: CutDocuments,
    targets: NDArray[np.generic],
    settings: TrainSettings,
    loss: Loss,
    *,
    epoch: int,
    rank: int,
    world_size: int,
) -> Iterator[Step]:
    """The optimizer steps of one epoch, as rank sees them; every window is in exactly one step of one rank."""
    num_windows = len(cut.length_W)
    order = np.random.default_rng([settings.seed, epoch]).permutation(num_windows)
    document_W = cut.windows.document_W
    share_W = np.ones(num_windows, np.float32)
    if settings.window_weight == "document":
        share_W = (1.0 / cut.windows.num_windows_D[document_W]).astype(np.float32)
    normalizer_W = share_W * loss.normalizers(targets[document_W])
    size = settings.batch_size * settings.gradient_accumulation_steps
    for start in range(0, num_windows, size):
        together = order[start : start + size]
        mine = together[rank::world_size]
        shares = share_W[mine]
        if not len(mine):
            mine, shares = together[:1], np.zeros(1, np.float32)
        yield Step(mine, shares, float(normalizer_W[together].sum()) or 1.0)  # 0: every weight is, and so the loss


def run_epochs(
    scorer: Scorer,
    cut: CutDocuments,
    targets: NDArray[np.generic],
    valid: LabelledDocuments | None,
    settings: TrainSettings,
    compute: ComputeSettings,
    report: Report,
) -> dict[str, Any]:
    """Train the scorer's model, whose weights are float32, on cut documents and their targets (one per document).

    Leaves the best epoch's weights in the model; without valid, the last epoch's. Returns losses (one per optimizer
    step), epochs (metrics of valid after each), best_epoch, and best_scores (D, L) of valid.
    """
    model, decision = scorer.model, scorer.decision
    forward = _distributed(model, cut)
    loss = resolve_loss(settings, decision, targets)
    size = settings.batch_size * settings.gradient_accumulation_steps
    steps_per_epoch = -(-len(cut.length_W) // size)
    optimizer = make_optimizer(model.module, settings)
    schedule = make_schedule(optimizer, settings, steps_per_epoch * settings.epochs)
    torch.manual_seed(settings.seed + _rank())  # dropout differs between ranks
    scaler = torch.amp.GradScaler(
        model.device.type, enabled=resolve_dtype(settings.train_dtype, model.device) == torch.float16
    )
    progress = _Progress(report, settings, steps_per_epoch)
    result: dict[str, Any] = {"losses": [], "epochs": [], "best_epoch": 0, "best_scores": None}
    best_metrics, best_state = None, None
    for epoch in range(settings.epochs):
        steps = plan_steps(
            cut, targets, settings, loss,
            epoch=epoch, rank=_rank(), world_size=_world_size(),
        )  # fmt: skip
        model.module.train()
        losses = []
        for step in steps:
            losses.append(_step(forward, scaler, model, cut, targets, step, settings, loss))
            _update(model.module, scaler, optimizer, schedule, settings)
            progress.step(epoch, losses, cut.length_W[step.index_W].sum(), float(schedule.get_last_lr()[0]))
        result["losses"] += _global_losses(losses, epoch)
        model.module.eval()
        if valid is None:
            result["best_epoch"] = epoch
            continue
        metrics, scores_DL = _evaluate(scorer, valid, compute)
        result["epochs"].append(metrics)
        headline = HEADLINE[decision.kind]
        report(f"epoch {epoch + 1}/{settings.epochs}: valid {headline} {_shown(metrics[headline])}")
        if is_better(metrics, best_metrics, decision):
            best_metrics, result["best_epoch"], result["best_scores"] = metrics, epoch, scores_DL
            best_state = {name: value.detach().clone() for name, value in model.module.state_dict().items()}
    if best_state is not None:
        model.module.load_state_dict(best_state)
    return result


def _step(
    forward: nn.Module,
    scaler: torch.amp.GradScaler,
    model: WindowModel,
    cut: CutDocuments,
    targets: NDArray[np.generic],
    step: Step,
    settings: TrainSettings,
    loss: Loss,
) -> Tensor:
    """Forward and backward over this rank's windows of one step; this rank's part of the global mean loss."""
    dtype = resolve_dtype(settings.train_dtype, model.device)
    total = torch.zeros((), device=model.device)
    lengths = cut.length_W[step.index_W]
    parts = token_batches(lengths, batch_tokens=settings.train_batch_tokens, padded=not model.is_packed)
    for number, part in enumerate(parts):
        index_W = step.index_W[part]
        rows = assemble(cut, model.template, index_W)
        target = torch.from_numpy(targets[cut.windows.document_W[index_W]]).to(model.device)
        share = torch.from_numpy(step.share_W[part]).to(model.device)
        is_last = number == len(parts) - 1
        with nullcontext() if is_last or not isinstance(forward, DistributedDataParallel) else forward.no_sync():
            with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
                logits_WL = forward(rows)
            mean = (loss(logits_WL, target) * share).sum() / step.normalizer
            scaler.scale(mean * _world_size()).backward()  # ranks' gradients are averaged
        total += mean.detach()
    return total


def _update(
    module: nn.Module,
    scaler: torch.amp.GradScaler,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    settings: TrainSettings,
) -> None:
    scaler.unscale_(optimizer)
    if settings.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(module.parameters(), settings.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)


def _evaluate(
    scorer: Scorer, valid: LabelledDocuments, compute: ComputeSettings
) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Metrics and document scores (D, L) of valid, each rank scoring its share; the same result on every rank.

    In the arithmetic in which the finished folder will be scored on this machine, by autocast.
    """
    rows = np.arange(_rank(), len(valid.documents), _world_size())
    dtype = resolve_dtype(compute.dtype, scorer.model.device)
    with torch.autocast(scorer.model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        mine = scorer.score_documents(valid.documents.take(rows))
    parts: list[Any] = [None] * _world_size()
    part = (rows, mine.scores_DL, mine.votes_DL)
    if _world_size() > 1:
        dist.all_gather_object(parts, part)
    else:
        parts = [part]
    order = np.argsort(np.concatenate([rows for rows, _, _ in parts]))
    scores_DL = np.concatenate([scores for _, scores, _ in parts])[order]
    votes_DL = None if parts[0][2] is None else np.concatenate([votes for _, _, votes in parts])[order]
    decisions = decide(scores_DL, scorer.decision, votes_DL)
    return evaluate(valid.targets, scores_DL, decisions, scorer.decision), scores_DL


def _has_tunable_thresholds(decision: DecisionSettings) -> bool:
    """Whether thresholds apply, were not given, and may replace the merge that was asked for."""
    return decision.kind in ("binary", "multilabel") and decision.thresholds is None and decision.merge != "vote"


def _tune(
    decision: DecisionSettings, valid: LabelledDocuments, scores_DL: NDArray[np.float32], report: Report
) -> tuple[DecisionSettings, dict[str, Any]]:
    """Thresholds for the best epoch's scores, and the metrics of valid under them."""
    tuned = tune_thresholds(valid.targets, scores_DL, decision)
    if tuned.untuned:
        report(f"thresholds of {', '.join(tuned.untuned)} stay as they are: valid says the same of every row")
    if len(tuned.untuned) < len(tuned.thresholds):
        decision = resolve_thresholds(tuned.thresholds, decision)
    return decision, evaluate(valid.targets, scores_DL, decide(scores_DL, decision), decision)


def _usable(train: LabelledDocuments) -> LabelledDocuments:
    """Without the documents whose text is null or invalid; they are counted in the summary."""
    good = np.flatnonzero([error is None for error in train.documents.errors])
    if not len(good):
        raise DataError("no row of the training or validation data has a text")
    return LabelledDocuments(train.documents.take(good), train.targets[good])


def _distributed(model: WindowModel, cut: CutDocuments) -> nn.Module:
    """The forward that trains: under DistributedDataParallel where there are several ranks.

    A parameter that one window's loss does not reach (a pooler that the head skips, say) is frozen first, since
    the ranks would wait for its gradient for ever.
    """
    forward = _Forward(model)
    forward(assemble(cut, model.template, np.zeros(1, np.int64))).float().sum().backward()
    for parameter in model.module.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
        parameter.grad = None
    if _world_size() == 1:
        return forward
    devices = [model.device] if model.device.type == "cuda" else None
    return DistributedDataParallel(forward, device_ids=devices)


def _global_losses(losses: list[Tensor], epoch: int) -> list[float]:
    """The epoch's step losses over all ranks: one reduction and one synchronisation an epoch."""
    together = torch.stack(losses)
    if _world_size() > 1:
        dist.all_reduce(together)
    values: list[float] = together.tolist()
    bad = next((step for step, value in enumerate(values) if not np.isfinite(value)), None)
    if bad is not None:
        raise JobError(
            f"the loss is {values[bad]} at step {bad + 1} of epoch {epoch + 1}: lower learning_rate, or "
            f"set train_dtype=float32"
        )
    return values


class _Progress:
    """A line every few seconds: step, rate, time to go, loss, learning rate."""

    def __init__(self, report: Report, settings: TrainSettings, steps_per_epoch: int) -> None:
        self._report = report
        self._epochs = settings.epochs
        self._steps_per_epoch = steps_per_epoch
        self._started = self._shown = time.monotonic()
        self._tokens = 0

    def step(self, epoch: int, losses: list[Tensor], num_tokens: int, learning_rate: float) -> None:
        """Count a step; its tokens are this rank's, so the rate is scaled to all ranks."""
        self._tokens += int(num_tokens) * _world_size()
        now = time.monotonic()
        if now - self._shown < PROGRESS_SECONDS:
            return
        self._shown = now
        done = epoch * self._steps_per_epoch + len(losses)
        total = self._epochs * self._steps_per_epoch
        seconds_left = (now - self._started) / done * (total - done)
        loss = float(losses[-1]) * _world_size()
        self._report(
            f"epoch {epoch + 1}/{self._epochs} step {done}/{total} loss {loss:.3f} lr {learning_rate:.1e} "
            f"{self._tokens / (now - self._started):,.0f} tokens/s, {seconds_left:.0f} s to go (without evaluation)"
        )


def _silent(line: str) -> None:
    """What ranks other than 0 report to."""


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _rank_device(device: str) -> str:
    """Auto on a machine of several GPUs is the worker's own, which Ray Train made current."""
    if device == "auto" and _world_size() > 1 and torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"
    return device


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
