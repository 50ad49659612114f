"""A handful of PTX instructions in numpy: a block of inline assembly for many lanes at once.

Semantics are those of the PTX ISA's pages on each instruction; anything that is not listed here raises. So does what
the assembler or a register allocator would not forgive: registers that were not declared or hold nothing yet, operands
of the wrong width, outputs that are written twice or never, and inputs that are read once an output is written, since
an output without an early clobber (`&`) may lie in an input's register.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Halves = NDArray[np.uint16]

WARP = 32
STATEMENT = re.compile(r"\s*(\S+)\s+(.+?)\s*", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|[^,\s]+")


def _shift(amount: Words) -> Words:
    """Shift amounts as 64-bit numbers: PTX clamps those above 31 to 32, which leaves nothing."""
    return np.minimum(amount, 32).astype(np.uint64)


def shr(a: Words, b: Words) -> Words:
    return (a.astype(np.uint64) >> _shift(b)).astype(np.uint32)


def shl(a: Words, b: Words) -> Words:
    return (a.astype(np.uint64) << _shift(b)).astype(np.uint32)


def lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Bit by bit: bit 4 a + 2 b + c of the table."""
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for bit in range(32):
        row = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        result |= (table >> row & 1) << bit
    return result


def prmt(a: Words, b: Words, c: Words) -> Words:
    """Nibble i of c names byte i of the result among the bytes 0..3 of a and 4..7 of b; its top bit asks for that
    byte's sign, eight times, in its place.
    """
    both = b.astype(np.uint64) << np.uint64(32) | a
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for i in range(4):
        control = (c >> 4 * i & 15).astype(np.uint64)
        byte = (both >> (control & 7) * 8 & 255).astype(np.uint32)
        result |= np.where(control & 8, np.where(byte & 0x80, 255, 0), byte).astype(np.uint32) << 8 * i
    return result


def mad_lo(a: Words, b: Words, c: Words) -> Words:
    """The lower 32 bits of a product, plus c, modulo 2^32."""
    return (a.astype(np.uint64) * b + c).astype(np.uint32)


#: Instructions [how many operands, what they do]; the last operand of lop3 must be an immediate.
INSTRUCTIONS: dict[str, tuple[int, Callable[..., Words]]] = {
    "mov.u32": (1, lambda a: a),
    "and.b32": (2, lambda a, b: a & b),
    "or.b32": (2, lambda a, b: a | b),
    "xor.b32": (2, lambda a, b: a ^ b),
    "shr.u32": (2, shr),
    "shl.b32": (2, shl),
    "add.u32": (2, lambda a, b: a + b),
    "mad.lo.u32": (3, mad_lo),
    "lop3.b32": (4, lop3),
    "prmt.b32": (3, prmt),
}


class _Block:
    """Registers of a block: 32-bit inputs $outputs, $outputs + 1, ..., 16-bit outputs $0, $1, ..., declared ones."""

    def __init__(self, inputs: Sequence[Words], outputs: int) -> None:
        self.inputs = {f"${outputs + i}": word for i, word in enumerate(inputs)}
        self.outputs: dict[str, Halves | None] = {f"${i}": None for i in range(outputs)}
        self.registers: dict[str, Words | None] = {}
        self.shape = np.broadcast_shapes(*(word.shape for word in inputs))
        self.finishing = False

    def declare(self, operands: list[str]) -> None:
        found = re.fullmatch(r"(\w+)<(\d+)>", operands[1]) if operands[0] == ".b32" and len(operands) == 2 else None
        if found is None:
            raise ValueError(f"declarations must be .reg .b32 name<count>, got {operands}")
        self.registers |= {f"{found[1]}{i}": None for i in range(int(found[2]))}

    def read(self, name: str) -> Words:
        if re.fullmatch(r"\d+|0x[0-9a-fA-F]+", name):
            if int(name, 0) >= 1 << 32:
                raise ValueError(f"immediates must fit 32 bits, got {name}")
            return np.full(self.shape, int(name, 0), np.uint32)
        if name == "%lanemask_lt":
            lane = np.arange(np.prod(self.shape, dtype=int)).reshape(self.shape) % WARP
            return ((1 << lane) - 1).astype(np.uint32)
        if name in self.inputs:
            if self.finishing:
                raise ValueError(f"{name} is read after an output was written that may share its register")
            return self.inputs[name]
        value = self.registers.get(name)
        if value is None:
            raise ValueError(f"{name} is not a 32-bit operand that holds anything")
        return value

    def write(self, name: str, value: Words) -> None:
        if name not in self.registers:
            raise ValueError(f"{name} is not a declared 32-bit register")
        self.registers[name] = value

    def split(self, pair: str, value: Words) -> None:
        """mov.b32 {low, high}, value: the first of the two gets the lower half."""
        names = OPERAND.findall(pair[1:-1])
        if len(names) != 2 or any(name not in self.outputs or self.outputs[name] is not None for name in names):
            raise ValueError(f"{pair} must be two outputs that were not written yet")
        self.finishing = True
        for name, shift in zip(names, (0, 16), strict=True):
            self.outputs[name] = (value >> shift & 0xFFFF).astype(np.uint16)

    def step(self, code: str, operands: list[str]) -> None:
        if code == ".reg":
            return self.declare(operands)
        if code == "mov.b32" and len(operands) == 2 and operands[0].startswith("{"):
            return self.split(operands[0], self.read(operands[1]))
        if code not in INSTRUCTIONS:
            raise ValueError(f"unknown instruction {code} {operands}")
        count, function = INSTRUCTIONS[code]
        if len(operands) != count + 1:
            raise ValueError(f"{code} takes {count + 1} operands, got {operands}")
        if code == "lop3.b32" and not (operands[-1].isdecimal() and int(operands[-1]) < 256):
            raise ValueError(f"lop3's table must be an immediate below 256, got {operands[-1]}")
        self.write(operands[0], function(*(self.read(name) for name in operands[1:])))


def run(text: str, constraints: str, inputs: Sequence[Words]) -> list[Halves]:
    """The 16-bit outputs of a block of assembly for 32-bit inputs of one shape, element i in lane i % 32 of a warp.

    Raises ValueError for text that this is no emulator of, and for constraints other than =h outputs, then r inputs.
    """
    kinds = constraints.split(",")
    outputs = kinds.count("=h")
    if kinds != ["=h"] * outputs + ["r"] * len(inputs):
        raise ValueError(f"constraints must be =h for outputs, then r for each of {len(inputs)} inputs: {constraints}")
    if not re.fullmatch(r"\{.*;\s*\}", text, re.DOTALL):
        raise ValueError(f"text must be statements in braces, got {text}")
    block = _Block(inputs, outputs)
    for statement in text.strip()[1:-1].split(";")[:-1]:
        found = STATEMENT.fullmatch(statement)
        if found is None:
            raise ValueError(f"not a statement: {statement}")
        block.step(found[1], OPERAND.findall(found[2]))
    written = [value for value in block.outputs.values() if value is not None]
    if len(written) < outputs:
        raise ValueError(f"{[name for name, value in block.outputs.items() if value is None]} are never written")
    return written
