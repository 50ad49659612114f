"""The device that is measured: waiting for it, giving memory back to it, and how far a piece of work raised it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Found = TypeVar("Found")


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give what nobody holds any longer back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(error: Exception) -> bool:
    """Whether a device said so; on a CPU, torch's allocator does by a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def with_peak(work: Callable[[], Found], device: torch.device) -> tuple[Found, int | None]:
    """What `work` returns, and how many bytes memory rose at its highest above what was held before.

    The device's allocations on CUDA, else the process's resident set on Linux, else None: nobody can tell.
    """
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        found = work()
        settle(device)
        return found, torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        return work(), None
    trim_heap()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS")
    return work(), resident("VmHWM") - before


def trim_heap() -> None:
    """Give the C library's free pages back to the system: what lies there ready would hide what is allocated next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


def resident(what: str) -> int:
    """VmRSS or VmHWM of this process, in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))
