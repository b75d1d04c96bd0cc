"""LoRA: train small matrices beside the linear layers of a model, and merge them into its weights.

A linear layer W becomes W + (alpha / rank) * B A, where only A and B are trained (Hu et al., 2021). The library peft
provides the layers. It is imported only where it is used (extra `[lora]`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipelines.errors import ModelFolderError, SettingsError, first_line
from pipelines.model.precision import head_of
from pipelines.model_folder import ADAPTER_CONFIG
from pipelines.settings import TrainSettings

ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINED_FILE = "trained.safetensors"
"""File of a checkpoint with the weights that a LoRA run trains."""
PREFIX = "base_model.model."
"""What peft puts before the name of each weight."""
NAME = "default"
"""Name of the adapter within a module. peft leaves it out in its files."""


@dataclass(frozen=True)
class Adapter:
    """A folder with a LoRA adapter, as peft or `pipelines train` writes it."""

    folder: Path
    base: str
    """The model of the adapter: a folder or a name on the Hugging Face Hub."""

    def weights(self) -> dict[str, Tensor]:
        """Return the adapter's weights and those of its head, by their names in the module."""
        file = self.folder / ADAPTER_WEIGHTS
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ModelFolderError(f"{file} cannot be read: {first_line(error)}; save the adapter again") from error
        return {_name_in_module(name): weight for name, weight in found.items()}

    @property
    def num_labels(self) -> int | None:
        """Number of outputs of the adapter's head, or None if it has no head of its own."""
        heads = [weight for name, weight in self.weights().items() if "lora_" not in name and weight.ndim == 2]
        return min(len(weight) for weight in heads) if heads else None


def find_adapter(name: str) -> Adapter | None:
    """Return the adapter in a folder, or None if the folder has none.

    Raises:
        ModelFolderError: adapter_config.json cannot be read, names no model, or is not of LoRA.
    """
    file = Path(name) / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
        kind, base = config["peft_type"], config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(f"{file} cannot be read: {error!r}; save the adapter again with peft") from error
    if kind != "LORA":
        raise ModelFolderError(f"{name} is an adapter of type {kind}; only LORA is supported: merge it with peft first")
    if not base:
        raise ModelFolderError(f"{file} does not name the model of the adapter; set base_model_name_or_path in it")
    return Adapter(Path(name), base)


def add_adapter(module: nn.Module, settings: TrainSettings, adapter: Adapter | None) -> bool:
    """Put LoRA layers into a classifier. Only they and the head can be trained afterwards.

    Args:
        module: The classifier. It is changed in place.
        settings: lora_rank and its companions, and the seed of new layers.
        adapter: The adapter to continue, or None for a new one.

    Returns:
        Whether the adapter has a head that fits the module, which then has its weights.

    Raises:
        SettingsError: peft is not installed, or lora_target or lora_rank does not fit.
        ModelFolderError: The adapter does not fit the module.
    """
    peft = _peft()
    config = _new_config(peft, module, settings) if adapter is None else peft.LoraConfig.from_pretrained(adapter.folder)
    if adapter is not None and settings.lora_rank not in (0, config.r):
        raise SettingsError(
            f"lora_rank={settings.lora_rank}, but the adapter {adapter.folder} has rank {config.r}; leave lora_rank out"
        )
    head = head_of(module)
    torch.manual_seed(settings.seed)
    try:
        peft.inject_adapter_in_model(_without_head(config), module, adapter_name=NAME)
    except ValueError as error:
        raise SettingsError(
            f"lora_target={settings.lora_target!r} does not fit the model: {first_line(error)}"
        ) from error
    for layer in head:
        layer.requires_grad_(True)
    return adapter is not None and _load(module, adapter)


def has_adapter(module: nn.Module) -> bool:
    """Whether a module has LoRA layers."""
    return any("lora_" in name for name, _ in module.named_parameters())


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights that training changes: all of them, or with LoRA those that can be trained."""
    weights: dict[str, Tensor] = dict(module.state_dict())
    if not has_adapter(module):
        return weights
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: weight for name, weight in weights.items() if name in trained}


def save_trained(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the weights of `trained_weights` into a checkpoint."""
    save_file(dict(weights), folder / TRAINED_FILE, metadata={"format": "pt"})


def load_trained(module: nn.Module, folder: Path) -> None:
    """Load the weights of `save_trained` into a module with LoRA layers."""
    module.load_state_dict(load_file(folder / TRAINED_FILE), strict=False)


def save_adapter(module: nn.Module, folder: Path, base: str) -> None:
    """Write the adapter of a module, and its head, as peft writes it.

    Args:
        module: A classifier with LoRA layers.
        folder: Folder to create.
        base: The model that the adapter belongs to.
    """
    config: Any = module.peft_config[NAME]  # type: ignore[index]  # peft keeps it there
    head = {layer: name.rpartition(".")[2] for name, layer in module.named_modules() if layer in head_of(module)}
    config.base_model_name_or_path, config.task_type = base, "SEQ_CLS"
    config.modules_to_save = sorted(set(head.values()))
    config.inference_mode = True
    folder.mkdir()
    config.save_pretrained(folder)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in trained_weights(module).items()}
    named = {PREFIX + name.replace(f".{NAME}.", "."): weight for name, weight in weights.items()}
    save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def merge_adapter(module: nn.Module) -> None:
    """Add the LoRA matrices to the weights beside them, and remove their layers. The logits change by rounding only."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            module.set_submodule(name, layer.get_base_layer())
    module.requires_grad_(True)
    del module.peft_config


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise SettingsError("LoRA needs the package peft: pip install 'ray-text-classification[lora]'") from error
    return peft


def _new_config(peft: Any, module: nn.Module, settings: TrainSettings) -> Any:
    return peft.LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=_targets(module, settings.lora_target),
    )


def _targets(module: nn.Module, wanted: str) -> list[str]:
    """Return the full names of the layers that get an adapter.

    Args:
        module: The classifier.
        wanted: "auto" for all linear layers of the body, or ends of names, separated by commas.

    Raises:
        SettingsError: No linear layer has a wanted name.
    """
    in_head = {part for layer in head_of(module) for part in layer.modules()}
    linear = {
        name
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer not in in_head
    }
    if wanted == "auto":
        return sorted(linear)
    found = set()
    for end in wanted.split(","):
        some = {name for name in linear if name == end.strip() or name.endswith(f".{end.strip()}")}
        if not some:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise SettingsError(
                f"lora_target: no linear layer of the model ends with {end!r}; known: {', '.join(known)}"
            )
        found |= some
    return sorted(found)


def _without_head(config: Any) -> Any:
    """Return the config without modules_to_save: the head is trained in place, without a copy."""
    config.modules_to_save = None
    config.task_type = None
    config.inference_mode = False
    return config


def _load(module: nn.Module, adapter: Adapter) -> bool:
    """Load an adapter's weights. Return whether it has a head that fits. LoRA weights that do not fit are an error."""
    weights, own = adapter.weights(), module.state_dict()
    for name, weight in weights.items():
        is_lora = "lora_" in name
        if name not in own or (is_lora and own[name].shape != weight.shape):
            raise ModelFolderError(
                f"the adapter {adapter.folder} does not fit {adapter.base}, which has no such weight: {name}; name the "
                f"right model as base_model_name_or_path in {ADAPTER_CONFIG}"
            )
    missing = sorted(name for name in own if "lora_" in name and name not in weights)
    if missing:
        raise ModelFolderError(f"the adapter {adapter.folder} lacks the weight {missing[0]}; save it again with peft")
    heads = [name for name in weights if "lora_" not in name]
    fits = bool(heads) and all(own[name].shape == weights[name].shape for name in heads)
    module.load_state_dict(
        {name: weight for name, weight in weights.items() if fits or name not in heads}, strict=False
    )
    return fits


def _name_in_module(name: str) -> str:
    name = name.removeprefix(PREFIX).replace("modules_to_save.", "").replace("original_module.", "")
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        name = name.replace(f".{part}.", f".{part}.{NAME}.")
    return name
