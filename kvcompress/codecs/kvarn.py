"""`kvarn2`..`kvarn4`: Hadamard rotation, scales that even out tokens and channels, round-to-nearest codes.

KVarN (arXiv 2606.03458): within a tile of tokens the deviations of all channels and of all tokens are divided out in
turns, as in Sinkhorn's iteration, until both are alike; then asymmetric round-to-nearest, for keys per channel, for
values per token. The scale and the zero of a line of that grid take in the line's own deviation, so a tile stores two
numbers of 16 bits for each channel and one for each token (keys), or one and two (values). The paper's K4V2 is
`kvarn:k4v2`.

Tiles are of 64 tokens, a page (the paper's are of 128; its authors' code offers 64 as well, for finer scales at more
bits). Their code keeps the logarithms of the scales above -0.3, so that it leaves tiles of small numbers as they are;
here tiles of every magnitude are evened out alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress import packing
from kvcompress.codecs import Band, Codec, Coded, Geometry, register
from kvcompress.codecs.scale import HALF, normalise
from kvcompress.codecs.transforms import Hadamard
from kvcompress.codecs.uniform import GRID_BITS, grid, to_codes, to_values
from kvcompress.spec import CodecSpec

TILE = 64  # tokens
ITERATIONS = 16  # the authors'
FLOOR = 1e-3  # the least deviation of a line that counts, where the tile's root-mean-square is one
LIMIT = 8.0  # of the logarithms of scales: e^-8 to e^8 are normal numbers of float16


def even_out(tile: Tensor) -> Tensor:
    """Scales of columns, float32 [..., columns], that even out a tile [..., rows, columns] together with rows' scales.

    Deviations of columns and of rows, in turns, are added to logarithms of scales; of all rounds that one counts after
    which the largest and the smallest deviation differ least on both axes. A common factor is left to the rows.
    """
    tile = normalise(tile.flatten(-2)).view(tile.shape)
    column, row = torch.zeros_like(tile[..., 0, :]), torch.zeros_like(tile[..., 0])
    columns, rows = _deviation(tile.mT), _deviation(tile)
    best, least = column, _spread(columns) + _spread(rows)
    for _ in range(ITERATIONS):
        column = (column + columns.log()).clamp(-LIMIT, LIMIT)
        row = (row + _deviation(_scaled(tile, column, row)).log()).clamp(-LIMIT, LIMIT)
        even = _scaled(tile, column, row)
        columns, rows = _deviation(even.mT), _deviation(even)
        unevenness = _spread(columns) + _spread(rows)
        better = unevenness <= least
        best, least = torch.where(better.unsqueeze(-1), column, best), torch.where(better, unevenness, least)
    return (best - best.mean(dim=-1, keepdim=True)).clamp(-LIMIT, LIMIT).exp()


def _scaled(tile: Tensor, column: Tensor, row: Tensor) -> Tensor:
    return tile * ((-column).exp().unsqueeze(-2) * (-row).exp().unsqueeze(-1))


def _deviation(lines: Tensor) -> Tensor:
    """Standard deviation along the last dimension; made contiguous, so that its sums do not depend on other tiles."""
    lines = lines.contiguous()
    return (lines - lines.mean(dim=-1, keepdim=True)).square().mean(dim=-1).sqrt().clamp_min(FLOOR)


def _spread(deviations: Tensor) -> Tensor:
    """The largest over the smallest."""
    return deviations.amax(dim=-1) / deviations.amin(dim=-1)


@dataclass(frozen=True)
class EvenTiles:
    """Tiles of TILE tokens whose lines, channels (keys) or tokens (values), are coded on grids of their own.

    Parts: codes; `scale` and `zero` [pages, H, tiles, lines]; `across`, the scales of the other axis, likewise.
    """

    bits: int
    per_channel: bool

    def encode(self, y: Tensor) -> Coded:
        """Raises ValueError for a number of tokens that is no multiple of TILE."""
        if y.shape[2] % TILE:
            raise ValueError(f"tokens coded together must be a multiple of {TILE}, got {y.shape[2]}")
        tiles = self._turn(y.float().unflatten(2, (-1, TILE)))
        across = HALF.encode(even_out(tiles))
        even = tiles / across.float().unsqueeze(-2)
        scale, zero = grid(even.amin(dim=-1), even.amax(dim=-1), self.bits)
        codes = to_codes(even, scale.unsqueeze(-1), zero.unsqueeze(-1), self.bits)
        packed = packing.pack(self._turn(codes).flatten(2, 3), self.bits)
        return {"codes": packed, "scale": scale, "zero": zero, "across": across}

    def decode(self, coded: Coded, width: int) -> Tensor:
        tokens = coded["scale"].shape[2] * TILE
        codes = self._turn(packing.unpack(coded["codes"], self.bits, tokens, width).unflatten(2, (-1, TILE)))
        even = to_values(codes, coded["scale"].unsqueeze(-1), coded["zero"].unsqueeze(-1))
        return self._turn(even * coded["across"].float().unsqueeze(-2)).flatten(2, 3)

    def vector_bits(self, width: int, dtype: torch.dtype) -> float:
        channel, token = (GRID_BITS, HALF.bits) if self.per_channel else (HALF.bits, GRID_BITS)
        return self.bits * width + channel * width / TILE + token

    def _turn(self, tiles: Tensor) -> Tensor:
        """[..., tokens, channels] to [..., lines, the other axis], and back."""
        return tiles.mT if self.per_channel else tiles


@register("kvarn", bits=(2, 3, 4))
def build(spec: CodecSpec, geometry: Geometry) -> Codec:
    assert spec.bits is not None
    transform = Hadamard(geometry.head_dim)
    quantiser = EvenTiles(int(spec.bits), per_channel=not geometry.side)
    return Codec(
        geometry.head_dim,
        transform,
        (Band(transform.rank, quantiser),),
        centred=False,
        fit_tokens=0,
        page_wise=True,
    )
