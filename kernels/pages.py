"""Attention over pages of codes: split-KV, a page at a time, expanded in registers.

A program takes one tile of query rows of one KV head and the pages of one split. Keys are never rebuilt: `absorb` has
multiplied the queries by the keys' synthesis, so scores are products with what the codes stand for, band by band, times
the bands' gains. Likewise the weights times a value band's gains multiply what its codes stand for, and the synthesis
of values is applied once, to the sums. See `unpack` for the order of rows and columns in tiles: row n = 8 i + g of the
scores is token 8 g + i of the page.

Results are partial: out fp32 [B, H, splits, rows, D], each a weighted mean, and the natural log-sum-exp of its scores
[B, H, splits, rows]; zero and -inf where a split has no tokens. `merge` puts them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .absorb import Absorbed, tile_rows
from .affine_keys import channel_product, query_words
from .affine_values import lift_of, weights_of_group, words_of_weights, zeros_of_groups
from .device import describe
from .layout import BandLayout, GainKind, Kind, LevelTable, TrellisTable
from .ptx import AFFINE, DIGEST
from .ptx import version as ptx_version
from .segments import BY_CHANNEL, BY_TOKEN, Plan, plan
from .softmax import LN_2, LOG2E, capped
from .tiles import key_numbers, value_numbers
from .unpack import entry
from .variant import ARCHS, Variant
from .weighting import (
    count_of,
    gains,
    means,
    order_of_page,
    store_sums,
    value_scales,
    weights_of_band,
    zero_sums,
)

PROGRAMS = 10  # a multiprocessor: as many programs of one warp as its registers hold
FEWEST = 4  # pages of a split
AFFINE_KINDS: tuple[Kind, ...] = ("affine_channel", "affine_token")
_AFFINE, _BY_CHANNEL, _BY_TOKEN = tl.constexpr(AFFINE), tl.constexpr(BY_CHANNEL), tl.constexpr(BY_TOKEN)


@dataclass(frozen=True)
class Table:
    """Where rows' pages lie (kvcompress/addresses.py): addresses int64, starts and fills int32 [B, capacity], counts
    int32 [B]; most: at least the largest count.
    """

    addresses: Tensor
    starts: Tensor
    fills: Tensor
    counts: Tensor
    most: int


@triton.jit
def query_part(Q, m, rows, R: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr):
    return tl.load(Q + m[None, :] * R + AT + tl.arange(0, WIDTH)[:, None], (m < rows)[None, :], 0.0)


@triton.jit
def queries(Q, m, rows, R: tl.constexpr, KS: tl.constexpr):
    """The absorbed queries, a tile [16 N, M] for every segment of the keys; `query_words` where these are affine."""
    result = ()
    for i in tl.static_range(len(KS)):
        if entry(KS, i, 4) == _AFFINE:
            result = result + (query_words(Q, m, rows, R, entry(KS, i, 8), entry(KS, i, 3)),)
        else:
            result = result + (query_part(Q, m, rows, R, entry(KS, i, 8), 16 * entry(KS, i, 3)),)
    return result


@triton.jit
def band_product(q, offsets, base, head, BAND: tl.constexpr, KS: tl.constexpr, PTX: tl.constexpr):
    """The numbers of one band times the queries less their offset, float32 [64, M]."""
    chosen = tl.where(tl.arange(0, 16) // 2 == BAND, 2.0**-24, 0.0).to(tl.float16)
    product = tl.dot(tl.broadcast_to(chosen[None, :], [64, 16]), offsets)
    for i in tl.static_range(len(KS)):
        if entry(KS, i, 0) == BAND:
            numbers = key_numbers(base, head, KS, i, PTX)
            product = tl.dot(numbers, q[i], product)
    return product


@triton.jit
def scores_of(q, offsets, scale, base, head, token, live, fill, known, KS: tl.constexpr, KB: tl.constexpr,
              PTX: tl.constexpr):  # fmt: skip
    """Scores of a page [64, M] in the order of `token`, without the mean's part."""
    total = tl.where(live, 0.0, float("-inf"))[:, None]
    for b in tl.static_range(len(KB)):
        if entry(KB, b, 1) == _BY_CHANNEL:
            total = channel_product(q, base, head, fill, offsets.shape[1], b, KS, KB, PTX) * scale + total
        else:
            gain = gains(base, head, token, live, known, KB, b) * (scale * entry(KB, b, 2))
            total = band_product(q, offsets, base, head, b, KS, PTX) * gain[:, None] + total
    return total


@triton.jit
def add_values(sums, counts, weights, shrink, value_scale, lift, base, head, slot, live, fill, known, VS: tl.constexpr,
               VB: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """(sums of a page's numbers, counts), joined to those before it, which shrink.

    Counts [16, M] are a band's sums of weights, all rows the same; of affine values those of the first group are, in
    the rows of the groups, what the weights make of their zeros, and those of the others are not used.
    """
    halves = ()
    counted = ()
    words = words_of_weights(weights)
    for b in tl.static_range(len(VB)):
        if entry(VB, b, 1) == _BY_TOKEN:
            half = weights_of_group(words, lift, base, head, b, VB, PTX)
            count = counts[b]
            if entry(VB, b, 8) == 0:
                count = tl.dot(zeros_of_groups(base, head, fill, b, VB), weights, count * shrink[None, :])
        else:
            half = weights_of_band(weights, value_scale[b], base, head, slot, live, known, b, VB, PTX)
            count = tl.dot(tl.full([16, 64], 1.0, tl.float16), half, counts[b] * shrink[None, :])
        halves = halves + (half,)
        counted = counted + (count,)
    result = ()
    for i in tl.static_range(len(VS)):
        numbers = value_numbers(base, head, VS, i, PTX)
        result = result + (tl.dot(numbers, halves[entry(VS, i, 0)], sums[i] * shrink[None, :]),)
    return result, counted


@triton.jit
def offsets_of(Offsets, m, rows):
    """[16, M]: rows 2b and 2b + 1 add up to what the offset of band b's numbers takes off products, in units 2^-24."""
    return tl.load(Offsets + m[None, :] * 16 + tl.arange(0, 16)[:, None], (m < rows)[None, :], 0.0)


@triton.jit
def visit(
    page, state, q, offsets, scale, bias, value_scale, lift, table, fills, starts, mask, pad, softcap, head, token,
    slot, gain_of, KS: tl.constexpr, KB: tl.constexpr, VS: tl.constexpr, VB: tl.constexpr, MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The state of a softmax-weighted sum after one page more."""
    top, total, sums, counts = state
    base = tl.load(table + page)
    fill = tl.load(fills + page)
    live = token < fill
    if MASKED:
        live = live & (tl.load(mask + pad + tl.load(starts + page) + token, live, 0) != 0)
    scores = scores_of(q, offsets, scale, base, head, token, live, fill, gain_of, KS, KB, PTX)
    if SOFTCAP:
        scores = capped(scores + bias[None, :], 1.0 / softcap, True) * (softcap * LOG2E)
        scores = tl.where(live[:, None], scores, float("-inf"))
        known = tl.maximum(top, tl.max(scores, 0))
        weights = tl.exp2(scores - (known - lift)[None, :])
    else:
        known = tl.maximum(top, tl.max(scores, 0) + bias)
        weights = tl.exp2(scores - (known - bias - lift)[None, :])
    shrink = tl.exp2(top - known)
    half = weights.to(tl.float16)
    total = tl.dot(tl.full([16, 64], 1.0, tl.float16), half, total * shrink[None, :])
    sums, counts = add_values(
        sums, counts, half, shrink, value_scale, lift, base, head, slot, live, fill, gain_of, VS, VB, PTX
    )  # fmt: skip
    return known, total, sums, counts


@triton.jit
def pages_kernel(
    Q, Scale, Bias, Offsets, q_pages,
    Table, Fills, Starts, Counts, table_row, Mask, mask_row, Pads, gain_of,
    Out, Lse,
    rows, heads, splits, softcap,
    R: tl.constexpr, RV: tl.constexpr, M: tl.constexpr,
    KS: tl.constexpr, KB: tl.constexpr, VS: tl.constexpr, VB: tl.constexpr,
    PER_PAGE: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, KEY_MEAN: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    split, head, at = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(rows, M)
    row, tile = at // tiles, at % tiles
    m = tile * M + tl.arange(0, M)
    token, slot = order_of_page()
    count = tl.load(Counts + row)
    share = tl.cdiv(count, splits)
    first = split * share
    last = tl.minimum(first + share, count)
    place = (row.to(tl.int64) * heads + head) * q_pages
    if not PER_PAGE:
        q = queries(Q + place * rows * R, m, rows, R, KS)
        offsets = offsets_of(Offsets + place * rows * 16, m, rows)
        scale = tl.load(Scale + place * tiles + tile)
        bias = tl.load(Bias + place * rows + m, m < rows, 0.0) if KEY_MEAN else tl.zeros([M], tl.float32)
    table = Table + row.to(tl.int64) * table_row
    fills = Fills + row.to(tl.int64) * table_row
    starts = Starts + row.to(tl.int64) * table_row
    mask = Mask + row.to(tl.int64) * mask_row
    pad = tl.load(Pads + row) if MASKED else 0
    counts = ()
    for _ in tl.static_range(len(VB)):
        counts = counts + (tl.zeros([16, M], tl.float32),)
    state = (tl.full([M], -1.0e30, tl.float32), tl.zeros([16, M], tl.float32), zero_sums(M, VS), counts)
    own = tl.minimum(first, tl.maximum(count - 1, 0))
    held = token < tl.where(first < last, tl.load(fills + own), 0)  # nothing is read where the split has no pages
    value_scale = value_scales(tl.load(table + own), head, slot, held, gain_of, VB)
    lift = lift_of(tl.load(table + own), head, slot, held, gain_of, VB)
    for page in tl.range(first, last):
        if PER_PAGE:
            here = place + page
            q = queries(Q + here * rows * R, m, rows, R, KS)
            offsets = offsets_of(Offsets + here * rows * 16, m, rows)
            scale = tl.load(Scale + here * tiles + tile)
            bias = tl.load(Bias + here * rows + m, m < rows, 0.0) if KEY_MEAN else tl.zeros([M], tl.float32)
        state = visit(
            page, state, q, offsets, scale, bias, value_scale, lift, table, fills, starts, mask, pad, softcap, head,
            token, slot, gain_of, KS, KB, VS, VB, MASKED, SOFTCAP, PTX,
        )  # fmt: skip
    top, total, sums, counts = state
    total = tl.max(total, 0)
    seen = total > 0
    to = (row.to(tl.int64) * heads + head) * splits + split
    for i in tl.static_range(len(VS)):
        mean = means(
            sums[i],
            count_of(counts, entry(VS, i, 0), VB),
            value_scale[entry(VS, i, 0)],
            tl.where(seen, total, 1.0),
            VB,
            entry(VS, i, 0),
        )
        store_sums(Out + to * rows * RV, mean, m, rows, RV, entry(VS, i, 8), 16 * entry(VS, i, 3))
    lse = tl.where(seen, (top - lift + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(Lse + to * rows + m, lse, m < rows)


def attend_pages(
    absorbed: Absorbed, table: Table, keys: Plan, values: Plan, gains_of_bytes: Tensor, softcap: float | None = None,
    mask: tuple[Tensor, Tensor] | None = None, splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Partial attention over pages: (means float32 [B, H, splits, rows, rank], log-sum-exp [B, H, splits, rows]).

    Means are of what the values' codes stand for, in the order of `values.values`. absorbed: with P = 1 or as many
    pages as the longest row has. gains_of_bytes: float32 [256]. mask: (bool [B, columns] of real tokens, int32 [B] of
    columns before each row's first). splits: parts that a row's pages are shared out to; None: as many as fill the
    device.
    """
    rows_of, heads, pages, rows, rank = absorbed.queries.shape
    device = absorbed.queries.device
    tile = tile_rows(rows, describe(device))
    tiles = triton.cdiv(rows, tile)
    if splits is None:
        splits = split_count(rows_of * heads * tiles, table.most, describe(device).multiprocessors)
    out = torch.empty(rows_of, heads, splits, rows, values.rank, dtype=torch.float32, device=device)
    lse = torch.empty(rows_of, heads, splits, rows, dtype=torch.float32, device=device)
    seen, pads = mask if mask is not None else (table.fills, table.counts)
    pages_kernel[(splits, heads, rows_of * tiles)](
        absorbed.queries, absorbed.scale, absorbed.bias, absorbed.offsets, pages,
        table.addresses, table.fills, table.starts, table.counts, table.addresses.stride(0),
        seen.view(torch.int8) if mask is not None else seen, seen.stride(0), pads, gains_of_bytes, out, lse,
        rows, heads, splits, softcap or 0.0,
        R=rank, RV=values.rank, M=tile, KS=keys.segments, KB=keys.bands, VS=values.segments, VB=values.bands,
        PER_PAGE=absorbed.per_page, MASKED=mask is not None, SOFTCAP=softcap is not None,
        KEY_MEAN=absorbed.bias.numel() > 0, PTX=ptx_version(device),
        num_warps=1 if tile <= 16 else 4, num_stages=1,
    )  # fmt: skip
    return out, lse


def split_count(programs: int, pages: int, multiprocessors: int) -> int:
    """Splits that give every multiprocessor about PROGRAMS programs, none of them fewer than FEWEST pages."""
    return max(1, min(-(-multiprocessors * PROGRAMS // programs), -(-pages // FEWEST)))


def variants() -> list[Variant]:
    """Decoding with 4 query heads a KV head at head_dim 128; `spectral3` with queries absorbed page by page.

    The tables' entries are examples: no instruction depends on them.
    """
    three = TrellisTable(tuple(tuple(range(first, first + 8)) for first in (0, 8, 16)), 10.0, 0.1)
    five = *range(100, 116), *range(140, 156)

    def lloyd(start: int, width: int, bits: int, gain: GainKind = "half") -> BandLayout:
        grid = five if bits == 5 else tuple(range(2**bits))
        return BandLayout(start, width, "lloyd", bits, gain, table=LevelTable(grid, grid[1:], grid, 1.0, 3.5))

    def trellis(start: int, width: int, bits: int, gain: GainKind = "log") -> BandLayout:
        return BandLayout(start, width, "trellis", bits, gain, table=three)

    bands: dict[str, tuple[BandLayout, ...]] = {
        **{f"trellis{n}": (trellis(0, 128, n, "half"),) for n in (2, 3, 4)},
        **{f"lloyd{n}": (lloyd(0, 128, n),) for n in (3, 4, 5)},
        "spectral3": (trellis(0, 32, 4), trellis(32, 64, 3), trellis(96, 32, 2)),
        "spectral4": (lloyd(0, 32, 5, "log"), trellis(32, 64, 4), trellis(96, 32, 3)),
    }
    plans = {codec: (plan(own, 0), plan(own, 1)) for codec, own in bands.items()}
    for n in (2, 3, 4, 8):
        key, value = (BandLayout(0, 128, kind, n) for kind in AFFINE_KINDS)
        plans[f"kivi{n}"] = plan((key,), 0), plan((value,), 1)
    return [_variant(codec, *own, ptx) for codec, own in plans.items() for ptx in (True, False)]


def _variant(codec: str, keys: Plan, values: Plan, ptx: bool) -> Variant:
    pointers = {"Q": "*fp16", "Offsets": "*fp16", "Table": "*i64", "Fills": "*i32", "Starts": "*i32", "Counts": "*i32"}
    pointers |= {"Mask": "*i8", "Pads": "*i32"}
    pointers |= dict.fromkeys(("Scale", "Bias", "gain_of", "Out", "Lse"), "*fp32")
    constants: dict[str, Any] = {
        "R": keys.rank, "RV": values.rank, "M": 8 if ptx else 16, "KS": keys.segments, "KB": keys.bands,
        "VS": values.segments, "VB": values.bands, "PER_PAGE": codec.startswith("spectral"), "MASKED": False,
        "SOFTCAP": False, "KEY_MEAN": not codec.startswith("kivi"), "PTX": DIGEST if ptx else 0,
    }  # fmt: skip
    types = {**dict.fromkeys(constants, "constexpr"), **pointers, "softcap": "fp32"}
    signature = {name: types.get(name, "i32") for name in pages_kernel.arg_names}
    archs = ARCHS[:3] if ptx else ARCHS[3:]
    aligned = (*pointers, "table_row")
    return Variant(
        "decode", codec, keys.rank, pages_kernel, signature, constants, aligned, 1, 1, 2 * 64 * keys.rank, archs
    )
