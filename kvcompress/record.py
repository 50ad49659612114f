"""The record of a page: its coded parts in one run of bytes, which one address names and one table describes.

part      at `offset`, a multiple of 16, contiguous [H, ...], dtypes as they come
page      `page_bytes`, a multiple of 16: what follows a part up to the next one's offset is zero
slab      uint8 [n, page_bytes]; parts are handed out as strided views of it, [n, H, ...]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codecs import Coded

ALIGNMENT = 16  # bytes: the widest load of a lane


@dataclass(frozen=True)
class Field:
    """Where one part lies in a record: its first byte, and the dtype and shape [H, ...] of what it holds."""

    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes, without what aligns the next part."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class RecordLayout:
    """The parts of a page in their order, and the bytes of the whole."""

    fields: tuple[Field, ...]
    page_bytes: int

    @classmethod
    def of(cls, coded: Coded) -> RecordLayout:
        """The layout of pages with such parts, [n, H, ...] each, put in the order of their names."""
        fields: list[Field] = []
        stop = 0
        for name, part in sorted(coded.items()):
            fields.append(Field(name, stop, part.dtype, tuple(part.shape[1:])))
            stop = -(-(stop + fields[-1].size) // ALIGNMENT) * ALIGNMENT
        return cls(tuple(fields), stop)

    def records(self, coded: Coded) -> Tensor:
        """Pages as uint8 [n, page_bytes]; raises ValueError where their parts are not those of this layout."""
        given = RecordLayout.of(coded)
        if given != self:
            raise ValueError(f"pages hold {_said(self)}; got {_said(given)}")
        first = next(iter(coded.values()))
        records = torch.zeros(len(first), self.page_bytes, dtype=torch.uint8, device=first.device)
        for name, view in self.views(records).items():
            view.copy_(coded[name])
        return records

    def views(self, records: Tensor) -> Coded:
        """The parts [n, H, ...] of records [n, page_bytes], views of them."""
        return {
            field.name: records[:, field.offset : field.offset + field.size].view(field.dtype).unflatten(1, field.shape)
            for field in self.fields
        }

    def shares(self) -> dict[str, int]:
        """Bytes of a record by part, what aligns the next one counted with the part before it."""
        ends = [field.offset for field in self.fields[1:]] + [self.page_bytes]
        return {field.name: end - field.offset for field, end in zip(self.fields, ends, strict=True)}


def _said(layout: RecordLayout) -> str:
    return ", ".join(f"{field.name} {list(field.shape)} of {field.dtype}" for field in layout.fields) or "nothing"
