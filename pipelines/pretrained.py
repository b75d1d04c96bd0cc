"""Tokenizers of pretrained weights, as transformers knows them: fetched, saved, and opened where Rust has none.

transformers is imported when a function needs it, so that a task that reads a tokenizer.json goes without.
Knows no torch of its own, no ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.errors import ModelFolderError
from pipelines.tokenization import Template, Tokenizer


def load_tokenizer(folder: Path, *, lead_space: bool = False) -> Tokenizer:
    """The tokenizer of a folder: its tokenizer.json, or else one that exists in Python only (bertweet, xlm, flaubert).

    lead_space puts a space before texts that have none, as `windows.leads_with_space` says of a folder.
    """
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder, lead_space=lead_space)
    python = _open(str(folder), f"{folder} has no tokenizer.json, and transformers cannot open what it has")
    return Tokenizer(lambda texts: _python_ids(python, texts), template_of(python), lead_space=lead_space)


def save_tokenizer(name: str, folder: Path, more_tokens: Sequence[str] = ()) -> Tokenizer:
    """Copy the tokenizer of a hub name or folder into the model folder and open it there.

    more_tokens are added as special tokens, which are never split; the model's embeddings must be resized to them.
    """
    tokenizer = _open(name, f"the tokenizer of {name} cannot be loaded")
    tokenizer.add_tokens(list(more_tokens), special_tokens=True)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"  # which leaves the padding side out where the class knows it (XLNet)
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": tokenizer.padding_side}, indent=2))
    return load_tokenizer(folder)


def uses_type_ids(folder: Path) -> bool:
    """Whether a folder's tokenizer hands its model token type ids; that is settled by the tokenizer's class."""
    return "token_type_ids" in _open(str(folder), f"the tokenizer in {folder} cannot be opened").model_input_names


def vocabulary_size(folder: Path) -> int:
    """Tokens that a folder's tokenizer knows, added ones included."""
    return len(_open(str(folder), f"the tokenizer in {folder} cannot be opened"))


def template_of(tokenizer: Any) -> Template:
    """Ask a Python-only tokenizer what it puts around one text and around a pair."""
    first, second = -1, -2  # no token has these ids
    single, pair = (tokenizer.build_inputs_with_special_tokens(*parts) for parts in ([[first]], [[first], [second]]))
    place, (one, two) = single.index(first), (pair.index(first), pair.index(second))
    types = tokenizer.create_token_type_ids_from_sequences([first])
    pair_types = tokenizer.create_token_type_ids_from_sequences([first], [second])
    return Template(
        tuple(single[:place]),
        tuple(single[place + 1 :]),
        (types[0], types[place], types[-1]),
        tuple(pair[:one]),
        tuple(pair[one + 1 : two]),
        tuple(pair[two + 1 :]),
        (pair_types[0], pair_types[one], pair_types[two - 1], pair_types[two], pair_types[-1]),
        tokenizer.pad_token_id or 0,
        tokenizer.padding_side == "left",
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own progress and load report; what matters is raised as an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _open(name: str, otherwise: str) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ModelFolderError(f"{otherwise}: {str(error).strip().splitlines()[0]}") from error


def _python_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of whole texts without special tokens; silent about texts longer than the model."""
    with quiet_transformers():
        return [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in texts]
