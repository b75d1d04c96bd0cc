"""Settings of fine-tuning: name, type, default, limits and help text (see `pipelines.settings`).

Imports neither torch nor Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipelines.errors import SettingsError
from pipelines.fields import check_range, check_types, parse_range
from pipelines.settings import CalibrationMethod, Dtype


@dataclass(frozen=True, kw_only=True)
class TrainPaths:
    """What a fine-tuning run reads and writes."""

    train: str
    """File, folder or glob with the training rows: Parquet, JSON Lines or CSV."""
    model: str
    """Pretrained weights: a folder or a model name on the Hugging Face Hub."""
    output: str
    """New folder for the finished model."""
    valid: str | None = None
    """File, folder or glob with the validation rows. They select the best weights and tune the thresholds."""
    overwrite: bool = False
    """Remove the finished model or the unfinished run in output first, instead of refusing or resuming it."""
    num_workers: int | str = 0
    """Number of Ray Train workers: N, or MIN:MAX for as many as are available. 0 trains in this process."""
    resize_seconds: float = 60.0
    (
        "With num_workers=MIN:MAX: seconds between checks for more workers. "
        "When workers are added, all workers resume from the newest checkpoint."
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "resize_seconds", self.resize_seconds, low=1)
        _ = self.worker_range

    @property
    def worker_range(self) -> tuple[int, int]:
        """Minimum and maximum number of workers."""
        fewest, most = parse_range("num_workers", self.num_workers)
        if most and not fewest:
            raise SettingsError(f"num_workers={self.num_workers!r} has a minimum of 0; write 1:{most}")
        return fewest, most


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One fine-tuning run."""

    epochs: int = 3
    """Number of passes over the training windows."""
    batch_size: int = 16
    """Windows per optimizer step over all workers together. gradient_accumulation_steps multiplies this number."""
    gradient_accumulation_steps: int = 1
    """One optimizer step uses the mean loss of batch_size times this many windows."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adamw, or adafactor. Adafactor uses learning_rate, without its relative steps."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay. Biases and normalization weights are not decayed."""
    adam_betas: tuple[float, ...] = (0.9, 0.999)
    """Decay rates of AdamW's two running averages."""
    adam_epsilon: float = 1e-8
    """Constant added to the denominator of AdamW."""
    optimizer_args: dict[str, Any] | None = None
    """More arguments of Adafactor: beta1, clip_threshold, decay_rate, eps, scale_parameter."""
    parameter_groups: tuple[dict[str, Any], ...] = ()
    """Parameters with their own options, as a list of {params: [full names], lr: 1e-3, weight_decay: 0}."""
    layer_parameters: tuple[dict[str, Any], ...] = ()
    """Encoder layers with their own options, as a list of {layer: 10, lr: 1e-4}."""
    train_custom_parameters_only: bool = False
    """Train only the parameters in parameter_groups and layer_parameters."""
    scheduler: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"] = (
        "linear"
    )
    """Learning rate schedule after the warmup. The names are those of transformers."""
    scheduler_args: dict[str, Any] | None = None
    """Arguments of the schedule: num_cycles for the cosine schedules, power and lr_end for polynomial."""
    warmup_ratio: float = 0.06
    """Share of the steps during which the learning rate rises linearly."""
    warmup_steps: int | None = None
    """Number of steps during which the learning rate rises. Replaces warmup_ratio."""
    max_grad_norm: float = 1.0
    """Scale gradients with a larger norm down to this norm. 0 disables the scaling."""
    weight: tuple[float, ...] | dict[str, float] | Literal["balanced"] | None = None
    """binary and multiclass: loss weights, as a list, as {label: weight}, or balanced (from the training labels)."""
    pos_weight: tuple[float, ...] | dict[str, float] | Literal["balanced"] | None = None
    """multilabel: loss weights of positive examples, as a list, as {label: weight}, or balanced."""
    loss_type: Literal["focal", "dice", "tversky", "asymmetric", "mae", "huber"] | None = None
    (
        "Replaces the default loss. binary and multiclass (cross-entropy): focal, dice, tversky. "
        "multilabel (binary cross-entropy): focal, asymmetric. regression (mean squared error): mae, huber."
    )
    loss_args: dict[str, Any] | None = None
    """Arguments of loss_type, such as gamma and alpha for focal."""
    label_smoothing: float = 0.0
    """Share of the target that cross-entropy distributes evenly over all labels."""
    standardize_labels: bool = True
    (
        "regression: train on (label - mean) / spread of the training labels. "
        "The finished model predicts values in the original unit of the labels."
    )
    window_weight: Literal["window", "document"] = "window"
    """window: each window counts once in the loss. document: each window counts 1 / number of windows of its text."""
    train_max_windows: int | None = None
    """Use at most this many windows per training document. The run counts the documents that are cut."""
    shuffle_buffer: int = 131072
    (
        "Number of windows that are shuffled together. Larger data is shuffled buffer by buffer. "
        "Each worker holds the tokens of two buffers in memory."
    )
    train_dtype: Dtype = "auto"
    """Number format of the forward and backward pass in training. The weights always stay in float32."""
    train_batch_tokens: int = 16384
    (
        "Maximum number of tokens in one forward and backward pass of one worker. It limits memory use. "
        "It changes results only by rounding and dropout."
    )
    attention_dropout: float | None = None
    """Dropout of the attention weights. Replaces the value in the model's config. 0 trains much faster on CPUs."""
    activation_checkpointing: bool = False
    (
        "Store only the input of each layer and recompute the rest for the gradients. "
        "Training needs less memory and a third more time."
    )
    lora_rank: int = 0
    """Train a LoRA adapter of this rank and the head, instead of all weights. 0 trains all weights."""
    lora_alpha: float = 16.0
    """Factor of the LoRA adapter: its matrices are multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout of the inputs of the LoRA adapter."""
    lora_target: str = "auto"
    """Layers with an adapter: auto (all linear layers of the body), or ends of their names, such as query,value."""
    seed: int = 42
    """Random seed of the new head, the order of the windows and dropout."""
    metric: str | None = None
    (
        "Metric on valid that selects the best weights. Default: auprc_macro (multilabel), rmse (regression), mcc "
        "(multiclass), auprc (binary; mcc with merge=vote or given thresholds)."
    )
    metric_minimize: bool | None = None
    """Whether a lower metric is better. Default: true for loss, eval_loss, mae, rmse, fp and fn, else false."""
    objective: str = "f1"
    """Objective of the thresholds tuned on valid: f1, fbeta=B, precision=P or recall=R, as in `pipelines tune`."""
    calibrate: CalibrationMethod = "none"
    (
        "Fit on valid how logits become scores, so that a score of 0.9 is right in about 9 of 10 cases: temperature "
        "divides all logits by one number, per_label also fits a scale and a bias for each label (Platt scaling)."
    )
    evaluate_each_epoch: bool = True
    """Evaluate on valid at the end of each epoch."""
    evaluate_steps: int | None = None
    """Number of optimizer steps between additional evaluations on valid. Default: no additional evaluations."""
    early_stopping_patience: int | None = None
    """Stop after more than this many evaluations in a row without improvement. Default: no early stopping."""
    early_stopping_delta: float = 0.0
    """Minimum change of the metric that counts as an improvement."""
    early_stopping_consider_epochs: bool = True
    """Whether evaluations at the end of an epoch count for early_stopping_patience."""
    save_each_epoch: bool = True
    """Write a checkpoint at the end of each epoch. An interrupted run resumes from it."""
    save_steps: int | None = None
    """Number of optimizer steps between additional checkpoints. Default: no additional checkpoints."""
    save_minutes: float | None = 10.0
    """Also write a checkpoint when the last one is this many minutes old."""
    save_evaluations: bool = False
    """Also write a checkpoint at each evaluation within an epoch."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep during a run (`pipelines train`). Each contains the best weights so far."""
    max_failures: int = 3
    """How often lost workers are replaced (`pipelines train`). The run then resumes from its newest checkpoint."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard data: loss, learning rate and the metrics on valid."""
    tracking: Literal["none", "mlflow", "wandb"] = "none"
    """Send settings, losses, metrics and the report to MLflow or Weights & Biases (extras [mlflow], [wandb])."""
    tracking_project: str | None = None
    """Experiment (MLflow) or project (wandb). Default: MLFLOW_EXPERIMENT_NAME, WANDB_PROJECT, or our name."""
    logging_steps: int = 50
    """Number of optimizer steps between two entries of loss and learning rate, in TensorBoard or a tracker."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "train_max_windows", "train_batch_tokens",
                     "shuffle_buffer", "evaluate_steps", "save_steps", "keep_checkpoints",
                     "logging_steps"):  # fmt: skip
            check_range(self, name, getattr(self, name), low=1)
        for name in ("early_stopping_patience", "max_failures", "save_minutes", "early_stopping_delta", "weight_decay",
                     "warmup_steps", "adam_epsilon", "max_grad_norm", "seed", "lora_rank"):  # fmt: skip
            check_range(self, name, getattr(self, name), low=0)
        for name in ("warmup_ratio", "label_smoothing", "attention_dropout", "lora_dropout"):
            check_range(self, name, getattr(self, name), low=0, high=1)
        check_range(self, "lora_alpha", self.lora_alpha, above=0)
        check_range(self, "learning_rate", self.learning_rate, above=0)
        if len(self.adam_betas) != 2:
            raise SettingsError(f"adam_betas has {len(self.adam_betas)} values and needs 2")
        for beta in self.adam_betas:
            check_range(self, "adam_betas", beta, low=0, high=1)
        for name in ("weight", "pos_weight"):
            value = getattr(self, name)
            numbers = value.values() if isinstance(value, dict) else value
            if not isinstance(numbers, str):
                for number in numbers or ():
                    check_range(self, name, number, low=0)
