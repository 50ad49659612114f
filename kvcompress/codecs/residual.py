"""`residual1+CODEC`..`residual64+CODEC`: a codec, and what it leaves in its R strongest directions as float16.

The low-rank part of GEAR (arXiv 2403.05527): directions are learned from what CODEC leaves of a row's first tokens, in
the metric by which errors matter where that is known, and cost 16 R / D bits an element beside CODEC's own. Against the
paper: directions are learned once from the first tokens, not anew for every chunk, so that only the coefficients are
stored for each token; and there are no sparse outliers.

When it pays: where CODEC leaves errors of few directions, as coarse grids without a rotation do beside outlier channels
(`kivi2`: 6 dB and more by 8 directions, `pytest tests/test_lowrank.py -k coarse_grid`). Rotated codecs leave white
noise, of which R of D directions are R / D. Where CODEC can have another bit instead, that bit is worth more.

What codes stand for is [z, c], CODEC's and the coefficients', and the synthesis [S | B]: attention absorbs it as it
does any other transform.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcompress.codecs import Codec, Coded, Fit, Geometry, register, within
from kvcompress.codecs.lowrank import Half, LowRank
from kvcompress.codecs.spectral import FIT_TOKENS
from kvcompress.spec import CodecSpec

LARGEST_RANK = 64
TOGETHER = 64  # tokens coded at a time to learn what the codec leaves: a page of them, which may share scales


@dataclass(frozen=True)
class Residual(Codec):
    """`base`, whose transform and bands are also this codec's first ones, and `directions` of what it leaves.

    Names of parts and of what is learned start with "base." or "residual.".
    """

    base: Codec = field(kw_only=True)
    directions: LowRank = field(kw_only=True)

    def __post_init__(self) -> None:
        """The base has been checked."""

    @property
    def rank(self) -> int:
        return self.base.rank + self.directions.rank

    def fit(self, x: Tensor, metric: Tensor | None = None) -> Fit:
        base = self.base.fit(x, metric)
        left = [self._left(part, self.base.encode(part, base), base) for part in x.float().split(TOGETHER, dim=2)]
        return _joined(base, self.directions.fit(torch.cat(left, dim=2), metric))

    def encode(self, x: Tensor, fit: Fit) -> Coded:
        base = within(fit, "base.")
        coded = self.base.encode(x, base)
        analysis = self.directions.analysis(within(fit, "residual."), x.device)
        return _joined(coded, Half().encode(self._left(x.float(), coded, base) @ analysis.mT))

    def decode(self, coded: Coded, fit: Fit) -> Tensor:
        coefficients = Half().decode(within(coded, "residual."), self.directions.rank)
        z = self.base.decode(within(coded, "base."), within(fit, "base."))
        return torch.cat([z.expand(*coefficients.shape[:3], -1), coefficients], dim=-1)

    def absorb(self, query: Tensor, fit: Fit) -> tuple[Tensor, Tensor | None]:
        absorbed, bias = self.base.absorb(query, within(fit, "base."))
        synthesis = self.directions.synthesis(within(fit, "residual."), query.device)
        return torch.cat([absorbed, query @ synthesis], dim=-1), bias

    def restore(self, y: Tensor, fit: Fit) -> Tensor:
        z, coefficients = y.split([self.base.rank, self.directions.rank], dim=-1)
        synthesis = self.directions.synthesis(within(fit, "residual."), y.device)
        return self.base.restore(z, within(fit, "base.")) + coefficients @ synthesis.mT

    def bits_per_element(self, dtype: torch.dtype) -> float:
        own = Half().vector_bits(self.directions.rank, dtype) / self.head_dim
        return self.base.bits_per_element(dtype) + own

    def _left(self, x: Tensor, coded: Coded, base: Fit) -> Tensor:
        """What the base leaves of tokens [pages, H, tokens, D] that it coded."""
        return x - self.base.restore(self.base.decode(coded, base), base)


def _joined(base: dict[str, Tensor], residual: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"base.{name}": x for name, x in base.items()} | {f"residual.{name}": x for name, x in residual.items()}


@register("residual", bits=range(1, LARGEST_RANK + 1), parts=(1,), examples=("residual8+trellis2", "residual4+kivi2"))
def build(spec: CodecSpec, geometry: Geometry) -> Codec:
    assert spec.bits is not None
    rank, (part,) = int(spec.bits), spec.parts
    if rank > geometry.head_dim:
        raise ValueError(f"the rank of residual{rank} must be at most head_dim, which is {geometry.head_dim}")
    base = part.build(geometry)
    return Residual(
        geometry.head_dim,
        base.transform,
        base.bands,
        centred=base.centred,
        fit_tokens=max(base.fit_tokens, FIT_TOKENS),
        weighted=True,
        frame=base.frame,
        page_wise=base.page_wise,
        base=base,
        directions=LowRank(geometry.head_dim, rank),
    )
