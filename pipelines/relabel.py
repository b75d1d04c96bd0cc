"""New labels for scored Parquet from the scores that it holds: no model, no texts.

Files are rewritten under their names, several at a time; a folder that was begun with the same thresholds is gone on
with. Knows no torch, no ray.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import DataError, OutputError, SettingsError
from pipelines.fields import parse
from pipelines.labels import decide, resolve_thresholds, thresholds_by_label
from pipelines.locations import commit_json, filesystem_of, list_names, read_json, retried, shown
from pipelines.outputs import MANIFEST, PART_METADATA, SUMMARY, commit_unit, make_folder, read_metadata, read_parts
from pipelines.settings import DecisionSettings
from pipelines.shards import list_files
from pipelines.summary import add_parts, empty_part, finish_summary, summarize
from pipelines.tables import DECISION_METADATA, PREFIX_METADATA, decided_columns, decision_metadata

THREADS = 8
Thresholds = float | tuple[float, ...] | Mapping[str, float]


def relabel(
    scored: str, output: str, thresholds: Thresholds, *, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Decide anew for every row of a scored folder, and write the same files with other labels; their summary.

    Raises DataError for files that are no scored ones, and SettingsError for thresholds that do not fit their labels.
    """
    files = list_files(scored)
    old, prefix = _read_decision(scored, files[0])
    decision = resolve_thresholds(thresholds, old)
    names = [posixpath.basename(path) for path in files]
    if len(set(names)) < len(names):
        raise DataError(f"{shown(scored)} holds files of the same name in several folders; relabel them one by one")
    left = _open_output(scored, output, decision, names)

    def work(path: str) -> None:
        _relabel_file(scored, path, output, decision, prefix)

    todo = [path for path in files if posixpath.basename(path) in left]
    with ThreadPoolExecutor(THREADS) as pool:
        for number, _ in enumerate(pool.map(work, todo)):
            report(f"relabelled {number + 1:,}/{len(todo):,} files")
    summary = finish_summary(add_parts([empty_part(decision), *read_parts(output, names)]), decision)
    commit_json(output, SUMMARY, summary)
    return summary


def _open_output(scored: str, output: str, decision: DecisionSettings, names: list[str]) -> set[str]:
    """The names that are still to be written."""
    manifest = {"relabelled_from": shown(scored), "thresholds": thresholds_by_label(decision)}
    make_folder(output)
    here = list_names(output)
    if MANIFEST in here:
        if read_json(output, MANIFEST) != json.loads(json.dumps(manifest)):
            raise OutputError(f"--output {shown(output)} holds something else; give a new folder")
    elif here:
        raise OutputError(f"--output {shown(output)} is not empty; give a new folder")
    commit_json(output, MANIFEST, manifest)
    return {name for name in names if name not in here}


def _read_decision(scored: str, path: str) -> tuple[DecisionSettings, str]:
    metadata = read_metadata(scored, path)
    if DECISION_METADATA not in metadata:
        raise DataError(f"{path} is no file that `pipelines score` wrote; give its output folder")
    (decision,) = parse(json.loads(metadata[DECISION_METADATA]), DecisionSettings)
    if decision.kind not in ("binary", "multilabel"):
        raise SettingsError(f"thresholds are for kinds binary and multilabel; {shown(scored)} is {decision.kind}")
    return decision, metadata[PREFIX_METADATA].decode()


def _relabel_file(scored: str, path: str, output: str, decision: DecisionSettings, prefix: str) -> None:
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
    table = table.replace_schema_metadata({**metadata, **decision_metadata(decision)})
    part = {**json.loads(metadata[PART_METADATA]), **summarize(table, decision, prefix=prefix)}
    commit_unit(output, posixpath.basename(path), table, part)
