"""Score labelled data in this process, and evaluate a model folder.

Shapes: D documents, L labels.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.decisions.calibration import WindowLogits
from pipelines.decisions.guarantees import LabelGuarantee
from pipelines.decisions.labels import Decisions, decide, encode_labels
from pipelines.decisions.metrics import (
    count_distinct,
    evaluate,
    tie_warning,
)
from pipelines.errors import DataError
from pipelines.evaluation.curves import label_rows
from pipelines.evaluation.html import shortened
from pipelines.evaluation.report import ReportData, render
from pipelines.evaluation.summary import sentence, uselessness
from pipelines.model.scorer import DocumentScores, Scorer
from pipelines.model_folder import ModelFolder, read_model_folder
from pipelines.printing import table_lines
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
    windows: WindowLogits
    """Logits of the windows of the scored rows."""
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
    in_words: str = ""
    """What the decisions are worth, as a sentence."""
    labels: Sequence[Mapping[str, Any]] = ()
    """The numbers of each label (`curves.label_rows`), the most frequent first."""

    def __repr__(self) -> str:
        lines = [f"EvaluationResult of {self.model}: {self.rows:,} rows, {self.rows_in_error:,} in error"]
        lines += [f"  {name:<12} {shown_number(value)}" for name, value in self.metrics.items() if name != "per_label"]
        return "\n".join([*lines, *(f"  {line}" for line in table_lines(self.labels))])

    def to_json(self) -> dict[str, Any]:
        """Return the result as `pipelines evaluate --json` prints it."""
        return {"rows": self.rows, "rows_in_error": self.rows_in_error, **self.metrics}


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
    targets = labelled.targets[good_D]
    scores_DL = np.concatenate([scores.scores_DL for scores in scored])[good_D]
    warning = tie_warning(count_distinct(scores_DL, folder.decision))
    if warning is not None:
        logger.warning("%s", warning)
    return LabelledScores(
        scores_DL,
        np.concatenate(votes)[good_D] if votes else None,
        np.concatenate([scores.num_tokens_D for scores in scored])[good_D],
        np.flatnonzero(good_D),
        targets,
        num_rows=len(good_D),
        windows=_window_logits(scored, good_D, targets),
        texts=pa.concat_tables(kept).column(0).filter(pa.array(good_D)) if kept else None,
    )


def _window_logits(
    scored: list[DocumentScores], good_D: NDArray[np.bool_], targets: NDArray[np.generic]
) -> WindowLogits:
    """Return the window logits of the documents without an error."""
    counts_D = np.concatenate([scores.windows.num_windows_D for scores in scored])
    logits_WL = np.concatenate([scores.window_logits_WL for scores in scored])
    offsets = np.concatenate([[0], np.cumsum(counts_D[good_D])])
    return WindowLogits(logits_WL[np.repeat(good_D, counts_D)], offsets, targets)


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
    folder = open_for(model, data)
    labelled = labelled_input(source, data, folder.decision)
    scored = score_labelled(folder, labelled, data, compute, keep_texts=bool(report and report_texts))
    metrics = evaluate(scored.targets, scored.scores_DL, scored.decide(folder.decision), folder.decision)
    if report:
        page = _page(folder, labelled, scored, metrics=metrics, seconds=time.monotonic() - started)
        target, name = posixpath.split(absolute(report))
        make_folder(target)
        commit_bytes(target, name, page.encode())
        logger.info("the evaluation page is %s", report)
    decisions = scored.decide(folder.decision)
    if useless := uselessness(scored.targets, decisions, folder.decision):
        logger.warning("the classifier is useless on this data: %s", useless)
    return EvaluationResult(
        shown(model),
        scored.num_rows,
        scored.rows_in_error,
        metrics,
        report,
        sentence(scored.targets, decisions, folder.decision, metrics),
        label_rows(scored.targets, scored.scores_DL, decisions, folder.decision, metrics),
    )


def open_for(model: str, data: DataSettings) -> ModelFolder:
    """Read a model folder for labelled data. Raises DataError if it is for pairs and the data is not, or vice versa."""
    folder = read_model_folder(model)
    folder.check_texts(are_pairs=data.text_pair_column is not None)
    return folder


def labelled_input(source: str | pa.Table, data: DataSettings, decision: DecisionSettings) -> LabelledInput:
    """Open labelled files, or a labelled table in memory."""
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
        "Promises": promises_of(folder.guarantees),
        "Model": {"weights_hash": folder.weights_hash, **asdict(decision), **asdict(folder.windows)},
    }
    data = ReportData(
        title=f"{folder.path.name} on {shortened(labelled.source)}",
        cost=f"Reading and scoring took {seconds:.3g} s: {scored.num_rows / seconds:.3g} documents per second.",
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


def promises_of(guarantees: Mapping[str, Any]) -> dict[str, str]:
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


def shown_number(value: Any) -> str:
    """Return a metric as it is shown to people."""
    return "undefined" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
