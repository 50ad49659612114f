"""The device that is measured: waiting for it, giving memory back to it, and how far a piece of work raised it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Found = TypeVar("Found")

CLEAR = Path("/proc/self/clear_refs")  # of Linux


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


class Peak:
    """How far memory has risen, at its highest, above what was held when this was made.

    The device's allocations on CUDA, else the process's resident set on Linux.
    """

    def __init__(self, device: torch.device):
        self.device = device
        release(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        elif CLEAR.exists():
            trim_heap()
            CLEAR.write_text("5")  # VmHWM begins anew
            self._before = resident("VmRSS")

    def rise(self) -> int | None:
        """Bytes; None where nobody can tell."""
        if self.device.type == "cuda":
            settle(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return resident("VmHWM") - self._before if CLEAR.exists() else None


def with_peak(work: Callable[[], Found], device: torch.device) -> tuple[Found, int | None]:
    """What `work` returns, and by how many bytes memory rose, as `Peak` has it."""
    peak = Peak(device)
    found = work()
    return found, peak.rise()


def trim_heap() -> None:
    """Give the C library's free pages back to the system: what lies there ready would hide what is allocated next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


def resident(what: str) -> int:
    """VmRSS or VmHWM of this process, in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))
