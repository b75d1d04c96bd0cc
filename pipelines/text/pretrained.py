"""Tokenizers of pretrained models: save them in a model folder, and open those that exist in Python only.

Functions import transformers when they need it. A task that reads only a tokenizer.json therefore does not import it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.errors import ModelFolderError, SettingsError
from pipelines.model_folder import opens_as_transformers
from pipelines.text.template import Template
from pipelines.text.tokenization import Tokenizer, library_errors

SENTENCES = ("Some words, and the number 1,234.", "café naïve  two spaces\n中文")
"""Texts of which a tokenizer must make the same tokens before and after it is saved."""


def load_tokenizer(folder: Path, *, lead_space: bool = False) -> Tokenizer:
    """Load the tokenizer of a folder: from tokenizer.json, from older files, or Python-only (bertweet, xlm, flaubert).

    Args:
        folder: Folder that contains the tokenizer.
        lead_space: Whether to put a space before texts that do not start with one (`windows.leads_with_space`).

    Raises:
        ModelFolderError: The tokenizer cannot be opened.
    """
    if (folder / "tokenizer.json").is_file() and not opens_as_transformers(folder):
        return Tokenizer.load(folder, lead_space=lead_space)
    python = _open(str(folder), f"transformers cannot open the tokenizer in {folder}")
    if python.is_fast:  # a Rust tokenizer, which transformers may have made of older files, such as vocab.txt
        with tempfile.TemporaryDirectory(prefix="pipelines-tokenizer-") as converted:
            return write_tokenizer(python, Path(converted)).with_lead_space(lead_space)
    encode = partial(_python_ids, python)
    return Tokenizer(encode, template_of(python), lead_space=lead_space, vocabulary=python.get_vocab)


def save_tokenizer(
    name: str, folder: Path, more_tokens: Sequence[str] = (), *, do_lower_case: bool | None = None
) -> Tokenizer:
    """Save a pretrained tokenizer in the model folder, and open it there.

    Args:
        name: Model name on the Hugging Face Hub, or a folder.
        folder: Model folder to write to.
        more_tokens: Special tokens to add, which are never split. The caller must resize the model's embeddings.
        do_lower_case: Whether texts are lowercased first. None keeps the tokenizer's own setting.

    Raises:
        ModelFolderError: The tokenizer cannot be loaded.
        SettingsError: The tokenizer has no such setting.
    """
    options = {} if do_lower_case is None else {"do_lower_case": do_lower_case}
    tokenizer = _open(name, f"the tokenizer of {name} cannot be loaded", **options)
    tokenizer.add_tokens(list(more_tokens), special_tokens=True)
    opened = write_tokenizer(tokenizer, folder)
    if do_lower_case is not None:
        lower, upper = opened.encode(["some words", "Some WORDS"]).to_arrow().to_pylist()
        if (lower == upper) != do_lower_case:
            raise SettingsError(
                f"do_lower_case={do_lower_case} has no effect on the tokenizer of {name}; leave it out, and change the "
                "case of the texts yourself"
            )
    return opened


def write_tokenizer(tokenizer: Any, folder: Path) -> Tokenizer:
    """Save a Hugging Face tokenizer in a folder, and open it there.

    Raises:
        ModelFolderError: The saved tokenizer gives other tokens.
    """
    tokenizer.save_pretrained(folder)
    if not tokenizer.is_fast:  # what the class saves may lack its merges (bertweet)
        for attribute, name in tokenizer.vocab_files_names.items():
            source = getattr(tokenizer, attribute, None)
            if source and Path(source).is_file() and Path(source).resolve() != (folder / name).resolve():
                shutil.copy(source, folder / name)
    file = folder / "tokenizer_config.json"  # it omits the padding side if the class defines it (XLNet)
    config = {**json.loads(file.read_text()), "padding_side": tokenizer.padding_side}
    file.write_text(json.dumps(config, indent=2))
    opened = Tokenizer.load(folder) if tokenizer.is_fast else load_tokenizer(folder)
    texts = [*SENTENCES, f"two {' '.join(tokenizer.all_special_tokens)} words"]
    with quiet_transformers():
        expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if opened.encode(texts).to_arrow().to_pylist() != expected:
        raise ModelFolderError(
            f"the tokenizer {type(tokenizer).__name__} gives other tokens after it is saved; save it as a fast "
            "tokenizer first (tokenizer.json)"
        )
    pad = tokenizer.convert_ids_to_tokens(opened.template.pad_id)
    if tokenizer.pad_token is None and pad in tokenizer.all_special_tokens:  # for batches of transformers itself
        file.write_text(json.dumps({**config, "pad_token": pad}, indent=2))
    return opened


def uses_type_ids(folder: Path) -> bool:
    """Return whether a folder's tokenizer passes token type ids to its model. The tokenizer's class determines this."""
    return "token_type_ids" in _open(str(folder), f"the tokenizer in {folder} cannot be opened").model_input_names


def num_tokens_of(folder: Path) -> int:
    """Return the number of tokens in the vocabulary of a folder's tokenizer, including added tokens."""
    return len(_open(str(folder), f"the tokenizer in {folder} cannot be opened"))


def template_of(tokenizer: Any) -> Template:
    """Find out what a Python-only tokenizer adds around one text and around a pair."""
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
        next((number for number in (tokenizer.pad_token_id, tokenizer.eos_token_id) if number is not None), 0),
        tokenizer.padding_side == "left",
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and log messages of transformers. Problems that matter are raised as errors.

    Threads may be in this context at the same time: the first one silences, and the last one restores.
    """
    from transformers.utils import logging

    with _QUIET.lock:
        if not _QUIET.num_inside:
            _QUIET.before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        _QUIET.num_inside += 1
    try:
        yield
    finally:
        with _QUIET.lock:
            _QUIET.num_inside -= 1
            if not _QUIET.num_inside:
                level, has_bars = _QUIET.before
                logging.set_verbosity(level)
                if has_bars:
                    logging.enable_progress_bar()


class _Quiet:
    """How many threads silence transformers, and what its settings were before."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_inside = 0
        self.before = (0, True)


_QUIET = _Quiet()


def _open(name: str, otherwise: str, **options: Any) -> Any:
    from transformers import AutoTokenizer

    with library_errors(otherwise), quiet_transformers():
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)


def _python_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of whole texts without special tokens. Suppress the warning about texts longer than the model."""
    with quiet_transformers():
        return [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in texts]
