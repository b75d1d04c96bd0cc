"""Labelled documents in parts that are loaded when their turn comes.

What stays in memory is a few numbers per document. The tokens of a part are wherever `load` finds them: in this
process, in files, in Ray's object store. Documents without a text are left out and counted. Knows no model, no ray.

Shapes: D documents, P parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.tokenization import Documents


@dataclass(frozen=True)
class LabelledDocuments:
    """Tokenized documents with their targets: (D,) int64 label ids, (D, L) float32, or (D,) float32 values."""

    documents: Documents
    targets: NDArray[np.generic]


@dataclass(frozen=True)
class Part:
    """What is known of a part without loading it."""

    num_documents: int
    good: NDArray[np.int32]
    """Numbers of the documents that have a text; the lengths below are theirs."""
    num_tokens_D: NDArray[np.int32]
    pair_num_tokens_D: NDArray[np.int32] | None
    """Of second texts."""
    fingerprint: str
    """Changes with any token."""

    @classmethod
    def of(cls, documents: Documents) -> Part:
        """Survey a part that is at hand."""
        good = np.flatnonzero([error is None for error in documents.errors]).astype(np.int32)
        sides = [side for side in (documents.tokens, documents.pair_tokens) if side is not None]
        digest = hashlib.sha256()
        for side in sides:
            digest.update(np.ascontiguousarray(side.offsets).data)
            digest.update(np.ascontiguousarray(side.ids).data)
        lengths = [side.num_tokens_D[good].astype(np.int32) for side in sides]
        return cls(len(documents), good, lengths[0], lengths[1] if len(lengths) > 1 else None, digest.hexdigest())


class Corpus:
    """The documents that have a text, numbered through all parts, and their targets."""

    def __init__(
        self,
        parts: Sequence[Part],
        targets: NDArray[np.generic],
        load: Callable[[int], Documents],
        name: Callable[[int, int], str] | None = None,
    ) -> None:
        """Targets are of all documents, those without a text too. load reads the documents of a part.

        name says what people call a document of a part, given both numbers. Raises DataError where no document has
        a text.
        """
        first = np.cumsum([0, *(part.num_documents for part in parts)])
        good = [start + part.good for start, part in zip(first, parts, strict=False)]
        self.parts = list(parts)
        self.offsets = np.cumsum([0, *map(len, good)])
        """Part p holds documents offsets[p] to offsets[p + 1]."""
        if not self.offsets[-1]:
            raise DataError("no row of the training or validation data has a text")
        self.num_errors = int(first[-1] - self.offsets[-1])
        """Documents without a text."""
        self.targets = targets if not self.num_errors else targets[np.concatenate(good)]
        self._load, self._name = load, name

    @classmethod
    def of(cls, data: LabelledDocuments) -> Corpus:
        """Documents at hand, as one part."""
        return cls([Part.of(data.documents)], data.targets, lambda number: data.documents)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def fingerprint(self) -> str:
        """Changes with any token or target."""
        digest = hashlib.sha256("".join(part.fingerprint for part in self.parts).encode())
        digest.update(np.ascontiguousarray(self.targets).data)
        return digest.hexdigest()

    @property
    def num_tokens_D(self) -> NDArray[np.int64]:
        """Tokens of each document, both texts of a pair together, without special tokens."""
        parts = [
            part.num_tokens_D + (0 if part.pair_num_tokens_D is None else part.pair_num_tokens_D.astype(np.int64))
            for part in self.parts
        ]
        return np.concatenate(parts).astype(np.int64)

    def part(self, number: int) -> LabelledDocuments:
        """One part, loaded."""
        documents, good = self._load(number), self.parts[number].good
        if len(good) < len(documents):
            documents = documents.take(good)
        return LabelledDocuments(documents, self.targets[self.offsets[number] : self.offsets[number + 1]])

    def between(self, start: int, stop: int) -> Iterator[Documents]:
        """Documents [start, stop) in order, from one part after another."""
        for number, (begin, end) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            first, last = max(start, begin) - begin, min(stop, end) - begin
            if first >= last:
                continue
            documents = self.part(number).documents
            yield documents if (first, last) == (0, len(documents)) else documents.take(np.arange(first, last))

    def name(self, row: int) -> str:
        """What people call a document."""
        number = int(np.searchsorted(self.offsets, row, side="right")) - 1
        inside = int(self.parts[number].good[row - self.offsets[number]])
        return f"document {row}" if self._name is None else self._name(number, inside)
