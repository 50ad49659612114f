"""Filling caches and measuring what they take, each in a process of its own: `Fill`, `measured`.

A fill feeds layers of a model's cache with tokens in chunks, and before each context that is asked for a last token
alone, as decoding does. There it counts the storage behind all that the layers hold, and how much more than before the
fill the process has held at its highest: its resident set (VmHWM, so Linux only), or the allocator's bytes on a GPU.
A process of its own starts with a small heap, and one that is killed for its memory takes nothing else with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache

from benchmarks.caches import UNCOMPRESSED, Contender, compressed, quantized_caches
from benchmarks.device import release, resident, settle, trim_heap
from benchmarks.gpu_worker import Job, in_children
from benchmarks.memory_geometries import Geometry, load
from benchmarks.memory_tokens import Tokens
from benchmarks.results import first_line
from benchmarks.storage import count, footprint
from kvcompress.layer import CompressedLayer

#: Tokens of the cache that is filled first and thrown away, so that what is loaded and built once is not counted: the
#: codecs that learn from most tokens have coded some by then.
WARM_UP = 1024


@dataclass(frozen=True)
class Fill:
    """What to fill. contexts: tokens to measure at, ascending. seconds: that it may take. Others as in `Settings`."""

    geometry: str
    cache: str
    layers: tuple[int, ...]
    contexts: tuple[int, ...]
    chunk: int
    seconds: float
    seed: int
    figures: Path | None


@dataclass(frozen=True)
class Level:
    """What the filled layers take at a context, in bytes. elements: that they hold; bits_per_element of the coded part.

    peak_bytes: the most that the process has held on the way. seconds: since the start of the fill.
    """

    tokens: int
    bytes: int
    elements: int
    bits_per_element: float | None
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Stop:
    """Why a fill went no further. status: "stopped" for want of time, else "failed"."""

    status: str
    reason: str


def chosen(name: str) -> Contender:
    """The contender of a name: "uncompressed", one of QuantizedCache's, or a spec of ours."""
    stock = {each.name: each for each in (UNCOMPRESSED, *quantized_caches())}
    return stock[name] if name in stock else compressed(name)


def measured(fill: Fill) -> Iterator[Level | int | Stop]:
    """Levels as they are reached, numbers of tokens in between, and a Stop where the fill ends early."""
    end = time.monotonic() + fill.seconds
    for _, row in in_children(partial(_rows, fill), _healthy, [Job(fill.cache, 0)], 1, {}, end, fill.seconds):
        if row["status"] == "level":
            yield Level(**{name: value for name, value in row.items() if name != "status"})
        elif row["status"] == "under way":
            yield row["tokens"]
        elif time.monotonic() >= end:
            yield Stop("stopped", f"{fill.seconds / 60:g} minutes were over")
        else:
            yield Stop(row["status"], row["reason"])


def _healthy() -> bool:
    """A process here does one job, after which nobody asks it for more."""
    return True


def _rows(fill: Fill, name: str, known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the process of a fill sends: see `measured`."""
    try:
        yield from _filled(fill)
    except Exception as error:  # what a cache breaks by is a result to show
        yield {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}


@torch.inference_mode()
def _filled(fill: Fill) -> Iterator[dict[str, Any]]:
    geometry, contender = load(fill.geometry), chosen(fill.cache)
    geometry.config._attn_implementation = contender.attention or "sdpa"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    filling = Filling(geometry, contender, fill, device)
    filling.feed(min(WARM_UP, fill.contexts[-1]))
    filling = Filling(geometry, contender, fill, device)
    meter = Meter(device)
    begun = time.monotonic()
    for index, tokens in enumerate(fill.contexts):
        while filling.tokens < tokens - 1:
            filling.feed(min(fill.chunk, tokens - 1 - filling.tokens))
            yield {"status": "under way", "tokens": filling.tokens}
        filling.feed(tokens - filling.tokens)
        seconds = time.monotonic() - begun
        yield {"status": "level", **asdict(filling.level(meter.peak(), seconds))}
        if index + 1 < len(fill.contexts) and seconds * fill.contexts[index + 1] / tokens > fill.seconds:
            limit = f"{fill.contexts[index + 1]:,} tokens would take more than {fill.seconds / 60:g} minutes"
            yield {"status": "stopped", "reason": limit}
            return


class Filling:
    """A cache under way, and an uncompressed one without storage that counts its elements."""

    def __init__(self, geometry: Geometry, contender: Contender, fill: Fill, device: torch.device):
        self.cache: Cache = contender.make(geometry.config)
        self.tokens = 0
        self._shapes = DynamicCache(config=geometry.config)
        self._sources = {
            layer: Tokens(geometry, layer, fill.figures, fill.seed + layer, device) for layer in fill.layers
        }

    def feed(self, count: int) -> None:
        """One forward pass of so many tokens through the layers, as a model would make it."""
        for layer, source in self._sources.items():
            key, value = source.take(count)
            self.cache.update(key, value, layer)
            self._shapes.update(key.to("meta"), value.to("meta"), layer)
            held: Any = self.cache.layers[layer]
            if isinstance(held, CompressedLayer):
                held.settle()
        self.tokens += count

    def level(self, peak: int, seconds: float) -> Level:
        size = footprint(self.cache, self._shapes)
        shapes = [getattr(layer, side, None) for layer in self._shapes.layers for side in ("keys", "values")]
        return Level(self.tokens, size.total, count(shapes), size.bits_per_element, peak, seconds)


class Meter:
    """The most memory that is held from here on, beside what is held now, in bytes."""

    def __init__(self, device: torch.device):
        release(device)
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            trim_heap()  # what was let go of stays resident otherwise, and would hide new bytes
            Path("/proc/self/clear_refs").write_text("5")
            self._before = resident("VmRSS")

    def peak(self) -> int:
        settle(self._device)
        highest = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else resident("VmHWM")
        return highest - self._before
