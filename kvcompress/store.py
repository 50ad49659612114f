"""Paged storage of codes: immutable pages in slabs, and the tables that say which pages make up a row.

A page holds PAGE tokens of one layer, the keys' and the values' coded parts of all KV heads, as one record
(kvcompress/record.py). It is written once and never changed, so rows share pages freely (beams, common prefixes):
reordering a batch moves table rows, not bytes. Every write allocates a slab of just the pages it needs, so growth
copies nothing; pages that no row names any longer are found when the next ones are written, and used again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvcompress.codecs import Coded
from kvcompress.memory import storage_bytes
from kvcompress.record import RecordLayout

PAGE = 64  # tokens
#: The order of a page's values: slot s holds token SLOTS[s]. Of 16 tokens the first and the ninth come first, then the
#: second and the tenth and so on: the two whose weights a lane of a matrix instruction holds side by side.
SLOTS = tuple(16 * group + 8 * second + first for group in range(PAGE // 16) for first in range(8) for second in (0, 1))
#: The slot of every token, the inverse of SLOTS.
SLOT_OF = tuple(sorted(range(PAGE), key=SLOTS.__getitem__))


class PagePool:
    """Slabs of pages, uint8 [n, page_bytes]; a page's id is its place in the order of allocation.

    layout: what a page's record holds, known from the first write on.
    """

    def __init__(self) -> None:
        self.layout: RecordLayout | None = None
        self.slabs: list[Tensor] = []  # one that was let go of has no pages
        self._slab_of = torch.empty(0, dtype=torch.int64)
        self._slot_of = torch.empty(0, dtype=torch.int64)
        self._free: list[int] = []
        self.sealed = 0  # slabs, the first ones: a fork may name their pages, so that no page of theirs is used again

    @classmethod
    def of(cls, layout: RecordLayout, records: Tensor) -> PagePool:
        """A pool of the pages that `records` [n, page_bytes] holds, which becomes its slab; ids are 0 to n - 1."""
        pool = cls()
        pool.layout, pool.slabs = layout, [records]
        pool._slab_of, pool._slot_of = torch.zeros(len(records), dtype=torch.int64), torch.arange(len(records))
        return pool

    def fork(self) -> PagePool:
        """A pool of the same pages, which neither copies: from here on both write to slabs of their own only."""
        self.sealed, self._free = len(self.slabs), []
        fork = PagePool()
        fork.layout, fork.slabs, fork.sealed = self.layout, list(self.slabs), self.sealed
        fork._slab_of, fork._slot_of = self._slab_of, self._slot_of
        return fork

    def write(self, coded: Coded) -> Tensor:
        """Store pages, parts [n, H, ...], in free places first; returns their ids, int32 [n] on the CPU.

        Raises ValueError for parts other than those of the first pages.
        """
        self.layout = self.layout or RecordLayout.of(coded)
        records = self.layout.records(coded)
        reused = self._free[: len(records)]
        del self._free[: len(records)]
        with torch.inference_mode():  # a slab may have been made in it, and could not be written to outside
            for page, record in zip(reused, records, strict=False):
                self.slabs[self._slab_of[page]][self._slot_of[page]] = record
        fresh = len(records) - len(reused)
        first = len(self._slab_of)
        if fresh:
            self._slab_of = torch.cat([self._slab_of, torch.full((fresh,), len(self.slabs))])
            self._slot_of = torch.cat([self._slot_of, torch.arange(fresh)])
            self.slabs.append(records[-fresh:].clone() if reused else records)
        return torch.tensor([*reused, *range(first, first + fresh)], dtype=torch.int32)

    def read(self, ids: Tensor) -> Coded:
        """Parts [n, H, ...] of pages: views where the pages lie side by side, views of copies otherwise.

        Raises ValueError before the first write.
        """
        records = self.records(ids)
        assert self.layout is not None
        return self.layout.views(records)

    def records(self, ids: Tensor) -> Tensor:
        """Pages as they lie there, uint8 [n, page_bytes]; a view where they lie side by side. Raises as `read` does."""
        if self.layout is None:
            raise ValueError("no pages have been written")
        slabs, counts = self._slab_of[ids].unique_consecutive(return_counts=True)
        runs = zip(slabs.tolist(), self._slot_of[ids].split(counts.tolist()), strict=True)
        pieces = [_take(self.slabs[slab], slots) for slab, slots in runs]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def stream(self, groups: Sequence[Tensor]) -> Iterator[Coded]:
        """`read` of one group of pages after another, each good until the next is asked for."""
        return map(self.read, groups)

    def saved(self, ids: Tensor) -> Tensor:
        """As `records`, on the CPU."""
        return self.records(ids).cpu()

    def collect(self, table: Tensor) -> None:
        """Let go of slabs of which `table` names no page, and make the other pages that it does not name free."""
        _, alive = self._sweep(table, len(self.slabs))
        kept = zip(self.slabs, alive, strict=True)
        self.slabs = [slab if keep else slab.new_empty(0, slab.shape[1]) for slab, keep in kept]

    def _sweep(self, table: Tensor, slabs: int) -> tuple[Tensor, list[bool]]:
        """Pages that `table` names, bool [pages], and slabs that hold one of them; other pages of these become free."""
        used = torch.zeros(len(self._slab_of), dtype=torch.bool)
        used[table[table >= 0].long()] = True
        alive = torch.zeros(slabs, dtype=torch.bool)
        alive[self._slab_of[used]] = True
        writable = self._slab_of >= self.sealed
        self._free = (~used & writable & alive[self._slab_of]).nonzero().flatten().tolist()
        return used, alive.tolist()

    @property
    def free(self) -> int:
        """Pages that the next writes take first, as of the last `collect`."""
        return len(self._free)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """All (name, part [n, H, ...]) of slabs that hold pages, views of these."""
        for slab in self.slabs:
            if self.layout is not None and len(slab):
                yield from self.layout.views(slab).items()

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of the slabs' storage by part, what aligns the next part included: they add up to all of it."""
        if self.layout is None:
            return {}
        pages = storage_bytes(self.slabs) // self.layout.page_bytes
        return {name: pages * share for name, share in self.layout.shares().items()}

    def away(self) -> dict[str, int]:
        """Those of the stored bytes that are not on the device: by where they are, `host` or `disk`."""
        return {}

    def index(self) -> tuple[Tensor, Tensor]:
        """Where each page lies: its slab and its slot in it, int64 on the CPU."""
        return self._slab_of, self._slot_of

    def addresses(self, ids: Tensor) -> Tensor:
        """The addresses of pages' records on their device, int64 [n] on the CPU."""
        slabs = [self.slabs[slab] for slab in self._slab_of[ids].tolist()]
        first = torch.tensor([slab.data_ptr() for slab in slabs], dtype=torch.int64)
        return first + self._slot_of[ids] * (self.layout.page_bytes if self.layout else 0)

    def to(self, device: torch.device | str) -> None:
        self.slabs = [slab.to(device) for slab in self.slabs]


def _take(slab: Tensor, slots: Tensor) -> Tensor:
    first, count = int(slots[0]), len(slots)
    if int(slots[-1]) - first == count - 1 and bool((slots.diff() == 1).all()):
        return slab[first : first + count]
    return slab[slots.to(slab.device)]


@dataclass(frozen=True)
class PageTable:
    """Which pages make up each row, in order: ids, counts of valid tokens (0: no page), int32 [B, pages] on the CPU.

    Ids are -1 where there is no page, or where another rank keeps it (kvcompress/parallel.py).
    """

    ids: Tensor
    fill: Tensor

    @classmethod
    def empty(cls, rows: int) -> PageTable:
        return cls(torch.empty(rows, 0, dtype=torch.int32), torch.empty(rows, 0, dtype=torch.int32))

    @cached_property
    def tokens(self) -> list[int]:
        """Coded tokens of each row."""
        return self.fill.sum(dim=1).tolist()

    @property
    def pages(self) -> list[int]:
        """Pages of each row."""
        return (self.fill > 0).sum(dim=1).tolist()

    def append(self, ids: Tensor, counts: list[int]) -> PageTable:
        """The table with `counts[row]` full pages more in each row; ids [sum of counts], row by row."""
        held = self.pages
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
        width = int((fill > 0).sum(dim=1).max()) if ids.numel() else 0
        return PageTable(ids[:, :width].clone(), fill[:, :width].clone())

    def select(self, rows: Tensor) -> PageTable:
        return PageTable(self.ids[rows], self.fill[rows])
