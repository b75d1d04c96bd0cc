"""Simple Transformers' arguments, as the settings of the house. Knows no torch, no ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.arguments import SCHEDULERS, ClassificationArgs
from pipelines.errors import SettingsError
from pipelines.settings import ComputeSettings, DecisionSettings, Kind, TrainSettings, WindowSettings

DEFAULT_SEED = 42
METRIC_NAMES = {"loss": "eval_loss", "lrap": "LRAP"}
"""Metrics that are called otherwise here: ours to theirs."""
ADAFACTOR_ARGS = ("beta1", "clip_threshold", "decay_rate", "eps", "scale_parameter")


def resolve_args(
    kind: type[ClassificationArgs], model_name: str, args: Mapping[str, Any] | ClassificationArgs | None
) -> ClassificationArgs:
    """Arguments saved beside the weights, then the caller's; an Args object replaces all, as there.

    A folder that Simple Transformers itself saved keeps its window plan.
    """
    if isinstance(args, ClassificationArgs):
        return args
    resolved = kind()
    resolved.load(model_name)
    folder = Path(model_name)
    if (folder / "model_args.json").is_file() and not (folder / "pipeline.json").is_file():
        resolved.window_plan = "simpletransformers"
    resolved.update_from_dict(args or {})
    return resolved


def count_labels(args: ClassificationArgs, num_labels: int | None, *, is_multilabel: bool) -> int | None:
    """Settle labels_list and labels_map; the number of labels, None where the weights are to say."""
    if args.regression:
        if num_labels not in (None, 1):
            raise SettingsError(f"regression=True needs num_labels=1, not {num_labels}")
        return 1
    if args.labels_map:
        args.labels_list = sorted(args.labels_map, key=lambda name: int(args.labels_map[name]))
    names = list(args.labels_list)
    if names and num_labels not in (None, len(names)):
        raise SettingsError(f"num_labels={num_labels} but labels_list names {len(names)}: {names}")
    if names and not is_multilabel and names != list(range(len(names))):
        args.labels_map = {name: number for number, name in enumerate(names)}
    return len(names) or num_labels


def decision_settings(args: ClassificationArgs, num_labels: int, *, is_multilabel: bool) -> DecisionSettings:
    """Kind, labels, merge and thresholds."""
    single = not is_multilabel and not args.regression
    kind: Kind = "regression" if args.regression else "multilabel"
    if single:
        kind = "binary" if num_labels == 2 else "multiclass"
    names = tuple(map(str, args.labels_list)) or tuple(map(str, range(num_labels)))
    return DecisionSettings(
        kind=kind,
        labels=() if args.regression else names,
        merge=args.merge or ("vote" if single else "mean"),
        tie_value=args.tie_value,
        thresholds=_threshold(args.threshold) if is_multilabel else None,
    )


def window_settings(args: ClassificationArgs) -> WindowSettings:
    """How texts are cut."""
    return WindowSettings(
        max_length=args.max_seq_length,
        sliding_window=args.sliding_window,
        stride=args.stride,
        window_plan=args.window_plan,
        dense_windows=args.dense_windows,
        max_windows=args.max_windows,
    )


def compute_settings(args: ClassificationArgs, device: str) -> ComputeSettings:
    """How the forward pass runs."""
    return ComputeSettings(dtype=args.dtype, device=device, batch_tokens=args.batch_tokens)


def train_settings(args: ClassificationArgs, device: str, **weights: Any) -> TrainSettings:
    """One run; weights are weight or pos_weight."""
    if args.optimizer not in ("AdamW", "Adafactor"):
        raise SettingsError(f"optimizer={args.optimizer!r} is neither 'AdamW' nor 'Adafactor'")
    if args.scheduler not in SCHEDULERS:
        raise SettingsError(f"scheduler={args.scheduler!r} is none of: {', '.join(SCHEDULERS)}")
    scheduler = SCHEDULERS[args.scheduler]
    adafactor = {name: getattr(args, f"adafactor_{name}") for name in ADAFACTOR_ARGS}
    return TrainSettings(
        epochs=args.num_train_epochs,
        batch_size=args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        optimizer=args.optimizer.lower(),
        optimizer_args=adafactor if args.optimizer == "Adafactor" else None,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        adam_betas=tuple(args.adam_betas),
        adam_epsilon=args.adam_epsilon,
        parameter_groups=tuple(args.custom_parameter_groups),
        layer_parameters=tuple(args.custom_layer_parameters),
        train_custom_parameters_only=args.train_custom_parameters_only,
        scheduler=scheduler,  # type: ignore[arg-type]
        scheduler_args=_scheduler_args(scheduler, args),
        warmup_ratio=args.warmup_ratio,
        warmup_steps=args.warmup_steps or None,
        max_grad_norm=args.max_grad_norm,
        loss_type=args.loss_type,
        loss_args=args.loss_args or None,
        window_weight=args.window_weight,
        train_max_windows=args.train_max_windows,
        train_dtype="auto" if args.fp16 and device.startswith("cuda") else "float32",
        seed=seed_of(args),
        evaluate_each_epoch=args.evaluate_each_epoch,
        evaluate_steps=_every(args.evaluate_during_training_steps),
        save_each_epoch=args.save_model_every_epoch,
        save_steps=_every(args.save_steps),
        save_evaluations=args.save_eval_checkpoints,
        tensorboard_dir=args.tensorboard_dir,
        logging_steps=_every(args.logging_steps) or 1,
        **_early_stopping(args),
        **weights,
    )


def seed_of(args: ClassificationArgs) -> int:
    """manual_seed, where 0 counts."""
    return DEFAULT_SEED if args.manual_seed is None else int(args.manual_seed)


def theirs(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics by their names."""
    return {METRIC_NAMES.get(name, name): value for name, value in metrics.items()}


def _early_stopping(args: ClassificationArgs) -> dict[str, Any]:
    """Their metric chooses the best weights whether or not it also stops the run."""
    ours = {name: ours for ours, name in METRIC_NAMES.items()}
    return {
        "metric": ours.get(args.early_stopping_metric, args.early_stopping_metric),
        "metric_minimize": args.early_stopping_metric_minimize,
        "early_stopping_patience": args.early_stopping_patience if args.use_early_stopping else None,
        "early_stopping_delta": args.early_stopping_delta,
        "early_stopping_consider_epochs": args.early_stopping_consider_epochs,
    }


def _scheduler_args(scheduler: str, args: ClassificationArgs) -> dict[str, Any] | None:
    if scheduler in ("cosine", "cosine_with_restarts"):
        return {"num_cycles": args.cosine_schedule_num_cycles}
    if scheduler == "polynomial":
        return {"power": args.polynomial_decay_schedule_power, "lr_end": args.polynomial_decay_schedule_lr_end}
    return None


def _every(steps: int | None) -> int | None:
    """Their 0 and -1 say never."""
    return steps if steps and steps > 0 else None


def _threshold(value: Any) -> float | tuple[float, ...]:
    return tuple(float(number) for number in value) if isinstance(value, (list, tuple)) else float(value)
