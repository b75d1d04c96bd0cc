"""Resolve device and dtype settings, including `auto`, and copy arrays to a device."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.errors import SettingsError
from pipelines.settings import Dtype

RANDOM = threading.RLock()
"""Held while torch's global random numbers are drawn from a seed, so that another thread does not set another seed."""


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Copy values to a tensor on the device. Does not wait for a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def resolve_device(device: str) -> torch.device:
    """Return the torch device: "auto" means CUDA if this machine has it, else the CPU.

    Raises:
        SettingsError: The name is not a device, or this machine does not have the device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"device={device!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device={device!r} is not available: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return resolved


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the torch dtype: "auto" means bfloat16 if the processor has instructions for it.

    Otherwise, "auto" means float16 on CUDA and float32 on a CPU. The instructions are looked up, not timed.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32
