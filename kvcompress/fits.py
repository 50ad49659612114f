"""How much quality a cache costs, as lines fitted to measurements: `fits.json`, made by `python -m benchmarks scaling`.

A family of codecs (one spec with other numbers, such as prerope+spectral1.5 to 4) has two lines::

    ln KL                = constant + doublings * log2(context / reference) + slope * x      x: bits, or kept directions
    ln(perplexity ratio) = per_kl * KL

Bits are those of codes with their scales; what is learned once (bases, means, tables) is not among them, for it weighs
less the longer the context, and would tie the two terms together.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvcompress.codecs import Geometry
from kvcompress.spec import PER_HEAD, CacheSpec

SHIPPED = Path(__file__).with_name("fits.json")
LEVEL = 0.95
VERSION = 1
RANKS = ("lowrank", "jointrank")  # families whose number is a rank


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95% interval."""

    mean: float
    low: float
    high: float

    def map(self, function: Any) -> Interval:
        """By a monotonic function."""
        ends = function(self.low), function(self.high)
        return Interval(function(self.mean), min(ends), max(ends))

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@lru_cache
def quantile(freedom: float) -> float:
    """Student's t beyond which, on either side, lie 5% together; freedom: degrees, above 0.

    With t = sqrt(freedom) tan(angle) the density of the angle is cos(angle)^(freedom - 1).
    """
    angles = np.linspace(0, np.pi / 2, 20_001)
    mass = np.cumsum(np.cos((angles[1:] + angles[:-1]) / 2) ** (freedom - 1))
    return float(math.sqrt(freedom) * math.tan(np.interp(LEVEL, mass / mass[-1], angles[1:])))


@dataclass(frozen=True)
class Line:
    """Coefficients by least squares, seed by seed, and how far they can be trusted.

    coefficients: [terms], the mean over `seeds` seeds (documents). covariance: [terms, terms], of a single seed's.
    misfit: the standard deviation of the points, averaged over seeds, from the line, with `freedom` degrees of freedom:
    what a line does not say however many documents are measured. inverse: of the terms' second moments, by which the
    misfit makes the coefficients uncertain. Both sources are added; a little noise of the seeds is in both, so
    intervals err on the wide side. r_squared: of the averaged points.
    """

    terms: tuple[str, ...]
    coefficients: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    inverse: tuple[tuple[float, ...], ...]
    seeds: int
    misfit: float
    freedom: int
    r_squared: float

    def coefficient(self, term: str) -> Interval:
        """With the interval of its true value."""
        unit = [float(name == term) for name in self.terms]
        return self._at(unit, 0)

    def predict(self, values: Sequence[float]) -> Interval:
        """The response at values of the terms, with the interval of one more document's at one more point."""
        return self._at(values, 1)

    def _at(self, values: Sequence[float], more: int) -> Interval:
        x = np.array(values, dtype=float)
        seeds = float(x @ np.array(self.covariance) @ x) * (1 / self.seeds + more)
        points = self.misfit**2 * (float(x @ np.array(self.inverse) @ x) + more)
        mean, variance = float(x @ np.array(self.coefficients)), seeds + points
        if variance == 0:
            return Interval(mean, mean, mean)
        # Welch and Satterthwaite: the degrees of freedom of a sum of two estimated variances
        freedom = variance**2 / (seeds**2 / (self.seeds - 1) + points**2 / self.freedom)
        half = quantile(round(freedom, 2)) * math.sqrt(variance)
        return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class FamilyFit:
    """A family's lines. kind: what x is, "bits" or "rank"; x, contexts: from, to; specs: that were measured."""

    family: str
    kind: str
    x: tuple[float, float]
    contexts: tuple[int, int]
    reference: int
    specs: tuple[str, ...]
    loss: Line
    perplexity: Line

    def expected(self, x: float, context: int) -> tuple[Interval, Interval]:
        """KL in nats a token, and the perplexity's increase as a share, of a document.

        Raises ValueError outside the ranges: nothing is extrapolated.
        """
        for what, value, (low, high) in ((self.kind, x, self.x), ("context", context, self.contexts)):
            if not low <= value <= high:
                raise ValueError(f"{what} {value:g} lies outside the fitted {low:g} to {high:g}")
        values = {"constant": 1.0, "doublings": math.log2(context / self.reference), self.kind: x}
        kl = self.loss.predict([values[term] for term in self.loss.terms]).map(math.exp)
        ends = [self.perplexity.predict([loss]) for loss in (kl.low, kl.mean, kl.high)]  # where KL itself may lie
        ratio = Interval(ends[1].mean, min(e.low for e in ends), max(e.high for e in ends))
        return kl, ratio.map(math.expm1)


@dataclass(frozen=True)
class Trend:
    """By how many per cent a cache raised a model's perplexity along one document, by the doublings of position.

    spec: what was measured; positions: from, to; at_end: at the last of them; doubling: what each doubling adds.
    """

    spec: str
    positions: tuple[int, int]
    at_end: Interval
    doubling: Interval


@dataclass(frozen=True)
class Shape:
    """What tells a model from others: parameters, layers, KV heads, sizes of key and value heads."""

    parameters: int
    layers: int
    heads: int
    dims: tuple[int, int]


@dataclass(frozen=True)
class Fits:
    """What was measured on one model, and the lines. model: its name; text: what it read; commits: of the measurements.

    sinks, window (tokens), basis: of every spec that was fitted. trends_model: whose the trends by position are.
    """

    model: str
    shape: Shape
    text: str
    commits: tuple[str, ...]
    sinks: int
    window: int
    basis: str
    families: tuple[FamilyFit, ...]
    trends_model: str | None = None
    trends: tuple[Trend, ...] = ()

    def family(self, name: str) -> FamilyFit | None:
        return next((each for each in self.families if each.family == name), None)

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Fits:
        """Raises OSError where there is no such file, ValueError where it is no file of fits of this version."""
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict) or content.pop("version", None) != VERSION:
            raise ValueError(
                f"{path} is no file of fits of version {VERSION}, which python -m benchmarks scaling writes"
            )
        try:
            content["shape"] = _record(Shape, content["shape"])
            content["families"] = tuple(_family(each) for each in content["families"])
            content["trends"] = tuple(_trend(each) for each in content["trends"])
            return _record(cls, content)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of fits: {error}") from error


def _record(kind: Any, content: dict[str, Any]) -> Any:
    return kind(**{name: _tuples(value) for name, value in content.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _family(content: dict[str, Any]) -> FamilyFit:
    lines = {name: _record(Line, content[name]) for name in ("loss", "perplexity")}
    return _record(FamilyFit, {**content, **lines})


def _trend(content: dict[str, Any]) -> Trend:
    return _record(Trend, {**content, **{name: Interval(**content[name]) for name in ("at_end", "doubling")}})


def family_of(spec: CacheSpec) -> tuple[str, str] | None:
    """A spec's family and what its number is ("bits" or "rank"); None where keys, values, layers or heads differ."""
    if spec.key != spec.value or spec.layers or spec.key.name == PER_HEAD:
        return None
    last = spec.key
    while last.parts:
        last = last.parts[-1]
    if last.name == PER_HEAD:
        return None
    name = re.fullmatch(r"(.*?)(\d+(\.\d+)?)?", str(spec.key))[1] if last.bits is not None else str(spec.key)  # type: ignore[index]
    return name, "rank" if last.name in RANKS else "bits"


def x_of(spec: CacheSpec, kind: str, shape: Shape) -> float:
    """Where a spec of a family stands: its rank, or bits an element of keys and values together, codes and scales."""
    if kind == "rank":
        last = spec.key
        while last.parts:
            last = last.parts[-1]
        return float(last.bits or 0)
    codecs = [
        codec.build(Geometry(dim, side, shape.heads))
        for side, (codec, dim) in enumerate(zip((spec.key, spec.value), shape.dims, strict=True))
    ]
    bits = sum(codec.bits_per_element(torch.float32) * dim for codec, dim in zip(codecs, shape.dims, strict=True))
    return bits / sum(shape.dims)
