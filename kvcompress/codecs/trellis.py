"""`trellis2`, `trellis3`, `trellis4`: Hadamard rotation and an additive trellis code.

A vector's codes form a circular bit stream, `bits` bits an element. Element t is decoded from the last nine bits of the
stream up to and including its own, a window shared out to three 3-bit fields, each with a table of eight bytes whose
sums stay below 128 (so that a kernel adds and widens them four at a time)::

    x_t = gain step (A[f0] + B[f1] + C[f2] - offset)             (3 bits: f0, f1, f2 = c_t, c_(t-1), c_(t-2))

The fields are the window's bits 0-2, 3-5, 6-8, the newest being bit 0; with four bits they are 1-3, 5-7 and (0, 4, 8),
which leaves every code one field of its own.

so neighbours share bits and the encoder picks the best of all streams (trellis-coded quantisation; QTIP, arXiv
2406.11235, uses free tables for weights). Decoding needs no recursion and three 8-entry table look-ups. The stream
bites its tail: the elements before the first are the last ones, so no start state is stored.

The encoder is Viterbi's algorithm in integers: exact, and the same on every device and for every batch size. The tables
are those of `trellis_tables.json`, found by `python -m benchmarks.trellis_search`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from kvcompress import packing
from kvcompress.codecs import Band, Codec, Coded, Geometry, register
from kvcompress.codecs.lookup import look_up
from kvcompress.codecs.scale import HALF, Gain, best_gain, normalise
from kvcompress.codecs.transforms import Hadamard
from kvcompress.spec import CodecSpec

MEMORY = 9  # bits of the stream that an element is decoded from
FRACTION = 4  # the encoder's resolution: parts of a table unit
SEAM = 64  # bits of the stream on either side of the vector's end that decide where it bites its tail
BLOCK = 2048  # vectors encoded at a time: bounds the workspace to 4 MiB and a byte for every state and element
FAR = 1 << 29  # the cost of a state that is not allowed


@dataclass(frozen=True)
class Table:
    """values: float32 [512], the unit-Gaussian value of a nine-bit window; levels: int32 [512], the encoder's."""

    values: Tensor
    levels: Tensor
    step: float


def fields(windows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The three fields, integers below eight, of nine-bit windows of codes of `bits` bits."""
    if bits == 4:
        return windows >> 1 & 7, windows >> 5 & 7, windows & 1 | windows >> 3 & 2 | windows >> 6 & 4
    return windows & 7, windows >> 3 & 7, windows >> 6 & 7


def additive_sums(tables: Tensor, bits: int) -> Tensor:
    """[512]: A[f0] + B[f1] + C[f2] of all windows, from tables [3, 8]."""
    found = fields(torch.arange(2**MEMORY, device=tables.device), bits)
    return torch.stack([table[field] for table, field in zip(tables, found, strict=True)]).sum(dim=0)


@lru_cache
def shipped(bits: int) -> dict[str, Any]:
    """`tables` (three of eight bytes), `step` and `offset` of the codes of `bits` bits."""
    text = resources.files("kvcompress.codecs").joinpath("trellis_tables.json").read_text()
    own: dict[str, Any] = json.loads(text)[str(bits)]
    return own


@lru_cache
@torch.inference_mode(False)  # kept for ever, so not to be inference tensors
def shipped_table(bits: int, device: torch.device) -> Table:
    content = shipped(bits)
    sums = additive_sums(torch.tensor(content["tables"], dtype=torch.float64), bits) - content["offset"]
    values = (sums * content["step"]).to(device, torch.float32)
    return Table(values, (sums * FRACTION).round().to(device, torch.int32), content["step"])


def windows(codes: Tensor, bits: int) -> Tensor:
    """The nine-bit window of every element of circular streams: codes [..., n], n >= 8, to int16 [..., n]."""
    past = -(-MEMORY // bits) - 1
    codes, length = codes.to(torch.int16), codes.shape[-1]
    stream = torch.cat([codes[..., length - past :], codes], dim=-1)
    window = codes.clone()
    for back in range(1, past + 1):
        window |= stream[..., past - back : past - back + length] << (bits * back)
    return window & (2**MEMORY - 1)


def viterbi(targets: Tensor, levels: Tensor, bits: int, seam: Tensor | None = None) -> Tensor:
    """Streams of least squared error: targets int32 [n, vectors] in the units of levels [512].

    Returns the states, the last 9 - bits bits of the stream, after every element: int64 [n, vectors]; an element's code
    is its state's lowest bits. `seam` [vectors], where given, is the state both before the first and after the last.
    A candidate's cost and the oldest bits that it drops share an integer, so one minimum yields both.
    """
    length, count = targets.shape
    branches, states = 2**bits, 2 ** (MEMORY - bits)
    oldest = torch.arange(branches, dtype=torch.int32, device=targets.device).repeat_interleave(states)
    constant = (levels.square() * branches + oldest).unsqueeze(1)  # of (x - v)^2 = x^2 + v^2 - 2 x v, x^2 is left out
    slope = (-2 * branches * levels).unsqueeze(1)
    cost = torch.zeros(states, count, dtype=torch.int32, device=targets.device)
    if seam is not None:
        cost.fill_(FAR).scatter_(0, seam.unsqueeze(0), 0)
    work = torch.empty(2**MEMORY, count, dtype=torch.int32, device=targets.device)
    best = torch.empty_like(cost)
    dropped = torch.empty(length, states, count, dtype=torch.uint8, device=targets.device)
    for t in range(length):
        torch.mul(slope, targets[t], out=work).add_(constant)
        work.view(states, branches, count).add_(cost.unsqueeze(1))  # window = old state, new code
        torch.amin(work.view(branches, states, count), dim=0, out=best)  # window = dropped bits, new state
        dropped[t] = best & (branches - 1)
        torch.bitwise_and(best, -branches, out=cost)
    return _trace(dropped, cost.argmin(dim=0) if seam is None else seam, bits)


def _trace(dropped: Tensor, state: Tensor, bits: int) -> Tensor:
    """All states, from the last one [vectors] back along the dropped bits [n, states, vectors]."""
    length, _, count = dropped.shape
    path = torch.empty(length, count, dtype=torch.int64, device=dropped.device)
    for t in range(length - 1, -1, -1):
        path[t] = state
        window = dropped[t].gather(0, state.unsqueeze(0)).squeeze(0).long() << (MEMORY - bits) | state
        state = window >> bits
    return path


def encode(u: Tensor, levels: Tensor, step: float, bits: int) -> Tensor:
    """Codes uint8 [vectors, n] of unit-variance vectors [vectors, n], BLOCK vectors at a time."""
    codes = [_encode_block(block, levels, step, bits) for block in u.split(BLOCK)]
    return torch.cat(codes) if codes else u.to(torch.uint8)


def _encode_block(u: Tensor, levels: Tensor, step: float, bits: int) -> Tensor:
    """Where the stream bites its tail is found on the elements around the end, then the whole is coded with it."""
    length = u.shape[-1]
    targets = torch.nan_to_num(u * (FRACTION / step)).round().to(torch.int32).mT.contiguous()
    reach = min(SEAM // bits, length)
    around = torch.arange(-reach, reach, device=u.device) % length
    seam = viterbi(targets[around], levels, bits)[reach - 1]
    path = viterbi(targets, levels, bits, seam)
    return (path & (2**bits - 1)).to(torch.uint8).mT


@dataclass(frozen=True)
class Trellis:
    """Vectors as circular streams of `bits` bits an element, each with its gain."""

    bits: int
    gain: Gain = HALF

    def encode(self, y: Tensor) -> Coded:
        table = shipped_table(self.bits, y.device)
        codes = encode(normalise(y).flatten(0, -2), table.levels, table.step, self.bits).view(y.shape)
        shape = look_up(table.values, windows(codes, self.bits))
        return {"codes": packing.pack(codes, self.bits), "gain": self.gain.encode(best_gain(y, shape))}

    def decode(self, coded: Coded, width: int) -> Tensor:
        codes = packing.unpack(coded["codes"], self.bits, coded["gain"].shape[-1], width)
        values = look_up(shipped_table(self.bits, codes.device).values, windows(codes, self.bits))
        return values * self.gain.decode(coded["gain"]).unsqueeze(-1)

    def vector_bits(self, width: int, dtype: torch.dtype) -> float:
        return self.bits * width + self.gain.bits


@register("trellis", bits=(1, 2, 3, 4))
def build(spec: CodecSpec, geometry: Geometry) -> Codec:
    assert spec.bits is not None
    transform = Hadamard(geometry.head_dim)
    return Codec(geometry.head_dim, transform, (Band(transform.rank, Trellis(int(spec.bits))),))
