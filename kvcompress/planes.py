"""A rotary position embedding as what it is: rotations of planes, by angles that grow with the position.

Kernels turn queries and keys themselves and need to know how; models keep that in code, in more than one convention
(halves, neighbours, part of the dimensions, scaled). So the planes are read off what the code does to unit vectors,
and the angles are the products that it forms, position times frequency in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

PROBES = (1, 77, 1000, 20011)  # positions


class Turning(Protocol):
    """What is probed: the rotation of keys float32 [B, H, T, D] to positions int64 [B, T]."""

    def apply(self, key: Tensor, positions: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Planes:
    """D / 2 planes: dimensions order[j] and order[D / 2 + j] turn by `position frequencies[j]` and grow `amplitudes[j]`
    times. order: int32 [D]; frequencies, amplitudes: float32 [D / 2]. Dimensions that do not turn have frequency zero.
    """

    order: Tensor
    frequencies: Tensor
    amplitudes: Tensor

    def apply(self, key: Tensor, positions: Tensor) -> Tensor:
        """Rotate keys float32 [B, H, T, D] to positions int64 [B, T]."""
        angles = positions.float()[:, None, :, None] * self.frequencies
        cos, sin = angles.cos() * self.amplitudes, angles.sin() * self.amplitudes
        x, y = key[..., self.order.long()].chunk(2, dim=-1)
        turned = torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)
        result = torch.empty_like(key)
        result[..., self.order.long()] = turned
        return result

    def to(self, device: torch.device) -> Planes:
        return Planes(*(x.to(device) for x in (self.order, self.frequencies, self.amplitudes)))


def planes_of(rotation: Turning, known: Tensor, width: int) -> Planes | None:
    """The planes of a rotation of `width` dimensions; None where it is no such thing.

    known: the frequencies of its module, float32, among which every plane's is found.
    """
    if width % 2:
        return None
    unit = torch.eye(width).view(1, 1, width, width)
    rows = rotation.apply(unit, torch.ones(1, width, dtype=torch.int64))[0, 0]  # row i: where unit vector i goes
    order, frequencies, amplitudes = [], [], []
    still = []
    for i in range(width):
        others = [j for j in rows[i].nonzero().flatten().tolist() if j != i]
        if not others:
            still.append(i)
        elif len(others) == 1 and rows[i, others[0]] > 0:  # i is its plane's first dimension
            angle = torch.atan2(rows[i, others[0]], rows[i, i])
            order.append((i, others[0]))
            frequencies.append(known[(known - angle).abs().argmin()])
            amplitudes.append(torch.hypot(rows[i, i], rows[i, others[0]]))
    order += zip(still[::2], still[1::2], strict=False)
    grown = [rows[i, i] for i in still[::2]]
    found = Planes(
        torch.tensor([first for first, _ in order] + [second for _, second in order], dtype=torch.int32),
        torch.stack(frequencies + [torch.zeros(()) for _ in grown]) if order else torch.zeros(0),
        torch.stack(amplitudes + grown) if order else torch.zeros(0),
    )
    return found if len(found.order) == width and _agree(found, rotation, width) else None


def _agree(found: Planes, rotation: Turning, width: int) -> bool:
    if sorted(found.order.tolist()) != list(range(width)) or len(found.frequencies) != width // 2:
        return False
    key = torch.randn(1, 1, len(PROBES), width, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([PROBES])
    return torch.allclose(found.apply(key, positions), rotation.apply(key, positions), atol=1e-4)
