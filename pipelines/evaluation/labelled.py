"""Score labelled data in this process, to evaluate a model folder or to tune its thresholds.

Shapes: D documents, L labels.
"""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.decisions.guarantees import Guarantees, LabelGuarantee, check_confidence, guarantee_thresholds
from pipelines.decisions.labels import Decisions, decide, encode_labels
from pipelines.decisions.metrics import (
    Tuned,
    count_distinct,
    evaluate,
    histograms_of,
    tie_warning,
    tune_thresholds,
)
from pipelines.errors import DataError, ModelFolderError, SettingsError
from pipelines.evaluation.report import ReportData, render
from pipelines.model.scorer import Scorer
from pipelines.model_folder import ModelFolder, read_model_folder, write_pipeline_file
from pipelines.progress import Progress
from pipelines.settings import ComputeSettings, DataSettings, DecisionSettings
from pipelines.storage.columns import check_label_column, check_text_column, text_schema, with_fields
from pipelines.storage.labels import check_label_columns, label_values, read_label_column
from pipelines.storage.locations import absolute, commit_bytes, make_folder, shown
from pipelines.storage.rows import read_tables
from pipelines.storage.shards import InputFile, fingerprint

MEMORY = "the table in memory"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledInput:
    """Labelled documents in files or in memory. The labels are already read and checked; the texts are not."""

    source: str
    """Display name of the input, for messages and pages."""
    fingerprint: str
    """Changes if the data changes."""
    num_rows: int
    targets: NDArray[np.generic]
    """(D,) label ids, (D, L) 0/1 or (D,) values, as `labels.encode_labels` gives them."""
    tables: Callable[[], Iterable[pa.Table]]
    """Returns tables of the text columns, in the order of the targets."""
    name_of: Callable[[int], str]
    """Returns the display name of a row."""


@dataclass(frozen=True)
class LabelledScores:
    """Scores and targets of the D rows that could be scored."""

    scores_DL: NDArray[np.float32]
    votes_DL: NDArray[np.int64] | None
    num_tokens_D: NDArray[np.int64]
    row_D: NDArray[np.int64]
    """Index of each row in the input."""
    targets: NDArray[np.generic]
    num_rows: int
    """Number of rows of the input."""
    texts: pa.ChunkedArray | None = None
    """Texts of the scored rows, if they were requested."""

    @property
    def rows_in_error(self) -> int:
        """Number of rows that could not be scored."""
        return self.num_rows - len(self.row_D)

    def decide(self, decision: DecisionSettings) -> Decisions:
        """Decide labels from the scores."""
        return decide(self.scores_DL, decision, self.votes_DL)


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of a model folder on labelled data."""

    model: str
    rows: int
    rows_in_error: int
    metrics: Mapping[str, Any]
    """Metrics by name. `metrics.METRICS` lists them for each kind."""
    report: str | None = None
    """Location of the evaluation page, if one was written."""

    def __repr__(self) -> str:
        lines = [f"EvaluationResult of {self.model}: {self.rows:,} rows, {self.rows_in_error:,} in error"]
        lines += [f"  {name:<12} {_number(value)}" for name, value in self.metrics.items() if name != "per_label"]
        for label, values in self.metrics.get("per_label", {}).items():
            lines.append(f"  {label}: " + ", ".join(f"{name} {_number(value)}" for name, value in values.items()))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the result as `pipelines evaluate --json` prints it."""
        return {"rows": self.rows, "rows_in_error": self.rows_in_error, **self.metrics}


@dataclass(frozen=True)
class TuneResult:
    """Thresholds that were tuned and written into a model folder."""

    model: str
    rows_in_error: int
    objective: str
    labels: tuple[str, ...]
    """Labels of the thresholds."""
    thresholds: tuple[float, ...]
    thresholds_before: float | tuple[float, ...] | None
    untuned: tuple[str, ...] = ()
    """Labels that keep their old threshold, because all rows have them or no row has them."""
    missed: tuple[str, ...] = ()
    """Labels for which no threshold reaches the objective."""
    pooled: tuple[str, ...] = ()
    """Labels with too few positives for a threshold of their own."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Metrics with the new thresholds."""
    guarantees: Mapping[str, Any] = field(default_factory=dict)
    """What is promised of the thresholds, if a confidence was given (`guarantees.Guarantees`)."""

    def __repr__(self) -> str:
        tuned = zip(self.labels, self.thresholds, strict=True)
        lines = [
            f"TuneResult of {self.model} for {self.objective}",
            *(f"  {name} {value:.4g}" for name, value in tuned),
        ]
        lines += [f"  {name} {_number(value)}" for name, value in self.metrics.items() if name != "per_label"]
        lines += [f"  {name}: {text}" for name, text in self.promises.items()]
        return "\n".join(lines)

    @property
    def promises(self) -> dict[str, str]:
        """What is promised of each label's threshold, in words. Empty without promises."""
        return _promises(self.guarantees)

    def to_json(self) -> dict[str, Any]:
        """Return the result as `pipelines tune --json` prints it."""
        before = self.thresholds_before
        return {
            "rows_in_error": self.rows_in_error,
            "objective": self.objective,
            "thresholds": list(self.thresholds),
            "thresholds_before": list(before) if isinstance(before, tuple) else before,
            "untuned": list(self.untuned),
            "missed": list(self.missed),
            "pooled": list(self.pooled),
            **({"guarantees": dict(self.guarantees)} if self.guarantees else {}),
            **self.metrics,
        }


def labelled_files(location: str, data: DataSettings, decision: DecisionSettings) -> LabelledInput:
    """Open labelled files, and read and check all labels. No text is read.

    Raises:
        DataError: A file does not have the columns, or has labels that the decision does not have.
    """
    check_label_columns(data, decision)
    found = read_label_column(location, data)
    read = text_schema(data.text_columns)
    return LabelledInput(
        source=shown(location),
        fingerprint=fingerprint((file.url, file.size, file.version) for file in found.files),
        num_rows=found.units.num_rows,
        targets=encode_labels(found.values, decision),
        tables=lambda: read_tables(location, found.units, read, text_columns=data.text_columns),
        name_of=partial(_name_in_files, found.files),
    )


def labelled_table(table: pa.Table, data: DataSettings, decision: DecisionSettings) -> LabelledInput:
    """Open a labelled table in memory, and check its labels.

    Raises:
        DataError: The table does not have the columns, has no rows, or has labels that the decision does not have.
    """
    texts = data.text_columns
    for name in texts:
        check_text_column(table.schema, name, where=MEMORY)
    table = with_fields(table, texts)
    check_label_columns(data, decision)
    for name in data.target_columns:
        check_label_column(table.schema, name, where=MEMORY)
    table = table if data.limit is None else table.slice(0, data.limit)
    if not len(table):
        raise DataError(f"{MEMORY} has no rows")
    digest = hashlib.sha256()
    for batch in table.select([*texts, *data.target_columns]).to_batches():
        digest.update(batch.serialize())
    return LabelledInput(
        source=MEMORY,
        fingerprint=f"sha256:{digest.hexdigest()}",
        num_rows=len(table),
        targets=encode_labels(label_values(table, data), decision),
        tables=lambda: [table.select(list(texts))],
        name_of="row {}".format,
    )


def score_labelled(
    folder: ModelFolder,
    labelled: LabelledInput,
    data: DataSettings,
    compute: ComputeSettings,
    *,
    keep_texts: bool = False,
) -> LabelledScores:
    """Score every row of the input.

    Raises:
        DataError: No row has a text that can be scored.
    """
    scorer = Scorer.load(folder, compute=compute)
    texts = data.text_columns
    scored, kept = [], []
    with Progress(logger, "scored", total=labelled.num_rows, unit="rows") as progress:
        for table in labelled.tables():
            scored.append(scorer.score_documents(scorer.tokenizer.documents(table, *texts)))
            if keep_texts:
                kept.append(table.select([data.text_column]))
            progress.advance(len(table))
    good_D = np.asarray([error is None for scores in scored for error in scores.errors])
    if not good_D.any():
        raise DataError(f"{labelled.source} has no row with a text that can be scored")
    votes = [scores.votes_DL for scores in scored if scores.votes_DL is not None]
    scores_DL = np.concatenate([scores.scores_DL for scores in scored])[good_D]
    warning = tie_warning(count_distinct(scores_DL, folder.decision))
    if warning is not None:
        logger.warning("%s", warning)
    return LabelledScores(
        scores_DL,
        np.concatenate(votes)[good_D] if votes else None,
        np.concatenate([scores.num_tokens_D for scores in scored])[good_D],
        np.flatnonzero(good_D),
        labelled.targets[good_D],
        num_rows=len(good_D),
        texts=pa.concat_tables(kept).column(0).filter(pa.array(good_D)) if kept else None,
    )


def evaluate_folder(
    model: str,
    source: str | pa.Table,
    data: DataSettings,
    compute: ComputeSettings,
    *,
    report: str | None = None,
    report_texts: bool = False,
) -> EvaluationResult:
    """Compute the metrics of a model folder on labelled files or a labelled table.

    Args:
        model: Model folder, a path or URL.
        source: File, folder or glob (Parquet, JSON Lines, CSV); or a table in memory.
        data: Which columns are read, and how many rows.
        compute: How the forward pass runs.
        report: Where to write the evaluation page.
        report_texts: Show the first words of documents on the page.

    Raises:
        UsageError: Model, data and settings do not fit together. Nothing was scored.
    """
    started = time.monotonic()
    folder = _open_for(model, data)
    labelled = _labelled(source, data, folder.decision)
    scored = score_labelled(folder, labelled, data, compute, keep_texts=bool(report and report_texts))
    metrics = evaluate(scored.targets, scored.scores_DL, scored.decide(folder.decision), folder.decision)
    if report:
        page = _page(folder, labelled, scored, metrics=metrics, seconds=time.monotonic() - started)
        target, name = posixpath.split(absolute(report))
        make_folder(target)
        commit_bytes(target, name, page.encode())
        logger.info("the evaluation page is %s", report)
    return EvaluationResult(shown(model), scored.num_rows, scored.rows_in_error, metrics, report)


def tune_folder(
    model: str,
    source: str | pa.Table,
    data: DataSettings,
    compute: ComputeSettings,
    *,
    objective: str = "f1",
    confidence: float | None = None,
    joint: bool = False,
) -> TuneResult:
    """Tune thresholds for the objective, and replace the folder's pipeline.json.

    Args:
        model: Local model folder.
        source: Labelled file, folder or glob; or a table in memory.
        data: Which columns are read, and how many rows.
        compute: How the forward pass runs.
        objective: f1, fbeta=B, precision=P or recall=R.
        confidence: Probability with which the precision or recall holds on new documents. None promises nothing.
        joint: Whether the confidence is that of all labels together.

    Raises:
        UsageError: The folder is not local, its kind has no thresholds, or the data does not fit.
    """
    check_confidence(objective, confidence)
    if joint and confidence is None:
        raise SettingsError("joint is for a confidence; give one, such as --confidence 0.95")
    folder = _open_to_tune(model, data)
    scored = score_labelled(folder, _labelled(source, data, folder.decision), data, compute)
    tuned: Tuned | Guarantees
    if confidence is None:
        tuned = tune_thresholds(scored.targets, scored.scores_DL, folder.decision, objective)
    else:
        tuned = guarantee_thresholds(
            scored.targets, scored.scores_DL, folder.decision, objective=objective, confidence=confidence, joint=joint
        )
    decision = tuned.applied_to(folder.decision)
    guarantees = tuned.to_json() if isinstance(tuned, Guarantees) else {}
    metrics = evaluate(scored.targets, scored.scores_DL, decide(scored.scores_DL, decision), decision)
    histograms = histograms_of(scored.scores_DL, decision)
    write_pipeline_file(
        replace(folder, decision=decision, metrics=metrics, histograms=histograms, guarantees=guarantees)
    )
    for line in tuned.remarks(objective):
        logger.warning("%s", line)
    return TuneResult(
        model=shown(model),
        rows_in_error=scored.rows_in_error,
        objective=objective,
        labels=folder.decision.labels[-len(tuned.thresholds) :],
        thresholds=tuned.thresholds,
        thresholds_before=folder.decision.thresholds,
        untuned=tuned.untuned if isinstance(tuned, Tuned) else (),
        missed=tuned.missed,
        pooled=tuned.pooled if isinstance(tuned, Tuned) else (),
        metrics=metrics,
        guarantees=guarantees,
    )


def _open_to_tune(model: str, data: DataSettings) -> ModelFolder:
    """Open a folder that can be written to, and whose kind has thresholds."""
    if "://" in model:
        raise ModelFolderError(f"{shown(model)} is a URL; tune a local folder and upload it")
    if not os.access(Path(model).expanduser(), os.W_OK):
        raise ModelFolderError(
            f"{shown(model)} is not a folder that can be written to; make one: pipelines convert {shown(model)} NEW"
        )
    folder = _open_for(model, data)
    if folder.decision.kind not in ("binary", "multilabel"):
        raise SettingsError(
            f"thresholds are for kinds binary and multilabel; {shown(model)} is of kind {folder.decision.kind}, "
            "which has no thresholds"
        )
    return folder


def _open_for(model: str, data: DataSettings) -> ModelFolder:
    folder = read_model_folder(model)
    folder.check_texts(are_pairs=data.text_pair_column is not None)
    return folder


def _labelled(source: str | pa.Table, data: DataSettings, decision: DecisionSettings) -> LabelledInput:
    if isinstance(source, str):
        return labelled_files(source, data, decision)
    return labelled_table(source, data, decision)


def _name_in_files(files: list[InputFile], row: int) -> str:
    """Return the file name, and the row in this file, of a row that is counted over all files."""
    for file in files:
        if row < file.num_rows:
            return f"{posixpath.basename(file.url)}, row {row}"
        row -= file.num_rows
    raise IndexError(row)


def _page(
    folder: ModelFolder, labelled: LabelledInput, scored: LabelledScores, *, metrics: Mapping[str, Any], seconds: float
) -> str:
    """Render the evaluation page."""
    decision, texts = folder.decision, scored.texts
    tokens = int(scored.num_tokens_D.sum())
    facts: dict[str, dict[str, Any]] = {
        "Data": {
            "input": labelled.source,
            "fingerprint": labelled.fingerprint,
            "rows": scored.num_rows,
            "rows in error": scored.rows_in_error,
            "tokens": tokens,
        },
        "Time": {
            "seconds": seconds,
            "rows per second": scored.num_rows / seconds,
            "tokens per second": tokens / seconds,
        },
        "Promises": _promises(folder.guarantees),
        "Model": {"weights_hash": folder.weights_hash, **asdict(decision), **asdict(folder.windows)},
    }
    data = ReportData(
        title=f"{folder.path.name} on {labelled.source}",
        decision=decision,
        targets=scored.targets,
        scores_DL=scored.scores_DL,
        decisions=scored.decide(decision),
        metrics=metrics,
        num_tokens_D=scored.num_tokens_D,
        name_of=lambda row: labelled.name_of(int(scored.row_D[row])),
        text_of=None if texts is None else lambda row: str(texts[row]),
        facts={name: values for name, values in facts.items() if values},
    )
    return render(data)


def _promises(guarantees: Mapping[str, Any]) -> dict[str, str]:
    """Return what is promised of each label's threshold, in words."""
    if not guarantees:
        return {}
    name = guarantees["objective"]
    whose = "all labels together" if guarantees["joint"] else "each label"
    found = {name: f"with confidence {guarantees['confidence']:g} for {whose}"}
    for label, one in guarantees["labels"].items():
        if one["holds"]:
            found[label] = f"at least {one['bound']:.4f} ({one['right']} of {one['documents']} valid documents)"
        else:
            found[label] = f"no threshold: {LabelGuarantee(**one).shortage}"
    return found


def _number(value: Any) -> str:
    return "undefined" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
