"""The scale of a coded vector: the gain that makes its reconstruction's squared error least."""

from __future__ import annotations

import torch
from torch import Tensor

GAIN_BITS = 16
TINY = 1e-30


def normalise(y: Tensor) -> Tensor:
    """Vectors [..., width] brought to a root-mean-square of one; zero stays zero."""
    rms = y.square().mean(dim=-1, keepdim=True).sqrt()
    return y / rms.clamp_min(TINY)


def best_gain(y: Tensor, shape: Tensor) -> Tensor:
    """float16 [...]: g = <y, s> / <s, s>, the least-squares multiple of the reconstruction's shape s."""
    gain = (y * shape).sum(dim=-1) / shape.square().sum(dim=-1).clamp_min(TINY)
    largest = torch.finfo(torch.float16).max
    return gain.clamp(-largest, largest).half()
