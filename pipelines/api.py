"""The functions of `import pipelines`, for scripts and notebooks: train, score, evaluate, tune, quantize and others.

Every further keyword is a setting by its name; `help` of a function lists them, and so does `pipelines COMMAND
--help-all`. Progress is shown as a bar on a terminal and in a notebook; elsewhere it goes to the logger `pipelines`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import SettingsError, UsageError
from pipelines.fields import documented, parse
from pipelines.settings import (
    CalibrationMethod,
    ComputeSettings,
    DataSettings,
    DecisionSettings,
    Kind,
    ScoreSettings,
    WindowSettings,
)
from pipelines.storage.tables import as_table, is_location, single_label_column
from pipelines.training_settings import TrainSettings

if TYPE_CHECKING:
    from pipelines.bulk.job import ScoreJob
    from pipelines.bulk.summary import ScoreSummary
    from pipelines.evaluation.labelled import EvaluationResult
    from pipelines.evaluation.quantizing import QuantizeResult
    from pipelines.evaluation.tuning import TuneResult
    from pipelines.model_folder import ModelFolder
    from pipelines.training.job import TrainJob
    from pipelines.training.run import TrainSummary

logger = logging.getLogger(__name__)
Location = str | os.PathLike[str]
TABLE_FLAGS = ("text-column", "text-pair-column", "label-columns", "label-column", "labels", "limit", "keep", "prefix")
"""Flags of the command line in errors about tables."""
TABLE_SETTINGS = ("thresholds", "keep", "prefix", "early_exit")
"""The settings of a scoring job that also apply to a table in memory."""


@documented(DecisionSettings, DataSettings, WindowSettings, TrainSettings, ComputeSettings)
def train(
    train: Any, model: Location, output: Location, *, valid: Any = None, address: str | None = None, **settings: Any
) -> TrainSummary:
    """Fine-tune a classifier, tune its thresholds on valid, and write a model folder.

    If the data is in files, the same call resumes a run that was interrupted. A table in memory cannot be resumed.

    Args:
        train: Labelled file, folder or glob (Parquet, JSON Lines, CSV); or a table in memory (Arrow, pandas, polars,
            columns, rows).
        model: Pretrained weights: a folder or a Hugging Face hub name.
        output: New folder for the finished model.
        valid: Validation data, in the same forms.
        address: Ray cluster to use if num_workers is not 0. Default: RAY_ADDRESS, else a local Ray.
        **settings: Settings by name, such as kind="multiclass", epochs=2, text_column="body", num_workers=4.

    Returns:
        Counts, losses and metrics of the run. `valid` contains the metrics of the finished model.

    Raises:
        UsageError: Data, labels, weights or settings do not fit; nothing was done.
        JobError: The run was stopped.

    Example:
        >>> pipelines.train(frame, model="bert-base-uncased", output="runs/spam", kind="binary", epochs=1)
    """
    with ExitStack() as stack:
        stack.enter_context(_names_of_python(train))
        train, settings = _labelled(train, settings)
        values: dict[str, Any] = {"train": stack.enter_context(_on_disk(train)), "model": _path(model)}
        if valid is not None:
            values["valid"] = stack.enter_context(_on_disk(valid))
        from pipelines.training.job import TrainJob

        return run_training(TrainJob.parse({**values, "output": _path(output), **settings}), address=address)


@documented(DataSettings, ScoreSettings, ComputeSettings)
def score(
    model: Location, input: Any, output: Location | None = None, *, address: str | None = None, **settings: Any
) -> ScoreSummary | pa.Table:
    """Score texts with a model folder: files into files, or a table in memory into a table.

    Args:
        model: Model folder, a path or URL.
        input: File, folder or glob (Parquet, JSON Lines, CSV); or a table in memory (Arrow, pandas, polars, columns,
            rows).
        output: New folder for the scored files. The same call resumes a job that was interrupted. None for a table.
        address: Ray cluster to use. Default: RAY_ADDRESS, else a local Ray. replicas=0 scores without Ray.
        **settings: Settings by name, such as text_column="body", thresholds={"spam": 0.9}, replicas=0.

    Returns:
        For files: the summary of the job. For a table: its columns without the texts, then the output columns.

    Raises:
        UsageError: Model, input, columns or settings do not fit; nothing was done.
        JobError: The job cannot be finished. Finished files stay in the output folder.

    Example:
        >>> pipelines.score("runs/spam", {"text": ["first", "second"]}).to_pandas()
        >>> pipelines.score("runs/spam", "s3://mail/2026/", "s3://mail/scored/")
    """
    if not is_location(input):
        if output is not None:
            raise SettingsError("a table in memory is scored into a table; leave output out, or write it to Parquet")
        with _names_of_python(input):
            return _score_table(model, as_table(input), settings)
    if output is None:
        from pipelines.storage.locations import shown

        raise SettingsError(f"input {shown(_path(input))!r} names files: give output, the folder for the scored files")
    from pipelines.bulk.job import ScoreJob

    job = ScoreJob.parse({"model": _path(model), "input": _path(input), "output": _path(output), **settings})
    return run_scoring(job, address=address)


@documented(DataSettings, ComputeSettings)
def evaluate(
    model: Location, data: Any, *, report: Location | None = None, report_texts: bool = False, **settings: Any
) -> EvaluationResult:
    """Metrics of a model folder on labelled data.

    Args:
        model: Model folder, a path or URL.
        data: Labelled file, folder or glob (Parquet, JSON Lines, CSV); or a table in memory.
        report: Where to write an HTML page with curves and threshold tables.
        report_texts: Show the first words of documents on the page.
        **settings: Settings by name, such as label_column="group", limit=1000, device="cpu".

    Raises:
        UsageError: Model, data or settings do not fit; nothing was scored.

    Example:
        >>> pipelines.evaluate("runs/spam", "test/", report="spam.html")
    """
    from pipelines.evaluation.labelled import evaluate_folder

    page = None if report is None else _path(report)
    with _names_of_python(data):
        data, settings = _labelled(data, settings, model=_path(model))
        columns, compute = parse(settings, DataSettings, ComputeSettings)
        return evaluate_folder(_path(model), data, columns, compute, report=page, report_texts=report_texts)


@documented(DataSettings)
def evaluate_scored(scored: Location, *, report: Location | None = None, **settings: Any) -> EvaluationResult:
    """Metrics of a scored folder whose files have a label column. No model is needed.

    Args:
        scored: Output folder of `score`, a path or URL.
        report: Where to write an HTML page with curves and threshold tables.
        **settings: Settings by name, such as label_column="group". Default: the label columns of the model's training.

    Raises:
        UsageError: The files were not written by `score`, or have no such label column.

    Example:
        >>> pipelines.evaluate_scored("scored/", label_column="label").metrics
    """
    from pipelines.bulk.evaluate import evaluate_scored as evaluate_folder
    from pipelines.bulk.evaluate import with_columns_of_scored
    from pipelines.storage.locations import absolute

    folder = absolute(_path(scored))
    (columns,) = parse(with_columns_of_scored(folder, settings), DataSettings)
    return evaluate_folder(folder, columns, report=None if report is None else _path(report))


@documented(DataSettings, ComputeSettings)
def tune(
    model: Location,
    data: Any,
    *,
    objective: str = "f1",
    confidence: float | None = None,
    joint: bool = False,
    calibrate: CalibrationMethod | None = None,
    early_exit: float | None = None,
    **settings: Any,
) -> TuneResult:
    """Tune the thresholds of a model folder on labelled data, and write them into the folder.

    Args:
        model: Local model folder.
        data: Labelled file, folder or glob (Parquet, JSON Lines, CSV); or a table in memory.
        objective: f1, fbeta=B, precision=P or recall=R.
        confidence: Promise the precision or recall on new documents with this confidence. A label for which the data
            shows no such threshold is never assigned (precision) or always (recall).
        joint: Whether the confidence is that of all labels together.
        calibrate: Calibrate the scores before: none, temperature, or per_label (Platt scaling). None keeps the
            calibration of the folder.
        early_exit: Instead of tuning thresholds, fit when to stop reading a text, such that this share of documents
            (0.99) gets the label of a full read. Setting early_exit=certified of score and serve uses it.
        **settings: Settings by name, such as label_column="group", limit=1000, device="cpu".

    Raises:
        UsageError: Model, data or settings do not fit; nothing was changed.

    Example:
        >>> pipelines.tune("runs/spam", "valid/", objective="precision=0.99")
    """
    from pipelines.evaluation.tuning import TuneOptions, tune_folder

    options = TuneOptions(objective, confidence, joint, calibrate, early_exit)
    with _names_of_python(data):
        data, settings = _labelled(data, settings, model=_path(model))
        columns, compute = parse(settings, DataSettings, ComputeSettings)
        return tune_folder(_path(model), data, columns, compute, options)


@documented(DataSettings, ComputeSettings)
def quantize(
    model: Location,
    new: Location,
    data: Any,
    *,
    max_label_changes: float = 0.002,
    max_drop: float = 0.002,
    metric: str | None = None,
    **settings: Any,
) -> QuantizeResult:
    """Write an int8 model folder for CPUs, if few labels change on labelled data. Needs the extra `[quantize]`.

    Layers that would change too much stay in float: they are found one by one, which can take minutes.

    Args:
        model: Model folder, a path or URL.
        new: New folder. It is scored and served like any other, with OpenVINO, on CPUs.
        data: Labelled file, folder or glob (Parquet, JSON Lines, CSV); or a table in memory.
        max_label_changes: Largest share of documents whose labels may change.
        max_drop: Largest drop of the metric (mae and rmse: growth, as a share of the targets' deviation).
        metric: Default: auprc or mcc (binary), mcc (multiclass), auprc_macro (multilabel), rmse (regression).
        **settings: Settings by name, such as label_column="group", limit=1000.

    Raises:
        UsageError: Model, data or settings do not fit.
        JobError: More labels change, or the metric drops more. Nothing was written.

    Example:
        >>> pipelines.quantize("runs/spam", "runs/spam-int8", "valid/")
    """
    from pipelines.evaluation.quantizing import QuantizeOptions, quantize_folder

    options = QuantizeOptions(max_label_changes, max_drop, metric)
    with _names_of_python(data):
        data, settings = _labelled(data, settings, model=_path(model))
        columns, compute = parse(settings, DataSettings, ComputeSettings)
        return quantize_folder(_path(model), _path(new), data, columns, compute=compute, options=options)


def convert(
    old: Location, new: Location, *, kind: Kind | None = None, labels: Sequence[str] | None = None
) -> ModelFolder | None:
    """Convert a folder of Simple Transformers, a Hugging Face classifier or a LoRA adapter to a model folder.

    Args:
        old: Folder with config.json and weights. A pickle is read by a loader that accepts only tensors.
        new: New folder.
        kind: binary, multiclass, multilabel or regression. Needed if config.json does not define it.
        labels: Names of the labels, in the order of the logits. Default: those of config.json.

    Returns:
        The model folder, or None if old has no classification head: new can then be fine-tuned.

    Raises:
        UsageError: The old folder is not a classifier, or the new folder is not empty.

    Example:
        >>> pipelines.convert("outputs/", "runs/spam")
    """
    from pipelines.simpletransformers.convert import convert as convert_folder

    return convert_folder(_path(old), _path(new), kind, labels)


def run_training(job: TrainJob, *, address: str | None = None) -> TrainSummary:
    """Train in this process if num_workers is 0, else on Ray, which is imported only then."""
    if job.is_local:
        from pipelines.training.job import train_here

        return train_here(job)
    from pipelines.on_ray.train import train as train_on_ray

    return train_on_ray(job, address=address)


def run_scoring(job: ScoreJob, *, address: str | None = None) -> ScoreSummary:
    """Score in this process if replicas is 0 or the job is small, else on Ray, which is imported only then."""
    from pipelines.bulk.here import MOST_SECONDS, runs_here
    from pipelines.bulk.job import check_job
    from pipelines.bulk.score import run_job, score_units_here

    checked = check_job(job)
    if not job.is_local and runs_here(checked, address=address):
        logger.info(
            "scoring in this process, because it takes less than %d s; --replicas 1 scores on Ray", MOST_SECONDS
        )
    elif not job.is_local:
        from pipelines.on_ray.score import score_checked

        return score_checked(checked, address=address)
    return run_job(checked, score_units_here)


def _score_table(model: Location, table: pa.Table, settings: Mapping[str, Any]) -> pa.Table:
    """Score a table in this process: its columns without the texts, then the output columns."""
    from pipelines.decisions.columns import check_output_columns, output_fields
    from pipelines.model.scorer import Scorer
    from pipelines.model_folder import read_model_folder, with_columns_of_training
    from pipelines.storage.columns import check_text_column, with_fields, with_missing_texts

    remembered = with_columns_of_training(_path(model), settings, ("text_column", "text_pair_column"))
    known = {*table.column_names}
    settings = {name: value for name, value in remembered.items() if name in settings or _has(known, value)}
    data, scoring, compute = parse(settings, DataSettings, ScoreSettings, ComputeSettings)
    for field in dataclasses.fields(scoring):
        value = getattr(scoring, field.name)
        if field.name not in TABLE_SETTINGS and value != field.default and (field.name, value) != ("replicas", 0):
            raise SettingsError(
                f"{field.name}={value!r} is for files; for a table in memory there are {', '.join(TABLE_SETTINGS)}"
            )
    texts = data.text_columns
    table = with_missing_texts(table, texts)
    for name in texts:
        check_text_column(table.schema, name, where="the table")
    names = table.column_names
    keep = [name for name in names if name not in texts] if scoring.keep is None else list(scoring.keep)
    folder = read_model_folder(_path(model))
    folder.check_texts(are_pairs=len(texts) == 2)
    has_early_exit = scoring.early_exit != "off"
    fields = output_fields(folder.decision, prefix=scoring.prefix, early_exit=has_early_exit)
    outputs = [column.name for column in fields]
    check_output_columns(names, keep, outputs, prefix=scoring.prefix)
    table = table if data.limit is None else table.slice(0, data.limit)
    scorer = Scorer.load(_path(model), compute=compute, thresholds=scoring.thresholds, early_exit=scoring.early_exit)
    results = scorer.results(
        scorer.score_documents(scorer.tokenizer.documents(with_fields(table, texts), *texts)), prefix=scoring.prefix
    )
    kept = table.select(keep)
    for field, column in zip(results.schema, results.columns, strict=True):
        kept = kept.append_column(field, column)
    return kept


def _labelled(data: Any, settings: dict[str, Any], *, model: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Return labelled data as a location or an Arrow table, and the settings with the columns that they do not name.

    These are the columns on which the model was trained. Otherwise, a table's only column beside the texts contains the
    labels.
    """
    from pipelines.model_folder import COLUMNS, with_columns_of_training

    if is_location(data):
        return _path(data), settings if model is None else with_columns_of_training(model, settings)
    table = as_table(data)
    known = {*table.column_names}
    if model is not None:
        remembered = with_columns_of_training(model, settings)
        usual = {"text_column": "text", "label_column": "label"}
        added = {name: value for name, value in remembered.items() if name in COLUMNS and name not in settings}
        settings = {**settings, **{k: v for k, v in added.items() if _has(known, v) or usual.get(k) not in known}}
    if "label_column" in settings or "label_columns" in settings:
        return table, settings
    texts = [settings.get("text_column", DataSettings.text_column), settings.get("text_pair_column")]
    name = single_label_column(table, [text for text in texts if text is not None])
    return table, settings if name is None else {**settings, "label_column": name}


@contextmanager
def _names_of_python(data: Any) -> Iterator[None]:
    """Name columns as in Python in the errors about a table in memory: text_column instead of --text-column."""
    try:
        yield
    except UsageError as error:
        if is_location(data):
            raise
        text = re.sub(r"\S*pipelines-table-[^/\s]*/table\.parquet", "the table", str(error))
        text = re.sub(rf"--({'|'.join(TABLE_FLAGS)})\b", lambda flag: flag[1].replace("-", "_"), text)
        raise type(error)(text) from error


@contextmanager
def _on_disk(data: Any) -> Iterator[str]:
    """Yield the location of the data. A table in memory is in a temporary Parquet file inside the context."""
    if is_location(data):
        yield _path(data)
        return
    table = as_table(data)
    with tempfile.TemporaryDirectory(prefix="pipelines-table-") as folder:
        file = Path(folder, "table.parquet")
        pq.write_table(table, file)
        yield str(file)


def _has(names: set[str], columns: str | Sequence[str]) -> bool:
    wanted = [columns] if isinstance(columns, str) else columns
    return all(name in names or name.split(".")[0] in names for name in wanted)


def _path(location: Location) -> str:
    return os.fspath(location)
