"""The optimizer step: forward and backward passes over a step's windows, and the update of the weights.

The same code runs in one process and in every worker of a process group.

Shapes: W windows, L labels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.errors import SettingsError
from pipelines.model.batching import token_batches
from pipelines.model.devices import RANDOM, to_device
from pipelines.model.window_model import WindowModel
from pipelines.text.tokenization import CutDocuments, InputRows, assemble
from pipelines.training.losses import Loss
from pipelines.training.optimization import make_optimizer, make_schedule
from pipelines.training.order import Step
from pipelines.training.ranks import rank, shared_dtype, world_size
from pipelines.training_settings import TrainSettings


class Stepper:
    """A model in training, with its optimizer, learning-rate schedule and gradient scaler."""

    def __init__(
        self, model: WindowModel, example: CutDocuments, settings: TrainSettings, loss: Loss, num_steps: int
    ) -> None:
        """Prepare training of a model whose weights are float32.

        Args:
            model: The model.
            example: Cut documents with at least one window. The first window is run to find unused parameters.
            settings: The settings of the run.
            loss: The loss of the run.
            num_steps: Number of steps of the learning-rate schedule. `set_num_steps` changes it.
        """
        self._model, self._settings, self._loss = model, settings, loss
        if settings.activation_checkpointing:
            _checkpoint_activations(model.module)
        self._frozen = _freeze_unused(model, example)
        self._forward = _distributed(model)
        self._dtype = shared_dtype(settings.train_dtype, model.device)
        self._optimizer = make_optimizer(model.module, settings)
        self._schedule = make_schedule(self._optimizer, settings, num_steps)
        self._scaler = torch.amp.GradScaler(model.device.type, enabled=self._dtype == torch.float16)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step in the last parameter group, which normally has no options of its own."""
        return float(self._schedule.get_last_lr()[-1])

    def set_num_steps(self, num_steps: int) -> None:
        """Change the number of steps of the schedule, from the next step on."""
        state = self._schedule.state_dict()
        self._schedule = make_schedule(self._optimizer, self._settings, num_steps)
        if state["last_epoch"] > 0:  # torch's name for the number of steps done
            self._schedule.load_state_dict({**state, "last_epoch": state["last_epoch"] - 1})
            self._schedule.step()

    def __call__(self, step: Step, number: int) -> Tensor:
        """Run optimizer step `number` of the run.

        The random numbers of dropout depend only on seed, step and rank. A resumed run therefore draws the same numbers
        as a run without interruption.

        Returns:
            This rank's share of the global mean loss, on the device. NaN if gradients are not finite, because then the
            weights are not finite either.
        """
        with RANDOM:
            torch.manual_seed(((self._settings.seed * 1_000_003 + number) * 65_536 + rank()) % 2**63)
            loss = self._backward(step)
        return torch.where(self._update(), loss, torch.nan)

    def release(self) -> None:
        """Unfreeze the parameters that this run froze, and switch off activation checkpointing."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        if self._settings.activation_checkpointing:
            _switch_checkpointing(self._model.module, "disable")()

    def state(self) -> dict[str, Any]:
        """Return everything that the next steps depend on, except the weights."""
        parts = (self._optimizer, self._schedule, self._scaler)
        return {type(part).__name__: part.state_dict() for part in parts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `state`."""
        for part in (self._optimizer, self._schedule, self._scaler):
            if state[type(part).__name__]:  # the scaler's is empty where the run was not in float16
                part.load_state_dict(state[type(part).__name__])

    def _backward(self, step: Step) -> Tensor:
        """Compute the gradients of the step's mean loss in micro-batches. Return this rank's share of the loss."""
        model, data, cut = self._model, step.data, step.data.cut
        total = torch.zeros((), device=model.device)
        lengths = data.length_W[step.index_W]
        batches = token_batches(lengths, batch_tokens=self._settings.train_batch_tokens, padded=not model.is_packed)
        for number, batch in enumerate(batches):
            index_W = step.index_W[batch]
            rows = assemble(cut, model.template, index_W)
            target = to_device(data.targets[cut.windows.document_W[index_W]], model.device)
            share = to_device(step.share_W[batch], model.device)
            with self._synchronized(number == len(batches) - 1):
                with torch.autocast(model.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
                    logits_WL = self._forward(rows)
                mean = (self._loss(logits_WL, target) * share).sum() / step.normalizer
                self._scaler.scale(mean * world_size()).backward()  # the ranks' gradients are averaged
            total += mean.detach()
        return total

    def _synchronized(self, is_last: bool) -> Any:
        """Return a context in which ranks exchange gradients only with the last micro-batch of a step."""
        if is_last or not isinstance(self._forward, DistributedDataParallel):
            return nullcontext()
        return self._forward.no_sync()

    def _update(self) -> Tensor:
        """Update the weights, and return whether the gradients were finite.

        With a gradient scaler (float16), a step with other gradients is skipped and counts as finite.
        """
        self._scaler.unscale_(self._optimizer)
        most = self._settings.max_grad_norm or torch.inf
        norm = torch.nn.utils.clip_grad_norm_(self._model.module.parameters(), most)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        self._model.module.zero_grad(set_to_none=True)
        return torch.isfinite(norm) | self._scaler.is_enabled()


class _Forward(nn.Module):
    """The window model as a module, so that DistributedDataParallel sees its parameters and its call."""

    def __init__(self, model: WindowModel) -> None:
        super().__init__()
        self.module = model.module
        self._model = model

    def forward(self, rows: InputRows) -> Tensor:
        return self._model(rows)


def _freeze_unused(model: WindowModel, cut: CutDocuments) -> list[nn.Parameter]:
    """Freeze the parameters that the logits do not depend on, such as an unused pooler, and return them.

    Otherwise, DistributedDataParallel would wait forever for their gradients.
    """
    _Forward(model)(assemble(cut, model.template, np.zeros(1, np.int64))).float().sum().backward()
    unused = [p for p in model.module.parameters() if p.requires_grad and p.grad is None]
    for parameter in unused:
        parameter.requires_grad_(False)
    model.module.zero_grad(set_to_none=True)
    return unused


def _checkpoint_activations(module: Any) -> None:
    """Switch activation checkpointing on. Raises SettingsError if the architecture does not support it."""
    if getattr(module.config, "attention_type", "") == "block_sparse":
        raise SettingsError(
            "activation_checkpointing=true: block-sparse attention draws its random blocks again in the backward pass; "
            "leave it out"
        )
    try:
        _switch_checkpointing(module, "enable")({"use_reentrant": False})
    except ValueError as error:  # raised by transformers
        raise SettingsError(f"activation_checkpointing=true: {module.config.model_type} does not support it") from error


def _switch_checkpointing(module: Any, verb: str) -> Callable[..., None]:
    """Return the method that switches activation checkpointing. Its name depends on the version of transformers."""
    new, old = f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}"
    switch: Callable[..., None] = getattr(module, new if hasattr(module, new) else old)
    return switch


def _distributed(model: WindowModel) -> nn.Module:
    """Return the module to train. With several ranks, it is wrapped in DistributedDataParallel."""
    forward = _Forward(model)
    if world_size() == 1:
        return forward
    devices = [model.device] if model.device.type == "cuda" else None
    return DistributedDataParallel(forward, device_ids=devices)
