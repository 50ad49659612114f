"""`jointrank1`..`jointrank1024`: the strongest directions of all KV heads of a layer together, alone or with a codec.

As `lowrank`, with the heads' vectors of a token side by side as one vector of H D dimensions: what heads have in common
is stored once, R coefficients for the whole layer, 16 R / (H D) bits an element without a part (a joint basis over
heads: Palu, arXiv 2407.21118). The metric is block-diagonal over the heads. Codes and what they stand for have a head
axis of one, which broadcasts against the queries of every head; each head absorbs its own D rows of the synthesis.

A joint basis has H times as many dimensions to learn from the same tokens, takes H times the bytes (2 R H D, at most
(H D)^2), and every head's query meets all R coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codecs import Codec, Coded, Fit, Geometry, register
from kvcompress.codecs.lowrank import block_diagonal, coefficients, side_by_side
from kvcompress.codecs.spectral import FIT_TOKENS
from kvcompress.spec import CodecSpec

LARGEST_RANK = 1024


@dataclass(frozen=True)
class Joint(Codec):
    """A codec of the vectors of `heads` heads side by side; `transform` takes heads * head_dim dimensions."""

    heads: int = 1

    def fit(self, x: Tensor, metric: Tensor | None = None) -> Fit:
        """As `Codec.fit`, to tensors [rows, 1, ...]."""
        return super().fit(side_by_side(x), None if metric is None else block_diagonal(metric))

    def encode(self, x: Tensor, fit: Fit) -> Coded:
        """As `Codec.encode`, to parts [pages, 1, ...]; `decode` gives [pages, 1, tokens, rank]."""
        return super().encode(side_by_side(x), fit)

    def absorb(self, query: Tensor, fit: Fit) -> tuple[Tensor, Tensor | None]:
        synthesis, mean = self._of_heads(fit, query.device)
        return query @ synthesis, query @ mean.unsqueeze(-1)

    def restore(self, y: Tensor, fit: Fit) -> Tensor:
        """As `Codec.restore`, of weighted means [rows, H, n, rank], or of what codes stand for [rows, 1, n, rank]."""
        synthesis, mean = self._of_heads(fit, y.device)
        return y @ synthesis.mT + mean.unsqueeze(-2)

    def _of_heads(self, fit: Fit, device: torch.device) -> tuple[Tensor, Tensor]:
        """Each head's rows of the synthesis [rows, H, head_dim, rank] and of the mean [rows, H, head_dim]."""
        synthesis = self.transform.synthesis(fit, device)
        assert synthesis is not None
        split = (self.heads, self.head_dim)
        return synthesis.squeeze(1).unflatten(1, split), fit["mean"].squeeze(1).unflatten(1, split)

    def bits_per_element(self, dtype: torch.dtype) -> float:
        return super().bits_per_element(dtype) / self.heads


@register(
    "jointrank",
    bits=range(1, LARGEST_RANK + 1),
    parts=(0, 1),
    examples=("jointrank64", "jointrank64+trellis4"),
)
def build(spec: CodecSpec, geometry: Geometry) -> Codec:
    assert spec.bits is not None
    rank, part = int(spec.bits), next(iter(spec.parts), None)
    width = geometry.heads * geometry.head_dim
    if rank > width:
        raise ValueError(
            f"the rank of jointrank{rank} must be at most heads * head_dim, which is "
            f"{geometry.heads} * {geometry.head_dim} = {width}"
        )
    transform, bands, page_wise = coefficients("jointrank", rank, width, part, geometry.side)
    return Joint(
        geometry.head_dim,
        transform,
        bands,
        fit_tokens=FIT_TOKENS,
        weighted=True,
        page_wise=page_wise,
        heads=geometry.heads,
    )
