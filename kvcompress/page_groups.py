"""The pages of an offloaded history for kernels: those on the device at once, then the others group by group.

Kernels take pages by their addresses (kvcompress/addresses.py) and give partial results, so a history may be attended
in any groups of pages and the results merged. Which pages a group has stays as it is until a page is written or moved;
only where it has been copied to changes from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompress.addresses import AddressTable
from kvcompress.history import History
from kvcompress.offloaded import OffloadedPool
from kvcompress.store import PageTable

GROUP_BYTES = 64 << 20  # of pages that are copied to the device together


@dataclass(frozen=True)
class Groups:
    """Those of a page table, as long as no slab has moved since `moves` had.

    resident: of the pages that are attended where they are, None where there are none. stored: ids of pages, and a
    table of them whose addresses count from where they will have been copied to, in that order.
    """

    table: PageTable
    moves: int
    resident: AddressTable | None
    stored: list[tuple[Tensor, AddressTable]]

    @classmethod
    def of(cls, history: History, pool: OffloadedPool) -> Groups:
        """The groups of a history, of at most GROUP_BYTES each, or one page of every row where that is more."""
        assert pool.layout is not None
        moves, ids = pool.offload.moves, history.table.ids
        named = ids >= 0
        here = torch.zeros_like(named)
        here[named] = pool.resident(ids[named])
        resident = _table(history, here, pool.addresses(ids[here])) if bool(here.any()) else None
        stored, most = [], max(GROUP_BYTES // pool.layout.page_bytes, 1)
        for columns in _spans(ids, named & ~here, most):
            away = named & ~here & columns
            pages, places = ids[away].unique(return_inverse=True)
            stored.append((pages.long(), _table(history, away, places * pool.layout.page_bytes)))
        return cls(history.table, moves, resident, stored)


def tables(history: History, pool: OffloadedPool) -> Iterator[AddressTable]:
    """Tables that together name all pages of a history that are here; one is good until the next is asked for.

    Raises OSError where pages cannot be read.
    """
    groups = pool.plan
    if groups is None or groups.table is not history.table or groups.moves != pool.offload.moves:
        groups = pool.plan = Groups.of(history, pool)
    staged = pool.staged([pages for pages, _ in groups.stored]) if groups.stored else iter(())
    if groups.resident is not None:
        yield groups.resident
    for (_, table), records in zip(groups.stored, staged, strict=True):
        yield replace(table, addresses=table.addresses + records.data_ptr())


def _spans(ids: Tensor, away: Tensor, most: int) -> Iterator[Tensor]:
    """Columns, bool [pages], in spans that name at most `most` of the pages that are away, or are one column."""
    found: set[int] = set()
    start, width = 0, ids.shape[1]
    for column in range(width):
        own = set(ids[away[:, column], column].tolist())
        if found and len(found | own) > most:
            yield _columns(start, column, width)
            start, found = column, set()
        found |= own
    if found:
        yield _columns(start, width, width)


def _columns(start: int, stop: int, width: int) -> Tensor:
    places = torch.arange(width)
    return (places >= start) & (places < stop)


def _table(history: History, named: Tensor, addresses: Tensor) -> AddressTable:
    """A table of the pages `named`, bool [B, pages], whose addresses these are."""
    empty = AddressTable.empty(len(named), history.recent[0].device)
    counts = named.sum(dim=1).tolist()
    return empty.append(counts, addresses, history.starts()[named], history.table.fill[named])
