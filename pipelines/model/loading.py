"""Choose the engine that runs a model folder: PyTorch or OpenVINO.

Imports torch only if PyTorch runs the model, or if it must be converted first.
"""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import ModelFolderError, SettingsError
from pipelines.model.openvino_files import GRAPH, CannotConvertError, converted, is_installed, read_details
from pipelines.model.openvino_model import REMEDY, OpenVinoModel
from pipelines.model.processor import slow_format
from pipelines.model_files import has_openvino
from pipelines.model_folder import ModelFolder
from pipelines.settings import ComputeSettings
from pipelines.text.template import Template

if TYPE_CHECKING:
    from pipelines.model.engine import Engine

SMALLEST_BYTES = 4 * 2**20
"""Weights of a smaller file run with PyTorch unless engine=openvino: to convert them takes longer than it saves."""
DRIVERS = ("/proc/driver/nvidia", "/dev/kfd", "/dev/dxg")
"""Files of the drivers of NVIDIA, AMD and WSL."""
logger = logging.getLogger(__name__)
_TOLD: set[str] = set()
"""What this process has said already: weights that run with PyTorch, and slow number formats."""


def load_engine(folder: ModelFolder, template: Template, compute: ComputeSettings) -> Engine:
    """Load the model of a folder whose weights are verified, with the engine that the settings ask for.

    Args:
        folder: A finished model folder.
        template: Special tokens and padding of its tokenizer.
        compute: engine, device, dtype and the other settings of the forward pass.

    Raises:
        SettingsError: This machine does not have the engine, the device or the dtype, or they exclude each other.
        ModelFolderError: The model cannot be opened, or not with the engine.
    """
    check_engine(folder, compute)
    _say_slow(folder, compute)
    if folder.quantization or compute.engine == "openvino":
        _check_installed()
    if folder.quantization:
        return _open(folder, folder.path, template, compute)
    if compute.engine == "openvino" or (compute.engine == "auto" and _is_worth_it(folder, compute)):
        try:
            return _open(folder, converted(folder, template, must=compute.engine == "openvino"), template, compute)
        except CannotConvertError as error:
            if compute.engine == "openvino":
                raise ModelFolderError(f"engine=openvino: {error}; use engine=torch") from error
            if folder.weights_hash not in _TOLD:
                _TOLD.add(folder.weights_hash)
                logger.info("%s runs with PyTorch, because %s", folder.path.name, error)
    from pipelines.model.window_model import load_model

    return load_model(folder.path, template, compute, num_labels=folder.decision.num_labels)


def _say_slow(folder: ModelFolder, compute: ComputeSettings) -> None:
    """Warn once if the CPU has no instructions for the number format."""
    is_cpu = compute.device == "cpu" or (compute.device == "auto" and not _has_gpu())
    is_int8 = bool(folder.quantization)  # such a model always runs on the CPU
    slow = slow_format(is_int8=is_int8, is_bf16=is_cpu and compute.dtype == "bfloat16")
    if slow and slow not in _TOLD:
        _TOLD.add(slow)
        logger.warning("%s: %s", folder.path.name, slow)


def row_limit_of(folder: ModelFolder) -> int | None:
    """Return the longest input row of a model, in tokens, without loading its weights. None means no limit."""
    if has_openvino(folder.path):
        return read_details(folder.path).row_limit
    from pipelines.model.weights import describe

    return describe(str(folder.path)).row_limit


def _open(folder: ModelFolder, path: Path, template: Template, compute: ComputeSettings) -> OpenVinoModel:
    details = read_details(path)
    if details.num_labels != folder.decision.num_labels:
        raise ModelFolderError(
            f"{folder.path}: its model has {details.num_labels} logits and pipeline.json {folder.decision.num_labels} "
            f"labels; both must agree"
        )
    return OpenVinoModel.compile(str(path / GRAPH), details, template, compute)


def check_engine(folder: ModelFolder, compute: ComputeSettings) -> None:
    """Raise SettingsError if engine, device or dtype exclude each other, or do not fit an int8 model."""
    if not folder.quantization:
        if compute.engine == "openvino" and compute.device not in ("auto", "cpu"):
            raise SettingsError(f"engine=openvino runs on a CPU, not on device={compute.device}; use engine=torch")
        return
    source = folder.quantization.get("source", "the folder it was made of")
    if compute.engine == "torch" or compute.device.startswith("cuda"):
        wanted = "engine=torch" if compute.engine == "torch" else f"device={compute.device}"
        raise SettingsError(f"{folder.path.name} is an int8 model for CPUs, not for {wanted}; use {source}")
    if compute.dtype != "auto":
        raise SettingsError(
            f"{folder.path.name} is an int8 model, which has its own number formats; leave dtype={compute.dtype} out"
        )


def _check_installed() -> None:
    if not is_installed():
        raise SettingsError(f"OpenVINO is not installed: {REMEDY}")


def _is_worth_it(folder: ModelFolder, compute: ComputeSettings) -> bool:
    """Whether auto means OpenVINO, if the model can be converted."""
    size = sum(file.stat().st_size for file in folder.path.glob("*.safetensors"))
    return (
        size >= SMALLEST_BYTES
        and compute.dtype != "float16"
        and compute.packing == "auto"
        and platform.machine().lower() in ("x86_64", "amd64")
        and is_installed()
        and (compute.device == "cpu" or (compute.device == "auto" and not _has_gpu()))
    )


def _has_gpu() -> bool:
    """Whether torch has a GPU. torch is not loaded on a machine without a driver for one."""
    if platform.system() == "Linux" and not any(Path(driver).exists() for driver in DRIVERS):
        return False
    import torch

    return torch.cuda.is_available()
