"""Cut token sequences into windows, and merge what was said of the windows back: inverse operations.

Works on counts and offsets alone, for a million documents at once. Knows no tokens, no texts, no torch, no ray.

Shapes: D documents, W windows of all documents together, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import SettingsError
from pipelines.settings import WindowSettings

DENSEST_SHARE = 16
"""A step below budget / 16 scores every token more than 16 times: refused unless asked for."""
DEFAULT_MAX_LENGTH = 512
SIMPLETRANSFORMERS_RESERVES_3 = frozenset(
    {"roberta", "camembert", "xlmroberta", "xlm-roberta", "longformer", "mpnet", "nystromformer"}
)
"""Model types for which Simple Transformers 0.70.8 reserves three special tokens."""


@dataclass(frozen=True)
class WindowPlan:
    """Settings that have met a tokenizer: everything in tokens."""

    max_length: int
    """Tokens of a full window, special tokens included."""
    budget: int
    """Tokens of text in a full window."""
    step: int
    """Tokens from one window's start to the next, 1 to budget."""
    sliding: bool = True
    """False: one window a document, the rest is cut."""
    tails: bool = False
    """Also windows that start inside the text but end at its end again, as Simple Transformers cuts them."""
    max_windows: int | None = None
    """Cap on the windows of one document."""

    def with_max_windows(self, max_windows: int | None) -> WindowPlan:
        """The same plan under another cap."""
        return replace(self, max_windows=max_windows)


@dataclass(frozen=True)
class Windows:
    """Windows of D documents, in document order.

    Window w of all W is tokens [start_W[w], stop_W[w]) of document document_W[w]; document d owns windows
    offsets[d] to offsets[d + 1] (offsets has D + 1 entries), at least one. All arrays are int64.
    """

    document_W: NDArray[np.int64]
    start_W: NDArray[np.int64]
    stop_W: NDArray[np.int64]
    offsets: NDArray[np.int64]
    truncated_D: NDArray[np.bool_]
    """Whether tokens of the document are in no window."""

    @property
    def num_windows_D(self) -> NDArray[np.int64]:
        """Windows of each document, all at least 1."""
        return np.diff(self.offsets)

    def part(self, start: int, stop: int) -> Windows:
        """The windows of documents [start, stop), which are numbered from 0 again."""
        offsets = self.offsets[start : stop + 1]
        own = slice(offsets[0], offsets[-1])
        return Windows(
            self.document_W[own] - start,
            self.start_W[own],
            self.stop_W[own],
            offsets - offsets[0],
            self.truncated_D[start:stop],
        )


def resolve_plan(
    settings: WindowSettings, *, num_special_tokens: int, model_limit: int | None = None, model_type: str = ""
) -> WindowPlan:
    """Turn settings into token counts, once tokenizer and model are known.

    num_special_tokens is what the tokenizer really adds around one text; model_limit is the number of positions
    that the model has, None for no limit. Raises SettingsError for a max_length above the model's limit or
    without room for text, and for a step that would skip tokens, never end, or cost absurdly much.
    """
    max_length = _max_length(settings.max_length, model_limit)
    simpletransformers = settings.window_plan == "simpletransformers"
    reserved = num_special_tokens
    if simpletransformers and settings.sliding_window:  # without windows it leaves truncation to the tokenizer
        reserved = 3 if (settings.window_model_type or model_type) in SIMPLETRANSFORMERS_RESERVES_3 else 2
    budget = max_length - reserved
    if budget < 1:
        raise SettingsError(
            f"max_length={max_length} leaves no room for text: {reserved} special tokens are added; "
            f"use at least {reserved + 1}"
        )
    step = _step(settings, max_length, budget) if settings.sliding_window else budget
    return WindowPlan(max_length, budget, step, settings.sliding_window, simpletransformers, settings.max_windows)


def leads_with_space(settings: WindowSettings, model_type: str) -> bool:
    """Whether a space goes before each text: Simple Transformers puts one before RoBERTa's kin when it cuts windows."""
    is_theirs = settings.window_plan == "simpletransformers" and settings.sliding_window
    return is_theirs and (settings.window_model_type or model_type) in SIMPLETRANSFORMERS_RESERVES_3


def plan_windows(
    num_tokens_D: NDArray[np.integer], plan: WindowPlan, *, budget_D: NDArray[np.integer] | None = None
) -> Windows:
    """Windows of documents of the given token counts.

    One window where the count is at most the budget (also for no tokens at all), else windows at 0, step,
    2 * step, ... up to the first that reaches the end. budget_D replaces the plan's budget per document (the
    second texts of pairs have less room); a step above it is brought down to it.
    """
    lengths: NDArray[np.int64] = np.asarray(num_tokens_D).astype(np.int64)
    budget = np.full_like(lengths, plan.budget) if budget_D is None else np.asarray(budget_D).astype(np.int64)
    step = np.minimum(plan.step, budget)
    count = _window_counts(lengths, budget, step, plan)
    offsets = np.concatenate([[0], np.cumsum(count)])
    document_W = np.repeat(np.arange(len(count)), count)
    start_W = (np.arange(offsets[-1]) - offsets[document_W]) * step[document_W]
    stop_W = np.minimum(start_W + budget[document_W], lengths[document_W])
    truncated_D = stop_W[offsets[1:] - 1] < lengths
    return Windows(document_W, start_W, stop_W, offsets, truncated_D)


def concat_windows(parts: Sequence[Windows]) -> Windows:
    """The windows of all parts, in order, their documents numbered through."""
    documents = np.cumsum([0, *(len(part.truncated_D) for part in parts)])
    counts = np.concatenate([part.num_windows_D for part in parts])
    return Windows(
        np.concatenate([part.document_W + first for part, first in zip(parts, documents, strict=False)]),
        np.concatenate([part.start_W for part in parts]),
        np.concatenate([part.stop_W for part in parts]),
        np.concatenate([[0], np.cumsum(counts)]),
        np.concatenate([part.truncated_D for part in parts]),
    )


def merge_windows(
    values_WL: NDArray[np.floating], offsets: NDArray[np.int64], how: Literal["mean", "max"]
) -> NDArray[np.float32]:
    """Mean or max over each document's windows: (W, L) or (W,) to (D, L) or (D,), summed in float64."""
    if len(offsets) == 1:
        return np.zeros((0, *values_WL.shape[1:]), dtype=np.float32)
    if how == "max":
        return np.asarray(np.maximum.reduceat(values_WL, offsets[:-1], axis=0), dtype=np.float32)
    sums = np.add.reduceat(values_WL, offsets[:-1], axis=0, dtype=np.float64)
    counts = np.diff(offsets).reshape(-1, *[1] * (values_WL.ndim - 1))
    return np.asarray(sums / counts, dtype=np.float32)


def count_votes(values_WL: NDArray[np.floating], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of a document's windows have each label as their largest: (W, L) to (D, L).

    Of equal values the lower label wins its window, as in argmax.
    """
    num_documents, num_labels = len(offsets) - 1, values_WL.shape[1]
    document_W = np.repeat(np.arange(num_documents), np.diff(offsets))
    cell_W = document_W * num_labels + values_WL.argmax(axis=1)
    return np.bincount(cell_W, minlength=num_documents * num_labels).reshape(num_documents, num_labels)


def _max_length(wanted: int | None, model_limit: int | None) -> int:
    if wanted is None:
        return min(DEFAULT_MAX_LENGTH, model_limit or DEFAULT_MAX_LENGTH)
    if model_limit is not None and wanted > model_limit:
        raise SettingsError(f"max_length={wanted} is above the model's {model_limit} positions; use at most that")
    return wanted


def _step(settings: WindowSettings, max_length: int, budget: int) -> int:
    stride = settings.stride
    if isinstance(stride, int):
        step = stride
    else:
        step = budget if stride == 1.0 else int(max_length * stride)
    if not 1 <= step <= budget:
        problem = "skip tokens" if step > budget else "never end"
        raise SettingsError(
            f"stride={stride} with max_length={max_length} steps {step} tokens and would {problem}: a window "
            f"holds {budget} tokens of text; use 1.0 for windows back to back, or an int from 1 to {budget}"
        )
    if step * DENSEST_SHARE < budget and not settings.dense_windows:
        raise SettingsError(
            f"stride={stride} steps {step} tokens with windows of {budget}: every token would be scored about "
            f"{budget // step} times; use 0.8 (a fraction) for the usual overlap, or set dense_windows=true"
        )
    return step


def _window_counts(
    num_tokens: NDArray[np.int64], budget: NDArray[np.int64], step: NDArray[np.int64], plan: WindowPlan
) -> NDArray[np.int64]:
    if not plan.sliding:
        return np.ones_like(num_tokens)
    beyond = num_tokens if plan.tails else num_tokens - budget + step
    count = np.where(num_tokens > budget, -(-beyond // step), 1)
    return count if plan.max_windows is None else np.minimum(count, plan.max_windows)
