"""How a stored prefix is found, and how much of it another prompt can go on from.

A prompt's tokens are hashed in a chain, a block of PAGE tokens after the other, from the model's weights and the spec
on. An entry is listed under the hashes of all its blocks, so the longest prefix that it shares with a new prompt is
found by as many look-ups as the prompt has blocks at most.

Where a prompt leaves an entry's text, the entry is cut. A cache of `n` tokens, all of the codecs' fit among them, holds

    sinks | P(n) = floor((n - sinks - window) / PAGE) * PAGE coded tokens | window to window + PAGE - 1 exact tokens

To cut it to `n` is exact where P stays as it is: only exact tokens go. Else tokens that would have to be exact are
there as codes only; then it is cut to `sinks + P(n)`, where pages end, and the tokens from there to `n` are read again,
which makes them the exact ones. Pages before that are those that any prompt with these first tokens has, since what is
learned comes from its first `fit_tokens` (docs/design.md, invariant 3); a cut before these is no use.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress import persist
from kvcompress.cache import CompressedCache
from kvcompress.layer import CompressedLayer
from kvcompress.spec import CacheSpec
from kvcompress.store import PAGE


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt: its tokens, int64 [N] on the CPU, and the hashes of its whole blocks, each with all before it.

    key: what prompts have to agree in beside tokens (`key_of`); root: its hash.
    """

    key: str
    ids: Tensor
    root: bytes
    blocks: tuple[bytes, ...]

    @classmethod
    def of(cls, key: str, ids: Tensor) -> Prefix:
        """Of a prompt [N] or [1, N] with a `key_of` model and spec; raises ValueError for other shapes."""
        if ids.ndim > 2 or ids.numel() != ids.shape[-1] or ids.is_floating_point():
            raise ValueError(f"a prefix is the token ids of one row, [N] or [1, N], got {ids.dtype} {list(ids.shape)}")
        ids = ids.detach().flatten().to("cpu", torch.int64)
        root = hashlib.sha256(key.encode()).digest()
        blocks, last = [], root
        for block in ids[: len(ids) // PAGE * PAGE].view(-1, PAGE):
            last = _chained(last, block)
            blocks.append(last)
        return cls(key, ids, root, tuple(blocks))

    def name(self, tokens: int) -> str:
        """What an entry of the first `tokens` tokens is called: 64 hexadecimal digits."""
        whole = tokens // PAGE
        last = self.blocks[whole - 1] if whole else self.root
        return hashlib.sha256(_chained(last, self.ids[whole * PAGE : tokens])).hexdigest()

    def shared(self, ids: Tensor) -> int:
        """How many first tokens this and another prompt [M] have in common."""
        length = min(len(ids), len(self.ids))
        apart = (ids[:length] != self.ids[:length]).nonzero()
        return int(apart[0]) if len(apart) else length


def _chained(last: bytes, ids: Tensor) -> bytes:
    return hashlib.sha256(last + ids.numpy().astype("<i8").tobytes()).digest()


def key_of(model: str, spec: CacheSpec) -> str:
    """What prompts have to agree in: a model's fingerprint and a spec, with the hash of a basis file for its name.

    And the version of saved caches, so that one never stands in another's place. Raises OSError where the spec names a
    basis file that is not there.
    """
    if spec.basis not in ("prompt", "shared"):
        path = Path(spec.basis)
        spec = replace(spec, basis=f"{_digest(path, path.stat().st_mtime_ns)}.safetensors")
    return json.dumps([persist.VERSION, model, spec.to_json()])


@lru_cache(maxsize=64)
def _digest(path: Path, changed: int) -> str:
    """Of a file's bytes, read once for every time that it was changed."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Cut:
    """What decides how an entry can be cut; see the module.

    layers: (fit_tokens, coded tokens) of the compressed layers, each pair once. croppable: whether all layers that hold
    anything are compressed ones (sliding windows and linear attention keep nothing to go back to).
    """

    tokens: int
    sinks: int
    window: int
    layers: tuple[tuple[int, int], ...]
    croppable: bool

    @classmethod
    def of(cls, cache: CompressedCache) -> Cut:
        """Of a cache that holds one prompt; raises ValueError for one that cannot be stored, saying why."""
        if cache.group is not None:
            raise ValueError("a context that ranks hold together")
        tokens, spec, layers, croppable = cache.get_seq_length(), cache.spec, set(), True
        if not tokens:
            raise ValueError("a cache without tokens")
        for layer in cache.layers:
            if isinstance(layer, CompressedLayer):
                layer.settle()
                layers.add(_state_of(layer, tokens))
            croppable &= type(layer) is CompressedLayer or type(layer).__name__ == "DummyLayer"
        return cls(tokens, spec.sinks, spec.window, tuple(sorted(layers)), croppable)

    def reusable(self, common: int) -> int:
        """Of the first `common` tokens that a prompt shares with the entry, how many it can go on from; 0: none."""
        if common >= self.tokens:
            return self.tokens
        if not self.croppable:
            return 0
        if all(self._coded_at(common, fit_tokens) == coded for fit_tokens, coded in self.layers):
            return common
        pages = (common - self.sinks - self.window) // PAGE * PAGE
        whole = all(
            fit_tokens <= pages <= coded or self._coded_at(self.sinks + pages, fit_tokens) == coded
            for fit_tokens, coded in self.layers
        )
        return self.sinks + pages if pages > 0 and whole else 0

    def _coded_at(self, tokens: int, fit_tokens: int) -> int:
        return _coded(tokens, self.sinks, self.window, fit_tokens)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Cut:
        """The inverse of `to_json`; raises ValueError for anything else."""
        try:
            layers = tuple((fit, coded) for fit, coded in content["layers"])
            tokens, sinks, window = (content[name] for name in ("tokens", "sinks", "window"))
            if not all(type(n) is int and n >= 0 for n in (tokens, sinks, window, *chain.from_iterable(layers))):
                raise ValueError(f"tokens are counted by whole numbers, got {reprlib.repr(content)}")
            return cls(tokens, sinks, window, layers, content["croppable"] is True)
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"it does not say how it can be cut: {error!r}") from error


def _coded(tokens: int, sinks: int, window: int, fit_tokens: int) -> int:
    """The coded tokens of a row of so many; see `kvcompress.history` for the rule."""
    return 0 if tokens < sinks + fit_tokens else max(tokens - sinks - window, 0) // PAGE * PAGE


def _state_of(layer: CompressedLayer, tokens: int) -> tuple[int, int]:
    """(fit_tokens, coded tokens) of a layer that holds a prompt of so many; raises ValueError for any other state."""
    history = layer.history
    if history is None or len(history.lengths) != 1:
        raise ValueError("several rows")
    if history.pads != [0] or history.lengths != [tokens]:
        raise ValueError("padding")
    coded = history.coded[0]
    whole = bool((history.table.fill == PAGE).all())
    if not whole or coded != _coded(tokens, history.sinks, history.window, history.fit_tokens):
        raise ValueError("a cache that was cropped, or records its past")
    return history.fit_tokens, coded


class Index:
    """Entries by name, listed under their blocks' hashes."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tuple[bytes, ...], Cut]] = {}
        self._at: dict[bytes, dict[str, None]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> list[str]:
        return list(self._entries)

    def add(self, name: str, blocks: Iterable[bytes], cut: Cut) -> None:
        """List an entry; one that is listed already stays as it is."""
        if name not in self._entries:
            self._entries[name] = (tuple(blocks), cut)
            for block in self._entries[name][0]:
                self._at.setdefault(block, {})[name] = None

    def remove(self, name: str) -> None:
        blocks, _ = self._entries.pop(name, ((), None))
        for block in blocks:
            self._at[block].pop(name)
            if not self._at[block]:
                del self._at[block]

    def best(self, prompt: Prefix) -> tuple[str, int] | None:
        """The entry that most of the prompt's tokens can be had from, and how many at least; one token is left to read.

        The entry's own tokens may show that it shares some more, less than a block.
        """
        found: tuple[str, int] | None = None
        most, seen = len(prompt.ids) - 1, set()
        for count in range(len(prompt.blocks), 0, -1):
            if found is not None and found[1] >= (count + 1) * PAGE:
                break  # nothing here shares as much
            for name in self._at.get(prompt.blocks[count - 1], ()):
                if name not in seen:
                    seen.add(name)
                    tokens = self._reusable(name, prompt, min(count * PAGE, most), most)
                    if tokens > (found[1] if found else 0):
                        found = name, tokens
        return found

    def _reusable(self, name: str, prompt: Prefix, common: int, most: int) -> int:
        _, cut = self._entries[name]
        if common < cut.tokens <= min(most, common + PAGE) and prompt.name(cut.tokens) == name:
            common = cut.tokens  # all of it
        return cut.reusable(common)
