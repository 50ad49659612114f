"""`fp8`: a plain cast to float8 e4m3, as inference servers do it: no scale, no rotation, saturating at +-448."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codecs import Band, Codec, Coded, Geometry, register
from kvcompress.codecs.transforms import Identity
from kvcompress.spec import CodecSpec

FORMAT = torch.float8_e4m3fn


@dataclass(frozen=True)
class Cast:
    """Rounds to the nearest float8; magnitudes beyond the largest finite one become it."""

    def encode(self, y: Tensor) -> Coded:
        largest = torch.finfo(FORMAT).max
        return {"codes": y.clamp(-largest, largest).to(FORMAT).view(torch.uint8).contiguous()}

    def decode(self, coded: Coded, width: int) -> Tensor:
        return coded["codes"].view(FORMAT).float()

    def vector_bits(self, width: int, dtype: torch.dtype) -> float:
        return 8 * width


@register("fp8")
def build(spec: CodecSpec, geometry: Geometry) -> Codec:
    width = geometry.head_dim
    return Codec(width, Identity(width), (Band(width, Cast()),), centred=False, fit_tokens=0)
