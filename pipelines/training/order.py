"""The order of training: which windows each rank runs in which optimizer step.

The seed determines the windows of every step. The ranks take equal shares of them, and the loss is averaged over the
windows of all ranks. Therefore, the number of workers changes only rounding and the random numbers of dropout.

Each epoch draws a new order of the units, fills a shuffle buffer with one unit after another, and draws the order of
the windows in it. The next buffer is loaded while the current one is used, so memory contains the tokens of two
buffers. The first epoch takes the units in the order in which they arrive, and begins when the first buffer is full.

Shapes: U units, D documents, W windows, L labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from pipelines.model.scorer import Scorer
from pipelines.text.tokenization import CutDocuments, Tokens, concat_documents, cut_documents, offsets_of
from pipelines.training.corpus import Corpus, UnitLengths
from pipelines.training.losses import Loss
from pipelines.training_settings import TrainSettings


@dataclass(frozen=True)
class LabelledWindows:
    """Cut documents with their targets: (D,) int64 label ids, (D, L) float32, or (D,) float32 values."""

    cut: CutDocuments
    targets: NDArray[np.generic]
    row_D: NDArray[np.int64] | None = None
    """Row in the corpus of each document. None means that the documents are all rows, in order."""

    @cached_property
    def length_W(self) -> NDArray[np.int64]:
        """Number of tokens of each window's input row, including special tokens."""
        return self.cut.length_W


@dataclass(frozen=True)
class WindowCounts:
    """Counts of a unit's windows. They are computed without cutting the texts."""

    num_windows: int
    num_tokens: int = 0
    """Number of tokens of all input rows, including special tokens."""
    num_truncated: int = 0
    """Number of documents that have tokens in no window."""


@dataclass(frozen=True)
class TrainingWindows:
    """The windows of a corpus, in units that may not have arrived yet."""

    num_documents_U: NDArray[np.int64]
    """Number of documents of each unit. Known before the unit has arrived."""
    counts: Callable[[int], WindowCounts]
    """Returns the counts of a unit. Waits until it has arrived."""
    fingerprint: str
    """Changes if any window or target changes."""
    load: Callable[[tuple[int, ...]], LabelledWindows]
    """Returns the windows of the given units, numbered from 0. Called from another thread."""
    name: Callable[[int], str] = "document {}".format
    """Returns the display name of a document, given its row in the corpus."""
    order: tuple[int, ...] | None = None
    """Units in the order in which they arrive. The first epoch uses this order."""

    @property
    def num_units(self) -> int:
        """Number of units, including those that have not arrived."""
        return len(self.num_documents_U)

    def num_windows(self, units: Iterable[int]) -> int:
        """Return the number of windows of these units together."""
        return sum(self.counts(unit).num_windows for unit in units)

    def first(self) -> LabelledWindows:
        """Load the first unit that has a window."""
        return self.load((next(unit for unit in self.order or range(self.num_units) if self.num_windows([unit])),))

    def names(self, data: LabelledWindows, index_W: NDArray[np.integer]) -> list[str]:
        """Return the display names of the documents of windows, without duplicates."""
        document = np.unique(data.cut.windows.document_W[index_W])
        return [self.name(int(row)) for row in (document if data.row_D is None else data.row_D[document])]


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank."""

    data: LabelledWindows
    """The shuffle buffer."""
    index_W: NDArray[np.int64]
    """This rank's windows of the step. If there are none, because a step has few windows: one window with share 0."""
    share_W: NDArray[np.float32]
    """Weight of each window in the mean."""
    normalizer: float
    """Denominator of the mean over all ranks."""
    ends_epoch: bool
    """Whether it is the last step of its epoch."""
    num_steps: int | None = None
    """Number of steps of the whole run, or its estimate. None leaves the previous number unchanged."""


def training_windows(scorer: Scorer, train: Corpus, settings: TrainSettings) -> TrainingWindows:
    """Return the training windows of a corpus, for the scorer's window plan and train_max_windows of the settings.

    The windows are counted from the lengths of the documents. They are cut when a buffer is loaded.

    Raises:
        DataError: No document has a text.
    """
    train.check_texts()
    plan, template = scorer.plan, scorer.tokenizer.template
    if settings.train_max_windows is not None:
        plan = plan.with_max_windows(settings.train_max_windows)
    digest = hashlib.sha256(f"{train.fingerprint} {plan}".encode()).hexdigest()

    @cache
    def counts(unit: int) -> WindowCounts:
        lengths = train.lengths(unit)
        cut = cut_documents(_only_lengths(lengths.num_tokens_D), plan, template, _only_pair_lengths(lengths))
        return WindowCounts(len(cut.windows.document_W), int(cut.length_W.sum()), int(cut.windows.truncated_D.sum()))

    @lru_cache(maxsize=1)  # data that fits into one buffer is loaded once
    def load(units: tuple[int, ...]) -> LabelledWindows:
        loaded = [train.load(unit) for unit in units]
        documents = concat_documents([unit.documents for unit in loaded])
        cut = cut_documents(documents.tokens, plan, template, documents.pair_tokens)
        rows = [train.rows(unit) for unit in units]
        return LabelledWindows(cut, np.concatenate([unit.targets for unit in loaded]), np.concatenate(rows))

    return TrainingWindows(np.diff(train.first_row_U), counts, digest, load, train.name, train.order)


def buffers_of(data: TrainingWindows, settings: TrainSettings, epoch: int) -> Iterator[tuple[int, ...]]:
    """Yield the units of each shuffle buffer of an epoch. Every unit is in exactly one buffer."""
    drawn = np.random.default_rng([settings.seed, epoch]).permutation(data.num_units).tolist()
    buffer: list[int] = []
    filled = 0
    for unit in drawn if epoch or data.order is None else data.order:
        num_windows = data.num_windows([unit])
        if buffer and filled + num_windows > settings.shuffle_buffer:
            yield tuple(buffer)
            buffer, filled = [], 0
        buffer.append(unit)
        filled += num_windows
    if len(buffer) == data.num_units:  # if one buffer contains all data, the split into units must not change the order
        buffer.sort()
    yield tuple(buffer)


def num_steps_of_epoch(data: TrainingWindows, settings: TrainSettings, epoch: int) -> int:
    """Return the number of optimizer steps of an epoch. Waits for all units.

    The last step of each buffer may have fewer windows.
    """
    return sum(_num_steps(data, units, settings) for units in buffers_of(data, settings, epoch))


def num_steps_of_run(data: TrainingWindows, settings: TrainSettings) -> int:
    """Estimate the number of optimizer steps of all epochs from the first buffer that has windows."""
    return next(_buffers_after(data, settings, 0, 0)).num_steps


def epoch_steps(
    data: TrainingWindows,
    settings: TrainSettings,
    loss: Loss,
    *,
    epoch: int,
    rank: int,
    world_size: int,
    skip: int = 0,
) -> Iterator[Step]:
    """Yield the optimizer steps of one epoch after the first `skip` steps, for one rank.

    Every window of the epoch is in exactly one step of one rank. A buffer whose steps are all skipped is not loaded.
    """
    size = settings.batch_size * settings.gradient_accumulation_steps
    for buffer, windows, is_last in _loaded_ahead(data.load, _buffers_after(data, settings, epoch, skip)):
        order = np.random.default_rng([settings.seed, epoch, buffer.number]).permutation(len(windows.length_W))
        batches = [order[start : start + size] for start in range(buffer.skip * size, len(order), size)]
        for step in steps_of(batches, windows, loss, rank=rank, world_size=world_size):
            ends_epoch = step.ends_epoch and is_last()
            yield replace(step, ends_epoch=ends_epoch, num_steps=buffer.num_steps)


def steps_of(
    batches: list[NDArray[np.int64]], data: LabelledWindows, loss: Loss, *, rank: int, world_size: int
) -> Iterator[Step]:
    """Yield one step per batch of window indices. Ranks get windows of similar lengths, so that none has to wait."""
    document_W = data.cut.windows.document_W
    share_W = loss.shares(data.cut.windows)
    normalizer_W = share_W * loss.normalizers(data.targets[document_W])
    for number, batch in enumerate(batches, 1):
        longest_first = np.argsort(-data.length_W[batch], kind="stable")
        mine = batch[longest_first[rank::world_size]]
        shares = share_W[mine]
        if not len(mine):
            mine, shares = batch[:1], np.zeros(1, np.float32)
        normalizer = float(normalizer_W[batch].sum()) or 1.0  # 0 if every weight is 0; the loss is then 0 too
        yield Step(data, mine, shares, normalizer, ends_epoch=number == len(batches))


@dataclass(frozen=True)
class _Buffer:
    """Units that are shuffled together."""

    number: int
    """Index of the buffer in its epoch."""
    units: tuple[int, ...]
    skip: int
    """Number of its first steps that are already done."""
    num_steps: int
    """Number of steps of the run, estimated from this buffer and the previous ones."""


def _buffers_after(data: TrainingWindows, settings: TrainSettings, epoch: int, skip: int) -> Iterator[_Buffer]:
    """Yield the buffers of an epoch, without the first `skip` steps.

    The number of steps of the run is estimated from the units of a buffer and the previous ones. All other documents
    are assumed to have the same number of windows on average. The estimate uses no other units, so it is the same on
    every rank and in every run. It is exact from the last buffer of the first epoch on.
    """
    left = num_documents = int(data.num_documents_U.sum())
    exact = _exact_steps(data, settings) if epoch else None
    steps_read = 0
    for number, units in enumerate(buffers_of(data, settings, epoch)):
        num_steps = _num_steps(data, units, settings)
        steps_read += num_steps
        left -= int(data.num_documents_U[list(units)].sum())
        if num_steps > skip:
            if exact is None and not left:
                exact = _exact_steps(data, settings)
            estimate = max(1, round(steps_read * num_documents / (num_documents - left))) * settings.epochs
            yield _Buffer(number, units, skip, estimate if exact is None else exact)
        skip = max(0, skip - num_steps)


def _exact_steps(data: TrainingWindows, settings: TrainSettings) -> int:
    """Return the number of optimizer steps of all epochs. Waits for all units."""
    return sum(num_steps_of_epoch(data, settings, epoch) for epoch in range(settings.epochs))


def _num_steps(data: TrainingWindows, units: Collection[int], settings: TrainSettings) -> int:
    return -(-data.num_windows(units) // (settings.batch_size * settings.gradient_accumulation_steps))


def _loaded_ahead(
    load: Callable[[tuple[int, ...]], LabelledWindows], buffers: Iterator[_Buffer]
) -> Iterator[tuple[_Buffer, LabelledWindows, Callable[[], bool]]]:
    """Yield each buffer, its windows, and a function that returns whether it is the last one.

    The next buffer is loaded while the caller works on the current one.
    """

    def fetch() -> tuple[_Buffer, LabelledWindows] | None:
        buffer = next(buffers, None)
        return None if buffer is None else (buffer, load(buffer.units))

    pool = ThreadPoolExecutor(1)
    try:
        found = pool.submit(fetch).result()
        while found is not None:
            coming = pool.submit(fetch)
            yield *found, lambda coming=coming: coming.result() is None  # type: ignore[misc]
            found = coming.result()
    finally:
        pool.shutdown(wait=False)  # a caller that stops early does not wait for units that may never arrive


def _only_lengths(num_tokens_D: NDArray[np.integer]) -> Tokens:
    """Return texts of the given lengths without ids, for functions that use only the lengths."""
    return Tokens(np.zeros(0, np.int32), offsets_of(num_tokens_D))


def _only_pair_lengths(lengths: UnitLengths) -> Tokens | None:
    return None if lengths.pair_num_tokens_D is None else _only_lengths(lengths.pair_num_tokens_D)
