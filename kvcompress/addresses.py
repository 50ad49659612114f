"""Where every row's pages lie on their device, for kernels: a page table of addresses instead of ids.

Beside a page's address stand its first token's position among the row's real tokens and how many of its tokens count,
so a kernel needs nothing from the host. It is extended by the pages that are new, whatever the length of the history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 16  # pages that a row has room for at least


@dataclass(frozen=True, eq=False)
class AddressTable:
    """The first `counts[row]` entries of every row, in the order of its tokens; what is beyond them means nothing.

    addresses: int64 [B, capacity], of pages' records. starts: int32 [B, capacity], a page's first token among the row's
    real tokens. fills: int32 [B, capacity], tokens of the page that count. counts: int32 [B]. All are on the codes'
    device; `held` is `counts` on the host.

    Tables made from one another share their entries: what `append` writes lies beyond the counts of the former one,
    which stays as it was. Addresses hold as long as the pool keeps the pages where they are.
    """

    addresses: Tensor
    starts: Tensor
    fills: Tensor
    counts: Tensor
    held: tuple[int, ...]

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> AddressTable:
        """Of rows that have no pages."""
        addresses = torch.zeros(rows, SMALLEST, dtype=torch.int64, device=device)
        starts, fills = (torch.zeros(rows, SMALLEST, dtype=torch.int32, device=device) for _ in range(2))
        return cls(addresses, starts, fills, torch.zeros(rows, dtype=torch.int32, device=device), (0,) * rows)

    @property
    def capacity(self) -> int:
        """Pages that each row has room for."""
        return self.addresses.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds."""
        return self.addresses, self.starts, self.fills, self.counts

    def append(self, new: Sequence[int], addresses: Tensor, starts: Tensor, fills: Tensor) -> AddressTable:
        """The table with `new[row]` pages more in each row: addresses, starts, fills [sum of new] on the CPU, by row.

        One transfer and three scattered writes of as many numbers; copies entries only where the room has to double.
        """
        held = tuple(h + n for h, n in zip(self.held, new, strict=True))
        grown = self._with_room(max(held, default=0))
        spans = zip(self.held, held, strict=True)
        places = [row * grown.capacity + at for row, (first, stop) in enumerate(spans) for at in range(first, stop)]
        device = self.counts.device
        entries = torch.stack([torch.tensor(places, dtype=torch.int64), addresses.long(), starts.long(), fills.long()])
        where, *values = entries.to(device)
        with torch.inference_mode():  # a table may have been made in it, and could not be written to outside
            for own, value in zip(grown.tensors[:3], values, strict=True):
                own.view(-1).index_copy_(0, where, value.to(own.dtype))
        counts = torch.tensor(held, dtype=torch.int32, device=device)
        return AddressTable(grown.addresses, grown.starts, grown.fills, counts, held)

    def select(self, rows: Tensor) -> AddressTable:
        """Rows kept, repeated or reordered: their indices, int64 [B'] on the CPU."""
        order = rows.to(self.counts.device)
        addresses, starts, fills, counts = (own.index_select(0, order) for own in self.tensors)
        return AddressTable(addresses, starts, fills, counts, tuple(self.held[row] for row in rows.tolist()))

    def _with_room(self, pages: int) -> AddressTable:
        """The table with its room doubled until every row can have so many pages."""
        capacity = self.capacity
        while capacity < pages:
            capacity *= 2
        if capacity == self.capacity:
            return self
        more = (0, capacity - self.capacity)
        addresses, starts, fills = (torch.nn.functional.pad(own, more) for own in self.tensors[:3])
        return AddressTable(addresses, starts, fills, self.counts, self.held)
