"""LoRA: train small matrices beside the linear layers of a model, and merge them into its weights.

A linear layer W becomes W + (alpha / rank) * B A, where only A and B are trained (Hu et al., 2021). The library peft
provides the layers. It is imported only where it is used (extra `[lora]`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipelines.errors import ModelFolderError, SettingsError, first_line
from pipelines.fields import parse
from pipelines.model.precision import head_of, pooler_of
from pipelines.model_files import ADAPTER_CONFIG
from pipelines.settings import DecisionSettings, WindowSettings
from pipelines.training_settings import TrainSettings

ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINED_FILE = "trained.safetensors"
"""File of a checkpoint with the weights that a LoRA run trains."""
PREFIX = "base_model.model."
"""What peft puts before the name of each weight."""
LORA_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target")
PIPELINE_PART = "pipeline_settings.json"
"""File of an adapter folder with the windows and the decision. peft does not read it."""
NAME = "default"
"""Name of the adapter within a module. peft leaves it out in its files."""


@dataclass(frozen=True)
class Adapter:
    """A folder with a LoRA adapter, as peft or `pipelines train` writes it."""

    folder: Path
    base: str
    """The model of the adapter: a folder or a name on the Hugging Face Hub."""

    def weights(self) -> dict[str, Tensor]:
        """Return the adapter's weights and those of its head, by their names in the module (without adapter name)."""
        file = self.folder / ADAPTER_WEIGHTS
        if not file.is_file() and list(self.folder.glob("*.bin")):
            raise ModelFolderError(
                f"{self.folder} holds its weights as a pickle; save the adapter again with safetensors: "
                "model.save_pretrained(folder, safe_serialization=True)"
            )
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ModelFolderError(f"{file} cannot be read: {first_line(error)}; save the adapter again") from error
        named = {name.removeprefix(PREFIX): weight for name, weight in found.items() if ".original_module." not in name}
        return {name.replace("modules_to_save.", ""): weight for name, weight in named.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `weights`."""
        return {name: tuple(weight.shape) for name, weight in self.weights().items()}

    def settings(self) -> tuple[WindowSettings, DecisionSettings] | None:
        """Return windows and decision of the run that trained the adapter, or None if peft itself wrote it."""
        file = self.folder / PIPELINE_PART
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text())
            (windows,), (decision,) = (
                parse(content[name], group)
                for name, group in (("windows", WindowSettings), ("decision", DecisionSettings))
            )
        except (ValueError, KeyError, TypeError, AttributeError, SettingsError) as error:
            raise ModelFolderError(
                f"{file} cannot be read: {error!r}; remove it, and give --kind and --labels"
            ) from error
        return windows, decision


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
    beside = Path(name, base)
    return Adapter(Path(name), str(beside.resolve()) if not Path(base).exists() and beside.is_dir() else base)


def add_adapter(
    module: nn.Module, settings: TrainSettings, adapter: Adapter | None, *, train_pooler: bool = False
) -> bool:
    """Put LoRA layers into a classifier. Only they and the head can be trained afterwards.

    Args:
        module: The classifier. It is changed in place.
        settings: lora_rank and its companions, and the seed of new layers.
        adapter: The adapter to continue, or None for a new one.
        train_pooler: Whether the pooler is new, so that all of it is trained and saved, as the head is.

    Returns:
        Whether the adapter has a whole head that fits the module, which then has its weights.

    Raises:
        SettingsError: peft is not installed, or lora_target or lora_rank does not fit.
        ModelFolderError: The adapter does not fit the module.
    """
    peft = _peft()
    head = head_of(module) + (pooler_of(module) if train_pooler else [])
    if adapter is None:
        config = _new_config(peft, module, settings, head)
    else:
        config = peft.LoraConfig.from_pretrained(adapter.folder)
        own = {"lora_rank": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
        _check_continued(settings, adapter, own)
    torch.manual_seed(settings.seed)
    try:
        peft.inject_adapter_in_model(_without_head(config), module, adapter_name=NAME)
    except ValueError as error:
        if adapter is not None:
            raise ModelFolderError(
                f"the adapter {adapter.folder} does not fit {adapter.base}: {first_line(error)}"
            ) from error
        raise SettingsError(f"lora_target={settings.lora_target!r} does not fit: {first_line(error)}") from error
    for layer in head:
        layer.requires_grad_(True)
    return adapter is not None and _load(peft, module, adapter)


def _check_continued(settings: TrainSettings, adapter: Adapter, own: Mapping[str, Any]) -> None:
    """Raise SettingsError for settings of LoRA that differ from those of the adapter, which are `own`."""
    given = [name for name in LORA_SETTINGS if getattr(settings, name) != getattr(TrainSettings, name)]
    changed = [name for name in given if getattr(settings, name) != own.get(name)]
    if changed:
        raise SettingsError(
            f"{changed[0]}={getattr(settings, changed[0])!r} cannot be changed: the adapter {adapter.folder} is "
            f"continued as it is; leave {changed[0]} out"
        )


def has_adapter(module: nn.Module) -> bool:
    """Whether a module has LoRA layers."""
    return any(_is_lora(name) for name, _ in module.named_parameters())


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
    """Load the weights of `save_trained` into a module with LoRA layers.

    Raises:
        ModelFolderError: They are not the weights that the module trains.
    """
    weights = load_file(folder / TRAINED_FILE)
    other = sorted(weights.keys() ^ trained_weights(module).keys())
    if other:
        raise ModelFolderError(
            f"{folder} was written by a run that trains other weights, such as {other[0]}; use a new output folder"
        )
    module.load_state_dict(weights, strict=False)


def save_adapter(
    module: nn.Module,
    folder: Path,
    base: str,
    *,
    weights: Mapping[str, Tensor],
    windows: WindowSettings,
    decision: DecisionSettings,
) -> None:
    """Write the adapter of a module, and its head, as peft writes it.

    Args:
        module: A classifier with LoRA layers.
        folder: Folder to create.
        base: The model that the adapter belongs to.
        weights: All weights of the module, in the units of the finished model.
        windows: How texts are split.
        decision: Kind, labels and thresholds. peft's files have no place for windows and decision, so they get a file
            of their own.
    """
    trained = {name: weights[name] for name in trained_weights(module)}
    config: Any = module.peft_config[NAME]  # type: ignore[index]  # peft keeps it there
    config.base_model_name_or_path, config.task_type = base, "SEQ_CLS"
    config.modules_to_save = _saved_parts(module, trained.keys())
    config.inference_mode = True
    folder.mkdir()
    config.save_pretrained(folder)
    named = {
        PREFIX + name.replace(f".{NAME}", ""): value.detach().cpu().contiguous() for name, value in trained.items()
    }
    save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    content = {"windows": asdict(windows), "decision": asdict(decision)}
    (folder / PIPELINE_PART).write_text(json.dumps(content, indent=2) + "\n")


def _saved_parts(module: nn.Module, trained: Collection[str]) -> list[str]:
    """Return the names of the layers that are trained as a whole: those of the head, and a new pooler.

    Other weights of the body that are trained, such as the biases of an adapter with bias="all", are not among them:
    peft knows them by its config.
    """
    names = {layer: name for name, layer in module.named_modules()}
    whole = [
        names[layer]
        for layer in head_of(module) + pooler_of(module)
        if all(f"{names[layer]}.{name}" in trained for name, _ in layer.named_parameters()) and not has_adapter(layer)
    ]
    return sorted(name.rpartition(".")[2] for name in whole)


def _is_lora(name: str) -> bool:
    return "lora_" in name


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


def _new_config(peft: Any, module: nn.Module, settings: TrainSettings, head: list[nn.Module]) -> Any:
    return peft.LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=_targets(module, settings.lora_target, head),
    )


def _targets(module: nn.Module, wanted: str, head: list[nn.Module]) -> list[str]:
    """Return the full names of the layers that get an adapter.

    Args:
        module: The classifier.
        wanted: "auto" for all linear layers of the body, or ends of names, separated by commas.
        head: Layers that are trained themselves, and get no adapter.

    Raises:
        SettingsError: No linear layer has a wanted name.
    """
    in_head = {part for layer in head for part in layer.modules()}
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


def _load(peft: Any, module: nn.Module, adapter: Adapter) -> bool:
    """Load an adapter's weights. Return whether it has a whole head that fits the module's labels.

    A head for other labels is left out. Other weights that do not fit are an error.
    """
    weights, own = adapter.weights(), module.state_dict()
    lora = {name: weight for name, weight in weights.items() if _is_lora(name)}
    try:
        found = peft.set_peft_model_state_dict(module, lora, adapter_name=NAME)
        unexpected, missing = list(found.unexpected_keys), [name for name in found.missing_keys if _is_lora(name)]
    except RuntimeError as error:  # shapes that differ
        unexpected, missing = [first_line(error)], []
    others = {name: weight for name, weight in weights.items() if not _is_lora(name)}
    head = {
        name
        for name, weight in module.named_parameters()
        if any(weight is part for part in _parameters(head_of(module)))
    }
    unexpected = [
        *unexpected,
        *(
            name
            for name, weight in others.items()
            if name not in own or (name not in head and own[name].shape != weight.shape)
        ),
    ]
    if unexpected:
        raise ModelFolderError(
            f"the adapter {adapter.folder} does not fit {adapter.base}, which has no such weight: {unexpected[0]}; "
            f"name the right model as base_model_name_or_path in {ADAPTER_CONFIG}, or merge the adapter with peft"
        )
    if missing:
        raise ModelFolderError(f"the adapter {adapter.folder} lacks the weight {missing[0]}; save it again with peft")
    fits = all(own[name].shape == others[name].shape for name in head & others.keys())
    module.load_state_dict({name: w for name, w in others.items() if fits or name not in head}, strict=False)
    return fits and head <= others.keys()


def _parameters(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [parameter for layer in layers for parameter in layer.parameters()]
