"""`lloyd1`..`lloyd8`: Hadamard rotation and the Lloyd-Max quantiser of the Gaussian (TurboQuant, arXiv 2504.19874).

A rotated vector's coordinates are close to Gaussian, so one codebook, optimal for that distribution, serves all of
them. Centred, with a least-squares gain a vector in 16 bits.

Up to five bits the levels lie on a byte grid, step (byte - offset), so that a kernel looks up bytes, as it does for the
trellis. That costs 0.001% of the distortion at 3 bits, 0.22% at 4 and 0.37% at 5 (`pytest tests/test_codecs.py -k
grid`). The levels of more bits lie too close together for bytes, and are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvcompress import packing
from kvcompress.codecs import Band, Codec, Coded, Geometry, register
from kvcompress.codecs.lookup import look_up
from kvcompress.codecs.scale import HALF, Gain, best_gain, normalise
from kvcompress.codecs.transforms import Hadamard
from kvcompress.spec import CodecSpec

ITERATIONS = 1000  # 8 bits then lie within 0.1% of the distortion after twenty times as many


@dataclass(frozen=True)
class Grid:
    """Levels step (byte - offset), ascending; first and last byte, second and last but one etc. add up to 2 offset."""

    bytes: tuple[int, ...]
    step: float

    @property
    def offset(self) -> float:
        return (self.bytes[0] + self.bytes[-1]) / 2


#: By bits: the grids of least squared error for the unit Gaussian among those with bytes below 128, which a kernel
#: turns into numbers by byte permutes (PRMT) alone: these fill what is above a byte with its sign, zero. Those are too
#: coarse for five bits, whose bytes add up to 255: an exclusive or with it makes the upper half of the lower one.
GRIDS = {
    1: Grid((0, 1), 1.5957691216057308),
    2: Grid((0, 7, 13, 20), 0.15104175806045533),
    3: Grid((0, 22, 38, 52, 65, 79, 95, 117), 0.03679643033590072),
    4: Grid((0, 15, 25, 33, 40, 46, 52, 58, 64, 70, 76, 82, 89, 97, 107, 122), 0.044803233952946116),
    5: Grid(
        (
            *(5, 26, 40, 51, 60, 68, 75, 82, 88, 94, 100, 105, 110, 115, 120, 125),
            *(130, 135, 140, 145, 150, 155, 161, 167, 173, 180, 187, 195, 204, 215, 229, 250),
        ),
        0.026541747905813776,
    ),
}


def grid(bits: int) -> Grid:
    """The byte grid that the codes of `bits` bits stand for; raises ValueError where they have none."""
    if bits not in GRIDS:
        raise ValueError(f"levels of {', '.join(map(str, GRIDS))} bits lie on a byte grid, those of {bits} do not")
    return GRIDS[bits]


@lru_cache
@torch.inference_mode(False)  # kept for ever, so not to be inference tensors
def codebook(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(levels [2^bits], borders [2^bits - 1]) of `lloyd`, float32, ascending: of the grid, exact beyond five bits."""
    if bits not in GRIDS:
        return exact_codebook(bits, device)
    own = grid(bits)
    levels = (torch.tensor(own.bytes, dtype=torch.float64) - own.offset) * own.step
    borders = (levels[1:] + levels[:-1]) / 2
    return levels.to(device, torch.float32), borders.to(device, torch.float32)


@lru_cache
@torch.inference_mode(False)
def exact_codebook(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(levels [2^bits], borders [2^bits - 1]) of least mean squared error for the unit Gaussian, float32, ascending.

    Lloyd's iteration in float64: borders halfway between levels, levels at the mean of their cell, begun from the
    quantiles of the density's cube root, where the levels lie when they are many (Panter and Dite, 1951).
    """
    count = 2**bits
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = math.sqrt(3) * math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    for _ in range(ITERATIONS):
        borders = (levels[1:] + levels[:-1]) / 2
        edges = torch.cat([borders.new_tensor([-math.inf]), borders, borders.new_tensor([math.inf])])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass = (torch.erf(edges / math.sqrt(2)) / 2).diff()
        updated = -density.diff() / mass
        if (updated - levels).abs().max() < 1e-10:
            break
        levels = updated
    return levels.to(device, torch.float32), borders.to(device, torch.float32)


@dataclass(frozen=True)
class LloydMax:
    """Each coordinate to the nearest of 2^bits levels, each vector with its gain."""

    bits: int
    gain: Gain = HALF

    def encode(self, y: Tensor) -> Coded:
        levels, borders = codebook(self.bits, y.device)
        codes = torch.bucketize(normalise(y), borders)
        return {"codes": packing.pack(codes, self.bits), "gain": self.gain.encode(best_gain(y, look_up(levels, codes)))}

    def decode(self, coded: Coded, width: int) -> Tensor:
        levels, _ = codebook(self.bits, coded["codes"].device)
        codes = packing.unpack(coded["codes"], self.bits, coded["gain"].shape[-1], width)
        return look_up(levels, codes) * self.gain.decode(coded["gain"]).unsqueeze(-1)

    def vector_bits(self, width: int, dtype: torch.dtype) -> float:
        return self.bits * width + self.gain.bits


@register("lloyd", bits=tuple(range(1, 9)))
def build(spec: CodecSpec, geometry: Geometry) -> Codec:
    assert spec.bits is not None
    transform = Hadamard(geometry.head_dim)
    return Codec(geometry.head_dim, transform, (Band(transform.rank, LloydMax(int(spec.bits))),))
