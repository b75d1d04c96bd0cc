"""Checks before a facade opens a model: keywords, device and config. Reads the arguments stored in the folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import ModelFolderError, SettingsError, first_line
from pipelines.fields import plain
from pipelines.model.devices import resolve_device
from pipelines.model.weights import OPENING_ERRORS, safe_config
from pipelines.model_files import PIPELINE_FILE, check_weights
from pipelines.model_folder import read_model_folder
from pipelines.simpletransformers.arguments import MODEL_ARGS, ClassificationArgs
from pipelines.simpletransformers.translate import saved_args
from pipelines.text.pretrained import quiet_transformers

MODEL_TYPES = {
    "bertweet": "roberta",
    "bigbird": "big_bird",
    "debertav2": "deberta-v2",
    "herbert": "bert",
    "xlmroberta": "xlm-roberta",
}
"""Architectures with another name in Simple Transformers than in Hugging Face."""


FIXED_KEYWORDS: dict[str, tuple[Any, str]] = {
    "config": (None, "give single values of it in args: args={'config': {...}}"),
    "dtype": ("auto", "weights are loaded in float32; the argument dtype of args sets the one of predictions"),
    "torch_dtype": ("auto", "weights are loaded in float32; the argument dtype of args sets the one of predictions"),
    "output_loading_info": (False, "weights that are missing are an error here"),
    "use_safetensors": (True, "pickles can run code; convert them: pipelines convert OLD NEW"),
    "weights_only": (True, "pickles can run code; convert them: pipelines convert OLD NEW"),
}
"""Keywords of from_pretrained that are fixed here: the harmless value, and what to do instead."""


def refuse_keywords(kwargs: dict[str, Any], *, is_multilabel: bool) -> None:
    """Refuse keywords of Simple Transformers that are not supported. Unset ones are removed from kwargs."""
    if kwargs.get("trust_remote_code"):
        raise SettingsError("trust_remote_code=True is refused: remote code never runs")
    wrong = "weight" if is_multilabel else "pos_weight"
    if kwargs.pop(wrong, None) is not None:
        right = "pos_weight" if is_multilabel else "weight"
        owner = "MultiLabelClassificationModel" if is_multilabel else "ClassificationModel"
        raise SettingsError(f"{owner} has no {wrong}, which would have no effect on its loss; use {right}")
    for name, (harmless, remedy) in FIXED_KEYWORDS.items():
        value = kwargs.pop(name, None)
        if value not in (None, harmless):
            raise SettingsError(f"{name}={value!r} is refused: {remedy}")
    for name in ("onnx_execution_provider", "global_attention_fn", "sweep_config"):
        if kwargs.pop(name, None):
            raise SettingsError(f"{name} is refused: it is not supported")


def args_of_folder(folder: Path) -> dict[str, Any]:
    """Return the arguments from a folder's pipeline.json, if it has no model_args.json, which is more complete."""
    if not (folder / PIPELINE_FILE).is_file() or (folder / MODEL_ARGS).is_file():
        return {}
    found = read_model_folder(folder)
    return saved_args(found.windows, found.decision)


def loss_weights(values: Any, name: str, labels: Sequence[Any]) -> Any:
    """Convert loss weights to a tuple. None and "balanced" are unchanged.

    Args:
        values: One weight per label, or a mapping of labels (their names or ids) to weights.
        name: Name of the parameter, for the error message.
        labels: All labels as the caller spells them, in the order of their ids.

    Raises:
        SettingsError: A mapping names an unknown label, or lacks one.
    """
    if values is None or isinstance(values, str):
        return values
    if hasattr(values, "to_dict"):  # a series: its index names the labels
        values = values.to_dict()
    try:
        if not isinstance(values, Mapping):
            return tuple(float(value) for value in values)
        given = {str(plain(label)): float(weight) for label, weight in values.items()}
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{name}={values!r} must have one number for each label: {list(labels)}") from error
    known = [str(label) for label in labels]
    if not given.keys() <= set(known):
        known = [str(number) for number in range(len(labels))]
    if sorted(given) != sorted(known):
        raise SettingsError(f"{name}={dict(values)} must have one weight for each label: {list(labels)}")
    return tuple(given[label] for label in known)


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Raise SettingsError for a keyword whose value is not a function."""
    for name, metric in metrics.items():
        if not callable(metric):
            raise SettingsError(f"{name}={metric!r} is not a metric: pass a function of (true labels, predictions)")


def warn_of_inert(args: ClassificationArgs) -> None:
    """Give one warning for all arguments that are set and have no effect here."""
    names = args.changed("inert")
    if names:
        message = f"without effect here: {', '.join(names)} (docs/reference/simpletransformers.md says why)"
        warnings.warn(message, UserWarning, stacklevel=3)


def device_of(use_cuda: bool | None, cuda_device: int) -> str:
    """Return the device. use_cuda None uses a GPU if there is one; True raises SettingsError if there is none."""
    if use_cuda is None:
        return str(resolve_device("auto" if cuda_device < 0 else f"cuda:{cuda_device}"))
    if not use_cuda:
        return "cpu"
    return str(resolve_device("cuda" if cuda_device < 0 else f"cuda:{cuda_device}"))


def open_config(model_type: str, model_name: str, num_labels: int | None, args: ClassificationArgs) -> Any:
    """Read Hugging Face's config. Raises ModelFolderError if model_type differs from that of the weights."""
    if Path(model_name).is_dir():
        check_weights(Path(model_name))
    if args.config.get("output_hidden_states") or args.config.get("output_attentions"):
        raise SettingsError("config output_hidden_states is refused: predict returns only predictions and raw outputs")
    if args.config.get("trust_remote_code"):
        raise SettingsError("config trust_remote_code is refused: remote code never runs")
    fixed = [key for key in ("num_labels", "id2label", "label2id", "problem_type") if key in args.config]
    if fixed:
        raise SettingsError(
            f"config {fixed[0]} is refused: use num_labels, labels_list, regression, or the other class"
        )
    values = {name: value for name, value in args.config.items() if name != "trust_remote_code"}
    if num_labels is not None:
        values["num_labels"] = num_labels
    try:
        with quiet_transformers():
            config = safe_config(model_name, **values)
    except OPENING_ERRORS as error:
        if Path(model_name).is_dir():
            raise ModelFolderError(f"{model_name}: its config.json cannot be used: {first_line(error)}") from error
        raise ModelFolderError(f"{model_name} is neither a folder nor a hub name: {first_line(error)}") from error
    wanted = MODEL_TYPES.get(model_type, model_type)
    if wanted not in ("auto", config.model_type):
        raise ModelFolderError(
            f"model_type is {model_type!r} but {model_name} holds a {config.model_type!r}; use that, or 'auto'"
        )
    return config
