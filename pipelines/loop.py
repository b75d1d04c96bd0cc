"""The training loop: steps, evaluations, the best weights, early stopping, checkpoints and going on from one.

What an evaluation measures and where a checkpoint lies is the caller's business. Knows no ray.

Shapes: D documents, L labels.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from pipelines.checkpoints import STATE_FILE
from pipelines.errors import JobError, ModelFolderError, SettingsError
from pipelines.losses import Loss
from pipelines.model import WindowModel
from pipelines.scoring import DocumentScores
from pipelines.settings import TrainSettings
from pipelines.steps import (
    Step,
    Stepper,
    WindowParts,
    plan_steps,
    rank,
    steps_of_epoch,
    steps_of_run,
    world_size,
)

TENSORS_FILE = "training_state.pt"
"""Of a checkpoint: optimizer, schedule and the best weights so far."""
PROGRESS_SECONDS = 5.0
CHECK_STEPS = 10
"""Every so many steps all ranks ask together whether a checkpoint is due: by the clock, or for a lost machine."""
NAMES_SHOWN = 8
"""Documents of a step that went wrong."""
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
        "logging_steps",
    }
)
"""Settings that a run may change when it goes on from a checkpoint."""
Report = Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """What valid says of the weights as they are."""

    metrics: Mapping[str, Any]
    scores: DocumentScores | None = None


@dataclass(frozen=True)
class Watch:
    """The metric that chooses the best weights."""

    name: str
    minimize: bool
    delta: float = 0.0

    def improves(self, metrics: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
        """Whether metrics beat the best so far by more than delta; an undefined one beats nothing but itself."""
        if self.name not in metrics:
            raise SettingsError(f"metric={self.name!r} is none of the metrics of valid: {', '.join(metrics)}")
        value, other = metrics[self.name], None if best is None else best[self.name]
        if other is None or not np.isfinite(other):
            return best is None or (value is not None and bool(np.isfinite(value)))
        if value is None:
            return False
        return bool((other - value if self.minimize else value - other) > self.delta)


@dataclass
class TrainState:
    """How far a run is, as JSON keeps it."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimizer steps done."""
    losses: list[float] = field(default_factory=list)
    """Of each step, averaged over all ranks."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of each evaluation, with its step and epoch."""
    best: int | None = None
    """Which evaluation was the best."""
    flat: int = 0
    """Evaluations since, of those that count."""
    stopped: bool = False
    """Whether early stopping ended the run."""

    @property
    def best_metrics(self) -> dict[str, Any]:
        """Of the best evaluation; empty without any."""
        best = {} if self.best is None else self.evaluations[self.best]
        return {name: value for name, value in best.items() if name not in ("step", "epoch")}


class TrainLoop:
    """One run over labelled windows. Every rank runs the same loop; hooks are called on every rank."""

    def __init__(
        self,
        model: WindowModel,
        data: WindowParts,
        settings: TrainSettings,
        loss: Loss,
        *,
        watch: Watch,
        evaluate: Callable[[], Evaluation] | None = None,
        on_best: Callable[[TrainLoop], None] | None = None,
        on_checkpoint: Callable[[TrainLoop], None] | None = None,
        plan: Callable[[int, int], Iterator[Step]] | None = None,
        also: Mapping[str, Any] | None = None,
        is_preempted: Callable[[], bool] | None = None,
        on_progress: Callable[[Mapping[str, float]], None] | None = None,
        report: Report = lambda line: None,
    ) -> None:
        """The steps of an epoch after the first n come from plan(epoch, n); by default settings.seed draws them.

        evaluate looks at the model between steps; on_best follows an evaluation that was the best so far, and
        on_checkpoint each point that settings.save_steps, save_minutes and save_each_epoch name, and the first time
        that is_preempted says that a machine will be taken away; every rank calls that as often. on_progress gets
        step, loss, learning rate and rate every few seconds, on rank 0. also is what else, JSON-ready, must be the
        same for a run to go on from a checkpoint.
        """
        self.state = TrainState()
        self.best_scores: DocumentScores | None = None
        """Scores of the best evaluation, where it happened in this process."""
        self._model, self._data, self._settings, self._watch = model, data, settings, watch
        self._evaluate, self._on_best, self._on_checkpoint = evaluate, on_best, on_checkpoint
        self._also = dict(also or {})
        self._is_preempted, self._was_preempted = is_preempted, False
        self._saved_at = time.monotonic()
        self._on_progress = on_progress if rank() == 0 else None
        self._report = report if rank() == 0 else _silent
        example = data.first().cut
        self._num_steps = steps_of_run(data, settings)
        self._stepper = Stepper(model, example, settings, loss, self._num_steps)
        self.is_epoch_end = False
        """Whether the last step ended an epoch."""
        draw = partial(plan_steps, data, settings, loss)
        self._plan = plan or (lambda epoch, skip: draw(epoch=epoch, rank=rank(), world_size=world_size(), skip=skip))
        self._whole_plan = plan or (lambda epoch, skip: draw(epoch=epoch, rank=0, world_size=1, skip=skip))
        self._pending: list[Tensor] = []
        self._best_weights: dict[str, Tensor] | None = None
        self._scalars = _Scalars(settings.tensorboard_dir if rank() == 0 else None)

    def run(self) -> TrainState:
        """Train from where the state is to the end; the model then has the best weights, or without valid the last."""
        progress = _Progress(self._report, self._on_progress, self.state.step)
        try:
            while self.state.epoch < self._settings.epochs and not self.state.stopped:
                self._run_epoch(progress)
        finally:
            self._model.module.eval()
            self._stepper.release()
        if self._best_weights is not None:
            self._model.module.load_state_dict(self._best_weights)
        self._scalars.close()
        return self.state

    def save(self, folder: Path) -> None:
        """Write what this run needs to go on, beside the weights, which the caller has put into the folder."""
        if rank() == 0:
            self.snapshot()(folder)

    def snapshot(self) -> Callable[[Path], None]:
        """What this run needs to go on, copied off the device; the function returned writes it, at any later time."""
        tensors = _on_cpu({"stepper": self._stepper.state(), "best": self._best_weights})
        content = json.dumps({**self._identity(), "state": dataclasses.asdict(self.state)})

        def write(folder: Path) -> None:
            torch.save(tensors, folder / TENSORS_FILE)
            partial = folder / f"{STATE_FILE}.partial"
            partial.write_text(content)
            os.replace(partial, folder / STATE_FILE)

        return write

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint, whose weights the model already has.

        Raises ModelFolderError where it is of a run on other data or with other settings, naming the difference.
        """
        if not (folder / TENSORS_FILE).is_file():
            raise ModelFolderError(f"{folder} has {STATE_FILE} but no {TENSORS_FILE}: it was copied in part")
        content = json.loads((folder / STATE_FILE).read_text())
        differences = self._differences(content)
        if differences:
            raise ModelFolderError(f"{folder} is a checkpoint of another run: {'; '.join(differences)}")
        tensors = torch.load(folder / TENSORS_FILE, map_location=self._model.device, weights_only=True)
        self._stepper.load_state(tensors["stepper"])
        self._best_weights = tensors["best"]
        self.state = TrainState(**content["state"])
        self._num_steps = 0  # the learning rate there is of the step that was next then

    def _run_epoch(self, progress: _Progress) -> None:
        state, settings = self.state, self._settings
        self._model.module.train()
        for step in self._plan(state.epoch, state.step - self._first_step(state.epoch)):
            self._lay_out(step.num_steps)
            self._pending.append(self._stepper(step, state.step))
            state.step += 1
            self.is_epoch_end = is_end = step.ends_epoch
            state.epoch += is_end
            num_tokens = step.data.length_W[step.index_W].sum()
            progress.step(state, self._num_steps, self._pending[-1], num_tokens, self._learning_rate)
            if settings.tensorboard_dir is not None and state.step % settings.logging_steps == 0:  # on every rank
                self._flush()
                self._scalars.add({"loss": state.losses[-1], "lr": self._learning_rate}, state.step)
            by_steps = self._is_due(False, settings.evaluate_steps)
            is_evaluated = self._evaluate is not None and (by_steps or (is_end and settings.evaluate_each_epoch))
            if self._evaluate is not None and is_evaluated:
                self._flush()
                self._model.module.eval()
                self._judge(self._evaluate(), counts=by_steps or settings.early_stopping_consider_epochs)
                self._model.module.train()
            wanted = settings.save_each_epoch if is_end else settings.save_evaluations and is_evaluated
            is_due = self._is_due(wanted, settings.save_steps)
            if self._on_checkpoint is not None and (self._is_time() or is_due):  # all ranks ask for the time
                self._flush()
                self._on_checkpoint(self)
                self._saved_at = time.monotonic()
            if state.stopped:
                return
        self._flush()

    @property
    def _learning_rate(self) -> float:
        return self._stepper.learning_rate

    def _first_step(self, epoch: int) -> int:
        """Steps before an epoch; of all but the first, the parts have come."""
        return sum(steps_of_epoch(self._data, self._settings, before) for before in range(epoch))

    def _lay_out(self, num_steps: int | None) -> None:
        """Follow what is known of the number of steps."""
        if num_steps is not None and num_steps != self._num_steps:
            self._num_steps = num_steps
            self._stepper.lay_out(num_steps)

    def _is_time(self) -> bool:
        """Whether the clock calls for a checkpoint, or the first word that a machine will be taken away."""
        if self.state.step % CHECK_STEPS:
            return False
        if self._is_preempted is not None and not self._was_preempted and self._is_preempted():
            self._was_preempted = True
            self._report(f"a machine of this run will be taken away: checkpoint at step {self.state.step}")
            return True
        minutes = self._settings.save_minutes
        return minutes is not None and self._of_rank_0(time.monotonic() - self._saved_at >= 60 * minutes)

    def _of_rank_0(self, answer: bool) -> bool:
        """Rank 0's answer on every rank: clocks differ."""
        if world_size() == 1:
            return answer
        shared = torch.tensor(int(answer), device=self._model.device)
        dist.broadcast(shared, src=0)
        return bool(shared)

    def _is_due(self, at_end: bool, every: int | None) -> bool:
        return at_end or (every is not None and self.state.step % every == 0)

    def _judge(self, evaluation: Evaluation, *, counts: bool) -> None:
        """Keep the evaluation, and the weights if they are the best; stop where patience is over."""
        state, name = self.state, self._watch.name
        improves = self._watch.improves(evaluation.metrics, state.best_metrics or None)
        metrics = {key: _plain(value) for key, value in evaluation.metrics.items()}
        state.evaluations.append({"step": state.step, "epoch": state.epoch, **metrics})
        value = metrics[name]
        shown = "undefined" if value is None else f"{value:.4f}"
        self._report(f"step {state.step}, epoch {state.epoch}: valid {name} {shown}{', the best' * improves}")
        numbers = {key: number for key, number in metrics.items() if isinstance(number, (int, float))}
        self._scalars.add({f"valid/{key}": number for key, number in numbers.items()}, state.step)
        if self._on_progress is not None:
            self._on_progress({f"valid_{key}": number for key, number in numbers.items()})
        if improves:
            state.best, state.flat, self.best_scores = len(state.evaluations) - 1, 0, evaluation.scores
            weights = self._model.module.state_dict()
            self._best_weights = {key: tensor.detach().clone() for key, tensor in weights.items()}
            if self._on_best is not None:
                self._on_best(self)
            return
        state.flat += counts
        patience = self._settings.early_stopping_patience
        if patience is not None and state.flat > patience:
            state.stopped = True
            self._report(f"stopped early: {state.flat} evaluations no better than {name} of the best")

    def _flush(self) -> None:
        """Bring the losses of the last steps from the device: one reduction and one synchronisation for all."""
        if not self._pending:
            return
        together = torch.stack(self._pending)
        self._pending = []
        if world_size() > 1:
            dist.all_reduce(together)
        first = len(self.state.losses)
        self.state.losses += together.tolist()
        bad = np.flatnonzero(~np.isfinite(self.state.losses[first:]))
        if len(bad):
            number = first + int(bad[0])
            raise JobError(
                f"the loss or its gradient is not finite at step {number + 1}: lower learning_rate, or train in "
                f"float32 (train_dtype=float32; fp16=False in the facades); the step saw {self._documents(number)}"
            )

    def _documents(self, number: int) -> str:
        """Documents of the step of that number over all ranks, a few of them by name."""
        epoch = self.state.epoch  # or the one before, which has just ended
        epoch -= number < self._first_step(epoch)
        step = next(self._whole_plan(epoch, number - self._first_step(epoch)))
        names = self._data.names(step.data, step.index_W)
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        return ", ".join(names[:NAMES_SHOWN]) + more

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on: the windows, their targets, the settings."""
        settings = {k: v for k, v in dataclasses.asdict(self._settings).items() if k not in HARMLESS}
        also = {"training data": self._data.fingerprint, **self._also}
        return {"also": also, "settings": json.loads(json.dumps(settings))}

    def _differences(self, content: Mapping[str, Any]) -> list[str]:
        mine = self._identity()
        theirs = content["settings"]
        names = [name for name, value in mine["settings"].items() if theirs.get(name) != value]
        found = [f"{name} was {theirs.get(name)!r} and is {mine['settings'][name]!r}" for name in names]
        return found + [f"other {name}" for name, value in mine["also"].items() if content["also"].get(name) != value]


class _Progress:
    """A line every few seconds: step, rate, time to go, loss, learning rate."""

    def __init__(self, report: Report, tell: Callable[[Mapping[str, float]], None] | None, first: int) -> None:
        self._report, self._tell, self._first = report, tell, first
        self._started = self._shown = time.monotonic()
        self._tokens = 0

    def step(self, state: TrainState, total: int, loss: Tensor, num_tokens: int, learning_rate: float) -> None:
        """Count a step of so many; its tokens and loss are this rank's, so they are scaled to all ranks."""
        self._tokens += int(num_tokens) * world_size()
        now = time.monotonic()
        if now - self._shown < PROGRESS_SECONDS:
            return
        self._shown = now
        seconds_left = (now - self._started) / (state.step - self._first) * (total - state.step)
        mean_loss, rate = float(loss) * world_size(), self._tokens / (now - self._started)
        self._report(
            f"step {state.step}/{total} loss {mean_loss:.3f} lr {learning_rate:.1e} "
            f"{rate:,.0f} tokens/s, {seconds_left:.0f} s to go"
        )
        if self._tell is not None:
            self._tell({"step": state.step, "loss": mean_loss, "learning_rate": learning_rate,
                        "tokens_per_second": rate, "seconds_left": seconds_left})  # fmt: skip


class _Scalars:
    """TensorBoard's event file, or nothing without a folder."""

    def __init__(self, folder: str | None) -> None:
        self._writer: Any = None
        if folder is not None:
            from tensorboardX import SummaryWriter  # comes with Ray Train; only where it is asked for

            self._writer = SummaryWriter(folder)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Points of several curves at one step."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def _on_cpu(tree: Any) -> Any:
    """A copy of nested state with every tensor in the processor's memory."""
    return tree_map(lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf, tree)


def _plain(value: Any) -> Any:
    """Numpy's numbers and arrays as Python's, for JSON."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _silent(line: str) -> None:
    """What ranks other than 0 report to."""
