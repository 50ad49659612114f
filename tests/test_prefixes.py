"""Prefixes that are stored: what goes on from them is what would be without, and budgets hold."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch

from kvcompress import CacheSpec, CompressedCache, basis
from kvcompress.fingerprint import fingerprint
from kvcompress.prefix_index import Cut, Prefix, key_of
from kvcompress.prefixes import PrefixStore
from tests.families import build, coded_pages, prompt
from tests.prefix_stores import (
    EXACT,
    LEAST,
    LENGTH,
    MORE,
    ROUNDING,
    TRELLIS,
    feed,
    files,
    filled,
    leaving,
    look_up,
    memory_only,
    model,
    on_disk,
    put,
)

# --- what is found goes on as it would without the store


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "falcon_h1"])
@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_an_entry_that_is_all_of_the_prompt_but_its_end(family: str, tier: str, tmp_path: Path):
    """Bit by bit the logits that the cache itself would have given, and the entry stays as it is."""
    own, ids = model(family), prompt(1, LENGTH + MORE)
    store = memory_only() if tier == "memory" else on_disk(tmp_path)
    cache = put(store, own, ids[:, :LENGTH])
    expected = feed(own, cache, ids[:, LENGTH:])
    for _ in range(2):
        found, tokens = look_up(store, own, ids)
        assert tokens == LENGTH
        assert torch.equal(feed(own, found, ids[:, LENGTH:]), expected)
        assert torch.equal(feed(own, found, prompt(1, 1)), feed(own, copy.deepcopy(cache), prompt(1, 1)))
    stats = store.stats()
    assert (stats["hits"], stats[f"hits: {tier}"], stats["tokens reused"]) == (2, 2, 2 * LENGTH)


def test_a_hit_copies_no_pages(tmp_path: Path):
    """The slabs of a hit are the entry's, and the entry's those of the cache that was put."""
    own, ids, store = model("llama"), prompt(1, LENGTH + MORE), memory_only()
    cache = put(store, own, ids[:, :LENGTH])
    found = [look_up(store, own, ids)[0] for _ in range(2)]
    for layer in (0, 1):
        slabs = [each.layers[layer].history.pool.slabs for each in (cache, *found)]
        assert len({tuple(slab.data_ptr() for slab in own) for own in slabs}) == 1


@pytest.mark.parametrize("shared", [LENGTH - 1, LENGTH - 30, LENGTH - 100, 300, 260, 229])
@pytest.mark.parametrize("spec", [TRELLIS, EXACT], ids=str)
def test_a_prompt_that_leaves_the_entrys_text(shared: int, spec: CacheSpec):
    """What is reused has the pages that reading the prompt alone gives, and logits that differ as codes' errors do.

    The tokens that are read again see as codes what reading the prompt at once had shown them exactly; an error of the
    same kind as that of codes at all, so the bound is the largest difference that the codes themselves make to the
    uncompressed model's logits. With exact codes that is rounding.
    """
    own, first, store = model("llama"), prompt(1, LENGTH), memory_only()
    ids = leaving(first, shared, MORE)
    put(store, own, first, spec)
    found, tokens = look_up(store, own, ids, spec)
    assert shared - 32 - 64 < tokens <= shared  # at most the window and what follows the last page is read again
    logits = feed(own, found, ids[:, tokens:])[:, -MORE:]
    alone = CompressedCache(own.config, spec)
    feed(own, alone, ids[:, :shared])
    expected = feed(own, alone, ids[:, shared:])
    uncompressed = feed(own, None, ids)[:, -MORE:]
    bound = ROUNDING if spec is EXACT else float((expected - uncompressed).abs().max())
    assert float((logits - expected).abs().max()) <= bound
    one, other = (cache.layers[0].history for cache in (found, alone))
    assert one.coded == other.coded
    ids_of = [history.table.ids[0] for history in (one, other)]
    for name, part in one.pool.read(ids_of[0]).items():
        if name.endswith(".codes"):  # of layer 0, whose keys and values depend on their own tokens alone
            assert torch.equal(part, other.pool.read(ids_of[1])[name]), name
    assert all(h.held == o.held for h, o in zip(*[[x.history for x in c.layers] for c in (found, alone)], strict=True))


@pytest.mark.parametrize("codec", ["kvquant3", "kvarn3", "trellis3/lloyd2", "prerope+lloyd3", "fp8"])
def test_every_kind_of_codec(codec: str, tmp_path: Path):
    """From disk, bit for bit: all of an entry's logits, and of one that is cut the pages of the first layer."""
    own, ids, store = model("llama", head_dim=16), prompt(1, LENGTH), on_disk(tmp_path)
    spec = CacheSpec(codec, codec, sinks=4, window=32)
    cache, more = put(store, own, ids, spec), prompt(1, MORE, seed=1)
    assert sum(cache.layers[0].history.coded) > 0
    found, tokens = look_up(store, own, torch.cat([ids, more], dim=1), spec)
    assert tokens == LENGTH
    assert torch.equal(feed(own, found, more), feed(own, cache, more))
    ids = leaving(ids, 400, MORE)
    found, tokens = look_up(store, own, ids, spec)
    feed(own, found, ids[:, tokens:])
    pages = [coded_pages(x, layer=0, row=0) for x in (found, filled(own, ids, spec))]
    assert all(torch.equal(pages[0][name], part) for name, part in pages[1].items())


def test_where_only_exact_tokens_go_nothing_changes():
    """A cache of 500 tokens has 7 pages, and so has one of 484: 4 + 32 + 7 x 64 = 484."""
    own, ids, store = model("llama"), prompt(1, LENGTH), memory_only()
    cache = put(store, own, ids)
    found, tokens = look_up(store, own, leaving(ids, 484, MORE))
    assert tokens == 484
    alone = filled(own, ids[:, :484])
    more = leaving(ids, 484, MORE)[:, 484:]
    logits = feed(own, found, more)
    cache.crop(484 - LENGTH)
    assert torch.equal(logits, feed(own, cache, more))
    torch.testing.assert_close(logits, feed(own, alone, more), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("shared", "hit"), [(132 + 64, True), (131 + 64, True), (131, False), (100, False)])
def test_what_was_learned_from_other_tokens_is_not_used(shared: int, hit: bool):
    """trellis3 learns from 128 tokens after 4 sinks: a prompt that leaves the text before their end has other codes."""
    own, store = model("llama"), memory_only(min_tokens=64)
    put(store, own, prompt(1, LENGTH))
    found, tokens = look_up(store, own, leaving(prompt(1, LENGTH), shared, 300))
    assert (found is not None) == hit
    assert tokens == (132 if hit else 0)  # 4 + 128, the pages that end before the last 32 shared tokens
    assert store.stats()["misses"] == (0 if hit else 1)


def test_before_the_fit_all_is_exact():
    """An entry that waits for its fit can be cut anywhere, and is fitted as it would have been."""
    own, ids, store = model("llama"), prompt(1, 400), memory_only(min_tokens=16)
    put(store, own, ids[:, :120])
    other = leaving(ids, 90, 300)
    found, tokens = look_up(store, own, other)
    assert tokens == 90
    alone = filled(own, other[:, :90])
    logits = [feed(own, cache, other[:, 90:]) for cache in (found, alone)]
    torch.testing.assert_close(*logits, rtol=0, atol=ROUNDING)
    assert found.layers[0].history.coded == alone.layers[0].history.coded != [0]


def test_an_entry_has_a_page_at_least():
    """It is found by the hashes of whole pages of tokens."""
    own, store, ids = model("llama"), memory_only(min_tokens=1), prompt(1, 64)
    assert not store.put("m", EXACT, ids[:, :63], filled(own, ids[:, :63], EXACT))
    assert store.put("m", EXACT, ids, filled(own, ids, EXACT))
    assert store.lookup("m", EXACT, torch.cat([ids, ids], dim=1), own.config)[1] == 64


@pytest.mark.parametrize("family", ["gemma3", "falcon_h1"])
def test_sliding_windows_and_linear_attention_cannot_be_cut(family: str):
    own, ids, store = model(family), prompt(1, LENGTH), memory_only()
    put(store, own, ids)
    assert look_up(store, own, leaving(ids, 300, 99)) == (None, 0)
    assert look_up(store, own, ids) == (None, 0)  # one token has to be left to feed


def test_the_longest_that_can_be_had_is_found():
    own, ids, store = model("llama"), prompt(1, 900), memory_only()
    for tokens in (300, 700, 500):
        put(store, own, ids[:, :tokens])
    assert look_up(store, own, ids)[1] == 700
    assert look_up(store, own, ids[:, :701])[1] == 700
    assert look_up(store, own, ids[:, :501])[1] == 500
    assert (
        look_up(store, own, leaving(ids, 290, 200))[1] == 4 + 3 * 64
    )  # cut: 290 - 32 - 4 = 254 are three pages and a rest


def test_other_weights_specs_and_tokens_are_missed(tmp_path: Path):
    own, ids = model("llama"), prompt(1, LENGTH + 1)
    store = on_disk(tmp_path)
    put(store, own, ids[:, :LENGTH])
    other = build("llama", seed=1)
    assert look_up(store, other, ids) == (None, 0)
    assert look_up(store, own, ids, CacheSpec("trellis3", "lloyd2", sinks=4, window=33)) == (None, 0)
    assert look_up(store, own, prompt(1, LENGTH + 1, seed=1)) == (None, 0)
    assert look_up(store, own, ids)[1] == LENGTH


def test_a_basis_file_counts_by_what_it_holds(tmp_path: Path):
    own, ids = model("llama"), prompt(1, LENGTH + 1)
    learned = filled(own, ids)
    layers = {
        i: basis.Basis((str(x.codecs.key), str(x.codecs.value)), x.history.fits) for i, x in enumerate(learned.layers)
    }
    file, spec = (
        tmp_path / "b.safetensors",
        CacheSpec("trellis3", "lloyd2", window=32, basis=str(tmp_path / "b.safetensors")),
    )
    basis.save(file, layers)
    store = memory_only()
    put(store, own, ids[:, :LENGTH], spec)
    assert look_up(store, own, ids, spec)[1] == LENGTH
    for each in layers.values():
        each.fits[0]["mean"].add_(1)
    basis.save(file, layers)
    os.utime(file, (1, 1))
    assert look_up(store, own, ids, spec) == (None, 0)


def test_what_a_cache_does_after_it_was_put_or_found_changes_no_entry():
    """Forks that grow by pages at once, in turns, each over pages that the others let go of."""
    own, ids, store = model("llama"), prompt(1, LENGTH), memory_only()
    cache = put(store, own, ids)
    tail = prompt(1, 200, seed=3)
    expected = feed(own, filled(own, ids), tail)
    found = look_up(store, own, torch.cat([ids, tail], dim=1))[0]
    cut = look_up(store, own, leaving(ids, 250, 50))[0]
    for step in range(3):
        for each in (cache, cut):
            feed(own, each, prompt(1, 150, seed=step))
            each.crop(-100)
            feed(own, each, prompt(1, 150, seed=10 + step))
    assert torch.equal(feed(own, found, tail), expected)
    again = look_up(store, own, torch.cat([ids, tail], dim=1))[0]
    assert torch.equal(feed(own, again, tail), expected)


# --- what is kept


def test_what_cannot_be_stored_is_passed_over():
    own, store = model("llama"), memory_only()
    two = filled(own, prompt(2, LENGTH))
    assert not store.put("m", TRELLIS, prompt(1, LENGTH), two)
    cropped = filled(own, prompt(1, LENGTH))
    cropped.crop(-100)
    assert not store.put("m", TRELLIS, prompt(1, LENGTH)[:, :-100], cropped)
    assert not store.put("m", TRELLIS, prompt(1, 99), filled(own, prompt(1, 99)))  # fewer than LEAST
    assert not store.put("m", TRELLIS, prompt(1, LENGTH), filled(own, prompt(1, LENGTH)), found=LENGTH - 99)
    stats = store.stats()
    assert stats["passed over: several rows"] == 1
    assert stats["passed over: a cache that was cropped, or records its past"] == 1
    assert stats["entries: memory"] == 0
    with pytest.raises(ValueError, match="the cache holds 500 tokens, the prompt has 499"):
        store.put("m", TRELLIS, prompt(1, LENGTH - 1), filled(own, prompt(1, LENGTH)))
    with pytest.raises(ValueError, match=r"token ids of one row, \[N\] or \[1, N\], got torch.int64 \[2, 10\]"):
        store.lookup("m", TRELLIS, prompt(2, 10), own.config)
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="min_tokens must be a positive number"):
            PrefixStore(min_tokens=wrong)


def test_memory_budget():
    own, ids = model("llama"), [prompt(1, LENGTH, seed=seed) for seed in range(4)]
    size = filled(own, ids[0]).memory().total
    store = memory_only(memory_budget=3 * size + size // 2)
    for each in ids[:3]:
        put(store, own, each)
    look_up(store, own, torch.cat([ids[0], ids[1]], dim=1))  # now the second is the one longest unused
    put(store, own, ids[3])
    assert [look_up(store, own, torch.cat([each, each], dim=1))[1] > 0 for each in ids] == [True, False, True, True]
    stats = store.stats()
    assert (stats["entries: memory"], stats["evictions: memory"]) == (3, 1)
    assert stats["bytes: memory"] == pytest.approx(3 * size, rel=0.05)
    assert not memory_only(memory_budget=size // 2).put("m", TRELLIS, ids[0], filled(own, ids[0]))


def test_disk_budget_and_last_use_across_stores(tmp_path: Path):
    own, ids = model("llama"), [prompt(1, LENGTH, seed=seed) for seed in range(5)]
    store = on_disk(tmp_path)
    for each in ids[:3]:
        put(store, own, each)
    size = files(tmp_path)[0].stat().st_size
    for age, each in enumerate(ids[:3]):  # the first was used first
        name = Prefix.of(key_of(fingerprint(own), TRELLIS), each).name(LENGTH)
        os.utime(tmp_path / f"{name}.kvprefix", (1000 + age, 1000 + age))
    other = on_disk(tmp_path, disk_budget=3 * size + size // 2)
    assert look_up(other, own, torch.cat([ids[0], ids[1]], dim=1))[1] == LENGTH  # by another process, as it were
    put(other, own, ids[3])
    assert [look_up(store, own, torch.cat([each, each], dim=1))[1] > 0 for each in ids[:4]] == [True, False, True, True]
    assert other.stats()["bytes: disk"] == sum(file.stat().st_size for file in files(tmp_path)) <= 3.5 * size
    assert other.stats()["evictions: disk"] == 1
    small = on_disk(tmp_path, disk_budget=size // 2)  # opened with less: what is too much goes at once
    assert (small.stats()["entries: disk"], small.stats()["evictions: disk"]) == (0, 3)
    put(small, own, ids[4])
    assert files(tmp_path) == []
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_a_hit_on_disk_comes_into_memory(tmp_path: Path):
    own, ids = model("llama"), prompt(1, LENGTH + 1)
    put(on_disk(tmp_path), own, ids[:, :LENGTH])
    store = PrefixStore(tmp_path, min_tokens=LEAST)
    for _ in range(3):
        look_up(store, own, ids)
    assert (store.stats()["hits: disk"], store.stats()["hits: memory"]) == (1, 2)


def test_cut_of_a_cache():
    cut = Cut.of(filled(model("llama"), prompt(1, LENGTH)))
    assert cut == Cut(LENGTH, 4, 32, ((128, 7 * 64),), True)
    assert Cut.from_json(cut.to_json()) == cut
    for wrong in (None, {}, {**cut.to_json(), "tokens": -1}, {**cut.to_json(), "layers": [[1]]}):
        with pytest.raises(ValueError, match=r"cut|counted|unpack"):
            Cut.from_json(wrong)
