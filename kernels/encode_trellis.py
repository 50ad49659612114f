"""Trellis codes of one band, from vectors to packed pages: the Viterbi search of kvcompress/codecs/trellis.py on chip.

A program codes TOKENS tokens of one page and head at a time: transform, normalise, find the seam, search, trace back,
pack. A lane has a token, and the costs of all 2^(9-bits) states in registers; with one bit these do not all fit.

The search adds in the order that lets nearly all of it be one addition of a constant and one minimum a window. With
v = a + b + c the level of window w, in parts of a table unit, a, b, c those of its fields, the cost of w is

    cost(w >> bits) - 2 x (a + b + c) + v^2                                     all times 2^bits, plus the dropped bits

where b is known from the old state w >> bits, c too (with four bits one of its bits is the new code's), and a from the
new state, so it is added when that has become the old one. All are the reference's integers, so ties fall as there.

Workspace, a program: y float32 and targets int32 (then codes) [width, TOKENS], survivors [elements, WORDS, TOKENS]
32-bit words; a survivor is the `bits` dropped bits of a state's best window.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import describe
from .encode_inputs import Inputs, constants, variant
from .encode_parts import TINY, root_mean_square, store_gain, store_words, to_nearest, transformed
from .layout import PAGE, BandLayout, TrellisTable, fields
from .variant import Variant

MEMORY = 9  # bits of the stream that an element is decoded from
FRACTION = 4  # the search's resolution: parts of a table unit
SEAM = 64  # bits of the stream on either side of the vector's end that decide where it bites its tail
PROGRAMS = 8  # a multiprocessor: one warp each, with up to 255 registers a lane
WORKSPACE = 128 << 20  # bytes, at most
_MEMORY = tl.constexpr(MEMORY)
_FRACTION = tl.constexpr(FRACTION)
_SEAM = tl.constexpr(SEAM)
_FAR = tl.constexpr(1 << 29)  # the cost of a state that is not allowed
_PAGE = tl.constexpr(PAGE)


@triton.jit
def _entry(field: tl.tensor, TABLE: tl.constexpr) -> tl.tensor:
    """Byte `field` of eight in a 64-bit number. In few operations, so that the compiler folds it to constants."""
    return (tl.full(field.shape, TABLE, tl.int64) >> (field * 8).to(tl.int64)).to(tl.int32) & 255


@triton.jit
def _forward(
    targets: tl.tensor,
    survivors: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    best: tl.tensor,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    OFFSET: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """Costs int32 [STATES, TOKENS] after `count` elements of the circular targets from `first` on; stores survivors."""
    STATES: tl.constexpr = 2 ** (_MEMORY - BITS)
    BRANCHES: tl.constexpr = 2**BITS
    SLOT: tl.constexpr = 4 if BITS == 3 else BITS
    PER: tl.constexpr = 32 // SLOT
    WORDS: tl.constexpr = STATES // PER
    SLOPE: tl.constexpr = -2 * BRANCHES * _FRACTION
    token = tl.arange(0, TOKENS)
    number = tl.arange(0, WORDS)[:, None]
    # Numbers of registers, not of lanes: the compiler folds them to immediate operands, if their making is this short.
    state = tl.arange(0, STATES)[:, None]
    if BITS == 4:
        old = tl.arange(0, 32)[:, None, None]  # the window but its new code
        last = tl.arange(0, 2)[None, :, None]  # the new code's lowest bit
        across = _entry(last | (old & 1) << 1 | old >> 4 << 2, C)  # [32, 2, 1]
        middle = across * SLOPE
        level = _entry(old >> 1 & 7, B) + _entry(tl.arange(0, 8)[None, :, None], A)  # [32, 8, 1]
        level = (level[:, :, None, :] + across[:, None, :, :]) * _FRACTION - OFFSET
        constant = level * level * BRANCHES + (old >> 1)[:, :, None, :]
        newest = _entry(state >> 1 & 7, A) * SLOPE  # of the old state: the element before's
        older = _entry(state >> 1 & 7, B) * SLOPE
    else:
        high = tl.arange(0, 64)[:, None, None]  # the window but its lowest three bits
        level = _entry(high & 7, B) + _entry(high >> 3, C) + _entry(tl.arange(0, 8)[None, :, None], A)
        level = level * _FRACTION - OFFSET
        constant = level * level * BRANCHES + (high >> (6 - BITS))
        newest = _entry(state & 7, A) * SLOPE
        older = (_entry(state >> (6 - BITS), C) + _entry(state >> (3 - BITS) & 7, B)) * SLOPE
    slot = (tl.arange(0, PER) * SLOT)[None, :, None]
    before = tl.zeros([1, TOKENS], tl.int32)
    for i in range(count):
        t = first + i
        t = tl.where(t >= WIDTH, t - WIDTH, t)
        x = tl.load(targets + t * TOKENS + token)[None, :]
        cost = (best & -BRANCHES) + newest * before + older * x
        before = x
        cost = cost[:, None, :]
        if BITS == 4:
            cost = (cost + middle * x[None, :, :])[:, None, :, :]  # [32, 1, 2, TOKENS]
        else:
            cost = tl.broadcast_to(cost, [STATES, BRANCHES, TOKENS])
            cost = tl.reshape(cost, [64, 8, TOKENS])
        cost += constant
        best = tl.min(tl.reshape(cost, [BRANCHES, STATES, TOKENS]), 0)
        dropped = tl.reshape(best & (BRANCHES - 1), [WORDS, PER, TOKENS])
        word = tl.sum(dropped << slot, 1)
        for own in tl.static_range(WORDS):  # stored one by one, as they lie: a token's all in its lane
            at = (i * WORDS + own) * TOKENS + token
            tl.store(survivors + at, tl.sum(tl.where(number == own, word, 0), 0))
    return (best & -BRANCHES) + newest * before


@triton.jit
def _window(
    survivors: tl.tensor,
    i: tl.tensor,
    state: tl.tensor,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """The nine bits up to element i, whose last are the states [TOKENS]."""
    SLOT: tl.constexpr = 4 if BITS == 3 else BITS
    PER: tl.constexpr = 32 // SLOT
    WORDS: tl.constexpr = 2 ** (_MEMORY - BITS) // PER
    token = tl.arange(0, TOKENS)
    word = tl.load(survivors + (i * WORDS + state // PER) * TOKENS + token)
    dropped = word >> (state % PER * SLOT) & (2**BITS - 1)
    return dropped << (_MEMORY - BITS) | state


@triton.jit
def encode_trellis(
    x: tl.tensor,
    mean: tl.tensor,
    analysis: tl.tensor,
    words: tl.tensor,
    halves: tl.tensor,
    octets: tl.tensor,
    x_page: tl.tensor,
    x_head: tl.tensor,
    x_token: tl.tensor,
    mean_page: tl.tensor,
    mean_head: tl.tensor,
    analysis_page: tl.tensor,
    analysis_head: tl.tensor,
    analysis_row: tl.tensor,
    record: tl.tensor,
    codes_at: tl.tensor,
    scale_at: tl.tensor,
    start: tl.tensor,
    items: tl.tensor,
    values: tl.tensor,
    workspace: tl.tensor,
    unit: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    CENTRED: tl.constexpr,
    DENSE: tl.constexpr,
    LOG: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    OFFSET: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Code `items` tiles of TOKENS tokens; one program a tile at a time.

    A, B, C: tables of eight bytes as 64-bit numbers. OFFSET: of levels, in parts of a table unit. unit: table units'
    parts in a root-mean-square of one. values: float32 [512], what windows stand for. start: the band's first row.
    """
    STATES: tl.constexpr = 2 ** (_MEMORY - BITS)
    SLOT: tl.constexpr = 4 if BITS == 3 else BITS
    WORDS: tl.constexpr = STATES * SLOT // 32
    REACH: tl.constexpr = _SEAM // BITS if _SEAM // BITS < WIDTH else WIDTH
    ELEMENTS: tl.constexpr = WIDTH if WIDTH > 2 * REACH else 2 * REACH
    TILES: tl.constexpr = _PAGE // TOKENS
    lane = tl.arange(0, TOKENS)
    own = workspace + tl.program_id(0).to(tl.int64) * ((2 * WIDTH + WORDS * ELEMENTS) * TOKENS)
    targets = own + WIDTH * TOKENS
    survivors = targets + WIDTH * TOKENS
    y_own = own.to(tl.pointer_type(tl.float32), bitcast=True)
    for index in range(tl.program_id(0), items, tl.num_programs(0)):
        item = tl.cast(index, tl.int64)
        page = item // (H * TILES)
        head = item // TILES % H
        first = (item % TILES * TOKENS).to(tl.int32)
        token = first + tl.arange(0, TOKENS)

        energy = tl.zeros([TOKENS], tl.float32)
        tl.debug_barrier()  # the item before has been read
        for row_start in range(0, WIDTH, ROWS):
            y = transformed(
                x + page * x_page + head * x_head,
                x_token,
                mean + page * mean_page + head * mean_head,
                analysis + page * analysis_page + head * analysis_head,
                analysis_row,
                start + row_start,
                start + WIDTH,
                token,
                D,
                ROWS,
                TOKENS,
                CENTRED,
                DENSE,
            )
            row = row_start + tl.arange(0, ROWS)[:, None]
            energy += tl.sum(y * y, 0)
            tl.store(y_own + row * TOKENS + lane[None, :], y, mask=row < WIDTH)
        rms = root_mean_square(energy, WIDTH)
        tl.debug_barrier()
        for t in range(WIDTH):
            u = tl.div_rn(tl.load(y_own + t * TOKENS + lane), rms) * unit
            tl.store(targets + t * TOKENS + lane, to_nearest(tl.where(u == u, u, 0.0)))
        tl.debug_barrier()

        state = tl.arange(0, STATES)[:, None]
        seam = tl.zeros([TOKENS], tl.int32)
        for search in range(2):
            begin = (1 - search) * (WIDTH - REACH)
            count = WIDTH + (1 - search) * (2 * REACH - WIDTH)
            best = tl.where((state == seam[None, :]) | (search == 0), 0, _FAR)
            best = _forward(targets, survivors, begin, count, best, A, B, C, OFFSET, BITS, WIDTH, TOKENS)
            tl.debug_barrier()
            if search == 0:
                seam = tl.argmin(best, 0).to(tl.int32)
                for back in range(REACH):
                    seam = _window(survivors, 2 * REACH - 1 - back, seam, BITS, TOKENS) >> BITS
                tl.debug_barrier()

        product = tl.zeros([TOKENS], tl.float32)
        square = tl.zeros([TOKENS], tl.float32)
        for back in range(WIDTH):
            t = WIDTH - 1 - back
            window = _window(survivors, t, seam, BITS, TOKENS)
            seam = window >> BITS
            tl.store(targets + t * TOKENS + lane, window & (2**BITS - 1))
            value = tl.load(values + window)
            product += value * tl.load(y_own + t * TOKENS + lane)
            square += value * value
        gain = tl.div_rn(product, tl.maximum(square, TINY))
        store_gain(halves, octets, page * (record // (1 if LOG else 2)) + scale_at + head * _PAGE + token, gain, LOG)
        tl.debug_barrier()
        for row_start in range(0, WIDTH, ROWS):
            row = row_start + tl.arange(0, ROWS)[:, None]
            codes = tl.load(targets + row * TOKENS + lane[None, :], mask=row < WIDTH, other=0)
            packed = words + page * (record // 4) + codes_at + head * (WIDTH * _PAGE * BITS // 32)
            store_words(packed, codes, row_start, first, WIDTH, BITS, ROWS, TOKENS)


def launch(inputs: Inputs, band: BandLayout) -> None:
    """Code a trellis band of all pages. The workspace is WORKSPACE bytes at most, however many pages there are."""
    device = describe(inputs.x.device)
    special = specialised(band, device.hip)
    tokens = special["TOKENS"]
    items = inputs.x.shape[0] * inputs.x.shape[1] * (PAGE // tokens)
    words = workspace_words(band.width, band.bits, tokens)
    programs = max(1, min(items, PROGRAMS * device.multiprocessors, WORKSPACE // (4 * words)))
    assert isinstance(band.table, TrellisTable)
    encode_trellis[(programs,)](
        **inputs.arguments(band),
        items=items,
        values=trellis_values(band.table, band.bits, inputs.x.device),
        workspace=torch.empty(programs * words, dtype=torch.int32, device=inputs.x.device),
        unit=FRACTION / band.table.step,
        **inputs.constants(band),
        **special,
        num_warps=1,
        num_stages=1,
    )


def specialised(band: BandLayout, hip: bool) -> dict[str, Any]:
    """The constants of a band's kernel: a lane a token, so a wave of 64 lanes on AMD takes a whole page."""
    assert isinstance(band.table, TrellisTable)
    a, b, c = (int.from_bytes(bytes(table), "little", signed=True) for table in band.table.tables)
    return {
        "A": a,
        "B": b,
        "C": c,
        "OFFSET": round(FRACTION * band.table.offset),
        "TOKENS": 64 if hip else 32,
        "ROWS": 16 if band.width <= 16 else 32,
    }


def workspace_words(width: int, bits: int, tokens: int) -> int:
    """32-bit words of a program's workspace."""
    survivors = 2 ** (MEMORY - bits) * (4 if bits == 3 else bits) // 32
    reach = min(SEAM // bits, width)
    return (2 * width + survivors * max(width, 2 * reach)) * tokens


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for ever, so not to be inference tensors
def trellis_values(table: TrellisTable, bits: int, device: torch.device) -> Tensor:
    """float32 [512]: what windows stand for, in vectors of unit variance."""
    sums = [sum(own[field] for own, field in zip(table.tables, fields(w, bits), strict=True)) for w in range(2**MEMORY)]
    return ((torch.tensor(sums, dtype=torch.float64) - table.offset) * table.step).to(device, torch.float32)


def variants() -> list[Variant]:
    """Whole vectors of `trellis` and the bands of `spectral3`, with the tables of `trellis3`."""
    a, b, c = (62, 51, 78, 30, 0, 41, 97, 22), (56, 42, 33, 77, 48, 51, 64, 0), (34, 81, 43, 54, 22, 0, 19, 55)
    table = TrellisTable((a, b, c), 135.27, 0.0269)
    made = []
    for bits, width in ((1, 32), (2, 32), (2, 128), (3, 64), (3, 128), (4, 32), (4, 128)):
        band = BandLayout(0, width, "trellis", bits, "log", table=table)
        for hip in (False, True):
            special = specialised(band, hip)
            fixed = constants(band, heads=8, head_dim=128, centred=True, dense=True) | special
            name, tokens = f"trellis{bits}/{width}", special["TOKENS"]
            made.append(variant(encode_trellis, name, fixed, 128, warps=1, elements=tokens, hip=hip))
    return made
