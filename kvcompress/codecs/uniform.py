"""Asymmetric round-to-nearest, the quantiser of KIVI (arXiv 2402.02750) and KVarN (arXiv 2606.03458).

A group of numbers between `low` and `high` lies on 2^bits even levels, the ends included::

    x ~ zero + scale code,   zero = low,   scale = (high - low) / (2^bits - 1)

Both are stored in float16, magnitudes beyond its largest finite number as that number; codes are found with what is
stored, so rounding of the two moves the levels a little and adds no error of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codecs.scale import HALF, TINY

GRID_BITS = 2 * HALF.bits  # of a group's scale and zero


def grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale, zero), float16, of groups whose least and greatest numbers are given."""
    return HALF.encode((high - low) / (2**bits - 1)), HALF.encode(low)


def to_codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """uint8 codes of x, the nearest levels; `scale` and `zero` broadcast to it. What is not a number gets code 0."""
    steps = (x - zero.float()) / scale.float().clamp_min(TINY)
    return steps.nan_to_num(nan=0.0).round().clamp(0, 2**bits - 1).to(torch.uint8)


def to_values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """float32 levels that codes stand for; NaN throughout a group whose scale or zero is."""
    return codes * scale.float() + zero.float()
