"""The gains and scales of a page's tokens, and the weighted sums of what their codes stand for, band by band.

Bands are entries of a plan's `bands` (kernels/segments.py), told as the plan and the band's place in it. Their numbers
are scaled by a gain a token, or, affine ones of values, by a scale a token, and then a zero is added.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .segments import BY_TOKEN, HALF, LOG
from .unpack import entry

_HALF, _LOG, _BY_TOKEN = tl.constexpr(HALF), tl.constexpr(LOG), tl.constexpr(BY_TOKEN)


@triton.jit
def gains(base, head, token, live, known, BANDS: tl.constexpr, BAND: tl.constexpr):
    """float32 gains, or scales, of a page's tokens of one head; zero for those that are not live.

    known: what bytes stand for.
    """
    if entry(BANDS, BAND, 1) == _LOG:
        # by whole words: operands that come from loads of single bytes would get another layout in matrix products
        word = tl.load((base + entry(BANDS, BAND, 0)).to(tl.pointer_type(tl.uint32)) + head * 16 + token // 4, live, 0)
        result = tl.load(known + ((word >> (token % 4 * 8).to(tl.uint32)) & 255))
    else:
        place = (head * 64 + token) * entry(BANDS, BAND, 7) + entry(BANDS, BAND, 8)
        half = (base + entry(BANDS, BAND, 0)).to(tl.pointer_type(tl.float16))
        result = tl.load(half + place, live, 0.0).to(tl.float32)
    return result


@triton.jit
def value_scales(base, head, slot, live, known, VB: tl.constexpr):
    """For each band what its gains are divided by, so that fp16 holds them: their largest in a split's first page."""
    result = ()
    for b in tl.static_range(len(VB)):
        if entry(VB, b, 1) != _HALF:
            result = result + (1.0,)
        else:
            largest = tl.max(tl.abs(gains(base, head, slot, live, known, VB, b)), 0)
            finite = tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)
            result = result + (tl.maximum(finite, 2.0**-8),)  # room for later pages' gains up to 255 at least
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
    gain = gains(base, head, slot, live, known, VB, BAND)
    if entry(VB, BAND, 1) == _HALF:
        gain = tl.minimum(gain / value_scale, 32768.0, propagate_nan=tl.PropagateNan.ALL)
    return scaled(weights, gain, PTX)


@triton.jit
def order_of_page():
    """(the token, the slot of its value) in every row of a tile of scores [64, M]."""
    n = tl.arange(0, 64)
    return n % 8 * 8 + n // 8, n % 8 // 2 * 16 + n // 8 * 2 + n % 2


@triton.jit
def count_of(counts, BAND: tl.constexpr, VB: tl.constexpr):
    """[M]: the line of a band's counts, see `pages.add_values`."""
    if entry(VB, BAND, 1) == _BY_TOKEN:
        GROUP: tl.constexpr = entry(VB, BAND, 8)
        FIRST: tl.constexpr = BAND - GROUP
        own = tl.arange(0, 16)[:, None] == GROUP
        result = tl.sum(tl.where(own, counts[FIRST], 0.0), 0)
    else:
        result = tl.max(counts[BAND], 0)
    return result


@triton.jit
def means(sums, count, scale, total, VB: tl.constexpr, BAND: tl.constexpr):
    """Weighted means of what a band's codes stand for, from the sums of its numbers and the line [M] of its counts."""
    if entry(VB, BAND, 1) == _BY_TOKEN:
        result = sums * (scale * entry(VB, BAND, 2) / total)[None, :] + (count / total)[None, :]
    else:
        shift = count * entry(VB, BAND, 3)
        result = (sums - shift[None, :]) * (scale * entry(VB, BAND, 2) / total)[None, :]
    return result


@triton.jit
def zero_sums(M: tl.constexpr, VS: tl.constexpr):
    result = ()
    for i in tl.static_range(len(VS)):
        result = result + (tl.zeros([16 * entry(VS, i, 3), M], tl.float32),)
    return result


@triton.jit
def store_sums(Out, sums, m, rows, RV: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr):
    place = m[None, :] * RV + AT + tl.arange(0, WIDTH)[:, None]
    tl.store(Out + place, sums, (m < rows)[None, :])
