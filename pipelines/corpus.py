"""Labelled documents in parts, each of which is waited for and loaded when its turn comes.

What stays in memory is a few numbers per document. The tokens of a part are wherever `load` finds them: in this
process, in files, in Ray's object store, where they may still be on their way. Documents without a text are left out
and counted. Knows no model, no ray.

Shapes: D documents, P parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

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

    good: NDArray[np.int32]
    """Numbers of the documents that have a text; the lengths below are theirs."""
    num_tokens_D: NDArray[np.int32]
    pair_num_tokens_D: NDArray[np.int32] | None
    """Of second texts."""

    @classmethod
    def of(cls, documents: Documents) -> Part:
        """Survey a part that is at hand."""
        good = np.flatnonzero([error is None for error in documents.errors]).astype(np.int32)
        sides = [side for side in (documents.tokens, documents.pair_tokens) if side is not None]
        lengths = [side.num_tokens_D[good].astype(np.int32) for side in sides]
        return cls(good, lengths[0], lengths[1] if len(lengths) > 1 else None)


class Corpus:
    """The documents of an input and their targets. What asks for all of them waits for all parts."""

    def __init__(
        self,
        num_documents_P: Sequence[int],
        targets: NDArray[np.generic],
        survey: Callable[[int], Part],
        load: Callable[[int], Documents],
        *,
        fingerprint: str,
        source: str = "the data",
        name: Callable[[int, int], str] | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        """A part is told of by survey and read by load, which wait for one that has not come yet.

        num_documents_P and targets are of all documents, those without a text too. fingerprint changes with any text
        or target. source is what people call the input, and name a document of a part, given both numbers; order is
        the one in which the parts come.
        """
        self.first_P = np.cumsum([0, *num_documents_P])
        """Part p holds the input's rows first_P[p] to first_P[p + 1]."""
        self.all_targets = targets
        """Of all documents, those without a text too: known before any part has come."""
        self.fingerprint = fingerprint
        self.order = None if order is None else tuple(order)
        self._survey, self._load, self._source, self._name = survey, load, source, name

    @classmethod
    def of(cls, data: LabelledDocuments) -> Corpus:
        """Documents at hand, as one part."""
        documents = data.documents
        digest = hashlib.sha256(np.ascontiguousarray(data.targets).data)
        for side in (documents.tokens, documents.pair_tokens):
            if side is not None:
                digest.update(np.ascontiguousarray(side.offsets).data)
                digest.update(np.ascontiguousarray(side.ids).data)
        part = Part.of(documents)
        fingerprint = digest.hexdigest()
        return cls([len(documents)], data.targets, lambda _: part, lambda _: documents, fingerprint=fingerprint)

    @property
    def num_parts(self) -> int:
        """How many, those on their way too."""
        return len(self.first_P) - 1

    def survey(self, number: int) -> Part:
        """What is known of a part without loading it."""
        return self._survey(number)

    def part(self, number: int) -> LabelledDocuments:
        """One part's documents that have a text."""
        documents, good = self._load(number), self.survey(number).good
        if len(good) < len(documents):
            documents = documents.take(good)
        return LabelledDocuments(documents, self.all_targets[self.rows(number)])

    def rows(self, number: int) -> NDArray[np.int64]:
        """The input's rows that one part's documents with a text are."""
        return np.asarray(self.first_P[number] + self.survey(number).good, np.int64)

    def name(self, row: int) -> str:
        """What people call an input's row."""
        number = int(np.searchsorted(self.first_P, row, side="right")) - 1
        return f"document {row}" if self._name is None else self._name(number, int(row - self.first_P[number]))

    def check_texts(self) -> None:
        """Raise DataError where no document has a text; waits for the first part that has one."""
        if not any(len(self.survey(number).good) for number in self.order or range(self.num_parts)):
            raise DataError(f"{self._source}: no row has a text")

    def __len__(self) -> int:
        """Documents that have a text."""
        return int(self._offsets[-1])

    @property
    def num_errors(self) -> int:
        """Documents without a text."""
        return int(self.first_P[-1]) - len(self)

    @property
    def has_pairs(self) -> bool:
        """Whether documents are pairs of texts."""
        return self.survey(0).pair_num_tokens_D is not None

    @cached_property
    def rows_D(self) -> NDArray[np.int64]:
        """The input's row of each document that has a text."""
        return np.concatenate([self.rows(number) for number in range(self.num_parts)])

    @cached_property
    def targets(self) -> NDArray[np.generic]:
        """Of the documents that have a text."""
        return self.all_targets if not self.num_errors else self.all_targets[self.rows_D]

    @property
    def num_tokens_D(self) -> NDArray[np.int64]:
        """Tokens of each document, both texts of a pair together, without special tokens."""
        parts = [
            part.num_tokens_D + (0 if part.pair_num_tokens_D is None else part.pair_num_tokens_D.astype(np.int64))
            for part in map(self.survey, range(self.num_parts))
        ]
        return np.concatenate(parts).astype(np.int64)

    def between(self, start: int, stop: int) -> Iterator[Documents]:
        """Documents [start, stop) of those with a text in order, from one part after another."""
        for number, (begin, end) in enumerate(zip(self._offsets, self._offsets[1:], strict=False)):
            first, last = max(start, begin) - begin, min(stop, end) - begin
            if first >= last:
                continue
            documents = self.part(number).documents
            yield documents if (first, last) == (0, len(documents)) else documents.take(np.arange(first, last))

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        """Documents with a text before each part. Raises DataError where there are none at all."""
        self.check_texts()
        return np.cumsum([0, *(len(self.survey(number).good) for number in range(self.num_parts))])
