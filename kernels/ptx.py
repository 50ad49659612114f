"""PTX that turns packed words into half-precision numbers: byte permutes for look-ups, no conversions.

See `unpack` for what is computed, and for the kinds of codes. The text is built from a few lines of straight code, in
which equal instructions appear once; tests/test_kernels_ptx.py runs it in an emulator beside the arithmetic twin.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

TRELLIS, LEVELS, AFFINE = 0, 1, 2  # kinds of codes
WINDOW = 9  # bits of the stream that a trellis element is decoded from, three fields of three
SEVENS, THREES, ONES, EIGHTS = 0x77777777, 0x33333333, 0x11111111, 0x88888888
LOW_NIBBLES = 0x0F0F0F0F
#: Tables of eight bytes, by the bit of the index (2, 1, 0) that says whether a byte is all ones.
ONES_WHERE = {2: (0, 0xFFFFFFFF), 1: (0xFFFF0000, 0xFFFF0000), 0: (0xFF00FF00, 0xFF00FF00)}

#: Names this version of the generator, for the caches of compiled kernels.
DIGEST = int(hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12], 16)


def previous_blocks(kind: int, bits: int) -> int:
    """How many blocks before its own a block's trellis windows reach into."""
    return -(-(-(-WINDOW // bits) - 1) // 4) if kind == TRELLIS else 0


def wide(kind: int, bits: int) -> bool:
    """Whether bytes may be 128 and more, so that what is above them must be filled with zeros from elsewhere."""
    return bits > 4 and kind != TRELLIS and not (kind == AFFINE and bits < 8)


class Assembly:
    """PTX under construction: instructions that each define a fresh 32-bit register; equal ones are made once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.known: dict[str, str] = {}

    def op(self, code: str, *operands: str | int) -> str:
        text = f"{code} {{}}, {', '.join(str(x) for x in operands)};"
        if text not in self.known:
            self.known[text] = f"r{len(self.known)}"
            self.lines.append(text.format(self.known[text]))
        return self.known[text]

    def select(self, a: str, b: str, mask: int) -> str:
        """Bits of `a` where the mask has ones, of `b` elsewhere."""
        return self.op("lop3.b32", a, b, mask, 0xE4)  # (a & c) | (b & ~c)

    def constant(self, word: int) -> str | int:
        """A word for byte permutes to take bytes from.

        It must look different in every lane, or it is kept in a uniform register and moved out of that for every single
        permute. The top bit of %lanemask_lt is never set, which the assembler does not know.
        """
        return self.op("add.u32", self.op("shr.u32", self.op("mov.u32", "%lanemask_lt"), 31), word) if word else 0

    def text(self) -> str:
        return f"{{ .reg .b32 r<{max(len(self.known), 1)}>; {' '.join(self.lines)}"


def _three_bit(asm: Assembly, words: list[str], dimensions: list[int]) -> dict[int, str]:
    """Nibbles with the codes of some dimensions of a block of three-bit codes."""
    codes = {d: asm.op("and.b32", words[d], SEVENS) for d in dimensions if d < 3}
    if 3 in dimensions:
        low = asm.op("and.b32", asm.op("shr.u32", words[0], 3), ONES)
        middle = asm.op("lop3.b32", asm.op("shr.u32", words[1], 2), 0x22222222, low, 0xEA)  # (a & b) | c
        codes[3] = asm.op("lop3.b32", asm.op("shr.u32", words[2], 1), 0x44444444, middle, 0xEA)
    return codes


def _field(asm: Assembly, nibbles: dict[int, str], newest: int, position: int) -> str:
    """Nibbles with bits `position` to `position + 2` of the streams whose newest four bits are nibbles[newest]."""
    index, offset = newest - position // 4, position % 4
    if offset < 2:
        moved = asm.op("shr.u32", nibbles[index], 1) if offset else nibbles[index]
        return asm.op("and.b32", moved, SEVENS)
    older, keep, rest = nibbles[index - 1], (THREES, ONES)[offset - 2], (ONES, THREES)[offset - 2]
    raised = asm.op("shl.b32", asm.op("and.b32", older, rest), 4 - offset)
    return asm.select(asm.op("shr.u32", nibbles[index], offset), raised, keep)


def _fields(asm: Assembly, bits: int, own: list[str], previous: list[list[str]]) -> list[list[str]]:
    """For each of the block's four dimensions the selectors of its three look-ups."""
    if bits == 3:
        now, before = _three_bit(asm, own, [0, 1, 2, 3]), _three_bit(asm, previous[0], [2, 3])
        codes = [before[2], before[3], *(now[d] for d in range(4))]
        return [[codes[d + 2], codes[d + 1], codes[d]] for d in range(4)]
    nibbles = dict(enumerate(own))
    for back, words in enumerate(previous):
        nibbles |= {i - (back + 1) * bits: word for i, word in enumerate(words)}
    if bits == 4:
        high = {d: asm.op("and.b32", asm.op("shr.u32", nibbles[d], 1), SEVENS) for d in range(-1, 4)}
        low = {d: asm.op("and.b32", nibbles[d], ONES) for d in range(-2, 4)}
        older = {d: asm.op("mad.lo.u32", low[d - 1], 2, low[d]) for d in range(-1, 3)}
        return [[high[d], high[d - 1], asm.op("mad.lo.u32", older[d - 1], 2, low[d])] for d in range(4)]
    per = 4 // bits  # dimensions that share a nibble, the last of them in its lowest bits
    return [[_field(asm, nibbles, d // per, (per - 1 - d % per) * bits + 3 * k) for k in range(3)] for d in range(4)]


def _codes(asm: Assembly, bits: int, own: list[str]) -> list[str]:
    """For each of the block's four dimensions nibbles with its codes."""
    if bits == 4:
        return own
    if bits == 3:
        codes = _three_bit(asm, own, [0, 1, 2, 3])
        return [codes[d] for d in range(4)]
    per, mask = 4 // bits, (ONES, THREES)[bits - 1]
    shifts = [(per - 1 - d % per) * bits for d in range(4)]
    return [
        asm.op("and.b32", asm.op("shr.u32", own[d // per], s) if s else own[d // per], mask)
        for d, s in enumerate(shifts)
    ]


def _looked_up(asm: Assembly, kind: int, selectors: list[str], tables: list[str | int]) -> list[str]:
    """[half]: for every nibble of the selectors a byte of their table, and the sum of these bytes."""
    result = []
    for half in (0, 1):
        use = [asm.op("shr.u32", c, 16) if half else c for c in selectors]
        found = [asm.op("prmt.b32", tables[2 * k], tables[2 * k + 1], c) for k, c in enumerate(use)]
        total = found[0]
        for more in found[1:]:
            total = asm.op("add.u32" if kind == TRELLIS else "or.b32", total, more)
        result.append(total)
    return result


def _mirrored(asm: Assembly, tables: list[str | int], own: list[str], d: int) -> list[str]:
    """[half]: the bytes of five-bit codes 16 h + l: entry l of the table, or 255 less entry 15 - l where h is one."""
    high = own[4]
    upper = asm.op("and.b32", asm.op("shr.u32", high, 3 - d) if d < 3 else high, ONES)  # h, a nibble each
    low = asm.op("xor.b32", own[d], asm.op("mad.lo.u32", upper, 15, 0))
    selectors = [low, asm.op("xor.b32", low, EIGHTS)]
    bits, table = (asm.op("and.b32", high, SEVENS), ONES_WHERE[3 - d]) if d else (upper, ONES_WHERE[0])
    result = []
    for half in (0, 1):
        use = [asm.op("shr.u32", c, 16) if half else c for c in (*selectors, bits)]
        found = [asm.op("prmt.b32", tables[2 * k], tables[2 * k + 1], c) for k, c in enumerate(use[:2])]
        turned = asm.op("prmt.b32", *(asm.constant(word) for word in table), use[2])
        result.append(asm.op("lop3.b32", *found, turned, 0x56))  # (a | b) ^ c
    return result


def _plain(asm: Assembly, bits: int, own: list[str], d: int) -> list[str]:
    """[parity]: the codes of tokens 0, 2, 4, 6 and of 1, 3, 5, 7, a byte each."""
    if bits > 4:
        low, high = own[d], _codes(asm, bits - 4, own[4:])[d]
        return [
            asm.select(low, asm.op("shl.b32", high, 4), LOW_NIBBLES),
            asm.select(asm.op("shr.u32", low, 4), high, LOW_NIBBLES),
        ]
    if bits == 3 and d == 3:
        word, shift = _three_bit(asm, own, [3])[3], 0
    elif bits == 3:
        word, shift = own[d], 0
    else:
        per = 4 // bits
        word, shift = own[d // per], (per - 1 - d % per) * bits
    mask = (2**bits - 1) * 0x01010101
    return [asm.op("and.b32", asm.op("shr.u32", word, by) if by else word, mask) for by in (shift, shift + 4)]


def _bytes(
    asm: Assembly, kind: int, bits: int, tables: list[str | int], own: list[str], previous: list[list[str]]
) -> list[list[str]]:
    """[dimension][register]: the bytes of four tokens each, those of `_place`."""
    if kind == AFFINE:
        return [_plain(asm, bits, own, d) for d in range(4)]
    if kind == TRELLIS:
        return [_looked_up(asm, kind, c, tables) for c in _fields(asm, bits, own, previous)]
    if bits == 5:
        return [_mirrored(asm, tables, own, d) for d in range(4)]
    codes = _codes(asm, bits, own)
    if bits == 4:  # a nibble's top bit makes a permute yield its byte's sign, zero
        return [_looked_up(asm, kind, [c, asm.op("xor.b32", c, EIGHTS)], tables) for c in codes]
    return [_looked_up(asm, kind, [c], tables) for c in codes]


def _place(kind: int, token: int) -> tuple[int, int]:
    """(register, byte) of a token."""
    return (token % 2, token // 2) if kind == AFFINE else (token // 4, token % 4)


def _pair(asm: Assembly, first: tuple[str, int], second: tuple[str, int], wide: bool) -> str:
    """Two fp16 numbers, each a (register, byte) with zeros above it."""
    (a, i), (b, j) = first, second
    if not wide:  # the selector's other two bytes are these ones' signs, zero
        return asm.op("prmt.b32", a, b, i | (8 | i) << 4 | (4 | j) << 8 | (12 | j) << 12)
    if a == b:
        return asm.op("prmt.b32", a, 0, i | 4 << 4 | j << 8 | 4 << 12)
    both = asm.op("prmt.b32", a, b, 0x7362 if i > 1 else 0x5140)  # i = j: a's and b's bytes in turn, for two pairs
    return asm.op("prmt.b32", both, 0, 0x4342 if i % 2 else 0x4140)


@functools.lru_cache
def program(kind: int, bits: int, tables: tuple[int, ...], values: bool) -> tuple[str, str]:
    """(PTX, constraints) that turn a block into 32 numbers, fp16.

    Outputs, which come out in pairs: of keys [h < 2][slot < 8][e < 2], dimension 2h + e; of values
    [dimension < 4][slot < 8]. Inputs: the block's words, then those of the blocks before it, nearest first.
    """
    asm = Assembly()
    held = [asm.constant(word) for word in tables]
    blocks = [[f"${32 + block * bits + i}" for i in range(bits)] for block in range(previous_blocks(kind, bits) + 1)]
    found = _bytes(asm, kind, bits, held, blocks[0], blocks[1:])

    def byte(d: int, token: int) -> tuple[str, int]:
        register, place = _place(kind, token)
        return found[d][register], place

    if values:
        ends = [(byte(d, token), byte(d, token + 1)) for d in range(4) for token in range(0, 8, 2)]
    else:
        ends = [(byte(h, token), byte(h + 1, token)) for h in (0, 2) for token in range(8)]
    pairs = [_pair(asm, *end, wide(kind, bits)) for end in ends]
    stores = " ".join(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, {x};" for i, x in enumerate(pairs))
    return f"{asm.text()} {stores} }}", ",".join(["=h"] * 32 + ["r"] * (len(blocks) * bits))


def version(device: torch.device) -> int:
    """What kernels on a device are told of PTX: a number that names this generator's text, 0 where it does not run."""
    return DIGEST if device.type == "cuda" and torch.version.hip is None else 0
