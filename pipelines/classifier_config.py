"""Read kind and labels of a Hugging Face classifier from its config.json, for folders without pipeline.json.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pipelines.errors import ModelFolderError, SettingsError
from pipelines.settings import DecisionSettings, Kind

KINDS_OF_PROBLEMS: dict[str, Kind] = {"multi_label_classification": "multilabel", "regression": "regression"}
CLASSIFIER = "SequenceClassification"
"""Part of the name of every class that is a sequence classifier, also of Simple Transformers' own."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's config.json.

    Raises:
        ModelFolderError: The file is missing or is not a JSON object.
    """
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ModelFolderError(f"{folder} has no config.json, so it is not a Hugging Face model folder") from error
    except ValueError as error:
        raise ModelFolderError(f"{file} is not valid JSON: {error}; it may be truncated") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{file} is not a JSON object")
    return content


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of transformers' classes that a config names. Empty if it names none."""
    names = config.get("architectures") or []
    return [names] if isinstance(names, str) else [str(name) for name in names]


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a config says that its model has a classification head. True if it names no class."""
    names = class_names(config)
    return not names or any(CLASSIFIER in name for name in names)


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Return the number of entries in the vocabulary, or None if the config does not say it."""
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None


def decision_of(config: Mapping[str, Any], *, where: str, kind: Kind | None = None) -> tuple[DecisionSettings, bool]:
    """Return kind and labels of a classifier.

    Without problem_type and without kind, two logits are binary, and more are multiclass, as in transformers' pipeline.

    Args:
        config: Content of config.json.
        where: Name of the folder, for error messages.
        kind: Meaning of the logits. None means that the config defines it.

    Returns:
        The decision, and whether its kind is a guess. More than two logits may also be those of a multilabel model.

    Raises:
        SettingsError: kind does not fit the number of logits, or one logit has no defined meaning.
        ModelFolderError: The label names are not usable.
    """
    names = _label_names(config, where)
    problem = config.get("problem_type")
    is_guess = kind is None and problem is None and len(names) > 2
    kind = kind or KINDS_OF_PROBLEMS.get(str(problem))
    if kind is None and len(names) == 1:
        raise SettingsError(
            f"{where}: its model has one logit, and config.json does not say what it means; convert it with its kind: "
            f"pipelines convert {where} NEW --kind regression (a number), or --kind multilabel (the probability of one "
            f"label)"
        )
    kind = kind or ("binary" if len(names) == 2 else "multiclass")
    if (kind == "binary" and len(names) != 2) or (kind == "regression" and len(names) != 1):
        raise SettingsError(
            f"{where} has {len(names)} logits, which does not fit kind {kind}; "
            f"give the kind with --kind: {', '.join(get_args(Kind))}"
        )
    try:
        return DecisionSettings(kind=kind, labels=() if kind == "regression" else names), is_guess
    except SettingsError as error:
        raise ModelFolderError(f"{where}: the labels in config.json cannot be used: {error}") from error


def _label_names(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the labels in the order of their ids. Hugging Face's default is two labels."""
    names = config.get("id2label")
    if names and not (isinstance(names, dict) and all(str(number).isdecimal() for number in names)):
        raise ModelFolderError(f"{where}: id2label in config.json must map the ids 0, 1, ... to names, not {names!r}")
    if names and sorted(map(int, names)) != list(range(len(names))):
        raise ModelFolderError(
            f"{where}: id2label in config.json must name the ids 0 to {len(names) - 1} once each, not "
            f"{', '.join(sorted(map(str, names)))}"
        )
    if names and not all(name is not None and str(name).strip() for name in names.values()):
        raise ModelFolderError(f"{where}: id2label in config.json has a label without a name: {names!r}")
    if names:
        return tuple(str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0])))
    return tuple(f"LABEL_{number}" for number in range(int(config.get("num_labels") or config.get("_num_labels") or 2)))
