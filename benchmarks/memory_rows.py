"""The rows of `python -m benchmarks memory`: one a geometry, cache and context, put together from measured layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.caches import Contender
from benchmarks.memory_fill import Level
from benchmarks.memory_geometries import Geometry, Kind

#: How a row's bytes are known: all layers were filled at once; a layer of each kind was filled alone and counted as
#: often as the model has it; or at least one kind's bytes are on the straight line through the last two that were.
WHOLE, LAYERWISE, SLOPE = "whole", "layer by layer", "slope"

Key = tuple[str, str, int]


@dataclass(frozen=True)
class LayerBytes:
    """One kind of layer at a row's context: `count` of them, each of `level`; slope: whether that was not filled."""

    kind: str
    count: int
    slope: bool
    level: Level


@dataclass(frozen=True)
class Row:
    """A cache of a model at a context; None where it is not known. status: "ok", else why, with a `reason`.

    parameters: of the model, counted on the meta device, not measured. bits_per_element: of the coded part, overheads
    included; effective: of all that is held. uncompressed_bytes: if every layer kept all tokens in bfloat16.
    peak_bytes: the most that was held on the way, the chunk that is fed included; layer by layer that is what the
    layers hold in the end and one layer's rise above it. layers: what the sum is made of, as `LayerBytes`. seconds:
    that filling took. minutes: the limit that ended it, where there is a slope.
    """

    geometry: str
    cache: str
    library: str
    tokens: int
    spec: dict[str, Any] | None = None
    parameters: int | None = None
    status: str = "ok"
    reason: str | None = None
    basis: str | None = None
    bits_per_element: float | None = None
    effective_bits_per_element: float | None = None
    cache_bytes: int | None = None
    uncompressed_bytes: int | None = None
    peak_bytes: int | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    seconds: float | None = None
    minutes: float | None = None

    @property
    def key(self) -> Key:
        return self.geometry, self.cache, self.tokens


def empty_row(geometry: Geometry, contender: Contender, tokens: int) -> Row:
    return Row(
        geometry.name,
        contender.name,
        contender.library,
        tokens,
        contender.content,
        geometry.parameters,
        uncompressed_bytes=geometry.uncompressed(geometry.layers, tokens),
    )


def whole_row(row: Row, level: Level) -> Row:
    """The row of a cache that was filled as a whole."""
    return replace(
        row,
        basis=WHOLE,
        bits_per_element=level.bits_per_element,
        effective_bits_per_element=8 * level.bytes / level.elements,
        cache_bytes=level.bytes,
        peak_bytes=level.peak_bytes,
        seconds=level.seconds,
    )


def layered_row(row: Row, parts: Sequence[LayerBytes], minutes: float) -> Row:
    """The row of a cache whose kinds of layers are each known at its context."""
    held = sum(part.count * part.level.bytes for part in parts)
    elements = sum(part.count * part.level.elements for part in parts)
    coded = [(part.count, part.level.bits_per_element) for part in parts if part.level.bits_per_element is not None]
    slope = any(part.slope for part in parts)
    return replace(
        row,
        basis=SLOPE if slope else LAYERWISE,
        bits_per_element=sum(n * bits for n, bits in coded) / sum(n for n, _ in coded) if coded else None,
        effective_bits_per_element=8 * held / elements,
        cache_bytes=held,
        peak_bytes=held + max(part.level.peak_bytes - part.level.bytes for part in parts),
        layers=[{**asdict(part), "level": asdict(part.level)} for part in parts],
        seconds=None if slope else sum(part.level.seconds for part in parts),
        minutes=minutes if slope else None,
    )


def part_of(kind: Kind, levels: Mapping[int, Level], tokens: int) -> LayerBytes | None:
    """A kind at a context, measured or on the line through its last two levels before; None where there are fewer."""
    if tokens in levels:
        return LayerBytes(kind.label, len(kind.layers), False, levels[tokens])
    before = [levels[at] for at in sorted(levels) if at < tokens][-2:]
    if len(before) < 2:
        return None
    first, last = before
    share = (tokens - last.tokens) / (last.tokens - first.tokens)
    line = {
        name: round(getattr(last, name) + share * (getattr(last, name) - getattr(first, name)))
        for name in ("bytes", "elements", "peak_bytes")
    }
    return LayerBytes(kind.label, len(kind.layers), True, replace(last, tokens=tokens, **line))


def known_levels(rows: Sequence[Row]) -> dict[str, dict[int, Level]]:
    """The measured levels that rows are made of, by kind and tokens."""
    found: dict[str, dict[int, Level]] = {}
    for row in rows:
        for part in row.layers:
            if not part["slope"]:
                found.setdefault(part["kind"], {})[row.tokens] = Level(**part["level"])
    return found


@dataclass(frozen=True)
class Fit:
    """How many tokens fit beside the weights: None where the cache does not grow. basis: "measured" or "slope"."""

    geometry: str
    cache: str
    cache_memory: int
    tokens: int | None
    basis: str


def fits(rows: Sequence[Row], gpu: int, reserve: int, weight_bits: float) -> list[Fit]:
    """For every geometry and cache, the tokens that fit in `gpu` bytes with the weights and a reserve in bytes.

    Between two contexts the bytes are taken to grow in a straight line; the answer is "measured" where both of them
    are (so is that not even the shortest fits, 0 tokens), and "slope" where it lies beyond what was filled.
    """
    result = []
    for (geometry, cache), own in _series(rows).items():
        memory = gpu - reserve - weight_bytes(own[0], weight_bits)
        result.append(Fit(geometry, cache, memory, *_largest(own, memory)))
    return result


def weight_bytes(row: Row, weight_bits: float) -> int:
    """Bytes of the model's weights, computed."""
    return round((row.parameters or 0) * weight_bits / 8)


def _series(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows whose bytes are known, by tokens, of each geometry and cache that has two of them."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.tokens):
        if row.status == "ok":
            found.setdefault((row.geometry, row.cache), []).append(row)
    return {key: own for key, own in found.items() if len(own) > 1}


def _largest(rows: Sequence[Row], memory: int) -> tuple[int | None, str]:
    """See `fits`; rows by tokens, at least two."""
    points = [(row.tokens, row.cache_bytes or 0, row.basis == SLOPE) for row in rows]
    if points[0][1] > memory:
        return 0, "measured"
    upper = next((i for i, (_, held, _) in enumerate(points) if held > memory), len(points) - 1)
    (n0, b0, _), (n1, b1, guessed) = points[upper - 1], points[upper]
    if b1 <= b0:
        return None, "slope"
    beyond = b1 <= memory
    return int(n0 + (memory - b0) * (n1 - n0) / (b1 - b0)), "slope" if guessed or beyond else "measured"
