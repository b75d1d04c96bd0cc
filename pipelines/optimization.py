"""Optimizer and learning-rate schedule of a run, both of them transformers' and torch's own."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import get_scheduler
from transformers.optimization import Adafactor

from pipelines.errors import SettingsError
from pipelines.settings import TrainSettings


def make_optimizer(module: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW or Adafactor over the parameters that train; vectors (biases, normalisation weights) are not decayed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adafactor":
        adafactor: torch.optim.Optimizer = Adafactor(
            groups, lr=settings.learning_rate, relative_step=False, warmup_init=False
        )
        return adafactor
    first, second = settings.adam_betas
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=(first, second), eps=settings.adam_epsilon, fused=True
    )


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
