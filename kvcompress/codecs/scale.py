"""The scale of a coded vector: the gain that makes its reconstruction's squared error least, and how it is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TINY = 1e-30
NAN_CODE = 255


def normalise(y: Tensor) -> Tensor:
    """Vectors [..., width] brought to a root-mean-square of one; zero stays zero."""
    rms = y.square().mean(dim=-1, keepdim=True).sqrt()
    return y / rms.clamp_min(TINY)


def best_gain(y: Tensor, shape: Tensor) -> Tensor:
    """float32 [...]: g = <y, s> / <s, s>, the least-squares multiple of the reconstruction's shape s."""
    return (y * shape).sum(dim=-1) / shape.square().sum(dim=-1).clamp_min(TINY)


class Gain(Protocol):
    """How gains are stored."""

    @property
    def bits(self) -> int: ...

    def encode(self, gain: Tensor) -> Tensor:
        """What to store of gains float32 [...]."""

    def decode(self, stored: Tensor) -> Tensor:
        """float32 [...]."""


@dataclass(frozen=True)
class HalfGain:
    """float16, for vectors of any scale; magnitudes beyond the largest finite one become it."""

    bits: int = 16

    def encode(self, gain: Tensor) -> Tensor:
        largest = torch.finfo(torch.float16).max
        return gain.clamp(-largest, largest).half()

    def decode(self, stored: Tensor) -> Tensor:
        return stored.float()


@dataclass(frozen=True)
class LogGain:
    """One byte on a logarithmic scale, for vectors whose usual scale is one: 2^((code - 128) / 16).

    So gains lie between 2^-8 and 2^7.9, each within 2.2% of its own; 0 is zero (or a negative gain), 255 not a number.
    """

    bits: int = 8

    def encode(self, gain: Tensor) -> Tensor:
        code = (16 * gain.clamp_min(TINY).log2() + 128).round().clamp(1, NAN_CODE - 1)
        code = code.masked_fill(gain < 2.0**-9, 0).masked_fill(gain.isnan(), NAN_CODE)
        return code.to(torch.uint8)

    def decode(self, stored: Tensor) -> Tensor:
        gain = torch.exp2((stored.float() - 128) / 16)
        return gain.masked_fill(stored == 0, 0.0).masked_fill(stored == NAN_CODE, math.nan)


HALF, LOG = HalfGain(), LogGain()
