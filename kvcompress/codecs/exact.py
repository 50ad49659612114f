"""`exact`: vectors as they come, in the model's dtype. The measure of everything else, and for layers to spare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codecs import Band, Codec, Coded, Geometry, register
from kvcompress.codecs.transforms import Identity
from kvcompress.spec import CodecSpec


@dataclass(frozen=True)
class Raw:
    """Stores the numbers themselves."""

    def encode(self, y: Tensor) -> Coded:
        return {"codes": y.contiguous()}

    def decode(self, coded: Coded, width: int) -> Tensor:
        return coded["codes"].float()

    def vector_bits(self, width: int, dtype: torch.dtype) -> float:
        return 8 * dtype.itemsize * width


@register("exact")
def build(spec: CodecSpec, geometry: Geometry) -> Codec:
    width = geometry.head_dim
    return Codec(width, Identity(width), (Band(width, Raw()),), centred=False, fit_tokens=0)
