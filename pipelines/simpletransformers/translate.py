"""Translate Simple Transformers' arguments into the settings of this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import SettingsError
from pipelines.settings import ComputeSettings, DecisionSettings, Kind, WindowSettings
from pipelines.simpletransformers.arguments import SCHEDULERS, ClassificationArgs, read_model_args
from pipelines.training_settings import TrainSettings

DEFAULT_SEED = 42
METRIC_NAMES = {"loss": "eval_loss", "lrap": "LRAP"}
"""Metrics whose name differs: the name in this package to the name in Simple Transformers."""
THEIR_NAMES = {
    "epochs": "num_train_epochs",
    "batch_size": "train_batch_size",
    "seed": "manual_seed",
    "parameter_groups": "custom_parameter_groups",
    "layer_parameters": "custom_layer_parameters",
    "evaluate_steps": "evaluate_during_training_steps",
}
"""Settings whose name differs: the name in this package to the name in Simple Transformers."""
ADAFACTOR_ARGS = ("beta1", "clip_threshold", "decay_rate", "eps", "scale_parameter")


def resolve_args(
    kind: type[ClassificationArgs],
    model_name: str,
    args: Mapping[str, Any] | ClassificationArgs | None,
    saved: Mapping[str, Any] | None = None,
) -> ClassificationArgs:
    """Combine the arguments that were saved with the weights and those of the caller. The caller's have priority.

    A folder that Simple Transformers itself saved keeps the window plan of Simple Transformers.

    Args:
        kind: Class of the arguments.
        model_name: Model folder, whose model_args.json is read if there is one, or a hub name.
        args: The caller's arguments. As in Simple Transformers, an Args object replaces all saved arguments.
        saved: Arguments of a folder without model_args.json.

    Raises:
        SettingsError: An argument is unknown or refused.
        ModelFolderError: model_args.json is not valid JSON.
    """
    if isinstance(args, ClassificationArgs):
        resolved = args
    else:
        resolved = kind()
        resolved.update_from_dict(saved or {})
        resolved.load(model_name)
        if "labels_list" in (args or {}) and "labels_map" not in (args or {}):
            resolved.labels_map = {}  # a saved map must not override the caller's list
        resolved.update_from_dict(args or {})
    if resolved.window_plan is None and is_theirs(model_name):
        resolved.window_plan = "simpletransformers"
    return resolved


def is_theirs(model_name: str) -> bool:
    """Whether Simple Transformers itself saved a folder: its model_args.json has none of our own arguments.

    Raises:
        ModelFolderError: model_args.json is not valid JSON.
    """
    saved = read_model_args(Path(model_name))
    return bool(saved) and "window_plan" not in saved


def saved_args(windows: WindowSettings, decision: DecisionSettings) -> dict[str, Any]:
    """Return the arguments that correspond to the windows and the decision of a model folder."""
    labels = decision.labels
    named = {} if labels == tuple(map(str, range(len(labels)))) else {"labels_list": list(labels)}
    if decision.kind == "multilabel":
        named["threshold"] = 0.5 if decision.thresholds is None else decision.thresholds  # type: ignore[assignment]
    return {
        "max_seq_length": windows.max_length,
        "sliding_window": windows.sliding_window,
        "stride": windows.stride,
        "window_plan": windows.window_plan,
        "dense_windows": windows.dense_windows,
        "max_windows": windows.max_windows,
        "merge": decision.merge,
        "tie_value": decision.tie_value,
        "regression": decision.kind == "regression",
        **named,
    }


def count_labels(args: ClassificationArgs, num_labels: int | None, *, is_multilabel: bool) -> int | None:
    """Make labels_list and labels_map of args consistent, and return the number of labels.

    Args:
        args: Its labels_list and labels_map are updated.
        num_labels: The caller's number of labels, or None.
        is_multilabel: Whether a text may have several labels.

    Returns:
        The number of labels. None means that the weights define it.

    Raises:
        SettingsError: The number, the list, the map and regression do not fit each other.
    """
    if args.regression:
        if num_labels not in (None, 1):
            raise SettingsError(f"regression=True needs num_labels=1, not {num_labels}")
        return 1
    if num_labels == 1 and not is_multilabel:
        raise SettingsError("num_labels=1 is for regression; set regression=True in args, or num_labels=2")
    if args.label_columns and not (args.labels_list or args.labels_map):
        args.labels_list = list(args.label_columns)
    args.labels_list = [_python(label) for label in args.labels_list or []]
    if args.labels_map:
        args.labels_list = _in_order(args.labels_map, args.labels_list)
    names = list(args.labels_list)
    if names and num_labels not in (None, len(names)):
        raise SettingsError(f"num_labels={num_labels} but labels_list names {len(names)}: {names}; they must agree")
    if names and not is_multilabel and (args.labels_map or not _is_range(names)):
        args.labels_map = {name: number for number, name in enumerate(names)}
    return len(names) or num_labels


def _in_order(labels_map: Mapping[Any, Any], labels_list: list[Any]) -> list[Any]:
    """Return the labels of a map in the order of their ids, as labels_list spells them.

    The spelling can differ because JSON turns the keys of a map into strings.
    """
    try:
        ids = {_key(label): int(number) for label, number in labels_map.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise SettingsError(f"labels_map={labels_map!r} must map each label to its id") from error
    if sorted(ids.values()) != list(range(len(ids))):
        raise SettingsError(f"labels_map={dict(labels_map)} must give each label its own id from 0 to {len(ids) - 1}")
    spelled = {_key(label): label for label in (labels_list or map(_python, labels_map))}
    if spelled.keys() != ids.keys():
        raise SettingsError(f"labels_list {labels_list} and labels_map {dict(labels_map)} name different labels")
    return [spelled[name] for name in sorted(ids, key=lambda name: ids[name])]


def _key(label: Any) -> str:
    """Return a label as JSON spells it as a key."""
    return json.dumps(label) if isinstance(label, bool) else str(_python(label))


def _python(label: Any) -> Any:
    """Return a label as a Python value, if it is a numpy value."""
    return label.item() if hasattr(label, "item") else label


def _is_range(names: list[Any]) -> bool:
    return names == list(range(len(names))) and not any(isinstance(name, bool) for name in names)


def decision_settings(args: ClassificationArgs, num_labels: int, *, is_multilabel: bool) -> DecisionSettings:
    """Return kind, labels, merge and thresholds."""
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


def window_settings(args: ClassificationArgs, model_type: str | None = None) -> WindowSettings:
    """Return the settings of the windows. model_type is the model's type in Simple Transformers."""
    return WindowSettings(
        max_length=args.max_seq_length,
        sliding_window=args.sliding_window,
        stride=args.stride,
        window_plan=args.window_plan or "exact",
        window_model_type=model_type if args.window_plan == "simpletransformers" else None,
        dense_windows=args.dense_windows,
        max_windows=args.max_windows,
    )


def compute_settings(args: ClassificationArgs, device: str) -> ComputeSettings:
    """Return the settings of the forward pass."""
    return ComputeSettings(dtype=args.dtype, device=device, batch_tokens=args.batch_tokens)


def train_settings(args: ClassificationArgs, device: str, **weights: Any) -> TrainSettings:
    """Return the settings of one training job.

    Args:
        args: Arguments.
        device: Name of the device. fp16 has an effect only on CUDA.
        weights: weight or pos_weight.

    Raises:
        SettingsError: An argument has a wrong value. The message names the argument as Simple Transformers does.
    """
    if args.optimizer not in ("AdamW", "Adafactor"):
        raise SettingsError(f"optimizer={args.optimizer!r} is neither AdamW nor Adafactor; use one of them")
    if args.scheduler not in SCHEDULERS:
        raise SettingsError(f"scheduler={args.scheduler!r} is not one of: {', '.join(SCHEDULERS)}")
    scheduler = SCHEDULERS[args.scheduler]
    epochs = args.num_train_epochs
    adafactor = {name: getattr(args, f"adafactor_{name}") for name in ADAFACTOR_ARGS}
    values: dict[str, Any] = dict(
        epochs=int(epochs) if isinstance(epochs, float) and epochs.is_integer() else epochs,
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
        scheduler=scheduler,
        scheduler_args=_scheduler_args(scheduler, args),
        warmup_ratio=args.warmup_ratio,
        warmup_steps=args.warmup_steps or None,
        max_grad_norm=args.max_grad_norm,
        loss_type=args.loss_type,
        loss_args=args.loss_args or None,
        standardize_labels=False,
        window_weight=args.window_weight,
        train_max_windows=args.train_max_windows,
        train_dtype="auto" if args.fp16 and device.startswith("cuda") else "float32",
        seed=seed_of(args),
        evaluate_each_epoch=args.evaluate_each_epoch,
        evaluate_steps=_every(args.evaluate_during_training_steps),
        save_each_epoch=args.save_model_every_epoch,
        save_steps=_every(args.save_steps),
        save_minutes=None,
        save_evaluations=args.save_eval_checkpoints,
        tensorboard_dir=args.tensorboard_dir,
        logging_steps=_every(args.logging_steps) or 1,
        **_early_stopping(args),
        **weights,
    )
    try:
        return TrainSettings(**values)
    except SettingsError as error:
        ours = next((name for name in THEIR_NAMES if str(error).startswith(f"{name}=")), "")
        raise SettingsError(THEIR_NAMES.get(ours, ours) + str(error)[len(ours) :]) from error


def seed_of(args: ClassificationArgs) -> int:
    """Return manual_seed, or DEFAULT_SEED if it is None. 0 is a valid seed."""
    return DEFAULT_SEED if args.manual_seed is None else int(args.manual_seed)


def theirs(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics under their names in Simple Transformers."""
    return {METRIC_NAMES.get(name, name): value for name, value in metrics.items()}


def _early_stopping(args: ClassificationArgs) -> dict[str, Any]:
    """The metric chooses the best weights, whether or not it also stops training."""
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
    """In Simple Transformers, 0 and -1 mean never."""
    try:
        steps = int(steps or 0)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{steps!r} is not a number of steps") from error
    return steps if steps > 0 else None


def _threshold(value: Any) -> float | tuple[float, ...]:
    try:
        return tuple(float(number) for number in value) if isinstance(value, (list, tuple)) else float(value)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"threshold={value!r} must be a number, or a list of one number per label") from error
