"""The processes of a training run: rank, number of ranks, and values that are the same on all ranks.

All functions also work in a single process without a process group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from pipelines.model.devices import resolve_dtype
from pipelines.settings import Dtype


def rank() -> int:
    """Return the rank of this process. 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in the group. 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank has called this function."""
    if dist.is_initialized():
        dist.barrier()


def answer_of_rank_0(answer: bool, device: torch.device) -> bool:
    """Return the answer of rank 0 on every rank. Clocks and events differ between machines."""
    if world_size() == 1:
        return answer
    shared = torch.tensor(int(answer), device=device)
    dist.broadcast(shared, src=0)
    return bool(shared)


def shared_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return one dtype for all ranks. If they differ, it is float16 on GPUs and float32 on CPUs."""
    mine = resolve_dtype(dtype, device)
    if world_size() == 1:
        return mine
    all_of_them = [mine] * world_size()
    dist.all_gather_object(all_of_them, mine)
    return next(one for one in (torch.float32, torch.float16, torch.bfloat16) if one in all_of_them)


def worker_device(device: str) -> str:
    """Return the device of this worker. With several workers, `auto` means the GPU that Ray Train selected for it."""
    if device == "auto" and world_size() > 1 and torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"
    return device
