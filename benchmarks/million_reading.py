"""One cache reads one long document, token by token scored; a killed run goes on from its last checkpoint."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from benchmarks.caches import Contender
from benchmarks.device import Peak
from kvcompress import CompressedCache

Advance = Callable[[int], object]


@dataclass
class Reading:
    """What came of it. loss: float32 [N - 1], nats at which each token after the first was predicted; right: bool
    [N - 1], whether it was the first choice. seconds, peak (bytes beside the model): of all sessions.
    """

    loss: np.ndarray
    right: np.ndarray
    cache: Cache
    seconds: float = 0.0
    peak: int = 0
    done: int = 0

    @classmethod
    def begin(cls, tokens: int, cache: Cache) -> Reading:
        return cls(np.zeros(tokens - 1, np.float32), np.zeros(tokens - 1, bool), cache)


class Checkpoint:
    """Where a reading is kept while it is under way: `NAME.npz` and `NAME.safetensors` in a folder.

    every: seconds between two of them.
    """

    def __init__(self, folder: Path, name: str, every: float = 300.0):
        safe = "".join(c if c.isalnum() else "-" for c in name)
        self.numbers, self.codes = folder / f"{safe}.npz", folder / f"{safe}.safetensors"
        self.every, self._last = every, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.every

    def write(self, reading: Reading, ids: Tensor) -> None:
        """Codes first: numbers that do not belong to them are seen by their `done`."""
        self.numbers.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.codes.with_suffix(".new")
        if isinstance(reading.cache, CompressedCache):
            reading.cache.save(fresh)
        else:
            save_file(_tensors(reading.cache), fresh)
        fresh.replace(self.codes)
        about = {"done": reading.done, "seconds": reading.seconds, "peak": reading.peak, "ids": _digest(ids)}
        with self.numbers.with_suffix(".new").open("wb") as file:
            np.savez(file, loss=reading.loss, right=reading.right, about=json.dumps(about))
        self.numbers.with_suffix(".new").replace(self.numbers)
        self._last = time.monotonic()

    def read(self, model: PreTrainedModel, contender: Contender, ids: Tensor) -> Reading | None:
        """The reading so far; None where there is none of this document, or its two files do not belong together."""
        if not self.numbers.exists() or not self.codes.exists():
            return None
        with np.load(self.numbers) as held:
            about: dict[str, Any] = json.loads(str(held["about"]))
            loss, right = held["loss"], held["right"]
        if about["ids"] != _digest(ids):
            return None
        cache: Cache
        if contender.spec is not None:
            cache = CompressedCache.load(self.codes, model.config, model.device)
        else:
            cache = _restored(contender.make(model.config), load_file(self.codes, str(model.device)))
        if cache.get_seq_length() != about["done"]:
            return None
        return Reading(loss, right, cache, about["seconds"], about["peak"], about["done"])

    def remove(self) -> None:
        for path in (self.numbers, self.codes):
            path.unlink(missing_ok=True)


def _digest(ids: Tensor) -> int:
    """What tells documents apart."""
    return zlib.crc32(ids.cpu().numpy().tobytes())


def _tensors(cache: Cache) -> dict[str, Tensor]:
    """The keys and values of a DynamicCache's layers, and how many tokens its sliding layers have seen."""
    found = {}
    for index, layer in enumerate(cache.layers):
        for side in ("keys", "values"):
            found[f"{index}.{side}"] = getattr(layer, side).contiguous()
        found[f"{index}.seen"] = torch.tensor(getattr(layer, "cumulative_length", 0))
    return found


def _restored(cache: Cache, tensors: dict[str, Tensor]) -> Cache:
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"only DynamicCache and CompressedCache can be gone on with, not {type(cache).__name__}")
    for index, layer in enumerate(cache.layers):
        key, value = (tensors[f"{index}.{side}"] for side in ("keys", "values"))
        layer.lazy_initialization(key, value)  # type: ignore[union-attr]  # a layer that held keys and values
        layer.keys, layer.values = key, value  # type: ignore[union-attr]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = int(tensors[f"{index}.seen"])
    return cache


@torch.inference_mode()
def read(
    model: PreTrainedModel, contender: Contender, ids: Tensor, chunk: int, checkpoint: Checkpoint | None,
    advance: Advance, restart: int | None = None,
) -> Reading:  # fmt: skip
    """Feed ids [1, N], `chunk` tokens at a time. restart: with an empty cache after every so many tokens."""
    peak = Peak(model.device)
    found = None if checkpoint is None else checkpoint.read(model, contender, ids)
    reading = found or Reading.begin(ids.shape[1], contender.make(model.config))
    advance(reading.done)
    step = chunk if restart is None else min(chunk, restart)
    while reading.done < ids.shape[1]:
        if restart is not None and reading.done % restart == 0:
            reading.cache = contender.make(model.config)
        start = reading.done
        stop = min(start + step, ids.shape[1])
        if stop == ids.shape[1] and stop - start > 1:
            stop -= 1  # the last token alone, as in decoding: sliding layers then let go of their last chunk
        begun = time.perf_counter()
        logits = model(ids[:, start:stop].to(model.device), past_key_values=reading.cache, use_cache=True).logits
        _score(reading, logits[0], ids[0, start + 1 : stop + 1].to(model.device), start)
        reading.seconds += time.perf_counter() - begun
        reading.done = stop
        reading.peak = max(reading.peak, peak.rise() or 0)
        advance(stop - start)
        if checkpoint is not None and restart is None and checkpoint.due():
            checkpoint.write(reading, ids)
    return reading


def _score(reading: Reading, logits: Tensor, targets: Tensor, start: int) -> None:
    """logits [n, vocabulary] of a chunk; targets: what follows its tokens, one fewer at the document's end."""
    logits = logits[: len(targets)]
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    part = slice(start, start + len(targets))
    reading.loss[part] = losses.cpu().numpy()
    reading.right[part] = (logits.argmax(dim=-1) == targets).cpu().numpy()
