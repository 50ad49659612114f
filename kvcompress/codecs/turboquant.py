"""`turboquant1`..`turboquant4`: a rotation and Lloyd-Max codes of the direction, beside the vector's norm.

TurboQuant (arXiv 2504.19874), its variant of least squared error: a vector's norm is stored in 16 bits, its direction
is rotated, and every coordinate of that, close to Gaussian with variance 1 / head_dim, goes to the nearest level of one
codebook. Not centred, nothing is fitted. It is `lloyd` without the mean, with the norm in place of the least-squares
gain, and with exact levels. Against the paper: the rotation is the Hadamard transform with fixed signs, not a dense
random matrix; the levels are those of the Gaussian, which the sphere's coordinates tend to, not of the Beta
distribution itself; all channels have the same bits, where the paper's 2.5 and 3.5 bits give some channels one more;
and no bit is spent on the residual (QJL), which makes inner products unbiased but noisier: implementations have dropped
it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress import packing
from kvcompress.codecs import Band, Codec, Coded, Geometry, register
from kvcompress.codecs.lloyd import exact_codebook
from kvcompress.codecs.lookup import look_up
from kvcompress.codecs.scale import HALF, TINY
from kvcompress.codecs.transforms import Hadamard
from kvcompress.spec import CodecSpec


@dataclass(frozen=True)
class Sphere:
    """Vectors of norm r as r / sqrt(dimensions) times a level for each coordinate; r is stored, [pages, H, tokens].

    dimensions: of the vectors before their transform, which may have added coordinates that are zero.
    """

    bits: int
    dimensions: int

    def encode(self, y: Tensor) -> Coded:
        _, borders = exact_codebook(self.bits, y.device)
        norm = y.square().sum(dim=-1).sqrt()
        codes = torch.bucketize(y * (math.sqrt(self.dimensions) / norm.clamp_min(TINY)).unsqueeze(-1), borders)
        return {"codes": packing.pack(codes, self.bits), "norm": HALF.encode(norm)}

    def decode(self, coded: Coded, width: int) -> Tensor:
        levels, _ = exact_codebook(self.bits, coded["codes"].device)
        codes = packing.unpack(coded["codes"], self.bits, coded["norm"].shape[-1], width)
        return look_up(levels, codes) * (HALF.decode(coded["norm"]) / math.sqrt(self.dimensions)).unsqueeze(-1)

    def vector_bits(self, width: int, dtype: torch.dtype) -> float:
        return self.bits * width + HALF.bits


@register("turboquant", bits=(1, 2, 3, 4))
def build(spec: CodecSpec, geometry: Geometry) -> Codec:
    assert spec.bits is not None
    transform = Hadamard(geometry.head_dim)
    quantiser = Sphere(int(spec.bits), geometry.head_dim)
    return Codec(geometry.head_dim, transform, (Band(transform.rank, quantiser),), centred=False, fit_tokens=0)
