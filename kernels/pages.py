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
from .device import describe
from .layout import BandLayout, LevelTable, TrellisTable
from .ptx import DIGEST
from .ptx import version as ptx_version
from .segments import Plan, plan
from .unpack import depth, entry, key_tile, value_tile, words
from .variant import ARCHS, Variant

PROGRAMS = 10  # a multiprocessor: as many programs of one warp as its registers hold
FEWEST = 4  # pages of a split


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
def gains(base, offset, head, token, live, known, KIND: tl.constexpr):
    """float32 gains of a page's tokens of one head; zero for those that are not live. known: what bytes stand for."""
    if KIND == 0:
        result = tl.load((base + offset).to(tl.pointer_type(tl.float16)) + head * 64 + token, live, 0.0).to(tl.float32)
    else:
        # by whole words: operands that come from loads of single bytes would get another layout in matrix products
        word = tl.load((base + offset).to(tl.pointer_type(tl.uint32)) + head * 16 + token // 4, live, 0)
        result = tl.load(known + ((word >> (token % 4 * 8).to(tl.uint32)) & 255))
    return result


@triton.jit
def key_blocks(S: tl.constexpr, S0: tl.constexpr, N: tl.constexpr, BACK: tl.constexpr):
    """Where the blocks of a key tile lie, counted in blocks, [N, 8, 4]; BACK: those so many blocks before them."""
    s = tl.arange(0, N)[:, None, None] + S0
    g = tl.arange(0, 8)[None, :, None]
    block = (tl.arange(0, 4)[None, None, :] * S + s + 4 * S - BACK) % (4 * S)
    return (block % S * 8 + g) * 4 + block // S


@triton.jit
def value_blocks(S: tl.constexpr, S0: tl.constexpr, N: tl.constexpr, BACK: tl.constexpr):
    """Where the blocks of a value tile lie in the first of a lane's two octets; the second's lie 4 further."""
    if N == 1:
        block = tl.arange(0, 4)[None, :, None] * S + S0 + tl.arange(0, 1)[:, None, None]
    else:
        c, gl = tl.arange(0, N // 2)[:, None, None], tl.arange(0, 8)[None, :, None]
        block = gl // 2 * S + S0 + gl % 2 * (N // 2) + c
    block = (block + 4 * S - BACK) % (4 * S)
    return block % S * 32 + block // S + tl.arange(0, 4)[None, None, :] * 8


@triton.jit
def blocks_before(base, S: tl.constexpr, S0: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, DEPTH: tl.constexpr,
                  VALUES: tl.constexpr, FURTHER: tl.constexpr):  # fmt: skip
    result = ()
    for back in tl.static_range(DEPTH):
        if VALUES:
            result = result + words(base, value_blocks(S, S0, N, back + 1) + FURTHER, BITS)
        else:
            result = result + words(base, key_blocks(S, S0, N, back + 1), BITS)
    return result


@triton.jit
def key_numbers(base, head, S: tl.constexpr, S0: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
                T: tl.constexpr, CODES: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """fp16 [64, 16 N], one segment of the keys, as `key_tile`."""
    start = (base + CODES).to(tl.pointer_type(tl.uint32)) + head * (S * 32 * BITS)
    own = words(start, key_blocks(S, S0, N, 0), BITS)
    before = blocks_before(start, S, S0, N, BITS, depth(KIND, BITS), False, 0)
    return key_tile(own, before, N, KIND, BITS, T, PTX)


@triton.jit
def value_numbers(base, head, S: tl.constexpr, S0: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr,
                  BITS: tl.constexpr, T: tl.constexpr, CODES: tl.constexpr,
                  PTX: tl.constexpr):  # fmt: skip
    """fp16 [16 N, 64], one segment of the values, as `value_tile`."""
    start = (base + CODES).to(tl.pointer_type(tl.uint32)) + head * (S * 32 * BITS)
    own0 = words(start, value_blocks(S, S0, N, 0), BITS)
    own1 = words(start, value_blocks(S, S0, N, 0) + 4, BITS)
    before0 = blocks_before(start, S, S0, N, BITS, depth(KIND, BITS), True, 0)
    before1 = blocks_before(start, S, S0, N, BITS, depth(KIND, BITS), True, 4)
    return value_tile(own0, before0, own1, before1, N, KIND, BITS, T, PTX)


@triton.jit
def query_part(Q, m, rows, R: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr):
    return tl.load(Q + m[None, :] * R + AT + tl.arange(0, WIDTH)[:, None], (m < rows)[None, :], 0.0)


@triton.jit
def queries(Q, m, rows, R: tl.constexpr, KS: tl.constexpr):
    """The absorbed queries, a tile [16 N, M] for every segment of the keys."""
    result = ()
    for i in tl.static_range(len(KS)):
        result = result + (query_part(Q, m, rows, R, entry(KS, i, 8), 16 * entry(KS, i, 3)),)
    return result


@triton.jit
def band_product(q, offsets, base, head, BAND: tl.constexpr, KS: tl.constexpr, PTX: tl.constexpr):
    """The numbers of one band times the queries less their offset, float32 [64, M]."""
    chosen = tl.where(tl.arange(0, 16) // 2 == BAND, 2.0**-24, 0.0).to(tl.float16)
    product = tl.dot(tl.broadcast_to(chosen[None, :], [64, 16]), offsets)
    for i in tl.static_range(len(KS)):
        if entry(KS, i, 0) == BAND:
            numbers = key_numbers(
                base,
                head,
                entry(KS, i, 1),
                entry(KS, i, 2),
                entry(KS, i, 3),
                entry(KS, i, 4),
                entry(KS, i, 5),
                entry(KS, i, 6),
                entry(KS, i, 7),
                PTX,
            )
            product = tl.dot(numbers, q[i], product)
    return product


@triton.jit
def scores_of(q, offsets, scale, base, head, token, live, known, KS: tl.constexpr, KB: tl.constexpr,
              PTX: tl.constexpr):  # fmt: skip
    """Scores of a page [64, M] in the order of `token`, without the mean's part."""
    total = tl.where(live, 0.0, float("-inf"))[:, None]
    for b in tl.static_range(len(KB)):
        gain = gains(base, entry(KB, b, 0), head, token, live, known, entry(KB, b, 1)) * (scale * entry(KB, b, 2))
        total = band_product(q, offsets, base, head, b, KS, PTX) * gain[:, None] + total
    return total


@triton.jit
def zero_sums(M: tl.constexpr, VS: tl.constexpr):
    result = ()
    for i in tl.static_range(len(VS)):
        result = result + (tl.zeros([16 * entry(VS, i, 3), M], tl.float32),)
    return result


@triton.jit
def value_scales(base, head, slot, live, known, VB: tl.constexpr):
    """For each band what its gains are divided by, so that fp16 holds them: their largest in a split's first page."""
    result = ()
    for b in tl.static_range(len(VB)):
        if entry(VB, b, 1) == 0:
            largest = tl.max(tl.abs(gains(base, entry(VB, b, 0), head, slot, live, known, 0)), 0)
            finite = tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)
            result = result + (tl.maximum(finite, 2.0**-8),)  # room for later pages' gains up to 255 at least
        else:
            result = result + (1.0,)
    return result


@triton.jit
def scaled(weights, gain, PTX: tl.constexpr):
    """fp16 products of weights fp16 [64, M] and gains [64]."""
    half, factor = tl.broadcast(weights, gain.to(tl.float16)[:, None])
    if PTX:
        result = tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [half, factor], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        result = half * factor
    return result


@triton.jit
def weights_of_band(weights, value_scale, base, head, slot, live, known, BAND: tl.constexpr, VB: tl.constexpr,
                    PTX: tl.constexpr):  # fmt: skip
    """fp16 [64, M]: weights times the gains of one band of a page's values."""
    gain = gains(base, entry(VB, BAND, 0), head, slot, live, known, entry(VB, BAND, 1))
    if entry(VB, BAND, 1) == 0:
        gain = tl.minimum(gain / value_scale, 32768.0, propagate_nan=tl.PropagateNan.ALL)
    return scaled(weights, gain, PTX)


@triton.jit
def order_of_page():
    """(the token, the slot of its value) in every row of a tile of scores [64, M]."""
    n = tl.arange(0, 64)
    return n % 8 * 8 + n // 8, n % 8 // 2 * 16 + n // 8 * 2 + n % 2


@triton.jit
def add_values(sums, counts, weights, shrink, value_scale, base, head, slot, live, known, VS: tl.constexpr,
               VB: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """(sums of a page's numbers, sums of their weights), joined to those before it, which shrink."""
    halves = ()
    counted = ()
    for b in tl.static_range(len(VB)):
        half = weights_of_band(weights, value_scale[b], base, head, slot, live, known, b, VB, PTX)
        halves = halves + (half,)
        counted = counted + (tl.dot(tl.full([16, 64], 1.0, tl.float16), half, counts[b] * shrink[None, :]),)
    result = ()
    for i in tl.static_range(len(VS)):
        numbers = value_numbers(
            base,
            head,
            entry(VS, i, 1),
            entry(VS, i, 2),
            entry(VS, i, 3),
            entry(VS, i, 4),
            entry(VS, i, 5),
            entry(VS, i, 6),
            entry(VS, i, 7),
            PTX,
        )
        result = result + (tl.dot(numbers, halves[entry(VS, i, 0)], sums[i] * shrink[None, :]),)
    return result, counted


@triton.jit
def softcapped(scores, softcap):
    """softcap tanh(scores / softcap)."""
    return softcap - 2 * softcap / (tl.exp2(scores * (2 * 1.4426950408889634 / softcap)) + 1)


@triton.jit
def offsets_of(Offsets, m, rows):
    """[16, M]: rows 2b and 2b + 1 add up to what the offset of band b's numbers takes off products, in units 2^-24."""
    return tl.load(Offsets + m[None, :] * 16 + tl.arange(0, 16)[:, None], (m < rows)[None, :], 0.0)


@triton.jit
def means(sums, counts, scale, total, VB: tl.constexpr, BAND: tl.constexpr):
    """Weighted means of what a band's codes stand for, from the sums of its numbers and of their weights (all rows of
    `counts` are the same).
    """
    return (sums - (tl.max(counts, 0) * entry(VB, BAND, 3))[None, :]) * (scale * entry(VB, BAND, 2) / total)[None, :]


@triton.jit
def store_sums(Out, sums, m, rows, RV: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr):
    place = m[None, :] * RV + AT + tl.arange(0, WIDTH)[:, None]
    tl.store(Out + place, sums, (m < rows)[None, :])


@triton.jit
def visit(
    page, state, q, offsets, scale, bias, value_scale, table, fills, starts, mask, pad, softcap, head, token, slot,
    gain_of, KS: tl.constexpr, KB: tl.constexpr, VS: tl.constexpr, VB: tl.constexpr, MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The state of a softmax-weighted sum after one page more."""
    top, total, sums, counts = state
    base = tl.load(table + page)
    live = token < tl.load(fills + page)
    if MASKED:
        live = live & (tl.load(mask + pad + tl.load(starts + page) + token, live, 0) != 0)
    scores = scores_of(q, offsets, scale, base, head, token, live, gain_of, KS, KB, PTX)
    if SOFTCAP:
        scores = softcapped(scores + bias[None, :], softcap) * 1.4426950408889634
        scores = tl.where(live[:, None], scores, float("-inf"))
        known = tl.maximum(top, tl.max(scores, 0))
        weights = tl.exp2(scores - known[None, :])
    else:
        known = tl.maximum(top, tl.max(scores, 0) + bias)
        weights = tl.exp2(scores - (known - bias)[None, :])
    shrink = tl.exp2(top - known)
    half = weights.to(tl.float16)
    total = tl.dot(tl.full([16, 64], 1.0, tl.float16), half, total * shrink[None, :])
    sums, counts = add_values(sums, counts, half, shrink, value_scale, base, head, slot, live, gain_of, VS, VB, PTX)
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
    for page in tl.range(first, last):
        if PER_PAGE:
            here = place + page
            q = queries(Q + here * rows * R, m, rows, R, KS)
            offsets = offsets_of(Offsets + here * rows * 16, m, rows)
            scale = tl.load(Scale + here * tiles + tile)
            bias = tl.load(Bias + here * rows + m, m < rows, 0.0) if KEY_MEAN else tl.zeros([M], tl.float32)
        state = visit(
            page, state, q, offsets, scale, bias, value_scale, table, fills, starts, mask, pad, softcap, head, token,
            slot, gain_of, KS, KB, VS, VB, MASKED, SOFTCAP, PTX,
        )  # fmt: skip
    top, total, sums, counts = state
    total = tl.max(total, 0)
    seen = total > 0
    to = (row.to(tl.int64) * heads + head) * splits + split
    for i in tl.static_range(len(VS)):
        mean = means(
            sums[i],
            counts[entry(VS, i, 0)],
            value_scale[entry(VS, i, 0)],
            tl.where(seen, total, 1.0),
            VB,
            entry(VS, i, 0),
        )
        store_sums(Out + to * rows * RV, mean, m, rows, RV, entry(VS, i, 8), 16 * entry(VS, i, 3))
    lse = tl.where(seen, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
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
    levels = {n: LevelTable(tuple(range(2**n)), tuple(range(2**n - 1)), tuple(range(2**n)), 1.0, 3.5) for n in (3, 4)}
    bands: dict[str, tuple[BandLayout, ...]] = {
        **{f"trellis{n}": (BandLayout(0, 128, "trellis", n, table=three),) for n in (2, 3, 4)},
        **{f"lloyd{n}": (BandLayout(0, 128, "lloyd", n, table=levels[n]),) for n in (3, 4)},
    }
    bands["spectral3"] = (
        BandLayout(0, 32, "trellis", 4, "log", table=three),
        BandLayout(32, 64, "trellis", 3, "log", table=three),
        BandLayout(96, 32, "trellis", 2, "log", table=three),
    )
    return [_variant(codec, plan(own), ptx) for codec, own in bands.items() for ptx in (True, False)]


def _variant(codec: str, own: Plan, ptx: bool) -> Variant:
    pointers = {"Q": "*fp16", "Offsets": "*fp16", "Table": "*i64", "Fills": "*i32", "Starts": "*i32", "Counts": "*i32"}
    pointers |= {"Mask": "*i8", "Pads": "*i32"}
    pointers |= dict.fromkeys(("Scale", "Bias", "gain_of", "Out", "Lse"), "*fp32")
    constants: dict[str, Any] = {
        "R": own.rank, "RV": own.rank, "M": 8 if ptx else 16, "KS": own.segments, "KB": own.bands, "VS": own.segments,
        "VB": own.bands, "PER_PAGE": codec.startswith("spectral"), "MASKED": False, "SOFTCAP": False,
        "KEY_MEAN": True, "PTX": DIGEST if ptx else 0,
    }  # fmt: skip
    types = {**dict.fromkeys(constants, "constexpr"), **pointers, "softcap": "fp32"}
    signature = {name: types.get(name, "i32") for name in pages_kernel.arg_names}
    archs = ARCHS[:3] if ptx else ARCHS[3:]
    aligned = (*pointers, "table_row")
    return Variant(
        "decode", codec, own.rank, pages_kernel, signature, constants, aligned, 1, 1, 2 * 64 * own.rank, archs
    )
