"""What all encode kernels do: centre and transform, round, store gains, pack codes into words."""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import PAGE

TINY = tl.constexpr(1e-30)
_PAGE = tl.constexpr(PAGE)
_DEPTH = tl.constexpr(16)  # dimensions of x multiplied at a time


@triton.jit
def transformed(
    x: tl.tensor,
    x_token: tl.tensor,
    mean: tl.tensor,
    analysis: tl.tensor,
    analysis_row: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    token: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CENTRED: tl.constexpr,
    DENSE: tl.constexpr,
) -> tl.tensor:
    """Rows `first` up to `stop` of analysis (x - mean): float32 [ROWS, TOKENS], zero beyond `stop`.

    x, mean, analysis: pointers to the page's and head's [., D]. token: those wanted, [TOKENS]. DENSE: whether there is
    an analysis matrix; the rows are x's own dimensions otherwise.
    """
    row = first + tl.arange(0, ROWS)
    if not DENSE:
        y = tl.load(x + token[None, :] * x_token + row[:, None], mask=row[:, None] < stop, other=0.0).to(tl.float32)
        if CENTRED:
            y -= tl.load(mean + row, mask=row < stop, other=0.0)[:, None]
        return y
    y = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, D, _DEPTH):
        d = start + tl.arange(0, _DEPTH)
        part = tl.load(x + token[None, :] * x_token + d[:, None], mask=d[:, None] < D, other=0.0).to(tl.float32)
        if CENTRED:
            part -= tl.load(mean + d, mask=d < D, other=0.0)[:, None]
        inside = (row[:, None] < stop) & (d[None, :] < D)
        matrix = tl.load(analysis + row[:, None] * analysis_row + d[None, :], mask=inside, other=0.0)
        y = tl.dot(matrix, part, y, input_precision="ieee")
    return y


@triton.jit
def root_mean_square(energy: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Of vectors whose squares sum up to `energy`; TINY at least, NaN where they hold one."""
    rms = tl.sqrt_rn(energy / WIDTH)
    return tl.where(rms < TINY, TINY, rms)


@triton.jit
def to_nearest(x: tl.tensor) -> tl.tensor:
    """Numbers of magnitude below 2^22 to the nearest integers, halves to even: int32."""
    return ((x + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def as_half(x: tl.tensor) -> tl.tensor:
    """float16, magnitudes beyond its largest finite number as that number."""
    return tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x)).to(tl.float16)


@triton.jit
def store_gain(halves: tl.tensor, octets: tl.tensor, where: tl.tensor, gain: tl.tensor, LOG: tl.constexpr) -> None:
    """Gains [TOKENS] as kvcompress/codecs/scale.py stores them, at elements `where` of one of the two pointers."""
    if LOG:
        number = gain == gain
        place = tl.log2(tl.maximum(tl.where(number, gain, 1.0), TINY)) * 16.0 + 128.0
        code = to_nearest(tl.minimum(tl.maximum(place, 1.0), 254.0))
        code = tl.where(number, tl.where(gain < 0.001953125, 0, code), 255)
        tl.store(octets + where, code.to(tl.uint8))
    else:
        tl.store(halves + where, as_half(gain))


@triton.jit
def store_words(
    words: tl.tensor,
    codes: tl.tensor,
    first: tl.tensor,
    token: tl.tensor,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Pack codes int32 [ROWS, TOKENS] of dimensions `first` .. and tokens `token` .. into a head's words.

    ROWS a multiple of 4 and TOKENS of 8; dimensions beyond WIDTH are left out. Beyond four bits: two planes.
    """
    if BITS > 4:
        _store_plane(words, codes & 15, first, token, WIDTH, 4, ROWS, TOKENS)
        _store_plane(words + WIDTH * _PAGE // 8, codes >> 4, first, token, WIDTH, BITS - 4, ROWS, TOKENS)
    else:
        _store_plane(words, codes, first, token, WIDTH, BITS, ROWS, TOKENS)


@triton.jit
def _store_plane(
    words: tl.tensor,
    codes: tl.tensor,
    first: tl.tensor,
    token: tl.tensor,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    lanes: tl.constexpr = 4 if WIDTH % 16 == 0 else 2
    runs: tl.constexpr = WIDTH // (4 * lanes)
    block = first // 4 + tl.arange(0, ROWS // 4)[:, None]
    octet = token // 8 + tl.arange(0, TOKENS // 8)[None, :]
    at = ((block % runs * (_PAGE // 8) + octet) * lanes + block // runs) * BITS
    c = tl.reshape(codes, [ROWS // 4, 4, TOKENS // 8, 8])
    q = tl.arange(0, 4)[None, :, None, None]
    shift = 4 * tl.arange(0, 8)[None, None, None, :]
    for i in tl.static_range(BITS):
        if BITS == 1:
            nibble = c << (3 - q)
        elif BITS == 2:
            nibble = tl.where(q // 2 == i, c << (2 - q % 2 * 2), 0)
        elif BITS == 3:
            nibble = tl.where(q == i, c, tl.where(q == 3, (c >> i & 1) << 3, 0))
        else:
            nibble = tl.where(q == i, c, 0)
        word = tl.sum(tl.sum(nibble << shift, 3), 1)
        tl.store(words + at + i, word, mask=block < WIDTH // 4)
