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

from pipelines.bulk.manifest import MANIFEST, RUN_METADATA
from pipelines.bulk.run_folder import (
    COUNTS_METADATA,
    SUMMARY,
    read_counts,
    read_metadata,
    read_scored_metadata,
    with_counts,
)
from pipelines.bulk.summary import Counts, count_table, sum_counts, summarize
from pipelines.decisions.columns import (
    DECISION_METADATA,
    EARLY_EXIT_METADATA,
    GUARANTEES_METADATA,
    PREFIX_METADATA,
    SETTINGS_METADATA,
    WEIGHTS_METADATA,
    decided_columns,
    decision_metadata,
)
from pipelines.decisions.labels import decide, resolve_thresholds, thresholds_by_label
from pipelines.errors import DataError, OutputError, SettingsError
from pipelines.fields import parse
from pipelines.model_folder import ModelFolder, read_model_folder
from pipelines.progress import Progress
from pipelines.settings import NEVER, DecisionSettings
from pipelines.storage.listing import list_files
from pipelines.storage.locations import (
    commit_json,
    commit_table,
    filesystem_of,
    list_names,
    make_folder,
    read_json,
    retried,
    shown,
)

THREADS = 8
HASHED_METADATA = b"pipelines.hashed_thresholds"
"""Metadata of a relabelled file: the thresholds that its hash of the settings includes."""
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


@dataclass(frozen=True)
class NewLabels:
    """How the rows of a scored folder get their labels, and the metadata of the files that changes with it."""

    decision: DecisionSettings
    prefix: str
    metadata: Mapping[bytes, bytes]
    """Metadata to add."""
    keeps_promise: bool
    """Whether what the files promise of their thresholds still holds."""


def relabel(
    scored: str, output: str, thresholds: Thresholds | None = None, *, model: str | None = None
) -> RelabelSummary:
    """Decide the labels of every row of a scored folder again, and write files with the new labels.

    Args:
        scored: Output folder of a scoring job.
        output: New folder, or the folder of the same relabelling that was interrupted.
        thresholds: One number, one per label, or by label name: labels that are not named keep their thresholds.
        model: Instead of thresholds: the model folder that scored the rows. Its thresholds of now, and what is promised
            of them, are taken.

    Raises:
        DataError: The files were not written by a scoring job.
        SettingsError: The thresholds do not fit the labels, or the rows were scored by another model.
    """
    started = time.perf_counter()
    marks = list_names(scored)
    if MANIFEST in marks and SUMMARY not in marks:
        raise DataError(f"{shown(scored)} contains an unfinished run; finish it with the command that began it")
    files = list_files(scored, also_in_tables=True)
    new = _new_labels(scored, files[0], thresholds, model)
    decision = new.decision
    names = [posixpath.basename(path) for path in files]
    if len(set(names)) < len(names):
        raise DataError(f"{shown(scored)} contains files of the same name in several folders; relabel them one by one")
    left = _open_output(scored, output, new, names)
    todo = [path for path in files if posixpath.basename(path) in left]
    work = partial(_relabel_file, scored, output=output, new=new)
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


def _open_output(scored: str, output: str, new: NewLabels, names: list[str]) -> set[str]:
    """Begin or resume the output folder, and return the names of the files that are not written yet."""
    manifest = {"relabelled_from": shown(scored), "thresholds": thresholds_by_label(new.decision)}
    if SETTINGS_METADATA in new.metadata:  # the labels are those of a model folder, with its promises
        manifest["metadata"] = {name.decode(): content.decode() for name, content in new.metadata.items()}
    make_folder(output)
    here = list_names(output)
    if MANIFEST in here:
        if read_json(output, MANIFEST) != json.loads(json.dumps(manifest)):
            raise OutputError(f"--output {shown(output)} contains another run; give a new folder")
    elif any(not name.startswith("._") for name in here):  # these are files that a killed process did not finish
        raise OutputError(f"--output {shown(output)} is not empty; give a new folder")
    commit_json(output, MANIFEST, manifest)
    return {name for name in names if name not in here}


def _new_labels(scored: str, path: str, thresholds: Thresholds | None, model: str | None) -> NewLabels:
    """Return how rows like those of a scored file get their labels."""
    if (thresholds is None) == (model is None):
        raise SettingsError("relabel takes thresholds, or the model folder that has them: give one of the two")
    metadata = read_scored_metadata(filesystem_of(scored)[0], path)
    (decision,) = parse(json.loads(metadata[DECISION_METADATA]), DecisionSettings)
    if EARLY_EXIT_METADATA in metadata:
        raise SettingsError(
            f"{shown(scored)} was scored with early_exit={metadata[EARLY_EXIT_METADATA].decode()}: its texts were read "
            "until their labels were sure for the thresholds of then; score again with other thresholds"
        )
    if decision.kind not in ("binary", "multilabel"):
        raise SettingsError(f"thresholds are for kinds binary and multilabel; {shown(scored)} is {decision.kind}")
    prefix = metadata[PREFIX_METADATA].decode()
    hashed = metadata.get(HASHED_METADATA, json.dumps(decision.thresholds).encode())
    if model is not None:
        folder = _same_model(scored, metadata, json.loads(hashed), model)
        return NewLabels(folder.decision, prefix, promised_metadata(folder), keeps_promise=False)
    new = resolve_thresholds(thresholds, decision)
    if GUARANTEES_METADATA in metadata and new != decision:
        logger.warning(
            "a precision or recall was promised for the thresholds of %s; nothing is promised for the new ones",
            shown(scored),
        )
    return NewLabels(new, prefix, {HASHED_METADATA: hashed}, keeps_promise=new == decision)


def _same_model(scored: str, metadata: Mapping[bytes, bytes], hashed: Any, model: str) -> ModelFolder:
    """Open a model folder, and check that it would give a scored file's scores.

    Args:
        scored: Scored folder.
        metadata: Metadata of its files.
        hashed: Thresholds that the hash of the settings in this metadata includes.
        model: Model folder.
    """
    folder = read_model_folder(model)
    if folder.decision.thresholds is None and folder.decision.merge == "vote":
        raise SettingsError(f"{shown(model)} decides by the votes of windows, which scored files do not have")
    thresholds = tuple(hashed) if isinstance(hashed, list) else hashed
    then = replace(folder, decision=replace(folder.decision, thresholds=thresholds))
    for what, now, before in (
        ("weights", then.weights_hash, metadata[WEIGHTS_METADATA]),
        ("calibration, windows or labels", then.settings_hash, metadata[SETTINGS_METADATA]),
    ):
        if now.encode() != before:
            raise SettingsError(
                f"{shown(scored)} was scored with other {what} than {shown(model)} has now, and so with other scores: "
                "score again"
            )
    return folder


def promised_metadata(folder: ModelFolder) -> dict[bytes, bytes]:
    """Return the metadata of rows with the labels of a model folder: the hash of its settings, and its promises."""
    promises = {GUARANTEES_METADATA: json.dumps(dict(folder.guarantees)).encode()} if folder.guarantees else {}
    hashed = json.dumps(folder.decision.thresholds).encode()
    return {SETTINGS_METADATA: folder.settings_hash.encode(), HASHED_METADATA: hashed, **promises}


def _relabel_file(scored: str, path: str, *, output: str, new: NewLabels) -> None:
    decision, prefix = new.decision, new.prefix
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
    if not new.keeps_promise:
        metadata.pop(GUARANTEES_METADATA, None)
    metadata.pop(RUN_METADATA, None)  # the new files are not of the run
    table = table.replace_schema_metadata({**metadata, **decision_metadata(decision), **new.metadata})
    before = Counts.from_json(json.loads(metadata[COUNTS_METADATA]))
    counts = replace(
        count_table(table, decision, prefix=prefix),
        rows_in=before.rows_in,
        rows_filtered=before.rows_filtered,
        seconds=before.seconds,
    )
    commit_table(output, posixpath.basename(path), with_counts(table, counts))
