"""Convert classifiers of other tools into finished model folders, and pickled base models into trainable ones.

Reads folders of Simple Transformers, Hugging Face classifiers, and LoRA adapters. Pickled weights are read with torch's
weights-only unpickler, which refuses everything that could run code. Imports no Ray.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from transformers import AutoModel

from pipelines.classifier_config import class_names, decision_of, is_classifier, read_config
from pipelines.errors import ModelFolderError, SettingsError, first_line
from pipelines.model.lora import Adapter, find_adapter, merge_adapter
from pipelines.model.scorer import plan_of
from pipelines.model.weights import (
    OPENING_ERRORS,
    LoadedWeights,
    describe,
    load_module,
    new_classifier,
    num_labels_of,
    row_limit,
    safe_config,
    save_module,
    set_labels,
    set_pad_token,
    vocabulary_of,
)
from pipelines.model_files import PIPELINE_FILE, local_folder
from pipelines.model_folder import ModelFolder, check_is_new, new_folder, seal
from pipelines.settings import DecisionSettings, Kind, WindowSettings
from pipelines.simpletransformers.arguments import (
    MODEL_ARGS,
    ClassificationArgs,
    MultiLabelClassificationArgs,
    read_model_args,
)
from pipelines.simpletransformers.translate import count_labels, decision_settings, resolve_args, window_settings
from pipelines.text.pretrained import quiet_transformers, save_tokenizer
from pipelines.text.tokenization import Tokenizer
from pipelines.training_settings import TrainSettings


def convert(old: str, new: str, kind: Kind | None = None, labels: Sequence[str] | None = None) -> ModelFolder | None:
    """Convert the folder old into a folder at new. The folder new is written completely or not at all.

    A folder with model_args.json keeps its arguments and the windows of Simple Transformers. A LoRA adapter is merged
    into its model. A base model without a classification head becomes a folder that `pipelines train --model` takes.
    The folder old does not change.

    Args:
        old: Folder of Simple Transformers, of a Hugging Face model, or of a LoRA adapter.
        new: Folder to create.
        kind: Meaning of the logits. None means that model_args.json or config.json defines it.
        labels: Names of the labels, in the order of the logits. None means those of model_args.json or config.json.

    Returns:
        The model folder, or None for a base model without a classification head.

    Raises:
        ModelFolderError: old cannot be read, or is a finished model folder already.
        OutputError: new exists and is not empty.
        SettingsError: kind is unknown, is needed, or does not fit the model.
    """
    if kind is not None and kind not in get_args(Kind):
        raise SettingsError(f"--kind {kind} is not one of: {', '.join(get_args(Kind))}")
    check_is_new(new)
    if (Path(old) / PIPELINE_FILE).is_file():
        raise ModelFolderError(f"{old} is a finished model folder already; there is nothing to convert")
    with new_folder(new) as partial:
        folder = _convert(old, partial, kind, labels)
    return None if folder is None else replace(folder, path=Path(new).expanduser())


def _convert(old: str, folder: Path, kind: Kind | None, labels: Sequence[str] | None) -> ModelFolder | None:
    adapter = find_adapter(old)
    if adapter is not None:
        return _convert_adapter(adapter, folder, kind, labels)
    old = str(local_folder(old))
    config = read_config(Path(old))
    try:
        opened = safe_config(str(old))
    except OPENING_ERRORS as error:
        raise ModelFolderError(f"{old}: its config.json cannot be used: {first_line(error)}") from error
    tokenizer = save_tokenizer(old, folder)
    tokenizer.check_vocabulary(vocabulary_of(opened), where=old)
    set_pad_token(opened, tokenizer.template.pad_id)
    if not is_classifier(config):
        _refuse_names(old, opened, kind, labels)
        _convert_base(old, opened, folder)
        return None
    module, found = _load(old, opened)
    if found.has_new_head and not class_names(config):  # an old base model, whose config names no class
        _refuse_names(old, opened, kind, labels)
        _convert_base(old, opened, folder)
        return None
    found.check_all(old)
    if (Path(old) / MODEL_ARGS).is_file():
        windows, decision, args = _of_simpletransformers(old, module.config.num_labels, kind)
        args.save(str(folder))
    else:
        windows, decision = WindowSettings(), _decision(config, old, kind)
    if decision.num_labels != module.config.num_labels or (kind is not None and decision.kind != kind):
        raise SettingsError(
            f"{old} has {module.config.num_labels} logits, which does not fit kind {kind or decision.kind}; "
            f"give the kind with --kind: {', '.join(get_args(Kind))}"
        )
    return _write(module, folder, tokenizer, windows, _named(decision, labels))


def _refuse_names(old: str, config: Any, kind: Kind | None, labels: Sequence[str] | None) -> None:
    """Raise ModelFolderError if a kind or labels are given for a base model."""
    if kind is not None or labels is not None:
        raise ModelFolderError(
            f"{old} has no classification head (it is a {config.model_type}), so it has no --kind and no --labels; "
            f"leave them out, and fine-tune the new folder"
        )


def _convert_base(old: str, config: Any, folder: Path) -> None:
    """Write a base model without a classification head as safetensors, for training. A missing pooler stays missing."""
    module, found = _load(old, config, auto_class=AutoModel)
    found.check_body(old)
    weights = {name: weight for name, weight in module.state_dict().items() if name not in found.missing_in_body}
    with quiet_transformers():
        module.save_pretrained(folder, state_dict=weights)


def _convert_adapter(adapter: Adapter, folder: Path, kind: Kind | None, labels: Sequence[str] | None) -> ModelFolder:
    """Merge an adapter into its model. The adapter has the head, or its model has one."""
    pretrained = describe(str(adapter.folder))
    windows, decision = _settings_of_adapter(adapter, kind)
    decision = _named(decision, labels)
    tokenizer = save_tokenizer(pretrained.tokenizer, folder)
    tokenizer.check_vocabulary(pretrained.vocabulary, where=str(adapter.folder))
    module, has_new_head = new_classifier(
        str(adapter.folder), decision, pad_id=tokenizer.template.pad_id, settings=TrainSettings()
    )
    if has_new_head:
        raise ModelFolderError(
            f"neither the adapter {adapter.folder} nor its model {adapter.base} has a classification head that fits; "
            f"save the adapter with its head (modules_to_save), or train on: pipelines train --model {adapter.folder}"
        )
    merge_adapter(module)
    return _write(module, folder, tokenizer, windows, decision)


def _settings_of_adapter(adapter: Adapter, kind: Kind | None) -> tuple[WindowSettings, DecisionSettings]:
    """Return windows and decision of an adapter: its own, or those by the config of its model."""
    saved, num_labels = adapter.settings(), num_labels_of(adapter)
    if saved is not None and kind in (None, saved[1].kind):
        return saved
    config: dict[str, Any] = {"num_labels": num_labels}  # another head's names, in its model's config, are not its own
    if num_labels is None:
        config = safe_config(adapter.base).to_dict()
    if saved is not None and len(saved[1].labels) > 1:
        config = {"id2label": dict(enumerate(saved[1].labels))}
    return WindowSettings(), _decision(config, str(adapter.folder), kind)


def _load(old: str, config: Any, **options: Any) -> tuple[Any, LoadedWeights]:
    """Load the weights of a folder, from safetensors or from a pickle of tensors."""
    try:
        return load_module(old, config, also_pickles=True, **options)
    except pickle.UnpicklingError as error:
        raise ModelFolderError(f"the pickle in {old} is refused: it contains objects other than tensors") from error
    except OPENING_ERRORS as error:
        raise ModelFolderError(f"{old} cannot be read: {first_line(error)}") from error


def _decision(config: Any, old: str, kind: Kind | None) -> DecisionSettings:
    """Return the decision by config.json. Raises SettingsError if it could be multiclass or multilabel."""
    decision, is_guess = decision_of(config, where=old, kind=kind)
    if is_guess:
        raise SettingsError(f"{old}/config.json does not say what its labels mean; add --kind multiclass or multilabel")
    return decision


def _named(decision: DecisionSettings, labels: Sequence[str] | None) -> DecisionSettings:
    if labels is None:
        return decision
    if not decision.labels:
        raise SettingsError(f"--labels {', '.join(labels)}: a regression has no labels; leave --labels out")
    if len(labels) != len(decision.labels):
        raise SettingsError(
            f"--labels names {len(labels)} labels, and the model has {len(decision.labels)}: "
            f"{', '.join(decision.labels)}"
        )
    return replace(decision, labels=tuple(labels))


def _write(
    module: Any, folder: Path, tokenizer: Tokenizer, windows: WindowSettings, decision: DecisionSettings
) -> ModelFolder:
    plan = plan_of(windows, tokenizer, model_type=module.config.model_type, model_limit=row_limit(module))
    set_labels(module.config, decision)
    save_module(module, folder)
    return seal(ModelFolder(folder, replace(windows, max_length=plan.max_length), decision))


def _of_simpletransformers(
    old: str, num_labels: int, kind: Kind | None
) -> tuple[WindowSettings, DecisionSettings, ClassificationArgs]:
    saved = read_model_args(Path(old))
    is_multilabel = (
        saved.get("model_class") == "MultiLabelClassificationModel" if kind is None else kind == "multilabel"
    )
    args = resolve_args(MultiLabelClassificationArgs if is_multilabel else ClassificationArgs, old, None)
    args.model_class = "MultiLabelClassificationModel" if is_multilabel else "ClassificationModel"
    if kind is not None:
        args.regression = kind == "regression"
    if len(args.labels_list) != num_labels:
        args.labels_list, args.labels_map = [], {}
    count_labels(args, None if args.regression else num_labels, is_multilabel=is_multilabel)
    model_type = args.model_type if args.model_type != "auto" else None
    return window_settings(args, model_type), decision_settings(args, num_labels, is_multilabel=is_multilabel), args
