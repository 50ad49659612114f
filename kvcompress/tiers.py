"""Where pages of codes lie: on the device as far as a budget goes, then in the host's memory, then in a file.

`Offload` is shared by all layers of the caches that are given it, and counts what they hold. Pages come in slabs, which
are moved as a whole::

    device    resident: attended where they are; never more than `device_budget`
    host      pinned memory, at most `host_budget`; only where the device is a GPU
    file      the rest, in an unnamed temporary file (kvcompress/spill.py)

Every step reads all pages of all layers in turn, so which of them are resident is all the same for how much has to be
read, and the ones used least recently would be the worst to move. What counts is that reading goes on while something
is computed: layers hold equal shares. Where a new slab takes residents over the budget, the layer that holds most of
them gives up its oldest ones; they never come back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from kvcompress.spill import SpillFile
from kvcompress.units import parse_size

if TYPE_CHECKING:
    from kvcompress.offloaded import OffloadedPool

SLAB_PAGES = 64  # at most, so that few copies move many bytes
SHARES = 8  # slabs at least that a layer's share of the budget is good for


def has_host_tier(device: torch.device) -> bool:
    """Whether the host's memory is another one than the device's."""
    return device.type == "cuda"


class Lane:
    """What the pools of one layer hold on the device, oldest first, and its bytes."""

    def __init__(self) -> None:
        self.residents: WeakValueDictionary[int, Slab] = WeakValueDictionary()
        self.bytes = 0


class Slab:
    """Pages, uint8 [n, page_bytes], in one place: `resident` on a device, `host` pinned, or at `offset` in the file.

    Stored ones never change. Their bytes are given back when nobody names the slab any longer.
    """

    def __init__(self, offload: Offload, lane: Lane, shape: tuple[int, int]):
        self.offload, self.lane, self.shape = offload, lane, shape
        self.nbytes = shape[0] * shape[1]
        self.resident: Tensor | None = None
        self.host: Tensor | None = None
        self.file: SpillFile | None = None
        self.offset = 0

    def read(self, first: int, out: Tensor) -> None:
        """Copy as many pages as `out` holds, from number `first` on, to it, on whatever device it lies.

        Onto a GPU in its current stream, without waiting for that. Raises OSError where the file cannot be read.
        """
        held = self.resident  # once: another thread may be moving it, and stores it first
        held = self.host if held is None else held
        if held is not None:
            out.copy_(held[first : first + len(out)], non_blocking=True)
            return
        assert self.file is not None
        own = out if out.device.type == "cpu" else torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
        self.file.read(self.offset + first * self.shape[1], own)
        if own is not out:
            out.copy_(own, non_blocking=True)  # PyTorch uses the pinned memory again only once this is done

    def __del__(self) -> None:
        kinds = self.resident is not None, self.host is not None
        self.offload.release((self.lane, self.nbytes, *kinds, self.file, self.offset))


class Run(NamedTuple):
    """Pages of a slab, from number `first` on, which are for the rows of a buffer from `at` on."""

    slab: Slab
    first: int
    at: int
    pages: int

    def of(self, slab: Tensor) -> Tensor:
        """These pages of the slab's tensor."""
        return slab[self.first : self.first + self.pages]


Released = tuple[Lane, int, bool, bool, SpillFile | None, int]


class Offload:
    """Budgets of bytes, such as "4GiB", for pages of codes; everything else that a cache holds stays on the device.

    device_budget: of pages on the device, over all layers of all caches that are given this. host_budget: of pinned
    memory, None for no limit; it is not used on a CPU, whose pages go to the file at once. folder: for the file, which
    has no name there; None for the system's temporary folder, which may itself be memory.

    While pages are attended, two groups more of them lie on the device, one being attended and one on its way; and
    while they are written, those of one layer's chunk. A copy, deep ones included, is the same offload. It is for one
    thread that attends at a time.

    Raises ValueError for what is no size, OSError where no file can be made in `folder`.
    """

    def __init__(
        self, device_budget: int | str, host_budget: int | str | None = None, folder: str | Path | None = None
    ):
        self.device_budget = parse_size(device_budget)
        self.host_budget = None if host_budget is None else parse_size(host_budget)
        self.folder = None if folder is None else Path(folder)
        self._file = None if self.folder is None else SpillFile(self.folder)
        self.moves = 0  # slabs that have left the device
        self._bytes = {"device": 0, "host": 0, "disk": 0}
        self._lanes: WeakValueDictionary[int, Lane] = WeakValueDictionary()
        self._serials = count()
        self._lock = threading.Lock()
        self._dead: deque[Released] = deque()  # a slab may end anywhere, where the lock is held too
        self._reader = ThreadPoolExecutor(1, "kvcompress-offload")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.latest: ref[OffloadedPool] | None = None  # whose pages were attended last
        self.ahead: ref[OffloadedPool] | None = None  # some of whose pages were read before they are asked for

    def __deepcopy__(self, memo: dict[int, Any]) -> Offload:
        return self

    def __repr__(self) -> str:
        return (
            f"Offload({self.device_budget}, {self.host_budget}, {None if self.folder is None else str(self.folder)!r})"
        )

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of pages on the device, in the host's memory and on disk."""
        with self._counting():
            return dict(self._bytes)

    def lane(self) -> Lane:
        """A place for one more layer's pages."""
        lane = Lane()
        self._lanes[next(self._serials)] = lane
        return lane

    def slab_pages(self, page_bytes: int) -> int:
        """How many pages to put in a slab, so that the layers can share the budget evenly."""
        if self.device_budget < page_bytes:
            return SLAB_PAGES
        share = self.device_budget // (SHARES * max(len(self._lanes), 1))
        return min(max(share // page_bytes, 1), SLAB_PAGES)

    def place(self, lane: Lane, pages: Tensor, device: torch.device) -> Slab:
        """A slab of pages [n, page_bytes], on `device` where the budget allows; moves others to make room.

        Raises OSError, with all pages as they were, where what has to be stored cannot be.
        """
        with self._counting():
            slab = Slab(self, lane, (len(pages), pages.shape[1]))
            if slab.nbytes > self.device_budget:
                self._store(slab, pages, device)
                return slab
            self._make_room(slab.nbytes)
            own = pages.untyped_storage().nbytes() == slab.nbytes and pages.device == device
            slab.resident = pages if own else pages.to(device, copy=True)
            lane.residents[next(self._serials)] = slab
            lane.bytes += slab.nbytes
            self._bytes["device"] += slab.nbytes
            return slab

    def read(self, runs: list[Run], buffer: Tensor) -> Future[torch.cuda.Event | None]:
        """Begin to copy pages to the rows of a buffer. The future gives what tells, on a GPU, when they are there.

        The buffer must be new: what the device has been given to do may still read its memory, and is waited for.
        """
        if buffer.is_cuda and buffer.device not in self._streams:
            self._streams[buffer.device] = torch.cuda.Stream(buffer.device)
        given = torch.cuda.current_stream(buffer.device).record_event() if buffer.is_cuda else None
        return self._reader.submit(_copy, runs, buffer, self._streams.get(buffer.device), given)

    def release(self, slab: Released) -> None:
        """Give back the bytes of a slab that has ended."""
        self._dead.append(slab)
        if self._lock.acquire(blocking=False):
            try:
                self._bury()
            finally:
                self._lock.release()

    @contextmanager
    def _counting(self) -> Iterator[None]:
        with self._lock:
            self._bury()
            yield

    def _bury(self) -> None:
        while self._dead:
            lane, size, resident, host, file, offset = self._dead.popleft()
            if resident:
                lane.bytes -= size
                self._bytes["device"] -= size
            elif host:
                self._bytes["host"] -= size
            elif file is not None:
                self._bytes["disk"] -= size
                file.free(offset, size)

    def _make_room(self, size: int) -> None:
        while self._bytes["device"] + size > self.device_budget:
            self._bury()
            fullest = max(self._lanes.values(), key=lambda lane: lane.bytes)
            oldest = next(iter(fullest.residents.items()), None)  # in the order of placing
            if oldest is None:
                continue  # the last of them has ended just now, by another thread or a collector
            serial, slab = oldest
            assert slab.resident is not None
            self._store(slab, slab.resident, slab.resident.device)
            slab.resident = None
            del fullest.residents[serial]
            fullest.bytes -= slab.nbytes
            self._bytes["device"] -= slab.nbytes
            self.moves += 1

    def _store(self, slab: Slab, pages: Tensor, device: torch.device) -> None:
        room = self.host_budget is None or self._bytes["host"] + slab.nbytes <= self.host_budget
        if has_host_tier(device) and room:
            pinned = torch.empty(slab.shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            slab.host = pinned.copy_(pages)
            self._bytes["host"] += slab.nbytes
            return
        self._file = self._file or SpillFile(self.folder)
        slab.offset = self._file.write(pages.cpu().contiguous())
        slab.file = self._file
        self._bytes["disk"] += slab.nbytes


@torch.inference_mode()  # of the thread; a buffer may have been made in it, and could not be written to outside
def _copy(
    runs: list[Run], buffer: Tensor, stream: torch.cuda.Stream | None, given: torch.cuda.Event | None
) -> torch.cuda.Event | None:
    with torch.cuda.stream(stream):  # None: as it is
        if stream is not None and given is not None:
            stream.wait_event(given)
        for run in runs:
            run.slab.read(run.first, buffer[run.at : run.at + run.pages])
        copied = None if stream is None else stream.record_event()
    if copied is not None and any(run.slab.file is not None for run in runs):
        copied.synchronize()  # of this thread: what was read of the file lies in pinned memory until then
    return copied
