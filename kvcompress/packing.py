"""Bits to bytes: one layout, shared by the torch reference and the kernels.

Codes [T, W] of T tokens (a multiple of 8) of one head, W dimensions (a multiple of 8), are cut into blocks of 8 tokens
(an octet: tokens 8o..8o+7) and 4 dimensions. With c[q, n] the code of the block's dimension q and its octet's token n,
a block is stored as `bits` words of 32 bits, little-endian, nibble n at bits 4n..4n+3::

    1 bit    word 0, nibble n =  c[3,n] | c[2,n] << 1 | c[1,n] << 2 | c[0,n] << 3
    2 bits   word i, nibble n =  c[2i+1,n] | c[2i,n] << 2                                  i = 0, 1
    3 bits   word i, nibble n =  c[i,n] | (bit i of c[3,n]) << 3                           i = 0, 1, 2
    4 bits   word q, nibble n =  c[q,n]                                                    q = 0..3
    5 to 8   a plane of all low four bits as above, followed by a plane of the other bits

A nibble is a piece of a token's bit stream, the newest bits lowest, and one dimension of eight tokens always comes out
of a word by a mask and a shift as eight nibbles, ready to be the selector of a byte permute (PRMT); three-bit codes
take exactly three bits: three words give their dimensions by `& 0x77777777` and the fourth from their top bits by
shifts and masks.

Blocks lie in a plane as [s < S][octet < T / 8][l < L][word < bits], block (s, l) with the dimensions
4 (l S + s) .. 4 (l S + s) + 3, where L = 4 and S = W / 16, or L = 2 and S = W / 8 where W is no multiple of 16. The
operands of a matrix instruction (MMA) are spread over lanes in groups of four: lane l of a group takes S blocks, the
dimensions 4 S l to 4 S l + 4 S - 1. So a lane unpacks what its fragment holds and nothing changes hands, neighbours
among the dimensions, whose bits a trellis shares, are in the same lane but for its first ones, and the lanes of a warp
read consecutive words.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 8  # tokens of an octet, and what widths are multiples of


def check(tokens: int, width: int, bits: int) -> None:
    """Raises ValueError unless codes [tokens, width] of `bits` bits can be packed."""
    if bits not in range(1, 9):
        raise ValueError(f"bits must lie in 1..8, got {bits}")
    if min(tokens, width) < UNIT or tokens % UNIT or width % UNIT:
        raise ValueError(f"tokens and dimensions must be positive multiples of {UNIT}, got {tokens} and {width}")


def lanes(width: int) -> int:
    """L of the layout: the lanes that `width` dimensions are shared out to."""
    return 4 if width % 16 == 0 else 2


def packed_bytes(tokens: int, width: int, bits: int) -> int:
    """Bytes of packed codes [tokens, width]."""
    check(tokens, width, bits)
    return tokens * width * bits // 8


def packed_tokens(size: int, width: int, bits: int) -> int:
    """How many tokens of `width` dimensions `size` bytes hold; raises ValueError where these are not whole octets."""
    octet = packed_bytes(UNIT, width, bits)
    if size < octet or size % octet:
        raise ValueError(f"8 tokens of {width} codes of {bits} bits take {octet} bytes, {size} are no multiple of that")
    return size // octet * UNIT


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., T, W], integers below 2**bits, into uint8 [..., T * W * bits / 8]."""
    tokens, width = codes.shape[-2:]
    check(tokens, width, bits)
    codes = codes.to(torch.uint8).contiguous()
    if bits > 4:
        return torch.cat([pack(codes & 15, 4), pack(codes >> 4, bits - 4)], dim=-1)
    count, lead = lanes(width), codes.shape[:-2]
    # [..., O, n // 2, n % 2, L, S], its bytes q
    fours = codes.view(torch.int32).view(*lead, tokens // 8, 4, 2, count, -1)
    pairs = fours[..., 0, :, :] | fours[..., 1, :, :] << 4
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=codes.device).view(4, 1, 1)
    dimensions = [((pairs >> 8 * q & 255) << shifts).sum(dim=-3, dtype=torch.int32) for q in range(4)]  # [..., O, L, S]
    words = torch.stack(_combine(dimensions, bits), dim=-1)
    return words.movedim(-2, -4).contiguous().flatten(-4).view(torch.uint8)


def unpack(packed: Tensor, bits: int, tokens: int, width: int) -> Tensor:
    """Inverse of `pack`: uint8 [..., T * W * bits / 8] to uint8 codes [..., T, W]."""
    size = packed_bytes(tokens, width, bits)
    if packed.shape[-1] != size:
        raise ValueError(f"{tokens} tokens of {width} codes of {bits} bits take {size} bytes, got {packed.shape[-1]}")
    if bits > 4:
        low, high = packed.split([packed_bytes(tokens, width, 4), packed_bytes(tokens, width, bits - 4)], dim=-1)
        return unpack(low, 4, tokens, width) | unpack(high, bits - 4, tokens, width) << 4
    count, lead = lanes(width), packed.shape[:-1]
    words = (
        packed.view(torch.int32).unflatten(-1, (-1, tokens // 8, count, bits)).movedim(-4, -2)
    )  # [..., O, L, S, bits]
    dimensions = _separate(words.movedim(-1, 0).contiguous(), bits)
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=packed.device).view(4, 1, 1)
    pairs = dimensions[0].unsqueeze(-3) >> shifts & 255  # [..., O, n // 2, L, S], q in bytes, n % 2 in their nibbles
    for q in (1, 2, 3):
        pairs |= (dimensions[q].unsqueeze(-3) >> shifts).bitwise_and_(255).bitwise_left_shift_(8 * q)
    fours = pairs.new_empty(*lead, tokens // 8, 4, 2, count, width // (4 * count))
    torch.bitwise_and(pairs, 0x0F0F0F0F, out=fours[..., 0, :, :])
    torch.bitwise_and(pairs >> 4, 0x0F0F0F0F, out=fours[..., 1, :, :])
    return fours.view(torch.uint8).view(*lead, tokens, width)


def _combine(dimensions: list[Tensor], bits: int) -> list[Tensor]:
    """The words of blocks from their four dimensions, eight nibbles each, int32."""
    a, b, c, d = dimensions
    if bits == 1:
        return [d | c << 1 | b << 2 | a << 3]
    if bits == 2:
        return [b | a << 2, d | c << 2]
    if bits == 3:
        return [x | (d >> i & 0x11111111) << 3 for i, x in enumerate((a, b, c))]
    return dimensions


def _separate(words: Tensor, bits: int) -> list[Tensor]:
    """Inverse of `_combine`: int32 [bits, ...] to the four dimensions of blocks, int32 [...] each."""
    if bits == 1:
        return [words[0] >> shift & 0x11111111 for shift in (3, 2, 1, 0)]
    if bits == 2:
        return [word >> shift & 0x33333333 for word in words for shift in (2, 0)]
    if bits == 3:
        top = words >> 3 & 0x11111111
        return [*(words & 0x77777777), top[0] | top[1] << 1 | top[2] << 2]
    return list(words)
