"""Weights of sequence classifiers: loaded from safetensors, given a new head, and described without being loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from pipelines.errors import ModelFolderError, SettingsError, first_line
from pipelines.model_folder import check_weights
from pipelines.settings import DecisionSettings
from pipelines.text.pretrained import quiet_transformers
from pipelines.text.tokenization import Tokenizer

PROBLEM_TYPES = {
    "binary": "single_label_classification",
    "multiclass": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
"""Names of the dropout of attention weights in transformers' configs."""
SMALLEST_SHARE = 0.5
"""A tokenizer with fewer tokens than this share of the model's vocabulary does not belong to the model."""


def new_classifier(
    name: str, decision: DecisionSettings, *, pad_id: int, seed: int, attention_dropout: float | None = None
) -> tuple[nn.Module, bool]:
    """Load pretrained weights with a classification head for the decision's labels.

    If the weights already contain a head of the right shape, it is kept. Otherwise the head is new and seeded.

    Args:
        name: Name on the Hugging Face Hub, or a folder.
        decision: Kind and labels of the classifier.
        pad_id: The tokenizer's padding id, for a config that has none.
        seed: Seed of a new head.
        attention_dropout: Dropout of attention weights. None keeps the value of the config.

    Returns:
        The module in float32, and whether its head is new.

    Raises:
        ModelFolderError: The weights cannot be loaded as a sequence classifier from safetensors.
        SettingsError: attention_dropout is set, and the architecture has no such dropout.
    """
    torch.manual_seed(seed)
    names = list(decision.labels) or ["value"]
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                name,
                num_labels=decision.num_labels,
                id2label=dict(enumerate(names)),
                label2id={label: number for number, label in enumerate(names)},
                problem_type=PROBLEM_TYPES[decision.kind],
                trust_remote_code=False,
            )
            _set_attention_dropout(config, attention_dropout)
            set_pad_token(config, pad_id)
            module, info = AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError) as error:
        raise ModelFolderError(
            f"--model {name} cannot be loaded as a sequence classifier: {first_line(error)}; "
            f"give a folder or a hub name with safetensors weights"
        ) from error
    new_weights = [*info["missing_keys"], *(weight for weight, *_shapes in info["mismatched_keys"])]
    return module, any(not weight.startswith(f"{module.base_model_prefix}.") for weight in new_weights)


def _set_attention_dropout(config: Any, share: float | None) -> None:
    if share is None:
        return
    names = [name for name in ATTENTION_DROPOUTS if hasattr(config, name)]
    if not names:
        raise SettingsError(
            f"attention_dropout={share}: {config.model_type} has no dropout of attention weights; leave it unset"
        )
    for name in names:
        setattr(config, name, share)


def describe(name: str, *, attention_dropout: float | None = None) -> tuple[int | None, str]:
    """Return the longest input row and the model type of pretrained weights. Reads only the config.

    RoBERTa-like models number positions from padding_idx + 1, so their longest row is shorter by that number.

    Args:
        name: Name on the Hugging Face Hub, or a folder.
        attention_dropout: Checked only: a number needs an architecture with dropout of attention weights.

    Returns:
        The longest input row in tokens (None means no limit), and the model type.

    Raises:
        ModelFolderError: There is no config, or the weights of a folder are not safetensors.
        SettingsError: attention_dropout is set, and the architecture has no such dropout.
    """
    if Path(name).is_dir():
        check_weights(Path(name))
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"--model {name} is neither a folder nor a hub name: {first_line(error)}") from error
    _set_attention_dropout(config, attention_dropout)
    try:
        with torch.device("meta"):
            return row_limit(AutoModelForSequenceClassification.from_config(config)), str(config.model_type)
    except ValueError as error:
        raise ModelFolderError(
            f"--model {name} cannot be used as a sequence classifier: transformers has none for {config.model_type!r}"
        ) from error


def set_pad_token(config: Any, pad_id: int) -> None:
    """Set config.pad_token_id, if it is not set. Decoders find the last token of a padded row with it."""
    for part in (config, config.get_text_config()):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = pad_id


def vocabulary_of(config: Any) -> int | None:
    """Return the number of entries in a model's vocabulary, or None if the architecture has no vocabulary (canine)."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return None if size is None else int(size)


def check_vocabulary(tokenizer: Tokenizer, config: Any, *, where: str) -> None:
    """Check that a tokenizer can belong to a model.

    transformers opens a folder without tokenizer files with a tokenizer that knows no word.

    Args:
        tokenizer: The tokenizer.
        config: Config of the model.
        where: Name of the model, for the error message.

    Raises:
        ModelFolderError: The tokenizer has far fewer tokens than the model, or a token that the model does not have.
    """
    expected = vocabulary_of(config)
    if expected is None:
        return
    found, highest = tokenizer.vocabulary
    if found < SMALLEST_SHARE * expected:
        raise ModelFolderError(
            f"{where}: its tokenizer has {found:,} tokens and its model {expected:,}, so the tokenizer's files are missing "
            f"or belong to another model; add the files that the model was trained with (tokenizer.json and "
            f"tokenizer_config.json, or vocab.txt, vocab.json with merges.txt, spiece.model)"
        )
    if highest >= expected:
        raise ModelFolderError(
            f"{where}: its tokenizer has the token id {highest:,}, but its model knows ids below {expected:,}; add the "
            f"tokenizer that belongs to it, or resize the model first (model.resize_token_embeddings(len(tokenizer)))"
        )


def row_limit(module: Any) -> int | None:
    """Return the longest input row by the model's config: its positions, minus the unused ones at the start."""
    limit = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) - first_position(module) if limit and limit > 0 else None


def first_position(module: nn.Module) -> int:
    """Return the position id of a row's first token.

    This is padding_idx + 1 if the position embeddings have a padding index, else 0.
    """
    for name, child in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(child, nn.Embedding):
            return 0 if child.padding_idx is None else child.padding_idx + 1
    return 0
