"""What this machine's processor computes quickly. Imports nothing heavy."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
"""Instructions for products of 8-bit numbers, as Linux names them (x86 and ARM)."""
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@cache
def processor_flags() -> frozenset[str] | None:
    """Return the instructions of the processor, as Linux names them. None if this is unknown."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else frozenset(found[1].split())


def has_int8() -> bool:
    """Return whether the processor has instructions for products of 8-bit numbers, or it is unknown whether it has."""
    flags = processor_flags()
    return flags is None or bool(flags & INT8_FLAGS)


def slow_format(*, is_int8: bool, is_bf16: bool) -> str:
    """Return why a number format is slow on this machine's CPU, or nothing."""
    flags = processor_flags()
    if is_int8 and not has_int8():
        return "this processor has no 8-bit instructions (VNNI, AMX): an int8 model is not faster here than its source"
    if is_bf16 and flags is not None and not flags & BF16_FLAGS:
        return (
            "this processor has no bfloat16 instructions: dtype=bfloat16 is not faster than float32, which auto takes"
        )
    return ""
