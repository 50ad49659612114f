"""The requests of a step, sorted for attention: those that decode one token together, the others one by one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvcompress.paged.blocks import BlockTable
from kvcompress.reference import Mask
from kvcompress.store import PAGE


@dataclass(frozen=True, eq=False)
class Rows:
    """Requests with `queries` new tokens each. tokens: where these stand in the step, int64 [B * queries].

    table: the blocks of what came before them.
    """

    queries: int
    tokens: Tensor
    table: BlockTable

    def mask(self, window: int | None) -> Mask:
        """Who sees whom, where a token sees the last `window` ones, itself among them (None: all)."""
        if window is None:
            return Mask(None, causal=True)
        rows, most = len(self.table.lengths), self.table.most
        column = torch.arange(most + self.queries, device=self.tokens.device)
        query = torch.arange(most, most + self.queries, device=self.tokens.device).unsqueeze(1)
        seen = (column <= query) & (column > query - window)
        if self.queries == 1:
            return Mask(seen.expand(rows, -1), causal=True)
        return Mask(seen.expand(rows, 1, -1, -1), causal=True)

    def within(self, window: int | None) -> Rows:
        """With the blocks left out that no token sees."""
        if window is None:
            return self
        skipped = [max(length + 1 - window, 0) // PAGE for length in self.table.lengths]
        lengths = tuple(n - s * PAGE for n, s in zip(self.table.lengths, skipped, strict=True))
        pages = -(-max(lengths) // PAGE)
        wide = torch.nn.functional.pad(self.table.ids, (0, pages))
        order = torch.tensor(skipped, device=wide.device).unsqueeze(1) + torch.arange(pages, device=wide.device)
        return Rows(self.queries, self.tokens, BlockTable(wide.gather(1, order), lengths))


@dataclass(frozen=True, eq=False)
class Step:
    """A step's requests: `ids` int32 [requests, P] names their blocks on the device.

    starts: where each one's new tokens begin among the step's, and where the last one's end. lengths: tokens of each
    with the new ones. alike: whether requests decode together only where their histories are about as long, for
    backends that work on every row up to the longest one's end.
    """

    ids: Tensor
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    alike: bool = False

    @property
    def tokens(self) -> int:
        """New tokens of all requests."""
        return self.starts[-1]

    @cached_property
    def rows(self) -> list[Rows]:
        """All requests that have new tokens."""
        spans = [
            (row, start, stop - start, length - (stop - start))
            for row, (start, stop, length) in enumerate(zip(self.starts, self.starts[1:], self.lengths, strict=False))
            if stop > start
        ]
        single = [span for span in spans if span[2] == 1]
        groups = _alike(single) if self.alike else [single] if single else []
        return [self._group(group) for group in [*groups, *([span] for span in spans if span[2] > 1)]]

    def windowed(self, window: int | None) -> list[Rows]:
        """`rows` for layers whose tokens see the last `window` ones; found once a step."""
        known: dict[int | None, list[Rows]] = self._windowed
        if window not in known:
            known[window] = [rows.within(window) for rows in self.rows]
        return known[window]

    @cached_property
    def _windowed(self) -> dict[int | None, list[Rows]]:
        return {}

    def _group(self, spans: list[tuple[int, int, int, int]]) -> Rows:
        queries = spans[0][2]
        tokens = torch.tensor([start for _, start, _, _ in spans]).unsqueeze(1) + torch.arange(queries)
        order = torch.tensor([row for row, *_ in spans])
        device = self.ids.device
        table = BlockTable(self.ids[order.to(device)], tuple(before for *_, before in spans))
        return Rows(queries, tokens.flatten().to(device), table)


def _alike(spans: list[tuple[int, int, int, int]]) -> list[list[tuple[int, int, int, int]]]:
    """Spans by the power of two that their pages come to, so that no row of a group has half another's or less."""
    groups: dict[int, list[tuple[int, int, int, int]]] = {}
    for span in spans:
        groups.setdefault((-(-span[3] // PAGE)).bit_length(), []).append(span)
    return list(groups.values())
