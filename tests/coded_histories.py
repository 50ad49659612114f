"""Histories to attend and the bound that kernels on codes are held to (tests/test_kernels_pages.py).

The bound is that of docs/design.md, invariant 5: errors are at most twice what the reference's own are when, of the
coded part, absorbed queries, what codes stand for and the softmax's weights are rounded to float16, as the kernels
round queries, weights and weights times gains. Of affine codes it is what lies above a group's zero that is rounded: as
their scales are, which queries and weights are multiplied by, while zeros are exact. FLOAT32 is added for the sums of
float32, in which exact tokens are attended; outputs are of size 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from kvcompress import reference
from kvcompress.codecs import Codec, Fit, Geometry
from kvcompress.codecs.kivi import GROUP, PerChannel, PerToken
from kvcompress.fused import Triton
from kvcompress.history import Block, History
from kvcompress.reference import Mask, Partial, Scores, Tile
from kvcompress.rope import Rope
from kvcompress.spec import CacheSpec
from kvcompress.store import PAGE, SLOTS

FLOAT32 = 2e-6
SINKS, WINDOW = 4, 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vectors(B: int, H: int, N: int, D: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys with a mean and directions of their own strengths, values with others, and their scales by head."""
    scale = torch.tensor([1.0, 30.0]).repeat(H)[:H].view(1, H, 1, 1)
    key = random(B, H, N, D, seed=seed) * torch.linspace(0.2, 2, D) + 2 * random(1, H, 1, D, seed=5)
    value = random(B, H, N, D, seed=seed + 1) * torch.linspace(2, 0.1, D) + 0.3
    return key, value * scale


def codecs(spec: str, D: int, H: int) -> tuple[Codec, Codec]:
    """Of keys and values, fitted to 64 tokens: the fewest that a page comes after."""
    layer = CacheSpec.parse(spec).layer(0, 1)
    built = layer.key.build(Geometry(D, 0, H)), layer.value.build(Geometry(D, 1, H))
    return replace(built[0], fit_tokens=64), replace(built[1], fit_tokens=64)


def empty(spec: str, D: int = 64, H: int = 1, window: int = WINDOW, **settings: object) -> History:
    key, value = codecs(spec, D, H)
    config = LlamaConfig(hidden_size=D * H, num_attention_heads=H, num_key_value_heads=H, head_dim=D)
    rotation = None if key.frame == "fixed" else Rope.of(config, D)
    return History(key, value, SINKS, window, rotation=rotation, **settings)  # type: ignore[arg-type]


def grow(history: History, B: int, H: int, N: int, D: int, real: list[int] | None = None, seed: int = 1) -> None:
    """N columns more, the last `real[row]` of them tokens; what is due is coded."""
    key, value = vectors(B, H, N, D, seed)
    history.append(key, value, real or [N] * B, random(B, 2 * H, N, D, seed=seed + 2))
    history.code()


def filled(spec: str, N: int, D: int = 64, H: int = 1, B: int = 1, pads: tuple[int, ...] = ()) -> History:
    history = empty(spec, D, H)
    grow(history, B, H, N, D, [N - pad for pad in pads] if pads else None)
    return history


@dataclass(frozen=True)
class Chunk:
    """What attends: queries and the chunk's own keys and values."""

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, history: History, G: int = 2, Q: int = 1, dtype: torch.dtype = torch.float32) -> Chunk:
        B, H, _, D = history.recent[0].shape
        key, value = vectors(B, H, Q, D, seed=11)
        return cls(random(B, H * G, Q, D, seed=10).to(dtype), key.to(dtype), value.to(dtype))


class Rounded(History):
    """A history whose absorbed queries and what whose codes stand for are as float16 holds them."""

    def __init__(self, history: History):
        vars(self).update(vars(history))

    def absorb(self, query: Tensor, fit: Fit) -> tuple[Tensor, Tensor | None]:
        absorbed, bias = super().absorb(query, fit)
        return absorbed.half().float(), bias

    def blocks(self, pages: int) -> Iterator[Block]:
        for block in super().blocks(pages):
            yield replace(block, key=self.rounded(block.key, 0), value=self.rounded(block.value, 1))

    def rounded(self, x: Tensor, side: int) -> Tensor:
        """Whole pages [B, H, T, R] of keys or values."""
        if isinstance(self.codecs[side].bands[0].quantiser, PerChannel):
            groups = x.unflatten(2, (-1, GROUP))
            zero = groups.amin(dim=3, keepdim=True)
            return (zero + (groups - zero).half().float()).flatten(2, 3)
        if isinstance(self.codecs[side].bands[0].quantiser, PerToken):
            zero = torch.cat([part.amin(dim=3, keepdim=True).expand_as(part) for part in x.split(GROUP, dim=3)], dim=3)
            return zero + (x - zero).half().float()
        return x.half().float()


class RoundedWeights(Partial):
    def add(self, scores: Tensor, values: Tensor) -> None:
        top = torch.maximum(self.top, scores.amax(dim=-1, keepdim=True))
        finite = top.masked_fill(top == -torch.inf, 0.0)
        weights, shrink = torch.exp(scores - finite).half().float(), torch.exp(self.top - finite)
        self.total = self.total * shrink + weights.sum(dim=-1, keepdim=True)
        self.sum = self.sum * shrink + weights @ values
        self.top = top


def expected(history: History, chunk: Chunk, mask: Mask, scores: Scores) -> tuple[Tensor, float]:
    """(the reference's output in float32, the bound on errors)."""
    given = [x.float() for x in (chunk.query, chunk.key, chunk.value)]
    good = reference.attend(given[0], history, given[1], given[2], mask, scores)
    codes, rounding = reference._codes, pytest.MonkeyPatch.context

    def rounded(tiles: list[Tile], history: History, scores: Scores) -> list[tuple[Tensor, Tensor]]:
        with rounding() as patch:
            patch.setattr(reference, "Partial", RoundedWeights)
            return codes(tiles, Rounded(history), scores)

    with rounding() as patch:
        patch.setattr(reference, "_codes", rounded)
        if chunk.query.dtype == torch.float16:  # weights of exact tokens too are rounded to the model's dtype
            patch.setattr(reference, "Partial", RoundedWeights)
        low = reference.attend(given[0], history, given[1], given[2], mask, scores)
    low = low.to(chunk.query.dtype).float()
    return good, 2 * float((low - good).abs().max()) + FLOAT32


def check(
    history: History,
    chunk: Chunk,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    before: tuple[Tensor, float] | None = None,
) -> None:
    """The kernels take the call and agree; before: what is expected, where it had to be computed earlier."""
    scores = Scores(chunk.query.shape[-1] ** -0.5, softcap, sinks)
    backend, own = Triton(), Mask(mask, True)
    assert backend.rejects(chunk.query, history, own, scores) is None
    good, bound = before or expected(history, chunk, own, scores)
    out = backend.attend(chunk.query, history, chunk.key, chunk.value, own, scores)
    assert (out.shape, out.dtype) == (good.shape, chunk.query.dtype)
    assert float((out.float() - good).abs().max()) <= bound


def padding(pads: tuple[int, ...], columns: int) -> Tensor:
    """The mask of left padding, bool [B, columns]."""
    return torch.arange(columns) >= torch.tensor(pads)[:, None]


def poison(history: History) -> None:
    """Make everything that no row may read what would show in its output, or stop the process.

    Gains, scales and zeros of a page's tokens beyond its fill and pages that no row has become not a number, codes
    anything; entries of the address table beyond the counts point to nowhere. A page that several rows share keeps what
    any of them counts.
    """
    table, pool = history.table, history.pool
    assert pool.layout is not None
    kept: dict[int, int] = {}
    for page, fill in zip(table.ids.flatten().tolist(), table.fill.flatten().tolist(), strict=True):
        if page >= 0:
            kept[page] = max(kept.get(page, 0), fill)
    slab_of, slot_of = (x.tolist() for x in pool.index())
    for page, (slab, slot) in enumerate(zip(slab_of, slot_of, strict=True)):
        record = pool.slabs[slab][slot : slot + 1]
        if page not in kept:
            record.fill_(255)
            continue
        for name, part in pool.layout.views(record).items():
            slots = SLOTS if name.startswith("value") else range(PAGE)
            dead = torch.tensor([token >= kept[page] for token in slots])
            if name.endswith(".gain"):
                part[..., dead] = torch.nan if part.dtype.is_floating_point else 255
            elif name.endswith((".scale", ".zero")):  # of values a token's own, of keys those of a half of the page
                dead = dead if name.startswith("value") else dead.unflatten(0, (2, -1)).all(dim=1)
                part[:, :, dead] = torch.nan
    where = history.addresses()
    for row, count in enumerate(where.held):
        where.addresses[row, count:], where.fills[row, count:], where.starts[row, count:] = 8, 99, -1
