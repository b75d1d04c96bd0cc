"""All settings of the package except the server's: name, type, default, limits and help text, in one place.

The same frozen dataclasses are filled from Python, from a YAML file, from `--set key=value` and from a model folder.
Field names are unique over the groups of one command: one flat mapping can contain all its settings. `parse` splits it
into groups, and suggests the closest name for an unknown one. The string below a field is its help text.

Imports neither torch nor Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.errors import SettingsError
from pipelines.fields import check_range, check_types, parse_range

Kind = Literal["binary", "multiclass", "multilabel", "regression"]
Merge = Literal["mean", "vote", "max"]
CalibrationMethod = Literal["none", "temperature", "per_label"]
EarlyExit = Literal["off", "exact", "certified"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
NEVER = 2.0
"""Threshold of a label that is never assigned, because no threshold keeps what was promised for it."""


@dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """How long texts are split into windows."""

    max_length: int | None = None
    """Tokens per window, including special tokens. Default: 512, or the model's limit if that is lower."""
    sliding_window: bool = True
    """Split long texts into windows. If false, truncate them to max_length and mark them as truncated."""
    stride: float | int = 0.8
    """Distance between window starts: a fraction of max_length (float) or a number of tokens (int)."""
    window_plan: Literal["exact", "simpletransformers"] = "exact"
    (
        "exact stops at the first window that reaches the end of the text. "
        "simpletransformers also adds the shorter windows that start after it, as Simple Transformers does."
    )
    window_model_type: str | None = None
    """Model type that sets how many special tokens window_plan=simpletransformers reserves. Default: the model's."""
    dense_windows: bool = False
    """Allow a stride below 1/16 of a window's text tokens. Such a stride multiplies the cost."""
    max_windows: int | None = None
    """Score at most this many windows per document. A document with more windows is marked as truncated."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "max_length", self.max_length, low=3)
        check_range(self, "max_windows", self.max_windows, low=1)
        check_range(self, "stride", self.stride, above=0)
        if isinstance(self.stride, float) and self.stride > 1:
            raise SettingsError(
                f"stride={self.stride} is a float above 1.0: a float is a fraction of max_length; "
                f"write {int(self.stride)} for that many tokens"
            )


@dataclass(frozen=True, kw_only=True)
class DecisionSettings:
    """What the model predicts, and how window scores become one decision per document."""

    kind: Kind = "binary"
    """Kind of task: binary, multiclass, multilabel or regression."""
    labels: tuple[str, ...] = ()
    """Label names in the order of the logits. For binary, the last one is the positive label."""
    merge: Merge = "mean"
    """How window scores become a document score: mean or max of the probabilities, or vote (binary, multiclass)."""
    tie_value: int = 1
    """Label id that wins a vote if the two highest vote counts are equal."""
    thresholds: float | tuple[float, ...] | None = None
    """Lowest score at which a label is assigned: one number, or one per label (binary: only the positive label)."""
    abstain_below: float | None = None
    """multiclass: assign no label if the best score is below this value."""

    def __post_init__(self) -> None:
        check_types(self)
        check_decision(self)

    def __str__(self) -> str:
        names = f"{self.kind}{': ' if self.labels else ''}{', '.join(self.labels)}"
        return names if self.thresholds is None else f"{names}; thresholds {self.thresholds}"

    @property
    def num_labels(self) -> int:
        """Number of logits: one per label, or 1 for regression."""
        return 1 if self.kind == "regression" else len(self.labels)


@dataclass(frozen=True)
class Calibration:
    """How logits become probabilities: of logit / temperature * scale + bias, softmax (multilabel: sigmoid)."""

    temperature: float = 1.0
    """Divides all logits."""
    scales: tuple[float, ...] = ()
    """One factor per label. Empty means 1 for all labels."""
    biases: tuple[float, ...] = ()
    """One number per label. Empty means 0 for all labels."""

    def __post_init__(self) -> None:
        check_types(self)
        for scale in (self.temperature, *self.scales):
            check_range(self, "temperature or scale", scale, above=0)
        for bias in self.biases:
            check_range(self, "bias", bias)
        if len(self.scales) != len(self.biases):
            raise SettingsError(f"there are {len(self.scales)} scales and {len(self.biases)} biases")


UNCALIBRATED = Calibration()


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """How the forward pass runs. With float32, these settings change scores only by rounding errors."""

    engine: Literal["auto", "torch", "openvino"] = "auto"
    """auto runs on a CPU with OpenVINO if it is installed and a check gives the same scores, else with PyTorch."""
    dtype: Dtype = "auto"
    """auto uses bfloat16 if the processor multiplies it fast, else float16 on a GPU and float32 on a CPU."""
    device: str = "auto"
    """auto uses a GPU if there is one. Other values: cpu, cuda, cuda:1."""
    batch_tokens: int = 16384
    """Maximum number of tokens in one forward pass. A longer window runs alone."""
    packing: Literal["auto", "off"] = "auto"
    (
        "auto joins windows in one row without padding if a check at load time gives the same scores as with padding. "
        "off always uses padding."
    )
    num_threads: int | None = None
    """CPU threads of one model. Default: all cores of the machine, shared evenly between its replicas."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "batch_tokens", self.batch_tokens, low=1)
        check_range(self, "num_threads", self.num_threads, low=1)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which columns are read."""

    text_column: str = "text"
    """Column that contains the text, also a field in a struct column (meta.text). Lists are joined by newlines."""
    text_pair_column: str | None = None
    """Column that contains the second text of a pair."""
    label_column: str = "label"
    """Column that contains the label: int, string, float, list of strings, or a list with a 0 or 1 for each label."""
    label_columns: tuple[str, ...] = ()
    """multilabel: one column with 0 or 1 for each label, instead of label_column. They have the names of the labels."""
    limit: int | None = None
    """Use only this many rows of each input."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "limit", self.limit, low=1)
        if len(set(self.label_columns)) < len(self.label_columns):
            raise SettingsError(f"label_columns={list(self.label_columns)} names a column twice")

    @property
    def target_columns(self) -> tuple[str, ...]:
        """The columns that contain the labels."""
        return self.label_columns or (self.label_column,)

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The text column, or the two text columns of pairs."""
        return tuple(name for name in (self.text_column, self.text_pair_column) if name is not None)


@dataclass(frozen=True, kw_only=True)
class ScorePaths:
    """What a scoring job reads and writes."""

    model: str
    """Model folder written by `pipelines train`, or its URL. Also a Hugging Face classifier, or its name on the Hub."""
    input: str
    """File, folder or glob with the rows to score: Parquet, JSON Lines or CSV. Also a Delta or Iceberg table."""
    output: str
    """New folder for the scored Parquet files."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """One bulk scoring job."""

    thresholds: float | tuple[float, ...] | dict[str, float] | None = None
    """Replaces the thresholds of the model folder: one number, one per label, or {label: number}."""
    keep: tuple[str, ...] | None = None
    """Input columns to copy to the output. Default: all except the text columns."""
    prefix: str = ""
    """Prefix for the names of all output columns. Use it if an input column has the name of an output column."""
    replicas: int | str | None = None
    (
        "Number of model replicas: N, or MIN:MAX. 0 scores in this process, without Ray. "
        "Default: one per GPU, or one per machine if no GPU is used; 0 for less than a minute's work without a cluster."
    )
    gpus_per_replica: float | None = None
    """GPUs per replica. Default: 1 with device=cuda, or with device=auto if the cluster has a GPU now; else 0."""
    unit_bytes: int | None = None
    """Bytes per work unit, of all columns that are read. By default it grows with the input, as far as is useful."""
    filter: str | None = None
    (
        "Score only the rows that match, such as: language == 'en' and `sent at` >= '2026-01-31'. "
        "Other rows are only counted. Backticks are for names with spaces or dots."
    )
    max_errors: float | int | None = None
    """Stop the job if more rows than this have errors: a number of rows (int), or a share of all rows (float)."""
    overwrite: bool = False
    """Delete the run that is in the output folder, and start again."""
    append: bool = False
    """Score the input files that were added after the run in the output folder started. Rows of removed files stay."""
    replace_changed: bool = False
    """As append, and score changed input files again. The new rows replace the old ones."""
    retry_errors: bool = False
    """Score again the finished units that have rows in error, for example after a repair of the model or machine."""
    table: str | None = None
    (
        "Add the finished files to a table in one commit: delta:FOLDER (the output must be below it), or "
        "iceberg:CATALOG.NAMESPACE.TABLE. It is created if it does not exist."
    )
    early_exit: EarlyExit = "off"
    (
        "Read a text only until its label is sure. exact: labels are those of a full read. certified: by the margin of "
        "`pipelines tune --early-exit`. The scores are those of the windows read."
    )
    via_serve: str | None = None
    """Name of a running Serve application that scores the rows. The job then starts no replicas of its own."""
    tokenize_cpus: float = 1.0
    """CPUs per task that reads and tokenizes."""
    tokenize_resources: dict[str, float] | None = None
    """Custom Ray resources per task that reads and tokenizes."""
    tokenize_labels: dict[str, str] | None = None
    """Labels of the nodes on which tasks read and tokenize."""
    replica_resources: dict[str, float] | None = None
    """Custom Ray resources per replica."""
    replica_labels: dict[str, str] | None = None
    """Labels of the nodes on which replicas run, such as {ray.io/accelerator-type: H100}."""

    def __post_init__(self) -> None:
        check_types(self)
        low, high = self.replica_range or (1, 1)
        check_range(self, "replicas", low, low=min(high, 1), high=high)
        check_range(self, "tokenize_cpus", self.tokenize_cpus, above=0)
        check_range(self, "max_errors", self.max_errors, low=0)
        if isinstance(self.max_errors, float) and self.max_errors > 1:
            raise SettingsError(
                f"max_errors={self.max_errors} is a float above 1.0: a float is a share of all rows; "
                f"use an int for a number of rows"
            )
        if self.overwrite and (self.append or self.replace_changed):
            name = "append" if self.append else "replace_changed"
            raise SettingsError(
                f"overwrite and {name} exclude each other: overwrite deletes the run that {name} extends; set only one"
            )
        if self.via_serve is not None and self.replicas is not None and high == 0:
            raise SettingsError("replicas=0 scores in this process and via_serve in an application; set only one")
        if self.via_serve is not None and self.early_exit != "off":
            raise SettingsError("via_serve scores as the application does; set early_exit there")
        check_range(self, "gpus_per_replica", self.gpus_per_replica, low=0)
        check_range(self, "unit_bytes", self.unit_bytes, low=1)

    @property
    def replica_range(self) -> tuple[int, int] | None:
        """Minimum and maximum number of replicas, or None if replicas is not set."""
        return None if self.replicas is None else parse_range("replicas", self.replicas)


def check_decision(decision: DecisionSettings) -> None:
    """Raise SettingsError if kind, labels, merge, tie_value and thresholds do not fit together."""
    kind, num_labels, thresholds = decision.kind, len(decision.labels), decision.thresholds
    if len(set(decision.labels)) != num_labels:
        raise SettingsError(f"labels repeat: {', '.join(decision.labels)}")
    if kind == "regression" and num_labels:
        raise SettingsError(f"kind regression has no labels, got {', '.join(decision.labels)}")
    if kind == "binary" and num_labels not in (0, 2):
        raise SettingsError(f"kind binary needs 2 labels, got {num_labels}; use multiclass or multilabel")
    if kind == "multiclass" and num_labels == 1:
        raise SettingsError("kind multiclass needs at least 2 labels, got 1")
    if decision.merge == "vote" and kind in ("multilabel", "regression"):
        raise SettingsError(f"merge=vote needs one label per text; with kind {kind} use mean")
    if decision.merge == "max" and kind == "regression":
        raise SettingsError("merge=max has no meaning for kind regression; use mean")
    if num_labels and kind in ("binary", "multiclass") and not 0 <= decision.tie_value < num_labels:
        raise SettingsError(f"tie_value={decision.tie_value} is not a label id: it must be 0 to {num_labels - 1}")
    if decision.abstain_below is not None:
        check_range(decision, "abstain_below", decision.abstain_below, low=0, high=1)
        if kind != "multiclass":
            raise SettingsError(f"abstain_below is for kind multiclass; this is {kind}")
    if thresholds is None:
        return
    if kind in ("multiclass", "regression"):
        raise SettingsError(f"kind {kind} takes no thresholds; they are for binary and multilabel")
    for value in thresholds if isinstance(thresholds, tuple) else (thresholds,):
        if value != NEVER:
            check_range(decision, "thresholds", value, low=0, high=1)
    expected = 1 if kind == "binary" else len(decision.labels)
    if isinstance(thresholds, tuple) and decision.labels and len(thresholds) != expected:
        raise SettingsError(f"thresholds has {len(thresholds)} values; kind {kind} with these labels needs {expected}")
