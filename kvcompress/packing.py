"""Bits to bytes: one layout, shared by the torch reference and the kernels.

A vector of codes is cut into groups of 32 (its rest into one of 16 and one of 8). Code `t` of a group of 4m codes is
`c[q, n]` with quarter `q = t // m` and nibble `n = t % m`, and the group is stored as `bits` words of m nibbles (m = 8:
32-bit words), little-endian, nibble n at bits 4n..4n+3::

    1 bit    word 0, nibble n =  c[0,n] | c[1,n] << 1 | c[2,n] << 2 | c[3,n] << 3
    2 bits   word i, nibble n =  c[2i,n] | c[2i+1,n] << 2                                  i = 0, 1
    3 bits   word i, nibble n =  c[i,n] | (bit i of c[3,n]) << 3                           i = 0, 1, 2
    4 bits   word q, nibble n =  c[q,n]                                                    q = 0..3
    5 to 8   the low four bits as above, followed by the other bits as above

So eight consecutive codes always come out of a word by a mask and a shift as eight nibbles, ready to be the selector of
a byte permute (PRMT) or to be spread into packed half-precision numbers; three-bit codes take exactly three bits: three
words give their quarters by `& 0x77777777` and the fourth from their top bits by two shifts and two LOP3.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUPS = (32, 16, 8)


def check(count: int, bits: int) -> None:
    """Raises ValueError unless vectors of `count` codes of `bits` bits can be packed."""
    if bits not in range(1, 9):
        raise ValueError(f"bits must lie in 1..8, got {bits}")
    if count < 8 or count % 8:
        raise ValueError(f"vectors must have a positive multiple of 8 codes, got {count}")


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a packed vector of `count` codes."""
    check(count, bits)
    return count * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., count], integers below 2**bits, into uint8 [..., count * bits / 8]."""
    check(codes.shape[-1], bits)
    codes = codes.to(torch.uint8)
    if bits > 4:
        return torch.cat([pack(codes & 15, 4), pack(codes >> 4, bits - 4)], dim=-1)
    parts = [_pack_group(run.unflatten(-1, (-1, 4, size // 4)), bits) for run, size in _runs(codes, 1, 1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: uint8 [..., count * bits / 8] to uint8 codes [..., count]."""
    check(count, bits)
    if packed.shape[-1] != packed_bytes(count, bits):
        raise ValueError(f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, got {packed.shape[-1]}")
    if bits > 4:
        low, high = packed.split([packed_bytes(count, 4), packed_bytes(count, bits - 4)], dim=-1)
        return unpack(low, 4, count) | unpack(high, bits - 4, count) << 4
    parts = [_unpack_group(run.unflatten(-1, (-1, bits, size // 8)), bits) for run, size in _runs(packed, bits, 8)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _runs(vectors: Tensor, numerator: int, denominator: int) -> list[tuple[Tensor, int]]:
    """Cut [..., length] into runs of whole groups, largest first; a code takes numerator / denominator of a column."""
    runs, start = [], 0
    for size in GROUPS:
        width = size * numerator // denominator
        stop = start + (vectors.shape[-1] - start) // width * width
        if stop > start:
            runs.append((vectors[..., start:stop], size))
        start = stop
    return runs


def _pack_group(c: Tensor, bits: int) -> Tensor:
    """[..., groups, 4, m] codes to bytes [..., bytes]."""
    if bits == 1:
        nibbles = (c[..., 0, :] | c[..., 1, :] << 1 | c[..., 2, :] << 2 | c[..., 3, :] << 3).unsqueeze(-2)
    elif bits == 2:
        nibbles = c[..., 0::2, :] | c[..., 1::2, :] << 2
    elif bits == 3:
        shifts = torch.arange(3, dtype=torch.uint8, device=c.device).unsqueeze(-1)
        nibbles = c[..., :3, :] | (c[..., 3:, :] >> shifts & 1) << 3
    else:
        nibbles = c
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).flatten(-3)


def _unpack_group(words: Tensor, bits: int) -> Tensor:
    """[..., groups, bits, m / 2] bytes to codes [..., codes]."""
    nibbles = torch.stack([words & 15, words >> 4], dim=-1).flatten(-2)  # [..., groups, bits, m]
    if bits == 1:
        codes = torch.cat([nibbles >> q & 1 for q in range(4)], dim=-2)
    elif bits == 2:
        codes = torch.stack([nibbles & 3, nibbles >> 2], dim=-2).flatten(-3, -2)
    elif bits == 3:
        top = nibbles >> 3
        last = top[..., 0, :] | top[..., 1, :] << 1 | top[..., 2, :] << 2
        codes = torch.cat([nibbles & 7, last.unsqueeze(-2)], dim=-2)
    else:
        codes = nibbles
    return codes.flatten(-3)
