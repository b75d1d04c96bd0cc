"""Where in the text the windows of a document are, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.text.tokenization import Tokenizer
from pipelines.text.windows import Windows

if TYPE_CHECKING:
    from pipelines.model.scorer import DocumentScores


def code_points(tokenizer: Tokenizer, windows: Windows, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the code points [start, end) of each window of one document.

    Args:
        tokenizer: The tokenizer that made the tokens.
        windows: The windows of the document.
        text: The text that was cut into windows: of a pair, the second text.

    Raises:
        ModelFolderError: The tokenizer gives no character positions.
    """
    spans = tokenizer.character_spans(text)
    start_W, end_W = np.zeros(len(windows.start_W), np.int64), np.zeros(len(windows.start_W), np.int64)
    full_W = windows.stop_W > windows.start_W
    start_W[full_W] = spans[windows.start_W[full_W], 0]
    end_W[full_W] = spans[windows.stop_W[full_W] - 1, 1]
    return start_W, end_W


def window_column(
    tokenizer: Tokenizer, scores: DocumentScores, texts: pa.ChunkedArray, labels: Sequence[str]
) -> pa.Array:
    """Return a column with the windows of each document: start, end and scores by label. Null in rows with errors.

    Args:
        tokenizer: The tokenizer that made the tokens.
        scores: Scored documents.
        texts: The texts that were cut into windows.
        labels: Names of the labels. Empty for regression.
    """
    starts, ends, offsets = [], [], scores.windows.offsets
    for row, text in enumerate(texts.to_pylist()):
        if scores.errors[row] is None:
            start_W, end_W = code_points(tokenizer, scores.windows.slice(row, row + 1), text)
            starts.append(start_W)
            ends.append(end_W)
    good_D = np.asarray([error is None for error in scores.errors], bool)
    good_W = good_D[scores.windows.document_W]
    scores_WL = scores.window_scores_WL[good_W]
    names = list(labels) or ["value"]
    by_label = pa.StructArray.from_arrays([pa.array(scores_WL[:, at]) for at in range(len(names))], names=names)
    empty = [np.zeros(0, np.int64)]
    fields = [pa.array(np.concatenate(starts or empty)), pa.array(np.concatenate(ends or empty)), by_label]
    items = pa.StructArray.from_arrays(fields, names=["start", "end", "scores"])
    counts_D = np.where(good_D, np.diff(offsets), 0)
    bounds = pa.array(np.concatenate([[0], np.cumsum(counts_D)]), pa.int32())
    return pa.ListArray.from_arrays(bounds, items, mask=pa.array(~good_D))
