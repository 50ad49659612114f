"""`OffloadedPool`: a pool of pages of which only some are on the device (kvcompress/tiers.py).

Whoever attends asks for its pages group by group. What of a group is not on the device is copied there one group ahead,
by the offload's reader thread, on a GPU on a stream of its own; so reading goes on while the group before is attended,
and, for the first group of the next layer, while this layer's other parts are computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcompress.codecs import Coded
from kvcompress.record import RecordLayout
from kvcompress.store import PagePool
from kvcompress.tiers import Lane, Offload, Run, Slab


class Fetch:
    """Pages on their way to a device: `result` gives them as soon as they are there."""

    def __init__(
        self, ids: Tensor, buffer: Tensor, inverse: Tensor | None, future: Future[torch.cuda.Event | None] | None
    ):
        self.ids, self._buffer, self._inverse, self._future = ids, buffer, inverse, future

    def result(self) -> Tensor:
        """Records [n, page_bytes] in the order of `ids`; raises OSError where they cannot be read."""
        future, self._future = self._future, None
        if future is not None:
            copied = future.result()
            if copied is not None:
                torch.cuda.current_stream(self._buffer.device).wait_event(copied)
        return self._buffer if self._inverse is None else self._buffer[self._inverse]

    def __del__(self) -> None:
        if self._future is not None:  # nobody asked for the pages: the buffer is to last until they are there
            self._future.add_done_callback(partial(_wait, self._buffer))


def _wait(buffer: Tensor, future: Future[torch.cuda.Event | None]) -> None:
    if future.exception() is None and (copied := future.result()) is not None:
        copied.synchronize()


class OffloadedPool(PagePool):
    """As `PagePool`, with the slabs in `places` (None: let go of) instead of `slabs`, which stays empty.

    Pages are read to `device`, which is where new ones come from. Only pages on the device are used again. A deep copy
    is a fork: what is stored has one owner, and is never changed.
    """

    def __init__(self, offload: Offload, device: torch.device, lane: Lane | None = None):
        super().__init__()
        self.offload, self.device = offload, device
        self.lane = lane or offload.lane()
        self.places: list[Slab | None] = []
        self.plan: Any = None  # what kernels keep of it (kvcompress/page_groups.py)
        self._first: Tensor | None = None  # the group that was read first the last time
        self._ahead: Fetch | None = None  # that group, read before it is asked for
        self._next: weakref.ref[OffloadedPool] | None = None  # whose pages were read next

    @classmethod
    def adopt(cls, offload: Offload, pool: PagePool, device: torch.device) -> OffloadedPool:
        """A pool of copies of another's pages, under the same ids. Raises OSError where they cannot be stored."""
        adopted = cls(offload, device)
        adopted.layout = pool.layout
        size = 1 if pool.layout is None else offload.slab_pages(pool.layout.page_bytes)
        firsts = []
        for slab in pool.slabs:
            firsts.append(len(adopted.places))
            pieces = slab.split(size) if len(slab) else ()
            adopted.places += [offload.place(adopted.lane, piece.clone(), device) for piece in pieces] or [None]
        slab_of, slot_of = pool.index()
        alive = torch.tensor([len(slab) > 0 for slab in pool.slabs], dtype=torch.bool)[slab_of]
        adopted._slab_of = torch.tensor(firsts, dtype=torch.int64)[slab_of] + slot_of // size * alive
        adopted._slot_of = slot_of % size
        return adopted

    def fork(self) -> OffloadedPool:
        self.sealed, self._free = len(self.places), []
        fork = OffloadedPool(self.offload, self.device, self.lane)
        fork.layout, fork.places, fork.sealed = self.layout, list(self.places), self.sealed
        fork._slab_of, fork._slot_of = self._slab_of, self._slot_of
        return fork

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedPool:
        return self.fork()

    def write(self, coded: Coded) -> Tensor:
        """As `PagePool.write`. Raises OSError, with all pages as they were, where others cannot be moved."""
        layout = self.layout or RecordLayout.of(coded)
        records = layout.records(coded)
        writable = [(page, place) for page in self._free if (place := self._resident(page)) is not None]
        reused = writable[: len(records)]
        with torch.inference_mode():  # a slab may have been made in it, and could not be written to outside
            for (_, place), record in zip(reused, records, strict=False):
                place.copy_(record)
        fresh, first = records[len(reused) :], len(self._slab_of)
        pieces = fresh.split(self.offload.slab_pages(layout.page_bytes)) if len(fresh) else ()
        placed = [self.offload.place(self.lane, piece, records.device) for piece in pieces]
        slabs = [torch.full((len(piece),), len(self.places) + i) for i, piece in enumerate(pieces)]
        self._slab_of = torch.cat([self._slab_of, *slabs])
        self._slot_of = torch.cat([self._slot_of, *(torch.arange(len(piece)) for piece in pieces)])
        self.places += placed
        self.layout = layout
        taken = [page for page, _ in reused]
        self._free = [page for page in self._free if page not in set(taken)]
        return torch.tensor([*taken, *range(first, first + len(fresh))], dtype=torch.int32)

    def records(self, ids: Tensor) -> Tensor:
        if self.layout is None:
            raise ValueError("no pages have been written")
        return self._fetch(ids.long(), self.device).result()

    def saved(self, ids: Tensor) -> Tensor:
        return self._fetch(ids.long(), torch.device("cpu")).result()

    def stream(self, groups: Sequence[Tensor]) -> Iterator[Coded]:
        if groups:
            assert self.layout is not None
            yield from map(self.layout.views, self.staged(groups))

    def staged(self, groups: Sequence[Tensor]) -> Iterator[Tensor]:
        """Records [n, page_bytes] of one group of pages after another, on the device; the first is on its way at once.

        Those of a group are there until the next is asked for. Raises OSError where they cannot be read.
        """
        latest, self.offload.latest = self.offload.latest, weakref.ref(self)
        before = None if latest is None else latest()
        if before is not None and before is not self:
            before._next = self.offload.latest
        groups = [ids.long() for ids in groups]
        ahead, self._ahead, self._first = self._ahead, None, groups[0]
        known = ahead is not None and torch.equal(ahead.ids, groups[0])
        return self._one_after_another(groups, ahead if known and ahead else self._fetch(groups[0], self.device))

    def _one_after_another(self, groups: list[Tensor], fetch: Fetch) -> Iterator[Tensor]:
        for ids in groups[1:]:
            coming = self._fetch(ids, self.device)
            yield fetch.result()
            fetch = coming
        following = None if self._next is None else self._next()
        if following is not None and following._first is not None:
            following._read_ahead(following._first)
        yield fetch.result()

    def _read_ahead(self, first: Tensor) -> None:
        """Begin to bring a group here before it is asked for; what was brought for another pool that way is let go."""
        waiting = None if self.offload.ahead is None else self.offload.ahead()
        if waiting is not None:
            waiting._ahead = None
        self.offload.ahead, self._ahead = weakref.ref(self), self._fetch(first, self.device)

    def collect(self, table: Tensor) -> None:
        used, alive = self._sweep(table, len(self.places))
        self.places = [slab if keep else None for slab, keep in zip(self.places, alive, strict=True)]
        if self._first is not None and not bool(used[self._first].all()):
            self._first = self._ahead = None

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        for slab in self.places:
            if self.layout is not None and slab is not None:
                pages = torch.empty(slab.shape, dtype=torch.uint8)
                slab.read(0, pages)
                yield from self.layout.views(pages).items()

    def stored_bytes(self) -> dict[str, int]:
        if self.layout is None:
            return {}
        pages = sum(slab.shape[0] for slab in self.places if slab is not None)
        return {name: pages * share for name, share in self.layout.shares().items()}

    def away(self) -> dict[str, int]:
        held = [slab for slab in self.places if slab is not None and slab.resident is None]
        host = sum(slab.nbytes for slab in held if slab.host is not None)
        return {"host": host, "disk": sum(slab.nbytes for slab in held) - host}

    def resident(self, ids: Tensor) -> Tensor:
        """Which of the pages can be attended where they are, bool [n]."""
        here = [slab is not None and self._here(slab, self.device) is not None for slab in self.places]
        return torch.tensor(here, dtype=torch.bool)[self._slab_of[ids.long()]]

    def addresses(self, ids: Tensor) -> Tensor:
        """As `PagePool.addresses`, of `resident` pages."""
        first = [0 if slab is None or slab.resident is None else slab.resident.data_ptr() for slab in self.places]
        places = torch.tensor(first, dtype=torch.int64)[self._slab_of[ids.long()]]
        return places + self._slot_of[ids.long()] * (self.layout.page_bytes if self.layout else 0)

    def to(self, device: torch.device | str) -> None:
        """From here on pages are read to `device`, and new ones come from there; a GPU takes what the CPU held."""
        self.device, self.plan, self._ahead, self._first = torch.device(device), None, None, None
        for index, slab in enumerate(self.places):
            if (
                slab is not None
                and slab.resident is not None
                and slab.resident.device.type == "cpu" != self.device.type
            ):
                self.places[index] = self.offload.place(self.lane, slab.resident, self.device)

    def _resident(self, page: int) -> Tensor | None:
        """A page's record on the device, None where it is stored."""
        slab = self.places[int(self._slab_of[page])]
        held = None if slab is None else self._here(slab, self.device)
        return None if held is None else held[int(self._slot_of[page])]

    @staticmethod
    def _here(slab: Slab, device: torch.device) -> Tensor | None:
        held = slab.resident
        return held if held is not None and held.device.type == device.type else None

    def _fetch(self, ids: Tensor, device: torch.device) -> Fetch:
        """Begin to bring pages (int64 [n], on the CPU) to a device, each once however often it is named."""
        pages, inverse = ids.unique(return_inverse=True)
        slabs, slots = self._slab_of[pages], self._slot_of[pages]
        breaks = ((slabs.diff() != 0) | (slots.diff() != 1)).nonzero().flatten() + 1
        starts = [0, *breaks.tolist()]
        runs: list[Run] = []
        for at, stop in zip(starts, [*starts[1:], len(pages)], strict=True):
            slab = self.places[int(slabs[at])]
            assert slab is not None
            runs.append(Run(slab, int(slots[at]), at, stop - at))
        order = None if torch.equal(inverse, torch.arange(len(ids))) else inverse
        here = [self._here(run.slab, device) for run in runs]
        if len(runs) == 1 and here[0] is not None:
            return Fetch(ids, runs[0].of(here[0]), order, None)
        buffer = torch.empty(len(pages), runs[0].slab.shape[1], dtype=torch.uint8, device=device)
        for run, held in zip(runs, here, strict=True):
            if held is not None:
                buffer[run.at : run.at + run.pages] = run.of(held)
        away = [run for run, held in zip(runs, here, strict=True) if held is None]
        return Fetch(ids, buffer, order, self.offload.read(away, buffer) if away else None)
