"""Processes that are killed while they write to a prefix store: what is stored is whole or not there."""

from __future__ import annotations

import itertools
import os
import random
import select
import signal
import time
from pathlib import Path

import pytest
import torch

from kvcompress import CacheSpec, CompressedCache
from kvcompress.prefix_files import STALE
from kvcompress.prefixes import PrefixStore
from tests.families import build, prompt

KILLS = 50
SPEC = CacheSpec("trellis3", "lloyd2", sinks=4, window=32)
TEXTS, LENGTH = 6, 400

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


def open_store(folder: Path, budget: int) -> PrefixStore:
    return PrefixStore(folder, disk_budget=budget, memory_budget=0, min_tokens=64)


def write(store: PrefixStore, ids: torch.Tensor, cache: CompressedCache) -> None:
    store.put("model", SPEC, ids, cache)
    store.flush()


def write_for_ever(
    folder: Path, budget: int, texts: list[torch.Tensor], caches: list[CompressedCache], ready: int
) -> None:
    """In a child, which was forked and leaves by being killed: write entry after entry, evicting others."""
    torch.set_num_threads(1)  # the parent's threads are not there
    store, first = open_store(folder, budget), random.randrange(len(texts))
    os.write(ready, b".")
    for turn in itertools.count(first):
        write(store, texts[turn % len(texts)], caches[turn % len(texts)])


def seconds_of_a_write(folder: Path, texts: list[torch.Tensor], caches: list[CompressedCache]) -> float:
    store, begun = open_store(folder, 2**30), time.perf_counter()
    for ids, cache in zip(texts, caches, strict=True):
        write(store, ids, cache)
    return (time.perf_counter() - begun) / len(texts)


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path):
    own = build("llama")
    texts = [prompt(1, LENGTH, seed=seed) for seed in range(TEXTS)]
    tail, caches = prompt(1, 5, seed=99), []
    for ids in texts:
        caches.append(CompressedCache(own.config, SPEC))
        with torch.no_grad():
            own(ids, past_key_values=caches[-1], use_cache=True)
    caches[0].save(tmp_path / "one")
    size = (tmp_path / "one").stat().st_size
    budget, folder = 3 * size + size // 2, tmp_path / "store"  # half of the texts: every other write evicts

    seconds = seconds_of_a_write(tmp_path / "timed", texts, caches)
    begun, ready = os.pipe()
    for kill in range(KILLS):
        child = os.fork()
        if child == 0:
            try:
                write_for_ever(folder, budget, texts, caches, ready)
            finally:
                os._exit(1)  # it raised: nothing of the parent's may run here
        assert select.select([begun], [], [], 60)[0], "the child has not begun after a minute"
        os.read(begun, 1)
        time.sleep(random.uniform(0, 4 * seconds))  # some leave before the first entry is whole, others after several
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"child {kill} ended by itself"
    os.close(begun), os.close(ready)
    unfinished = list(folder.glob(".*.part")) + list(folder.glob(".*.tmp"))
    assert unfinished  # some were killed while they wrote

    store, hits = open_store(folder, budget), 0
    entries = list(folder.glob("*.kvprefix"))
    assert 0 < store.stats()["bytes: disk"] == sum(file.stat().st_size for file in entries) <= budget
    for ids, cache in zip(texts, caches, strict=True):
        found, tokens = store.lookup("model", SPEC, torch.cat([ids, tail], dim=1), own.config)
        if found is not None:
            with torch.no_grad():
                logits = [own(tail, past_key_values=x, use_cache=True).logits for x in (found, cache.fork())]
            assert torch.equal(*logits)
            assert tokens == LENGTH
            hits += 1
    assert hits == len(entries)
    assert store.stats()["damaged"] == 0
    store.put("model", SPEC, texts[0], caches[0])  # nobody holds the lock any longer
    store.flush()
    assert store.lookup("model", SPEC, torch.cat([texts[0], tail], dim=1), own.config)[1] == LENGTH
    for file in unfinished:
        os.utime(file, (time.time() - STALE - 1,) * 2)
    open_store(folder, budget)
    assert not any(file.exists() for file in unfinished)
