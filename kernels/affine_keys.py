"""Products of queries with affine keys, on their codes: every channel of 32 tokens has a scale and a zero of its own.

With the code c of token t and channel j, and g the token's half of the page::

    key_t . query = sum_j c[t, j] (scale[g, j] query_j) + sum_j zero[g, j] query_j

So the queries are multiplied by the scales of both halves, both products are made for all tokens, since matrix units
have time to spare, and each token takes its own; the zeros are one more product.

Queries are at most one (kernels/absorb.py) and scales float16, so their products are too. Both come as words of two
channels, in the lanes in which a matrix instruction wants a query tile: [N, M, 4] words for h of 0 and of 1 are the
channels (s, h, l, e) of the segment's columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .half_words import halves, product, repeated
from .tiles import key_numbers
from .unpack import consecutive, entry


@triton.jit
def query_words(Q, m, rows, R: tl.constexpr, AT: tl.constexpr, N: tl.constexpr):
    """uint32 [N, M, 4, h]: a segment's queries from fp16 [rows, R], AT the segment's first column."""
    column = AT // 2 + tl.arange(0, N)[:, None, None] * 8 + tl.arange(0, 4)[None, None, :]
    source = Q.to(tl.pointer_type(tl.uint32)) + m[None, :, None] * (R // 2) + column
    live = (m[None, :, None] < rows) & (column >= 0)
    return tl.join(tl.load(source, live, 0), tl.load(source + 4, live, 0))


@triton.jit
def _of_channels(base, head, half, AT: tl.constexpr, KS: tl.constexpr, PART: tl.constexpr):
    """uint32 [N, 8, 4] for h of 0 and of 1: pairs of scales, or zeros, of a segment's channels in halves of the page
    [8].
    """
    S: tl.constexpr = entry(KS, PART, 1)
    s = tl.arange(0, entry(KS, PART, 3))[:, None, None] + entry(KS, PART, 2)
    block = tl.arange(0, 4)[None, None, :] * entry(KS, PART, 9) + s
    start = tl.multiple_of((base + AT).to(tl.pointer_type(tl.uint32)), 16)  # see `layout`
    return consecutive(start + (head * 2 + half)[None, :, None] * (8 * S) + 2 * block, 2)


@triton.jit
def _tile(a, b, c, d):
    """fp16 [16 N, M] of halves e = 0 and 1, [N, M, 4] each, of the words for h = 0, then of those for h = 1."""
    tile = tl.join(tl.join(a, c), tl.join(b, d))  # s, m, l, h, e
    return tl.reshape(tl.permute(tile, 0, 3, 2, 4, 1), 16 * a.shape[0], a.shape[1])


@triton.jit
def _scaled_queries(q, base, head, half, AT: tl.constexpr, KS: tl.constexpr, PART: tl.constexpr, PTX: tl.constexpr):
    """fp16 [16 N, M]: a segment's queries times the scales of its channels in one half of the page."""
    scale0, scale1 = _of_channels(base, head, half + tl.zeros([8], tl.int32), AT, KS, PART)
    q0, q1 = tl.split(q)
    a, b = product(q0, repeated(scale0, q.shape[1]), PTX)
    c, d = product(q1, repeated(scale1, q.shape[1]), PTX)
    return _tile(a, b, c, d)


@triton.jit
def _zeros(base, head, last, AT: tl.constexpr, KS: tl.constexpr, PART: tl.constexpr):
    """fp16 [16, 16 N]: in rows g and g + 8 the zeros of a segment's channels that octet g of the tokens has."""
    word0, word1 = _of_channels(base, head, tl.minimum(tl.arange(0, 8) // 4, last), AT, KS, PART)
    a, b = halves(word0)
    c, d = halves(word1)
    tile = tl.join(tl.join(a, c), tl.join(b, d))  # s, g, l, h, e
    tile = tl.permute(tl.join(tile, tile), 5, 1, 0, 3, 2, 4)
    return tl.reshape(tile, 16, 16 * a.shape[0])


@triton.jit
def channel_product(q, base, head, fill, M: tl.constexpr, BAND: tl.constexpr, KS: tl.constexpr, KB: tl.constexpr,
                    PTX: tl.constexpr):  # fmt: skip
    """float32 [64, M]: what one band's codes stand for times the queries; row 8 i + g is of token 8 g + i."""
    SCALE: tl.constexpr = entry(KB, BAND, 0)
    ZERO: tl.constexpr = entry(KB, BAND, 6)
    last = tl.where(fill > 32, 1, 0)  # nothing is read of a half without tokens: its products are not used
    first = tl.zeros([64, M], tl.float32)
    second = tl.zeros([64, M], tl.float32)
    zero = tl.zeros([16, M], tl.float32)
    for i in tl.static_range(len(KS)):
        if entry(KS, i, 0) == BAND:
            numbers = key_numbers(base, head, KS, i, PTX)
            first = tl.dot(numbers, _scaled_queries(q[i], base, head, 0, SCALE, KS, i, PTX), first)
            second = tl.dot(numbers, _scaled_queries(q[i], base, head, last, SCALE, KS, i, PTX), second)
            q0, q1 = tl.split(q[i])
            a, b = halves(q0)
            c, d = halves(q1)
            zero = tl.dot(_zeros(base, head, last, ZERO, KS, i), _tile(a, b, c, d), zero)
    later = (tl.arange(0, 64) % 8 >= 4)[:, None]
    bias = tl.max(tl.reshape(zero, 2, 8, M), 0)  # both rows are the same
    bias = tl.reshape(tl.broadcast_to(bias[None, :, :], [8, 8, M]), 64, M)
    return tl.where(later, second, first) * entry(KB, BAND, 2) + bias
