"""What tests of prefix stores have in common: a model, caches and stores that hold them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import CacheSpec, CompressedCache
from kvcompress.fingerprint import fingerprint
from kvcompress.prefixes import PrefixStore
from tests.families import build, prompt

TRELLIS = CacheSpec("trellis3", "lloyd2", sinks=4, window=32)
EXACT = CacheSpec("exact", "exact", sinks=4, window=32)
LENGTH, MORE, NEW = 500, 60, 6  # tokens: of an entry, of what follows it, of what is generated
LEAST = 100  # min_tokens
#: Of logits of size one: products of other shapes round otherwise, in float32, and two layers make more of it.
ROUNDING = 1e-4

model = lru_cache(None)(build)  # tests only read them


@torch.no_grad()
def feed(own: PreTrainedModel, cache: object, ids: Tensor) -> Tensor:
    return own(ids, past_key_values=cache, use_cache=True).logits


def filled(own: PreTrainedModel, ids: Tensor, spec: CacheSpec = TRELLIS) -> CompressedCache:
    cache = CompressedCache(own.config, spec)
    feed(own, cache, ids)
    return cache


def memory_only(**options: object) -> PrefixStore:
    return PrefixStore(**{"min_tokens": LEAST} | options)


def on_disk(folder: Path, **options: object) -> PrefixStore:
    """A store that finds on disk only."""
    return PrefixStore(folder, **{"min_tokens": LEAST, "memory_budget": 0} | options)


def put(store: PrefixStore, own: PreTrainedModel, ids: Tensor, spec: CacheSpec = TRELLIS) -> CompressedCache:
    cache = filled(own, ids, spec)
    assert store.put(fingerprint(own), spec, ids, cache)
    store.flush()
    return cache


def look_up(
    store: PrefixStore, own: PreTrainedModel, ids: Tensor, spec: CacheSpec = TRELLIS
) -> tuple[CompressedCache | None, int]:
    return store.lookup(fingerprint(own), spec, ids, own.config)


def leaving(ids: Tensor, shared: int, tokens: int) -> Tensor:
    """The first `shared` tokens of ids [1, N], and `tokens` that go on otherwise."""
    rest = prompt(1, tokens, seed=1)
    rest[0, 0] = ids[0, shared] % 100 + 3
    return torch.cat([ids[:, :shared], rest], dim=1)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kvprefix"))
