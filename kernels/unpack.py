"""From packed words to half-precision tiles, in the registers of the lanes that a matrix instruction wants them in.

A block is 4 dimensions x 8 slots in `bits` words (kvcompress/packing.py). It becomes bytes, by the kind of its codes:

    trellis   sums of three bytes, looked up in tables of eight by a byte permute (PRMT), four tokens at once; one IADD3
              adds them for four tokens
    levels    one byte looked up; of five bits, whose levels are symmetric, the table holds the lower half, and codes
              and bytes of the upper half are turned round by exclusive ors
    affine    the code itself, by masks and shifts

Below 128 a permute makes two of them a pair of fp16 numbers without any conversion: it fills the upper bytes with the
sign of the lower ones, zero, and what results is the subnormal number `byte * 2^-24`, which matrix units multiply
exactly; larger bytes (levels of five bits, affine codes of eight) take half a permute more where a pair comes out of
two registers. It stands for `step * (2^24 number - offset)`; the step goes into scales, the offset into sums over the
query and over the weights.

Keys have their tokens in order, slot 8 o + n of octet o being token 8 o + n. Values have them in the order of
kvcompress.store.SLOTS, so that the two tokens of a pair, whose weights lie side by side in a lane, are side by side in
a word.

PTX does this where it can run. Elsewhere (interpreter, other vendors) the arithmetic twin below computes the same.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _text(kind, bits, tables, values):
    from .ptx import program  # in here, since a global function would have to be Triton's

    return program(kind, bits, tables, values)[0]


@triton.constexpr_function
def _constraints(kind, bits, tables, values):
    from .ptx import program

    return program(kind, bits, tables, values)[1]


@triton.constexpr_function
def _halves(count):
    return (tl.float16,) * count


@triton.constexpr_function
def entry(table, i, j):
    """table[i][j] of a tuple of tuples, which Triton 3.6 does not index twice."""
    return table[i][j]


@triton.constexpr_function
def depth(kind, bits):
    """How many blocks before its own a block's trellis windows reach into."""
    from .ptx import previous_blocks

    return previous_blocks(kind, bits)


@triton.jit
def _join8(a, b, c, d, e, f, g, h):
    """[..., 2, 2, 2] of tensors 0 to 7, the number's highest bit first."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.join(even, odd)


@triton.jit
def _tokens(o, i: tl.constexpr):
    """[..., e, slot (three bits)] of the outputs o[i : i + 16], which are [slot][e]."""
    return _join8(
        tl.join(o[i], o[i + 1]),
        tl.join(o[i + 2], o[i + 3]),
        tl.join(o[i + 4], o[i + 5]),
        tl.join(o[i + 6], o[i + 7]),
        tl.join(o[i + 8], o[i + 9]),
        tl.join(o[i + 10], o[i + 11]),
        tl.join(o[i + 12], o[i + 13]),
        tl.join(o[i + 14], o[i + 15]),
    )


@triton.jit
def consecutive(pointers, COUNT: tl.constexpr):
    """COUNT tensors [a, b, c] of the words at pointers [a, b, c] and after them, two or four by one instruction."""
    if COUNT == 2:
        result = tl.split(tl.load(pointers[:, :, :, None] + tl.arange(0, 2)))
    elif COUNT == 4:
        four = tl.load(pointers[:, :, :, None] + tl.arange(0, 4))
        even, odd = tl.split(tl.reshape(four, pointers.shape[0], pointers.shape[1], pointers.shape[2], 2, 2))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        result = (first, second, third, fourth)
    else:
        result = separate(pointers, COUNT)
    return result


@triton.jit
def separate(pointers, COUNT: tl.constexpr):
    """As `consecutive`, one by one."""
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (tl.load(pointers + i),)
    return result


@triton.jit
def words(base, offsets, BITS: tl.constexpr, S: tl.constexpr, TOGETHER: tl.constexpr):
    """The words of blocks of a band of 16 S dimensions: BITS uint32 tensors like `offsets`, those of the plane of low
    four bits first. TOGETHER: several by one instruction, which sets the lanes of what they are made into.
    """
    LOW: tl.constexpr = BITS if BITS < 4 else 4
    high = base + 32 * S * LOW + offsets * (BITS - LOW)
    if TOGETHER:
        result = consecutive(base + offsets * LOW, LOW) + consecutive(high, BITS - LOW)
    else:
        result = separate(base + offsets * LOW, LOW) + separate(high, BITS - LOW)
    return result


@triton.jit
def _shifted(nibbles, newest: tl.constexpr, position: tl.constexpr):
    """The twin of `_field`; nibbles[k] are those k before the newest."""
    index: tl.constexpr = newest + position // 4
    offset: tl.constexpr = position % 4
    if offset < 2:
        result = (nibbles[index] >> offset) & 0x77777777
    elif offset == 2:
        result = ((nibbles[index] >> 2) & 0x33333333) | ((nibbles[index + 1] & 0x11111111) << 2)
    else:
        result = ((nibbles[index] >> 3) & 0x11111111) | ((nibbles[index + 1] & 0x33333333) << 1)
    return result


@triton.jit
def _look_up(selector, low: tl.constexpr, high: tl.constexpr):
    """[..., 8]: for every nibble of the selectors the byte that it names in a table of eight, as int32."""
    index = (selector[:, :, :, None] >> (4 * tl.arange(0, 8)).to(tl.uint32)[None, None, None, :]) & 15
    four = tl.where((index & 4) != 0, tl.full(index.shape, high, tl.uint32), tl.full(index.shape, low, tl.uint32))
    return tl.where(index < 8, (four >> ((index & 3) * 8)) & 255, 0).to(tl.int32)


@triton.jit
def _codes3(own, d: tl.constexpr):
    if d < 3:
        result = own[d] & 0x77777777
    else:
        low = ((own[0] >> 3) & 0x11111111) | ((own[1] >> 2) & 0x22222222)
        result = low | ((own[2] >> 1) & 0x44444444)
    return result


@triton.jit
def _code(own, d: tl.constexpr, BITS: tl.constexpr):
    """The twin of `_codes`."""
    if BITS == 4:
        result = own[d]
    elif BITS == 3:
        result = _codes3(own, d)
    elif BITS == 2:
        result = (own[d // 2] >> (2 - 2 * (d % 2))) & 0x33333333
    else:
        result = (own[0] >> (3 - d)) & 0x11111111
    return result


@triton.jit
def _nibbles(codes):
    """[..., 8]: the nibbles of words, int32."""
    return ((codes[:, :, :, None] >> (4 * tl.arange(0, 8)).to(tl.uint32)[None, None, None, :]) & 15).to(tl.int32)


@triton.jit
def _mirrored(own, d: tl.constexpr, T: tl.constexpr):
    """The twin of `ptx._mirrored`, int32 [..., 8]."""
    upper = _code((own[4],), d, 1)
    low = own[d] ^ (upper * 15)
    return (_look_up(low, T[0], T[1]) | _look_up(low ^ 0x88888888, T[2], T[3])) ^ (_nibbles(upper) * 255)


@triton.jit
def _plain(own, d: tl.constexpr, BITS: tl.constexpr):
    """The twin of `ptx._plain`, int32 [..., 8] in the order of slots."""
    if BITS > 4:
        high = ()
        for i in tl.static_range(BITS - 4):
            high = high + (own[4 + i],)
        result = _nibbles(own[d]) | (_nibbles(_code(high, d, BITS - 4)) << 4)
    else:
        result = _nibbles(_code(own, d, BITS))
    return result


@triton.jit
def _sums(own, before, d: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr):
    """The bytes of dimension d of a block for its eight slots, int32 [..., 8]. before: the earlier blocks' words."""
    if KIND == 2:
        total = _plain(own, d, BITS)
    elif KIND == 1 and BITS == 5:
        total = _mirrored(own, d, T)
    elif KIND == 1:
        code = _code(own, d, BITS)
        total = _look_up(code, T[0], T[1])
        if BITS == 4:
            total = total | _look_up(code ^ 0x88888888, T[2], T[3])
    elif BITS == 3:
        if d == 0:
            total = _look_up(_codes3(before, 3), T[2], T[3]) + _look_up(_codes3(before, 2), T[4], T[5])
        elif d == 1:
            total = _look_up(_codes3(own, 0), T[2], T[3]) + _look_up(_codes3(before, 3), T[4], T[5])
        else:
            total = _look_up(_codes3(own, d - 1), T[2], T[3]) + _look_up(_codes3(own, d - 2), T[4], T[5])
        total = total + _look_up(_codes3(own, d), T[0], T[1])
    else:
        nibbles = ()  # the newest first
        for i in tl.static_range(BITS):
            nibbles = nibbles + (own[BITS - 1 - i],)
        for i in tl.static_range(len(before)):
            nibbles = nibbles + (before[i // BITS * BITS + BITS - 1 - i % BITS],)
        per: tl.constexpr = 4 // BITS
        newest: tl.constexpr = BITS - 1 - d // per
        if BITS == 4:
            low = (nibbles[newest] & 0x11111111) | ((nibbles[newest + 1] & 0x11111111) << 1)
            low = low | ((nibbles[newest + 2] & 0x11111111) << 2)
            total = _look_up((nibbles[newest] >> 1) & 0x77777777, T[0], T[1])
            total = total + _look_up((nibbles[newest + 1] >> 1) & 0x77777777, T[2], T[3])
            total = total + _look_up(low, T[4], T[5])
        else:
            first: tl.constexpr = (per - 1 - d % per) * BITS
            total = _look_up(_shifted(nibbles, newest, first), T[0], T[1])
            total = total + _look_up(_shifted(nibbles, newest, first + 3), T[2], T[3])
            total = total + _look_up(_shifted(nibbles, newest, first + 6), T[4], T[5])
    return total


@triton.jit
def _twin(own, before, KIND: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr):
    """[..., slot 8, dimension (two bits)] of blocks: bit for bit the numbers of the PTX."""
    a = _sums(own, before, 0, KIND, BITS, T).to(tl.int16).to(tl.float16, bitcast=True)
    b = _sums(own, before, 1, KIND, BITS, T).to(tl.int16).to(tl.float16, bitcast=True)
    c = _sums(own, before, 2, KIND, BITS, T).to(tl.int16).to(tl.float16, bitcast=True)
    d = _sums(own, before, 3, KIND, BITS, T).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def key_tile(
    own, before, N: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """fp16 [64, 16 N] of blocks [N, 8 octets, 4]: rows (slot, octet), columns (s, h, l, e) for dimension 2h + e of
    block (s, l).
    """
    if PTX:
        o = tl.inline_asm_elementwise(
            _text(KIND, BITS, T, False), _constraints(KIND, BITS, T, False), own + before,
            dtype=_halves(32), is_pure=True, pack=1,
        )  # fmt: skip
        tile = tl.join(_tokens(o, 0), _tokens(o, 16))  # s, octet, l, e, i2, i1, i0, h
        tile = tl.permute(tile, 4, 5, 6, 1, 0, 7, 2, 3)
    else:
        tile = _twin(own, before, KIND, BITS, T)  # s, octet, l, i, h, e
        tile = tl.permute(tile, 3, 1, 0, 4, 2, 5)
    return tl.reshape(tile, 64, 16 * N)


@triton.jit
def _value_block(own, before, KIND: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, PTX: tl.constexpr):
    """[c, gl, l, e, j high, j low, d high, d low] of blocks of values: slot 2j + e of dimension d."""
    if PTX:
        o = tl.inline_asm_elementwise(
            _text(KIND, BITS, T, True), _constraints(KIND, BITS, T, True), own + before,
            dtype=_halves(32), is_pure=True, pack=1,
        )  # fmt: skip
        even = tl.join(_slots(o, 0), _slots(o, 16))
        odd = tl.join(_slots(o, 8), _slots(o, 24))
        tile = tl.join(even, odd)
    else:
        tile = _twin(own, before, KIND, BITS, T)  # c, gl, l, slot, d high, d low
        tile = tl.reshape(tile, tile.shape[0], tile.shape[1], tile.shape[2], 2, 2, 2, 2, 2)
        tile = tl.permute(tile, 0, 1, 2, 5, 3, 4, 6, 7)
    return tile


@triton.jit
def _slots(o, i: tl.constexpr):
    """[..., e, j (two bits)] of the outputs o[i : i + 8], which are [j][e]."""
    even = tl.join(tl.join(o[i], o[i + 1]), tl.join(o[i + 4], o[i + 5]))
    odd = tl.join(tl.join(o[i + 2], o[i + 3]), tl.join(o[i + 6], o[i + 7]))
    return tl.join(even, odd)


@triton.jit
def value_tile(
    own0, before0, own1, before1, N: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """fp16 [16 N, 64] of the blocks [c, gl, l] of octets 2l and 2l + 1: columns (i, l, e), slot 2 (i % 4) + e of octet
    2l + i // 4, rows (c, d, gl) for dimension d of block (c, gl); where N = 1 the blocks are [1, 4, l] and the rows
    (d high, gl, d low).
    """
    tile = tl.join(_value_block(own0, before0, KIND, BITS, T, PTX), _value_block(own1, before1, KIND, BITS, T, PTX))
    # c, gl, l, e, j high, j low, d high, d low, octet
    if N == 1:
        tile = tl.permute(tile, 0, 6, 1, 7, 8, 4, 5, 2, 3)
    else:
        tile = tl.permute(tile, 0, 6, 7, 1, 8, 4, 5, 2, 3)
    return tl.reshape(tile, 16 * N, 64)
