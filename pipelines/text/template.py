"""What a tokenizer adds around a text: prefix, separator, suffix, type ids and padding. Read from the tokenizer itself.

Imports none of torch, transformers and Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer as RustTokenizer

from pipelines.errors import ModelFolderError

PROBE_WORDS = ("a", "1", "the", "中", "é", ".")
"""Texts with which the template of a tokenizer is found out: the first of which the tokenizer makes a token."""


@dataclass(frozen=True)
class Template:
    """What a tokenizer adds around a text or a pair, and how its rows are padded.

    A single text becomes `prefix text suffix`. A pair becomes `pair_prefix text pair_middle text_pair pair_suffix`.
    type_ids has one type id for each of (prefix, text, suffix), and pair_type_ids for each of
    (pair_prefix, text, pair_middle, text_pair, pair_suffix).
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    type_ids: tuple[int, int, int] = (0, 0, 0)
    pair_prefix: tuple[int, ...] = ()
    pair_middle: tuple[int, ...] = ()
    pair_suffix: tuple[int, ...] = ()
    pair_type_ids: tuple[int, int, int, int, int] = (0, 0, 0, 1, 1)
    pad_id: int = 0
    pad_left: bool = False

    def num_special_tokens(self, *, pair: bool) -> int:
        """Return the number of tokens that are added to one text, or to a pair."""
        parts = (self.pair_prefix, self.pair_middle, self.pair_suffix) if pair else (self.prefix, self.suffix)
        return sum(len(part) for part in parts)


def choose_pad(candidates: Sequence[int | None], template: Template) -> int:
    """Return the first id that can fill rows up: a decoder would take one of the suffix for padding, and skip it."""
    usable = [number for number in candidates if number is not None]
    return next((number for number in usable if number not in template.suffix), usable[0] if usable else 0)


def template_of(rust: RustTokenizer, *, pad_left: bool = False) -> Template:
    """Find out what a Rust tokenizer adds around one text and around a pair. The padding id is left at 0.

    Raises:
        ModelFolderError: The tokenizer makes no token of any of PROBE_WORDS.
    """
    word = next((word for word in PROBE_WORDS if rust.encode(word, add_special_tokens=False).ids), None)
    if word is None:
        raise ModelFolderError(f"the tokenizer makes no token of any of {', '.join(map(repr, PROBE_WORDS))}")
    single, pair = rust.encode(word), rust.encode(word, word)
    prefix, _, suffix = _special_parts(single.ids, single.sequence_ids)
    pair_parts = _special_parts(pair.ids, pair.sequence_ids)
    types, pair_types = single.type_ids, pair.type_ids
    first, second = pair.sequence_ids.index(0), pair.sequence_ids.index(1)
    return Template(
        prefix,
        suffix,
        (types[0], types[len(prefix)], types[-1]),
        *pair_parts,
        (pair_types[0], pair_types[first], pair_types[second - 1], pair_types[second], pair_types[-1]),
        pad_left=pad_left,
    )


def _special_parts(
    ids: Sequence[int], sequence_ids: Sequence[int | None]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the special tokens before, between and after the texts of one encoding. They belong to no sequence."""
    own = [place for place, sequence in enumerate(sequence_ids) if sequence is not None]
    first, last = (own[0], own[-1]) if own else (len(ids), len(ids))
    middle = [ids[place] for place in range(first, last) if sequence_ids[place] is None]
    return tuple(ids[:first]), tuple(middle), tuple(ids[last + 1 :])
