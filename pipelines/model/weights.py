"""Weights of sequence classifiers: loaded from safetensors, given a new head, and described without being loaded."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from pipelines.errors import ModelFolderError, SettingsError, first_line
from pipelines.model.devices import RANDOM
from pipelines.model.lora import Adapter, add_adapter, find_adapter
from pipelines.model_files import ADAPTER_CONFIG, TOKENIZER_FILES, check_weights
from pipelines.settings import DecisionSettings
from pipelines.text.pretrained import quiet_transformers
from pipelines.training_settings import TrainSettings

PROBLEM_TYPES = {
    "binary": "single_label_classification",
    "multiclass": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}
POOLER = ".pooler."
logger = logging.getLogger(__name__)
OPENING_ERRORS = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, AssertionError,
    ArithmeticError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""Errors of transformers when it opens a config or weights that it cannot use."""
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
"""Names of the dropout of attention weights in transformers' configs."""


@dataclass(frozen=True)
class LoadedWeights:
    """Which weights of a module came from its files."""

    missing_in_body: tuple[str, ...]
    """Weights of the body that are not in the files, or have another shape there. They are random."""
    missing_in_head: tuple[str, ...]
    """The same for the weights behind the body."""
    unexpected: tuple[str, ...]
    """Weights in the files that the module has no place for."""

    @property
    def has_new_head(self) -> bool:
        """Whether some weights of the head are random."""
        return bool(self.missing_in_head)

    def check_all(self, where: str) -> None:
        """Raise ModelFolderError if any weights are random."""
        missing = [*self.missing_in_head, *self.missing_in_body]
        if missing:
            raise ModelFolderError(
                f"{where} lacks weights of the classifier ({', '.join(missing[:3])}); fine-tune it first: "
                f"pipelines train --model {where}"
            )

    def check_body(self, where: str) -> None:
        """Raise ModelFolderError if weights of the body are random, except for the pooler, which many models omit."""
        missing = [name for name in self.missing_in_body if POOLER not in f".{name}"]
        if missing:
            raise ModelFolderError(
                f"{where} lacks {len(missing)} weights of its body, such as {missing[0]}, which would be random; "
                f"check that its config.json belongs to its weights, or copy the folder again"
            )


def load_module(
    name: str,
    config: Any,
    *,
    auto_class: Any = AutoModelForSequenceClassification,
    also_pickles: bool = False,
    **options: Any,
) -> tuple[Any, LoadedWeights]:
    """Load a module in float32 with a class of transformers. Code from the files never runs.

    Args:
        name: Folder, or name on the Hugging Face Hub.
        config: Config of transformers.
        auto_class: Class of transformers that chooses the module's class.
        also_pickles: Whether pickles that contain only tensors are read too.
        options: Further options of from_pretrained.

    Raises:
        Exception: One of OPENING_ERRORS, if the weights cannot be used.
    """
    fixed = {
        "config": config,
        "dtype": torch.float32,
        "trust_remote_code": False,
        "use_safetensors": None if also_pickles else True,
        "weights_only": True,
    }
    with quiet_transformers():
        module, info = auto_class.from_pretrained(name, **options, **fixed, output_loading_info=True)
    missing = sorted([*info["missing_keys"], *(weight for weight, *_shapes in info["mismatched_keys"])])
    body = f"{module.base_model_prefix}."
    is_classifier = auto_class is AutoModelForSequenceClassification
    is_body = [not is_classifier or weight.startswith(body) for weight in missing]
    return module, LoadedWeights(
        tuple(weight for weight, inside in zip(missing, is_body, strict=True) if inside),
        tuple(weight for weight, inside in zip(missing, is_body, strict=True) if not inside),
        tuple(sorted(info["unexpected_keys"])),
    )


def safe_config(name: str, **values: Any) -> Any:
    """Read the config of a folder or of a name on the Hugging Face Hub. No code of it runs.

    An attention that names a repository of the Hub is not used: transformers would fetch its code and run it.

    Args:
        name: Folder, or name on the Hugging Face Hub.
        values: Values that replace those of the config.

    Raises:
        Exception: One of OPENING_ERRORS, if the config cannot be used.
    """
    config = AutoConfig.from_pretrained(name, **values, trust_remote_code=False)
    attention = config._attn_implementation
    if "/" in json.dumps(attention):
        logger.warning(
            "%s: its config.json asks for the attention %s, which is code of others; not used", name, attention
        )
        config._attn_implementation = None
    return config


def new_classifier(
    name: str, decision: DecisionSettings, *, pad_id: int, settings: TrainSettings
) -> tuple[nn.Module, bool]:
    """Load pretrained weights with a classification head for the decision's labels.

    If the weights already contain a head of the right shape, it is kept. Otherwise the head is new and seeded.

    Args:
        name: Name on the Hugging Face Hub, or a folder: of a model, or of a LoRA adapter, which is then continued.
        decision: Kind and labels of the classifier.
        pad_id: The tokenizer's padding id, for a config that has none.
        settings: Seed of a new head, dropout of attention weights, and the settings of LoRA.

    Returns:
        The module in float32, with LoRA layers if the settings or the name ask for them, and whether its head is new.

    Raises:
        ModelFolderError: The weights cannot be loaded as a sequence classifier from safetensors.
        SettingsError: A setting does not fit the architecture.
    """
    adapter = find_adapter(name)
    with RANDOM, torch.random.fork_rng(devices=[]):
        base = name if adapter is None else adapter.base
        module, is_new, has_new_pooler = _load_pretrained(base, decision, pad_id, settings)
        if adapter is not None or settings.lora_rank:
            is_new = not add_adapter(module, settings, adapter, train_pooler=has_new_pooler) and is_new
    return module, is_new


def _load_pretrained(
    name: str, decision: DecisionSettings, pad_id: int, settings: TrainSettings
) -> tuple[nn.Module, bool, bool]:
    """Return the module, whether its head has new weights, and whether its pooler has."""
    torch.manual_seed(settings.seed)
    try:
        with quiet_transformers():
            config = safe_config(name)
        own_labels = list(class_labels(config))
        set_labels(config, decision)
        _set_attention_dropout(config, settings.attention_dropout)
        set_pad_token(config, pad_id)
        module, found = load_module(name, config, ignore_mismatched_sizes=True)
    except OPENING_ERRORS as error:
        raise ModelFolderError(
            f"--model {name} cannot be loaded as a sequence classifier: {first_line(error)}; "
            f"give a folder or a hub name with safetensors weights"
        ) from error
    found.check_body(f"--model {name}")
    if not found.has_new_head and own_labels != list(decision.labels) and set(own_labels) == set(decision.labels):
        _reorder_outputs(module, [own_labels.index(label) for label in decision.labels])
    return module, found.has_new_head, bool(found.missing_in_body)


def set_labels(config: Any, decision: DecisionSettings) -> None:
    """Write labels and kind into a config of transformers."""
    names = list(decision.labels) or ["value"]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = PROBLEM_TYPES[decision.kind]


def class_labels(config: Any) -> list[str]:
    """Return the names of a config's labels, by their ids."""
    return [str(config.id2label[number]) for number in sorted(config.id2label)]


def save_module(module: Any, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write config.json and model.safetensors.

    Args:
        module: A sequence classifier.
        folder: An existing folder.
        weights: Weights to write instead of the module's own.
    """
    with quiet_transformers():
        module.save_pretrained(folder, state_dict=weights)
    file = folder / "config.json"  # it omits labels like LABEL_0, also where their number is not the class's default
    labels = {"id2label": module.config.id2label, "label2id": module.config.label2id}
    file.write_text(json.dumps({**labels, **json.loads(file.read_text())}, indent=2) + "\n")


def _reorder_outputs(module: Any, order: list[int]) -> None:
    """Give the rows of the last layer another order, so that output i becomes what output order[i] was."""
    outputs = _output_weights(module.config)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name in outputs:
                weight.copy_(weight[order])


def _output_weights(config: Any) -> set[str]:
    """Return the names of the weights of a sequence classifier that have one row for each label."""
    shapes = []
    for number in (2, 3):
        changed = copy.deepcopy(config)
        changed.num_labels = number
        with torch.device("meta"):
            module = AutoModelForSequenceClassification.from_config(changed, trust_remote_code=False)
        shapes.append({name: weight.shape for name, weight in module.named_parameters()})
    return {name for name, shape in shapes[0].items() if shape != shapes[1][name]}


def num_labels_of(adapter: Adapter) -> int | None:
    """Return the number of outputs of an adapter's head, or None if it has no head of its own.

    Raises:
        ModelFolderError: The adapter or the config of its model cannot be read.
    """
    try:
        outputs = _output_weights(safe_config(adapter.base))
    except OPENING_ERRORS as error:
        raise ModelFolderError(_unusable(str(adapter.folder), adapter.base, error)) from error
    return next((shape[0] for name, shape in adapter.shapes().items() if name in outputs), None)


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


@dataclass(frozen=True)
class Pretrained:
    """What the config of pretrained weights says."""

    row_limit: int | None
    """Longest input row, in tokens. None means no limit."""
    model_type: str
    vocabulary: int | None
    """Number of entries of the vocabulary. None if the architecture has no vocabulary."""
    tokenizer: str
    """Where the tokenizer is: a folder, or a name on the Hugging Face Hub."""
    base: str
    """The pretrained weights themselves: the name, or the model of the adapter in the folder of this name."""


def describe(name: str, *, attention_dropout: float | None = None) -> Pretrained:
    """Describe pretrained weights. Reads only the config.

    RoBERTa-like models number positions from padding_idx + 1, so their longest row is shorter by that number.

    Args:
        name: Name on the Hugging Face Hub, or a folder: of a model, or of a LoRA adapter.
        attention_dropout: Checked only: a number needs an architecture with dropout of attention weights.

    Raises:
        ModelFolderError: There is no config, or the weights of a folder are not safetensors.
        SettingsError: attention_dropout is set, and the architecture has no such dropout.
    """
    adapter = find_adapter(name)
    has_tokenizer = any((Path(name) / file).is_file() for file in TOKENIZER_FILES)
    base = name if adapter is None else adapter.base
    if Path(base).is_dir():
        check_weights(Path(base))
    try:
        with quiet_transformers():
            config = safe_config(base)
    except OPENING_ERRORS as error:
        raise ModelFolderError(_unusable(name, base, error)) from error
    _set_attention_dropout(config, attention_dropout)
    try:
        with torch.device("meta"):
            limit = row_limit(AutoModelForSequenceClassification.from_config(config, trust_remote_code=False))
    except OPENING_ERRORS as error:
        is_unknown = "Unrecognized configuration class" in str(error)
        reason = f"transformers has none for {config.model_type!r}" if is_unknown else first_line(error)
        raise ModelFolderError(f"--model {name} cannot be used as a sequence classifier: {reason}") from error
    tokenizer = name if adapter is None or has_tokenizer else base
    return Pretrained(limit, str(config.model_type), vocabulary_of(config), tokenizer, base)


def _unusable(name: str, base: str, error: BaseException) -> str:
    if base != name:
        return (
            f"the adapter {name} belongs to the model {base}, which cannot be opened: {first_line(error)}; give its "
            f"folder or hub name as base_model_name_or_path in {ADAPTER_CONFIG}"
        )
    if Path(name).is_dir():
        return f"--model {name}: its config.json cannot be used: {first_line(error)}"
    return f"--model {name} is neither a folder nor a hub name: {first_line(error)}"


def set_pad_token(config: Any, pad_id: int) -> None:
    """Set config.pad_token_id, if it is not set. Decoders find the last token of a padded row with it."""
    for part in (config, config.get_text_config()):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = pad_id


def pad_token_of(config: Any, otherwise: int) -> int:
    """Return the id with which rows are padded: that of the config, because the model looks for it in a padded row."""
    found = getattr(config.get_text_config(), "pad_token_id", None)
    size = vocabulary_of(config)
    return found if isinstance(found, int) and found >= 0 and (size is None or found < size) else otherwise


def vocabulary_of(config: Any) -> int | None:
    """Return the number of entries in a model's vocabulary, or None if the architecture has no vocabulary (canine)."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return None if size is None else int(size)


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


def longrope_turn(config: Any) -> int | None:
    """Return the number of tokens from which on all rows of a batch are read as long ones. None for most models.

    So do models with longrope, such as Phi-3: they have other frequencies for rows that are longer than those of the
    pretraining.
    """
    text_config = config.get_text_config()
    found: Any = getattr(text_config, "rope_parameters", None) or {}
    of_layers = [found, *(part for part in found.values() if isinstance(part, dict))]
    lengths = [
        part.get("original_max_position_embeddings") or getattr(text_config, "original_max_position_embeddings", None)
        for part in of_layers
        if part.get("rope_type") == "longrope"
    ]
    return min((int(length) for length in lengths if length), default=None)
