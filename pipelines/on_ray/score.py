"""Bulk scoring: Parquet in, scored Parquet out, on Ray Data; killed and started again, it goes on where it was.

Units are read and tokenized by tasks, scored and committed by actors; the driver hears of each what it adds to the
summary. A run goes in waves of bounded size, since Ray keeps something of every task that it ever ran.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset

from pipelines.errors import DataError, JobError, SettingsError
from pipelines.fields import parse
from pipelines.filters import parse_filter
from pipelines.labels import resolve_thresholds
from pipelines.locations import absolute, commit_json, shown
from pipelines.model_folder import ModelFolder, read_model_folder
from pipelines.on_ray.cluster import check_resources, connected, root_cause, uses_gpus
from pipelines.on_ray.nodes import check_nodes
from pipelines.on_ray.replica import PART, Attempts, ReplicaSetup, ScoreUnit
from pipelines.on_ray.telemetry import Tally, watched
from pipelines.on_ray.tokenize import TokenizeStage, tokenized
from pipelines.outputs import SUMMARY, Run, finished_summary, heartbeat, open_run, read_parts, sweep
from pipelines.pretrained import load_tokenizer
from pipelines.reading import together
from pipelines.settings import ComputeSettings, DataSettings, DecisionSettings, ScorePaths, ScoreSettings
from pipelines.shards import InputFile, WorkUnit, read_footers
from pipelines.summary import finish_summary
from pipelines.tables import check_output_columns, output_fields, schema_metadata, text_column_problem
from pipelines.windows import leads_with_space

ACTOR_CPUS = 0.5
"""Anything but the CPUs of tokenizing, so that the stages are not fused; small, so that it fits beside them."""
UNITS_IN_FLIGHT = 4
"""Per actor: one in the forward pass, one being made ready or written, and two whose ids are on their way."""
CALLS_AT_ONCE = 2
UNITS_PER_WAVE = 5_000
GO_ON = "what is done stays done: start the job again and it goes on"
Report = Callable[[str], None]


@dataclass(frozen=True)
class ScoreJob:
    """One bulk scoring job, from a model folder and Parquet files to scored Parquet files."""

    model: str
    input: str
    output: str
    data: DataSettings = field(default_factory=DataSettings)
    score: ScoreSettings = field(default_factory=ScoreSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> ScoreJob:
        """A job from a flat mapping of settings, as YAML and the command line give it."""
        paths, data, score, compute = parse(values, ScorePaths, DataSettings, ScoreSettings, ComputeSettings)
        return cls(absolute(paths.model), absolute(paths.input), absolute(paths.output), data, score, compute)

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The text column, or the two of a pair."""
        return tuple(name for name in (self.data.text_column, self.data.text_pair_column) if name is not None)


@dataclass(frozen=True)
class CheckedJob:
    """A job whose model, input and columns fit together."""

    job: ScoreJob
    folder: ModelFolder
    files: list[InputFile]
    keep: pa.Schema
    """Columns to carry along."""
    read: pa.Schema
    """Columns to read: those, the texts, and what a filter compares."""

    @property
    def decision(self) -> DecisionSettings:
        """The folder's, under the job's thresholds."""
        return self.folder.decision


def score(job: ScoreJob, *, address: str | None = None, report: Report = lambda line: None) -> dict[str, Any]:
    """Score every row of the input into the output folder; the summary, which is also written there.

    A run that was begun there goes on; one that is finished is left alone. Raises a UsageError before any work where
    model, input, columns, settings or output do not fit, and JobError where the job cannot be finished.
    """
    checked = check_job(job, report=report)
    run = open_run(
        job.output, checked.files, checked.keep, identity(checked),
        input=job.input, unit_bytes=job.score.unit_bytes, overwrite=job.score.overwrite, append=job.score.append,
    )  # fmt: skip
    summary = finished_summary(run)
    if summary is not None:
        report(f"nothing to do: all {run.num_units:,} units of {shown(job.output)} are done")
        return summary
    tally = Tally(run, checked.decision, job.score.max_errors)
    if run.done:
        report(f"going on: {len(run.done):,} of {run.num_units:,} units are done")
        tally.add_done(read_parts(run.location, sorted(run.done)))
    left = run.num_units - len(run.done)
    num_files = sum(len(plan.files) for plan in run.plans)
    report(f"{num_files:,} files, {run.num_rows:,} rows, {left:,} units to do -> {shown(job.output)}")
    with heartbeat(job.output) as others:
        if others:
            report(f"another job writes here too ({others[0]}): nothing breaks, but work is done twice")
        with watched(tally, report):
            for part in _parts(checked, run, address, report):
                tally.add(part)
    return _finish(checked, run, tally)


def check_job(job: ScoreJob, *, report: Report = lambda line: None) -> CheckedJob:
    """Read the model folder and the footers of the input, and check that columns and settings fit."""
    folder = read_model_folder(job.model)
    folder.check_texts(are_pairs=job.data.text_pair_column is not None)
    folder = replace(folder, decision=resolve_thresholds(job.score.thresholds, folder.decision))
    load_tokenizer(folder.path)
    if job.score.replica_range != (0, 0) and "memory://" in (job.input[:9], job.output[:9]):
        raise SettingsError("memory:// is seen by this process alone; add --replicas 0 to score without Ray")
    files = read_footers(job.input, job.data.text_column, lenient=True)
    readable = [file for file in files if file.schema is not None]
    if not sum(file.num_rows for file in readable):
        raise DataError(f"{shown(job.input)} has no rows: its {len(files)} Parquet files are empty")
    _check_texts(job, readable, report)
    compared = parse_filter(job.score.filter)[1] if job.score.filter else []
    names = list(dict.fromkeys(name for file in readable for name in file.column_names))
    keep = [name for name in names if name not in job.text_columns] if job.score.keep is None else list(job.score.keep)
    outputs = [field.name for field in output_fields(folder.decision, prefix=job.score.prefix)]
    check_output_columns(names, keep, outputs, prefix=job.score.prefix)
    unknown = [name for name in compared if name not in names]
    if unknown:
        raise DataError(f"--filter names {unknown[0]!r}, which is no input column; those are: {', '.join(names)}")
    read = together(readable, list(dict.fromkeys([*keep, *compared])))
    carried = pa.schema([read.field(name) for name in keep])
    for name in job.text_columns:  # as strings, whatever a file without texts has under their name
        if name not in read.names:
            read = read.append(pa.field(name, pa.large_string()))
    return CheckedJob(job, folder, files, carried, read)


def identity(checked: CheckedJob) -> dict[str, Any]:
    """What makes a run this run, beside its input."""
    job = checked.job
    return {
        "weights_hash": checked.folder.weights_hash,
        "settings_hash": checked.folder.settings_hash,
        "limit": job.data.limit,
        "text_column": job.data.text_column,
        "text_pair_column": job.data.text_pair_column,
        "filter": job.score.filter,
        "keep": None if job.score.keep is None else list(job.score.keep),
        "prefix": job.score.prefix,
        "dtype": job.compute.dtype,
    }


def _check_texts(job: ScoreJob, files: Sequence[InputFile], report: Report) -> None:
    """Some files may lack the text, and their rows say so; not all of them."""
    for name in job.text_columns:
        problems = {file.url: text_column_problem(file.schema or pa.schema([]), name) for file in files}
        bad = [f"{url} {problem}" for url, problem in problems.items() if problem is not None]
        if len(bad) == len(files):
            raise DataError(f"{bad[0]}; name the text column with --text-column")
        if bad:
            report(f"{len(bad)} of {len(files)} files come out with errors, such as: {bad[0]}")


def _parts(checked: CheckedJob, run: Run, address: str | None, report: Report) -> Iterator[dict[str, Any]]:
    """What each unit that is left adds to the summary, as soon as it is committed."""
    job = checked.job
    left = (unit for plan in run.plans for unit in plan if unit.output_name not in run.done)
    if job.score.replica_range == (0, 0):
        yield from _here(checked, left)
        return
    with connected(address):
        first = next(file.url for file in checked.files if file.error is None)
        check_nodes(model=job.model, files={"input": first}, output=job.output)
        _check_resources(job, report)
        attempts = Attempts.remote()  # type: ignore[attr-defined]
        while wave := list(itertools.islice(left, UNITS_PER_WAVE)):
            try:
                dataset = _score_stage(checked, wave, attempts)
                batches: Iterable[Any] = dataset.iter_batches(
                    batch_size=None, batch_format="pyarrow", prefetch_batches=0
                )
                for batch in batches:
                    yield from map(json.loads, batch.column(PART).to_pylist())
            except ray.exceptions.RayError as error:
                raise JobError(f"scoring failed: {root_cause(error)}; {GO_ON}") from error


def _here(checked: CheckedJob, units: Iterator[WorkUnit]) -> Iterator[dict[str, Any]]:
    """The same stages in this process, one unit after another."""
    stage, replica = _stage(checked), ScoreUnit(_setup(checked, replicas_per_node=1))
    for unit in units:
        for table in stage([unit]):
            try:
                yield replica.score_unit(unit.number, unit.output_name, table)
            except OSError as error:
                raise JobError(f"{shown(checked.job.output)} cannot be written: {error}; {GO_ON}") from error


def _stage(checked: CheckedJob) -> TokenizeStage:
    job, folder = checked.job, checked.folder
    return TokenizeStage(
        job.input,
        job.text_columns,
        checked.read,
        job.model,
        keep=tuple(checked.keep.names),
        prefix=job.score.prefix,
        lead_space=leads_with_space(folder.windows, folder.model_type),
        filter=job.score.filter,
    )


def _setup(checked: CheckedJob, *, replicas_per_node: int) -> ReplicaSetup:
    job, folder = checked.job, checked.folder
    return ReplicaSetup(
        job.model,
        job.output,
        checked.decision,
        schema_metadata(
            checked.decision,
            weights_hash=folder.weights_hash,
            settings_hash=folder.settings_hash,
            prefix=job.score.prefix,
        ),
        job.compute,
        prefix=job.score.prefix,
        replicas_per_node=replicas_per_node,
        via_serve=job.score.via_serve,
    )


def _score_stage(checked: CheckedJob, units: Sequence[WorkUnit], attempts: Any) -> Dataset:
    """Tasks that tokenize, then the actor pool: a GPU or a share of the machine's cores for each replica."""
    settings = checked.job.score
    gpus = _gpus_per_replica(checked.job)
    num_nodes = max(1, sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()))
    there = ray.cluster_resources().get("GPU", 0)
    default = max(1, int(there / gpus) if gpus else num_nodes)
    fewest, most = settings.replica_range or (default, default)
    dataset = tokenized(
        _stage(checked), units,
        num_cpus=settings.tokenize_cpus, **_placed(settings.tokenize_resources, settings.tokenize_labels),
    )  # fmt: skip
    return dataset.map_batches(
        ScoreUnit,
        fn_constructor_args=(_setup(checked, replicas_per_node=-(-most // num_nodes)), attempts),
        batch_format="pyarrow",
        batch_size=1,  # a row is a unit
        zero_copy_batch=True,
        compute=ActorPoolStrategy(
            min_size=fewest,
            max_size=most,
            max_tasks_in_flight_per_actor=UNITS_IN_FLIGHT,
            max_concurrent_calls_per_actor=CALLS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        num_cpus=ACTOR_CPUS if settings.tokenize_cpus != ACTOR_CPUS else ACTOR_CPUS / 2,
        num_gpus=gpus or None,
        **_placed(settings.replica_resources, settings.replica_labels),
    )


def _gpus_per_replica(job: ScoreJob) -> float:
    if job.score.via_serve is not None:
        return 0.0
    if job.score.gpus_per_replica is not None:
        return job.score.gpus_per_replica
    return 1.0 if uses_gpus(job.compute.device) else 0.0


def _check_resources(job: ScoreJob, report: Report) -> None:
    fewest = (job.score.replica_range or (1, 1))[0]
    needed = {"GPU": fewest * _gpus_per_replica(job), "CPU": job.score.tokenize_cpus}
    for name, amount in (job.score.replica_resources or {}).items():
        needed[name] = fewest * amount
    check_resources(needed, report)


def _placed(resources: Mapping[str, float] | None, labels: Mapping[str, str] | None) -> dict[str, Any]:
    """Ray's options for where tasks or actors run."""
    found = {"resources": dict(resources or {}), "label_selector": dict(labels or {})}
    return {name: value for name, value in found.items() if value}


def _finish(checked: CheckedJob, run: Run, tally: Tally) -> dict[str, Any]:
    """Check that no row is missing, and write the summary."""
    total = tally.total
    if total["rows_in"] != run.num_rows or total["rows_out"] + total["rows_filtered"] != run.num_rows:
        raise JobError(
            f"{run.num_rows} rows in, but {total['rows_out']} out and {total['rows_filtered']} filtered away in "
            f"{shown(run.location)}"
        )
    summary = {
        **finish_summary(total, checked.decision),
        "files_in_error": run.files_in_error,
        "labels": list(checked.decision.labels),
        "wall_seconds": round(tally.elapsed, 2),
        "rows_per_second": round(tally.rows_now / tally.elapsed, 2),
        "units_before": len(run.done),
    }
    commit_json(run.location, SUMMARY, summary)
    sweep(run.location)
    return summary
