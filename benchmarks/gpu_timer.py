"""Times on a GPU, by its own events: what it took to do the work, without what the host took to ask for it.

A kernel of ten microseconds is asked for in fifty, so the device is put to sleep first and the work queued behind that.
On a CPU, where Triton's interpreter runs for a test's sake, each call is timed once, and the times mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import KernelInterface

from benchmarks.device import settle

SECONDS = 0.25  # of a measurement
FEWEST, MOST = 16, 400  # samples
BATCH = 8  # calls queued behind one sleep
CYCLES = 2.0e9  # of the device's clock in a second, at most

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds: the median, and the tenths at either end."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, times: list[float]) -> Timing:
        ordered = sorted(times)
        at = len(ordered) // 10
        return cls(statistics.median(ordered), ordered[at], ordered[-1 - at], len(ordered))

    def row(self, prefix: str) -> dict[str, Any]:
        """Microseconds, as rows have them."""
        low, high = round(self.low * 1e6, 2), round(self.high * 1e6, 2)
        return {f"{prefix}_us": round(self.median * 1e6, 2), f"{prefix}_spread_us": [low, high]}


def host_seconds(call: Call, device: torch.device) -> float:
    """From calling it until the device has done it."""
    settle(device)
    begun = time.perf_counter()
    call()
    settle(device)
    return time.perf_counter() - begun


def device_time(calls: Sequence[Call], device: torch.device, seconds: float = SECONDS) -> Timing:
    """What one of the calls takes on the device; they come by turns, so that a cache does not hold what they read."""
    if device.type == "cpu":
        return Timing.of([host_seconds(calls[0], device)])
    for _ in range(2):  # the first time compiles
        settle(device)
        begun = time.perf_counter()
        for call in calls:
            call()
        asked = (time.perf_counter() - begun) / len(calls)
        settle(device)
        each = (time.perf_counter() - begun) / len(calls)
    samples = min(MOST, max(FEWEST, int(seconds / each)))
    times: list[float] = []
    turns = cycle(calls)
    while len(times) < samples:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(BATCH)]
        torch.cuda._sleep(int((2 * BATCH * asked + 3e-4) * CYCLES))
        for call, (first, last) in zip(islice(turns, BATCH), events, strict=True):
            first.record()
            call()
            last.record()
        torch.cuda.synchronize(device)
        times += [first.elapsed_time(last) / 1e3 for first, last in events]
    return Timing.of(times)


def asking_time(calls: Sequence[Call], device: torch.device, samples: int = 64) -> Timing:
    """What the host takes to ask for one of the calls, nobody waiting for the device in between."""
    if device.type == "cpu":
        return Timing.of([host_seconds(calls[0], device)])
    times = []
    for index, call in enumerate(islice(cycle(calls), samples)):
        if index % BATCH == 0:
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    torch.cuda.synchronize(device)
    return Timing.of(times)


@dataclass
class Launch:
    """A launch of a Triton kernel, to be done again: it writes the same results to the same place."""

    kernel: Any
    grid: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    compiled: Any = None

    def __call__(self) -> None:
        self.compiled = self.kernel.run(*self.arguments, grid=self.grid, warmup=False, **self.options)

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def row(self) -> dict[str, Any]:
        """What the compiler says of it; nothing in the interpreter."""
        found = {
            "registers": getattr(self.compiled, "n_regs", None),
            "spills": getattr(self.compiled, "n_spills", None),
        }
        return {**found, "grid": list(self.grid), "num_warps": self.options.get("num_warps")}


def launches(call: Call, options: dict[str, dict[str, Any]] | None = None) -> list[Launch]:
    """The launches that a call makes, in order; options: what to launch kernels with, by their names.

    Raises RuntimeError where there are none.
    """
    found: list[Launch] = []

    def recorded(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **given: Any) -> None:
            own = Launch(kernel, grid, arguments, given)
            own.options = {**given, **(options or {}).get(own.name, {})}
            own()
            found.append(own)

        return launch

    with mock.patch.object(KernelInterface, "__getitem__", recorded):
        call()
    if not found:
        raise RuntimeError("no kernel of Triton's was launched")
    return found
