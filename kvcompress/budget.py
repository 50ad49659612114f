"""Bits for the parts of a cache under an average: the allotment whose losses add up to the least.

A part is the keys or the values of a layer, or of one of its KV heads. That losses add up is what makes it solvable
exactly (a knapsack with one choice for each part), and holds approximately while they are small.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from kvcompress.codecs import SIDES
from kvcompress.spec import PER_HEAD, CacheSpec, CodecSpec, LayerSpec


@dataclass(frozen=True, order=True)
class Part:
    """Keys (side 0) or values (1) of a layer, of one KV head or of all (None). elements: its numbers a token."""

    layer: int
    side: int
    head: int | None
    elements: int

    def __str__(self) -> str:
        return f"layer {self.layer} {SIDES[self.side]}s" + ("" if self.head is None else f", head {self.head}")


def average(numbers: Mapping[Part, float]) -> float:
    """The mean of the codes' numbers over all elements, in bits."""
    return sum(part.elements * number for part, number in numbers.items()) / sum(part.elements for part in numbers)


def allot(losses: Mapping[Part, Mapping[float, float]], bits: float) -> dict[Part, float]:
    """The number for each part, of those that its losses are given for, with an average of at most `bits`.

    The sum of losses is the least that there is. Raises ValueError where even the smallest numbers are above `bits`.
    """
    parts = list(losses)
    costs = [[part.elements * Fraction(number).limit_denominator(64) for number in losses[part]] for part in parts]
    scale = math.lcm(*(cost.denominator for own in costs for cost in own))
    steps = [[int(cost * scale) for cost in own] for own in costs]
    unit = math.gcd(*(step for own in steps for step in own))
    budget = Fraction(bits).limit_denominator(10**6) * sum(part.elements for part in parts) * scale
    room = math.floor(budget / unit)
    best, chosen = np.zeros(room + 1), []  # by what is spent at most
    for part, own in zip(parts, steps, strict=True):
        options = np.full((len(own), room + 1), np.inf)
        for option, (step, loss) in enumerate(zip(own, losses[part].values(), strict=True)):
            if step // unit <= room:
                options[option, step // unit :] = best[: room + 1 - step // unit] + loss
        chosen.append(options.argmin(axis=0))
        best = options.min(axis=0)
    if np.isinf(best[room]):
        least = average({part: min(losses[part]) for part in parts})
        raise ValueError(f"an average of {bits:g} bits is not to be had: the least is {least:g}")
    result = {}
    for part, own, choice in zip(reversed(parts), reversed(steps), reversed(chosen), strict=True):
        option = int(choice[room])
        result[part] = list(losses[part])[option]
        room -= own[option] // unit
    return {part: result[part] for part in parts}


def splits(parts: Sequence[Part], numbers: Sequence[float], bits: float) -> list[dict[Part, float]]:
    """One number for all keys and one for all values, wherever neither could be higher under an average of `bits`."""

    def split(key: float, value: float) -> dict[Part, float]:
        return {part: value if part.side else key for part in parts}

    within = [(k, v) for k in numbers for v in numbers if average(split(k, v)) <= bits]
    higher = {(k, v): [(a, b) for a, b in within if a >= k and b >= v and (a, b) != (k, v)] for k, v in within}
    return [split(*pair) for pair in within if not higher[pair]]


def to_spec(codecs: Mapping[Part, CodecSpec], base: CacheSpec) -> CacheSpec:
    """`base` with the parts' codecs: the commonest of a layer's for all, the others as exceptions."""
    sides: dict[tuple[int, int], list[CodecSpec]] = {}
    for part in sorted(codecs, key=lambda part: (part.layer, part.side, part.head or 0)):
        sides.setdefault((part.layer, part.side), []).append(codecs[part])
    joined = {
        place: own[0] if len(set(own)) == 1 else CodecSpec(PER_HEAD, None, tuple(own)) for place, own in sides.items()
    }
    layers = {index: LayerSpec(joined[index, 0], joined[index, 1]) for index, side in joined if side == 0}
    (common, _), *_ = Counter(layers.values()).most_common(1)
    exceptions = {index: layer for index, layer in layers.items() if layer != common}
    return CacheSpec(common.key, common.value, base.sinks, base.window, exceptions, base.basis)
