"""Group windows into batches within a token budget, and find windows with the same tokens.

Shapes: W windows, T tokens of all windows together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.text.template import Template
from pipelines.text.tokenization import CutDocuments, InputRows, assemble

HASHED_TOKENS = 2**16
"""Tokens of the windows whose hashes are computed together."""


def token_batches(length_W: NDArray[np.integer], *, batch_tokens: int, padded: bool) -> list[NDArray[np.int64]]:
    """Group windows into batches that stay within a token budget, longest windows first.

    Without padding, the cost of a batch is the sum of its window lengths. With padding, the cost is the longest length
    times the number of windows. Windows of equal length keep their order, so the same lengths always give the same
    batches. To restore the original order, write the results of each batch at its window indices.

    Args:
        length_W: Tokens of each window, (W,).
        batch_tokens: Maximum cost of a batch, in tokens. A window that is longer forms a batch of its own.
        padded: Whether all windows of a batch are padded to the longest one.

    Returns:
        Window indices of each batch. Every window is in exactly one batch.
    """
    order_W = np.argsort(-np.asarray(length_W, dtype=np.int64), kind="stable")
    sorted_W = np.maximum(np.asarray(length_W, dtype=np.int64)[order_W], 1)
    cumulative = np.concatenate([[0], np.cumsum(sorted_W)])
    batches, start = [], 0
    while start < len(order_W):
        if padded:
            size = batch_tokens // int(sorted_W[start])
        else:
            end = np.searchsorted(cumulative, cumulative[start] + batch_tokens, side="right") - 1
            size = int(end) - start
        stop = min(start + max(size, 1), len(order_W))
        batches.append(order_W[start:stop])
        start = stop
    return batches


def first_of_equal(cut: CutDocuments, template: Template, index_W: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return, for each window, the place in index_W of the first window with the same tokens.

    Windows are compared by a hash first. Those with the same hash are then compared token by token.

    Args:
        cut: Documents cut into windows.
        template: Special tokens of the tokenizer.
        index_W: Indices of the windows to compare.

    Returns:
        Places (W,). A window that is the first of its kind has its own place.
    """
    if len(index_W) < 2:
        return np.arange(len(index_W))
    length_W = cut.length_W
    ends_W = np.cumsum(length_W[index_W])
    parts = np.split(index_W, np.searchsorted(ends_W, np.arange(HASHED_TOKENS, ends_W[-1], HASHED_TOKENS)))
    draws = np.random.default_rng(1).integers(2**63, size=int(length_W[index_W].max()), dtype=np.uint64)
    hash_W = np.concatenate([_hashes(assemble(cut, template, part), draws * 2 + 1) for part in parts if len(part)])
    _, first, group_W = np.unique(hash_W, return_index=True, return_inverse=True)
    first_W = first[group_W]
    copies = np.flatnonzero(first_W != np.arange(len(first_W)))
    for part in np.array_split(copies, -(-int(length_W[index_W[copies]].sum()) // HASHED_TOKENS) or 1):
        differ = _different(assemble(cut, template, index_W[part]), assemble(cut, template, index_W[first_W[part]]))
        first_W[part[differ]] = part[differ]
    return first_W


def _hashes(rows: InputRows, factor_S: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a hash of each window's tokens and types: a sum of products with odd factors, modulo 2**64."""
    length_W = rows.length_W
    place_T = np.arange(len(rows.ids)) - np.repeat(rows.offsets[:-1], length_W)
    value_T = (rows.ids * 2 + rows.type_ids + 1).astype(np.uint64)
    value_T = (value_T * np.uint64(0x9E3779B97F4A7C15)) ^ (value_T << np.uint64(29))
    sums_W = np.add.reduceat(value_T * factor_S[place_T], rows.offsets[:-1])
    found_W: NDArray[np.uint64] = sums_W + length_W.astype(np.uint64)
    return found_W


def _different(rows: InputRows, others: InputRows) -> NDArray[np.bool_]:
    """Return for each pair of windows whether they differ."""
    differ_W: NDArray[np.bool_] = np.asarray(rows.length_W != others.length_W)
    same = np.flatnonzero(~differ_W)
    if len(same):
        one, other = rows.take(same), others.take(same)
        unequal_T = (one.ids != other.ids) | (one.type_ids != other.type_ids)
        differ_W[same] = np.logical_or.reduceat(unequal_T, one.offsets[:-1])
    return differ_W
