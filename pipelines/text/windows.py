"""Compute where windows begin and end in token sequences, and merge the values of windows into values of documents.

`tokenization.cut_documents` applies this to the tokens of documents.

All functions work on token counts and offsets of many documents at once. Imports neither torch nor Ray.

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
"""A step below budget / 16 scores every token more than 16 times. It is an error unless dense_windows is set."""
DEFAULT_MAX_LENGTH = 512
"""Tokens per window, unless the settings or the limit of the model say otherwise."""
SIMPLETRANSFORMERS_RESERVES_3 = frozenset(
    {"roberta", "camembert", "xlmroberta", "xlm-roberta", "longformer", "mpnet", "nystromformer"}
)
"""Model types for which Simple Transformers 0.70.8 reserves 3 special tokens. It reserves 2 for all others."""


@dataclass(frozen=True)
class WindowPlan:
    """Window settings converted to tokens, for one tokenizer and model."""

    max_length: int
    """Tokens of a full window, including special tokens."""
    budget: int
    """Text tokens of a full window."""
    step: int
    """Tokens from the start of a window to the start of the next, from 1 to budget."""
    sliding: bool = True
    """If false, each document has one window and the tokens after it are cut."""
    tails: bool = False
    """Whether to add the windows that start after the first one that reaches the end, as Simple Transformers does."""
    max_windows: int | None = None
    """Maximum number of windows per document, or None for no maximum."""

    def with_max_windows(self, max_windows: int | None) -> WindowPlan:
        """Return the same plan with another max_windows."""
        return replace(self, max_windows=max_windows)


@dataclass(frozen=True)
class Windows:
    """Windows of D documents, in document order.

    Window w contains the tokens [start_W[w], stop_W[w]) of document document_W[w]. Document d owns the windows from
    offsets[d] up to but excluding offsets[d + 1], and always at least one. offsets has D + 1 entries. All arrays are
    int64, except truncated_D.
    """

    document_W: NDArray[np.int64]
    start_W: NDArray[np.int64]
    stop_W: NDArray[np.int64]
    offsets: NDArray[np.int64]
    truncated_D: NDArray[np.bool_]
    """Whether some tokens of the document are in no window."""

    @property
    def num_windows_D(self) -> NDArray[np.int64]:
        """Number of windows of each document, at least 1."""
        return np.diff(self.offsets)

    def where(self, kept_W: NDArray[np.bool_]) -> Windows:
        """Return only some of the windows of the same documents."""
        document_W = self.document_W[kept_W]
        counts_D = np.bincount(document_W, minlength=len(self.offsets) - 1)
        offsets = np.concatenate([[0], np.cumsum(counts_D)])
        return Windows(document_W, self.start_W[kept_W], self.stop_W[kept_W], offsets, self.truncated_D)

    def slice(self, start: int, stop: int) -> Windows:
        """Return the windows of documents [start, stop), with the documents renumbered from 0."""
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
    """Convert window settings to token counts for a tokenizer and a model.

    Args:
        settings: Window settings.
        num_special_tokens: Number of special tokens that the tokenizer adds to one text.
        model_limit: Number of positions of the model, or None for no limit.
        model_type: Architecture of the model. Only the simpletransformers plan uses it.

    Raises:
        SettingsError: max_length is above the model's limit or leaves no room for text, or the step would skip tokens,
            never end, or score every token more than 16 times.
    """
    max_length = _max_length(settings.max_length, model_limit)
    simpletransformers = settings.window_plan == "simpletransformers"
    reserved = num_special_tokens
    if simpletransformers and settings.sliding_window:  # otherwise Simple Transformers lets the tokenizer truncate
        reserved = 3 if (settings.window_model_type or model_type) in SIMPLETRANSFORMERS_RESERVES_3 else 2
    budget = max_length - reserved
    if budget < 1:
        raise SettingsError(
            f"max_length={max_length} leaves no room for text: {reserved} special tokens are added; "
            f"use at least {reserved + 1}"
        )
    step = _step(settings, max_length, budget) if settings.sliding_window else budget
    return WindowPlan(max_length, budget, step, settings.sliding_window, simpletransformers, settings.max_windows)


def most_tokens_of(settings: WindowSettings) -> int | None:
    """Return how many tokens from the start of a text are enough for its windows. None: all of them are needed."""
    most = settings.max_windows if settings.sliding_window else 1
    return None if most is None else most * (settings.max_length or DEFAULT_MAX_LENGTH) + 1


def leads_with_space(settings: WindowSettings, model_type: str) -> bool:
    """Return whether a space is put before each text.

    Simple Transformers does this for RoBERTa and related models when it uses sliding windows.
    """
    is_theirs = settings.window_plan == "simpletransformers" and settings.sliding_window
    return is_theirs and (settings.window_model_type or model_type) in SIMPLETRANSFORMERS_RESERVES_3


def plan_windows(
    num_tokens_D: NDArray[np.integer], plan: WindowPlan, *, budget_D: NDArray[np.integer] | None = None
) -> Windows:
    """Compute the windows of documents from their token counts.

    A document with at most budget tokens, also one without tokens, has one window. A longer one has windows that start
    at 0, step, 2 * step, ... up to the first window that reaches the end of the document.

    Args:
        num_tokens_D: Token count of each document.
        plan: Window plan. Its tails and max_windows change the number of windows.
        budget_D: Budget of each document instead of the plan's: the second text of a pair has less room. The step is
            reduced to this budget if it is larger.
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


def concat_windows(pieces: Sequence[Windows]) -> Windows:
    """Concatenate windows in order, and renumber their documents."""
    documents = np.cumsum([0, *(len(piece.truncated_D) for piece in pieces)])
    counts = np.concatenate([piece.num_windows_D for piece in pieces])
    return Windows(
        np.concatenate([piece.document_W + first for piece, first in zip(pieces, documents, strict=False)]),
        np.concatenate([piece.start_W for piece in pieces]),
        np.concatenate([piece.stop_W for piece in pieces]),
        np.concatenate([[0], np.cumsum(counts)]),
        np.concatenate([piece.truncated_D for piece in pieces]),
    )


def merge_windows(
    values_WL: NDArray[np.floating], offsets: NDArray[np.int64], how: Literal["mean", "max"]
) -> NDArray[np.float32]:
    """Merge the values of each document's windows by mean or max.

    Args:
        values_WL: Values of windows, (W, L) or (W,).
        offsets: First window of each document, (D + 1,), as in `Windows`.
        how: mean is summed in float64.

    Returns:
        Values of documents, (D, L) or (D,).
    """
    if len(offsets) == 1:
        return np.zeros((0, *values_WL.shape[1:]), dtype=np.float32)
    if how == "max":
        return np.asarray(np.maximum.reduceat(values_WL, offsets[:-1], axis=0), dtype=np.float32)
    sums = np.add.reduceat(values_WL, offsets[:-1], axis=0, dtype=np.float64)
    counts = np.diff(offsets).reshape(-1, *[1] * (values_WL.ndim - 1))
    return np.asarray(sums / counts, dtype=np.float32)


def count_votes(values_WL: NDArray[np.floating], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count in how many of a document's windows each label has the highest value: (W, L) to (D, L).

    If values in a window are equal, the lower label id gets the vote, as in argmax.
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
            f"holds {budget} tokens of text; use 1.0 for windows without overlap, or an int from 1 to {budget}"
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
