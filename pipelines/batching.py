"""Token-budget batches: which windows run together, and how to put their results back in order.

Knows lengths only. Shapes: W windows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def token_batches(length_W: NDArray[np.integer], *, batch_tokens: int, padded: bool) -> list[NDArray[np.int64]]:
    """Window numbers of each batch, longest windows first, every window in exactly one batch.

    A batch costs the sum of its lengths, or, padded, its longest length times its size; it stays within
    batch_tokens unless a single window is longer. Equal lengths keep their order, so that the same lengths give
    the same batches. Writing each batch's results at its window numbers restores the order.
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
