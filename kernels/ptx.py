"""PTX that turns packed words into half-precision numbers: byte permutes for look-ups, no conversions.

See `unpack` for what is computed. The text is built from a few lines of straight code, in which equal instructions
appear once; tests/test_kernels_ptx.py runs it in an emulator beside the arithmetic twin.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

WINDOW = 9  # bits of the stream that a trellis element is decoded from, three fields of three
SEVENS, THREES, ONES, EIGHTS = 0x77777777, 0x33333333, 0x11111111, 0x88888888

#: Names this version of the generator, for the caches of compiled kernels.
DIGEST = int(hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12], 16)


def previous_blocks(kind: int, bits: int) -> int:
    """How many blocks before its own a block's trellis windows reach into."""
    return 0 if kind == 1 else -(-(-(-WINDOW // bits) - 1) // 4)


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


def _bytes(
    asm: Assembly, kind: int, bits: int, tables: list[str], own: list[str], previous: list[list[str]]
) -> list[list[str]]:
    """[dimension][half]: the bytes of four tokens."""
    selectors = _fields(asm, bits, own, previous) if kind == 0 else [[c] for c in _codes(asm, bits, own)]
    if kind == 1 and bits == 4:  # a nibble's top bit makes a permute yield its byte's sign, zero
        selectors = [[c, asm.op("xor.b32", c, EIGHTS)] for (c,) in selectors]
    result = []
    for chosen in selectors:
        halves = []
        for half in (0, 1):
            use = [asm.op("shr.u32", c, 16) if half else c for c in chosen]
            found = [asm.op("prmt.b32", tables[2 * k], tables[2 * k + 1], c) for k, c in enumerate(use)]
            total = found[0]
            for more in found[1:]:
                total = asm.op("add.u32" if kind == 0 else "or.b32", total, more)
            halves.append(total)
        result.append(halves)
    return result


def _numbers(asm: Assembly, first: str, second: str, selectors: tuple[int, ...]) -> list[str]:
    """Pairs of fp16 numbers of bytes of two registers; a selector's other two bytes are the first ones' signs, zero."""
    return [asm.op("prmt.b32", first, second, s) for s in selectors]


@functools.lru_cache
def program(kind: int, bits: int, tables: tuple[int, ...], values: bool) -> tuple[str, str]:
    """(PTX, constraints) that turn a block into 32 numbers, fp16.

    Outputs, which come out in pairs: of keys [h < 2][slot < 8][e < 2], dimension 2h + e; of values
    [dimension < 4][slot < 8]. Inputs: the block's words, then those of the blocks before it, nearest first.
    """
    asm = Assembly()
    # The tables' words must look different in every lane, or they are kept in uniform registers and moved out of them
    # for every single permute. The top bit of %lanemask_lt is never set, which the assembler does not know.
    zero = asm.op("shr.u32", asm.op("mov.u32", "%lanemask_lt"), 31)
    held = [asm.op("add.u32", zero, word) for word in tables]
    blocks = [[f"${32 + block * bits + i}" for i in range(bits)] for block in range(previous_blocks(kind, bits) + 1)]
    found = _bytes(asm, kind, bits, held, blocks[0], blocks[1:])
    if values:
        pairs = [x for halves in found for half in halves for x in _numbers(asm, half, half, (0x9180, 0xB3A2))]
    else:
        of_token = tuple(0xC480 + 0x1111 * j for j in range(4))
        pairs = [
            x for h in (0, 2) for first, second in zip(found[h], found[h + 1], strict=True)
            for x in _numbers(asm, first, second, of_token)
        ]  # fmt: skip
    ends = " ".join(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, {x};" for i, x in enumerate(pairs))
    return f"{asm.text()} {ends} }}", ",".join(["=h"] * 32 + ["r"] * (len(blocks) * bits))


def version(device: torch.device) -> int:
    """What kernels on a device are told of PTX: a number that names this generator's text, 0 where it does not run."""
    return DIGEST if device.type == "cuda" and torch.version.hip is None else 0
