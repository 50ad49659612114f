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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from kvcompress.registry import Family
from kvcompress.spec import CODECS, CodecSpec

#: What is coded, by the number of its side.
SIDES = ("key", "value")
#: What was learned from a row, by name, each [rows, H, ...]: `mean` [.., D], and what the transform adds.
Fit = dict[str, Tensor]
#: The stored parts of coded vectors, by name, each [pages, H, ...].
Coded = dict[str, Tensor]


@dataclass(frozen=True)
class Geometry:
    """The vectors that a codec is for: `heads` KV heads of `head_dim`, keys (side 0) or values (side 1)."""

    head_dim: int
    side: int = 0
    heads: int = 1


class Transform(Protocol):
    """A linear map of vectors of D dimensions to `rank` dimensions, fixed or fitted."""

    @property
    def rank(self) -> int: ...

    def fit(self, centred: Tensor, metric: Tensor | None) -> Fit:
        """What to store of centred tokens [rows, H, F, D]; an empty dict for a fixed transform.

        metric: [rows, H, D, D], positive definite, by which errors matter (e^T metric e); None where it is not known.
        """

    def analysis(self, fit: Fit, device: torch.device) -> Tensor | None:
        """[rank, D], or [rows, H, rank, D] where fitted: y = analysis (x - mean). None: the identity."""

    def synthesis(self, fit: Fit, device: torch.device) -> Tensor | None:
        """[D, rank], or [rows, H, D, rank] where fitted: x = synthesis y + mean. None: the identity."""


class Quantiser(Protocol):
    """Codes vectors of `width` dimensions, each token by itself or tokens of one page together, in multiples of 8."""

    def encode(self, y: Tensor) -> Coded:
        """Parts [pages, H, ...] of vectors [pages, H, tokens, width]."""

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
    weighted: whether `fit` has a use for the metric of errors. frame: what rotary position embedding is taken out of
    keys before they are coded, and put back when they are read: none ("fixed"), that of their page's middle ("page",
    which queries can absorb once a page) or all of it ("token"). page_wise: tokens of a page share scales, so that a
    token's codes depend on the others of its page.
    """

    head_dim: int
    transform: Transform
    bands: tuple[Band, ...]
    centred: bool = True
    fit_tokens: int = 128
    weighted: bool = False
    frame: Literal["fixed", "page", "token"] = "fixed"
    page_wise: bool = False

    def __post_init__(self) -> None:
        total = sum(band.width for band in self.bands)
        if total != self.transform.rank:
            raise ValueError(f"the bands cover {total} dimensions, the transform yields {self.transform.rank}")
        if all(band.quantiser is None for band in self.bands):
            raise ValueError("a codec needs a band with a quantiser")

    @property
    def rank(self) -> int:
        """Dimensions of what the codes stand for."""
        return self.transform.rank

    def fit(self, x: Tensor, metric: Tensor | None = None) -> Fit:
        """Learn from tokens [rows, H, F, D], and where known the metric [rows, H, D, D] by which errors matter."""
        x = x.float()
        if not self.centred:
            return self.transform.fit(x, metric)
        mean = x.mean(dim=-2)
        return {"mean": mean, **self.transform.fit(x - mean.unsqueeze(-2), metric)}

    def encode(self, x: Tensor, fit: Fit) -> Coded:
        """Code tokens [pages, H, tokens, D] with a fit of [pages or 1, H, ...]."""
        analysis = self.transform.analysis(fit, x.device)
        if self.centred:
            x = x.float() - fit["mean"].unsqueeze(-2)
        y = x if analysis is None else x.float() @ analysis.mT
        coded: Coded = {}
        for index, (band, part) in enumerate(zip(self.bands, y.split([b.width for b in self.bands], -1), strict=True)):
            if band.quantiser is not None:
                coded |= {f"{index}.{name}": value for name, value in band.quantiser.encode(part).items()}
        return coded

    def decode(self, coded: Coded, fit: Fit) -> Tensor:
        """What the codes stand for, before synthesis: float32 [pages, H, tokens, rank].

        fit: [rows or 1, H, ...] of the rows that have `pages / rows` pages each, row by row; see `by_page`.
        """
        parts: list[Tensor | None] = []
        for index, band in enumerate(self.bands):
            own = within(coded, f"{index}.")
            parts.append(None if band.quantiser is None else band.quantiser.decode(own, band.width))
        known = next(part for part in parts if part is not None)
        filled = [
            known.new_zeros(*known.shape[:3], band.width) if part is None else part
            for band, part in zip(self.bands, parts, strict=True)
        ]
        return filled[0] if len(filled) == 1 else torch.cat(filled, dim=-1)

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


def by_page(learned: Tensor, pages: int) -> Tensor:
    """What was learned of rows [rows or 1, H, ...] for each of their `pages` pages, row by row: [pages, H, ...]."""
    return learned.repeat_interleave(pages // len(learned), dim=0)


def within(coded: Coded, prefix: str) -> Coded:
    """The parts whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): part for name, part in coded.items() if name.startswith(prefix)}


def joined(blocks: list[Coded]) -> Coded:
    """The coded pages of blocks one after the other."""
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


Factory = TypeVar("Factory", bound=Callable[[CodecSpec, Geometry], Codec])


def register(
    name: str, bits: Sequence[float] = (), parts: Sequence[int] = (0,), examples: Sequence[str] = ()
) -> Callable[[Factory], Factory]:
    """Decorator of a family's factory (CodecSpec, Geometry) -> Codec: make it known as `name`. See `Family`."""

    def add(factory: Factory) -> Factory:
        listed = examples or [f"{name}{number}" for number in bits] or [name]
        CODECS.register(name)(Family(factory, bits, parts, listed))
        return factory

    return add


from kvcompress.codecs import (  # noqa: E402, F401  (they register themselves)
    bnb,
    exact,
    fp8,
    heads,
    jointrank,
    kivi,
    kvarn,
    kvquant,
    lloyd,
    lowrank,
    prerope,
    residual,
    spectral,
    trellis,
    turboquant,
)
