"""Tokenize texts, and assemble the input rows of the model from token ids.

The Rust tokenizer tokenizes each whole text once, without truncation, padding or special tokens (very long texts: see
`pieces`). What it adds around a text is in its `Template`.

Data flow: `Tokenizer.documents` -> `Documents` -> `cut_documents` -> `CutDocuments` -> `assemble` -> `InputRows`,
which `pipelines.model` runs.

Imports none of torch, transformers and Ray.

Shapes: D documents, W windows, T tokens of all of them together (ragged: flat values plus offsets).
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer as RustTokenizer

from pipelines.errors import ModelFolderError, PipelinesError, SettingsError, first_line
from pipelines.storage.columns import read_texts
from pipelines.text import pieces
from pipelines.text.template import Template, choose_pad, template_of
from pipelines.text.windows import WindowPlan, Windows, plan_windows

Ids = NDArray[np.int32]
EncodeTexts = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Function that returns the token ids of each text, without special tokens."""
CHARACTERS_PER_CALL = 2**20
"""Approximate number of characters per call of the Rust tokenizer. Its encodings need about 500 bytes per token."""
SMALLEST_SHARE = 0.5
"""A tokenizer with fewer tokens than this share of the model's vocabulary does not belong to the model."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of D texts, without special tokens. Text d is ids[offsets[d]:offsets[d + 1]]."""

    ids: Ids
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens_D(self) -> NDArray[np.int64]:
        """Number of tokens of each text."""
        return np.diff(self.offsets)

    def take(self, index_D: NDArray[np.integer]) -> Tokens:
        """Return the texts with the given indices, in that order."""
        lengths = self.num_tokens_D[index_D]
        return Tokens(self.ids[ragged_index(self.offsets[index_D], lengths)], offsets_of(lengths))

    def to_arrow(self) -> pa.ListArray:
        """Return list<int32>, or large_list<int32> for 2**31 tokens or more. The ids are not copied."""
        if self.offsets[-1] < 2**31:
            return pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), pa.array(self.ids))
        return pa.LargeListArray.from_arrays(pa.array(self.offsets), pa.array(self.ids))

    @classmethod
    def from_arrow(cls, column: pa.Array | pa.ChunkedArray) -> Tokens:
        """Convert the result of `to_arrow` back. The ids are not copied if the column is one chunk."""
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if isinstance(array, pa.ChunkedArray):  # combine_chunks keeps several chunks if offsets would overflow
            return concat_tokens([cls.from_arrow(chunk) for chunk in array.chunks])
        offsets = array.offsets.to_numpy().astype(np.int64)
        ids = array.values.to_numpy()[offsets[0] : offsets[-1]]
        return cls(ids.astype(np.int32, copy=False), offsets - offsets[0])


@dataclass(frozen=True)
class InputRows:
    """Model input of W windows, including special tokens. Window w is ids[offsets[w]:offsets[w + 1]]."""

    ids: NDArray[np.int64]
    type_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @property
    def length_W(self) -> NDArray[np.int64]:
        """Number of tokens of each window, including special tokens."""
        return np.diff(self.offsets)

    def take(self, index_W: NDArray[np.integer]) -> InputRows:
        """Return the windows with the given indices, in that order."""
        length_W = self.length_W[index_W]
        index_T = ragged_index(self.offsets[index_W], length_W)
        return InputRows(self.ids[index_T], self.type_ids[index_T], offsets_of(length_W))


@dataclass(frozen=True)
class CutDocuments:
    """Documents split into windows. `assemble` builds input rows from them.

    windows refers to the text, or to the second text of a pair. first_kept_D is the number of tokens of a pair's first
    text that each of its windows contains.
    """

    tokens: Tokens
    pair_tokens: Tokens | None
    first_kept_D: NDArray[np.int64] | None
    windows: Windows
    num_special_tokens: int

    @property
    def length_W(self) -> NDArray[np.int64]:
        """Number of tokens of each window's input row, including special tokens."""
        length_W = self.windows.stop_W - self.windows.start_W + self.num_special_tokens
        return length_W if self.first_kept_D is None else length_W + self.first_kept_D[self.windows.document_W]


@dataclass(frozen=True)
class Documents:
    """D tokenized texts or pairs. A document that cannot be scored has an error and no tokens."""

    tokens: Tokens
    pair_tokens: Tokens | None
    errors: list[str | None]

    def __len__(self) -> int:
        return len(self.errors)

    @property
    def is_pair(self) -> bool:
        """Whether the documents are pairs of texts."""
        return self.pair_tokens is not None

    @property
    def num_tokens_D(self) -> NDArray[np.int64]:
        """Number of tokens of each document, without special tokens. Both texts of a pair are counted."""
        own = self.tokens.num_tokens_D
        return own if self.pair_tokens is None else own + self.pair_tokens.num_tokens_D

    def take(self, index_D: NDArray[np.integer]) -> Documents:
        """Return the documents with the given indices, in that order."""
        pair = None if self.pair_tokens is None else self.pair_tokens.take(index_D)
        return Documents(self.tokens.take(index_D), pair, [self.errors[int(row)] for row in index_D])


def concat_documents(pieces: Sequence[Documents]) -> Documents:
    """Concatenate documents in order. They must be all single texts or all pairs."""
    if len(pieces) == 1:
        return pieces[0]
    pairs = [piece.pair_tokens for piece in pieces if piece.pair_tokens is not None]
    assert len(pairs) in (0, len(pieces)), "single texts and pairs cannot be mixed"
    return Documents(
        concat_tokens([piece.tokens for piece in pieces]),
        concat_tokens(pairs) if pairs else None,
        [error for piece in pieces for error in piece.errors],
    )


class Tokenizer:
    """Tokenizer that encodes whole texts, without padding and without special tokens."""

    def __init__(
        self,
        encode_texts: EncodeTexts,
        template: Template,
        rust: RustTokenizer | None = None,
        *,
        lead_space: bool = False,
        vocabulary: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """Create a tokenizer. For a folder that has a tokenizer.json, use `load`.

        Args:
            encode_texts: Function that returns the token ids of each text, without special tokens.
            template: What the tokenizer adds around a text.
            rust: The Rust tokenizer, which `character_spans` needs. None for a Python-only tokenizer.
            lead_space: Whether to put a space before texts that do not start with one.
            vocabulary: Function that returns the ids of all tokens, added tokens included.
        """
        self._encode_texts = encode_texts
        self._rust = rust
        self._lead_space = lead_space
        self._vocabulary = vocabulary
        self._most_tokens: int | None = None
        self.template = template

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle, with the one setting that the Rust tokenizer leaves out of its own."""
        return {**self.__dict__, "_splits_special": self._rust is not None and self._rust.encode_special_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state of `__getstate__`."""
        splits_special = state.pop("_splits_special")
        self.__dict__.update(state)
        if self._rust is not None:
            self._rust.encode_special_tokens = splits_special

    @classmethod
    def load(cls, folder: Path, *, lead_space: bool = False) -> Tokenizer:
        """Read a tokenizer from tokenizer.json, and its padding from tokenizer_config.json.

        Args:
            folder: Folder that contains the files.
            lead_space: Whether to put a space before texts that do not start with one.

        Raises:
            ModelFolderError: tokenizer.json is missing or cannot be read. A Python-only tokenizer has no such file. Use
                the constructor for it.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelFolderError(f"{folder} has no tokenizer.json; save a fast tokenizer there first")
        try:
            rust = RustTokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises no more specific exception
            raise ModelFolderError(f"{path} cannot be read: {error}") from error
        padding = rust.padding
        rust.no_truncation()  # the file can enable both; they would silently truncate and pad texts
        rust.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        rust.encode_special_tokens = bool(config.get("split_special_tokens"))
        with library_errors(f"{path} is damaged"):
            template = template_of(rust, pad_left=config.get("padding_side") == "left")
        names = ("pad_token", "eos_token", "bos_token", "unk_token")
        named = [rust.token_to_id(_content(config.get(name))) for name in names]
        if padding:
            named.insert(1, padding["pad_id"])
        template = replace(template, pad_id=choose_pad(named, template))
        return cls(partial(_rust_ids, rust), template, rust, lead_space=lead_space, vocabulary=rust.get_vocab)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the vocabulary, including added tokens."""
        return len(self._vocabulary())

    @property
    def highest_id(self) -> int:
        """The highest token id."""
        return max(self._vocabulary().values(), default=0)

    def check_vocabulary(self, expected: int | None, *, where: str) -> None:
        """Check that the tokenizer can belong to a model.

        transformers opens a folder without tokenizer files with a tokenizer that has no words.

        Args:
            expected: Number of entries of the model's vocabulary, or None if it has no vocabulary.
            where: Name of the model, for the error message.

        Raises:
            ModelFolderError: The tokenizer has far fewer tokens than the model, or tokens that the model does not have.
        """
        if expected is None:
            return
        found, highest = self.num_tokens, self.highest_id
        if found < SMALLEST_SHARE * expected:
            raise ModelFolderError(
                f"{where}: its tokenizer has {found:,} tokens and its model {expected:,}, so the tokenizer's files are "
                f"missing or belong to another model; add the files with which the model was trained (tokenizer.json "
                f"and tokenizer_config.json, or vocab.txt, or vocab.json with merges.txt, or spiece.model)"
            )
        if highest >= expected:
            raise ModelFolderError(
                f"{where}: its tokenizer has the token id {highest:,}, but its model knows ids below {expected:,}; add "
                f"the tokenizer that belongs to it, or resize the model: "
                f"model.resize_token_embeddings(len(tokenizer))"
            )

    def with_lead_space(self, lead_space: bool) -> Tokenizer:
        """Return the same tokenizer with another lead_space."""
        other = copy.copy(self)
        other._lead_space = lead_space
        return other

    def with_most_tokens(self, most_tokens: int | None) -> Tokenizer:
        """Return the same tokenizer that stops to read a very long text after this many tokens. None: never.

        Texts of up to `pieces.PIECE_CHARACTERS`, and pairs, are read as a whole all the same.
        """
        other = copy.copy(self)
        other._most_tokens = most_tokens
        return other

    def encode(self, texts: Sequence[str], *, are_pairs: bool = False) -> Tokens:
        """Return the ids of whole texts. The texts must be valid Unicode (no lone surrogates)."""
        found: list[Ids] = []
        lengths: list[int] = []
        most = None if are_pairs else self._most_tokens
        for batch in _batches_of_characters(texts):
            led = [self._led(text) for text in batch] if self._lead_space else batch
            if len(led) == 1 and len(led[0]) > pieces.PIECE_CHARACTERS and self._rust is not None:
                with library_errors("the tokenizer cannot read a text"):
                    parts = [piece.ids for piece in pieces.tokenize(self._rust, led[0], most_tokens=most)]
                found += parts
                lengths.append(sum(map(len, parts)))
                continue
            with library_errors("the tokenizer cannot read a text"):
                encoded = self._encode_texts(led)
            lengths += map(len, encoded)
            found.append(np.fromiter(itertools.chain.from_iterable(encoded), np.int32, sum(map(len, encoded))))
        ids = np.concatenate(found) if found else np.zeros(0, np.int32)
        return Tokens(ids, offsets_of(np.asarray(lengths, np.int64)))

    def documents(self, table: pa.Table, text_column: str, text_pair_column: str | None = None) -> Documents:
        """Tokenize one text column of a table, or two for pairs. A row with a bad text gets an error and no tokens."""
        texts = read_texts(table.column(text_column))
        if text_pair_column is None:
            return self._checked(Documents(self.encode(texts.texts), None, texts.errors))
        pairs = read_texts(table.column(text_pair_column))
        errors = [first or second for first, second in zip(texts.errors, pairs.errors, strict=True)]
        kept = [[text if error is None else "" for text, error in zip(side, errors, strict=True)]
                for side in (texts.texts, pairs.texts)]  # fmt: skip
        first, second = (self.encode(side, are_pairs=True) for side in kept)
        return self._checked(Documents(first, second, errors))

    def _checked(self, documents: Documents) -> Documents:
        """Give an error to documents whose input rows would be empty: no tokens, and no special tokens around them."""
        if not self.template.num_special_tokens(pair=documents.is_pair):
            for row in np.flatnonzero(documents.num_tokens_D == 0):
                documents.errors[row] = documents.errors[row] or "the text has no tokens"
        return documents

    def character_spans(self, text: str) -> NDArray[np.int64]:
        """Return the position of each token in the text, in order.

        Returns:
            (T, 2): index of the token's first code point, and index after its last code point.

        Raises:
            ModelFolderError: The tokenizer is Python-only and does not provide positions.
        """
        if self._rust is None:
            raise ModelFolderError("this model's tokenizer is Python-only and does not provide character positions")
        led = self._led(text)
        with library_errors("the tokenizer cannot read a text"):
            spans = np.concatenate(
                [one.spans for one in pieces.tokenize(self._rust, led, most_tokens=self._most_tokens)]
            )
        moved: NDArray[np.int64] = np.maximum(spans - (len(led) - len(text)), 0)
        return moved

    def _led(self, text: str) -> str:
        return f" {text}" if self._lead_space and not text.startswith(" ") else text


def cut_documents(
    tokens: Tokens, plan: WindowPlan, template: Template, pair_tokens: Tokens | None = None
) -> CutDocuments:
    """Split documents or pairs into windows.

    The budget of the plan is that of one text. A pair has less room, because it has more special tokens. With sliding
    windows, the first text of a pair keeps up to half of the room, or more if the second text leaves it free, and the
    second text is split into windows. Without sliding windows, both texts are truncated, the longer one first.

    Args:
        tokens: The texts, or the first texts of pairs.
        plan: Window plan.
        template: What the tokenizer adds around a text.
        pair_tokens: The second texts of pairs, or None for single texts.

    Raises:
        SettingsError: max_length leaves no room for a pair.
    """
    special = template.num_special_tokens(pair=pair_tokens is not None)
    if pair_tokens is None:
        windows = plan_windows(tokens.num_tokens_D, plan)
        return CutDocuments(tokens, None, None, windows, special)
    room = min(plan.max_length - special, plan.budget)
    if room < 2:
        raise SettingsError(f"max_length={plan.max_length} leaves no room for a pair; use at least {special + 2}")
    first_D, second_D = tokens.num_tokens_D, pair_tokens.num_tokens_D
    if plan.sliding:
        kept_D = np.minimum(first_D, np.maximum(room // 2, room - second_D))
    else:
        kept_D = _longest_first(first_D, second_D, room)
    windows = plan_windows(second_D, plan, budget_D=np.maximum(room - kept_D, 1))
    cut_D = windows.truncated_D | (kept_D < first_D)
    windows = Windows(windows.document_W, windows.start_W, windows.stop_W, windows.offsets, cut_D)
    return CutDocuments(tokens, pair_tokens, kept_D, windows, special)


def assemble(cut: CutDocuments, template: Template, index_W: NDArray[np.integer]) -> InputRows:
    """Build the input rows of the windows with the given indices, in that order."""
    document_W = cut.windows.document_W[index_W]
    start_W = cut.windows.start_W[index_W]
    length_W = cut.windows.stop_W[index_W] - start_W
    if cut.pair_tokens is None:
        window = (cut.tokens.ids, cut.tokens.offsets[document_W] + start_W, length_W)
        parts = [_repeated(template.prefix, index_W), window, _repeated(template.suffix, index_W)]
        return _join(parts, template.type_ids)
    assert cut.first_kept_D is not None
    first = (cut.tokens.ids, cut.tokens.offsets[document_W], cut.first_kept_D[document_W])
    window = (cut.pair_tokens.ids, cut.pair_tokens.offsets[document_W] + start_W, length_W)
    specials = (template.pair_prefix, template.pair_middle, template.pair_suffix)
    prefix, middle, suffix = (_repeated(part, index_W) for part in specials)
    return _join([prefix, first, middle, window, suffix], template.pair_type_ids)


def offsets_of(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Convert lengths (N,) to offsets (N + 1,)."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def ragged_index(start: NDArray[np.integer], length: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the positions start[i], start[i] + 1, ... (length[i] of them) for all i, concatenated."""
    ends = np.cumsum(length, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(np.asarray(start, np.int64) - (ends - length), length)


def concat_tokens(pieces: Sequence[Tokens]) -> Tokens:
    """Concatenate texts in order."""
    ids = np.concatenate([np.zeros(0, np.int32), *(piece.ids for piece in pieces)])
    lengths = np.concatenate([np.zeros(0, np.int64), *(piece.num_tokens_D for piece in pieces)])
    return Tokens(ids, offsets_of(lengths))


_Segment = tuple[NDArray[np.integer], NDArray[np.int64], NDArray[np.int64]]
"""One segment of every window: an array of values, the start of each window's segment in it, and its length."""


def _repeated(special: tuple[int, ...], index_W: NDArray[np.integer]) -> _Segment:
    """Return the same special tokens as a segment of every window."""
    zero_W = np.zeros(len(index_W), np.int64)
    return np.asarray(special, np.int64), zero_W, zero_W + len(special)


def _join(parts: Sequence[_Segment], type_ids: Sequence[int]) -> InputRows:
    """Concatenate the segments of each window, and then all windows, into flat rows."""
    offsets = offsets_of(np.sum([length_W for _, _, length_W in parts], axis=0, dtype=np.int64))
    ids = np.empty(int(offsets[-1]), np.int64)
    types = np.empty_like(ids)
    place_W = offsets[:-1]
    for (values, start_W, length_W), type_id in zip(parts, type_ids, strict=True):
        target = ragged_index(place_W, length_W)
        ids[target] = values[ragged_index(start_W, length_W)]
        types[target] = type_id
        place_W = place_W + length_W
    return InputRows(ids, types, offsets)


def _longest_first(first_D: NDArray[np.int64], second_D: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """Return how many tokens of the first text are kept if the longer text loses tokens until both fit into room."""
    shorter_D, longer_D = np.minimum(first_D, second_D), np.maximum(first_D, second_D)
    kept_shorter_D = np.where(shorter_D + longer_D <= room, shorter_D, np.minimum(shorter_D, room // 2))
    kept_longer_D = np.minimum(longer_D, room - kept_shorter_D)
    return np.where(first_D <= second_D, kept_shorter_D, kept_longer_D)


@contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Raise ModelFolderError for errors of a tokenizer's library. A panic of the Rust library is no Exception.

    Args:
        message: What could not be done.
    """
    try:
        yield
    except (PipelinesError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelFolderError(f"{message}: {first_line(error)}") from error


def _rust_ids(rust: RustTokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in rust.encode_batch_fast(list(texts), add_special_tokens=False)]


def _batches_of_characters(texts: Sequence[str]) -> list[Sequence[str]]:
    """Split texts into consecutive batches of about CHARACTERS_PER_CALL characters. A very long text has its own."""
    if not texts:
        return []
    length_D = np.asarray([len(text) for text in texts], np.int64)
    is_long_D = length_D > pieces.PIECE_CHARACTERS
    is_first_D = np.diff(np.cumsum(length_D) // CHARACTERS_PER_CALL, prepend=-1) > 0
    is_first_D[is_long_D] = True
    is_first_D[1:] |= is_long_D[:-1]
    starts = [*np.flatnonzero(is_first_D).tolist(), len(texts)]
    return [texts[start:stop] for start, stop in itertools.pairwise(starts)]


def _read_json(path: Path) -> dict[str, object]:
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except ValueError as error:
        raise ModelFolderError(f"{path} is not valid JSON: {error}; it may be truncated") from error


def _content(token: object) -> str:
    """Return the text of a special token in tokenizer_config.json: a string, a mapping with a content, or nothing."""
    return str((token.get("content") if isinstance(token, dict) else token) or "")
