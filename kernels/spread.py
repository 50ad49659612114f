"""Unpacking by more lanes than a segment has blocks: parts of a block's tokens go to lanes of their own.

`unpack` gives a block of 4 dimensions x 8 slots to a lane. A program of several warps has lanes to spare where segments
are narrow: those would do what others do already, and Triton would move what they hold about at every step, for it
takes the layouts of large loads only as given. Here a block is taken by PARTS lanes, each of which shifts its slots to
the lowest nibbles and leaves the others, so that as many lanes are at work as there are, and the tiles are those of
`unpack`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import codes_of, key_numbers, place_of, value_numbers
from .unpack import _constraints, _halves, _slots, _text, _twin, _value_block, depth, entry, words


@triton.constexpr_function
def parts(blocks, lanes):
    """How many lanes share a block, 1, 2 or 4; two slots are a word's least."""
    return max(1, min(4, lanes // blocks))


@triton.jit
def _moved(blocks, part, PARTS: tl.constexpr):
    """Words with the slots of part `part` in their lowest nibbles."""
    result = ()
    for i in tl.static_range(len(blocks)):
        result = result + (blocks[i] >> (part * (32 // PARTS)).to(tl.uint32),)
    return result


@triton.jit
def _key_words(start, SEGMENTS: tl.constexpr, PART: tl.constexpr, BACK: tl.constexpr, PARTS: tl.constexpr):
    """The words of [N PARTS, 8 octets, 4] blocks, BACK blocks before the segment's own."""
    S: tl.constexpr = entry(SEGMENTS, PART, 1)
    at = tl.arange(0, entry(SEGMENTS, PART, 3) * PARTS)[:, None, None]
    block = tl.arange(0, 4)[None, None, :] * entry(SEGMENTS, PART, 9) + at // PARTS + entry(SEGMENTS, PART, 2)
    place = place_of(block, BACK, S) + tl.arange(0, 8)[None, :, None] * 4
    return _moved(words(start, place, entry(SEGMENTS, PART, 5), S, False), at % PARTS, PARTS)


@triton.jit
def _first_slots(tile, PARTS: tl.constexpr):
    """[..., slot 8, 2, 2] to its first 8 / PARTS slots."""
    tile = tl.reshape(tile, tile.shape[0], tile.shape[1], tile.shape[2], PARTS, 8 // PARTS, 2, 2)
    own = tl.arange(0, PARTS)[None, None, None, :, None, None, None] == 0
    return tl.sum(tl.where(own, tile.to(tl.float32), 0.0), 3).to(tl.float16)


@triton.jit
def _key_slots(o, i: tl.constexpr, PARTS: tl.constexpr):
    """[..., e, slot bits] of the first slots of the outputs from o[i] on, which are [slot][e]."""
    if PARTS == 2:
        result = _slots(o, i)
    else:
        result = tl.join(tl.join(o[i], o[i + 1]), tl.join(o[i + 2], o[i + 3]))
    return result


@triton.jit
def spread_keys(base, head, SEGMENTS: tl.constexpr, PART: tl.constexpr, PTX: tl.constexpr, PARTS: tl.constexpr):
    """What `tiles.key_numbers` gives, fp16 [64, 16 N], for PARTS of 2 or 4."""
    N: tl.constexpr = entry(SEGMENTS, PART, 3)
    KIND: tl.constexpr = entry(SEGMENTS, PART, 4)
    BITS: tl.constexpr = entry(SEGMENTS, PART, 5)
    T: tl.constexpr = entry(SEGMENTS, PART, 6)
    start = codes_of(base, head, SEGMENTS, PART)
    own = _key_words(start, SEGMENTS, PART, 0, PARTS)
    before = ()
    for back in tl.static_range(depth(KIND, BITS)):
        before = before + _key_words(start, SEGMENTS, PART, back + 1, PARTS)
    if PTX:
        o = tl.inline_asm_elementwise(
            _text(KIND, BITS, T, False), _constraints(KIND, BITS, T, False), own + before,
            dtype=_halves(32), is_pure=True, pack=1,
        )  # fmt: skip
        tile = tl.join(_key_slots(o, 0, PARTS), _key_slots(o, 16, PARTS))
        tile = tl.reshape(tile, N, PARTS, 8, 4, 2, 8 // PARTS, 2)  # s, part, octet, l, e, slot, h
        tile = tl.permute(tile, 1, 5, 2, 0, 6, 3, 4)
    else:
        tile = _first_slots(_twin(own, before, KIND, BITS, T), PARTS)
        tile = tl.reshape(tile, N, PARTS, 8, 4, 8 // PARTS, 2, 2)  # s, part, octet, l, slot, h, e
        tile = tl.permute(tile, 1, 4, 2, 0, 5, 3, 6)
    return tl.reshape(tile, 64, 16 * N)


@triton.jit
def _value_words(start, SEGMENTS: tl.constexpr, PART: tl.constexpr, BACK: tl.constexpr, PARTS: tl.constexpr):
    """The words of blocks [c PARTS, gl, octet]."""
    S: tl.constexpr = entry(SEGMENTS, PART, 1)
    N: tl.constexpr = entry(SEGMENTS, PART, 3)
    APART: tl.constexpr = entry(SEGMENTS, PART, 9)
    if N == 1:
        at, gl = tl.arange(0, PARTS)[:, None, None], tl.arange(0, 4)[None, :, None]
        block = gl * APART + at // PARTS
    else:
        at, gl = tl.arange(0, N // 2 * PARTS)[:, None, None], tl.arange(0, 8)[None, :, None]
        block = gl // 2 * APART + gl % 2 * (N // 2) + at // PARTS
    place = place_of(block + entry(SEGMENTS, PART, 2), BACK, S) + tl.arange(0, 8)[None, None, :] * 4
    return _moved(words(start, place, entry(SEGMENTS, PART, 5), S, False), at % PARTS, PARTS)


@triton.jit
def _value_slots(o, d: tl.constexpr, PARTS: tl.constexpr):
    """[..., e, j bits] of the first slots of dimension d: slot 2j + e."""
    if PARTS == 2:
        result = tl.join(tl.join(o[8 * d], o[8 * d + 1]), tl.join(o[8 * d + 2], o[8 * d + 3]))
    else:
        result = tl.join(o[8 * d], o[8 * d + 1])
    return result


@triton.jit
def spread_values(base, head, SEGMENTS: tl.constexpr, PART: tl.constexpr, PTX: tl.constexpr, PARTS: tl.constexpr):
    """What `tiles.value_numbers` gives, fp16 [16 N, 64], for PARTS of 1, 2 or 4."""
    N: tl.constexpr = entry(SEGMENTS, PART, 3)
    KIND: tl.constexpr = entry(SEGMENTS, PART, 4)
    BITS: tl.constexpr = entry(SEGMENTS, PART, 5)
    T: tl.constexpr = entry(SEGMENTS, PART, 6)
    start = codes_of(base, head, SEGMENTS, PART)
    own = _value_words(start, SEGMENTS, PART, 0, PARTS)
    before = ()
    for back in tl.static_range(depth(KIND, BITS)):
        before = before + _value_words(start, SEGMENTS, PART, back + 1, PARTS)
    if PARTS == 1:
        tile = _value_block(own, before, KIND, BITS, T, PTX)  # ..., e, j high, j low, d high, d low
    elif PTX:
        o = tl.inline_asm_elementwise(
            _text(KIND, BITS, T, True), _constraints(KIND, BITS, T, True), own + before,
            dtype=_halves(32), is_pure=True, pack=1,
        )  # fmt: skip
        even = tl.join(_value_slots(o, 0, PARTS), _value_slots(o, 2, PARTS))
        tile = tl.join(even, tl.join(_value_slots(o, 1, PARTS), _value_slots(o, 3, PARTS)))
    else:
        tile = _first_slots(_twin(own, before, KIND, BITS, T), PARTS)  # ..., slot, d high, d low
        tile = tl.reshape(tile, tile.shape[0], tile.shape[1], tile.shape[2], 4 // PARTS, 2, 2, 2)
        tile = tl.permute(tile, 0, 1, 2, 4, 3, 5, 6)
    groups: tl.constexpr = 4 if N == 1 else 8
    tile = tl.reshape(tile, (N + 1) // 2, PARTS, groups, 4, 2, 2, 4 // PARTS, 2, 2)
    # c, part, gl, l, octet, e, j, d high, d low
    if N == 1:
        tile = tl.permute(tile, 0, 7, 2, 8, 4, 1, 6, 3, 5)
    else:
        tile = tl.permute(tile, 0, 7, 8, 2, 4, 1, 6, 3, 5)
    return tl.reshape(tile, 16 * N, 64)


@triton.jit
def key_segment(base, head, SEGMENTS: tl.constexpr, PART: tl.constexpr, PTX: tl.constexpr, LANES: tl.constexpr):
    """fp16 [64, 16 N], one segment of the keys, by LANES lanes."""
    BLOCKS: tl.constexpr = 32 * entry(SEGMENTS, PART, 3)
    if BLOCKS >= LANES:
        numbers = key_numbers(base, head, SEGMENTS, PART, PTX)
    else:
        numbers = spread_keys(base, head, SEGMENTS, PART, PTX, parts(BLOCKS, LANES))
    return numbers


@triton.jit
def value_segment(base, head, SEGMENTS: tl.constexpr, PART: tl.constexpr, PTX: tl.constexpr, LANES: tl.constexpr):
    """fp16 [16 N, 64], one segment of the values, by LANES lanes."""
    BLOCKS: tl.constexpr = 32 * entry(SEGMENTS, PART, 3)
    if BLOCKS // 2 >= LANES:
        numbers = value_numbers(base, head, SEGMENTS, PART, PTX)
    else:
        numbers = spread_values(base, head, SEGMENTS, PART, PTX, parts(BLOCKS, LANES))
    return numbers
