"""Optimizer and learning-rate schedule of a training job. Both come from torch and transformers."""

from __future__ import annotations

import difflib
import math
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler
from transformers.optimization import Adafactor

from pipelines.errors import SettingsError
from pipelines.training_settings import TrainSettings

Group = dict[str, Any]


def make_optimizer(module: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Return AdamW or Adafactor for the trainable parameters.

    Raises:
        SettingsError: The optimizer rejects its arguments, or `parameter_groups` fails.
    """
    groups = parameter_groups(module, settings)
    if settings.optimizer == "adafactor":
        return _adafactor(groups, settings)
    if settings.optimizer_args:
        raise SettingsError(f"optimizer_args {settings.optimizer_args} are only for optimizer=adafactor; remove them")
    first, second = settings.adam_betas
    try:
        return torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=(first, second), eps=settings.adam_epsilon, fused=True
        )
    except (TypeError, ValueError) as error:
        raise SettingsError(f"AdamW rejects its parameter groups: {error}") from error


def parameter_groups(module: nn.Module, settings: TrainSettings) -> list[Group]:
    """Divide the trainable parameters into groups with different options.

    The order is: settings.parameter_groups, settings.layer_parameters, all other parameters. Each parameter is in one
    group. Vectors (biases, normalisation weights) have no weight decay, unless settings.parameter_groups names them. A
    group without weight_decay takes the value of the settings.

    Raises:
        SettingsError: The model does not have a named parameter or layer, a parameter is named twice, or there is
            nothing to train.
    """
    left = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    known = list(left)
    groups: list[Group] = []
    for options in settings.parameter_groups:
        names = options.get("params", [])
        if not names:
            raise SettingsError(f"parameter_groups entry {options} names no params; add params: [full names]")
        chosen = [_take(left, name, known) for name in names]
        groups.append({"weight_decay": settings.weight_decay, **_options(options), "params": chosen})
    for options in settings.layer_parameters:
        part = f"layer.{options.get('layer')}."
        names = [name for name in left if part in name or part.replace("layer", "layers") in name]
        if not names:
            raise SettingsError(f"layer_parameters entry {options} fits no parameter: no unassigned name has {part!r}")
        chosen = [left.pop(name) for name in names]
        groups += _split(chosen, {"weight_decay": settings.weight_decay, **_options(options)})
    if not settings.train_custom_parameters_only:
        groups += _split(list(left.values()), {"weight_decay": settings.weight_decay})
    if not groups:
        raise SettingsError("train_custom_parameters_only needs parameter_groups or layer_parameters")
    return groups


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainSettings, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the learning-rate schedule: a linear warmup from 0, then settings.scheduler.

    Args:
        optimizer: Its learning rate is scheduled.
        settings: Schedule, its arguments, and the warmup.
        num_steps: Optimizer steps of the whole training job.

    Raises:
        SettingsError: The schedule rejects its arguments.
    """
    warmup = math.ceil(settings.warmup_ratio * num_steps) if settings.warmup_steps is None else settings.warmup_steps
    try:
        schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
            settings.scheduler,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=dict(settings.scheduler_args or {}),
        )
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"scheduler={settings.scheduler} with scheduler_args {settings.scheduler_args}: {error}"
        ) from error
    return schedule


def _adafactor(groups: list[Group], settings: TrainSettings) -> torch.optim.Optimizer:
    arguments = {"relative_step": False, "warmup_init": False, **(settings.optimizer_args or {})}
    try:
        optimizer: torch.optim.Optimizer = Adafactor(groups, lr=settings.learning_rate, **arguments)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"optimizer_args {settings.optimizer_args} are rejected by Adafactor: {error}") from error
    return optimizer


def _take(left: dict[str, nn.Parameter], name: str, known: list[str]) -> nn.Parameter:
    if name in left:
        return left.pop(name)
    if name in known:
        raise SettingsError(f"parameter_groups names {name!r} twice")
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    raise SettingsError(f"parameter_groups names {name!r}, which the model lacks; the nearest is {nearest}")


def _options(entry: Group) -> Group:
    return {name: value for name, value in entry.items() if name not in ("params", "layer")}


def _split(parameters: list[nn.Parameter], options: Group) -> list[Group]:
    """Return a group of matrices with the options, and a group of vectors without weight decay. Omit empty groups."""
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{**options, "params": matrices}, {**options, "weight_decay": 0.0, "params": vectors}]
    return [group for group in groups if group["params"]]
