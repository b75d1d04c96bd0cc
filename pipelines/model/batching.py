"""Group windows into batches within a token budget, and restore the order of their results.

Works on window lengths only.

Shapes: W windows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
