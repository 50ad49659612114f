"""`nf4`, `bnb8`: blocks of numbers over their largest one, by bitsandbytes (arXiv 2305.14314, arXiv 2110.02861).

`nf4`: 4-bit codes, the quantiles of a Gaussian, in blocks of 64 (QLoRA); 4.5 bits with the block's float32 scale.
`bnb8`: 8-bit codes of a dynamic tree in blocks of 256; 8.125 bits. No rotation, no mean; the package is optional.

A block is of consecutive numbers of a head: tokens share one where head_dim is no multiple of its size. Numbers go to
bitsandbytes flat, since its 4-bit CPU kernel misreads rows that are no multiple of the block (version 0.50.2).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.codecs import Band, Codec, Coded, Geometry, register
from kvcompress.codecs.transforms import Identity
from kvcompress.spec import CodecSpec

TOGETHER = 64  # tokens: those of a page fill whole blocks for a head_dim that is accepted
LIMIT = 1 << 24  # numbers given to bitsandbytes at a time: bounds what it allocates


@dataclass(frozen=True)
class Blocks:
    """Codes of `bits` bits, 4 (NF4, two to a byte) or 8 (the signed dynamic map), and a float32 scale for each block.

    The scale is the largest magnitude of the block's `size` numbers. Parts: codes [pages, H, bytes] and absmax
    [pages, H, blocks]. `encode` raises ValueError where a head's vectors do not fill blocks.
    """

    bits: int
    size: int

    def encode(self, y: Tensor) -> Coded:
        pages, heads, tokens, width = y.shape
        if tokens * width % self.size:
            raise ValueError(f"{tokens} vectors of {width} numbers do not fill blocks of {self.size}")
        blocks = y.float().reshape(-1, self.size)
        pieces = [self._quantise(piece.flatten()) for piece in blocks.split(LIMIT // self.size)]
        codes, scales = (torch.cat(part) for part in zip(*pieces, strict=True))
        scales = scales.masked_fill(blocks.isnan().any(dim=-1), torch.nan)  # the 8-bit kernel takes no notice of one
        return {"codes": codes.view(pages, heads, -1), "absmax": scales.view(pages, heads, -1)}

    def decode(self, coded: Coded, width: int) -> Tensor:
        codes, scales = coded["codes"].flatten(), coded["absmax"].flatten()
        limit = LIMIT // self.size
        pairs = zip(codes.split(limit * self.size * self.bits // 8), scales.split(limit), strict=True)
        return torch.cat([self._dequantise(*pair) for pair in pairs]).view(*coded["codes"].shape[:2], -1, width)

    def vector_bits(self, width: int, dtype: torch.dtype) -> float:
        return self.bits * width + 32 * width / self.size

    def _quantise(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 [bytes] and scales float32 [blocks] of numbers [n]."""
        if self.bits == 4:
            codes, state = _functional().quantize_4bit(numbers, blocksize=self.size, quant_type="nf4")
        else:
            codes, state = _functional().quantize_blockwise(numbers, blocksize=self.size)
        return codes.flatten(), state.absmax

    def _dequantise(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The inverse of `_quantise`."""
        library = _functional()
        if self.bits == 8:
            return library.dequantize_blockwise(codes, absmax=scales, blocksize=self.size)
        shape = torch.Size([len(scales) * self.size])
        state = library.QuantState(scales, shape, None, self.size, "nf4", torch.float32)
        return library.dequantize_4bit(codes.unsqueeze(1), state).flatten()


def _functional() -> Any:
    """bitsandbytes' functions, imported when first used: that takes seconds."""
    import bitsandbytes.functional

    return bitsandbytes.functional


def _build(spec: CodecSpec, geometry: Geometry, blocks: Blocks) -> Codec:
    width, size = geometry.head_dim, blocks.size
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"the codec {spec} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if TOGETHER * width % size:
        raise ValueError(
            f"head_dim must be a multiple of {size // TOGETHER} for {spec}, so that {TOGETHER} tokens fill blocks of "
            f"{size} numbers; got {width}"
        )
    bands = (Band(width, blocks),)
    return Codec(width, Identity(width), bands, centred=False, fit_tokens=0, page_wise=width % size != 0)


@register("nf4")
def build_normal_float(spec: CodecSpec, geometry: Geometry) -> Codec:
    return _build(spec, geometry, Blocks(4, 64))


@register("bnb8")
def build_blockwise(spec: CodecSpec, geometry: Geometry) -> Codec:
    return _build(spec, geometry, Blocks(8, 256))
