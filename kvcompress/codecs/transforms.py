"""Fixed transforms: the identity and the Hadamard rotation for any even size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvcompress.codecs import Fit

SMALLEST, LARGEST = 8, 256


@dataclass(frozen=True)
class Identity:
    """Vectors as they are."""

    rank: int

    def fit(self, centred: Tensor, metric: Tensor | None) -> Fit:
        return {}

    def analysis(self, fit: Fit, device: torch.device) -> None:
        return None

    def synthesis(self, fit: Fit, device: torch.device) -> None:
        return None


@dataclass(frozen=True)
class Hadamard:
    """The orthogonal map (H (x) C) diag(s) for head_dim = 2^a m with m odd.

    H is the Hadamard matrix of size 2^a, C the DCT-II matrix of size m (nothing for powers of two), s the signs that
    the Legendre symbol modulo 257 gives, which keep a smooth vector from landing in one coefficient. Sizes that are no
    multiple of 8 get zero rows up to the next one, since codes are packed in eights; they are stored and counted.
    """

    head_dim: int

    def __post_init__(self) -> None:
        if self.head_dim % 2 or not SMALLEST <= self.head_dim <= LARGEST:
            raise ValueError(f"head_dim must be even and in {SMALLEST}..{LARGEST} for this codec, got {self.head_dim}")

    @property
    def rank(self) -> int:
        return -(-self.head_dim // 8) * 8

    def fit(self, centred: Tensor, metric: Tensor | None) -> Fit:
        return {}

    def analysis(self, fit: Fit, device: torch.device) -> Tensor:
        return hadamard_matrix(self.head_dim, device)

    def synthesis(self, fit: Fit, device: torch.device) -> Tensor:
        return hadamard_matrix(self.head_dim, device).mT


@lru_cache
@torch.inference_mode(False)  # kept for ever, so not to be inference tensors
def hadamard_matrix(size: int, device: torch.device) -> Tensor:
    """float32 [rank, size] with orthonormal columns."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size // odd:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix) / math.sqrt(2)
    matrix = torch.kron(matrix, _cosine_matrix(odd))
    signs = torch.tensor([1.0 if pow(i + 1, 128, 257) == 1 else -1.0 for i in range(size)], dtype=torch.float64)
    padding = torch.zeros(-size % 8, size, dtype=torch.float64)
    return torch.cat([matrix * signs, padding]).to(device, torch.float32)


def _cosine_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II, [size, size]."""
    steps = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (steps + 0.5) * steps.unsqueeze(1)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
