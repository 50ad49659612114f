"""A segment of a page's codes as tiles of numbers: where its blocks lie, and the tiles that `unpack` makes of them.

Segments are entries of a plan's `segments` (kernels/segments.py), told as the plan and the segment's place in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .unpack import depth, entry, key_tile, value_tile, words


@triton.jit
def codes_of(base, head, SEGMENTS: tl.constexpr, PART: tl.constexpr):
    """Where the codes of one head of a segment's band begin."""
    start = tl.multiple_of((base + entry(SEGMENTS, PART, 7)).to(tl.pointer_type(tl.uint32)), 16)  # see `layout`
    return start + head * (entry(SEGMENTS, PART, 1) * 32 * entry(SEGMENTS, PART, 5))


@triton.jit
def place_of(block, BACK: tl.constexpr, S: tl.constexpr):
    """Where, in blocks, those lie that are BACK before block l S + s of a circle of 4 S, less their octet's part."""
    block = (block + 4 * S - BACK) % (4 * S)
    return block % S * 32 + block // S


@triton.jit
def key_blocks(SEGMENTS: tl.constexpr, PART: tl.constexpr, BACK: tl.constexpr):
    """Where the blocks of a key tile lie, counted in blocks, [N, 8, 4]; BACK: those so many blocks before them."""
    s = tl.arange(0, entry(SEGMENTS, PART, 3))[:, None, None] + entry(SEGMENTS, PART, 2)
    lane = tl.arange(0, 4)[None, None, :] * entry(SEGMENTS, PART, 9)
    return place_of(lane + s, BACK, entry(SEGMENTS, PART, 1)) + tl.arange(0, 8)[None, :, None] * 4


@triton.jit
def value_blocks(SEGMENTS: tl.constexpr, PART: tl.constexpr, BACK: tl.constexpr):
    """Where the blocks of a value tile lie in the first of a lane's two octets; the second's lie 4 further."""
    N: tl.constexpr = entry(SEGMENTS, PART, 3)
    APART: tl.constexpr = entry(SEGMENTS, PART, 9)
    if N == 1:
        block = tl.arange(0, 4)[None, :, None] * APART + tl.arange(0, 1)[:, None, None]
    else:
        c, gl = tl.arange(0, N // 2)[:, None, None], tl.arange(0, 8)[None, :, None]
        block = gl // 2 * APART + gl % 2 * (N // 2) + c
    block = place_of(block + entry(SEGMENTS, PART, 2), BACK, entry(SEGMENTS, PART, 1))
    return block + tl.arange(0, 4)[None, None, :] * 8


@triton.jit
def _key_words(start, SEGMENTS: tl.constexpr, PART: tl.constexpr, BACK: tl.constexpr):
    place = key_blocks(SEGMENTS, PART, BACK)
    return words(start, place, entry(SEGMENTS, PART, 5), entry(SEGMENTS, PART, 1), True)


@triton.jit
def _value_words(start, SEGMENTS: tl.constexpr, PART: tl.constexpr, BACK: tl.constexpr, FURTHER: tl.constexpr):
    place = value_blocks(SEGMENTS, PART, BACK) + FURTHER
    return words(start, place, entry(SEGMENTS, PART, 5), entry(SEGMENTS, PART, 1), True)


@triton.jit
def key_numbers(base, head, SEGMENTS: tl.constexpr, PART: tl.constexpr, PTX: tl.constexpr):
    """fp16 [64, 16 N], one segment of the keys, as `key_tile`."""
    N: tl.constexpr = entry(SEGMENTS, PART, 3)
    KIND: tl.constexpr = entry(SEGMENTS, PART, 4)
    BITS: tl.constexpr = entry(SEGMENTS, PART, 5)
    T: tl.constexpr = entry(SEGMENTS, PART, 6)
    start = codes_of(base, head, SEGMENTS, PART)
    own = _key_words(start, SEGMENTS, PART, 0)
    before = ()
    for back in tl.static_range(depth(KIND, BITS)):
        before = before + _key_words(start, SEGMENTS, PART, back + 1)
    return key_tile(own, before, N, KIND, BITS, T, PTX)


@triton.jit
def value_numbers(base, head, SEGMENTS: tl.constexpr, PART: tl.constexpr, PTX: tl.constexpr):
    """fp16 [16 N, 64], one segment of the values, as `value_tile`."""
    N: tl.constexpr = entry(SEGMENTS, PART, 3)
    KIND: tl.constexpr = entry(SEGMENTS, PART, 4)
    BITS: tl.constexpr = entry(SEGMENTS, PART, 5)
    T: tl.constexpr = entry(SEGMENTS, PART, 6)
    start = codes_of(base, head, SEGMENTS, PART)
    own0 = _value_words(start, SEGMENTS, PART, 0, 0)
    own1 = _value_words(start, SEGMENTS, PART, 0, 4)
    before0 = ()
    before1 = ()
    for back in tl.static_range(depth(KIND, BITS)):
        before0 = before0 + _value_words(start, SEGMENTS, PART, back + 1, 0)
        before1 = before1 + _value_words(start, SEGMENTS, PART, back + 1, 4)
    return value_tile(own0, before0, own1, before1, N, KIND, BITS, T, PTX)
