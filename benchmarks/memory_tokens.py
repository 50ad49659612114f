"""Keys and values like those of big models, chunk by chunk, so that a million tokens never stand side by side.

Tokens are drawn as `benchmarks.spectra` says: a mean of a few strong channels, a basis that leans on the channels, the
eigenvalues of real heads and lengths of Student's t distribution; keys are then rotated by the model's own RoPE. Where
the file of real spectra is not there the eigenvalues are 1 / rank with a first one of 8, which
tests/test_memory_benchmark.py shows to make no difference to what is stored: codes have the size that their codec says,
whatever they stand for.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import spectra
from benchmarks.memory_geometries import Geometry
from kvcompress.rope import Rope


class Tokens:
    """One layer's keys and values, [1, H, n, D] in bfloat16 on a device.

    figures: the file of spectra, None for none. Two layers' tokens of one seed are the same but for their RoPE.
    """

    def __init__(self, geometry: Geometry, layer: int, figures: Path | None, seed: int, device: torch.device):
        generator = torch.Generator().manual_seed(seed)
        heads = eigenvalues(figures, geometry.heads)
        self._sides = [
            _side([pair[side] for pair in heads], geometry.width, share, generator)
            for side, share in enumerate(spectra.MEAN_SHARE)
        ]
        self._sides = [(mean.to(device), root.to(device)) for mean, root in self._sides]
        self._rope = Rope.of(geometry.config, geometry.width, layer)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._place = 0

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """The next `count` tokens."""
        key, value = (self._draw(count, *side) for side in self._sides)
        if self._rope is not None:
            positions = torch.arange(self._place, self._place + count, device=key.device).unsqueeze(0)
            key = self._rope.apply(key, positions)
        self._place += count
        return key.bfloat16(), value.bfloat16()

    def _draw(self, count: int, mean: Tensor, root: Tensor) -> Tensor:
        """float32 [1, H, count, D] of a side: mean [H, 1, D], root [H, D, D] with k = mean + s * root z."""
        heads, _, width = mean.shape
        device, freedom = mean.device, spectra.FREEDOM
        z = torch.randn(heads, count, width, generator=self._generator, device=device)
        chi = (
            torch.randn(1, count, freedom, generator=self._generator, device=device).square().sum(dim=-1, keepdim=True)
        )
        return (mean + (z @ root.mT) * ((freedom - 2) / chi).sqrt()).unsqueeze(0)


def eigenvalues(figures: Path | None, heads: int) -> list[tuple[Tensor, Tensor]]:
    """The largest 32 of keys and of values for so many heads: those of the file in turn, or the module's law."""
    if figures is None:
        law = 1 / torch.arange(1, 33, dtype=torch.float32)
        law[0] = 8
        known = [(law, law)]
    else:
        _, known = spectra.spectra(figures)
    return [known[head % len(known)] for head in range(heads)]


def _side(tops: list[Tensor], width: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean [H, 1, D] and root [H, D, D] of one side."""
    means, roots = [], []
    for top in tops:
        values, basis = spectra.extended(top, max(width, len(top)))[:width], spectra.leaning_basis(width, generator)
        means.append(basis[:, 0] * math.sqrt(share * float(values[0])))
        variances = torch.cat([values[:1] * (1 - share), values[1:]])
        roots.append(basis * variances.sqrt())
    return torch.stack(means).unsqueeze(1), torch.stack(roots)
