"""Bytes of a cache by tokens, uncompressed and under a spec, from the shapes of a model's layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvcompress.codecs import Geometry
from kvcompress.spec import CacheSpec, CodecSpec
from kvcompress.store import PAGE


@dataclass(frozen=True)
class Layer:
    """One layer of one row as transformers stores it: heads and head sizes (key, value), bytes a token, tokens at most
    (None: all), bytes whatever the length, and whether a compressed cache takes its place."""

    heads: int
    dims: tuple[int, int]
    token_bytes: int
    limit: int | None
    state_bytes: int
    compressed: bool

    def held(self, tokens: int) -> int:
        return self.state_bytes + self.token_bytes * (tokens if self.limit is None else min(tokens, self.limit))


@dataclass(frozen=True)
class Coding:
    """One layer of one row in a compressed cache, at its fullest: see `kvcompress.history` for the rule."""

    sinks: int  # tokens; room is made for all of them at once
    kept: int  # tokens: sinks and window
    needed: int  # tokens that have to be there before any is coded
    token_bytes: int
    page_bytes: float
    fit_bytes: int

    def held(self, tokens: int) -> int:
        pages = max(tokens - self.kept, 0) // PAGE if tokens >= self.needed else 0
        exact = min(max(tokens, self.sinks), max(self.kept + PAGE, self.needed))  # the most at any time
        return exact * self.token_bytes + math.ceil(pages * self.page_bytes) + (self.fit_bytes if pages else 0)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a whole cache by tokens in each row; both never fall as tokens grow."""

    batch: int
    layers: tuple[Layer, ...]
    codings: tuple[Coding | None, ...]

    def uncompressed(self, tokens: int) -> int:
        return self.batch * sum(layer.held(tokens) for layer in self.layers)

    def compressed(self, tokens: int) -> int:
        pairs = zip(self.layers, self.codings, strict=True)
        return self.batch * sum(x.held(tokens) if c is None else c.held(tokens) + x.state_bytes for x, c in pairs)


def coding(layer: Layer, spec: CacheSpec, index: int, count: int, dtype: torch.dtype) -> Coding | None:
    """How layer `index` of `count` is held under a spec; None where it stays as transformers stores it."""
    sides = spec.layer(index, count)  # also where it is not compressed: it checks the spec's layer numbers
    if not layer.compressed:
        return None
    costs = [
        _cost(codec, Geometry(dim, side, layer.heads), dtype)
        for side, (codec, dim) in enumerate(zip((sides.key, sides.value), layer.dims, strict=True))
    ]
    return Coding(
        sinks=spec.sinks,
        kept=spec.sinks + spec.window,
        needed=spec.sinks + max(cost.fit_tokens for cost in costs),
        token_bytes=layer.token_bytes,
        page_bytes=PAGE * sum(cost.vector_bits for cost in costs) / 8,
        fit_bytes=sum(cost.fit_bytes for cost in costs),
    )


@dataclass(frozen=True)
class _Cost:
    vector_bits: float
    fit_tokens: int
    fit_bytes: int


def _cost(codec_spec: CodecSpec, geometry: Geometry, dtype: torch.dtype) -> _Cost:
    """What a token costs: bits of all heads' vectors, and bytes of what is learned once from `fit_tokens` tokens."""
    codec = codec_spec.build(geometry)
    first = torch.zeros(1, geometry.heads, max(codec.fit_tokens, 1), geometry.head_dim)
    fit_bytes = sum(x.nbytes for x in codec.fit(first).values())
    return _Cost(codec.bits_per_element(dtype) * geometry.head_dim * geometry.heads, codec.fit_tokens, fit_bytes)
