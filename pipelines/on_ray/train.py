"""Fine-tuning: in this process, or the same loop in Ray Train's workers, fed by Ray Data.

Ray Data reads and tokenizes the Parquet shards in parallel, once; the ids stay in Ray's object store, which spills to
disk what memory does not hold (in this process: in files that are memory-mapped). Workers load them part by part and
take their slices of each step of the seeded plan, so that no row is dropped and the number of workers changes nothing
but rounding and the draws of dropout.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.calibration import check_calibration
from pipelines.checkpoints import open_training, remove_folder, steps_of
from pipelines.corpus import Corpus
from pipelines.errors import DataError, JobError, PipelinesError, SettingsError
from pipelines.evaluation import parse_objective
from pipelines.fields import parse
from pipelines.labels import encode_labels, find_labels
from pipelines.locations import absolute, shown
from pipelines.loop import HARMLESS
from pipelines.losses import resolve_loss
from pipelines.model import describe
from pipelines.on_ray.cluster import check_resources, connected, root_cause, uses_gpus
from pipelines.on_ray.corpora import Split, in_files, on_their_way
from pipelines.on_ray.nodes import check_nodes
from pipelines.on_ray.telemetry import Gauges, Relay, relayed, waits_told
from pipelines.on_ray.tokenize import TOKENIZE_CPUS, TokenizeStage
from pipelines.reading import read_unit, together
from pipelines.scoring import plan_of
from pipelines.settings import (
    ComputeSettings,
    DataSettings,
    DecisionSettings,
    TrainPaths,
    TrainSettings,
    WindowSettings,
)
from pipelines.shards import InputFile, fingerprint, plan_units, read_footers, usual_unit_bytes
from pipelines.steps import rank, world_size
from pipelines.tables import check_label_column, check_text_column
from pipelines.training import TrainJob, fit, prepare_folder, watch_of
from pipelines.windows import leads_with_space

Report = Callable[[str], None]
BYTES_PER_TOKEN = 4
"""Of text, about."""
PARTS_PER_BUFFER = 8
"""At least: a shuffle buffer that held one part would mix nothing but neighbours."""


@dataclass(frozen=True)
class TrainRequest:
    """A fine-tuning job as a person asks for it."""

    paths: TrainPaths
    decision: DecisionSettings = field(default_factory=DecisionSettings)
    data: DataSettings = field(default_factory=DataSettings)
    windows: WindowSettings = field(default_factory=WindowSettings)
    settings: TrainSettings = field(default_factory=TrainSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> TrainRequest:
        """A job from a flat mapping of settings, as YAML and the command line give it."""
        groups = (TrainPaths, DecisionSettings, DataSettings, WindowSettings, TrainSettings, ComputeSettings)
        paths, decision, data, windows, settings, compute = parse(values, *groups)
        model = absolute(paths.model) if Path(paths.model).expanduser().is_dir() else paths.model
        valid = None if paths.valid is None else absolute(paths.valid)
        paths = replace(paths, train=absolute(paths.train), valid=valid, output=absolute(paths.output), model=model)
        if settings.tensorboard_dir is not None:  # as workers with another working folder find it
            settings = replace(settings, tensorboard_dir=absolute(settings.tensorboard_dir))
        return cls(paths, decision, data, windows, settings, compute)


def train(request: TrainRequest, *, address: str | None = None, report: Report = lambda line: None) -> dict[str, Any]:
    """Fine-tune on Parquet and write the model folder; the summary.

    Raises a UsageError before any work where data, labels, weights, windows, model or output do not fit.
    """
    paths = request.paths
    train_files, train_labels = _read_labels(paths.train, request.data)
    valid_files, valid_labels = _read_labels(paths.valid, request.data) if paths.valid else ([], None)
    decision = _with_labels(request.decision, train_labels)
    targets = _targets_of(paths.train, train_labels, decision)
    valid_targets = None if valid_labels is None else _targets_of(str(paths.valid), valid_labels, decision)
    _check_targets(targets, decision, request.settings)
    _check_without_effect(request.settings, has_valid=paths.valid is not None)
    limits = describe(paths.model, attention_dropout=request.settings.attention_dropout)
    is_new = not open_training(paths.output, _identity(request, decision, train_files, valid_files))
    job = TrainJob(paths.model, paths.output, request.windows, decision, request.settings, request.compute)
    try:
        return _prepared(request, job, limits, train_files, targets, valid_files, valid_targets, address, report)
    except PipelinesError:
        if is_new and not steps_of(paths.output):  # nothing to go on from
            remove_folder(paths.output)
        raise
    except OSError as error:  # of a disk or a store, tried again before where that helps
        raise JobError(f"training stopped: {error}; when that is mended, the same command goes on") from error


def _prepared(
    request: TrainRequest,
    job: TrainJob,
    limits: tuple[int | None, str],
    train_files: Sequence[InputFile],
    targets: NDArray[np.generic],
    valid_files: Sequence[InputFile],
    valid_targets: NDArray[np.generic] | None,
    address: str | None,
    report: Report,
) -> dict[str, Any]:
    tokenizer = prepare_folder(job)
    model_limit, model_type = limits
    plan = plan_of(job.windows, tokenizer, model_type=model_type, model_limit=model_limit)
    lead_space = leads_with_space(job.windows, model_type)
    unit_bytes = _part_bytes(train_files, request.settings.shuffle_buffer // PARTS_PER_BUFFER, plan.max_length)
    train_split = _split(request, request.paths.train, train_files, targets, lead_space, unit_bytes)
    valid_split = None
    if request.paths.valid is not None and valid_targets is not None:
        valid_split = _split(request, request.paths.valid, valid_files, valid_targets, lead_space)
    names = ", ".join(job.decision.labels) or "regression"
    report(f"{len(targets):,} training rows, {0 if valid_targets is None else len(valid_targets):,} valid; {names}")
    if request.paths.worker_range == (0, 0):
        with tempfile.TemporaryDirectory(prefix="pipelines-tokens-") as scratch:
            train_corpus = in_files(train_split, Path(scratch, "train"))
            valid_corpus = None if valid_split is None else in_files(valid_split, Path(scratch, "valid"))
            return fit(job, train_corpus, valid_corpus, report)
    with connected(address):
        files = {"input": train_files[0].url}
        if Path(job.model).is_dir():
            files["pretrained weights"] = str(Path(job.model, "config.json"))
        check_nodes(files=files, output=job.output)
        return _fit_on_workers(job, request.paths, train_split, valid_split, report)


def _read_labels(location: str, data: DataSettings) -> tuple[list[InputFile], pa.ChunkedArray]:
    """Footers and the label column of an input, checked: a small read before any work."""
    files = read_footers(location, data.text_column)
    for file in files:
        for name in (data.text_column, data.text_pair_column):
            if name is not None:
                check_text_column(file.schema, name, where=file.url)
        check_label_column(file.schema, data.label_column, where=file.url)
    units = plan_units(files, limit=data.limit)
    if not len(units):
        raise DataError(f"{location} has no rows")
    if sum(file.num_nulls for file in files) == sum(file.num_rows for file in files):
        raise DataError(f"{shown(location)}, column {data.text_column!r}: no row has a text")
    schema = together(files, [data.label_column])
    return files, pa.concat_tables([read_unit(location, unit, schema) for unit in units]).column(data.label_column)


def _with_labels(decision: DecisionSettings, labels: pa.ChunkedArray) -> DecisionSettings:
    """The decision with the labels that occur, where none were named."""
    if decision.labels or decision.kind == "regression":
        return decision
    return replace(decision, labels=find_labels([labels], decision.kind))


def _targets_of(location: str, labels: pa.ChunkedArray, decision: DecisionSettings) -> NDArray[np.generic]:
    """Labels as targets. Raises DataError naming the input."""
    try:
        return encode_labels(labels, decision)
    except DataError as error:
        raise DataError(f"{shown(location)}: {error}") from error


def _check_targets(targets: NDArray[np.generic], decision: DecisionSettings, settings: TrainSettings) -> None:
    """Raise for a loss, weights, a metric, an objective that do not fit, and for training data with one class only."""
    resolve_loss(settings, decision, targets)
    watch_of(settings, decision)
    parse_objective(settings.objective)
    if settings.objective != TrainSettings.objective and decision.kind not in ("binary", "multilabel"):
        raise SettingsError(f"objective={settings.objective!r} tunes thresholds, which kind {decision.kind} has not")
    if settings.calibrate:
        check_calibration(decision)
    if decision.kind in ("binary", "multiclass") and len(np.unique(targets)) < 2:
        only = decision.labels[int(targets[0])]
        raise DataError(f"every training row has the label {only!r}: a classifier needs at least two")


def _check_without_effect(settings: TrainSettings, *, has_valid: bool) -> None:
    """Refuse settings that this command would take and pass over in silence."""
    for name in ("metric", "evaluate_steps", "early_stopping_patience", "calibrate", "objective"):
        if getattr(settings, name) != getattr(TrainSettings, name) and not has_valid:
            raise SettingsError(f"{name}={getattr(settings, name)!r} needs validation data: add --valid")


def _identity(
    request: TrainRequest, decision: DecisionSettings, train: Sequence[InputFile], valid: Sequence[InputFile]
) -> dict[str, Any]:
    """What must be the same for a run to go on, as JSON keeps it: data, weights and settings, not the workers."""
    groups = (decision, request.data, request.windows, request.settings)
    settings = {name: value for group in groups for name, value in asdict(group).items() if name not in HARMLESS}
    files = {"train": train, "valid": valid}
    inputs = {name: fingerprint((file.url, file.size, file.version) for file in found) for name, found in files.items()}
    found: dict[str, Any] = json.loads(json.dumps({**inputs, "model": shown(request.paths.model), **settings}))
    return found


def _part_bytes(files: Sequence[InputFile], num_windows: int, max_length: int) -> int:
    """Text bytes of a part of about so many windows at most: full ones, or one for each of many short texts."""
    num_rows, num_bytes = sum(file.num_rows for file in files), sum(sum(file.row_group_bytes) for file in files)
    of_short = num_windows * num_bytes // max(num_rows, 1)
    return max(min(usual_unit_bytes(files), num_windows * max_length * BYTES_PER_TOKEN, of_short), 1)


def _split(
    request: TrainRequest,
    location: str,
    files: Sequence[InputFile],
    targets: NDArray[np.generic],
    lead_space: bool,
    unit_bytes: int | None = None,
) -> Split:
    data = request.data
    texts = tuple(name for name in (data.text_column, data.text_pair_column) if name is not None)
    stage = TokenizeStage(location, texts, together(files, texts), request.paths.output, lead_space=lead_space)
    units = plan_units(files, unit_bytes=unit_bytes, limit=request.data.limit)
    return Split(stage, units, targets, request.settings.seed)


def run_workers(
    work: Callable[..., Any],
    config: Mapping[str, Any],
    splits: Sequence[Any],
    *,
    num_workers: int,
    report: Report,
) -> Any:
    """What work(config, *splits) returns on rank 0, run in a local Ray or the one at RAY_ADDRESS."""
    with connected():
        shared, workers = [ray.put(split) for split in splits], (num_workers, num_workers)
        return _on_workers(work, config, shared, workers, report, device="auto", max_failures=0)


def _fit_on_workers(
    job: TrainJob, paths: TrainPaths, train_split: Split, valid_split: Split | None, report: Report
) -> dict[str, Any]:
    """Train while Ray Data tokenizes, or after it where the cluster has no room for both."""
    splits = {"train": train_split} if valid_split is None else {"train": train_split, "valid": valid_split}
    is_room, num_cpus = _room_beside(paths.worker_range, uses_gpus(job.compute.device))
    with on_their_way(splits, report, num_cpus=num_cpus) as (corpora, done):
        if not is_room:
            done.result()
        summary: dict[str, Any] = _on_workers(
            _fit_job,
            {"job": job},
            [ray.put(corpora.get(name)) for name in ("train", "valid")],
            paths.worker_range,
            report,
            device=job.compute.device,
            max_failures=job.train.max_failures,
            resize_seconds=paths.resize_seconds,
        )
    return summary


def _room_beside(workers: tuple[int, int], gpus: bool) -> tuple[bool, float | None]:
    """Whether workers and tokenizing fit the cluster together, and how many CPUs tokenizing may then take at most."""
    there, (fewest, most) = ray.cluster_resources(), workers
    if gpus:  # their workers hold no CPUs; where they are still to come, they are not wanted before there is data
        return there.get("GPU", 0) >= fewest, None
    left = there.get("CPU", 0) - most
    return left >= TOKENIZE_CPUS, left if left >= TOKENIZE_CPUS else None


def _on_workers(
    work: Callable[..., Any],
    config: Mapping[str, Any],
    splits: Sequence[Any],
    workers: tuple[int, int],
    report: Report,
    *,
    device: str,
    max_failures: int,
    resize_seconds: float = 60.0,
) -> Any:
    """What rank 0 returns; workers that are lost are replaced, and then all begin work again."""
    gpus = uses_gpus(device)
    relay = Relay.remote()  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(prefix="pipelines-train-") as storage, relayed(relay, report):
        fewest, most = workers
        report(f"{fewest if fewest == most else f'{fewest} to {most}'} workers on {'GPUs' if gpus else 'CPUs'}")
        needed = {"GPU" if gpus else "CPU": float(fewest)}
        check_resources(needed, report)
        try:
            trainer = TorchTrainer(
                _worker,  # Ray keeps what it returns, and its annotation does not say so
                train_loop_config={"work": work, "config": {**config, "relay": relay}, "splits": splits},
                scaling_config=ScalingConfig(
                    num_workers=fewest if fewest == most else workers,  # type: ignore[arg-type]  # as V2 takes it
                    use_gpu=gpus,
                    elastic_resize_monitor_interval_s=resize_seconds,  # type: ignore[call-arg]
                ),
                torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
                run_config=RunConfig(
                    name="train", storage_path=storage, failure_config=FailureConfig(max_failures=max_failures)
                ),
            )
            with waits_told(needed, report):
                result = trainer.fit()
        except (ray.exceptions.RayError, ray.train.TrainingFailedError) as error:
            raise JobError(f"training failed: {root_cause(error)}") from error
    answer = result.return_value  # type: ignore[attr-defined]
    if isinstance(answer, PipelinesError):
        raise answer
    return answer


def _worker(loop_config: dict[str, Any]) -> Any:
    """Runs in every Ray Train worker, whose process group is up; Ray Train keeps what rank 0 returns."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ray.train.get_context().get_local_world_size()))
    try:
        return loop_config["work"](loop_config["config"], *map(ray.get, loop_config["splits"]))
    except PipelinesError as error:  # another attempt would end the same way
        return error


def _fit_job(config: dict[str, Any], train: Corpus, valid: Corpus | None) -> dict[str, Any]:
    def report(line: str) -> None:
        config["relay"].say.remote(line)

    if rank() == 0:
        report(f"training on {world_size()} of them")
    gauges = Gauges("train", {"model": shown(config["job"].output)})
    return fit(config["job"], train, valid, report, lambda: ray.train.get_preemption_info() is not None, gauges)
