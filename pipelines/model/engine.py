"""`Engine`: what a scorer needs of a model. It computes the logits of windows in batches.

`WindowModel` runs a classifier with PyTorch, and `OpenVinoModel` with OpenVINO. Imports neither.

Shapes: W windows, T tokens of all windows together, S tokens of the longest window, L labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import is_out_of_memory
from pipelines.model.batching import first_of_equal, token_batches
from pipelines.text.template import Template
from pipelines.text.tokenization import CutDocuments, InputRows, assemble

Side = Literal["left", "right"]
"""Side of the padding."""
PADDED_MULTIPLE = 8
"""The length of a padded row is a multiple of this number of tokens: fewer shapes, aligned memory."""
SHORTEST_STEP = 8
"""On a CPU, the length of a short row is a multiple of this number of tokens."""


class Engine(ABC):
    """A sequence classifier that is ready to run windows of different lengths. Several threads may use it."""

    name: ClassVar[str]
    """The setting `engine` that chooses it."""
    template: Template
    """Special tokens and padding of the model's tokenizer."""
    batch_tokens: int
    """Maximum number of tokens in one forward pass. Less after a pass that did not fit into memory."""

    @property
    @abstractmethod
    def num_labels(self) -> int:
        """Number of logits per window."""

    @property
    @abstractmethod
    def row_limit(self) -> int | None:
        """Longest input row, in tokens, that the model's positions allow. None means no limit."""

    @property
    @abstractmethod
    def model_type(self) -> str:
        """Name of the architecture in config.json."""

    @property
    @abstractmethod
    def vocabulary(self) -> int | None:
        """Number of entries of the vocabulary. None if the architecture has none."""

    @property
    @abstractmethod
    def dtype_name(self) -> str:
        """Number format of the forward pass, such as bfloat16 or int8."""

    @property
    @abstractmethod
    def device_name(self) -> str:
        """Where the model runs, such as cpu or cuda:0."""

    @property
    @abstractmethod
    def is_packed(self) -> bool:
        """Whether windows run in one row without padding."""

    @abstractmethod
    def run(self, rows: InputRows) -> NDArray[np.float32]:
        """Return the logits (W, L) of the windows of one batch, in their order."""

    def logits(self, cut: CutDocuments, index_W: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Compute logits batch by batch. Windows with the same tokens are computed once.

        Args:
            cut: Documents cut into windows.
            index_W: Indices of the windows to compute. None means all windows.

        Returns:
            The logits (W, L) of these windows, in the order of index_W.
        """
        length_W = cut.length_W
        all_W = np.arange(len(length_W)) if index_W is None else index_W
        index_W = all_W[length_W[all_W] > 0]  # a text without tokens, and without special tokens, has no input row
        logits_WL = np.zeros((len(length_W), self.num_labels), dtype=np.float32)
        first_W = first_of_equal(cut, self.template, index_W)
        run_W = index_W[first_W == np.arange(len(index_W))]
        batches = token_batches(length_W[run_W], batch_tokens=self._pass_tokens(), padded=not self.is_packed)
        self._run_all(lambda batch: self._fill(logits_WL, cut, run_W[batch]), batches)
        logits_WL[index_W] = logits_WL[index_W[first_W]]
        return logits_WL[all_W]

    def _pass_tokens(self) -> int:
        """Return the number of tokens after which a batch is full."""
        return self.batch_tokens

    def _run_all(self, run_batch: Callable[[NDArray[np.int64]], None], batches: Sequence[NDArray[np.int64]]) -> None:
        """Run all batches, one after another."""
        for batch in batches:
            run_batch(batch)

    def _fill(self, logits_WL: NDArray[np.float32], cut: CutDocuments, index_W: NDArray[np.int64]) -> None:
        """Write the logits of some windows into logits_WL.

        If the windows do not fit into memory, compute each half separately and reduce batch_tokens for later calls.
        """
        try:
            logits_WL[index_W] = self.run(assemble(cut, self.template, index_W))
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(index_W) == 1:
                raise
        self._free_memory()
        self.batch_tokens = max(1, min(self.batch_tokens, int(cut.length_W[index_W].sum())) // 2)
        for half in np.array_split(index_W, 2):
            self._fill(logits_WL, cut, half)

    def _free_memory(self) -> None:  # noqa: B027 (most engines have nothing to do)
        """Give memory back that a failed pass has left."""


class PaddedRows(NamedTuple):
    """Windows as one batch with a mask, as classifiers of Hugging Face take it. All arrays are int64 (W, S)."""

    ids_WS: NDArray[np.int64]
    mask_WS: NDArray[np.int64]
    types_WS: NDArray[np.int64]


def padded(
    rows: InputRows, *, side: Side | None, pad_id: int, row_length: int = 0, row_limit: int | None = None
) -> PaddedRows:
    """Pad windows to the same length, a multiple of PADDED_MULTIPLE.

    Args:
        rows: The windows.
        side: Side of the padding. None means that all windows have the same length, and no padding is added.
        pad_id: Token id of the padding.
        row_length: Pad rows to at least this length.
        row_limit: Longest row of the model.
    """
    length_W = rows.length_W
    longest = int(length_W.max())
    if side is not None:
        multiple = -(-longest // PADDED_MULTIPLE) * PADDED_MULTIPLE
        wanted = max(multiple, row_length)
        longest = max(longest, wanted if row_limit is None else min(wanted, row_limit))
    mask_WS = np.arange(longest) < length_W[:, None]
    if side == "left":
        mask_WS = mask_WS[:, ::-1]
    ids_WS = np.full(mask_WS.shape, pad_id, dtype=np.int64)
    ids_WS[mask_WS] = rows.ids
    types_WS = np.zeros_like(ids_WS)
    types_WS[mask_WS] = rows.type_ids
    return PaddedRows(ids_WS, mask_WS.astype(np.int64), types_WS)
