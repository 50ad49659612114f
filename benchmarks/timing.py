"""Time of prefill and of decode steps, the caches taking turns so that all see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from benchmarks.caches import UNCOMPRESSED, Contender
from benchmarks.device import settle

#: Tokens that the model itself writes into a cache before it is filled up, and steps that nobody times.
START, WARM_UP = 16, 2


@dataclass(frozen=True)
class Quartiles:
    """Of several measurements, in their unit; all the same for a single one."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    @classmethod
    def held(cls, row: object, name: str, unit: float = 1.0) -> Quartiles | None:
        """What a row has in a field and its quartiles, times `unit`; None where that was not measured."""
        found = [getattr(row, f"{name}{end}") for end in ("_q1", "", "_q3")]
        return None if None in found else cls(*(unit * value for value in found))

    def fields(self, name: str, unit: float = 1.0) -> dict[str, Any]:
        """A row's fields: the median under its name, the quartiles under it with _q1 and _q3, all times `unit`."""
        return {name: unit * self.median, f"{name}_q1": unit * self.lower, f"{name}_q3": unit * self.upper}

    def told(self) -> str:
        """The median, with the quartiles in brackets."""
        median, lower, upper = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (self.median, self.lower, self.upper))
        return f"{median} ({lower} to {upper})"

    @property
    def errors(self) -> tuple[float, float]:
        """From the median down to the lower quartile, and up to the upper one."""
        return self.median - self.lower, self.upper - self.median


@torch.inference_mode()
def filled(model: PreTrainedModel, contender: Contender, context: int, seed: int) -> Cache:
    """A cache of `context` tokens: START of the model's own, then normal deviates handed to every attention layer.

    What the tokens say does not change what a step costs, and writing them by running the model would take longer.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, START), generator=generator, device=model.device)
    cache, shapes = contender.make(model.config), UNCOMPRESSED.make(model.config)
    with contender.attending(model):
        for target in (cache, shapes):
            model(ids, past_key_values=target, use_cache=True, logits_to_keep=1)
        for index, layer in enumerate(shapes.layers):
            held = [getattr(layer, side, None) for side in ("keys", "values")]
            key, value = (more_of(x, context - START, generator) for x in held)
            if key is not None and value is not None:
                cache.update(key, value, index)
    return cache


def more_of(held: object, tokens: int, generator: torch.Generator) -> Tensor | None:
    """Normal deviates like `held` [B, H, N, D], of `tokens` tokens; None for a layer that holds no such thing."""
    if not isinstance(held, Tensor):
        return None
    size = (*held.shape[:2], tokens, held.shape[3])
    return torch.randn(size, generator=generator, device=held.device, dtype=held.dtype)


@torch.inference_mode()
def reading(
    model: PreTrainedModel, contender: Contender, cache: Cache, ids: Tensor, chunk: int
) -> tuple[float, Tensor]:
    """Seconds from handing over ids [B, N], fed `chunk` tokens at a time, until the likeliest next ones are known.

    Returns these too, int64 [B, 1].
    """
    with contender.attending(model):
        settle(model.device)
        begun = time.perf_counter()
        for piece in ids.split(chunk, dim=1):
            logits = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        likeliest: Tensor = logits.argmax(dim=-1)
        settle(model.device)
        return time.perf_counter() - begun, likeliest


def decode_steps(
    model: PreTrainedModel,
    contenders: Sequence[Contender],
    context: int,
    steps: int,
    seed: int,
    advance: Callable[[], object],
) -> dict[str, float | Exception]:
    """Median seconds of `steps` interleaved steps by contender's name, or what kept it from taking them.

    A QuantizedCache also re-quantises everything once in 128 tokens; the median leaves that out, in its favour.
    """
    caches: dict[str, Cache] = {}
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    failures: dict[str, Exception] = {}
    for contender in contenders:
        try:
            caches[contender.name] = filled(model, contender, context, seed)
        except Exception as error:  # a baseline's own failure is a result to show
            failures[contender.name] = error
        advance()
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    for _ in range(WARM_UP + steps):
        for contender in contenders:
            if contender.name not in failures:
                try:
                    seconds, _ = reading(model, contender, caches[contender.name], token, 1)
                    times[contender.name].append(seconds)
                except Exception as error:
                    failures[contender.name] = error
        advance()
    medians = {name: statistics.median(taken[WARM_UP:]) for name, taken in times.items() if name not in failures}
    return {**medians, **failures}
