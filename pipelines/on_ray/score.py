"""Bulk scoring on Ray Data.

Tasks read and tokenize units. Actors score and commit them. The driver adds their counts. A run is divided into waves
of limited size, because Ray keeps some memory for every task that it has run.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.data import ActorPoolStrategy, Dataset

from pipelines.bulk.job import CheckedJob, ScoreJob, check_job
from pipelines.bulk.score import RESUME_HINT, UNITS_PER_WAVE, run_job, score_here
from pipelines.bulk.summary import Counts, ScoreSummary
from pipelines.errors import JobError
from pipelines.on_ray.cluster import check_resources, connected, root_cause, uses_gpus
from pipelines.on_ray.datasets import tokenized_units
from pipelines.on_ray.nodes import check_nodes
from pipelines.on_ray.replica import COUNTS, CrashRecordActor, RemoteAttempts, ScoreUnits
from pipelines.on_ray.telemetry import Gauges
from pipelines.storage.locations import shown
from pipelines.storage.shards import WorkUnit

ACTOR_CPUS = 0.5
"""CPUs of an actor. They differ from the CPUs of tokenizing, because Ray would otherwise fuse the two stages."""
UNITS_IN_FLIGHT = 4
"""Units per actor: one in the forward pass, one that is prepared or written, and two that are sent to it."""
CALLS_AT_ONCE = 2


def score(job: ScoreJob, *, address: str | None = None) -> ScoreSummary:
    """Score the job on Ray, or in this process if replicas is 0.

    If the output folder contains an unfinished run, it is resumed. A finished run is not changed.

    Args:
        job: The job.
        address: Ray cluster to use. Default: RAY_ADDRESS, else a local Ray is started.

    Raises:
        UsageError: Model, input, columns, settings or output do not fit. No work was done.
        JobError: The job cannot be finished. Finished units are kept.
    """
    if job.is_local:
        return score_here(job)
    return score_checked(check_job(job), address=address)


def score_checked(checked: CheckedJob, *, address: str | None = None) -> ScoreSummary:
    """Score a job that was checked already on Ray. Parameters and errors are those of `score`."""
    gauges = Gauges("score", {"output": shown(checked.job.output)})
    return run_job(checked, partial(_score_units, address=address), on_numbers=gauges)


def _score_units(checked: CheckedJob, units: Iterator[WorkUnit], *, address: str | None) -> Iterator[Counts]:
    """Yield the counts of each unit when it is committed."""
    job = checked.job
    with connected(address):
        first = next(file.url for file in checked.files if file.error is None)
        check_nodes(model=job.model, files={"input": first}, output=job.output)
        _check_resources(job)
        crash_record, tokenize_record = CrashRecordActor.remote(), CrashRecordActor.remote()
        while wave := list(itertools.islice(units, UNITS_PER_WAVE)):
            try:
                dataset = _score_stage(checked, wave, crash_record, RemoteAttempts(tokenize_record))
                batches: Iterable[Any] = dataset.iter_batches(
                    batch_size=None, batch_format="pyarrow", prefetch_batches=0
                )
                for batch in batches:
                    yield from (Counts.from_json(json.loads(text)) for text in batch.column(COUNTS).to_pylist())
            except ray.exceptions.RayError as error:
                cause = root_cause(error)
                hint = RESUME_HINT if cause.may_pass else "finished units are kept, for a start after the repair"
                message = f"scoring failed: {cause}"
                raise JobError(message if "start the job again" in message else f"{message}; {hint}") from error


def _score_stage(
    checked: CheckedJob, units: Sequence[WorkUnit], crash_record: Any, tokenizing: RemoteAttempts
) -> Dataset:
    """Build the dataset: tasks that tokenize, then a pool of actors, each with a GPU or a share of the cores."""
    settings = checked.job.score
    gpus = _gpus_per_replica(checked.job)
    num_nodes = max(1, sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()))
    num_gpus = ray.cluster_resources().get("GPU", 0)
    default = max(1, int(num_gpus / gpus) if gpus else num_nodes)
    fewest, most = settings.replica_range or (default, default)
    dataset = tokenized_units(
        checked.stage,
        units,
        attempts=tokenizing,
        num_cpus=settings.tokenize_cpus,
        **_placement(settings.tokenize_resources, settings.tokenize_labels),
    )
    return dataset.map_batches(
        ScoreUnits,
        fn_constructor_args=(checked.replica_setup(replicas_per_node=-(-most // num_nodes)), crash_record),
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
        **_placement(settings.replica_resources, settings.replica_labels),
    )


def _gpus_per_replica(job: ScoreJob) -> float:
    if job.score.via_serve is not None:
        return 0.0
    if job.score.gpus_per_replica is not None:
        return job.score.gpus_per_replica
    return 1.0 if uses_gpus(job.compute.device) else 0.0


def _check_resources(job: ScoreJob) -> None:
    fewest = (job.score.replica_range or (1, 1))[0]
    needed = {"GPU": fewest * _gpus_per_replica(job), "CPU": job.score.tokenize_cpus}
    for name, amount in (job.score.replica_resources or {}).items():
        needed[name] = fewest * amount
    check_resources(needed)


def _placement(resources: Mapping[str, float] | None, labels: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the options of Ray that determine where tasks or actors run."""
    found = {"resources": dict(resources or {}), "label_selector": dict(labels or {})}
    return {name: value for name, value in found.items() if value}
