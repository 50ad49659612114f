"""Paged storage of codes: immutable pages in slabs, and the tables that say which pages make up a row.

A page holds PAGE tokens of one layer: the keys' and the values' coded parts of all KV heads. It is written once and
never changed, so rows share pages freely (beams, common prefixes): reordering a batch moves table rows, not bytes.
Every write allocates a slab of just the pages it needs, so growth copies nothing; pages that no row names any longer
are found when the next ones are written, and used again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvcompress.codecs import Coded

PAGE = 64  # tokens


class PagePool:
    """Slabs of pages; a page's id is its place in the order of allocation."""

    def __init__(self) -> None:
        self.slabs: list[Coded] = []
        self._slab_of = torch.empty(0, dtype=torch.int64)
        self._slot_of = torch.empty(0, dtype=torch.int64)
        self._free: list[int] = []

    def write(self, coded: Coded) -> Tensor:
        """Store pages, parts [n, H, PAGE, ...], in free places first; returns their ids, int32 [n] on the CPU."""
        count = len(next(iter(coded.values())))
        reused = self._free[:count]
        del self._free[:count]
        with torch.inference_mode():  # a slab may have been made in it, and could not be written to outside
            for index, page in enumerate(reused):
                slab, slot = self.slabs[self._slab_of[page]], self._slot_of[page]
                for name, part in coded.items():
                    slab[name][slot] = part[index]
        fresh = count - len(reused)
        first = len(self._slab_of)
        if fresh:
            own = (lambda part: part[-fresh:].clone()) if reused else (lambda part: part.contiguous())
            self._slab_of = torch.cat([self._slab_of, torch.full((fresh,), len(self.slabs))])
            self._slot_of = torch.cat([self._slot_of, torch.arange(fresh)])
            self.slabs.append({name: own(part) for name, part in coded.items()})
        return torch.tensor([*reused, *range(first, first + fresh)], dtype=torch.int32)

    def read(self, ids: Tensor) -> Coded:
        """Parts [n, H, PAGE, ...] of pages: views where they lie side by side, copies of codes otherwise."""
        slabs, counts = self._slab_of[ids].unique_consecutive(return_counts=True)
        runs = zip(slabs.tolist(), self._slot_of[ids].split(counts.tolist()), strict=True)
        pieces = [{name: _take(part, slots) for name, part in self.slabs[slab].items()} for slab, slots in runs]
        if len(pieces) == 1:
            return pieces[0]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def collect(self, table: Tensor) -> None:
        """Let go of slabs of which `table` names no page, and make the other pages that it does not name free."""
        used = torch.zeros(len(self._slab_of), dtype=torch.bool)
        used[table[table >= 0].long()] = True
        alive = torch.zeros(len(self.slabs), dtype=torch.bool)
        alive[self._slab_of[used]] = True
        self.slabs = [slab if keep else {} for slab, keep in zip(self.slabs, alive.tolist(), strict=True)]
        self._free = (~used & alive[self._slab_of]).nonzero().flatten().tolist()

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """All (name, tensor) that hold codes or scales."""
        for slab in self.slabs:
            yield from slab.items()

    def index(self) -> tuple[Tensor, Tensor]:
        """Where each page lies: its slab and its slot in it, int64 on the CPU."""
        return self._slab_of, self._slot_of

    def to(self, device: torch.device | str) -> None:
        self.slabs = [{name: part.to(device) for name, part in slab.items()} for slab in self.slabs]


def _take(part: Tensor, slots: Tensor) -> Tensor:
    first, count = int(slots[0]), len(slots)
    if int(slots[-1]) - first == count - 1 and bool((slots.diff() == 1).all()):
        return part[first : first + count]
    return part[slots.to(part.device)]


@dataclass(frozen=True)
class PageTable:
    """Which pages make up each row, in order: ids (-1: none), counts of valid tokens, int32 [B, pages] on the CPU."""

    ids: Tensor
    fill: Tensor

    @classmethod
    def empty(cls, rows: int) -> PageTable:
        return cls(torch.empty(rows, 0, dtype=torch.int32), torch.empty(rows, 0, dtype=torch.int32))

    @cached_property
    def tokens(self) -> list[int]:
        """Coded tokens of each row."""
        return self.fill.sum(dim=1).tolist()

    def append(self, ids: Tensor, counts: list[int]) -> PageTable:
        """The table with `counts[row]` full pages more in each row; ids [sum of counts], row by row."""
        held = (self.ids >= 0).sum(dim=1).tolist()
        width = max(h + c for h, c in zip(held, counts, strict=True))
        grow = max(width - self.ids.shape[1], 0)
        table = torch.nn.functional.pad(self.ids, (0, grow), value=-1)
        fill = torch.nn.functional.pad(self.fill, (0, grow))
        for row, (start, own) in enumerate(zip(held, ids.split(counts), strict=True)):
            table[row, start : start + len(own)] = own
            fill[row, start : start + len(own)] = PAGE
        return PageTable(table, fill)

    def crop(self, tokens: list[int]) -> PageTable:
        """The table with the last `tokens[row]` coded tokens of each row gone; pages are cut short, not changed."""
        left = self.fill.sum(dim=1) - torch.tensor(tokens)
        before = self.fill.cumsum(dim=1) - self.fill
        fill = (left.unsqueeze(1) - before).clamp(min=0).minimum(self.fill).to(torch.int32)
        ids = self.ids.masked_fill(fill == 0, -1)
        width = int((ids >= 0).sum(dim=1).max()) if ids.numel() else 0
        return PageTable(ids[:, :width].clone(), fill[:, :width].clone())

    def select(self, rows: Tensor) -> PageTable:
        return PageTable(self.ids[rows], self.fill[rows])
