"""Statistics of a scoring run: counts, score histograms, and the share of each label.

The `Counts` of work units add up to the counts of a run. The footer of each output file contains the counts of its
unit, and `_summary.json` contains those of the whole run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.decisions.metrics import HISTOGRAM_BINS, count_distinct, histograms_of, tie_warning
from pipelines.settings import DecisionSettings

READ = "windows_read"
"""Output column of jobs with early exit."""
MOST_ERRORS = 20
"""Maximum number of kinds of errors in a summary. The most frequent come first."""


@dataclass(frozen=True)
class Counts:
    """Counts of one or more work units. `+` adds two of them."""

    units: int = 0
    rows_in: int = 0
    rows_filtered: int = 0
    """Rows that did not pass the filter."""
    rows_out: int = 0
    rows_in_error: int = 0
    rows_truncated: int = 0
    tokens: int = 0
    windows: int = 0
    windows_read: int = 0
    """Windows that were scored. With early exit, they are fewer than the windows of the documents."""
    errors: Mapping[str, int] = field(default_factory=dict)
    """Number of rows with each kind of error."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each stage: read, tokenize, wait, forward, write."""
    histograms: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """For each label, the number of documents by score, in 20 equal bins of [0, 1]."""
    positives: Mapping[str, int] = field(default_factory=dict)
    """Number of documents with each label."""
    values_lost: Mapping[str, int] = field(default_factory=dict)
    """By copied column: values that are null because they do not fit the column's type, or could not be read."""
    distinct: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """For each label, the number of documents and of their distinct scores (`metrics.count_distinct`), unit by unit."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{f.name: _add(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)})

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON content."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Counts:
        """Create counts from the result of `to_json`. Counts that an older version did not write are 0."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in names})


@dataclass(frozen=True)
class ScoreSummary:
    """The result of a scoring run. `_summary.json` has the same values, except output, and the state of the run."""

    output: str
    """Folder of the scored files."""
    units: int
    rows_in: int
    rows_filtered: int
    rows_out: int
    rows_in_error: int
    rows_truncated: int
    tokens: int
    windows: int
    errors: Mapping[str, int]
    seconds: Mapping[str, float]
    windows_read: int = 0
    """Windows that were scored. With early exit, they are fewer than the windows of the documents."""
    histograms: Mapping[str, Sequence[int]] = field(default_factory=dict)
    positive_rates: Mapping[str, float] = field(default_factory=dict)
    """Share of the scored documents with each label."""
    values_lost: Mapping[str, int] = field(default_factory=dict)
    """By copied column: values that are null because they do not fit the column's type, or could not be read."""
    warnings: tuple[str, ...] = ()
    """What is suspicious about the scores."""
    files_in_error: Mapping[str, str] = field(default_factory=dict)
    """The reason for each input file that could not be opened."""
    files_gone: int = 0
    """Number of input files that do not exist any more, and whose rows were kept."""
    table: str = ""
    """The table that has the rows, and its version."""
    kind: str = ""
    """Kind of the model: binary, multiclass, multilabel or regression."""
    labels: tuple[str, ...] = ()
    wall_seconds: float = 0.0
    rows_per_second: float = 0.0
    units_before: int = 0
    """Units that an earlier start of the same run had finished."""

    def __repr__(self) -> str:
        rates = ", ".join(f"{label} {rate:.1%}" for label, rate in list(self.positive_rates.items())[:5])
        lines = [
            f"ScoreSummary of {self.output}",
            f"  {self.rows_out:,} rows scored, {self.rows_in_error:,} in error, {self.rows_filtered:,} filtered out",
            f"  {self.windows:,} windows of {self.tokens:,} tokens, {self.rows_per_second:,.1f} rows/s",
        ]
        return "\n".join(
            [*lines, *([f"  {rates}"] if rates else []), *(f"  warning: {line}" for line in self.warnings)]
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of `_summary.json`. Regression has no histograms and no positive rates."""
        content = {**dataclasses.asdict(self), "labels": list(self.labels), "warnings": list(self.warnings)}
        del content["output"]
        if not self.table:
            del content["table"]
        if not self.labels:
            del content["histograms"], content["positive_rates"]
        return content

    @classmethod
    def from_json(cls, output: str, content: Mapping[str, Any]) -> ScoreSummary:
        """Create a summary from the result of `to_json`."""
        names = {f.name for f in dataclasses.fields(cls)}
        known = {name: value for name, value in content.items() if name in names}
        tuples = {name: tuple(content.get(name, ())) for name in ("labels", "warnings")}
        return cls(output, **{**known, **tuples})


def count_table(table: pa.Table, decision: DecisionSettings, *, prefix: str = "") -> Counts:
    """Count the rows of a table of output columns, as one unit."""
    error, names = table.column(prefix + "error"), table.column_names
    counts = Counts(
        units=1,
        rows_out=len(table),
        rows_in_error=len(table) - error.null_count,
        errors=_error_kinds(error),
        rows_truncated=int(np.sum(table.column(prefix + "truncated").to_numpy())),
        tokens=int(np.sum(table.column(prefix + "num_tokens").to_numpy())),
        windows=int(np.sum(table.column(prefix + "num_windows").to_numpy())),
        windows_read=int(np.sum(table.column(prefix + (READ if prefix + READ in names else "num_windows")).to_numpy())),
    )
    if decision.kind == "regression":
        return counts
    name = "predicted_labels" if decision.kind == "multilabel" else "predicted_label"
    good = table.select([prefix + "scores", prefix + name]).filter(error.is_null())
    scores_DL = np.asarray(good.column(prefix + "scores").combine_chunks().flatten()).reshape(-1, decision.num_labels)
    column = good.column(prefix + name).combine_chunks()
    values = column.flatten() if decision.kind == "multilabel" else column
    found = {item["values"]: item["counts"] for item in values.value_counts().to_pylist()}
    positives = {label: int(found.get(label, 0)) for label in decision.labels}
    return dataclasses.replace(
        counts,
        histograms=histograms_of(scores_DL, decision),
        positives=positives,
        distinct=count_distinct(scores_DL, decision),
    )


def no_counts(decision: DecisionSettings) -> Counts:
    """Return the counts of no rows, with 0 for each label."""
    return Counts(
        histograms={label: [0] * HISTOGRAM_BINS for label in decision.labels},
        positives=dict.fromkeys(decision.labels, 0),
    )


def sum_counts(decision: DecisionSettings, counts: Iterable[Counts]) -> Counts:
    """Add all counts."""
    return sum(counts, start=no_counts(decision))


def summarize(output: str, total: Counts, decision: DecisionSettings, **more: Any) -> ScoreSummary:
    """Create the summary of a run from its total counts. `more` are further fields of `ScoreSummary`."""
    scored = max(total.rows_out - total.rows_in_error, 1)
    content = total.to_json()
    positives = content.pop("positives")
    warning = tie_warning(content.pop("distinct"))
    content["warnings"] = () if warning is None else (warning,)
    commonest = sorted(total.errors.items(), key=lambda item: -item[1])[:MOST_ERRORS]
    content["errors"] = dict(commonest)
    content["seconds"] = {name: round(value, 2) for name, value in total.seconds.items()}
    content["positive_rates"] = {label: count / scored for label, count in positives.items()}
    return ScoreSummary(output, **content, kind=decision.kind, labels=decision.labels, **more)


def _error_kinds(error: pa.ChunkedArray) -> dict[str, int]:
    """Return the number of rows with each error. Details in parentheses at the end of an error are omitted."""
    kinds: dict[str, int] = {}
    for item in error.drop_null().value_counts().to_pylist():
        kind = item["values"].partition(" (")[0]
        kinds[kind] = kinds.get(kind, 0) + item["counts"]
    return kinds


def _add(left: Any, right: Any) -> Any:
    """Add two numbers, two lists element by element, or two mappings key by key."""
    if isinstance(left, Mapping):
        return {key: _add(left[key], right[key]) if key in left and key in right else {**left, **right}[key]
                for key in [*left, *(key for key in right if key not in left)]}  # fmt: skip
    if isinstance(left, (list, tuple)):
        return [_add(first, second) for first, second in zip(left, right, strict=True)]
    return left + right
