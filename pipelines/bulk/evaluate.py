"""Metrics of a scored folder whose files have a label column. No model is needed.

Shapes: D documents, L labels.
"""

from __future__ import annotations

import json
import logging
import posixpath
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.bulk.manifest import MANIFEST
from pipelines.bulk.run_folder import SUMMARY, read_scored_metadata
from pipelines.decisions.columns import COLUMNS_METADATA, DECISION_METADATA, EARLY_EXIT_METADATA, PREFIX_METADATA
from pipelines.decisions.labels import Decisions, encode_labels
from pipelines.decisions.metrics import evaluate
from pipelines.errors import DataError
from pipelines.evaluation.curves import label_rows
from pipelines.evaluation.html import shortened
from pipelines.evaluation.labelled import EvaluationResult
from pipelines.evaluation.report import ReportData, render
from pipelines.evaluation.summary import sentence, uselessness
from pipelines.fields import parse
from pipelines.settings import DataSettings, DecisionSettings
from pipelines.storage.labels import check_label_columns, label_values
from pipelines.storage.listing import list_files
from pipelines.storage.locations import (
    absolute,
    commit_bytes,
    filesystem_of,
    from_parquet,
    list_names,
    make_folder,
    shown,
)

THREADS = 8
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredRows:
    """The rows of a scored folder that have scores."""

    decision: DecisionSettings
    targets: NDArray[np.generic]
    scores_DL: NDArray[np.float32]
    decisions: Decisions
    num_tokens_D: NDArray[np.int64]
    source_D: pa.ChunkedArray
    """File of each row, in the input of the scoring job."""
    row_D: NDArray[np.int64]
    """Number of each row in its file."""
    num_errors: int
    """Number of rows without scores."""


def evaluate_scored(location: str, data: DataSettings, *, report: str | None = None) -> EvaluationResult:
    """Compute the metrics of the labels in a scored folder.

    Args:
        location: Output folder of `pipelines score` or `pipelines relabel`.
        data: The label columns, and how many rows of the folder are used.
        report: Where to write the evaluation page.

    Raises:
        DataError: The files were not written by a scoring job, or have no such label column.
    """
    rows = read_scored(location, data)
    decision, decisions, targets = rows.decision, rows.decisions, rows.targets
    metrics = evaluate(targets, rows.scores_DL, decisions, decision)
    if useless := uselessness(targets, decisions, decision):
        logger.warning("the labels are useless on this data: %s", useless)
    if report is not None:
        page = ReportData(
            title=f"Scored rows of {shortened(shown(location))}",
            decision=decision,
            targets=targets,
            scores_DL=rows.scores_DL,
            decisions=decisions,
            metrics=metrics,
            num_tokens_D=rows.num_tokens_D,
            name_of=lambda row: f"{posixpath.basename(str(rows.source_D[row]))}, row {rows.row_D[row]}",
            facts={"Data": {"scored folder": shown(location), "rows": len(targets), "rows in error": rows.num_errors}},
        )
        folder, name = posixpath.split(absolute(report))
        make_folder(folder)
        commit_bytes(folder, name, render(page).encode())
        logger.info("the evaluation page is %s", report)
    return EvaluationResult(
        shown(location),
        len(targets) + rows.num_errors,
        rows.num_errors,
        metrics,
        report,
        sentence(targets, decisions, decision, metrics),
        label_rows(targets, rows.scores_DL, decisions, decision, metrics),
    )


def with_columns_of_scored(location: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the label columns of the model's training, if they name none.

    Args:
        location: Output folder of `pipelines score` or `pipelines relabel`.
        values: Settings by name.
    """
    if "label_column" in values or "label_columns" in values:
        return dict(values)
    filesystem, _ = filesystem_of(location)
    first = list_files(location, also_in_tables=True)[0]
    columns = json.loads(read_scored_metadata(filesystem, first).get(COLUMNS_METADATA, b"{}"))
    return {**values, **{name: columns[name] for name in ("label_column", "label_columns") if columns.get(name)}}


def read_scored(location: str, data: DataSettings) -> ScoredRows:
    """Read labels, scores and predictions of a scored folder.

    Raises:
        DataError: The files were not written by a scoring job, or have no such label column, or no row has scores.
    """
    marks = list_names(location)
    if MANIFEST in marks and SUMMARY not in marks:
        raise DataError(f"{shown(location)} contains an unfinished run; finish it with the command that began it")
    files = list_files(location, also_in_tables=True)
    filesystem, _ = filesystem_of(location)

    decision, prefix = _decision_of(read_scored_metadata(filesystem, files[0]))
    names = from_parquet(filesystem, files[0], lambda file: file.schema_arrow.names)
    check_label_columns(data, decision)
    labels = list(data.target_columns)
    for name in labels:
        if name not in names:
            raise DataError(
                f"{shown(location)} has no label column {name!r}; its columns are {', '.join(names)}. "
                f"Name the label column with --label-column, or score again with --keep {name}"
            )
    of_kinds = {"multilabel": "predicted_labels", "regression": "predicted_value"}
    predicted = of_kinds.get(decision.kind, "predicted_label")
    outputs = [prefix + name for name in ("source_file", "source_row", "scores", "num_tokens", "error", predicted)]
    columns = [*dict.fromkeys([*labels, *outputs])]
    with ThreadPoolExecutor(THREADS) as pool:
        tables = pool.map(lambda path: from_parquet(filesystem, path, lambda file: file.read(columns)), files)
        table = pa.concat_tables(tables, promote_options="permissive")
    table = table if data.limit is None else table.slice(0, data.limit)
    good = table.filter(pc.is_null(table.column(prefix + "error")))
    if not len(good):
        raise DataError(f"no row of {shown(location)} has scores")
    flat = good.column(prefix + "scores").combine_chunks().flatten()
    return ScoredRows(
        decision=decision,
        targets=encode_labels(label_values(good, data), decision),
        scores_DL=np.asarray(flat, np.float32).reshape(len(good), -1),
        decisions=_decisions_of(good.column(prefix + predicted), decision),
        num_tokens_D=good.column(prefix + "num_tokens").to_numpy().astype(np.int64),
        source_D=good.column(prefix + "source_file"),
        row_D=good.column(prefix + "source_row").to_numpy(),
        num_errors=len(table) - len(good),
    )


def _decision_of(metadata: dict[bytes, bytes]) -> tuple[DecisionSettings, str]:
    """Return how the labels of a scored file were decided, and the prefix of its output columns."""
    if EARLY_EXIT_METADATA in metadata:
        early_exit = metadata[EARLY_EXIT_METADATA].decode()
        logger.warning(
            "the rows were scored with early_exit=%s: their labels are those of a full read%s, but their scores are "
            "those of the windows read, and so are areas and calibration",
            early_exit,
            "" if early_exit == "exact" else ", but for the share that tune --early-exit allows",
        )
    (decision,) = parse(json.loads(metadata[DECISION_METADATA]), DecisionSettings)
    return decision, metadata[PREFIX_METADATA].decode()


def _decisions_of(column: pa.ChunkedArray, decision: DecisionSettings) -> Decisions:
    """Return the decisions that a prediction column contains."""
    if decision.kind == "regression":
        return Decisions(value_D=column.to_numpy().astype(np.float32))
    names = pa.array(decision.labels, pa.string())
    if decision.kind == "multilabel":
        lists: Any = column.combine_chunks()
        positive_DL = np.zeros((len(lists), len(names)), bool)
        rows = np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy())
        positive_DL[rows, pc.index_in(lists.flatten(), value_set=names).to_numpy()] = True
        return Decisions(positive_DL=positive_DL)
    return Decisions(label_D=pc.index_in(column, value_set=names).fill_null(-1).to_numpy().astype(np.int64))
