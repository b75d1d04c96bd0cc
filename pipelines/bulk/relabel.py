"""Decide new labels for scored Parquet files from the scores in them. No model and no texts are needed.

New files with the same names are written to another folder, several at a time. If that folder contains an unfinished
relabelling with the same thresholds, it is resumed.
"""

from __future__ import annotations

import json
import logging
import posixpath
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.bulk.manifest import MANIFEST
from pipelines.bulk.run_folder import (
    COUNTS_METADATA,
    SUMMARY,
    commit_unit,
    read_counts,
    read_metadata,
    read_scored_metadata,
)
from pipelines.bulk.summary import Counts, count_table, sum_counts, summarize
from pipelines.decisions.columns import (
    DECISION_METADATA,
    EARLY_EXIT_METADATA,
    GUARANTEES_METADATA,
    PREFIX_METADATA,
    decided_columns,
    decision_metadata,
)
from pipelines.decisions.labels import decide, resolve_thresholds, thresholds_by_label
from pipelines.errors import DataError, OutputError, SettingsError
from pipelines.fields import parse
from pipelines.progress import Progress
from pipelines.settings import NEVER, DecisionSettings
from pipelines.storage.listing import list_files
from pipelines.storage.locations import commit_json, filesystem_of, list_names, make_folder, read_json, retried, shown

THREADS = 8
logger = logging.getLogger(__name__)
Thresholds = float | tuple[float, ...] | Mapping[str, float]


@dataclass(frozen=True)
class RelabelSummary:
    """The result of `relabel`. `_summary.json` is that of a scored folder, without the times of the scoring."""

    output: str
    files: int
    rows: int
    rows_in_error: int
    thresholds: Mapping[str, float]
    """The new thresholds by label."""
    rows_before: Mapping[str, int]
    """Number of rows with each label, before."""
    rows_now: Mapping[str, int]
    """Number of rows with each label, now."""
    seconds: float

    @property
    def labels(self) -> list[dict[str, Any]]:
        """A row for each label: its threshold, and the rows that have it, before and now."""
        return [
            {
                "label": label,
                "threshold": "never" if self.thresholds.get(label) == NEVER else self.thresholds.get(label),
                "rows before": self.rows_before.get(label, 0),
                "rows now": count,
            }
            for label, count in self.rows_now.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the summary as `pipelines relabel --json` prints it."""
        return asdict(self)


def relabel(scored: str, output: str, thresholds: Thresholds) -> RelabelSummary:
    """Decide the labels of every row of a scored folder again, and write files with the new labels.

    Args:
        scored: Output folder of a scoring job.
        output: New folder, or the folder of the same relabelling that was interrupted.
        thresholds: One number, one per label, or by label name.

    Raises:
        DataError: The files were not written by a scoring job.
        SettingsError: The thresholds do not fit the labels.
    """
    started = time.perf_counter()
    marks = list_names(scored)
    if MANIFEST in marks and SUMMARY not in marks:
        raise DataError(f"{shown(scored)} contains an unfinished run; finish it with the command that began it")
    files = list_files(scored, also_in_tables=True)
    old, prefix, has_promise = _read_decision(scored, files[0])
    decision = resolve_thresholds(thresholds, old)
    if has_promise and decision != old:
        logger.warning(
            "a precision or recall was promised for the thresholds of %s; nothing is promised for the new ones",
            shown(scored),
        )
    names = [posixpath.basename(path) for path in files]
    if len(set(names)) < len(names):
        raise DataError(f"{shown(scored)} contains files of the same name in several folders; relabel them one by one")
    left = _open_output(scored, output, decision, names)
    todo = [path for path in files if posixpath.basename(path) in left]
    work = partial(_relabel_file, scored, output=output, decision=decision, prefix=prefix)
    with Progress(logger, "relabelled", total=len(todo), unit="files") as progress, ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(work, todo):
            progress.advance()
    logger.info("relabelled %s files -> %s", f"{len(todo):,}", shown(output))
    before = sum_counts(decision, _counts_of(scored, files))
    now = replace(sum_counts(decision, read_counts(output, names)), seconds={})
    seconds = round(time.perf_counter() - started, 2)
    commit_json(output, SUMMARY, summarize(output, now, decision, wall_seconds=seconds).to_json())
    return RelabelSummary(
        shown(output),
        files=len(files),
        rows=now.rows_out,
        rows_in_error=now.rows_in_error,
        thresholds=thresholds_by_label(decision),
        rows_before=before.positives,
        rows_now=now.positives,
        seconds=seconds,
    )


def _counts_of(scored: str, paths: list[str]) -> list[Counts]:
    """Read the counts in the footers of scored files."""
    filesystem, _ = filesystem_of(scored)
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda path: read_metadata(filesystem, path)[COUNTS_METADATA], paths)
        return [Counts.from_json(json.loads(content)) for content in found]


def _open_output(scored: str, output: str, decision: DecisionSettings, names: list[str]) -> set[str]:
    """Begin or resume the output folder, and return the names of the files that are not written yet."""
    manifest = {"relabelled_from": shown(scored), "thresholds": thresholds_by_label(decision)}
    make_folder(output)
    here = list_names(output)
    if MANIFEST in here:
        if read_json(output, MANIFEST) != json.loads(json.dumps(manifest)):
            raise OutputError(f"--output {shown(output)} contains another run; give a new folder")
    elif any(not name.startswith("._") for name in here):  # these are files that a killed process did not finish
        raise OutputError(f"--output {shown(output)} is not empty; give a new folder")
    commit_json(output, MANIFEST, manifest)
    return {name for name in names if name not in here}


def _read_decision(scored: str, path: str) -> tuple[DecisionSettings, str, bool]:
    """Return the decision of a scored file, its prefix, and whether something was promised of its thresholds."""
    metadata = read_scored_metadata(filesystem_of(scored)[0], path)
    (decision,) = parse(json.loads(metadata[DECISION_METADATA]), DecisionSettings)
    if EARLY_EXIT_METADATA in metadata:
        raise SettingsError(
            f"{shown(scored)} was scored with early_exit={metadata[EARLY_EXIT_METADATA].decode()}: its texts were read "
            "until their labels were sure for the thresholds of then; score again with other thresholds"
        )
    if decision.kind not in ("binary", "multilabel"):
        raise SettingsError(f"thresholds are for kinds binary and multilabel; {shown(scored)} is {decision.kind}")
    return decision, metadata[PREFIX_METADATA].decode(), GUARANTEES_METADATA in metadata


def _relabel_file(scored: str, path: str, *, output: str, decision: DecisionSettings, prefix: str) -> None:
    filesystem, _ = filesystem_of(scored)
    table = pq.read_table(pa.BufferReader(retried(lambda: filesystem.cat_file(path))))
    metadata = dict(table.schema.metadata)
    bad_D = np.asarray(table.column(prefix + "error").is_valid())
    flat = table.column(prefix + "scores").combine_chunks()
    scores_DL = np.asarray(flat.fill_null([0.0] * len(decision.labels)).flatten(), np.float32)
    decisions = decide(scores_DL.reshape(-1, len(decision.labels)), decision)
    for field, column in decided_columns(decisions, decision, bad_D, prefix=prefix):
        place = table.schema.get_field_index(field.name)
        table = table.set_column(place, field, column)
    if metadata[DECISION_METADATA] != decision_metadata(decision)[DECISION_METADATA]:
        metadata.pop(GUARANTEES_METADATA, None)
    table = table.replace_schema_metadata({**metadata, **decision_metadata(decision)})
    before = Counts.from_json(json.loads(metadata[COUNTS_METADATA]))
    counts = replace(
        count_table(table, decision, prefix=prefix),
        rows_in=before.rows_in,
        rows_filtered=before.rows_filtered,
        seconds=before.seconds,
    )
    commit_unit(output, posixpath.basename(path), table, counts, replaces=True)
