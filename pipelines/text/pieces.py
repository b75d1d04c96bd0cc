"""Tokenize a long text in overlapping pieces, so that memory stays bounded. The tokens are those of the whole text.

The Rust tokenizer keeps about 500 bytes per token until its result is read. Neighbouring pieces share some characters.
They are joined at a space around which both gave the same tokens at the same places: what a tokenizer does there does
not depend on what is further away. Where there is no such place, a piece becomes longer. In a text without spaces,
pieces are joined at any tokens in which they agree; there, of equally good ways to split a word another may be chosen.

Imports none of torch, transformers and Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as RustTokenizer

PIECE_CHARACTERS = 2**18
"""Characters of a piece. A shorter text is tokenized at once."""
SHARED_CHARACTERS = 2**11
"""Characters that two pieces share, or more, if these are fewer than SHARED_TOKENS tokens."""
SHARED_TOKENS = 64
"""Tokens that two pieces share at least."""
LONGEST_PIECE = 2
"""Pieces that are joined while there is no space at which they agree."""
AGREEING_TOKENS = 8
"""Tokens on each side of a seam in which two pieces must agree."""
COMPARED_TOKENS = 4096
"""Tokens of each piece that are compared at most."""


@dataclass(frozen=True)
class PlacedTokens:
    """T tokens and their places in a text."""

    ids: NDArray[np.int32]
    spans: NDArray[np.int64]
    """(T, 2): index of the first code point, and index after the last one."""

    def __getitem__(self, part: slice) -> PlacedTokens:
        return PlacedTokens(self.ids[part], self.spans[part])


def tokenize(rust: RustTokenizer, text: str, *, most_tokens: int | None = None) -> Iterator[PlacedTokens]:
    """Yield the tokens of a text, without special tokens, piece by piece.

    Args:
        rust: The tokenizer.
        text: Valid Unicode.
        most_tokens: Stop after the piece with this token. None reads the whole text.
    """
    num_done = begin = skipped = 0
    end = PIECE_CHARACTERS
    held = _of_range(rust, text, 0, end)
    while end < len(text) and (most_tokens is None or num_done < most_tokens):
        if not _reaches_end(
            rust, held, text[:end]
        ):  # the places are wrong, so there is nothing by which to join pieces
            held = _of_range(rust, text, begin, len(text))[skipped:]
            break
        shared = int(np.searchsorted(held.spans[:, 0], end - SHARED_CHARACTERS))
        shared = min(shared, len(held.ids) - SHARED_TOKENS)
        seam = None
        if 0 < shared < len(held.ids):
            start = int(held.spans[shared, 0])  # a token begins here: rows of equal tokens have the same rhythm in both
            following = _of_range(rust, text, start, start + PIECE_CHARACTERS)
            is_long = end - begin >= LONGEST_PIECE * PIECE_CHARACTERS
            seam = _seam(text, held[shared:], following, needs_space=not is_long)
        if seam is None:  # the piece becomes longer
            end += end - begin  # twice as long each time: a text without any seam costs three times as much at most
            held = _of_range(rust, text, begin, end)[skipped:]
            continue
        yield held[: shared + seam[0]]
        num_done += shared + seam[0]
        begin, skipped, end = start, seam[1], start + PIECE_CHARACTERS
        held = following[skipped:]
    yield held


def _of_range(rust: RustTokenizer, text: str, start: int, stop: int) -> PlacedTokens:
    encoding = rust.encode(text[start:stop], add_special_tokens=False)
    spans = np.asarray(encoding.offsets, np.int64).reshape(-1, 2) + start
    return PlacedTokens(np.asarray(encoding.ids, np.int32), spans)


def _reaches_end(rust: RustTokenizer, held: PlacedTokens, text: str) -> bool:
    """Whether nothing of which the tokenizer makes tokens is behind the last token of the text so far.

    A tokenizer that splits characters into bytes and does not split words first gives places that are too low.
    """
    rest = text[int(held.spans[-1, 1]) :] if len(held.ids) else ""
    return not (rest and rust.encode(rest, add_special_tokens=False).ids)


def _seam(text: str, before: PlacedTokens, after: PlacedTokens, *, needs_space: bool) -> tuple[int, int] | None:
    """Return a token as an index of both, around which both agree. None if there is none.

    Args:
        text: The whole text.
        before: The last tokens of a piece, which it shares with the next one.
        after: The tokens of the next piece.
        needs_space: Whether the token must be the first one of a word.
    """
    rows = [np.column_stack([one.ids, one.spans])[:COMPARED_TOKENS].tolist() for one in (before, after)]
    known = {tuple(row): place for place, row in enumerate(rows[1])}
    places = np.asarray([known.get(tuple(row), -1) for row in rows[0]], np.int64)
    steps = np.flatnonzero((places[1:] != places[:-1] + 1) | (places[1:] < 0)) + 1
    bounds = [0, *steps.tolist(), len(places)]
    agreeing = [(start, stop) for start, stop in itertools.pairwise(bounds)
                if places[start] >= 0 and stop - start >= 2 * AGREEING_TOKENS]  # fmt: skip
    for start, stop in sorted(agreeing, key=lambda part: part[0] - part[1]):
        middle = (start + stop) // 2
        for token in sorted(range(start + AGREEING_TOKENS, stop - AGREEING_TOKENS + 1), key=lambda t: abs(t - middle)):
            if not needs_space or _begins_word(text, rows[0][token][1]):
                return token, int(places[token])
    return None


def _begins_word(text: str, place: int) -> bool:
    """Whether a word begins at a place in a text, or the space in front of it, which some tokens contain."""
    is_space, was_space = text[place : place + 1].isspace(), text[place - 1 : place].isspace()
    return is_space != was_space
