"""Bulk scoring as a Ray Data plan: read and tokenize -> score in an actor pool -> commit one file per work unit.

Tokenize tasks run in parallel beside the actors and hand them ids only. The actor stage asks for other resources
than the tasks, so that Ray does not fuse them; read and tokenize ask for the same, so that it does and no text is
shipped. One unit is one block is one output file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, Datasink
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import WriteResult

from pipelines.errors import DataError, JobError
from pipelines.fields import parse
from pipelines.labels import resolve_thresholds
from pipelines.model_folder import ModelFolder, read_model_folder
from pipelines.on_ray.cluster import connected, root_cause
from pipelines.on_ray.telemetry import Counter, progress
from pipelines.on_ray.tokenize import (
    ERROR,
    IDS,
    PAIR_IDS,
    UNIT,
    TokenizeStage,
    documents_of,
    tokenized,
    unit_number,
)
from pipelines.pretrained import load_tokenizer
from pipelines.settings import ComputeSettings, DataSettings, DecisionSettings, ScorePaths, ScoreSettings
from pipelines.shards import (
    MANIFEST,
    SUMMARY,
    InputFile,
    WorkUnit,
    absolute,
    commit_json,
    commit_table,
    plan_units,
    prepare_output,
    read_footers,
)
from pipelines.summary import add_parts, finish_summary, summarize
from pipelines.tables import check_output_columns, check_text_column, output_fields, schema_metadata
from pipelines.windows import leads_with_space

ACTOR_CPUS = 0.5
"""Anything but TOKENIZE_CPUS, so that the stages are not fused; small, so that it always fits beside them."""
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


class ScoreUnit:
    """The actor: one model, scoring one unit at a time."""

    def __init__(self, job: ScoreJob, replicas_per_node: int) -> None:
        threads = job.compute.num_threads or max(1, (os.cpu_count() or 1) // replicas_per_node)
        compute = replace(job.compute, num_threads=threads)
        self._prefix = job.score.prefix
        from pipelines.scoring import (
            Scorer,  # torch is loaded where the model is, not in every task that reads or writes
        )

        self._scorer = Scorer.load(job.model, compute=compute, thresholds=job.score.thresholds)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Ids in, output columns out; kept columns pass through."""
        results = self._scorer.results(self._scorer.score_documents(documents_of(block)), prefix=self._prefix)
        kept = block.drop_columns([name for name in (IDS, PAIR_IDS, ERROR) if name in block.column_names])
        for name in results.column_names:
            kept = kept.append_column(results.schema.field(name), results.column(name))
        return kept


class CommitUnit(Datasink[dict[str, Any]]):
    """Commits each block as the output file of its unit, and returns the unit's part of the summary."""

    def __init__(self, job: ScoreJob, units: Sequence[WorkUnit], folder: ModelFolder, counter: Any) -> None:
        self._output, self._prefix, self._counter = job.output, job.score.prefix, counter
        self._names = [(unit.output_name, unit.num_rows) for unit in units]
        self._decision = folder.decision
        self._metadata = schema_metadata(
            folder.decision, weights_hash=folder.weights_hash, settings_hash=folder.settings_hash
        )
        self.parts: list[dict[str, Any]] = []

    def write(self, blocks: Iterable[Block], ctx: Any) -> dict[str, Any]:
        """Runs in a write task: one file per block."""
        parts = [self._commit(BlockAccessor.for_block(block).to_arrow()) for block in blocks]
        return add_parts(parts)

    def on_write_complete(self, write_result: WriteResult[dict[str, Any]]) -> None:
        """Runs on the driver when every unit is committed."""
        self.parts = write_result.write_returns

    def _commit(self, block: pa.Table) -> dict[str, Any]:
        number = unit_number(block)
        name, num_rows = self._names[number]
        if len(block) != num_rows:  # Ray split or joined a block: the file would not be the unit
            raise JobError(f"unit {number} has {len(block)} rows and should have {num_rows}")
        table = block.drop_columns([UNIT]).replace_schema_metadata(self._metadata)
        size = commit_table(self._output, name, table)
        part = summarize(table, self._decision, prefix=self._prefix)
        part["bytes_out"] = size
        counts = {"units": 1, "rows": part["rows_out"], "tokens": part["tokens"], "errors": part["rows_in_error"]}
        self._counter.add.remote(counts)
        return part


def score(job: ScoreJob, *, address: str | None = None, report: Report = lambda line: None) -> dict[str, Any]:
    """Score every row of the input into the output folder; the summary, which is also written there.

    Raises a UsageError before any work where model, input, columns, settings or output do not fit, and JobError
    where the job cannot be finished.
    """
    started = time.perf_counter()
    folder = read_model_folder(job.model)
    folder = replace(folder, decision=resolve_thresholds(job.score.thresholds, folder.decision))
    load_tokenizer(folder.path)
    files = read_footers(job.input, job.data.text_column)
    keep = check_input(job, files, folder.decision)
    units = plan_units(files, unit_bytes=job.score.unit_bytes, limit=job.data.limit)
    if not units:
        raise DataError(f"{job.input} has no rows: its {len(files)} Parquet files are empty")
    num_rows = sum(unit.num_rows for unit in units)
    prepare_output(job.output)
    commit_json(job.output, MANIFEST, manifest(job, folder, files, units))
    report(f"{len(files)} files, {num_rows:,} rows, {len(units)} work units -> {job.output}")
    with connected(address):
        parts = _run(job, folder, units, keep, num_rows, report)
    total = add_parts(parts)
    if total["rows_out"] != num_rows:
        raise JobError(f"{num_rows} rows in but {total['rows_out']} rows out of {job.output}")
    summary = finish_summary(total, folder.decision, rows_in=num_rows, seconds=time.perf_counter() - started)
    commit_json(job.output, SUMMARY, summary)
    return summary


def check_input(job: ScoreJob, files: Sequence[InputFile], decision: DecisionSettings) -> list[str]:
    """Check every file's columns; the columns to carry into the output."""
    data = job.data
    texts = [name for name in (data.text_column, data.text_pair_column) if name is not None]
    for file in files:
        for name in texts:
            check_text_column(file.schema, name, where=file.url)
    schema = pa.schema(list({field.name: field for file in files for field in file.schema}.values()))
    keep = [name for name in schema.names if name not in texts] if job.score.keep is None else list(job.score.keep)
    outputs = [field.name for field in output_fields(decision, prefix=job.score.prefix)]
    check_output_columns(schema, keep, outputs, prefix=job.score.prefix)
    _check_together(files, keep)
    return keep


def _check_together(files: Sequence[InputFile], keep: Sequence[str]) -> None:
    """Raise DataError where the types of a column to carry along do not go together over the files."""
    together = pa.schema([])
    for file in files:
        carried = pa.schema([field for field in file.schema if field.name in keep])
        try:
            together = pa.unify_schemas([together, carried], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"the columns of {file.url} do not fit those of the files before it: {error}; "
                f"make them alike, or leave that column out with --keep"
            ) from error


def manifest(
    job: ScoreJob, folder: ModelFolder, files: Sequence[InputFile], units: Sequence[WorkUnit]
) -> dict[str, Any]:
    """The content of _manifest.json, which says what the output is made of before any of it exists."""
    return {
        "format_version": 1,
        "model": job.model,
        "weights_hash": folder.weights_hash,
        "settings_hash": folder.settings_hash,
        "input": job.input,
        "files": [{"file": file.url, "rows": file.num_rows} for file in files],
        "units": len(units),
        "settings": {**asdict(job.data), **asdict(job.score), **asdict(job.compute)},
    }


def _run(
    job: ScoreJob, folder: ModelFolder, units: Sequence[WorkUnit], keep: Sequence[str], num_rows: int, report: Report
) -> list[dict[str, Any]]:
    lead_space = leads_with_space(folder.windows, folder.model_type)
    stage = TokenizeStage(job.input, job.data, job.model, tuple(keep), job.score.prefix, lead_space)
    counter = Counter.remote()  # type: ignore[attr-defined]
    sink = CommitUnit(job, units, folder, counter)
    with progress(counter, num_rows, report):
        try:
            _score_stage(tokenized(stage, units), job).write_datasink(sink)
        except ray.exceptions.RayError as error:
            raise JobError(f"scoring failed: {root_cause(error)}") from error
    return sink.parts


def _score_stage(dataset: Dataset, job: ScoreJob) -> Dataset:
    """The actor pool: a GPU or a share of the machine's cores for each replica."""
    there = ray.cluster_resources().get("GPU", 0)
    gpus = job.score.gpus_per_replica
    if gpus is None:
        gpus = 1.0 if there else 0.0
    num_nodes = max(1, sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()))
    default = max(1, int(there / gpus) if gpus else num_nodes)
    fewest, most = job.score.replica_range or (default, default)
    return dataset.map_batches(
        ScoreUnit,
        fn_constructor_args=(job, -(-most // num_nodes)),
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        compute=ActorPoolStrategy(min_size=fewest, max_size=most, max_tasks_in_flight_per_actor=2),
        num_cpus=ACTOR_CPUS,
        num_gpus=gpus or None,
    )
