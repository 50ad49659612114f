"""Codes found number by number, from vectors to packed pages: Lloyd-Max levels and affine grids, one band.

A program codes TOKENS tokens of one page and head: transform (all of the band's rows at once, ROWS x TOKENS in
registers), quantise, pack. Agrees with kvcompress/codecs/lloyd.py, and with uniform.py and kivi.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .encode_inputs import Inputs, constants, variant
from .encode_parts import TINY, as_half, root_mean_square, store_gain, store_words, to_nearest, transformed
from .layout import GROUP, PAGE, BandLayout, LevelTable
from .variant import Variant

TOKENS = GROUP  # a program's, so that one has all tokens that share a scale
WARPS = 4
_TOKENS = tl.constexpr(TOKENS)
_GROUP = tl.constexpr(GROUP)
_PAGE = tl.constexpr(PAGE)


@triton.jit
def encode_lloyd(
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
    levels: tl.tensor,
    borders: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    CENTRED: tl.constexpr,
    DENSE: tl.constexpr,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """levels float32 [2^bits], borders float32 [2^bits - 1]: a code is the number of borders below its number."""
    item = tl.program_id(0)
    tiles: tl.constexpr = _PAGE // _TOKENS
    page = (item // (H * tiles)).to(tl.int64)
    head = (item // tiles % H).to(tl.int64)
    first = item % tiles * _TOKENS
    token = first + tl.arange(0, _TOKENS)
    y = transformed(
        x + page * x_page + head * x_head,
        x_token,
        mean + page * mean_page + head * mean_head,
        analysis + page * analysis_page + head * analysis_head,
        analysis_row,
        start,
        start + WIDTH,
        token,
        D,
        ROWS,
        _TOKENS,
        CENTRED,
        DENSE,
    )
    rms = root_mean_square(tl.sum(y * y, 0), WIDTH)
    u = tl.div_rn(y, tl.broadcast_to(rms[None, :], [ROWS, _TOKENS]))
    codes = tl.zeros([ROWS, _TOKENS], tl.int32)
    for step in tl.static_range(BITS):
        above = codes + (1 << (BITS - 1 - step))
        codes = tl.where(u <= tl.load(borders + above - 1), codes, above)  # NaN: above all borders
    value = tl.where(tl.arange(0, ROWS)[:, None] < WIDTH, tl.load(levels + codes), 0.0)
    gain = tl.div_rn(tl.sum(y * value, 0), tl.maximum(tl.sum(value * value, 0), TINY))
    store_gain(halves, octets, page * (record // (1 if LOG else 2)) + scale_at + head * _PAGE + token, gain, LOG)
    packed = words + page * (record // 4) + codes_at + head * (WIDTH * _PAGE * BITS // 32)
    store_words(packed, codes, 0, first, WIDTH, BITS, ROWS, _TOKENS)


@triton.jit
def _grid(y: tl.tensor, inside: tl.tensor, AXIS: tl.constexpr, BITS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(scale, zero), float16, of groups along AXIS; both NaN where one of a group is."""
    missing = tl.max(tl.where(y == y, 0.0, 1.0), AXIS)
    low = tl.where(missing > 0, float("nan"), tl.min(tl.where(inside, y, float("inf")), AXIS))
    high = tl.max(tl.where(inside, y, -float("inf")), AXIS)
    return as_half(tl.div_rn(high - low, tl.full(low.shape, 2**BITS - 1, tl.float32))), as_half(low)


@triton.jit
def encode_affine(
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
    zero_at: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    CENTRED: tl.constexpr,
    DENSE: tl.constexpr,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNEL: tl.constexpr,
) -> None:
    """CHANNEL: grids of one dimension and GROUP tokens; otherwise of one token and GROUP dimensions."""
    item = tl.program_id(0)
    tiles: tl.constexpr = _PAGE // _TOKENS
    page = (item // (H * tiles)).to(tl.int64)
    head = (item // tiles % H).to(tl.int64)
    first = item % tiles * _TOKENS
    token = first + tl.arange(0, _TOKENS)
    y = transformed(
        x + page * x_page + head * x_head,
        x_token,
        mean + page * mean_page + head * mean_head,
        analysis + page * analysis_page + head * analysis_head,
        analysis_row,
        start,
        start + WIDTH,
        token,
        D,
        ROWS,
        _TOKENS,
        CENTRED,
        DENSE,
    )
    row = tl.arange(0, ROWS)
    parts = halves + page * (record // 2)
    if CHANNEL:
        groups = y[None, :, :]  # [1, ROWS, TOKENS]
        scale, zero = _grid(groups, groups == groups, 2, BITS)
        at = (head * tiles + item % tiles) * WIDTH + row[None, :]
        inside = row[None, :] < WIDTH
        spread_scale, spread_zero = scale[:, :, None], zero[:, :, None]
    else:
        count: tl.constexpr = (WIDTH + _GROUP - 1) // _GROUP
        groups = tl.reshape(y, [ROWS // _GROUP, _GROUP, _TOKENS])
        scale, zero = _grid(groups, tl.reshape(row, [ROWS // _GROUP, _GROUP])[:, :, None] < WIDTH, 1, BITS)
        group = tl.arange(0, ROWS // _GROUP)[:, None]
        at = (head * _PAGE + token[None, :]) * count + group
        inside = group < count
        spread_scale, spread_zero = scale[:, None, :], zero[:, None, :]
    tl.store(parts + scale_at + at, scale, mask=inside)
    tl.store(parts + zero_at + at, zero, mask=inside)
    divisor = tl.broadcast_to(tl.maximum(spread_scale.to(tl.float32), TINY), groups.shape)
    steps = tl.div_rn(groups - spread_zero.to(tl.float32), divisor)
    steps = tl.minimum(tl.maximum(tl.where(steps == steps, steps, 0.0), 0.0), 2.0**BITS - 1.0)
    codes = tl.reshape(to_nearest(steps), [ROWS, _TOKENS])
    packed = words + page * (record // 4) + codes_at + head * (WIDTH * _PAGE * BITS // 32)
    store_words(packed, codes, 0, first, WIDTH, BITS, ROWS, _TOKENS)


def launch_lloyd(inputs: Inputs, band: BandLayout) -> None:
    """Code a Lloyd-Max band of all pages."""
    assert isinstance(band.table, LevelTable)
    levels, borders = level_tensors(band.table, inputs.x.device)
    encode_lloyd[(tiles(inputs),)](
        **inputs.arguments(band),
        levels=levels,
        borders=borders,
        **inputs.constants(band),
        **specialised(band),
        num_warps=WARPS,
        num_stages=1,
    )


def launch_affine(inputs: Inputs, band: BandLayout) -> None:
    """Code a band of affine grids of all pages."""
    encode_affine[(tiles(inputs),)](
        **inputs.arguments(band),
        zero_at=band.zero // 2,
        **inputs.constants(band),
        **specialised(band),
        num_warps=WARPS,
        num_stages=1,
    )


def tiles(inputs: Inputs) -> int:
    """Programs: one for TOKENS tokens of a page and head."""
    return inputs.x.shape[0] * inputs.x.shape[1] * (PAGE // TOKENS)


def specialised(band: BandLayout) -> dict[str, Any]:
    """The constants of a band's kernel."""
    rows = {"ROWS": triton.next_power_of_2(max(band.width, GROUP))}
    return rows if band.kind == "lloyd" else {**rows, "CHANNEL": band.kind == "affine_channel"}


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for ever, so not to be inference tensors
def level_tensors(table: LevelTable, device: torch.device) -> tuple[Tensor, Tensor]:
    """(levels, borders), float32."""
    return torch.tensor(table.levels, device=device), torch.tensor(table.borders, device=device)


def variants() -> list[Variant]:
    """Whole vectors of the default head_dim; these kernels have no loop over elements."""
    made = []
    for bits in (3, 4, 8):
        table = LevelTable(tuple(map(float, range(2**bits))), tuple(map(float, range(2**bits - 1))))
        band = BandLayout(0, 128, "lloyd", bits, table=table)
        fixed = constants(band, heads=8, head_dim=128, centred=True, dense=True) | specialised(band)
        made.append(variant(encode_lloyd, f"lloyd{bits}", fixed, 128, warps=WARPS, elements=0, hip=None))
    for kind in ("affine_token", "affine_channel"):
        band = BandLayout(0, 128, kind, 2)
        fixed = constants(band, heads=8, head_dim=128, centred=False, dense=False) | specialised(band)
        made.append(variant(encode_affine, f"{kind}2", fixed, 128, warps=WARPS, elements=0, hip=None))
    return made
