"""Every setting of the house: its name, type, default, limits and meaning, in one place.

The same frozen dataclasses are filled from Python, from a YAML file, from `--set key=value` and from a model
folder. Field names are unique over all groups, so that a flat mapping says everything: `parse` deals a mapping
out to groups, and refuses what it does not know with the nearest name. The sentence below a field is its help.

Knows no files, no models, no torch and no ray.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.errors import SettingsError
from pipelines.fields import check_range, check_types

Kind = Literal["binary", "multiclass", "multilabel", "regression"]
Merge = Literal["mean", "vote", "max"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """How a text longer than the model is cut."""

    max_length: int | None = None
    """Tokens per window, special tokens included. Default: 512, or the model's limit where that is lower."""
    sliding_window: bool = True
    """Cut long texts into windows; false truncates them to max_length, and the output says so."""
    stride: float | int = 0.8
    """From one window's start to the next: a fraction of max_length (float) or a number of tokens (int)."""
    window_plan: Literal["exact", "simpletransformers"] = "exact"
    """exact ends at the window that reaches the end; simpletransformers also adds its tails inside the last."""
    window_model_type: str | None = None
    """Model type by which the simpletransformers plan reserves tokens. Default: the model's own."""
    dense_windows: bool = False
    """Allow a step below 1/16 of a window's budget, which multiplies the cost."""
    max_windows: int | None = None
    """At most this many windows of one document are scored; what is cut is reported as truncated."""

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
    """What the model predicts, and how window scores become one label."""

    kind: Kind = "binary"
    """binary, multiclass, multilabel or regression."""
    labels: tuple[str, ...] = ()
    """Label names in the order of the logits. In binary the last is the positive one."""
    merge: Merge = "mean"
    """Windows to document: mean or max of their probabilities, or vote (single label only)."""
    tie_value: int = 1
    """Label id that wins a vote whose top two counts are equal."""
    thresholds: float | tuple[float, ...] | None = None
    """Score from which a label holds: one number, or one per label (binary: one, for the positive label)."""
    abstain_below: float | None = None
    """multiclass: no label when the best score is lower."""

    def __post_init__(self) -> None:
        check_types(self)
        check_decision(self)

    @property
    def num_labels(self) -> int:
        """Number of logits: one per label, and one for regression."""
        return 1 if self.kind == "regression" else len(self.labels)


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """How the forward pass runs. None of it changes a float32 score by more than rounding."""

    dtype: Dtype = "auto"
    """auto takes bfloat16 where the processor multiplies it faster than float32, else float32."""
    device: str = "auto"
    """auto takes a GPU when there is one; or cpu, cuda, cuda:1."""
    batch_tokens: int = 16384
    """Tokens in one forward pass."""
    packing: Literal["auto", "off"] = "auto"
    """auto runs windows in one row without padding where a check at load agrees with the padded way."""
    num_threads: int | None = None
    """CPU threads of one model. Default: every core of the machine, shared evenly between replicas."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "batch_tokens", self.batch_tokens, low=1)
        check_range(self, "num_threads", self.num_threads, low=1)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which columns are read."""

    text_column: str = "text"
    """Column that holds the text."""
    text_pair_column: str | None = None
    """Column that holds the second text of a pair."""
    label_column: str = "label"
    """Column that holds the label: int, string, float, list of strings, or a fixed list of 0 and 1."""
    limit: int | None = None
    """Use only this many rows of each input."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "limit", self.limit, low=1)


@dataclass(frozen=True, kw_only=True)
class TrainPaths:
    """What a fine-tuning run reads and writes."""

    train: str
    """Parquet file, folder or glob with the training rows."""
    model: str
    """Pretrained weights: a folder or a Hugging Face hub name."""
    output: str
    """New folder for the finished model."""
    valid: str | None = None
    """Parquet for choosing the best epoch and tuning thresholds."""
    num_workers: int | str = 0
    """Ray Train workers: N, or MIN:MAX to take as many as there are at the time; 0 trains in this process."""
    resize_seconds: float = 60.0
    """How often a run of MIN:MAX workers looks for more; with more, all go on from the newest checkpoint."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "resize_seconds", self.resize_seconds, low=1)
        _ = self.worker_range

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        fewest, most = parse_range("num_workers", self.num_workers)
        if most and not fewest:
            raise SettingsError(f"num_workers={self.num_workers!r} has a minimum of 0; write 1:{most}")
        return fewest, most


@dataclass(frozen=True, kw_only=True)
class ScorePaths:
    """What a scoring job reads and writes."""

    model: str
    """Model folder that `pipelines train` wrote, or its URL."""
    input: str
    """Parquet file, folder or glob."""
    output: str
    """New folder for the scored Parquet files."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class ServePaths:
    """What a server reads."""

    model: str
    """Model folder that `pipelines train` wrote, or its URL."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One fine-tuning run."""

    epochs: int = 3
    """Passes over the training windows."""
    batch_size: int = 16
    """Windows of one optimizer step over all workers together (times gradient_accumulation_steps)."""
    gradient_accumulation_steps: int = 1
    """An optimizer step sees batch_size times this many windows, whose mean loss it follows."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """AdamW, or Adafactor at the learning rate given (without its relative steps)."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay; biases and normalisation weights are spared."""
    adam_betas: tuple[float, ...] = (0.9, 0.999)
    """Decay of AdamW's two running means."""
    adam_epsilon: float = 1e-8
    """Added to the denominator of AdamW."""
    optimizer_args: dict[str, Any] | None = None
    """Further arguments of Adafactor: beta1, clip_threshold, decay_rate, eps, scale_parameter."""
    parameter_groups: tuple[dict[str, Any], ...] = ()
    """Parameters with options of their own: {params: [full names], lr: 1e-3, weight_decay: 0}, any number of these."""
    layer_parameters: tuple[dict[str, Any], ...] = ()
    """Encoder layers with options of their own: {layer: 10, lr: 1e-4}, any number of these."""
    train_custom_parameters_only: bool = False
    """Train nothing but parameter_groups and layer_parameters."""
    scheduler: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"] = (
        "linear"
    )
    """How the learning rate goes after its warmup, by the names of transformers' schedules."""
    scheduler_args: dict[str, Any] | None = None
    """Arguments of the schedule: num_cycles for the cosines, power and lr_end for polynomial."""
    warmup_ratio: float = 0.06
    """Share of the steps in which the learning rate rises linearly."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises, instead of warmup_ratio."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    weight: tuple[float, ...] | Literal["balanced"] | None = None
    """binary and multiclass: one loss weight per label, or balanced (from the training labels)."""
    pos_weight: tuple[float, ...] | Literal["balanced"] | None = None
    """multilabel: one loss weight per label for its positives, or balanced."""
    loss_type: Literal["focal", "dice", "tversky", "asymmetric", "mae", "huber"] | None = None
    """Instead of cross-entropy: focal, dice, tversky; of multilabel BCE: focal, asymmetric; of MSE: mae, huber."""
    loss_args: dict[str, Any] | None = None
    """Arguments of the loss, such as gamma and alpha of focal."""
    label_smoothing: float = 0.0
    """Share of the target that cross-entropy spreads evenly over all labels."""
    standardize_labels: bool = True
    """regression: learn (label - mean) / spread of the training labels; the finished model still gives labels."""
    window_weight: Literal["window", "document"] = "window"
    """window counts each window once; document gives each 1 / number of windows of its text."""
    train_max_windows: int | None = None
    """At most this many windows of one training document; what is cut is reported."""
    shuffle_buffer: int = 131072
    """Windows shuffled together; more data is shuffled part by part. Every worker holds the tokens of two buffers."""
    train_dtype: Dtype = "auto"
    """Arithmetic of the training forward and backward pass; weights are always kept in float32."""
    train_batch_tokens: int = 16384
    """Tokens in one forward and backward pass of one worker: a memory limit; changes only rounding and dropout."""
    attention_dropout: float | None = None
    """Dropout of attention's weights, instead of what the model's config says; 0 trains much faster on CPUs."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again for the gradients: less memory, a third more time."""
    seed: int = 42
    """Seed of the new head, the order of the windows and dropout."""
    metric: str | None = None
    """Metric of valid that chooses the best weights. Default: mcc, f1_macro (multilabel) or rmse (regression)."""
    metric_minimize: bool | None = None
    """Whether less is better. Default: for loss, eval_loss, mae and rmse, and no other."""
    objective: str = "f1"
    """What the thresholds tuned on valid are best for: f1, fbeta=B, precision=P or recall=R, as in `pipelines tune`."""
    calibrate: bool = False
    """Fit a temperature on valid, by which window logits are divided, so that scores say how often they are right."""
    evaluate_each_epoch: bool = True
    """Evaluate valid at the end of each epoch."""
    evaluate_steps: int | None = None
    """Evaluate valid every so many optimizer steps too."""
    early_stopping_patience: int | None = None
    """Evaluations in a row that may be no better than the best; one more ends the run. Default: no early stopping."""
    early_stopping_delta: float = 0.0
    """By how much an evaluation must be better to count."""
    early_stopping_consider_epochs: bool = True
    """Whether the evaluations at the end of epochs use up patience."""
    save_each_epoch: bool = True
    """Write a checkpoint at the end of each epoch, from which a run that was cut off goes on."""
    save_steps: int | None = None
    """Write a checkpoint every so many optimizer steps too."""
    save_minutes: float | None = 10.0
    """Write a checkpoint when the last is so old, beside those at the ends of epochs."""
    save_evaluations: bool = False
    """Write a checkpoint at each evaluation between the ends of epochs too."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay while a run goes on (`pipelines train`); the best weights so far are in each."""
    max_failures: int = 3
    """How often lost workers are replaced and the run goes on from its newest checkpoint (`pipelines train`)."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard's scalars: loss, learning rate and the metrics of valid."""
    logging_steps: int = 50
    """TensorBoard gets loss and learning rate every so many optimizer steps."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "train_max_windows", "train_batch_tokens",
                     "shuffle_buffer", "evaluate_steps", "save_steps", "keep_checkpoints",
                     "logging_steps"):  # fmt: skip
            check_range(self, name, getattr(self, name), low=1)
        check_range(self, "early_stopping_patience", self.early_stopping_patience, low=0)
        check_range(self, "max_failures", self.max_failures, low=0)
        check_range(self, "save_minutes", self.save_minutes, low=0)
        check_range(self, "early_stopping_delta", self.early_stopping_delta, low=0)
        check_range(self, "learning_rate", self.learning_rate, above=0)
        check_range(self, "weight_decay", self.weight_decay, low=0)
        check_range(self, "warmup_ratio", self.warmup_ratio, low=0, high=1)
        check_range(self, "warmup_steps", self.warmup_steps, low=0)
        check_range(self, "adam_epsilon", self.adam_epsilon, low=0)
        check_range(self, "label_smoothing", self.label_smoothing, low=0, high=1)
        check_range(self, "attention_dropout", self.attention_dropout, low=0, high=1)
        if len(self.adam_betas) != 2:
            raise SettingsError(f"adam_betas has {len(self.adam_betas)} values and needs 2")
        for beta in self.adam_betas:
            check_range(self, "adam_betas", beta, low=0, high=1)
        check_range(self, "max_grad_norm", self.max_grad_norm, low=0)
        check_range(self, "seed", self.seed, low=0)
        for name in ("weight", "pos_weight"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                for number in value:
                    check_range(self, name, number, low=0)


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """One bulk scoring job."""

    thresholds: float | tuple[float, ...] | dict[str, float] | None = None
    """Instead of the model folder's: one number, one per label, or {label: number}."""
    keep: tuple[str, ...] | None = None
    """Input columns to carry into the output. Default: all but the text."""
    prefix: str = ""
    """Put before the name of every output column, where an input column bears the same name."""
    replicas: int | str | None = None
    """Model replicas: N, or MIN:MAX; 0 scores in this process, without Ray. Default: one per GPU, or per machine."""
    gpus_per_replica: float | None = None
    """GPUs that one replica takes. Default: 1 with device=cuda, or where the cluster has any now, else 0."""
    unit_bytes: int | None = None
    """Text bytes of one work unit. Default: grows with the input, so that their number stays bounded."""
    filter: str | None = None
    """Score only rows that pass, such as: language == 'en' and year >= 2020. The others are counted."""
    max_errors: float | int | None = None
    """Stop when more rows than this come out with errors: a number (int), or a share of the rows (float)."""
    overwrite: bool = False
    """Remove the run that the output holds, and begin anew."""
    append: bool = False
    """Score input files that are new since the output was begun."""
    via_serve: str | None = None
    """Name of a running Serve application that scores instead of replicas of the job's own."""
    tokenize_cpus: float = 1.0
    """CPUs that one task of reading and tokenizing takes."""
    tokenize_resources: dict[str, float] | None = None
    """Custom resources that such a task takes."""
    tokenize_labels: dict[str, str] | None = None
    """Labels of the nodes on which such tasks run."""
    replica_resources: dict[str, float] | None = None
    """Custom resources that one replica takes."""
    replica_labels: dict[str, str] | None = None
    """Labels of the nodes on which replicas run, such as {ray.io/accelerator-type: H100}."""

    def __post_init__(self) -> None:
        check_types(self)
        low, high = self.replica_range or (1, 1)
        check_range(self, "replicas", low, low=min(high, 1), high=high)
        check_range(self, "tokenize_cpus", self.tokenize_cpus, above=0)
        check_range(self, "max_errors", self.max_errors, low=0)
        if isinstance(self.max_errors, float) and self.max_errors > 1:
            raise SettingsError(f"max_errors={self.max_errors} is a float above 1.0: a float is a share of the rows")
        if self.overwrite and self.append:
            raise SettingsError("overwrite and append exclude each other: one removes what the other adds to")
        check_range(self, "gpus_per_replica", self.gpus_per_replica, low=0)
        check_range(self, "unit_bytes", self.unit_bytes, low=1)

    @property
    def replica_range(self) -> tuple[int, int] | None:
        """Fewest and most replicas, None where nothing was said."""
        return None if self.replicas is None else parse_range("replicas", self.replicas)


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """One online server."""

    name: str | None = None
    """Name that answers carry as `model`. Default: the folder's name."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on."""
    api_keys: tuple[str, ...] = ()
    """SHA-256 of each key that may ask (printf %s KEY | sha256sum). Without any, everybody who reaches the port may."""
    allow_without_key: bool = False
    """Listen beyond this machine though there are no api_keys."""
    num_replicas: int | str = 1
    """Replicas of the model: N, or MIN:MAX, between which their number follows the load; MIN may be 0."""
    target_queued_tokens: int = 100_000
    """With MIN:MAX: a replica for every so many tokens that wait, and more where the model runs 80 % of the time."""
    upscale_delay_s: float = 5.0
    """With MIN:MAX: for how long more replicas must be needed before they are started."""
    downscale_delay_s: float = 120.0
    """With MIN:MAX: for how long fewer must do before some are stopped."""
    proxy: Literal["python", "haproxy"] = "python"
    """Before the replicas: Ray Serve's own, or HAProxy, whose ports and the replicas' bind every interface."""
    thresholds: float | tuple[float, ...] | dict[str, float] | None = None
    """Instead of the model folder's. In Serve's configuration files: user_config, which changes without a restart."""
    gpus_per_replica: float | None = None
    """GPUs that one replica takes. Default: 1 with device=cuda, or where the cluster has any now, else 0."""
    max_body_bytes: int = 4 * 2**20
    """A larger request body is answered 413."""
    max_documents: int = 256
    """More documents in one request are answered 422."""
    max_document_tokens: int = 200_000
    """A longer document is answered 422."""
    max_queued_tokens: int = 1_000_000
    """Tokens that may wait in one replica; beyond them the answer is 429."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "port", self.port, low=0, high=65535)
        check_range(self, "gpus_per_replica", self.gpus_per_replica, low=0)
        for key in self.api_keys:
            if not re.fullmatch(r"(sha256:)?[0-9a-f]{64}", key):
                raise SettingsError("api_keys takes SHA-256 in hex, one a key: what printf %s KEY | sha256sum prints")
        if parse_range("num_replicas", self.num_replicas)[1] < 1:
            raise SettingsError(
                f"num_replicas={self.num_replicas} serves nothing; use 1, or 0:1 to start at the first request"
            )
        for name in ("max_body_bytes", "max_documents", "max_document_tokens", "max_queued_tokens",
                     "target_queued_tokens"):  # fmt: skip
            check_range(self, name, getattr(self, name), low=1)
        for name in ("upscale_delay_s", "downscale_delay_s"):
            check_range(self, name, getattr(self, name), low=0)


def parse_range(name: str, value: int | str) -> tuple[int, int]:
    """Fewest and most of N or MIN:MAX. Raises SettingsError naming the setting."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", str(value))
    if found is None or (found[2] and int(found[2]) < int(found[1])):
        raise SettingsError(f"{name}={value!r} is neither a number nor MIN:MAX, such as 1:8")
    return int(found[1]), int(found[2] or found[1])


def check_decision(decision: DecisionSettings) -> None:
    """Raise SettingsError where kind, labels, merge, tie_value and thresholds do not fit together."""
    kind, num_labels = decision.kind, len(decision.labels)
    if len(set(decision.labels)) != num_labels:
        raise SettingsError(f"labels repeat: {', '.join(decision.labels)}")
    if kind == "regression" and num_labels:
        raise SettingsError(f"kind regression has no labels, got {', '.join(decision.labels)}")
    if kind == "binary" and num_labels not in (0, 2):
        raise SettingsError(f"kind binary needs 2 labels, got {num_labels}; use multiclass or multilabel")
    if kind == "multiclass" and num_labels == 1:
        raise SettingsError("kind multiclass needs at least 2 labels, got 1")
    if decision.merge == "vote" and kind in ("multilabel", "regression"):
        raise SettingsError(f"merge=vote needs one label per text; kind {kind} takes mean")
    if decision.merge == "max" and kind == "regression":
        raise SettingsError("merge=max has no meaning for kind regression; use mean")
    if num_labels and kind in ("binary", "multiclass") and not 0 <= decision.tie_value < num_labels:
        raise SettingsError(f"tie_value={decision.tie_value} is no label id: it must be 0 to {num_labels - 1}")
    _check_thresholds(decision)


def _check_thresholds(decision: DecisionSettings) -> None:
    kind, thresholds = decision.kind, decision.thresholds
    if decision.abstain_below is not None:
        check_range(decision, "abstain_below", decision.abstain_below, low=0, high=1)
        if kind != "multiclass":
            raise SettingsError(f"abstain_below is for kind multiclass; this is {kind}")
    if thresholds is None:
        return
    if kind in ("multiclass", "regression"):
        raise SettingsError(f"kind {kind} takes no thresholds; they are for binary and multilabel")
    for value in thresholds if isinstance(thresholds, tuple) else (thresholds,):
        check_range(decision, "thresholds", value, low=0, high=1)
    expected = 1 if kind == "binary" else len(decision.labels)
    if isinstance(thresholds, tuple) and decision.labels and len(thresholds) != expected:
        raise SettingsError(f"thresholds has {len(thresholds)} values, and kind {kind} here needs {expected}")
