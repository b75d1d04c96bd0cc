"""The training loop: steps, evaluations, early stopping and checkpoints, and resuming from a checkpoint.

The caller defines what an evaluation measures and where a checkpoint is written (`Hooks`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pipelines.errors import ModelFolderError
from pipelines.model.window_model import WindowModel
from pipelines.progress import HINT_AFTER_SECONDS, LONG_SECONDS, Progress, duration
from pipelines.training.checkpoints import STATE_FILE
from pipelines.training.losses import Loss
from pipelines.training.order import Step, TrainingWindows, epoch_steps, num_steps_of_epoch, num_steps_of_run
from pipelines.training.ranks import answer_of_rank_0, rank, world_size
from pipelines.training.state import BestMetric, BestWeights, Evaluation, LossLog, TrainState
from pipelines.training.steps import Stepper
from pipelines.training_settings import TrainSettings

TENSORS_FILE = "training_state.pt"
"""File of a checkpoint: optimizer, schedule and the best weights so far."""
CHECK_STEPS = 10
"""Every this many steps, all ranks check together whether save_minutes or a preemption requires a checkpoint."""
NAMES_SHOWN = 8
"""Maximum number of documents that an error message names."""
HARMLESS = frozenset(
    {
        "train_batch_tokens",
        "save_steps",
        "save_minutes",
        "save_each_epoch",
        "save_evaluations",
        "keep_checkpoints",
        "max_failures",
        "tensorboard_dir",
        "tracking",
        "tracking_project",
        "logging_steps",
    }
)
"""Settings that may change when a run is resumed."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hooks:
    """Functions that the caller adds to the loop. The first four are called the same number of times on every rank."""

    evaluate: Callable[[], Evaluation] | None = None
    """Evaluates the model between steps."""
    on_best: Callable[[TrainLoop], None] | None = None
    """Called after an evaluation that is the best so far."""
    on_checkpoint: Callable[[TrainLoop], None] | None = None
    """Writes a checkpoint. Called when the settings require one, and when a machine will be taken away."""
    is_preempted: Callable[[], bool] | None = None
    """Returns whether a machine of the run will be taken away."""
    is_interrupted: Callable[[], bool] | None = None
    """Returns whether the run is to end after this step, with a checkpoint. Rank 0 decides."""
    on_metrics: Callable[[Mapping[str, float]], None] | None = None
    """Receives numbers by name every few seconds and at each evaluation, on rank 0."""
    on_scalars: Callable[[Mapping[str, float], int], None] | None = None
    """Receives losses, learning rates and metrics of valid, with their step: points of curves."""
    steps: Callable[[int, int], Iterator[Step]] | None = None
    """Returns the steps of an epoch after the first n, given (epoch, n). Default: drawn with settings.seed."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """More values that must be unchanged for a run to be resumed, as JSON content."""


class TrainLoop:
    """One training run over labelled windows. Every rank runs the same loop."""

    def __init__(
        self,
        model: WindowModel,
        data: TrainingWindows,
        settings: TrainSettings,
        loss: Loss,
        metric: BestMetric,
        *,
        hooks: Hooks | None = None,
    ) -> None:
        self.state = TrainState()
        self.is_epoch_end = False
        """Whether the last step ended an epoch."""
        self._model, self._data, self._settings = model, data, settings
        self._hooks = Hooks() if hooks is None else hooks
        self._best = BestWeights(metric)
        self._losses = LossLog(self._documents_of_step)
        self._clock = _CheckpointClock(settings, self._hooks.is_preempted)
        self._num_steps = num_steps_of_run(data, settings)
        self._stepper = Stepper(model, data.first().cut, settings, loss, self._num_steps)
        self._draw = partial(epoch_steps, data, settings, loss)
        self._monitor = _Monitor(settings, self._hooks.on_metrics, self._hooks.on_scalars)

    @property
    def best_scores(self) -> Any:
        """Scores of the best evaluation, or None if an earlier process computed them."""
        return self._best.scores

    def run(self) -> TrainState:
        """Train from the current state to the end. The model then has the best weights (without valid: the last)."""
        self._monitor.start(self.state, self._num_steps)
        try:
            while self.state.epoch < self._settings.epochs and not self.state.stopped:
                self._run_epoch()
        finally:
            self._monitor.close()
            self._model.module.eval()
            self._stepper.release()
        self._best.restore(self._model.module)
        metric, evaluations = self._best.metric, self.state.evaluations
        if metric.equal_everywhere(evaluations) and rank() == 0:
            logger.warning(
                "all %d evaluations have the same %s (%s), which cannot choose the best weights: those of the first "
                "are kept; set metric to another one, such as loss",
                len(evaluations),
                metric.name,
                evaluations[0].get(metric.name),
            )
        return self.state

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs to a folder, except the weights, which the caller writes to it."""
        if rank() == 0:
            self.snapshot()(folder)

    def snapshot(self) -> Callable[[Path], None]:
        """Copy what a resumed run needs off the device. Return a function that writes it to a folder later."""
        tensors = _on_cpu({"stepper": self._stepper.state(), "best": self._best.weights})
        content = json.dumps({**self._identity(), "state": dataclasses.asdict(self.state)})

        def write(folder: Path) -> None:
            torch.save(tensors, folder / TENSORS_FILE)
            unfinished = folder / f"{STATE_FILE}.partial"
            unfinished.write_text(content)
            os.replace(unfinished, folder / STATE_FILE)

        return write

    def restore(self, folder: Path) -> None:
        """Resume from a checkpoint. The model must already have its weights.

        Raises:
            ModelFolderError: The checkpoint is incomplete, or is from a run with other data or settings. The message
                names the differences.
        """
        if not (folder / TENSORS_FILE).is_file():
            raise ModelFolderError(f"{folder} has {STATE_FILE} but no {TENSORS_FILE}: the checkpoint is incomplete")
        content = json.loads((folder / STATE_FILE).read_text())
        differences = self._differences(content)
        if differences:
            raise ModelFolderError(f"{folder} is a checkpoint of another run: {'; '.join(differences)}")
        tensors = torch.load(folder / TENSORS_FILE, map_location=self._model.device, weights_only=True)
        self._stepper.load_state(tensors["stepper"])
        self._best.weights = tensors["best"]
        self.state = TrainState(**content["state"])
        self._num_steps = 0  # unknown until the next step says it; the restored schedule has the right learning rate

    def _run_epoch(self) -> None:
        self._model.module.train()
        for step in self._steps(self.state.epoch, self.state.step - self._first_step(self.state.epoch)):
            self._run_step(step)
            is_evaluated = self._evaluate_if_due()
            self._save_if_due(is_evaluated=is_evaluated)
            if self.state.stopped:
                return
            if self.state.epoch < self._settings.epochs and self._is_interrupted():  # a finished run just finishes
                self._end_with_checkpoint()
        self._losses.flush(self.state)

    def _run_step(self, step: Step) -> None:
        if step.num_steps is not None and step.num_steps != self._num_steps:
            self._num_steps = step.num_steps
            self._stepper.set_num_steps(step.num_steps)
        loss = self._stepper(step, self.state.step)
        self._losses.add(loss)
        self.state.step += 1
        self.is_epoch_end = step.ends_epoch
        if step.ends_epoch:
            self.state.epoch += 1
        num_tokens = int(step.data.length_W[step.index_W].sum())
        learning_rate = self._stepper.learning_rate
        self._monitor.count_step(self._num_steps, loss, num_tokens=num_tokens, learning_rate=learning_rate)
        has_curves = self._settings.tensorboard_dir is not None or self._settings.tracking != "none"
        if has_curves and self.state.step % self._settings.logging_steps == 0:
            self._losses.flush(self.state)  # on every rank: it is a collective operation
            self._monitor.add_scalars({"loss": self.state.losses[-1], "lr": learning_rate}, self.state.step)

    def _steps(self, epoch: int, skip: int) -> Iterator[Step]:
        """The steps of an epoch for the current rank."""
        if self._hooks.steps is not None:
            return self._hooks.steps(epoch, skip)
        return self._draw(epoch=epoch, rank=rank(), world_size=world_size(), skip=skip)

    def _first_step(self, epoch: int) -> int:
        """Return the number of steps before an epoch. For epochs after the first, all units must have arrived."""
        return sum(num_steps_of_epoch(self._data, self._settings, before) for before in range(epoch))

    def _evaluate_if_due(self) -> bool:
        """Evaluate if the settings require it now. Return whether an evaluation was done."""
        settings, evaluate = self._settings, self._hooks.evaluate
        is_due_by_steps = _is_multiple(self.state.step, settings.evaluate_steps)
        if evaluate is None or not (is_due_by_steps or (self.is_epoch_end and settings.evaluate_each_epoch)):
            return False
        self._losses.flush(self.state)
        self._model.module.eval()
        counts = is_due_by_steps or settings.early_stopping_consider_epochs
        self._record(evaluate(), counts_for_patience=counts)
        self._model.module.train()
        return True

    def _record(self, evaluation: Evaluation, *, counts_for_patience: bool) -> None:
        """Record an evaluation, keep the weights if they are the best, and stop the run if it does not improve."""
        state, name = self.state, self._best.metric.name
        improves = self._best.consider(evaluation, state, self._model.module)
        self._monitor.show_evaluation(state, name, improves=improves)
        if improves:
            if self._hooks.on_best is not None:
                self._hooks.on_best(self)
            return
        if counts_for_patience:
            state.flat += 1
        patience = self._settings.early_stopping_patience
        if patience is not None and state.flat > patience:
            state.stopped = True
            if rank() == 0:
                logger.info("stopped early: %d evaluations without a better %s", state.flat, name)

    def _save_if_due(self, *, is_evaluated: bool) -> None:
        """Write a checkpoint if the settings, save_minutes or a preemption require one now."""
        settings = self._settings
        is_wanted = settings.save_each_epoch if self.is_epoch_end else settings.save_evaluations and is_evaluated
        is_due = is_wanted or _is_multiple(self.state.step, settings.save_steps)
        if self._hooks.on_checkpoint is None:
            return
        is_time = self._clock.is_time(self.state.step, self._model.device)  # on every rank, due or not
        if is_time or is_due:
            self._losses.flush(self.state)
            self._hooks.on_checkpoint(self)
            self._clock.saved()

    def _is_interrupted(self) -> bool:
        """Return whether the run is to end now. The answer is the same on every rank."""
        ask = self._hooks.is_interrupted
        if ask is None:
            return False
        if world_size() == 1:
            return ask()
        return self.state.step % CHECK_STEPS == 0 and answer_of_rank_0(ask(), self._model.device)

    def _end_with_checkpoint(self) -> NoReturn:
        """Write a checkpoint and end the run. Raises KeyboardInterrupt."""
        if self._hooks.on_checkpoint is not None:
            if rank() == 0:
                logger.info("interrupted: writing a checkpoint of step %d", self.state.step)
            self._losses.flush(self.state)
            self._hooks.on_checkpoint(self)
        raise KeyboardInterrupt

    def _documents_of_step(self, number: int) -> str:
        """Return the names of the first few documents of a step, over all ranks."""
        epoch = self.state.epoch
        if number < self._first_step(epoch):  # the epoch before, which has just ended
            epoch -= 1
        skip = number - self._first_step(epoch)
        steps = self._hooks.steps(epoch, skip) if self._hooks.steps else None
        step = next(steps or self._draw(epoch=epoch, rank=0, world_size=1, skip=skip))
        names = self._data.names(step.data, step.index_W)
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        return ", ".join(names[:NAMES_SHOWN]) + more

    def _identity(self) -> dict[str, Any]:
        """Return what must be unchanged for a run to be resumed: the windows, their targets and the settings."""
        settings = {k: v for k, v in dataclasses.asdict(self._settings).items() if k not in HARMLESS}
        also = {"training data": self._data.fingerprint, **self._hooks.identity}
        return {"also": also, "settings": json.loads(json.dumps(settings))}

    def _differences(self, content: Mapping[str, Any]) -> list[str]:
        mine = self._identity()
        theirs = content["settings"]
        names = [name for name, value in mine["settings"].items() if theirs.get(name) != value]
        found = [f"{name} was {theirs.get(name)!r} and is {mine['settings'][name]!r}" for name in names]
        return found + [f"other {name}" for name, value in mine["also"].items() if content["also"].get(name) != value]


class _CheckpointClock:
    """Decides whether save_minutes, or a machine that will be taken away, requires a checkpoint."""

    def __init__(self, settings: TrainSettings, is_preempted: Callable[[], bool] | None) -> None:
        self._minutes, self._is_preempted = settings.save_minutes, is_preempted
        self._saved_at = time.monotonic()
        self._was_preempted = False

    def is_time(self, step: int, device: torch.device) -> bool:
        """Return whether a checkpoint is required. Called after every step on every rank; the answer is the same."""
        if step % CHECK_STEPS:
            return False
        if self._is_preempted is not None and not self._was_preempted and self._is_preempted():
            self._was_preempted = True
            if rank() == 0:
                logger.warning("a machine of this run will be taken away: checkpoint at step %d", step)
            return True
        if self._minutes is None:
            return False
        return answer_of_rank_0(time.monotonic() - self._saved_at >= 60 * self._minutes, device)

    def saved(self) -> None:
        """Record that a checkpoint was written now."""
        self._saved_at = time.monotonic()


class _Monitor:
    """Shows a run on rank 0: progress, evaluations, TensorBoard's curves and exported numbers."""

    def __init__(
        self,
        settings: TrainSettings,
        on_metrics: Callable[[Mapping[str, float]], None] | None,
        on_scalars: Callable[[Mapping[str, float], int], None] | None,
    ) -> None:
        is_shown = rank() == 0
        self._on_scalars = on_scalars if is_shown else None
        self._on_metrics = on_metrics if is_shown else None
        self._is_shown, self._tokens = is_shown, 0
        self._has_hinted, self._settings = False, settings
        self._writer: Any = None
        if settings.tensorboard_dir is not None and is_shown:
            from tensorboardX import SummaryWriter  # comes with Ray Train; imported only where it is needed

            self._writer = SummaryWriter(settings.tensorboard_dir)

    def start(self, state: TrainState, num_steps: int) -> None:
        """Show progress from the current step on."""
        total = max(num_steps, state.step)
        self._progress = Progress(
            logger, "trained", total=total, unit="steps", done=state.step, is_shown=self._is_shown
        ).__enter__()

    def count_step(self, num_steps: int, loss: Tensor, *, num_tokens: int, learning_rate: float) -> None:
        """Count a step of a run of num_steps. Tokens and loss are this rank's, and are scaled up to all ranks."""
        self._tokens += num_tokens * world_size()
        self._progress.total = num_steps
        if not self._progress.is_due:  # reading the loss waits for the device
            self._progress.advance(1, self._progress.details)
            return
        mean_loss = float(loss) * world_size()
        rate = self._tokens / max(self._progress.measured_seconds, 1e-9)
        self._progress.advance(
            1, [f"loss {mean_loss:.3f}", f"learning rate {learning_rate:.1e}", f"{rate:,.0f} tokens/s"]
        )
        self._hint()
        if self._on_metrics is not None:
            numbers = {"step": self._progress.done, "loss": mean_loss, "learning_rate": learning_rate}
            left = self._progress.seconds_left or 0.0
            self._on_metrics({**numbers, "tokens_per_second": rate, "seconds_left": left})

    def _hint(self) -> None:
        """Say once what makes a long run quicker."""
        left = self._progress.seconds_left
        if self._has_hinted or left is None or self._progress.measured_seconds < HINT_AFTER_SECONDS:
            return
        self._has_hinted = True
        if left > LONG_SECONDS and self._is_shown:
            ways = ["a GPU"]
            if self._settings.train_max_windows != 1:
                ways.append("--train-max-windows 1 (trains on the first window of each document)")
            ways.append("--limit (fewer rows)")
            if self._settings.epochs > 1:
                ways.append("fewer --epochs")
            ways.append("a smaller --model")
            logger.info("about %s to go. Quicker: %s", duration(left), ", ".join(ways))

    def show_evaluation(self, state: TrainState, name: str, *, improves: bool) -> None:
        """Log the main metric of the newest evaluation, and export all of its numbers."""
        newest = state.evaluations[-1]
        value = newest[name]
        shown = "undefined" if value is None else f"{value:.4f}"
        if self._is_shown:
            best = ", the best so far" if improves else ""
            logger.info("step %d, epoch %d: valid %s %s%s", state.step, state.epoch, name, shown, best)
        numbers = {
            key: number
            for key, number in newest.items()
            if isinstance(number, (int, float)) and key not in ("step", "epoch")
        }
        self.add_scalars({f"valid/{key}": number for key, number in numbers.items()}, state.step)
        if self._on_metrics is not None:
            self._on_metrics({f"valid_{key}": number for key, number in numbers.items()})

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve of TensorBoard and of the tracker."""
        if self._on_scalars is not None:
            self._on_scalars(values, step)
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the progress bar and the TensorBoard files."""
        self._progress.__exit__(None, None, None)
        if self._writer is not None:
            self._writer.close()


def _is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _on_cpu(tree: Any) -> Any:
    """Copy nested state, with every tensor in CPU memory."""
    return tree_map(lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf, tree)
