"""Score labelled Parquet in this process, to evaluate a model folder or tune its thresholds.

Knows files and `Scorer`; no ray.

Shapes: D documents, L labels.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.errors import DataError, ModelFolderError, SettingsError
from pipelines.evaluation import evaluate, tune_thresholds
from pipelines.labels import decide, encode_labels, resolve_thresholds
from pipelines.locations import absolute, commit_bytes, shown
from pipelines.model_folder import ModelFolder, read_model_folder, write_pipeline_file
from pipelines.outputs import make_folder
from pipelines.reading import read_unit, together
from pipelines.report import ReportData, render
from pipelines.scoring import Scorer
from pipelines.settings import ComputeSettings, DataSettings
from pipelines.shards import InputFile, fingerprint, plan_units, read_footers
from pipelines.summary import histograms_of
from pipelines.tables import check_label_column, check_text_column

Report = Callable[[str], None]


@dataclass(frozen=True)
class ScoredLabels:
    """Scores beside targets, of the rows that could be scored."""

    scores_DL: NDArray[np.float32]
    votes_DL: NDArray[np.int64] | None
    num_tokens_D: NDArray[np.int64]
    row_D: NDArray[np.int64]
    """Number of each in the input, counted over its files in their order."""
    targets: NDArray[np.generic]
    rows: int
    rows_in_error: int
    files: list[InputFile]
    """The input's."""
    texts: pa.ChunkedArray | None = None
    """Of the rows that could be scored, where they were to be kept."""

    def name_of(self, row: int) -> str:
        """File and row of a scored document, for people."""
        number = int(self.row_D[row])
        for file in self.files:
            if number < file.num_rows:
                return f"{posixpath.basename(file.url)}, row {number}"
            number -= file.num_rows
        raise IndexError(row)


def score_labelled(
    model: str, location: str, data: DataSettings, compute: ComputeSettings, *, keep_texts: bool = False, report: Report
) -> tuple[ModelFolder, ScoredLabels]:
    """Score every labelled row; all labels are checked before the first is scored."""
    folder = read_model_folder(model)
    folder.check_texts(are_pairs=data.text_pair_column is not None)
    files = read_footers(location, data.text_column)
    texts = [name for name in (data.text_column, data.text_pair_column) if name is not None]
    for file in files:
        for name in texts:
            check_text_column(file.schema, name, where=file.url)
        check_label_column(file.schema, data.label_column, where=file.url)
    units = plan_units(files, limit=data.limit)
    if not len(units):
        raise DataError(f"{location} has no rows")
    schema = together(files, [data.label_column])
    targets = [
        encode_labels(read_unit(location, unit, schema).column(data.label_column), folder.decision) for unit in units
    ]
    scorer = Scorer.load(folder, compute=compute)
    parts, kept = [], []
    for number, unit in enumerate(units):
        table = read_unit(location, unit, together(files, texts))
        parts.append(scorer.score_documents(scorer.tokenizer.documents(table, *texts)))
        if keep_texts:
            kept.append(table.select([data.text_column]))
        report(f"scored {number + 1}/{len(units)} units")
    good_D = np.asarray([error is None for part in parts for error in part.errors])
    if not good_D.any():
        raise DataError(f"{location} has no row with a text that can be scored")
    votes = None if parts[0].votes_DL is None else np.concatenate([part.votes_DL for part in parts])[good_D]
    scores_DL = np.concatenate([part.scores_DL for part in parts])[good_D]
    tokens_D = np.concatenate([part.num_tokens_D for part in parts])[good_D]
    scored = ScoredLabels(
        scores_DL, votes, tokens_D, np.flatnonzero(good_D), np.concatenate(targets)[good_D],
        rows=len(good_D), rows_in_error=int((~good_D).sum()), files=files,
        texts=pa.concat_tables(kept).column(0).filter(pa.array(good_D)) if kept else None,
    )  # fmt: skip
    return folder, scored


def write_evaluation(
    folder: ModelFolder, scored: ScoredLabels, metrics: Mapping[str, Any], location: str, out: str, seconds: float
) -> None:
    """The evaluation page of scored labels, as a file at a path or URL."""
    decision = folder.decision
    decisions = decide(scored.scores_DL, decision, scored.votes_DL)
    texts = scored.texts
    tokens = int(scored.num_tokens_D.sum())
    facts: dict[str, dict[str, Any]] = {
        "Data": {
            "input": shown(location),
            "fingerprint": fingerprint((file.url, file.size, file.version) for file in scored.files),
            "rows": scored.rows,
            "rows in error": scored.rows_in_error,
            "tokens": tokens,
        },
        "Time": {"seconds": seconds, "rows per second": scored.rows / seconds, "tokens per second": tokens / seconds},
        "Model": {"weights_hash": folder.weights_hash, **asdict(decision), **asdict(folder.windows)},
    }
    data = ReportData(
        f"{folder.path.name} on {shown(location)}", decision, scored.targets, scored.scores_DL, decisions, metrics,
        scored.num_tokens_D, scored.name_of, None if texts is None else lambda row: str(texts[row]), facts=facts,
    )  # fmt: skip
    target, name = posixpath.split(absolute(out))
    make_folder(target)
    commit_bytes(target, name, render(data).encode())


def tune_folder(
    model: str, location: str, data: DataSettings, compute: ComputeSettings, objective: str, *, report: Report
) -> dict[str, Any]:
    """Tune thresholds for the objective and replace the folder's pipeline.json; what changed."""
    if "://" in model:
        raise ModelFolderError(f"{model} is a URL; tune a local folder and upload it")
    if read_model_folder(model).decision.kind not in ("binary", "multilabel"):
        raise SettingsError("thresholds are for kinds binary and multilabel; this folder has neither")
    folder, scored = score_labelled(model, location, data, compute, report=report)
    tuned = tune_thresholds(scored.targets, scored.scores_DL, folder.decision, objective)
    decision = folder.decision
    if len(tuned.untuned) < len(tuned.thresholds):
        decision = resolve_thresholds(tuned.thresholds, decision)
    metrics = evaluate(scored.targets, scored.scores_DL, decide(scored.scores_DL, decision), decision)
    histograms = histograms_of(scored.scores_DL, decision)
    write_pipeline_file(replace(folder, decision=decision, metrics=metrics, histograms=histograms))
    for line in tuned.remarks(objective):
        report(line)
    return {
        "rows_in_error": scored.rows_in_error,
        "objective": objective,
        "thresholds": list(tuned.thresholds),
        "thresholds_before": folder.decision.thresholds,
        "untuned": list(tuned.untuned),
        "missed": list(tuned.missed),
        "pooled": list(tuned.pooled),
        **metrics,
    }
