"""Codecs: centre -> linear transform -> bands -> quantiser -> bit packing.

The linear parts never run on the cache again. With `k = W y + mu` (W the transform's synthesis matrix, [D, R]; y what
the codes stand for) attention absorbs them into the query and the output::

    q . k         = (q W) . y + q . mu
    sum_t p_t v_t = W (sum_t p_t z_t) + nu          for weights that sum to one

A `Codec` is assembled by a family's factory (one file each, registered in `CODECS` by name) from a `Transform`, which
may be fitted to a row's first tokens, and `Band`s: runs of transformed dimensions with a `Quantiser` each, or none
(dropped).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from kvcompress.spec import CODECS, CodecSpec

#: What was learned from a row, by name, each [rows, H, ...]: `mean` [.., D], and what the transform adds.
Fit = dict[str, Tensor]
#: The stored parts of coded vectors, by name, each [pages, H, tokens, ...].
Coded = dict[str, Tensor]


class Transform(Protocol):
    """A linear map of vectors of D dimensions to `rank` dimensions, fixed or fitted."""

    @property
    def rank(self) -> int: ...

    def fit(self, centred: Tensor) -> Fit:
        """What to store of centred tokens [rows, H, F, D]; an empty dict for a fixed transform."""

    def analysis(self, fit: Fit, device: torch.device) -> Tensor | None:
        """[rank, D], or [rows, H, rank, D] where fitted: y = analysis (x - mean). None: the identity."""

    def synthesis(self, fit: Fit, device: torch.device) -> Tensor | None:
        """[D, rank], or [rows, H, D, rank] where fitted: x = synthesis y + mean. None: the identity."""


class Quantiser(Protocol):
    """Codes vectors of `width` dimensions, each token by itself or tokens of one page together."""

    def encode(self, y: Tensor) -> Coded:
        """Parts [pages, H, tokens, ...] of vectors [pages, H, tokens, width]."""

    def decode(self, coded: Coded, width: int) -> Tensor:
        """The vectors that the parts stand for, float32 [pages, H, tokens, width]."""

    def vector_bits(self, width: int, dtype: torch.dtype) -> float:
        """Bits that a vector of the model's `dtype` takes, with its scales."""


@dataclass(frozen=True)
class Band:
    """`width` transformed dimensions under one quantiser; None drops them (zero bits)."""

    width: int
    quantiser: Quantiser | None


@dataclass(frozen=True)
class Codec:
    """A codec for vectors of `head_dim`.

    centred: subtract the mean over the first `fit_tokens` tokens of a row after its sinks, learned exactly once.
    """

    head_dim: int
    transform: Transform
    bands: tuple[Band, ...]
    centred: bool = True
    fit_tokens: int = 128

    def __post_init__(self) -> None:
        total = sum(band.width for band in self.bands)
        if total != self.transform.rank:
            raise ValueError(f"the bands cover {total} dimensions, the transform yields {self.transform.rank}")

    def fit(self, x: Tensor) -> Fit:
        """Learn from tokens [rows, H, F, D]: mean (float32) and what the transform needs."""
        x = x.float()
        if not self.centred:
            return self.transform.fit(x)
        mean = x.mean(dim=-2)
        return {"mean": mean, **self.transform.fit(x - mean.unsqueeze(-2))}

    def encode(self, x: Tensor, fit: Fit) -> Coded:
        """Code tokens [pages, H, tokens, D] with a fit of [pages, H, ...]."""
        analysis = self.transform.analysis(fit, x.device)
        if self.centred:
            x = x.float() - fit["mean"].unsqueeze(-2)
        y = x if analysis is None else x.float() @ analysis.mT
        coded: Coded = {}
        for index, (band, part) in enumerate(zip(self.bands, y.split([b.width for b in self.bands], -1), strict=True)):
            if band.quantiser is not None:
                coded |= {f"{index}.{name}": value for name, value in band.quantiser.encode(part).items()}
        return coded

    def decode(self, coded: Coded) -> Tensor:
        """What the codes stand for, before synthesis: float32 [pages, H, tokens, rank]."""
        shape = next(iter(coded.values())).shape[:3]
        device = next(iter(coded.values())).device
        parts = []
        for index, band in enumerate(self.bands):
            if band.quantiser is None:
                parts.append(torch.zeros(*shape, band.width, device=device))
            else:
                prefix = f"{index}."
                own = {name.removeprefix(prefix): part for name, part in coded.items() if name.startswith(prefix)}
                parts.append(band.quantiser.decode(own, band.width))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def absorb(self, query: Tensor, fit: Fit) -> tuple[Tensor, Tensor | None]:
        """Query [rows, H, n, D] to ([rows, H, n, rank], the constant [rows, H, n, 1] that the mean adds to scores)."""
        synthesis = self.transform.synthesis(fit, query.device)
        bias = query @ fit["mean"].unsqueeze(-1) if self.centred else None
        return (query if synthesis is None else query @ synthesis), bias

    def restore(self, y: Tensor, fit: Fit) -> Tensor:
        """Weighted means [rows, H, n, rank] of what codes stand for to weighted means of vectors [rows, H, n, D]."""
        synthesis = self.transform.synthesis(fit, y.device)
        x = y if synthesis is None else y @ synthesis.mT
        return x + fit["mean"].unsqueeze(-2) if self.centred else x

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """Coded bits per element of a cache of `dtype`, with scales, without what is stored once a row."""
        bits = sum(band.quantiser.vector_bits(band.width, dtype) for band in self.bands if band.quantiser is not None)
        return bits / self.head_dim


Factory = TypeVar("Factory", bound=Callable[[CodecSpec, int], Codec])


def register(name: str, bits: tuple[int, ...] = ()) -> Callable[[Factory], Factory]:
    """Decorator of a family's factory (CodecSpec, head_dim) -> Codec: make it known as `name`, taking `bits`."""

    def add(factory: Factory) -> Factory:
        factory.bits = bits  # type: ignore[attr-defined]
        CODECS.register(name)(factory)
        return factory

    return add


from kvcompress.codecs import exact, fp8, lloyd, trellis  # noqa: E402, F401  (they register themselves)
