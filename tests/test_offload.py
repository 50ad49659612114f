"""Pages that are not on the device: what is computed is the same, budgets hold, and no error does harm.

Logits are compared bit for bit: the torch reference attends the same numbers in the same order wherever they lay. The
kernels attend them in other groups, so theirs are compared within rounding, in a process of their own, this file again
with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import copy
import errno
import gc
import os
import subprocess
import sys
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import CacheSpec, CompressedCache, Offload, PrefixStore, page_groups, tiers, unwrap, wrap
from kvcompress import offloaded as offloaded_module
from kvcompress.history import History
from kvcompress.memory import storage_bytes
from kvcompress.offloaded import Fetch, OffloadedPool
from tests.families import build, left_padded, prompt

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, with TRITON_INTERPRET=1")
by_reference = pytest.mark.skipif(INTERPRETED, reason="is of the torch reference")

SPEC = CacheSpec("trellis3", "lloyd2", sinks=4, window=32)
LENGTH = 420  # tokens of a prompt: five pages or more for every spec here
SPECS = (
    SPEC,
    CacheSpec("exact", "exact", sinks=4, window=32),
    CacheSpec("prerope+lloyd3", "kivi2", sinks=4, window=32),
    CacheSpec("spectral3", "trellis2", sinks=0, window=32),
)

model = lru_cache(None)(build)  # tests only read them


@torch.no_grad()
def feed(own: PreTrainedModel, cache: CompressedCache, ids: Tensor, **options: Any) -> Tensor:
    return own(ids, past_key_values=cache, use_cache=True, **options).logits


def filled(
    own: PreTrainedModel, offload: Offload | None = None, rows: int = 1, spec: CacheSpec = SPEC
) -> CompressedCache:
    cache = CompressedCache(own.config, spec, offload=offload)
    feed(own, cache, prompt(rows, LENGTH))
    return cache


def pools(cache: CompressedCache) -> list[OffloadedPool]:
    found = [layer.history.pool for layer in cache.layers]
    assert all(isinstance(pool, OffloadedPool) for pool in found)
    return found


def resident_bytes(cache: CompressedCache) -> int:
    """Of the storage of all pages that are on the device."""
    slabs = [slab for pool in pools(cache) for slab in pool.places if slab is not None]
    return storage_bytes(slab.resident for slab in slabs if slab.resident is not None)


@lru_cache(None)
def page_bytes(spec: CacheSpec = SPEC) -> int:
    own, cache = model("llama"), CompressedCache(model("llama").config, spec)
    feed(own, cache, prompt(1, 2 * LENGTH))
    return int(cache.layers[0].history.pool.layout.page_bytes)


@torch.no_grad()
def journey(cache: CompressedCache, own: PreTrainedModel) -> list[Tensor]:
    """Logits of two padded rows: prefill in chunks, decoding, a crop, beams, more decoding."""
    texts = prompt(2, 2 * LENGTH)
    ids, mask = left_padded([texts[0], texts[1, : 2 * LENGTH - 77]])
    found = []
    for start in range(0, ids.shape[1], 300):
        part = slice(start, start + 300)
        seen = mask[:, : part.stop]
        positions = (seen.cumsum(1) - 1).clamp_min(0)[:, part]
        found.append(feed(own, cache, ids[:, part], attention_mask=seen, position_ids=positions))

    def step(count: int, number: int) -> None:
        nonlocal mask
        mask = torch.cat([mask, mask.new_ones(len(mask), count)], dim=1)
        positions = (mask.cumsum(1) - 1)[:, -count:]
        token = prompt(len(mask), count, seed=number)
        found.append(feed(own, cache, token, attention_mask=mask, position_ids=positions))

    for number in range(3):
        step(1, number)
    cache.crop(-150)
    mask = mask[:, :-150]
    step(70, 3)
    order = torch.tensor([1, 0, 1])
    cache.reorder_cache(order)
    mask = mask[order]
    step(1, 4)
    step(65, 5)  # of the two rows that were one, each has a page of its own now
    return found


def page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let groups be of one page of every row."""
    blocks = History.blocks
    monkeypatch.setattr(History, "blocks", lambda history, pages: blocks(history, 1))


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert [x.shape for x in found] == [x.shape for x in wanted]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@by_reference
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("pages", [0, 1, 6], ids=lambda n: f"{n} pages")
def test_logits_are_those_of_pages_on_the_device(spec: CacheSpec, pages: int, tmp_path: Path) -> None:
    own = model("llama")
    offload = Offload(pages * page_bytes(spec), folder=tmp_path)
    cache = CompressedCache(own.config, spec, offload=offload)
    plain = CompressedCache(own.config, spec)
    assert_equal(journey(cache, own), journey(plain, own))
    report = cache.memory()
    assert report.disk > 0
    assert report.host == 0
    assert (resident_bytes(cache) > 0) == (pages > 0)
    assert offload.bytes == {"device": resident_bytes(cache), "host": 0, "disk": report.disk}
    assert report.total == report.device + report.disk
    # slabs are alive as long as one of their pages is named, and their sizes differ: twice as much is far from all
    assert plain.memory().codes <= report.codes <= 2 * plain.memory().codes
    assert cache.stats() == plain.stats()


@by_reference
@pytest.mark.parametrize("pages", [0, 1, 3, 8])
def test_budget_is_never_exceeded(pages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages on the device: the budget, and two groups, one attended and one on its way; looked at at every read."""
    own = model("llama")
    budget = pages * page_bytes()
    cache = CompressedCache(own.config, SPEC, offload=Offload(budget, folder=tmp_path))
    buffers: list[weakref.ref[Tensor]] = []
    residents, staged, largest = [], [], []

    class Watched(Fetch):
        def __init__(self, ids: Tensor, buffer: Tensor, *rest: Any):
            super().__init__(ids, buffer, *rest)
            if buffer.untyped_storage().nbytes() == buffer.nbytes and rest[1] is not None:
                buffers.append(weakref.ref(buffer))
                largest.append(buffer.nbytes)
            alive = [kept for x in buffers if (kept := x()) is not None]
            residents.append(resident_bytes(cache))
            staged.append(storage_bytes(alive))

    monkeypatch.setattr(offloaded_module, "Fetch", Watched)
    page_by_page(monkeypatch)
    journey(cache, own)
    assert max(residents) <= budget
    assert (max(residents) > 0) == (pages > 0)
    assert len(largest) > 100
    assert max(staged) <= 2 * max(largest)


@by_reference
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(0, 6),
    st.lists(
        st.one_of(
            st.tuples(st.just("feed"), st.integers(1, 150)),
            st.tuples(st.just("crop"), st.integers(1, 200)),
            st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
        ),
        min_size=3,
        max_size=8,
    ),
)
def test_any_sequence(pages: int, changes: list[tuple[str, Any]]) -> None:
    own = model("llama")
    offload = Offload(pages * page_bytes())
    cache, plain = filled(own, offload, rows=2), filled(own, rows=2)
    for number, (name, value) in enumerate(changes):
        for each in (cache, plain):
            if name == "crop":
                each.crop(-min(value, each.get_seq_length()))
            elif name == "select":
                each.batch_select_indices(torch.tensor(value))
        if name == "feed":
            ids = prompt(2, value, seed=number)
            assert torch.equal(feed(own, cache, ids), feed(own, plain, ids))
        assert resident_bytes(cache) == offload.bytes["device"] <= offload.device_budget
    assert torch.equal(feed(own, cache, prompt(2, 1)), feed(own, plain, prompt(2, 1)))


@by_reference
def test_host_memory_before_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a GPU: host memory as far as its budget goes, then the file."""
    monkeypatch.setattr(tiers, "has_host_tier", lambda device: True)
    own, size = model("llama"), page_bytes()
    offload = Offload(2 * size, 4 * size, tmp_path)
    cache, plain = (CompressedCache(own.config, SPEC, offload=x) for x in (offload, None))
    assert_equal(journey(cache, own), journey(plain, own))
    report = cache.memory()
    assert 0 < report.host <= 4 * size
    assert report.disk > 0
    assert offload.bytes == {"device": resident_bytes(cache), "host": report.host, "disk": report.disk}
    assert "in the host's memory" in str(report)
    assert "on disk" in str(report)
    without = filled(own, Offload(0))
    assert (without.memory().host > 0, without.memory().disk) == (True, 0)


@by_reference
def test_forks_copies_and_files_go_on_alike(tmp_path: Path) -> None:
    own = model("llama")
    more = [prompt(1, 80, seed=1), prompt(1, 1, seed=2)]
    plain = filled(own)
    offload = Offload(3 * page_bytes(), folder=tmp_path)
    cache = filled(own, offload)
    cache.save(tmp_path / "saved")
    wanted = [feed(own, plain, ids) for ids in more]
    others = [
        cache.fork(),
        copy.deepcopy(cache),
        CompressedCache.load(tmp_path / "saved", own.config),
        CompressedCache.load(tmp_path / "saved", own.config, offload=offload),
    ]
    late = filled(own)
    late.keep_pages_in(offload)
    disks = [each.memory().disk > 0 for each in (cache, *others, late)]
    assert disks == [True, True, True, False, True, True]
    for each in (*others, late, cache):
        assert_equal([feed(own, each, ids) for ids in more], wanted)
    held = sum(resident_bytes(each) for each in (cache, others[3], late))
    assert held <= offload.bytes["device"] <= offload.device_budget
    with pytest.raises(ValueError, match="mapped"):
        CompressedCache.load(tmp_path / "saved", own.config, mapped=True, offload=offload)


@by_reference
def test_file_shrinks_and_goes_with_its_caches(tmp_path: Path) -> None:
    """It has no name from the start, so that a process that is killed leaves nothing either."""
    own, offload = model("llama"), Offload(0, folder=tmp_path)
    one, two = filled(own, offload), filled(own, offload)
    file = offload._file._file
    assert list(tmp_path.iterdir()) == []
    full = os.fstat(file.fileno()).st_size
    assert full == offload.bytes["disk"] == one.memory().disk + two.memory().disk > 0
    one.reset()
    gc.collect()
    assert offload.bytes["disk"] == two.memory().disk == full // 2
    again = filled(own, offload)
    assert os.fstat(file.fileno()).st_size == full  # the hole is used again
    assert torch.equal(feed(own, again, prompt(1, 1)), feed(own, filled(own), prompt(1, 1)))
    two.reset()
    again.reset()
    gc.collect()
    assert os.fstat(file.fileno()).st_size == 0
    del one, two, again, offload
    gc.collect()
    assert file.closed


class FullDisk:
    """A file that takes no more."""

    def __init__(self, file: Any):
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> int:
        self.file.write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@by_reference
def test_full_disk_harms_nothing(tmp_path: Path) -> None:
    own, offload = model("llama"), Offload(2 * page_bytes(), folder=tmp_path)
    cache, plain = filled(own, offload), filled(own)
    before, file = offload.bytes, offload._file
    whole, file._file = file._file, FullDisk(file._file)
    more = prompt(1, 200, seed=1)
    for _ in range(2):
        with pytest.raises(OSError, match=f"cannot be moved to a file in '{tmp_path}'.*No space left"):
            feed(own, cache, more)
        gc.collect()
        assert cache.get_seq_length() == LENGTH
        assert offload.bytes == before
    file._file = whole
    assert torch.equal(feed(own, cache, more), feed(own, plain, more))


@by_reference
def test_pages_that_cannot_be_read_harm_nothing_else(tmp_path: Path) -> None:
    own, offload = model("llama"), Offload(0, folder=tmp_path)
    cache = filled(own, offload)
    descriptor = offload._file._file.fileno()
    content = os.pread(descriptor, offload._file.size, 0)
    os.ftruncate(descriptor, 100)
    with pytest.raises(OSError, match="cut it short"):
        feed(own, cache, prompt(1, 1))
    os.pwrite(descriptor, content, 0)
    assert cache.get_seq_length() == LENGTH
    assert torch.equal(feed(own, cache, prompt(1, 1)), feed(own, filled(own), prompt(1, 1)))


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot be offloaded to the folder .*nowhere"):
        Offload(0, folder=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="as a size"):
        Offload("4 pages")
    with pytest.raises(ValueError, match="as a size"):
        Offload(0, -1)


@by_reference
def test_reading_is_ahead_of_attending(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A group is on its way before the one before it is handed out, and a layer's first before its attention begins."""
    own = model("llama")
    cache = filled(own, Offload(0, folder=tmp_path))
    page_by_page(monkeypatch)
    events: list[tuple[str, int, int]] = []
    layer_of = {id(pool): layer for layer, pool in enumerate(pools(cache))}
    begin, finish = OffloadedPool._fetch, Fetch.result
    names: dict[int, tuple[int, int]] = {}

    def begun(pool: OffloadedPool, ids: Tensor, device: torch.device) -> Fetch:
        fetch = begin(pool, ids, device)
        names[id(fetch)] = layer_of[id(pool)], int(ids[0])
        events.append(("begin", *names[id(fetch)]))
        return fetch

    def finished(fetch: Fetch) -> Tensor:
        events.append(("attend", *names[id(fetch)]))
        return finish(fetch)

    monkeypatch.setattr(OffloadedPool, "_fetch", begun)
    monkeypatch.setattr(Fetch, "result", finished)
    for _ in range(2):  # until it is known that the first layer follows the last
        feed(own, cache, prompt(1, 1))
    events.clear()
    feed(own, cache, prompt(1, 1))
    pages = [int((layer.history.table.ids >= 0).sum()) for layer in cache.layers]
    order = [(layer, page) for layer, count in enumerate(pages) for page in range(count)]
    following = [*order[1:], order[0]]  # the first layer's of the next step
    assert events == [
        event for now, then in zip(order, following, strict=True) for event in (("begin", *then), ("attend", *now))
    ]


@by_reference
def test_wrapped_models_generate_alike(tmp_path: Path) -> None:
    """With beams, with a prefix store, and where static decoding was asked for, which is refused."""
    own = build("llama")
    ids = prompt(1, LENGTH)
    calls: list[dict[str, Any]] = [
        {"max_new_tokens": 5},
        {"max_new_tokens": 4, "num_beams": 3},
        {"max_new_tokens": 20, "prompt_lookup_num_tokens": 3},  # takes back what it had guessed wrongly
    ]

    def texts(**options: Any) -> tuple[list[list[int]], CompressedCache]:
        wrap(own, SPEC, 128, **options)
        done = [own.generate(ids, return_dict_in_generate=True, do_sample=False, **call) for call in calls]
        unwrap(own)
        return [x.sequences[0].tolist() for x in done], done[0].past_key_values

    wanted, _ = texts()
    offload = Offload(2 * page_bytes(), folder=tmp_path)
    found, cache = texts(offload=offload, static=True)
    assert found == wanted
    assert cache.memory().disk > 0
    assert cache.stats()["refused: static decoding: a cache whose pages are offloaded"] == 1
    store = PrefixStore(tmp_path / "prefixes", min_tokens=100)
    first, _ = texts(offload=offload, prefix_store=store)
    store.flush()
    reopened = PrefixStore(tmp_path / "prefixes", min_tokens=100)
    again, cache = texts(offload=offload, prefix_store=reopened)
    assert first == again == wanted
    assert reopened.stats()["tokens reused"] == 4 + 5 * 64  # sinks and whole pages
    assert cache.page_offload is offload
    assert cache.memory().disk > 0


#: Kernels round queries, keys, what codes stand for and softmax weights to float16, each 2^-11 of numbers of size 1,
#: and other groups of pages round their sums otherwise: as many of these errors as reach logits, with room.
CLOSE = 2**-8
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@interpreted
@pytest.mark.parametrize(("key", "pages"), [("lloyd3", 3), ("prerope+lloyd3", 0)])
def test_kernels_attend_groups(key: str, pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_groups, "GROUP_BYTES", 1)  # a page of every row
    own, spec = build("llama", **SMALL), CacheSpec(key, "lloyd3", sinks=4, window=32)
    plain = CompressedCache(own.config, spec)
    texts = prompt(2, 300)
    ids, mask = left_padded([texts[0], texts[1, :240]])  # of four pages and of three
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    feed(own, plain, ids, attention_mask=mask, position_ids=positions)
    size = plain.layers[0].history.pool.layout.page_bytes
    mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    order = torch.tensor([1, 1, 0])
    cache = copy.deepcopy(plain)
    cache.keep_pages_in(Offload(pages * size))
    results = []
    monkeypatch.setenv("KVCOMPRESS_BACKEND", "triton")  # from here on: it takes long to encode
    for each in (plain, cache):
        each.reorder_cache(order)
        step = {"attention_mask": mask[order], "position_ids": (mask.cumsum(1) - 1)[order, -1:]}
        results.append(feed(own, each, prompt(3, 1), **step))
        assert not any(name.startswith("refused") for name in each.stats())
    assert float((results[1] - results[0]).abs().max()) <= CLOSE * float(results[0].abs().max())
    groups = pools(cache)[0].plan
    assert len(groups.stored) == 4  # columns of pages
    assert (groups.resident is not None) == (pages > 0)


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
@pytest.mark.slow  # the interpreter
def test_interpreted() -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
