"""Compressed histories to measure on: coded from random tokens, or of any length, made up without coding.

A made-up history has what a real one's codecs learned, random codes (every string of bits is a code) and the gains of
real pages over and over, in one slab as large as wanted. What codes say does not change what reading them costs.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.gpu_rows import Setup
from kvcompress.codecs import Geometry
from kvcompress.history import History
from kvcompress.rope import Rope
from kvcompress.spec import CacheSpec
from kvcompress.store import PAGE, SLOT_OF, PagePool, PageTable

SPARE = 2 * PAGE  # tokens that are coded at least


def llama(setup: Setup, layers: int = 32, vocabulary: int = 128256) -> LlamaConfig:
    """Llama 3.1 8B's config at the setup's geometry; for the smallest one, a model to match."""
    wide = setup.heads * setup.groups * setup.head_dim
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=wide,
        intermediate_size=wide * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=setup.heads * setup.groups,
        num_key_value_heads=setup.heads,
        head_dim=setup.head_dim,
        max_position_embeddings=1 << 21,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )


def tokens_like(
    setup: Setup, rows: int, tokens: int, generator: torch.Generator, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [rows, H, tokens, D] with means and unequal dimensions, as models have, and queries."""
    shape = (rows, setup.heads, tokens, setup.head_dim)
    device = setup.device
    rising = torch.linspace(0.2, 2.0, setup.head_dim, device=device)
    base = torch.randn(1, setup.heads, 1, setup.head_dim, generator=generator, device=device) * 2
    key = torch.randn(shape, generator=generator, device=device) * rising + base
    value = torch.randn(shape, generator=generator, device=device) * rising.flip(0) + 0.3
    query = torch.randn(rows, setup.heads * groups, tokens, setup.head_dim, generator=generator, device=device)
    return key.to(setup.dtype), value.to(setup.dtype), query.to(setup.dtype)


def empty(setup: Setup, spec: CacheSpec) -> History:
    """A history as a layer makes one, coded by the torch reference."""
    layer = spec.layer(0, 2)
    key, value = (
        own.build(Geometry(setup.head_dim, side, setup.heads)) for side, own in enumerate((layer.key, layer.value))
    )
    rotation = None if key.frame == "fixed" else Rope.of(llama(setup), setup.head_dim)
    return History(key, value, spec.sinks, spec.window, rotation=rotation)


def coded(
    setup: Setup, text: str, rows: int = 1, tokens: int | None = None, pads: tuple[int, ...] = (), seed: int = 0
) -> History:
    """A history of `tokens` columns of random keys and values (None: as few as make pages), pads of them padding."""
    history = empty(setup, CacheSpec.parse(text))
    if tokens is None:
        tokens = history.sinks + max(history.fit_tokens, SPARE) + history.window
    generator = torch.Generator(setup.device).manual_seed(seed)
    key, value, query = tokens_like(setup, rows, tokens, generator, setup.groups)
    real = [tokens - pad for pad in pads] or [tokens] * rows
    history.append(key, value, real, query)
    history.code()
    return history


def lengthened(source: History, rows: int, pages: int, seed: int) -> History:
    """A history like a coded one of a single row, with `rows` rows of `pages` made-up pages; exact tokens repeated."""
    return fill(copy.copy(source), source, rows, pages, seed)


def fill(history: History, source: History, rows: int, pages: int, seed: int) -> History:
    """Make `history`, of the same codecs, what `lengthened` gives."""
    history.clear()
    count = rows * pages
    history.pool = _made_up(source, count, seed)
    history.table = PageTable.empty(rows).append(torch.arange(count, dtype=torch.int32), [pages] * rows)
    exact = source.lengths[0] - source.coded[0]
    history.lengths, history.pads = [exact + pages * PAGE] * rows, [0] * rows
    history.sink = tuple(x.repeat(rows, 1, 1, 1) for x in source.sink)
    history.recent = tuple(x.repeat(rows, 1, 1, 1) for x in source.recent)
    history.queries = [source.queries[0]] * rows
    history.fits = tuple({name: x.repeat(rows, *[1] * (x.ndim - 1)) for name, x in fit.items()} for fit in source.fits)
    history.fit_of = list(range(rows))
    return history


def _made_up(source: History, count: int, seed: int) -> PagePool:
    layout = source.pool.layout
    assert layout is not None
    device = source.recent[0].device
    generator = torch.Generator(device).manual_seed(seed)
    size = (count, layout.page_bytes)
    slab = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8, device=device)
    real = source.pool.read(source.table.ids.flatten())
    turn = torch.arange(count, device=device) % len(next(iter(real.values())))
    for name, part in layout.views(slab).items():
        if not name.endswith("codes"):
            part.copy_(real[name][turn])
    return _pool(source, slab)


def _pool(source: History, slab: Tensor) -> PagePool:
    """A pool of one slab, its pages in order."""
    pool = PagePool()
    pool.layout, pool.slabs = source.pool.layout, [slab]
    pool._slab_of = torch.zeros(len(slab), dtype=torch.int64)
    pool._slot_of = torch.arange(len(slab))
    return pool


def shuffle(history: History, seed: int = 0) -> None:
    """Put the pages of a history into another order in memory."""
    slab = torch.cat(history.pool.slabs)
    order = torch.randperm(len(slab), generator=torch.Generator().manual_seed(seed))
    history.pool = _pool(history, slab[order.to(slab.device)])
    ids = history.table.ids
    place = order.argsort().to(torch.int32)
    history.table = PageTable(torch.where(ids >= 0, place[ids.clamp_min(0).long()], ids), history.table.fill)
    history._addresses = None


def poison(history: History) -> None:
    """Make NaN of the gains of tokens that pages cut short hold beyond their end, in a history that shares no pages."""
    layout = history.pool.layout
    assert layout is not None
    for row in range(len(history.lengths)):
        for page, fill in zip(history.table.ids[row].tolist(), history.table.fill[row].tolist(), strict=True):
            if not 0 < fill < PAGE:
                continue
            slab, slot = history.pool.index()[0][page], history.pool.index()[1][page]
            for name, part in layout.views(history.pool.slabs[slab][slot : slot + 1]).items():
                if name.endswith("gain"):
                    tokens = range(fill, PAGE)
                    where = list(tokens) if name.startswith("key") else [SLOT_OF[t] for t in tokens]
                    part[..., where] = 255 if part.dtype == torch.uint8 else torch.nan
