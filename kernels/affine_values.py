"""Weighted sums of affine values, on their codes: 32 dimensions of every token have a scale and a zero of their own.

With the code c of token t and dimension d, and g its group of dimensions::

    sum_t w_t value_t[d] = sum_t (w_t scale[t, g]) c[t, d] + sum_t w_t zero[t, g]

So every group's numbers are multiplied by weights of their own; the zeros of all groups are one product more.

Scales may be tiny, so weights are lifted, by a power of two that a split's first page says: the largest weight is
2^lift instead of one, which the total of the weights takes back. Later scales so large that products with them could
leave float16, beyond 255 where the first were below 2^-8, count as the largest that cannot.

A page's weights lie in words of two slots, in the lanes in which a matrix instruction wants them: [8 i, M, 4 l] are
the slots 16 l + 2 i and the next one, rows 8 i + 2 l and the next one of the tile of weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .half_words import halves, repeated, word
from .segments import BY_TOKEN
from .unpack import consecutive, entry
from .weighting import gains

MOST = 65504  # float16's largest number
_BY_TOKEN, _MOST = tl.constexpr(BY_TOKEN), tl.constexpr(MOST)


@triton.constexpr_function
def _affine(bands):
    return any(band[1] == BY_TOKEN for band in bands)


@triton.constexpr_function
def _assembly(groups, group):
    """Weights times the scales of two tokens that two words hold: entries `group` and `groups + group` of halves."""
    first, second = 2 * (group % 2), 4 + 2 * ((groups + group) % 2)
    selector = first | (first + 1) << 4 | second << 8 | (second + 1) << 12
    # min, but for its NaN: what is not a number shows in the zero as well, and may be that of a token that is not there
    return (
        f"{{ .reg .b32 s; prmt.b32 s, $3, $4, {selector}; min.f16x2 s, s, $5; mul.rn.f16x2 s, s, $2; "
        "mov.b32 {$0, $1}, s; }"
    )


@triton.jit
def lift_of(base, head, slot, live, known, VB: tl.constexpr):
    """The power of two that weights are lifted by, 0.0 to 8.0, for a page's scales."""
    lift = 0.0
    if _affine(VB):
        largest = 0.0
        for b in tl.static_range(len(VB)):
            if entry(VB, b, 1) == _BY_TOKEN:
                largest = tl.maximum(largest, tl.max(gains(base, head, slot, live, known, VB, b), 0))
        lift = tl.minimum(tl.maximum(-tl.ceil(tl.log2(tl.where(largest > 0, largest, 1.0))), 0.0), 8.0)
    return lift


@triton.jit
def words_of_weights(weights):
    """uint32 [8, M, 4] of a page's weights fp16 [64, M]."""
    low, high = tl.split(tl.permute(tl.reshape(weights, 8, 4, 2, weights.shape[1]), 0, 3, 1, 2))
    return word(low, high)


@triton.jit
def _half(a, AT: tl.constexpr):
    low, high = halves(a)
    return high if AT else low


@triton.jit
def weights_of_group(weights, lift, base, head, BAND: tl.constexpr, VB: tl.constexpr, PTX: tl.constexpr):
    """fp16 [64, M]: weights, in words, times the scales of a group of a page's values."""
    GROUPS: tl.constexpr = entry(VB, BAND, 7)
    GROUP: tl.constexpr = entry(VB, BAND, 8)
    M: tl.constexpr = weights.shape[1]
    pair = tl.arange(0, 8)[:, None, None] + tl.arange(0, 4)[None, None, :] * 8 + tl.zeros([8, 8, 4], tl.int32)
    start = tl.multiple_of((base + entry(VB, BAND, 0)).to(tl.pointer_type(tl.uint32)), 16)  # see `layout`
    scales = consecutive(start + (head * 32 + pair) * GROUPS, GROUPS)
    first = repeated(scales[GROUP // 2], M)
    second = repeated(scales[(GROUPS + GROUP) // 2], M)
    most = _MOST * tl.exp2(-lift)
    if PTX:
        half = most.to(tl.float16)
        low, high = tl.inline_asm_elementwise(
            _assembly(GROUPS, GROUP), "=h,=h,r,r,r,r", [weights, first, second, word(half, half)],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low, high = halves(weights)
        low = low * tl.minimum(_half(first, GROUP % 2).to(tl.float32), most).to(tl.float16)
        high = high * tl.minimum(_half(second, (GROUPS + GROUP) % 2).to(tl.float32), most).to(tl.float16)
    return tl.reshape(tl.permute(tl.join(low, high), 0, 2, 3, 1), 64, M)


@triton.jit
def _zeros_of_token(base, head, fill, E: tl.constexpr, BAND: tl.constexpr, VB: tl.constexpr):
    """fp16 [8 i, 8 groups, 4 l] of slots 16 l + 2 i + E; zero beyond the tokens and the groups."""
    i, lane = tl.arange(0, 8)[:, None, None], tl.arange(0, 4)[None, None, :]
    group = tl.arange(0, 8)[None, :, None]
    place = (head * 64 + 16 * lane + 2 * i + E) * entry(VB, BAND, 7) + group
    half = (base + entry(VB, BAND, 6)).to(tl.pointer_type(tl.float16))
    return tl.load(half + place, (group < entry(VB, BAND, 7)) & (16 * lane + 8 * E + i < fill), 0.0)


@triton.jit
def zeros_of_groups(base, head, fill, BAND: tl.constexpr, VB: tl.constexpr):
    """fp16 [16, 64]: for every group of a band of affine values its tokens' zeros, in the groups' rows, in the order
    of the rows of a tile of weights.
    """
    pairs = tl.join(_zeros_of_token(base, head, fill, 0, BAND, VB), _zeros_of_token(base, head, fill, 1, BAND, VB))
    tile = tl.join(pairs, tl.zeros(pairs.shape, tl.float16))  # i, group, l, e, and 8 rows without groups
    return tl.reshape(tl.permute(tile, 4, 1, 0, 2, 3), 16, 64)
