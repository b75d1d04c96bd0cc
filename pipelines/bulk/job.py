"""A scoring job: its settings, and the checks before any work.

`check_job` reads the model folder and the footers of the input, and raises an error if they do not fit together. Its
result contains everything that the stages need: which columns to read, how to tokenize, how to decide.
`score.py` runs the job, and `unit.py` scores and commits a unit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from pipelines.bulk.manifest import RUN_METADATA, RunIdentity, known_files, pinned_snapshot
from pipelines.bulk.unit import ReplicaSetup
from pipelines.classifier_config import read_config, vocabulary_size
from pipelines.decisions.columns import check_output_columns, output_fields, schema_metadata
from pipelines.decisions.early_exit import margin_of
from pipelines.decisions.labels import resolve_thresholds
from pipelines.errors import DataError, SettingsError
from pipelines.fields import parse
from pipelines.model.loading import check_engine
from pipelines.model_files import model_location
from pipelines.model_folder import ModelFolder, read_model_folder, with_columns_of_training
from pipelines.settings import ComputeSettings, DataSettings, DecisionSettings, ScorePaths, ScoreSettings
from pipelines.storage.columns import text_column_problem
from pipelines.storage.filters import check_filter, parse_filter
from pipelines.storage.footers import read_footers
from pipelines.storage.lakes import output_table, snapshot_of
from pipelines.storage.locations import absolute, shown
from pipelines.storage.rows import together
from pipelines.storage.shards import InputFile
from pipelines.text.pretrained import load_tokenizer
from pipelines.text.stage import TokenizeStage
from pipelines.text.windows import leads_with_space, most_tokens_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreJob:
    """One bulk scoring job: a model folder, input files and an output folder."""

    model: str
    input: str
    output: str
    data: DataSettings = field(default_factory=DataSettings)
    score: ScoreSettings = field(default_factory=ScoreSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> ScoreJob:
        """Create a job from a flat mapping of settings, as YAML and the command line provide it.

        Text columns that are not named are those on which the model was trained.
        """
        if isinstance(values.get("model"), str):
            values = with_columns_of_training(str(values["model"]), values, ("text_column", "text_pair_column"))
        paths, data, score, compute = parse(values, ScorePaths, DataSettings, ScoreSettings, ComputeSettings)
        if score.table is not None:
            score = replace(score, table=absolute(score.table))
        return cls(model_location(paths.model), absolute(paths.input), absolute(paths.output), data, score, compute)

    @property
    def is_local(self) -> bool:
        """Whether the job runs in this process, without Ray."""
        return self.score.replica_range == (0, 0)


@dataclass(frozen=True)
class CheckedJob:
    """A job whose model, input and columns fit together."""

    job: ScoreJob
    folder: ModelFolder
    """The model folder, with the thresholds of the job if it sets any."""
    files: list[InputFile]
    carried: pa.Schema
    """Columns that are copied from the input to the output."""
    read: pa.Schema
    """Columns that are read: the copied ones, the texts, and those in the filter."""
    snapshot: str | None = None
    """Version of the table that is the input, if it is a table."""
    run: str = ""
    """Id of the run in the output folder, once this folder is open."""
    change: int = 0
    """If units with errors are scored again: the number of changes of the run, once the folder is open."""

    @property
    def decision(self) -> DecisionSettings:
        """How scores become labels."""
        return self.folder.decision

    @property
    def identity(self) -> RunIdentity:
        """The settings that must be unchanged for a job to resume this run."""
        job = self.job
        return RunIdentity(
            weights_hash=self.folder.weights_hash,
            settings_hash=self.folder.settings_hash,
            limit=job.data.limit,
            text_column=job.data.text_column,
            text_pair_column=job.data.text_pair_column,
            filter=job.score.filter,
            keep=job.score.keep,
            prefix=job.score.prefix,
            dtype=job.compute.dtype,
            early_exit=self.early_exit_in_words,
            engine=job.compute.engine,
        )

    @property
    def early_exit_in_words(self) -> str:
        """How documents stop early. Jobs for which it differs find other scores."""
        mode, fitted = self.job.score.early_exit, self.folder.early_exit
        if mode != "certified":
            return mode
        return f"certified, margin {fitted['margin']:g}, {fitted['order']}, first {fitted['first']}"

    @property
    def stage(self) -> TokenizeStage:
        """The stage that reads and tokenizes work units."""
        job, folder = self.job, self.folder
        return TokenizeStage(
            job.input,
            job.data.text_columns,
            self.read,
            job.model,
            keep=tuple(self.carried.names),
            prefix=job.score.prefix,
            lead_space=leads_with_space(folder.windows, folder.model_type),
            most_tokens=most_tokens_of(folder.windows),
            filter=job.score.filter,
        )

    def replica_setup(self, *, replicas_per_node: int = 1) -> ReplicaSetup:
        """Settings of a replica that scores work units."""
        job, folder = self.job, self.folder
        metadata = schema_metadata(
            self.decision,
            weights_hash=folder.weights_hash,
            settings_hash=folder.settings_hash,
            prefix=job.score.prefix,
            guarantees=folder.guarantees,
            early_exit=self.early_exit_in_words,
            columns=folder.training.get("columns"),
        )
        return ReplicaSetup(
            job.model,
            job.output,
            self.decision,
            {**metadata, RUN_METADATA: self.run.encode()},
            job.compute,
            prefix=job.score.prefix,
            replicas_per_node=replicas_per_node,
            via_serve=job.score.via_serve,
            change=self.change,
            early_exit=job.score.early_exit,
        )


def check_job(job: ScoreJob) -> CheckedJob:
    """Read the model folder and the footers of the input, and check that columns and settings fit.

    Raises:
        UsageError: Model, input, columns or settings do not fit together. The message names the remedy.
    """
    folder = read_model_folder(job.model)
    folder.check_texts(are_pairs=job.data.text_pair_column is not None)
    folder.say_int8()
    check_engine(folder, job.compute)
    decision = resolve_thresholds(job.score.thresholds, folder.decision)
    margin = margin_of(folder, decision, job.score.early_exit)
    folder = replace(
        folder,
        decision=decision,
        guarantees=folder.guarantees_of(decision, early_exit=job.score.early_exit),
        early_exit={} if margin is None else margin.to_json(),
    )
    load_tokenizer(folder.path).check_vocabulary(vocabulary_size(read_config(folder.path)), where=shown(job.model))
    if not job.is_local and "memory://" in (job.input[:9], job.output[:9]):
        raise SettingsError("memory:// exists only in this process; add --replicas 0 to score without Ray")
    read = None if job.score.keep is None else (*job.score.keep, *job.data.text_columns)
    is_pinned = not (job.score.overwrite or job.score.append or job.score.replace_changed)
    snapshot = snapshot_of(job.input, pinned_snapshot(job.output) if is_pinned else None)
    files = read_footers(
        job.input,
        job.data.text_columns,
        read=read,
        lenient=True,
        without=job.output,
        snapshot=snapshot,
        known={} if job.score.overwrite else known_files(job.output),
    )
    readable = [file for file in files if file.schema is not None]
    if not sum(file.num_rows for file in readable):
        raise DataError(f"{shown(job.input)} has no rows: its {len(files)} files are empty")
    _check_text_columns(job, readable)
    carried, read = _columns(job, readable, folder.decision)
    if job.score.table is not None:
        outputs = _outputs(job, folder.decision)
        columns = [column.remove_metadata() for column in (*carried, *outputs)]
        output_table(job.score.table).check(job.output, pa.schema(columns))
    return CheckedJob(job, folder, files, carried, read, None if snapshot is None else snapshot.version)


def _check_text_columns(job: ScoreJob, files: Sequence[InputFile]) -> None:
    """Check the text columns. Rows of a file without them get an error. Raises DataError if no file has them."""
    for name in job.data.text_columns:
        problems = {
            file.url: text_column_problem(file.schema or pa.schema([]), name) for file in files if file.num_rows
        }
        bad = [f"{url} {problem}" for url, problem in problems.items() if problem is not None]
        if len(bad) == len(problems):
            raise DataError(f"{bad[0]}; name the text column with --text-column")
        if bad:
            logger.warning("all rows of %d of %d files will have errors, such as: %s", len(bad), len(problems), bad[0])


def _outputs(job: ScoreJob, decision: DecisionSettings) -> list[pa.Field]:
    return output_fields(decision, prefix=job.score.prefix, early_exit=job.score.early_exit != "off")


def _columns(job: ScoreJob, files: Sequence[InputFile], decision: DecisionSettings) -> tuple[pa.Schema, pa.Schema]:
    """Return the schemas of the columns that are copied and of those that are read."""
    names = list(dict.fromkeys(name for file in files for name in file.column_names))
    texts = job.data.text_columns
    keep = [name for name in names if name not in texts] if job.score.keep is None else list(job.score.keep)
    outputs = [column.name for column in _outputs(job, decision)]
    check_output_columns(names, keep, outputs, prefix=job.score.prefix)
    compared = parse_filter(job.score.filter)[1] if job.score.filter else []
    unknown = [name for name in compared if name not in names]
    if unknown:
        raise DataError(f"--filter names {unknown[0]!r}, which is not an input column; those are: {', '.join(names)}")
    remedy = "convert it to one type, or exclude the column with --keep"
    read = together(files, list(dict.fromkeys([*keep, *compared])), remedy=remedy)
    if job.score.filter:
        check_filter(job.score.filter, read)
    carried = pa.schema([read.field(name) for name in keep])
    for name in texts:  # always read as strings, even if this column has another type in some files
        if name not in read.names:
            read = read.append(pa.field(name, pa.large_string()))
    return carried, read
