"""What codecs store: the names, dtypes and shapes of what they learn of a row, and of a page's record.

Found by coding a page of noise once for every codec, geometry and dtype of a process; a file that says otherwise does
not go with the codecs that are installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvcompress.codecs import SIDES, Coded, Geometry
from kvcompress.record import RecordLayout
from kvcompress.spec import CodecSpec
from kvcompress.store import PAGE

#: A dtype and a shape.
Shape = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Stored:
    """Of one side's codec: what it learns of a row, without the dimension of rows, and a page's parts [1, H, ...]."""

    fit: dict[str, Shape]
    page: Coded


@lru_cache(maxsize=256)
def stored(spec: CodecSpec, geometry: Geometry, dtype: torch.dtype) -> Stored:
    """What a codec stores of vectors of a dtype; raises ValueError where it does not support their size."""
    codec = spec.build(geometry)
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(1, geometry.heads, max(codec.fit_tokens, PAGE), geometry.head_dim, generator=noise)
    fit = codec.fit(x)
    page = codec.encode(x[:, :, :PAGE].to(dtype), fit)
    return Stored({name: shape_of(part) for name, part in fit.items()}, page)


def shape_of(part: Tensor) -> Shape:
    """The dtype, and the shape without the first dimension."""
    return part.dtype, tuple(part.shape[1:])


def record_of(key: Stored, value: Stored) -> RecordLayout:
    """The record of a page of keys and values."""
    sides = zip(SIDES, (key, value), strict=True)
    return RecordLayout.of({f"{side}.{name}": part for side, own in sides for name, part in own.page.items()})


def described(layout: RecordLayout) -> list[list[object]]:
    """A record's parts as JSON holds them: [name, dtype, shape] each."""
    return [[field.name, str(field.dtype).removeprefix("torch."), list(field.shape)] for field in layout.fields]
