"""The processes of a training run: rank, number of ranks, and what they agree on.

Everything also works in a single process without a process group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from pipelines.model.devices import resolve_dtype
from pipelines.settings import Dtype


def rank() -> int:
    """Number of this process in its group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def answer_of_rank_0(answer: bool, device: torch.device) -> bool:
    """Rank 0's answer, on every rank: clocks and events differ between machines."""
    if world_size() == 1:
        return answer
    shared = torch.tensor(int(answer), device=device)
    dist.broadcast(shared, src=0)
    return bool(shared)


def shared_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The arithmetic that every rank supports: float16 on unlike GPUs, float32 on unlike CPUs."""
    mine = resolve_dtype(dtype, device)
    if world_size() == 1:
        return mine
    all_of_them = [mine] * world_size()
    dist.all_gather_object(all_of_them, mine)
    return next(one for one in (torch.float32, torch.float16, torch.bfloat16) if one in all_of_them)


def worker_device(device: str) -> str:
    """`auto` on a machine of several GPUs is this worker's own, which Ray Train has made current."""
    if device == "auto" and world_size() > 1 and torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"
    return device
