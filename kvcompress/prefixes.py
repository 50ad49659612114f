"""Compressed prefixes of prompts, so that a long system prompt or document is read by a model once and used again.

    store = PrefixStore("prefixes")
    model = wrap(model, "spectral3", prefix_store=store)     # `generate` looks prompts up and puts them in
    store.stats()

A store keeps caches in memory and, with a folder, on disk for other processes and later ones; each is held to its
budget, the longest unused going first. What a prompt shares with an entry need not be all of it
(kvcompress/prefix_index.py says how an entry is cut). A hit copies no pages: it is a fork of the entry.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kvcompress.cache import CompressedCache
from kvcompress.prefix_files import PrefixFiles
from kvcompress.prefix_index import Cut, Index, Prefix, key_of
from kvcompress.spec import CacheSpec
from kvcompress.units import parse_size

logger = logging.getLogger(__name__)

MEMORY, DISK = "memory", "disk"


@dataclass(frozen=True)
class _Entry:
    """A cache in memory that nobody feeds, its prompt, how it can be cut, and the bytes of what it keeps alive."""

    cache: CompressedCache
    prompt: Prefix
    cut: Cut
    size: int

    @classmethod
    def of(cls, cache: CompressedCache, prompt: Prefix) -> _Entry:
        """Raises ValueError for a cache that cannot be stored."""
        return cls(cache, prompt, Cut.of(cache), cache.memory().total)


class PrefixStore:
    """See the module. Any thread may use it, one at a time; a forked process makes its own. A copy is the same store.

    folder: where entries are kept on disk, None: nowhere. disk_budget, memory_budget: bytes, or strings such as
    "20GiB"; what an entry in memory shares with others, or with a cache in use, is counted for each. min_tokens: of an
    entry at least, beyond what was found, and of a hit; an entry has a page's tokens too, which it is found by.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        disk_budget: int | str = "20GiB",
        memory_budget: int | str = "2GiB",
        min_tokens: int = 1024,
    ):
        if not isinstance(min_tokens, int) or isinstance(min_tokens, bool) or min_tokens < 1:
            raise ValueError(f"min_tokens must be a positive number of tokens, got {min_tokens!r}")
        self.min_tokens, self.memory_budget = min_tokens, parse_size(memory_budget)
        self._files = None if folder is None else PrefixFiles(Path(folder).expanduser(), parse_size(disk_budget))
        self._memory: OrderedDict[str, _Entry] = OrderedDict()  # the one used last at the end
        self._index = Index()
        self._counts: Counter[str] = Counter()
        self._lock = RLock()
        self._writer = ThreadPoolExecutor(1, "kvcompress-prefixes")
        self._writing: Future[None] | None = None

    def __deepcopy__(self, memo: object) -> PrefixStore:
        return self  # a copy of a wrapped model goes on with its store

    def lookup(
        self,
        fingerprint: str,
        spec: CacheSpec | str,
        ids: Tensor,
        config: PreTrainedConfig,
        device: torch.device | str | None = None,
    ) -> tuple[CompressedCache | None, int]:
        """A cache that holds the first tokens of a prompt [N] or [1, N], and how many; (None, 0) where there is none.

        At least one token is left to be fed. fingerprint: of the model (`kvcompress.fingerprint`), whose config and
        device these are; device None: where the entry lies, on the CPU or the device that it was made on.
        """
        prompt = Prefix.of(key_of(fingerprint, CacheSpec.parse(spec)), ids)
        for name, place in self._candidates(prompt):
            entry = self._taken(name, place, config)
            if entry is None:
                continue
            tokens = entry.cut.reusable(min(prompt.shared(entry.prompt.ids), len(prompt.ids) - 1))
            if tokens >= self.min_tokens:
                cache = entry.cache.fork(config)
                _place(cache, device)
                if tokens < entry.cut.tokens:  # layers that cannot be cropped refuse to be cropped by nothing too
                    cache.crop(tokens - entry.cut.tokens)
                with self._lock:
                    self._counts.update({"hits": 1, f"hits: {place}": 1, "tokens reused": tokens})
                return cache, tokens
        with self._lock:
            self._counts["misses"] += 1
        return None, 0

    def put(self, fingerprint: str, spec: CacheSpec | str, ids: Tensor, cache: CompressedCache, found: int = 0) -> bool:
        """Keep what a cache holds of a prompt [N] or [1, N], all of it and nothing else; the cache may go on.

        found: its first tokens that came from the store. Returns whether it is kept: not where it has fewer than
        `min_tokens` tokens beyond `found`, or than a page, several rows, padding, or was cropped, which is counted. To
        disk it is written in the background (`flush` waits). Raises ValueError where cache and prompt are of different
        lengths.
        """
        prompt = Prefix.of(key_of(fingerprint, CacheSpec.parse(spec)), ids)
        if cache.get_seq_length() != len(prompt.ids):
            raise ValueError(f"the cache holds {cache.get_seq_length()} tokens, the prompt has {len(prompt.ids)}")
        if len(prompt.ids) - found < self.min_tokens or not prompt.blocks:
            return False
        try:
            Cut.of(cache)
            kept = cache.fork()
        except ValueError as error:
            self.pass_over(str(error))
            return False
        for layer in kept.layers:
            layer.offload()
        name, entry = prompt.name(len(prompt.ids)), _Entry.of(kept, prompt)
        with self._lock:
            self._remember(name, entry)
        if self._files is not None:
            self.flush()  # one entry is under way at a time: what waits takes memory
            self._writing = self._writer.submit(self._write, self._files, name, entry)
        return self._files is not None or name in self._memory

    def pass_over(self, reason: str) -> None:
        """Count a prompt that the store is not used for, and log the first time that it is for this reason."""
        with self._lock:
            self._counts[f"passed over: {reason}"] += 1
            first = self._counts[f"passed over: {reason}"] == 1
        if first:
            logger.warning("the prefix store passes over a prompt: %s", reason)

    def flush(self) -> None:
        """Wait until all that was put is on disk."""
        writing = self._writing
        if writing is not None:
            writing.result()

    def stats(self) -> dict[str, int]:
        """What is kept, and what was found so far in this process.

        hits, by tier, misses, tokens reused; entries, bytes: kept, by tier; evictions; damaged: files that were removed
        since their checksums did not fit; failed: entries that could not be written; `passed over: REASON`.
        """
        with self._lock:
            sizes = {} if self._files is None else self._files.sizes()
            evicted, damaged = (0, 0) if self._files is None else (self._files.evictions, self._files.damaged)
            names = ("hits", f"hits: {MEMORY}", f"hits: {DISK}", "misses", "tokens reused")
            return {
                **{name: self._counts[name] for name in names},
                f"entries: {MEMORY}": len(self._memory),
                f"entries: {DISK}": len(sizes),
                f"bytes: {MEMORY}": self._bytes(),
                f"bytes: {DISK}": sum(sizes.values()),
                f"evictions: {MEMORY}": self._counts["evictions"],
                f"evictions: {DISK}": evicted,
                "damaged": damaged,
                "failed": self._counts["failed"],
                **{name: count for name, count in sorted(self._counts.items()) if name.startswith("passed over: ")},
            }

    def _candidates(self, prompt: Prefix) -> Iterator[tuple[str, str]]:
        """Names of entries and their tier, the one that most can be had from first, in memory before on disk."""
        with self._lock:
            found = [(self._index.best(prompt), MEMORY)]
            if self._files is not None:
                self._files.scan()
                found.append((self._files.index.best(prompt), DISK))
        known = [(best, place) for best, place in found if best is not None]
        for (name, _), place in sorted(known, key=lambda item: -item[0][1]):
            yield name, place

    def _taken(self, name: str, place: str, config: PreTrainedConfig) -> _Entry | None:
        """An entry of a tier, now the one used last; from disk it comes into memory. None where it is gone."""
        with self._lock:
            if self._files is not None:
                self._files.touch(name)
            if name in self._memory:
                self._memory.move_to_end(name)
                return self._memory[name]
            if place == MEMORY or self._files is None:
                return None
            loaded = self._files.load(name, config)
            if loaded is None:
                return None
            entry = _Entry.of(*loaded)
            self._remember(name, entry)
            return entry

    def _remember(self, name: str, entry: _Entry) -> None:
        """Keep an entry in memory as the one used last, unless it is too large; others may have to go."""
        if entry.size > self.memory_budget:
            return
        self._memory[name] = entry
        self._memory.move_to_end(name)
        self._index.add(name, entry.prompt.blocks, entry.cut)
        while self._bytes() > self.memory_budget:
            oldest, _ = self._memory.popitem(last=False)
            self._index.remove(oldest)
            self._counts["evictions"] += 1

    def _bytes(self) -> int:
        return sum(entry.size for entry in self._memory.values())

    def _write(self, files: PrefixFiles, name: str, entry: _Entry) -> None:
        try:
            files.put(name, entry.cache, entry.prompt, entry.cut)
        except Exception as error:  # a full disk or memory: not the business of whoever puts the next one
            logger.warning("a prefix could not be written to %s: %r", files.folder, error)
            with self._lock:
                self._counts["failed"] += 1


def _place(cache: CompressedCache, device: torch.device | str | None) -> None:
    """Bring a cache's layers to a device, None: each to its own; nothing is copied that is there already."""
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if getattr(layer, "device", None) is not None and device is not None:
            layer.device = torch.device(device)
        layer.prefetch()
