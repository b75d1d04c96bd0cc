"""Optimizer and learning-rate schedule of a run, both of them transformers' and torch's own."""

from __future__ import annotations

import difflib
import math
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler
from transformers.optimization import Adafactor

from pipelines.errors import SettingsError
from pipelines.settings import TrainSettings

Group = dict[str, Any]


def make_optimizer(module: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW or Adafactor over the parameters that train."""
    groups = parameter_groups(module, settings)
    if settings.optimizer == "adafactor":
        return _adafactor(groups, settings)
    if settings.optimizer_args:
        raise SettingsError(f"optimizer_args {settings.optimizer_args} are Adafactor's; the optimizer is adamw")
    first, second = settings.adam_betas
    try:
        return torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=(first, second), eps=settings.adam_epsilon, fused=True
        )
    except (TypeError, ValueError) as error:
        raise SettingsError(f"the optimizer refuses its groups: {error}") from error


def parameter_groups(module: nn.Module, settings: TrainSettings) -> list[Group]:
    """Named parameters with their options, then layers with theirs, then the rest; each parameter once.

    Vectors (biases, normalisation weights) are not decayed unless they are named. A group takes weight_decay from
    the settings where its options have none. Raises SettingsError for a name or a layer that the model lacks.
    """
    left = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    known = list(left)
    groups: list[Group] = []
    for options in settings.parameter_groups:
        names = options.get("params", [])
        if not names:
            raise SettingsError(f"parameter_groups entry {options} names no params")
        chosen = [_take(left, name, known) for name in names]
        groups.append({"weight_decay": settings.weight_decay, **_options(options), "params": chosen})
    for options in settings.layer_parameters:
        part = f"layer.{options.get('layer')}."
        names = [name for name in left if part in name or part.replace("layer", "layers") in name]
        if not names:
            raise SettingsError(f"layer_parameters entry {options} fits no parameter that is left: none has {part!r}")
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
    """The learning rate of each step: up from 0 while warming up, then as the schedule says."""
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
        raise SettingsError(f"optimizer_args {settings.optimizer_args} are refused by Adafactor: {error}") from error
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
    """Matrices under the options, vectors the same without decay; no empty group."""
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{**options, "params": matrices}, {**options, "weight_decay": 0.0, "params": vectors}]
    return [group for group in groups if group["params"]]
