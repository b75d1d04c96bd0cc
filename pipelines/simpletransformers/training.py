"""Training of a facade in this process or as one rank of a group: its metrics, checkpoints and best model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.decisions.labels import Decisions
from pipelines.errors import ModelFolderError
from pipelines.model.scorer import DocumentScores
from pipelines.simpletransformers.arguments import BY_NAME
from pipelines.simpletransformers.engine import Engine
from pipelines.simpletransformers.outputs import predicted, raw_outputs, write_progress, write_results
from pipelines.simpletransformers.saving import replace_files, replace_folder
from pipelines.simpletransformers.tracking import tracked
from pipelines.simpletransformers.translate import theirs
from pipelines.training.corpus import Corpus, LabelledDocuments
from pipelines.training.fit import measure
from pipelines.training.loop import Hooks, TrainLoop
from pipelines.training.losses import resolve_loss
from pipelines.training.order import training_windows
from pipelines.training.ranks import rank
from pipelines.training.state import BestMetric, Evaluation, TrainState
from pipelines.training_settings import TrainSettings

Metric = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class FacadeRun:
    """One call of train_model."""

    train: LabelledDocuments
    valid: LabelledDocuments | None
    output: str
    settings: TrainSettings
    metrics: Mapping[str, Metric]
    """Metrics of the caller, by name."""
    checkpoint: Path | None = None
    """Folder from which the model was opened, if it is a checkpoint of an unfinished run."""

    def without_data(self) -> FacadeRun:
        """Return the same run without its data, for workers that receive the data separately."""
        return replace(self, train=None, valid=None)  # type: ignore[arg-type]


def fit_documents(engine: Engine, run: FacadeRun) -> TrainState:
    """Train the engine's model, in this process or as one rank of a group. Rank 0 writes the files."""
    scorer, args = engine.scorer(), engine.args
    corpus = Corpus.of(run.train)
    valid = None if run.valid is None else Corpus.of(run.valid)
    loss = resolve_loss(run.settings, scorer.decision, corpus.targets)

    def of_caller(targets: NDArray[np.generic], decisions: Decisions, scores: DocumentScores) -> dict[str, Any]:
        return own_metrics(engine, run.metrics, targets, decisions, scores)

    def evaluation() -> Evaluation:
        assert valid is not None
        return measure(scorer, valid, loss, engine.compute, of_caller)

    metric = BestMetric.of(run.settings, scorer.decision, tuple(run.metrics))
    data = training_windows(scorer, corpus, run.settings)
    identity = {"validation data": None if valid is None else valid.fingerprint, "metrics": sorted(run.metrics)}
    with tracked(args) if rank() == 0 else nullcontext(lambda _numbers: None) as log:
        hooks = Hooks(
            evaluate=None if valid is None else evaluation,
            on_best=lambda loop: _save_best(engine, loop, run.output),
            on_checkpoint=lambda loop: _save_checkpoint(engine, loop, run.output),
            on_metrics=log,
            identity=identity,
        )
        loop = TrainLoop(engine.model, data, run.settings, loss, metric, hooks=hooks)
        _resume(loop, run.checkpoint)
        state = loop.run()
    if not args.no_save and rank() == 0:
        replace_files(Path(run.output), engine.write)
        if valid is not None:
            write_progress(Path(run.output), state)
    return state


def own_metrics(
    engine: Engine,
    metrics: Mapping[str, Metric],
    targets: NDArray[np.generic],
    decisions: Decisions,
    scores: DocumentScores,
) -> dict[str, Any]:
    """Compute the caller's metrics. A metric whose name starts with prob_ gets raw outputs, others get predictions."""
    found = predicted(decisions)
    outputs = raw_outputs(scores, engine.decision, by_window=engine.args.sliding_window)
    if engine.is_multilabel:  # as in Simple Transformers, metrics get probabilities here
        found = scores.scores_DL.astype(np.float64)
    values = {name: metric(targets, outputs if name.startswith("prob_") else found) for name, metric in metrics.items()}
    return {name: value.item() if getattr(value, "ndim", 1) == 0 else value for name, value in values.items()}


def _resume(loop: TrainLoop, checkpoint: Path | None) -> None:
    """Resume from a checkpoint of the same run. If it is from another run, warn and train from its weights."""
    if checkpoint is None:
        return
    try:
        loop.restore(checkpoint)
    except ModelFolderError as error:
        warnings.warn(f"{error}; training starts again from its weights", UserWarning, stacklevel=5)


def _save_best(engine: Engine, loop: TrainLoop, output: str) -> None:
    args = engine.args
    if not args.save_best_model or args.no_save or rank() > 0:
        return
    is_default = args.best_model_dir == BY_NAME["best_model_dir"].default
    folder = Path(output) / "best_model" if is_default else Path(args.best_model_dir)

    def write(aside: Path) -> None:
        engine.write(aside)
        write_results(aside, theirs(loop.state.best_metrics))

    replace_folder(folder, write)


def _save_checkpoint(engine: Engine, loop: TrainLoop, output: str) -> None:
    """Write a model folder from which train_model can resume."""
    args = engine.args
    if args.no_save or rank() > 0:
        return
    ends_epoch = loop.is_epoch_end and args.save_model_every_epoch
    name = f"checkpoint-{loop.state.step}" + (f"-epoch-{loop.state.epoch}" if ends_epoch else "")

    def write(aside: Path) -> None:
        engine.write(aside)
        if args.save_optimizer_and_scheduler:
            loop.save(aside)
        if loop.state.evaluations:
            write_results(aside, theirs(loop.state.evaluations[-1]))

    replace_folder(Path(output) / name, write)
