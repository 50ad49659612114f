"""One layer's cached tokens as they come: in each row, `sinks | coded pages | recent`.

A row's first `sinks` real tokens and its latest ones stay exact. Whenever `window + PAGE` exact tokens have gathered
after the coded ones, and the codecs' `fit_tokens` have been seen, the oldest PAGE of them become a page. The rule looks
at one row only, so a token's codes depend neither on how the prompt was cut into chunks nor on the other rows (unless
they share what is learned). Left padding is not stored. How what is held is read is `kvcompress.held`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import compress

import torch
from torch import Tensor

from kvcompress.codecs import SIDES, Codec, Coded, Fit, joined
from kvcompress.held import Block, Derived, HeldTokens, Rotation
from kvcompress.metric import query_metric, turned_query_metric
from kvcompress.parallel import ContextGroup
from kvcompress.record import RecordLayout
from kvcompress.store import PAGE, SLOTS, PagePool, PageTable

__all__ = ["Block", "Derived", "History", "Rotation"]

ENCODE_PAGES = 64  # pages coded at a time: bounds the encoder's workspace


class History(HeldTokens):
    """See the module. `codecs` are those of keys and of values; rows are made at the first `append`.

    shared: the rows that are fitted first are fitted together, and all use that. encode: codes pages [n, H, PAGE, D] of
    a side as its codec would. The rest is as for `HeldTokens`.
    """

    def __init__(
        self,
        key_codec: Codec,
        value_codec: Codec,
        sinks: int,
        window: int,
        *,
        shared: bool = False,
        preset: tuple[Fit, Fit] | None = None,
        rotation: Rotation | None = None,
        encode: Callable[[Codec, int, Tensor, Fit], Coded] = lambda codec, side, pages, fit: codec.encode(pages, fit),
        group: ContextGroup | None = None,
        pool: Callable[[], PagePool] = PagePool,
    ):
        super().__init__(
            key_codec, value_codec, sinks, window, preset=preset, rotation=rotation, group=group, pool=pool
        )
        self.shared, self.encode = shared, encode
        self.fit_tokens = 0 if preset else max(key_codec.fit_tokens, value_codec.fit_tokens)

    def fork(self, encode: Callable[[Codec, int, Tensor, Fit], Coded]) -> History:
        """A history of the same tokens that goes on by itself; pages and exact tokens are shared, not copied.

        encode: as above, for the fork.
        """
        fork = copy.copy(self)
        fork.pool, fork.encode = self.pool.fork(), encode
        fork._addresses = None  # a table is extended in place, beyond the end that its owner knows
        fork.derived = None  # made anew where the fork is used, which may be another device
        return fork

    def append(self, key: Tensor, value: Tensor, real: list[int], query: Tensor | None = None) -> None:
        """Add a chunk [B, H, Q, D] whose last `real[row]` tokens are no padding; `code` then codes what is due.

        query: the chunk's [B, H*G, Q, D], where it is known, for codecs that weigh the errors of keys by it.
        """
        rows, length = key.shape[0], key.shape[2]
        if not self.lengths:
            self.lengths, self.pads = [0] * rows, [0] * rows
            self.fit_of = [0 if self.preset else -1] * rows
            self.queries = [key.new_empty(0, 0, 0)] * rows
            self.table = PageTable.empty(rows)
            self.sink = tuple(x.new_zeros(*x.shape[:2], self.sinks, x.shape[3]) for x in (key, value))
            self.recent = tuple(x[:, :, :0] for x in (key, value))
        before = self.lengths
        self.lengths = [n + r for n, r in zip(before, real, strict=True)]
        self.pads = [p + length - r for p, r in zip(self.pads, real, strict=True)]
        self.recent = tuple(torch.cat(pair, dim=2) for pair in zip(self.recent, (key, value), strict=True))
        self._fill_sinks(before, real)
        if query is not None and self.codecs[0].weighted and min(self.fit_of) < 0:
            self._keep_queries(query, before, real)

    def code(
        self, spare: int = 0, output_metric: Callable[[], Tensor | None] = lambda: None, fitted_only: bool = False
    ) -> None:
        """Turn the oldest exact tokens of every row into pages where enough of them have gathered, and let them go.

        spare: tokens to keep exact beside the window. output_metric: gives [H, D, D], by which errors of values matter
        (None where it is not known). fitted_only: let rows wait that are still to be fitted.
        """
        if self.lengths:
            self._code(spare, output_metric, fitted_only)
            width = max(self.held)
            self.recent = tuple(x[:, :, x.shape[2] - width :].clone() for x in self.recent)

    def _fill_sinks(self, before: list[int], real: list[int]) -> None:
        """Move a row's first tokens to its sinks."""
        if min(before) >= self.sinks:
            return
        sink = tuple(x.clone() for x in self.sink)
        for row, (old, new) in enumerate(zip(before, real, strict=True)):
            count = min(self.sinks - old, new)
            if count > 0:
                for side in (0, 1):
                    start = self.recent[side].shape[2] - new
                    sink[side][row, :, old : old + count] = self.recent[side][row, :, start : start + count]
        self.sink = sink

    def _keep_queries(self, query: Tensor, before: list[int], real: list[int]) -> None:
        """Keep the queries of the tokens that the codecs will be fitted to, those right after the sinks."""
        queries = list(self.queries)
        last = self.sinks + self.codecs[0].fit_tokens
        for row, (old, new) in enumerate(zip(before, real, strict=True)):
            start, stop = max(self.sinks - old, 0), min(last - old, new)
            if self.fit_of[row] < 0 and start < stop:
                first = query.shape[2] - new
                part = query[row, :, first + start : first + stop].detach()
                queries[row] = torch.cat([queries[row], part], dim=1) if queries[row].numel() else part.clone()
        self.queries = queries

    def _query_metric(self, rows: list[int]) -> Tensor | None:
        """E[q q^T] over the kept queries, [rows, H, D, D]; None where there are fewer of them than dimensions."""
        if not self.codecs[0].weighted:
            return None
        heads, width = self.recent[0].shape[1], self.recent[0].shape[3]
        kept = [self.queries[row] for row in rows]
        if any(q.numel() == 0 or q.shape[1] < width for q in kept):
            return None
        if not self._turns:
            return torch.stack([query_metric(q, heads) for q in kept])
        assert self.rotation is not None
        return torch.stack([turned_query_metric(q, heads, self.sinks, self.rotation) for q in kept])

    def _code(self, spare: int, output_metric: Callable[[], Tensor | None], fitted_only: bool) -> None:
        held = self.held
        due = [max(h - self.window - spare, 0) // PAGE for h in held]
        due = [d if n >= self.sinks + self.fit_tokens else 0 for d, n in zip(due, self.lengths, strict=True)]
        due = [0 if fitted_only and place < 0 else d for d, place in zip(due, self.fit_of, strict=True)]
        if not any(due):
            return
        self._fit([row for row, d in enumerate(due) if d and self.fit_of[row] < 0], held, output_metric)
        starts = [self.recent[0].shape[2] - h for h in held]
        new = [(row, i) for row, d in enumerate(due) for i in range(d)]
        places = [(row, starts[row] + PAGE * i) for row, i in new]
        pages, before = self.table.pages, self.coded
        kept = [self.group is None or self.group.keeps(pages[row] + i) for row, i in new]
        own = list(compress(places, kept))
        coded = [self._encode(own[i : i + ENCODE_PAGES]) for i in range(0, len(own), ENCODE_PAGES)]
        self.pool.collect(self.table.ids)
        if coded:
            written = self.pool.write(joined(coded))
        else:  # what a page holds, and so what kernels take, is to be known to all ranks alike
            written = torch.empty(0, dtype=torch.int32)
            self.pool.layout = self.pool.layout or RecordLayout.of(self._encode(places[:1]))
        ids = torch.full((len(new),), -1, dtype=torch.int32).masked_scatter(torch.tensor(kept), written)
        self.table = self.table.append(ids, due)
        if self._addresses is not None:
            rows = [row for row, _ in compress(new, kept)]
            counts = [rows.count(row) for row in range(len(due))]
            first = torch.tensor([self.sinks + before[row] + PAGE * i for row, i in compress(new, kept)])
            fills = torch.full_like(written, PAGE)
            self._addresses = self._addresses.append(counts, self.pool.addresses(written), first, fills)

    def _fit(self, rows: list[int], held: list[int], output_metric: Callable[[], Tensor | None]) -> None:
        """Learn what the codecs need from the first tokens after the sinks of rows that have no codes yet."""
        if not rows:
            return
        known = max(self.fit_of) + 1
        fit_of = list(self.fit_of)
        if not (self.shared and known):
            values = output_metric() if self.codecs[1].weighted else None
            metrics = (self._query_metric(rows), None if values is None else values.expand(len(rows), -1, -1, -1))
            learned = [self._learn(side, rows, held, metrics[side]) for side in (0, 1)]
            self.fits = tuple(
                {name: torch.cat([fit[name], x]) if known else x for name, x in new.items()}
                for fit, new in zip(self.fits, learned, strict=True)
            )
        for place, row in enumerate(rows):
            fit_of[row] = 0 if self.shared else known + place
        self.fit_of = fit_of
        self.queries = [q if fit_of[row] < 0 else q.new_empty(0, 0, 0) for row, q in enumerate(self.queries)]

    def _learn(self, side: int, rows: list[int], held: list[int], metric: Tensor | None) -> Fit:
        """What one side's codec learns of each of the rows, or of all of them together where they share it."""
        codec, recent = self.codecs[side], self.recent[side]
        starts = [recent.shape[2] - held[row] for row in rows]
        first = torch.stack([recent[row, :, s : s + codec.fit_tokens] for row, s in zip(rows, starts, strict=True)])
        if side == 0 and self._turns:
            assert self.rotation is not None
            start = torch.tensor([self.sinks] * len(rows), device=first.device)
            first = self.rotation.undo(first.float(), self._frames(start, first.shape[2]))
        if self.shared:
            first = first.transpose(0, 1).flatten(1, 2).unsqueeze(0)
            metric = None if metric is None else metric.mean(dim=0, keepdim=True)
        return {name: x.contiguous() for name, x in codec.fit(first, metric).items()}  # as a saved one is loaded

    def _encode(self, places: list[tuple[int, int]]) -> Coded:
        """The coded parts of pages that start at (row, offset in `recent`), named by side."""
        coded: Coded = {}
        owners = [self.fit_of[row] for row, _ in places]
        alike = len(set(owners)) == 1
        for side, codec in enumerate(self.codecs):
            recent = self.recent[side]
            pages = torch.stack([recent[row, :, start : start + PAGE] for row, start in places])
            if side == 0 and self._turns:
                assert self.rotation is not None
                first = [self.lengths[row] - recent.shape[2] + start for row, start in places]
                frames = self._frames(torch.tensor(first, device=pages.device), PAGE)
                pages = self.rotation.undo(pages.float(), frames)
            elif side == 1:
                pages = pages[:, :, list(SLOTS)]
            own = {name: x[owners[:1] if alike else owners] for name, x in self.fits[side].items()}
            coded |= {f"{SIDES[side]}.{name}": part for name, part in self.encode(codec, side, pages, own).items()}
        return coded
