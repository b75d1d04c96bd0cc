"""Labelled documents in units. A unit is loaded when it is needed.

Only a few numbers per document are in memory. The tokens of a unit are in this process, in files, or in Ray's object
store. In the object store, a unit may not have arrived yet, and `load` then waits for it. Documents without a text are
omitted and counted. Imports neither torch nor Ray.

Shapes: D documents, U units.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.text.tokenization import Documents


@dataclass(frozen=True)
class LabelledDocuments:
    """Tokenized documents with their targets: (D,) int64 label ids, (D, L) float32, or (D,) float32 values."""

    documents: Documents
    targets: NDArray[np.generic]


@dataclass(frozen=True)
class UnitLengths:
    """The documents of a unit that have a text, and their lengths. They are known without loading the unit."""

    with_text: NDArray[np.int32]
    """Indices of the unit's documents that have a text. The lengths below are in the same order."""
    num_tokens_D: NDArray[np.int32]
    pair_num_tokens_D: NDArray[np.int32] | None
    """Lengths of the second texts of pairs, or None for single texts."""

    @classmethod
    def of(cls, documents: Documents) -> UnitLengths:
        """The lengths of a unit's documents."""
        with_text = np.flatnonzero([error is None for error in documents.errors]).astype(np.int32)
        sides = [side for side in (documents.tokens, documents.pair_tokens) if side is not None]
        lengths = [side.num_tokens_D[with_text].astype(np.int32) for side in sides]
        return cls(with_text, lengths[0], lengths[1] if len(lengths) > 1 else None)


class Corpus:
    """The documents of an input and their targets. Methods that need all documents wait for all units."""

    def __init__(
        self,
        num_documents_U: Sequence[int],
        targets: NDArray[np.generic],
        lengths: Callable[[int], UnitLengths],
        load: Callable[[int], Documents],
        *,
        fingerprint: str,
        source: str = "the data",
        name: Callable[[int, int], str] | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        """Create a corpus. `lengths` and `load` wait for a unit that has not arrived yet.

        Args:
            num_documents_U: Number of documents of each unit, including those without a text.
            targets: Targets of all documents, including those without a text.
            lengths: Function that returns the lengths of a unit.
            load: Function that returns the tokenized documents of a unit.
            fingerprint: Changes if any text or target changes.
            source: Display name of the input.
            name: Function that returns the display name of a document, given its unit and its row in the unit.
            order: The order in which units arrive.
        """
        self.first_row_U = np.cumsum([0, *num_documents_U])
        """Unit u contains the rows of the input from first_row_U[u] up to but excluding first_row_U[u + 1]."""
        self.all_targets = targets
        """Targets of all documents, including those without a text. Known before any unit is tokenized."""
        self.fingerprint = fingerprint
        self.order = None if order is None else tuple(order)
        self._lengths, self._load, self._source, self._name = lengths, load, source, name

    @classmethod
    def of(cls, data: LabelledDocuments) -> Corpus:
        """Create a corpus of documents in memory, as one unit."""
        documents = data.documents
        digest = hashlib.sha256(np.ascontiguousarray(data.targets).data)
        for side in (documents.tokens, documents.pair_tokens):
            if side is not None:
                digest.update(np.ascontiguousarray(side.offsets).data)
                digest.update(np.ascontiguousarray(side.ids).data)
        lengths = UnitLengths.of(documents)
        fingerprint = digest.hexdigest()
        return cls([len(documents)], data.targets, lambda _: lengths, lambda _: documents, fingerprint=fingerprint)

    @property
    def num_units(self) -> int:
        """Number of units, including those that have not arrived."""
        return len(self.first_row_U) - 1

    def lengths(self, unit: int) -> UnitLengths:
        """Return the lengths of a unit. Waits until the unit has arrived."""
        return self._lengths(unit)

    def load(self, unit: int) -> LabelledDocuments:
        """Load the documents of a unit that have a text, with their targets."""
        documents, with_text = self._load(unit), self.lengths(unit).with_text
        if len(with_text) < len(documents):
            documents = documents.take(with_text)
        return LabelledDocuments(documents, self.all_targets[self.rows(unit)])

    def rows(self, unit: int) -> NDArray[np.int64]:
        """Return the row in the input of each document of a unit that has a text."""
        return np.asarray(self.first_row_U[unit] + self.lengths(unit).with_text, np.int64)

    def name(self, row: int) -> str:
        """Return the display name of a row of the input."""
        unit = int(np.searchsorted(self.first_row_U, row, side="right")) - 1
        return f"document {row}" if self._name is None else self._name(unit, int(row - self.first_row_U[unit]))

    def check_texts(self) -> None:
        """Raise DataError if no document has a text. Waits for the first unit that has one."""
        if not any(len(self.lengths(unit).with_text) for unit in self.order or range(self.num_units)):
            raise DataError(f"{self._source}: no row has a text")

    def __len__(self) -> int:
        """Number of documents that have a text."""
        return int(self._offsets[-1])

    @property
    def num_errors(self) -> int:
        """Number of documents without a text."""
        return int(self.first_row_U[-1]) - len(self)

    @property
    def has_pairs(self) -> bool:
        """Whether documents are pairs of texts."""
        return self.lengths(0).pair_num_tokens_D is not None

    @cached_property
    def rows_D(self) -> NDArray[np.int64]:
        """Row in the input of each document that has a text."""
        return np.concatenate([self.rows(unit) for unit in range(self.num_units)])

    @cached_property
    def targets(self) -> NDArray[np.generic]:
        """Targets of the documents that have a text."""
        return self.all_targets if not self.num_errors else self.all_targets[self.rows_D]

    @property
    def num_tokens_D(self) -> NDArray[np.int64]:
        """Tokens of each document, both texts of a pair together, without special tokens."""
        found = [
            unit.num_tokens_D + (0 if unit.pair_num_tokens_D is None else unit.pair_num_tokens_D.astype(np.int64))
            for unit in map(self.lengths, range(self.num_units))
        ]
        return np.concatenate(found).astype(np.int64)

    def between(self, start: int, stop: int) -> Iterator[Documents]:
        """Yield the documents [start, stop) of those with a text, unit by unit."""
        for unit, (begin, end) in enumerate(zip(self._offsets, self._offsets[1:], strict=False)):
            first, last = max(start, begin) - begin, min(stop, end) - begin
            if first >= last:
                continue
            documents = self.load(unit).documents
            yield documents if (first, last) == (0, len(documents)) else documents.take(np.arange(first, last))

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        """Number of documents with a text before each unit. Raises DataError if no document has a text."""
        self.check_texts()
        return np.cumsum([0, *(len(self.lengths(unit).with_text) for unit in range(self.num_units))])
