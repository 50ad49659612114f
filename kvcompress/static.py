"""Decoding that a graph can hold: one layer's history with room for all its tokens at addresses that stay.

`StaticDecode.step` adds a token to every row and attends, and touches nothing but tensors on the device: torch.compile
traces it (fullgraph), a CUDA graph replays it. `settle` is the host's, outside the graph: it hands the tokens of the
steps since to the `History`, which closes pages by its own rule, and brings the tensors up to date in place. Pages are
written to a slab that is made beforehand, and those that the history had already are read where they lie.

In each row the exact tokens lie side by side from slot 0 on, `sinks | recent`; `stored` counts them, on the device, so
a new token goes to slot `stored`. Taking one off `stored` undoes a step that `settle` has not been told of. A whole
model's step is `kvcompress.static_model`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from kvcompress.codecs import SIDES
from kvcompress.fused import Triton, gains, operands_of, over_codes
from kvcompress.history import History
from kvcompress.kernels.ops import attend_dense, dense_splits, merge, page_splits
from kvcompress.kernels.pages import Table
from kvcompress.memory import MemoryReport, storage_bytes
from kvcompress.record import RecordLayout
from kvcompress.reference import Mask, Scores
from kvcompress.store import PAGE, PagePool


class StaticRefusalError(ValueError):
    """What static decoding does not take, and ordinary decoding may."""


class ReservedPool(PagePool):
    """A pool that takes over another's pages and has a slab with room for `pages` more, which it fills before it grows.

    The slab's last page is never handed out: it stands for the slab where pages that nobody names are let go of.
    """

    def __init__(self, pool: PagePool, pages: int):
        super().__init__()
        assert pool.layout is not None
        self.layout: RecordLayout = pool.layout
        self.sealed = pool.sealed
        slab, self._spare = len(pool.slabs), len(pool.index()[0]) + pages
        device = pool.slabs[0].device
        with torch.inference_mode(False):
            reserved = torch.zeros(pages + 1, self.layout.page_bytes, dtype=torch.uint8, device=device)
        self.slabs = [*pool.slabs, reserved]
        self._slab_of = torch.cat([pool.index()[0], torch.full((pages + 1,), slab)])
        self._slot_of = torch.cat([pool.index()[1], torch.arange(pages + 1)])

    def collect(self, table: Tensor) -> None:
        """As a pool's, but for the reserved slab, which stays."""
        super().collect(torch.cat([table.flatten(), torch.tensor([self._spare], dtype=table.dtype)]))


def reserved(pool: PagePool, table: Tensor, pages: int) -> PagePool:
    """The pool, or one that takes it over, with free places for `pages` pages beside those that `table` names."""
    pool.collect(table)
    lacking = pages - pool.free
    return ReservedPool(pool, lacking) if lacking > 0 else pool


class StaticDecode:
    """See the module. It takes `history` over after prefill, which is whole again after every `settle`.

    capacity: real tokens that a row may come to have, those held counted. groups: query heads of a KV head. The number
    of splits follows from the capacity alone.

    Raises ValueError where a row is longer than the capacity, and StaticRefusalError, which is one, where a row waits
    to be fitted, no page is closed yet, or the kernels cannot attend the history, with their reason.
    """

    def __init__(self, history: History, capacity: int, groups: int):
        _check(history, capacity, groups)
        history.code()
        self.history, self.capacity = history, capacity
        key, value = history.recent
        rows, heads = key.shape[:2]
        before, most = history.addresses().held, capacity - history.sinks - history.window
        fresh = [max(most - coded, 0) // PAGE for coded in history.coded]
        pages = max(old + new for old, new in zip(before, fresh, strict=True))
        history.pool = reserved(history.pool, history.table.ids, sum(fresh))
        slots = history.sinks + history.window + 2 * PAGE
        self._splits = (
            dense_splits(rows, heads, groups, slots, key.device),
            page_splits(rows, heads, groups, pages, key.device),
        )
        with torch.inference_mode(False):  # so that they can be written to in that mode and outside
            self.exact = tuple(x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in (key, value))
            self.stored = torch.zeros(rows, dtype=torch.int32, device=key.device)
            counts = torch.zeros_like(self.stored)
            addresses = torch.zeros(rows, pages, dtype=torch.int64, device=key.device)
            starts, fills = (torch.zeros_like(addresses, dtype=torch.int32) for _ in range(2))
            self._operands, self._gains = operands_of(history, key.device), gains(key.device)
            if self._operands.planes is not None and self._operands.frame == "token":
                _ = self._operands.rebuilding, self._operands.steps  # made here, so that no step makes them
        self.table = Table(addresses, starts, fills, counts, pages)
        self._held = (0,) * rows  # pages of each row that the table knows
        self._load()

    def step(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Add a token's key, value [B, H, 1, D] and attend all tokens with query [B, H*G, 1, D]: [B, 1, H*G, D_v]."""
        self.append(key, value)
        exact = attend_dense(
            query, *self.exact, scores.scaling, scores.softcap, last=self.stored, splits=self._splits[0]
        )
        codes = over_codes(query, self._operands, self.table, self._gains, scores, None, self._splits[1])
        out, _ = merge([exact, codes], scores.sinks, query.dtype)
        return out.flatten(1, 2).unsqueeze(1)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add a token to every row: key, value [B, H, 1, D]; raises ValueError for other shapes or another dtype.

        Beyond `room` steps a token finds no slot: the index is out of bounds, which the device reports.
        """
        where = self.stored.long().view(-1, 1, 1, 1)
        for name, own, new in zip(SIDES, self.exact, (key, value), strict=True):
            wanted = (*own.shape[:2], 1, own.shape[3])
            if new.shape != wanted or new.dtype != own.dtype:
                raise ValueError(
                    f"a step takes one token's {name} {wanted} in {own.dtype}, got {tuple(new.shape)} in {new.dtype}"
                )
            own.scatter_(2, where.expand(wanted), new.detach())
        self.stored.add_(1)

    @property
    def room(self) -> int:
        """Steps that may follow the last `settle`: PAGE or more until the capacity is near."""
        slots = self.exact[0].shape[2]
        return min(min(slots - held for held in self._stored()), self.capacity - max(self.history.lengths))

    @property
    def due(self) -> int:
        """Steps after the last `settle` until a row's page is due, which a `History` would close at once."""
        return min(self.history.window + PAGE - held for held in self.history.held)

    def rewind(self, steps: int) -> None:
        """Undo what came after the first `steps` steps since the last `settle`."""
        self.stored.copy_(torch.tensor(self._stored()) + steps)

    def memory(self) -> MemoryReport:
        """Bytes held beside the history: room for exact tokens, and the tables; that for pages is in its pool."""
        tables = self.table.addresses, self.table.starts, self.table.fills, self.table.counts, self.stored
        return replace(MemoryReport.nothing(), exact=storage_bytes(self.exact), tables=storage_bytes(tables))

    def settle(self, steps: int) -> None:
        """Take in the tokens of the `steps` steps since the last call; close pages that are due.

        Raises ValueError, changing nothing, where there was no room for them.
        """
        if not 0 <= steps <= self.room:
            raise ValueError(
                f"there is room for 0 to {self.room} steps between calls of settle (rows hold up to "
                f"{max(self.history.lengths)} tokens of a capacity of {self.capacity}), got {steps}"
            )
        first = torch.tensor(self._stored(), device=self.stored.device)
        where = (first.unsqueeze(1) + torch.arange(steps, device=first.device))[:, None, :, None]
        key, value = (x.gather(2, where.expand(*x.shape[:2], -1, x.shape[3])) for x in self.exact)
        self.history.append(key, value, [steps] * len(key))
        self.history.code()
        if self.history.addresses().held != self._held:
            self._load()

    def _stored(self) -> list[int]:
        """Exact tokens of every row at the last `settle`."""
        return [n - c for n, c in zip(self.history.lengths, self.history.coded, strict=True)]

    def _load(self) -> None:
        """Bring the tensors on the device up to the history."""
        history, device = self.history, self.stored.device
        sinks, width = history.sinks, history.recent[0].shape[2]
        slots = torch.arange(sinks + width, device=device)
        skipped = torch.tensor([width - held for held in history.held], device=device).unsqueeze(1)
        where = torch.where(slots < sinks, slots, (slots + skipped).clamp_max(sinks + width - 1))[:, None, :, None]
        for own, parts in zip(self.exact, zip(history.sink, history.recent, strict=True), strict=True):
            held = torch.cat(parts, dim=2)
            own[:, :, : sinks + width] = held.gather(2, where.expand(held.shape))
        self.stored.copy_(torch.tensor(self._stored()))
        table = history.addresses()
        fresh = slice(min(self._held), max(table.held))
        known = torch.arange(fresh.start, fresh.stop, device=device) < table.counts.unsqueeze(1)
        for own, new in zip((self.table.addresses, self.table.starts, self.table.fills), table.tensors, strict=False):
            own[:, fresh] = new[:, fresh].where(known, own[:, fresh])
        self.table.counts.copy_(table.counts)
        self._held = table.held


def waiting(history: History) -> str | None:
    """Why a history does not decode statically yet; None once codecs are fitted and a page is closed."""
    if not history.lengths:
        return "static decoding starts after the prefill, got a history without tokens"
    enough = history.sinks + history.fit_tokens if history.fit_tokens else 0  # a row may have been cropped to fewer
    rows = zip(history.fit_of, history.lengths, strict=True)
    unfitted = [row for row, (place, length) in enumerate(rows) if place < 0 or length < enough]
    if not unfitted and any(history.coded):
        return None
    return (
        f"static decoding starts once codecs are fitted and a page is closed, after "
        f"{history.sinks + max(history.window + PAGE, history.fit_tokens)} tokens; "
        f"rows hold {history.lengths}, rows {unfitted} wait to be fitted"
    )


def refusal(history: History, groups: int) -> str | None:
    """What of a history that is not `waiting` the kernels refuse; None where they take it all."""
    key = history.recent[0]
    backend, mask = Triton(), Mask(None, causal=True)
    query = key.new_empty(key.shape[0], key.shape[1] * groups, 1, key.shape[3])
    reason = backend.unavailable(key.device) or backend.rejects(query, history, mask, Scores(1.0))
    if reason is None and triton.knobs.runtime.interpret and key.dtype == torch.bfloat16:
        reason = "bfloat16 in Triton's interpreter"
    return None if reason is None else f"static decoding needs the kernels, which refuse {reason}"


def _check(history: History, capacity: int, groups: int) -> None:
    """Raises ValueError for what `StaticDecode` does not take."""
    reason = waiting(history)
    if reason is None and capacity < max(history.lengths):
        raise ValueError(f"the capacity must be at least the {max(history.lengths)} tokens held, got {capacity}")
    reason = reason or refusal(history, groups)
    if reason is not None:
        raise StaticRefusalError(reason)
