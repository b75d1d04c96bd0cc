"""A fine-tuning job: its settings, the checks before any work, and training in this process."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.decisions.calibration import check_calibration
from pipelines.decisions.labels import encode_labels, find_labels, odd_labels
from pipelines.decisions.metrics import parse_objective
from pipelines.errors import DataError, JobError, OutputError, PipelinesError, SettingsError
from pipelines.fields import parse
from pipelines.model.lora import LORA_SETTINGS
from pipelines.model.scorer import plan_of
from pipelines.model.weights import Pretrained, describe
from pipelines.progress import Progress
from pipelines.settings import ComputeSettings, DataSettings, DecisionSettings, WindowSettings
from pipelines.storage.columns import text_schema
from pipelines.storage.labels import LabelColumn, check_label_columns, read_label_column
from pipelines.storage.locations import absolute, make_folder, shown
from pipelines.storage.marks import HEARTBEAT_SECONDS, heartbeat
from pipelines.storage.shards import InputFile, fingerprint, split_into_units, usual_unit_bytes
from pipelines.text.stage import TokenizeStage
from pipelines.text.windows import leads_with_space
from pipelines.training.checkpoints import (
    is_of_start,
    open_training,
    remove_folder,
    remove_training,
    steps_of,
)
from pipelines.training.fit import fit, prepare_folder
from pipelines.training.loop import HARMLESS
from pipelines.training.losses import resolve_loss
from pipelines.training.run import RunSpec, TrainSummary
from pipelines.training.splits import Split, tokenize_into_files
from pipelines.training.state import BestMetric
from pipelines.training.tracking import check_tracking
from pipelines.training_settings import TrainPaths, TrainSettings

BYTES_PER_TOKEN = 4
"""Approximate number of bytes of text per token."""
UNITS_PER_BUFFER = 8
"""Minimum number of units in a shuffle buffer. A buffer with one unit would mix only neighbouring rows."""
ENDS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP
"""Signals that end a training: Ctrl-C, what schedulers and `timeout` send, and a terminal that is closed."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainJob:
    """The settings of a fine-tuning job."""

    paths: TrainPaths
    decision: DecisionSettings = field(default_factory=DecisionSettings)
    data: DataSettings = field(default_factory=DataSettings)
    windows: WindowSettings = field(default_factory=WindowSettings)
    settings: TrainSettings = field(default_factory=TrainSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> TrainJob:
        """Create a job from a flat mapping of settings, as YAML and the command line provide it."""
        groups = (TrainPaths, DecisionSettings, DataSettings, WindowSettings, TrainSettings, ComputeSettings)
        paths, decision, data, windows, settings, compute = parse(values, *groups)
        model = absolute(paths.model) if Path(paths.model).expanduser().is_dir() else paths.model
        valid = None if paths.valid is None else absolute(paths.valid)
        paths = replace(paths, train=absolute(paths.train), valid=valid, output=absolute(paths.output), model=model)
        if settings.tensorboard_dir is not None:  # workers have another working folder
            settings = replace(settings, tensorboard_dir=absolute(settings.tensorboard_dir))
        return cls(paths, decision, data, windows, settings, compute)

    @property
    def is_local(self) -> bool:
        """Whether the job runs in this process, without Ray."""
        return self.paths.worker_range == (0, 0)


@dataclass(frozen=True)
class LabelledFiles:
    """Input files with their targets."""

    location: str
    files: list[InputFile]
    targets: NDArray[np.generic]


@dataclass(frozen=True)
class CheckedTrainJob:
    """A job whose data, labels, weights and settings fit together."""

    job: TrainJob
    spec: RunSpec
    train: LabelledFiles
    valid: LabelledFiles | None
    pretrained: Pretrained

    @property
    def first_file(self) -> str:
        """The first training file. It is used to check that every node can read the input."""
        return self.train.files[0].url

    def splits(self) -> dict[str, Split]:
        """Write the tokenizer to the output folder, and return the inputs to tokenize: train, and valid if given."""
        pretrained = self.pretrained
        tokenizer = prepare_folder(self.spec)
        plan = plan_of(self.spec.windows, tokenizer, model_type=pretrained.model_type, model_limit=pretrained.row_limit)
        windows_per_unit = self.job.settings.shuffle_buffer // UNITS_PER_BUFFER
        unit_bytes = _unit_bytes(self.train.files, windows_per_unit, plan.max_length)
        found = {"train": self._split(self.train, unit_bytes)}
        if self.valid is not None:
            found["valid"] = self._split(self.valid, None)
        return found

    def _split(self, labelled: LabelledFiles, unit_bytes: int | None) -> Split:
        data = self.job.data
        texts = data.text_columns
        lead_space = leads_with_space(self.spec.windows, self.pretrained.model_type)
        schema = text_schema(texts)
        stage = TokenizeStage(labelled.location, texts, schema, self.spec.output, lead_space=lead_space)
        units = split_into_units(labelled.files, unit_bytes=unit_bytes, limit=data.limit)
        return Split(stage, units, labelled.targets, self.job.settings.seed)


def train_here(job: TrainJob) -> TrainSummary:
    """Fine-tune in this process, without Ray, and write the model folder.

    Raises:
        UsageError: Data, labels, weights, windows, model or output do not fit. No work was done.
        JobError: The run was stopped. The same job resumes it.
    """
    with opened_run(job) as checked:
        splits = checked.splits()
        total = sum(split.units.num_rows for split in splits.values())
        with tempfile.TemporaryDirectory(prefix="pipelines-tokens-") as scratch:
            with Progress(logger, "tokenized", total=total, unit="rows") as progress:
                corpora = {
                    name: tokenize_into_files(split, Path(scratch, name), progress) for name, split in splits.items()
                }
            with _ends_at_interrupt() as is_interrupted:
                return fit(checked.spec, corpora["train"], corpora.get("valid"), is_interrupted=is_interrupted)


def end_handlers() -> dict[int, Any]:
    """Return the handlers of the signals that end a training, but for those that are ignored, as under nohup."""
    handlers = {number: signal.getsignal(number) for number in ENDS}
    return {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}


def restore_handlers(handlers: Mapping[int, Any]) -> None:
    """Set the handlers of some signals."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def say_interrupted(number: int) -> None:
    """Log that a signal was noted."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    logger.info("%s: the run ends with a checkpoint after this step; a second %s does not wait", name, name)


@contextmanager
def _ends_at_interrupt() -> Iterator[Callable[[], bool]]:
    """Only note the first of the signals that end a training, so that it can write a checkpoint.

    A second one acts as usual. Outside of the main thread, nothing changes.

    Yields:
        Whether there was a signal.
    """
    noted, before = threading.Event(), end_handlers()
    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        noted.set()
        say_interrupted(number)
        restore_handlers(before)

    restore_handlers(dict.fromkeys(before, note))
    try:
        yield noted.is_set
    finally:
        restore_handlers(before)


@contextmanager
def opened_run(job: TrainJob) -> Iterator[CheckedTrainJob]:
    """Check a job, and begin or resume its output folder, which no other job may use at the same time."""
    checked = check_job(job)
    if job.paths.overwrite:
        _check_overwrite(job)
    make_folder(job.paths.output)
    with heartbeat(job.paths.output) as mark:
        if mark.others:
            raise OutputError(
                f"another training writes to --output {shown(job.paths.output)} now ({mark.others[0]}); wait for it, "
                f"or give a new folder. A killed job counts as running for {3 * HEARTBEAT_SECONDS:g} s"
            )
        if job.paths.overwrite:
            remove_training(job.paths.output)
        checked = replace(checked, spec=replace(checked.spec, start=mark.name))
        with _begun(job, checked):
            yield checked


def _check_overwrite(job: TrainJob) -> None:
    """Raise SettingsError if the run reads something that --overwrite would remove first."""
    output = _real(job.paths.output)
    for name in ("model", "train", "valid"):
        location = getattr(job.paths, name)
        if location is not None and f"{_real(location)}/".startswith(f"{output}/"):
            raise SettingsError(
                f"--overwrite would remove --{name} {shown(location)}, which is in --output "
                f"{shown(job.paths.output)}; give another --output"
            )


def _real(location: str) -> str:
    """Return a location without a slash at its end and, on this machine, without links."""
    return location.rstrip("/") if "://" in location else os.path.realpath(location)


@contextmanager
def _begun(job: TrainJob, checked: CheckedTrainJob) -> Iterator[None]:
    """Begin or resume the run. If a new run fails before a checkpoint, remove the folder."""
    start = checked.spec.start
    is_new = not open_training(job.paths.output, _identity(checked), start=start)
    labels = ", ".join(checked.spec.decision.labels) or "regression"
    num_valid = 0 if checked.valid is None else len(checked.valid.targets)
    logger.info("%s training rows, %s valid; %s", f"{len(checked.train.targets):,}", f"{num_valid:,}", labels)
    if not is_new:
        steps = steps_of(job.paths.output)
        state = f"from its checkpoint of step {steps[-1]}" if steps else "from the beginning: it has no checkpoint"
        logger.info("%s contains an unfinished run, which is resumed %s", shown(job.paths.output), state)
    try:
        yield
    except PipelinesError:
        if is_new and _leaves_nothing(job.paths.output, start):
            remove_folder(job.paths.output)
        raise
    except KeyboardInterrupt:
        _say_what_is_kept(job, start, is_new=is_new)
        raise
    except OSError as error:  # from a disk or an object store, after the retries of `retried`
        raise JobError(f"training stopped: {error}; after the repair, the same command resumes the run") from error


def _leaves_nothing(output: str, start: str) -> bool:
    """Return whether the run has no checkpoint. False if another training has taken over the folder."""
    return is_of_start(output, start) and not steps_of(output)


def _say_what_is_kept(job: TrainJob, start: str, *, is_new: bool) -> None:
    """After an interruption, log what is kept. A new run without a checkpoint leaves nothing."""
    steps = steps_of(job.paths.output)
    if steps:
        logger.info(
            "the checkpoint of step %d is kept in %s: the same command%s resumes the run",
            steps[-1],
            shown(job.paths.output),
            " without --overwrite" if job.paths.overwrite else "",
        )
    elif is_new and _leaves_nothing(job.paths.output, start):
        remove_folder(job.paths.output)
        logger.info("nothing is kept, because no checkpoint was written yet")


def check_job(job: TrainJob) -> CheckedTrainJob:
    """Read footers and labels, and check that data, labels, weights and settings fit.

    Raises:
        UsageError: They do not fit. The message names the remedy.
    """
    paths = job.paths
    train_labels = _read_labels(paths.train, job.data)
    valid_labels = None if paths.valid is None else _read_labels(paths.valid, job.data)
    decision = _with_labels(job.decision, train_labels.values, job.data)
    check_label_columns(job.data, decision)
    train = _labelled(paths.train, train_labels, decision)
    valid = None
    if paths.valid is not None and valid_labels is not None:
        valid = _labelled_as_in_training(paths.valid, valid_labels, decision, limit=job.data.limit)
    else:
        logger.warning(
            "no --valid: nothing measures the model, its thresholds are not tuned, there is no report, and the last "
            "weights are kept instead of the best"
        )
    _check_targets(train.targets, decision, job.settings)
    _check_without_effect(job.settings, has_valid=valid is not None)
    pretrained = describe(paths.model, attention_dropout=job.settings.attention_dropout)
    spec = RunSpec(paths.model, paths.output, job.windows, decision, job.settings, job.compute, job.data)
    return CheckedTrainJob(job, spec, train, valid, pretrained)


def _read_labels(location: str, data: DataSettings) -> LabelColumn:
    """Read the labels of an input. Raises DataError if no row has a text."""
    found = read_label_column(location, data)
    if sum(file.num_nulls for file in found.files) == sum(file.num_rows for file in found.files):
        raise DataError(f"{shown(location)}, column {data.text_column!r}: no row has a text")
    return found


def _with_labels(decision: DecisionSettings, labels: pa.ChunkedArray, data: DataSettings) -> DecisionSettings:
    """Return the decision. If it has no labels, they are set to label_columns or to those that occur in the data."""
    if data.label_columns and not decision.labels and decision.kind == "multilabel":
        return replace(decision, labels=data.label_columns)
    if decision.labels or decision.kind == "regression":
        return decision
    found = find_labels([labels], decision.kind)
    for oddity in odd_labels(found, decision.kind):
        logger.warning("%s", oddity)
    return replace(decision, labels=found)


def _labelled(location: str, labels: LabelColumn, decision: DecisionSettings) -> LabelledFiles:
    """Convert labels to targets. Raises DataError, and the message names the input."""
    try:
        return LabelledFiles(location, labels.files, encode_labels(labels.values, decision))
    except DataError as error:
        raise DataError(f"{shown(location)}: {error}") from error


def _labelled_as_in_training(
    location: str, labels: LabelColumn, decision: DecisionSettings, *, limit: int | None
) -> LabelledFiles:
    """Convert the labels of the validation data. A label that no training row has gets a remedy."""
    try:
        return _labelled(location, labels, decision)
    except DataError as error:
        if "outside the label set" not in str(error):
            raise
        first = f"; --limit takes the first {limit:,} rows of each input, which may lack a label" if limit else ""
        raise DataError(
            f"{error}. The set is that of the training rows{first}. Name all labels with --labels, separated by commas"
        ) from error


def _check_targets(targets: NDArray[np.generic], decision: DecisionSettings, settings: TrainSettings) -> None:
    """Raise an error if loss, weights, metric or objective do not fit, or if all training rows have the same label."""
    resolve_loss(settings, decision, targets)
    BestMetric.of(settings, decision)
    parse_objective(settings.objective)
    if settings.objective != TrainSettings.objective and decision.kind not in ("binary", "multilabel"):
        raise SettingsError(
            f"objective={settings.objective!r} tunes thresholds, and kind {decision.kind} has no thresholds"
        )
    check_calibration(settings.calibrate, decision)
    check_tracking(settings)
    if decision.kind in ("binary", "multiclass") and len(np.unique(targets)) < 2:
        only = decision.labels[int(targets[0])]
        raise DataError(f"every training row has the label {only!r}: a classifier needs at least two")


def _check_without_effect(settings: TrainSettings, *, has_valid: bool) -> None:
    """Raise SettingsError for settings that have no effect, because they need validation data or another setting."""
    for name in LORA_SETTINGS[1:]:
        if not settings.lora_rank and getattr(settings, name) != getattr(TrainSettings, name):
            raise SettingsError(
                f"{name}={getattr(settings, name)!r} has no effect without lora_rank; set lora_rank too"
            )
    for name in ("metric", "evaluate_steps", "early_stopping_patience", "calibrate", "objective"):
        if getattr(settings, name) != getattr(TrainSettings, name) and not has_valid:
            raise SettingsError(f"{name}={getattr(settings, name)!r} needs validation data: add --valid")


def _identity(checked: CheckedTrainJob) -> dict[str, Any]:
    """Return what must be unchanged for a run to be resumed, as JSON content: data, weights and settings."""
    job = checked.job
    groups = (checked.spec.decision, job.data, job.windows, job.settings)
    settings = {name: value for group in groups for name, value in asdict(group).items() if name not in HARMLESS}
    files = {"train": checked.train.files, "valid": [] if checked.valid is None else checked.valid.files}
    inputs = {name: fingerprint((file.url, file.size, file.version) for file in found) for name, found in files.items()}
    found: dict[str, Any] = json.loads(json.dumps({**inputs, "model": shown(job.paths.model), **settings}))
    return found


def _unit_bytes(files: Sequence[InputFile], num_windows: int, max_length: int) -> int:
    """Return text bytes per unit, so that a unit has at most about num_windows windows, also if all texts are short."""
    num_rows, num_bytes = sum(file.num_rows for file in files), sum(sum(file.row_group_bytes) for file in files)
    of_short_texts = num_windows * num_bytes // max(num_rows, 1)
    return max(min(usual_unit_bytes(files), num_windows * max_length * BYTES_PER_TOKEN, of_short_texts), 1)
