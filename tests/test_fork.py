"""Caches that share pages and go on by themselves, and caches whose pages stay in their file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import CacheSpec, CompressedCache
from kvcompress.store import PagePool
from tests.families import build, prompt

SPEC = CacheSpec("trellis3", "lloyd2", sinks=4, window=32)
LENGTH = 300

model = lru_cache(None)(build)  # tests only read them


@torch.no_grad()
def feed(own: PreTrainedModel, cache: CompressedCache, ids: Tensor) -> Tensor:
    return own(ids, past_key_values=cache, use_cache=True).logits


def filled(own: PreTrainedModel, rows: int = 2, length: int = LENGTH) -> CompressedCache:
    cache = CompressedCache(own.config, SPEC)
    feed(own, cache, prompt(rows, length))
    return cache


def pages(count: int, number: int) -> dict[str, Tensor]:
    return {"key.codes": torch.full((count, 1, 16), number, dtype=torch.uint8)}


def test_a_fork_of_a_pool_writes_nowhere_that_the_other_reads():
    """Pages that one of them lets go of are not used again by either, those that it wrote itself later are."""
    pool = PagePool()
    first = pool.write(pages(4, 1))
    pool.collect(first[:2])  # two are free, and would be written to next
    fork = pool.fork()
    for own, number in ((pool, 2), (fork, 3)):
        own.collect(first[:1])
        assert own.free == 0
        mine = own.write(pages(2, number))
        assert own.read(mine)["key.codes"].eq(number).all()
        own.collect(torch.cat([first[:1], mine[:1]]))
        assert own.free == 1
        assert own.write(pages(1, number + 2)).tolist() == [int(mine[1])]
    for own in (pool, fork):
        assert own.read(first)["key.codes"].eq(1).all()
        assert own.slabs[0].data_ptr() == pool.slabs[0].data_ptr()


@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon_h1", "deepseek_v3"])
def test_forks_go_on_alike_and_apart(family: str):
    """A fork gives the cache's logits bit by bit, whatever the cache did in between; of a fork too."""
    own, more = model(family), prompt(2, 90, seed=1)
    cache = filled(own)
    fork = cache.fork()
    second = fork.fork()
    expected = feed(own, cache, more)
    feed(own, cache, prompt(2, 200, seed=2))
    assert torch.equal(feed(own, fork, more), expected)
    feed(own, fork, prompt(2, 70, seed=3))
    assert torch.equal(feed(own, second, more), expected)


def test_a_fork_shares_pages_and_exact_tokens():
    own = model("llama")
    cache = filled(own)
    fork = cache.fork()
    for one, other in zip(cache.layers, fork.layers, strict=True):
        assert [x.data_ptr() for x in one.history.pool.slabs] == [x.data_ptr() for x in other.history.pool.slabs]
        assert one.history.recent[0] is other.history.recent[0]
    assert fork.memory() == cache.memory()
    feed(own, fork, prompt(2, 1))
    assert (fork.stats()["fused"], cache.stats()["fused"]) == (2, 2)  # each counts its own: two layers each


def test_a_fork_for_another_models_config():
    """The attention that is in use is named by the config that a cache is made for."""
    own, twin = model("llama"), build("llama")
    fork = filled(own).fork(twin.config)
    assert all(layer.config is twin.config for layer in fork.layers)
    with pytest.raises(ValueError, match="a cache of 2 layers was to be forked for 3"):
        filled(own).fork(build("llama", num_hidden_layers=3).config)


def test_a_fork_of_crops_and_beams():
    own, more = model("llama"), prompt(3, 80, seed=1)
    cache = filled(own)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    cache.crop(-70)
    fork = cache.fork()
    expected = feed(own, cache, more)
    cache.crop(-200)
    feed(own, cache, prompt(3, 300, seed=2))
    fork.batch_select_indices(torch.tensor([0, 1, 2]))
    assert torch.equal(feed(own, fork, more), expected)


def test_no_fork_in_the_middle_of_a_forward_pass():
    own = model("llama")
    cache = filled(own)
    x = torch.randn(2, 2, 10, 8)
    cache.update(x, x, 0)
    with pytest.raises(ValueError, match="layer 0 holds 310 tokens, layer 1 300: a forward pass is under way"):
        cache.fork()


# --- pages in the file


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    filled(model("llama")).save(tmp_path / "cache")
    return tmp_path / "cache"


def mapping_of(path: Path, x: Tensor) -> bool:
    """Whether a tensor lies where the process has mapped a file."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    return any(first <= x.data_ptr() < stop for first, stop in spans)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is mapped")
@pytest.mark.parametrize("verify", [True, False])
def test_mapped_pages_stay_in_the_file(saved: Path, verify: bool):
    own, more = model("llama"), prompt(2, 90, seed=1)
    cache, whole = filled(own), saved.read_bytes()
    for mapped in (True, False):
        loaded = CompressedCache.load(saved, own.config, mapped=mapped, verify=verify)
        for layer in loaded.layers:
            assert mapping_of(saved, layer.history.pool.slabs[0]) == mapped
            assert not mapping_of(saved, layer.history.recent[0])
        assert loaded.memory().codes == cache.memory().codes  # its own share of the file's
        assert torch.equal(feed(own, loaded, more), feed(own, cache.fork(), more))
        loaded.crop(-200)
        feed(own, loaded, prompt(2, 300))  # pages that nobody names are written to: in memory, not in the file
        assert saved.read_bytes() == whole


def test_a_mapped_file_may_be_replaced_or_removed(saved: Path):
    own, more = model("llama"), prompt(2, 90, seed=1)
    expected = feed(own, filled(own), more)
    loaded = [CompressedCache.load(saved, own.config, mapped=True) for _ in range(2)]
    filled(own, length=400).save(saved)
    assert torch.equal(feed(own, loaded[0], more), expected)
    saved.unlink()
    assert torch.equal(feed(own, loaded[1], more), expected)


def test_what_is_not_verified_is_not_read(saved: Path):
    """A bit of the last page that nobody looks at: refused where the checksum is asked for."""
    own = model("llama")
    cache = CompressedCache.load(saved, own.config)
    record = cache.layers[1].history.pool.slabs[0][-1].numpy().tobytes()
    whole = bytearray(saved.read_bytes())
    whole[whole.rindex(record)] ^= 1
    saved.write_bytes(whole)
    with pytest.raises(ValueError, match="is damaged: what it holds has another checksum than it says"):
        CompressedCache.load(saved, own.config, mapped=True)
    assert CompressedCache.load(saved, own.config, mapped=True, verify=False).get_seq_length() == LENGTH


def test_only_a_cpus_memory_maps_files(saved: Path):
    with pytest.raises(ValueError, match="mapped into the memory of the CPU, the cache was to go to meta"):
        CompressedCache.load(saved, model("llama").config, "meta", mapped=True)
