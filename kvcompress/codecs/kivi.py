"""`kivi2`, `kivi3`, `kivi4`, `kivi8`: keys per channel, values per token, in groups of 32 (arXiv 2402.02750).

KIVI: keys have channels with outliers, which a scale of their own for 32 tokens keeps from spoiling the others; values
have none, and with scales for 32 channels of a token their errors stay within it. Asymmetric round-to-nearest codes, a
scale and a zero of 16 bits each for 32 of them (one bit an element), no transform and no mean. The paper's setting is
2 bits, groups of 32 and 128 recent tokens exact, which here is `window`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress import packing
from kvcompress.codecs import Band, Codec, Coded, Geometry, register
from kvcompress.codecs.transforms import Identity
from kvcompress.codecs.uniform import GRID_BITS, grid, to_codes, to_values
from kvcompress.spec import CodecSpec

GROUP = 32  # tokens, or channels


@dataclass(frozen=True)
class PerChannel:
    """Every channel of GROUP tokens on a grid of its own: scale and zero [pages, H, tokens / GROUP, width]."""

    bits: int

    def encode(self, y: Tensor) -> Coded:
        """Raises ValueError for a number of tokens that is no multiple of GROUP."""
        if y.shape[2] % GROUP:
            raise ValueError(f"tokens coded together must be a multiple of {GROUP}, got {y.shape[2]}")
        groups = y.float().unflatten(2, (-1, GROUP))
        scale, zero = grid(groups.amin(dim=3), groups.amax(dim=3), self.bits)
        codes = to_codes(groups, scale.unsqueeze(3), zero.unsqueeze(3), self.bits).flatten(2, 3)
        return {"codes": packing.pack(codes, self.bits), "scale": scale, "zero": zero}

    def decode(self, coded: Coded, width: int) -> Tensor:
        tokens = coded["scale"].shape[2] * GROUP
        codes = packing.unpack(coded["codes"], self.bits, tokens, width).unflatten(2, (-1, GROUP))
        return to_values(codes, coded["scale"].unsqueeze(3), coded["zero"].unsqueeze(3)).flatten(2, 3)

    def vector_bits(self, width: int, dtype: torch.dtype) -> float:
        return self.bits * width + GRID_BITS * width / GROUP


@dataclass(frozen=True)
class PerToken:
    """Every GROUP channels of a token, the last ones fewer, on a grid of their own: [pages, H, tokens, groups]."""

    bits: int

    def encode(self, y: Tensor) -> Coded:
        y = y.float()
        parts = y.split(GROUP, dim=-1)
        low, high = (torch.stack([end(part, dim=-1) for part in parts], dim=-1) for end in (torch.amin, torch.amax))
        scale, zero = grid(low, high, self.bits)
        codes = to_codes(y, _spread(scale, y.shape[-1]), _spread(zero, y.shape[-1]), self.bits)
        return {"codes": packing.pack(codes, self.bits), "scale": scale, "zero": zero}

    def decode(self, coded: Coded, width: int) -> Tensor:
        codes = packing.unpack(coded["codes"], self.bits, coded["scale"].shape[2], width)
        return to_values(codes, _spread(coded["scale"], width), _spread(coded["zero"], width))

    def vector_bits(self, width: int, dtype: torch.dtype) -> float:
        return self.bits * width + GRID_BITS * -(-width // GROUP)


def _spread(groups: Tensor, width: int) -> Tensor:
    """[..., groups] to [..., width], each repeated for its channels."""
    return groups.index_select(-1, torch.arange(width, device=groups.device) // GROUP)


@register("kivi", bits=(2, 3, 4, 8))
def build(spec: CodecSpec, geometry: Geometry) -> Codec:
    assert spec.bits is not None
    width, bits = geometry.head_dim, int(spec.bits)
    if width % 8:
        raise ValueError(f"head_dim must be a multiple of 8 for kivi, whose codes are packed in eights, got {width}")
    quantiser = PerToken(bits) if geometry.side else PerChannel(bits)
    return Codec(
        width,
        Identity(width),
        (Band(width, quantiser),),
        centred=False,
        fit_tokens=0,
        page_wise=not geometry.side,
    )
