"""Optimizer steps: which windows each rank runs, forward and backward over them, the update.

The same code runs in one process and in every worker of a process group: a seeded plan fixes the windows of each
step, the ranks take equal shares of them, and the loss is averaged over the step's windows of all ranks, so that the
number of workers changes nothing but rounding and the draws of dropout.

Each epoch draws the order of the parts anew, fills a shuffle buffer with one part after another, and draws the order
of the windows in it; the next buffer is loaded meanwhile. So the tokens of two buffers are all that memory holds, and
the first epoch begins when the first buffer's parts have come. Knows no files, no ray.

Shapes: P parts, W windows, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.batching import token_batches
from pipelines.errors import SettingsError
from pipelines.losses import Loss
from pipelines.model import WindowModel, resolve_dtype, to_device
from pipelines.optimization import make_optimizer, make_schedule
from pipelines.settings import Dtype, TrainSettings
from pipelines.tokenization import CutDocuments, InputRows, assemble


@dataclass(frozen=True)
class LabelledWindows:
    """Cut documents with their targets: (D,) int64 label ids, (D, L) float32, or (D,) float32 values."""

    cut: CutDocuments
    targets: NDArray[np.generic]
    row_D: NDArray[np.int64] | None = None
    """Which documents of the corpus these are; None for all of them."""

    @cached_property
    def length_W(self) -> NDArray[np.int64]:
        """Tokens of each window's input row, special tokens included."""
        return self.cut.length_W


@dataclass(frozen=True)
class PartCounts:
    """What is known of a part's windows without cutting them."""

    num_windows: int
    num_tokens: int = 0
    """Of all input rows, special tokens included."""
    num_truncated: int = 0
    """Documents of which some tokens are in no window."""


@dataclass(frozen=True)
class WindowParts:
    """The windows of a corpus, in parts that may still be on their way."""

    num_documents_P: NDArray[np.int64]
    """Documents of each part, which are known before it has come."""
    counts: Callable[[int], PartCounts]
    """Of a part; waits until it has come."""
    fingerprint: str
    """Changes with any window or target."""
    load: Callable[[tuple[int, ...]], LabelledWindows]
    """The windows of the parts given, numbered through; called from another thread."""
    name: Callable[[int], str] = "document {}".format
    """What people call a document of the corpus."""
    order: tuple[int, ...] | None = None
    """Parts in the order in which they come: the first epoch takes them so."""

    @property
    def num_parts(self) -> int:
        """How many, those on their way too."""
        return len(self.num_documents_P)

    def num_windows(self, parts: Iterable[int]) -> int:
        """Of these parts together."""
        return sum(self.counts(part).num_windows for part in parts)

    def first(self) -> LabelledWindows:
        """The first part that has a window; one has."""
        return self.load((next(part for part in self.order or range(self.num_parts) if self.num_windows([part])),))

    def names(self, data: LabelledWindows, index_W: NDArray[np.integer]) -> list[str]:
        """What people call the documents of windows, each once."""
        document = np.unique(data.cut.windows.document_W[index_W])
        return [self.name(int(row)) for row in (document if data.row_D is None else data.row_D[document])]


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank."""

    data: LabelledWindows
    """What the buffer holds."""
    index_W: NDArray[np.int64]
    """This rank's windows of the step; where there are fewer than ranks, one window that counts nothing."""
    share_W: NDArray[np.float32]
    """Weight of each in the mean."""
    normalizer: float
    """Denominator of the mean over all ranks."""
    ends_epoch: bool
    """Whether it is the last of its epoch."""
    num_steps: int | None = None
    """Of the whole run, as far as it is known here; None: as before."""


def buffers_of(data: WindowParts, settings: TrainSettings, epoch: int) -> Iterator[tuple[int, ...]]:
    """Parts that are shuffled together in an epoch, one buffer after another; every part is in exactly one."""
    drawn = np.random.default_rng([settings.seed, epoch]).permutation(data.num_parts).tolist()
    buffer: list[int] = []
    filled = 0
    for part in drawn if epoch or data.order is None else data.order:
        num_windows = data.num_windows([part])
        if buffer and filled + num_windows > settings.shuffle_buffer:
            yield tuple(buffer)
            buffer, filled = [], 0
        buffer.append(part)
        filled += num_windows
    if len(buffer) == data.num_parts:  # where one buffer holds all, how they are cut into parts is no matter
        buffer.sort()
    yield tuple(buffer)


def steps_of_epoch(data: WindowParts, settings: TrainSettings, epoch: int) -> int:
    """Optimizer steps of an epoch; the last of each buffer may be smaller. Waits for all parts."""
    return sum(_num_steps(data, parts, settings) for parts in buffers_of(data, settings, epoch))


def steps_of_run(data: WindowParts, settings: TrainSettings) -> int:
    """Optimizer steps of all epochs, as far as the first buffer that has windows tells."""
    return next(_buffers_after(data, settings, 0, 0)).num_steps


def plan_steps(
    data: WindowParts,
    settings: TrainSettings,
    loss: Loss,
    *,
    epoch: int,
    rank: int,
    world_size: int,
    skip: int = 0,
) -> Iterator[Step]:
    """The optimizer steps of one epoch after the first `skip`, as rank sees them.

    Every window of the epoch is in exactly one step of one rank. Buffers that are skipped whole are not loaded.
    """
    size = settings.batch_size * settings.gradient_accumulation_steps
    for buffer, windows, is_last in _loaded_ahead(data.load, _buffers_after(data, settings, epoch, skip)):
        order = np.random.default_rng([settings.seed, epoch, buffer.number]).permutation(len(windows.length_W))
        batches = [order[start : start + size] for start in range(buffer.skip * size, len(order), size)]
        for step in steps_of(batches, windows, settings, loss, rank=rank, world_size=world_size):
            ends_epoch = step.ends_epoch and is_last()
            yield replace(step, ends_epoch=ends_epoch, num_steps=buffer.num_steps)


def steps_of(
    batches: list[NDArray[np.int64]],
    data: LabelledWindows,
    settings: TrainSettings,
    loss: Loss,
    *,
    rank: int,
    world_size: int,
) -> Iterator[Step]:
    """One step per batch of window numbers, which are dealt to the ranks by length, so that none waits for another."""
    document_W = data.cut.windows.document_W
    share_W = loss.shares(data.cut.windows)
    normalizer_W = share_W * loss.normalizers(data.targets[document_W])
    for number, together in enumerate(batches, 1):
        longest_first = np.argsort(-data.length_W[together], kind="stable")
        mine = together[longest_first[rank::world_size]]
        shares = share_W[mine]
        if not len(mine):
            mine, shares = together[:1], np.zeros(1, np.float32)
        normalizer = float(normalizer_W[together].sum()) or 1.0  # 0: every weight is, and so the loss
        yield Step(data, mine, shares, normalizer, ends_epoch=number == len(batches))


class Stepper:
    """A model in training with its optimizer, schedule and gradient scaler."""

    def __init__(
        self, model: WindowModel, example: CutDocuments, settings: TrainSettings, loss: Loss, num_steps: int
    ) -> None:
        """Model weights must be float32; example has a window; the schedule is one for num_steps (`lay_out`)."""
        self._model, self._settings, self._loss = model, settings, loss
        if settings.activation_checkpointing:
            _checkpoint_activations(model.module)
        self._frozen = _freeze_unreached(model, example)
        self._forward = _distributed(model)
        self._dtype = shared_dtype(settings.train_dtype, model.device)
        self._optimizer = make_optimizer(model.module, settings)
        self._schedule = make_schedule(self._optimizer, settings, num_steps)
        self._scaler = torch.amp.GradScaler(model.device.type, enabled=self._dtype == torch.float16)

    @property
    def learning_rate(self) -> float:
        """Of the next step, in the last group of parameters: the one without options of its own."""
        return float(self._schedule.get_last_lr()[-1])

    def lay_out(self, num_steps: int) -> None:
        """Go on with the schedule of a run of so many steps, at the step that is next."""
        state = self._schedule.state_dict()
        self._schedule = make_schedule(self._optimizer, self._settings, num_steps)
        if state["last_epoch"] > 0:  # torch's word for steps done
            self._schedule.load_state_dict({**state, "last_epoch": state["last_epoch"] - 1})
            self._schedule.step()

    def __call__(self, step: Step, number: int) -> Tensor:
        """Run optimizer step `number` of the run; this rank's part of its global mean loss, on the device; NaN where
        gradients are not finite, and the weights no longer either.

        The draws of dropout depend on seed, number and rank alone, so that a run that goes on from a checkpoint
        draws what the unbroken one would have drawn.
        """
        torch.manual_seed(((self._settings.seed * 1_000_003 + number) * 65_536 + rank()) % 2**63)
        loss = self._backward(step)
        return torch.where(self._update(), loss, torch.nan)

    def release(self) -> None:
        """Let those parameters learn again that this run froze; the caller's own frozen ones stay so."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        if self._settings.activation_checkpointing:
            _switch_checkpointing(self._model.module, "disable")()

    def state(self) -> dict[str, Any]:
        """What the next steps depend on beside the weights."""
        parts = (self._optimizer, self._schedule, self._scaler)
        return {type(part).__name__: part.state_dict() for part in parts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        for part in (self._optimizer, self._schedule, self._scaler):
            if state[type(part).__name__]:  # a scaler's is empty, where the run was not in float16
                part.load_state_dict(state[type(part).__name__])

    def _backward(self, step: Step) -> Tensor:
        model, data, cut = self._model, step.data, step.data.cut
        total = torch.zeros((), device=model.device)
        lengths = data.length_W[step.index_W]
        parts = token_batches(lengths, batch_tokens=self._settings.train_batch_tokens, padded=not model.is_packed)
        for number, part in enumerate(parts):
            index_W = step.index_W[part]
            rows = assemble(cut, model.template, index_W)
            target = to_device(data.targets[cut.windows.document_W[index_W]], model.device)
            share = to_device(step.share_W[part], model.device)
            with self._synchronized(number == len(parts) - 1):
                with torch.autocast(model.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
                    logits_WL = self._forward(rows)
                mean = (self._loss(logits_WL, target) * share).sum() / step.normalizer
                self._scaler.scale(mean * world_size()).backward()  # ranks' gradients are averaged
            total += mean.detach()
        return total

    def _synchronized(self, is_last: bool) -> Any:
        """Ranks exchange gradients once a step, with its last part."""
        if is_last or not isinstance(self._forward, DistributedDataParallel):
            return nullcontext()
        return self._forward.no_sync()

    def _update(self) -> Tensor:
        """Whether the gradients were finite, or a scaler passes over such a step and lowers its scale."""
        self._scaler.unscale_(self._optimizer)
        most = self._settings.max_grad_norm or torch.inf
        norm = torch.nn.utils.clip_grad_norm_(self._model.module.parameters(), most)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        self._model.module.zero_grad(set_to_none=True)
        return torch.isfinite(norm) | self._scaler.is_enabled()


def rank() -> int:
    """Number of the process in its group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shared_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The arithmetic that every rank has: of unlike GPUs float16, of unlike CPUs float32."""
    mine = resolve_dtype(dtype, device)
    if world_size() == 1:
        return mine
    all_of_them = [mine] * world_size()
    dist.all_gather_object(all_of_them, mine)
    return next(one for one in (torch.float32, torch.float16, torch.bfloat16) if one in all_of_them)


@dataclass(frozen=True)
class _Buffer:
    """Parts that are shuffled together."""

    number: int
    """In its epoch."""
    parts: tuple[int, ...]
    skip: int
    """Steps of it that are done."""
    num_steps: int
    """Of the run, as far as the parts up to here tell."""


def _buffers_after(data: WindowParts, settings: TrainSettings, epoch: int, skip: int) -> Iterator[_Buffer]:
    """The buffers of an epoch, without the first `skip` steps.

    The run's length is judged by what was read up to a buffer, as if all other documents had as many windows: the same
    on every rank and in every run, since no other part is looked at, and exact when all are read.
    """
    left = num_documents = int(data.num_documents_P.sum())
    exact = _exact_steps(data, settings) if epoch else None
    steps_read = 0
    for number, parts in enumerate(buffers_of(data, settings, epoch)):
        num_steps = _num_steps(data, parts, settings)
        steps_read += num_steps
        left -= int(data.num_documents_P[list(parts)].sum())
        if num_steps > skip:
            if exact is None and not left:
                exact = _exact_steps(data, settings)
            judged = max(1, round(steps_read * num_documents / (num_documents - left))) * settings.epochs
            yield _Buffer(number, parts, skip, judged if exact is None else exact)
        skip = max(0, skip - num_steps)


def _exact_steps(data: WindowParts, settings: TrainSettings) -> int:
    """Optimizer steps of all epochs. Waits for all parts."""
    return sum(steps_of_epoch(data, settings, epoch) for epoch in range(settings.epochs))


def _num_steps(data: WindowParts, parts: Collection[int], settings: TrainSettings) -> int:
    return -(-data.num_windows(parts) // (settings.batch_size * settings.gradient_accumulation_steps))


def _loaded_ahead(
    load: Callable[[tuple[int, ...]], LabelledWindows], buffers: Iterator[_Buffer]
) -> Iterator[tuple[_Buffer, LabelledWindows, Callable[[], bool]]]:
    """Each buffer in turn, loaded, and whether it is the last; the next is loaded while the caller works on one."""

    def fetch() -> tuple[_Buffer, LabelledWindows] | None:
        buffer = next(buffers, None)
        return None if buffer is None else (buffer, load(buffer.parts))

    pool = ThreadPoolExecutor(1)
    try:
        found = pool.submit(fetch).result()
        while found is not None:
            coming = pool.submit(fetch)
            yield *found, lambda coming=coming: coming.result() is None  # type: ignore[misc]
            found = coming.result()
    finally:
        pool.shutdown(wait=False)  # who stops early does not wait for parts that may never come


class _Forward(nn.Module):
    """The window model as a module, so that DistributedDataParallel sees its parameters and its call."""

    def __init__(self, model: WindowModel) -> None:
        super().__init__()
        self.module = model.module
        self._model = model

    def forward(self, rows: InputRows) -> Tensor:
        return self._model(rows)


def _freeze_unreached(model: WindowModel, cut: CutDocuments) -> list[nn.Parameter]:
    """Freeze, and return, parameters that one window's loss does not reach: a pooler that the head skips, say.

    Ranks would wait for their gradients for ever.
    """
    _Forward(model)(assemble(cut, model.template, np.zeros(1, np.int64))).float().sum().backward()
    unreached = [p for p in model.module.parameters() if p.requires_grad and p.grad is None]
    for parameter in unreached:
        parameter.requires_grad_(False)
    model.module.zero_grad(set_to_none=True)
    return unreached


def _checkpoint_activations(module: Any) -> None:
    """Raise SettingsError where the architecture cannot."""
    try:
        _switch_checkpointing(module, "enable")({"use_reentrant": False})
    except ValueError as error:  # transformers' word for it
        raise SettingsError(f"activation_checkpointing=true: {module.config.model_type} cannot do it") from error


def _switch_checkpointing(module: Any, verb: str) -> Callable[..., None]:
    """The method of transformers, which has renamed it."""
    new, old = f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}"
    switch: Callable[..., None] = getattr(module, new if hasattr(module, new) else old)
    return switch


def _distributed(model: WindowModel) -> nn.Module:
    """The forward that trains: under DistributedDataParallel where there are several ranks."""
    forward = _Forward(model)
    if world_size() == 1:
        return forward
    devices = [model.device] if model.device.type == "cuda" else None
    return DistributedDataParallel(forward, device_ids=devices)
