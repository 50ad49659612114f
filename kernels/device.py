"""What launches need to know of a device: how many multiprocessors, how much shared memory, which maker."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton


@dataclass(frozen=True)
class Device:
    """`shared_bytes`: shared memory (LDS) that one program may take; `hip`: AMD's, not NVIDIA's."""

    multiprocessors: int
    shared_bytes: int
    hip: bool


#: The chips that kernels are compiled for without one at hand (variant.py); limits as in benchmarks/compiling.py.
CHIPS = {
    "sm_80": Device(108, 163 << 10, False),
    "sm_90": Device(132, 227 << 10, False),
    "sm_100": Device(148, 227 << 10, False),
    "gfx942": Device(304, 64 << 10, True),
}

#: What the interpreter on the CPU is taken for: few multiprocessors, hence few programs.
INTERPRETER = Device(multiprocessors=4, shared_bytes=227 << 10, hip=False)


@lru_cache(maxsize=64)
def describe(device: torch.device) -> Device:
    """The device that tensors lie on; the CPU is the interpreter's. Raises ValueError for other kinds of device."""
    if device.type == "cpu":
        return INTERPRETER
    if device.type != "cuda":
        raise ValueError(f"the Triton kernels run on cuda (or cpu under TRITON_INTERPRET=1), got {device}")
    found = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return Device(found["multiprocessor_count"], found["max_shared_mem"], torch.version.hip is not None)
