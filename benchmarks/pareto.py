"""Comparing caches at equal measured bits: means over seeds, the Pareto frontier, curves through a family's points.

The loss is the mean KL to the uncompressed model, or, where no model is run, the error of attention's output.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.caches import REFERENCE
from benchmarks.rows import Row

#: A subject at a context.
Panel = tuple[str, int]

#: The smallest loss that a logarithm is taken of.
FLOOR = 1e-12


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds (None for a single one)."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Summary:
    """A cache's rows of all seeds: a spread for every number that was measured, by the name of its field."""

    cache: str
    side: str
    family: str
    seeds: int
    values: dict[str, Spread]

    @property
    def bits(self) -> float | None:
        """Measured bits per coded element; None where nothing was coded."""
        return self._mean("bits_per_element")

    @property
    def loss(self) -> float | None:
        return self._mean("kl_mean") if "kl_mean" in self.values else self._mean("output_error")

    def _mean(self, name: str) -> float | None:
        return self.values[name].mean if name in self.values else None


#: Fields of a row that are averaged over seeds.
AVERAGED = (
    "bits_per_element",
    "effective_bits_per_element",
    "bytes",
    "perplexity",
    "kl_mean",
    "kl_p99",
    "top1_agreement",
    "needle_recall",
    "key_recall",
    "greedy_tokens",
    "output_error",
    "seconds",
)


def loss(row: Row) -> float | None:
    return row.output_error if row.kl_mean is None else row.kl_mean


def panels(rows: Sequence[Row]) -> dict[Panel, list[Row]]:
    """The rows by subject and context, in the order in which these appear."""
    found: dict[Panel, list[Row]] = {}
    for row in rows:
        found.setdefault((row.subject, row.context), []).append(row)
    return found


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One summary for every cache of a panel that was measured, by bits, the uncompressed one first."""
    by_cache: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == "ok":
            by_cache.setdefault(row.cache, []).append(row)
    found = []
    for cache, own in by_cache.items():
        measured = {name: [getattr(row, name) for row in own if getattr(row, name) is not None] for name in AVERAGED}
        spreads = {name: Spread.of(values) for name, values in measured.items() if values}
        found.append(Summary(cache, own[0].side, own[0].family, len(own), spreads))
    return sorted(found, key=lambda each: (each.side != REFERENCE, each.bits or math.inf))


def optimal(summaries: Sequence[Summary]) -> set[str]:
    """The names of the caches that no other one beats in bits without losing more, or the other way round."""
    points = [(each.cache, each.bits, each.loss) for each in summaries if each.side != REFERENCE]
    known = [(name, bits, lost) for name, bits, lost in points if bits is not None and lost is not None]
    return {
        name
        for name, bits, lost in known
        if not any(b <= bits and k <= lost and (b, k) != (bits, lost) for _, b, k in known)
    }


def interpolated(points: Sequence[tuple[float, float]], bits: float) -> float | None:
    """The loss at `bits` on the curve through (bits, loss) points: its logarithm runs straight between neighbours.

    None outside the points (nothing is extrapolated). Of several points at the same bits the lowest counts.
    """
    lowest: dict[float, float] = {}
    for at, lost in points:
        lowest[at] = min(lost, lowest.get(at, math.inf))
    if bits in lowest:
        return lowest[bits]
    for (left, a), (right, b) in pairwise(sorted(lowest.items())):
        if left < bits < right:
            share = (bits - left) / (right - left)
            return math.exp((1 - share) * math.log(max(a, FLOOR)) + share * math.log(max(b, FLOOR)))
    return None


@dataclass(frozen=True)
class AtBits:
    """A family's loss at some bits, by seed."""

    family: str
    by_seed: dict[int, float]

    @property
    def spread(self) -> Spread:
        return Spread.of(list(self.by_seed.values()))


def at_bits(rows: Sequence[Row], side: str, bits: float) -> list[AtBits]:
    """Every family of a side that has points on both sides of `bits` (or there) in every seed, the best first."""
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        lost = loss(row)
        if row.status == "ok" and row.side == side and row.bits_per_element is not None and lost is not None:
            curves.setdefault(row.family, {}).setdefault(row.seed, []).append((row.bits_per_element, lost))
    found = []
    for family, seeds in curves.items():
        values = {seed: interpolated(points, bits) for seed, points in seeds.items()}
        known = {seed: value for seed, value in values.items() if value is not None}
        if len(known) == len(values):
            found.append(AtBits(family, known))
    return sorted(found, key=lambda each: each.spread.mean)


def best_at(rows: Sequence[Row], side: str, bits: float) -> AtBits | None:
    """The family of a side with the lowest mean loss at `bits`."""
    return next(iter(at_bits(rows, side, bits)), None)


@dataclass(frozen=True)
class Ratio:
    """A loss over another: of the means over the seeds that both have, and the lowest and highest of a single seed."""

    mean: float
    lowest: float
    highest: float
    seeds: int


def ratio(upper: AtBits, lower: AtBits) -> Ratio | None:
    """`upper` over `lower`; None where they share no seed."""
    seeds = sorted(upper.by_seed.keys() & lower.by_seed.keys())
    if not seeds:
        return None
    single = [upper.by_seed[seed] / max(lower.by_seed[seed], FLOOR) for seed in seeds]
    above, below = (statistics.fmean(each.by_seed[seed] for seed in seeds) for each in (upper, lower))
    return Ratio(above / max(below, FLOOR), min(single), max(single), len(seeds))
