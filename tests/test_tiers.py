"""What offloads and their files keep count of (kvcompress/tiers.py, kvcompress/spill.py), where no model is needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress import CompressedCache, Offload
from kvcompress.spill import SpillFile
from tests.families import build, prompt

CPU = torch.device("cpu")


def pages(count: int, value: int = 0) -> torch.Tensor:
    return torch.full((count, 100), value, dtype=torch.uint8)


def test_a_slab_that_ends_while_room_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes still count, and it can no longer be moved: another thread, or the collector, came in between."""
    offload = Offload(1000)
    held = [offload.place(offload.lane(), pages(10), CPU)]
    bury = offload._bury

    def buried() -> None:
        bury()
        held.clear()

    monkeypatch.setattr(offload, "_bury", buried)
    slab = offload.place(offload.lane(), pages(10), CPU)
    assert slab.resident is not None
    assert offload.bytes == {"device": 1000, "host": 0, "disk": 0}
    assert offload.moves == 0


@torch.no_grad()
def test_one_group_waits_however_many_caches_there_are() -> None:
    """What a layer's pool has read ahead is let go of once another's is: one group for all caches, not one each."""
    own, offload = build("llama"), Offload(0)
    caches = [CompressedCache(own.config, "trellis3,window=32", offload=offload) for _ in range(3)]
    for cache in caches:
        for length in (300, 1, 1, 1):
            own(prompt(1, length), past_key_values=cache)
    waiting = [layer.history.pool._ahead is not None for cache in caches for layer in cache.layers]
    assert sum(waiting) == 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(1, 5), st.integers(-6, -1)), max_size=40))
def test_a_file_keeps_what_was_not_freed(changes: list[int]) -> None:
    """Numbers above 0: write so many pages; below: free one of those written. Holes are joined and used again."""
    file, held = SpillFile(None), []
    for number, change in enumerate(changes):
        if change > 0:
            held.append((file.write(pages(change, number)), change, number))
        elif held:
            offset, count, _ = held.pop(change % len(held))
            file.free(offset, 100 * count)
        used = 100 * sum(count for _, count, _ in held)
        assert used == file.size - sum(length for _, length in file._holes)
        for offset, count, value in held:
            out = torch.empty(count, 100, dtype=torch.uint8)
            file.read(offset, out)
            assert torch.equal(out, pages(count, value))
    for offset, count, _ in held:
        file.free(offset, 100 * count)
    assert (file.size, file._holes) == (0, [])
