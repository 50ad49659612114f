"""The PTX of look-ups (kernels/ptx.py), emulated, against the definition of the codes and against its twin.

Run without TRITON_INTERPRET, this file runs the tests of the tiles (kernels/unpack.py) under the interpreter in a
process of its own, for a function that Triton interprets cannot be compiled.

All comparisons are of bits: sums of bytes are integers, and their fp16 numbers are exact.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("triton", reason="the kernels need Triton")

import triton
import triton.language as tl
from kvcompress.kernels.ptx import AFFINE, LEVELS, TRELLIS, previous_blocks, program
from kvcompress.kernels.unpack import key_tile, value_tile
from triton.runtime.interpreter import TensorHandle

from kvcompress import packing
from kvcompress.codecs import trellis
from tests.ptx_emulator import Words, lop3, mad_lo, prmt, run, shl, shr

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = {TRELLIS: "trellis", LEVELS: "levels", AFFINE: "affine"}
CODES = [*((TRELLIS, bits) for bits in range(1, 5)), *((LEVELS, bits) for bits in range(1, 6))]
CODES += [(AFFINE, bits) for bits in range(1, 9)]
EACH = pytest.mark.parametrize(("kind", "bits"), CODES, ids=[f"{NAMES[kind]}{bits}" for kind, bits in CODES])
SIDES = pytest.mark.parametrize("values", [False, True], ids=["keys", "values"])

Bytes = NDArray[np.uint8]
Sums = NDArray[np.int64]


# What the codes mean, by the definitions alone


def codes(words: Words, bits: int) -> Sums:
    """[dimension 4, slot 8, ...] of blocks [bits, ...], two planes one after the other (kvcompress/packing.py)."""
    if bits > 4:
        return codes(words[:4], 4) + 16 * codes(words[4:], bits - 4)
    nibbles = np.stack([words >> 4 * n & 15 for n in range(8)], axis=1).astype(np.int64)  # [word, n, ...]
    if bits == 1:
        return np.stack([nibbles[0] >> 3 - q & 1 for q in range(4)])
    if bits == 2:
        return np.stack([nibbles[q // 2] >> (0 if q % 2 else 2) & 3 for q in range(4)])
    if bits == 3:
        fourth = (nibbles[0] >> 3) + 2 * (nibbles[1] >> 3) + 4 * (nibbles[2] >> 3)
        return np.stack([*(nibbles & 7), fourth])
    return nibbles


def windows(words: Words, bits: int) -> Sums:
    """[4, 8, ...]: the last nine bits of the stream up to each element of the first of some blocks [blocks * bits, ...]
    of which the others come before it, nearest first.
    """
    blocks = words.reshape(-1, bits, *words.shape[1:])
    stream = np.concatenate([codes(block, bits) for block in blocks[::-1]])
    first = len(stream) - 4
    return np.stack([sum(stream[first + q - back] << bits * back for back in range(-(-9 // bits))) & 511
                     for q in range(4)])  # fmt: skip


def fields(window: Sums, bits: int) -> tuple[Sums, ...]:
    """The three look-ups' indices, 0..7."""
    if bits == 4:
        return window >> 1 & 7, window >> 5 & 7, (window & 1) | (window >> 4 & 1) << 1 | (window >> 8) << 2
    return window & 7, window >> 3 & 7, window >> 6


def expected(kind: int, bits: int, tables: Bytes, words: Words) -> Sums:
    """The bytes [dimension 4, slot 8, ...] of blocks; tables [3, 8] of a trellis, levels [1, 8 or 16], of five bits the
    lower half, none of affine codes.
    """
    if kind == AFFINE:
        return codes(words, bits)
    if kind == LEVELS:
        levels = np.concatenate([tables[0], 255 - tables[0][::-1]]) if bits == 5 else tables[0]
        return levels[codes(words, bits)].astype(np.int64)
    return sum(table[field].astype(np.int64) for table, field in zip(tables, fields(windows(words, bits), bits),
                                                                     strict=True))  # fmt: skip


# What the programs make of the same


def as_words(tables: Bytes) -> tuple[int, ...]:
    """Bytes as little-endian words, two for every eight entries."""
    return tuple(tables.flatten().view("<u4").tolist())


def emulated(kind: int, bits: int, tables: Bytes, words: Words, values: bool) -> Sums:
    """What the program returns, in the order of `expected`, as bit patterns."""
    found = np.stack(run(*program(kind, bits, as_words(tables), values), list(words))).astype(np.int64)
    if values:
        return found.reshape(4, 8, *words.shape[1:])
    return found.reshape(2, 8, 2, *words.shape[1:]).swapaxes(1, 2).reshape(4, 8, *words.shape[1:])


def random_tables(kind: int, bits: int, generator: np.random.Generator) -> Bytes:
    """Tables whose largest sum is 127, the largest that is allowed; of five bits the least is 0, and 255 its mirror."""
    if kind == AFFINE:
        return np.zeros((0, 8), np.uint8)
    if kind == LEVELS:
        levels = generator.integers(0, 128, (1, 16 if bits > 3 else 8), dtype=np.uint8)
        levels[0, generator.integers(min(2**bits, 16))] = 0 if bits == 5 else 127
        return levels
    tops = np.diff([0, *np.sort(generator.integers(0, 128, 2)), 127])
    tables = np.stack([generator.integers(0, top + 1, 8) for top in tops]).astype(np.uint8)
    tables[range(3), generator.integers(0, 8, 3)] = tops
    return tables


def random_words(kind: int, bits: int, generator: np.random.Generator, *shape: int) -> Words:
    count = (1 + previous_blocks(kind, bits)) * bits
    return generator.integers(0, 1 << 32, (count, *shape), dtype=np.uint32)


def word(*numbers: int) -> list[Words]:
    return [np.array([n], np.uint32) for n in numbers]


@pytest.mark.parametrize(
    ("control", "result"),
    [
        (0x3210, 0x837F01FE),  # a itself
        (0x7654, 0x00C68055),  # b itself
        (0x0123, 0xFE017F83),  # a, turned round
        (0x4040, 0x55FE55FE),
        (0xBA98, 0xFF0000FF),  # signs of a: 0x83 and 0xfe have theirs set, 0x7f and 0x01 have not
        (0xFEDC, 0x00FFFF00),  # signs of b: 0xc6 and 0x80
        (0x9180, 0x0001FFFE),
        (0xC480, 0x0055FFFE),
        (0xFFFF3210, 0x837F01FE),  # the control's upper half says nothing
    ],
)
def test_prmt(control: int, result: int):
    a, b, c = word(0x837F01FE, 0x00C68055, control)
    assert int(prmt(a, b, c)[0]) == result


@pytest.mark.parametrize(
    ("table", "result"),
    [
        (0xF0, 0b11110000),  # a, b and c as below: by the ISA, 0xf0, 0xcc and 0xaa are the tables of a, b and c
        (0xCC, 0b11001100),
        (0xAA, 0b10101010),
        (0x80, 0b10000000),  # a & b & c
        (0xFE, 0b11111110),  # a | b | c
        (0x96, 0b10010110),  # a ^ b ^ c
        (0xEA, 0b11101010),  # a & b | c
        (0xE4, 0b11100100),  # c ? a : b
        (0xAC, 0b10101100),  # a ? c : b
        (0x01, 0xFFFFFF01),  # neither of them
    ],
)
def test_lop3(table: int, result: int):
    a, b, c, t = word(0b11110000, 0b11001100, 0b10101010, table)
    assert int(lop3(a, b, c, t)[0]) == result


def test_arithmetic():
    """Shifts clamp, sums and products wrap."""
    assert [int(x[0]) for x in (shr(*word(0x80000001, 31)), shr(*word(5, 32)), shr(*word(5, 1 << 31)))] == [1, 0, 0]
    assert [int(x[0]) for x in (shl(*word(0x80000003, 1)), shl(*word(5, 32)), shl(*word(5, 33)))] == [6, 0, 0]
    assert int(mad_lo(*word(0x80000001, 2, 7))[0]) == 9
    text = "{ .reg .b32 r<2>; add.u32 r0, $2, 0xffffffff; mov.u32 r1, %lanemask_lt; xor.b32 r1, r1, r0; "
    found = run(text + "mov.b32 {$0, $1}, r1; }", "=h,=h,r", [np.full(64, 0x12345, np.uint32)])
    masks = [(1 << n % 32) - 1 for n in range(64)]
    assert [int(low) | int(high) << 16 for low, high in zip(*found, strict=True)] == [0x12344 ^ m for m in masks]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mov.b32 {$0, $1}, r0;", "r0 is not a 32-bit operand that holds anything"),
        ("mov.u32 r1, $2; mov.b32 {$0, $1}, r1;", "r1 is not a declared"),
        ("mov.u32 r0, $2; mov.b32 {$0, $0}, r0; mov.b32 {$0, $1}, r0;", "outputs that were not written yet"),
        ("mov.u32 r0, $2; add.u32 r0, r0, $0;", "\\$0 is not a 32-bit operand"),
        ("mov.u32 r0, $3;", "\\$3 is not a 32-bit operand"),
        ("mov.u32 r0, $2;", "never written"),
        ("mov.u32 r0, $2; mov.b32 {$0, $1}, r0; mov.u32 r0, $2;", "may share its register"),
        ("not.b32 r0, $2;", "unknown instruction not.b32"),
        ("prmt.b32.rc8 r0, $2, $2, 0;", "unknown instruction prmt.b32.rc8"),
        ("and.b32 r0, $2;", "takes 3 operands"),
        ("lop3.b32 r0, $2, $2, $2, 256;", "immediate below 256"),
        ("mov.u32 r0, 4294967296;", "fit 32 bits"),
    ],
)
def test_emulator_refuses(body: str, message: str):
    with pytest.raises(ValueError, match=message):
        run(f"{{ .reg .b32 r<1>; {body} }}", "=h,=h,r", word(1))


@SIDES
@EACH
def test_program(kind: int, bits: int, values: bool):
    """Of 2048 random blocks, which show every window and every code. Their numbers are the sums' times 2^-24."""
    generator = np.random.default_rng(bits)
    tables = random_tables(kind, bits, generator)
    words = random_words(kind, bits, generator, 2048)
    seen = windows(words, bits) if kind == TRELLIS else codes(words, bits)
    assert len(np.unique(seen)) == (512 if kind == TRELLIS else 2**bits)
    largest = 2**bits - 1 if kind == AFFINE else 255 if bits == 5 else 127
    good = expected(kind, bits, tables, words)
    found = emulated(kind, bits, tables, words, values)
    assert good.max() == largest
    assert np.array_equal(found, good)
    assert np.array_equal(found.astype(np.uint16).view(np.float16).astype(np.float64), good * 2.0**-24)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([own for own in CODES if own[0] != AFFINE]), st.booleans(), st.tuples(*[st.integers(0, 127)] * 2),
    st.integers(0, 2**32 - 1), st.data(),
)  # fmt: skip
def test_any_table(codes: tuple[int, int], values: bool, cuts: tuple[int, int], seed: int, data: st.DataObject):
    """Any bytes do whose sums stay below 128, and so do blocks of which all words are 0 or all ones."""
    kind, bits = codes
    low, high = sorted(cuts)
    tops = [low, high - low, 127 - high] if kind == TRELLIS else [127]
    size = 16 if kind == LEVELS and bits > 3 else 8
    rows = [data.draw(st.lists(st.integers(0, top), min_size=size, max_size=size)) for top in tops]
    tables = np.array(rows, np.uint8)
    words = random_words(kind, bits, np.random.default_rng(seed), 34)
    words[:, 0], words[:, 1] = 0, 2**32 - 1
    assert np.array_equal(emulated(kind, bits, tables, words, values), expected(kind, bits, tables, words))


@EACH
def test_packed(kind: int, bits: int):
    """The program on what `packing.pack` makes of codes, in circular streams, against the codecs' own windows."""
    generator = np.random.default_rng(bits)
    width = 32  # blocks [s < 2][one octet][l < 4]: blocks (s, l) have the dimensions 8l + 4s to 8l + 4s + 3
    plain = torch.from_numpy(generator.integers(0, 2**bits, (8, width), dtype=np.uint8))
    planes = packing.pack(plain, bits).numpy().view("<u4")  # of one plane, or of the low four bits and the others
    cuts = [4, bits - 4] if bits > 4 else [bits]
    parts = np.split(planes, [8 * cuts[0]])
    in_order = np.concatenate(
        [
            part.reshape(2, 4, own).transpose(2, 1, 0).reshape(own, width // 4)
            for part, own in zip(parts, cuts, strict=False)
        ]
    )
    words = np.concatenate([np.roll(in_order, back, axis=1) for back in range(1 + previous_blocks(kind, bits))])
    tables = random_tables(kind, bits, generator)
    if kind == TRELLIS:
        chosen = fields(trellis.windows(plain, bits).numpy().astype(np.int64), bits)
        good = sum(table[field].astype(np.int64) for table, field in zip(tables, chosen, strict=True))
    else:
        good = plain.numpy().astype(np.int64)
        if kind == LEVELS:
            good = np.concatenate([tables[0], 255 - tables[0][::-1]])[good] if bits == 5 else tables[0][good]
    found = emulated(kind, bits, tables, words, values=False)  # [dimension, slot, block]
    assert np.array_equal(found.transpose(1, 2, 0).reshape(8, width), good)


# The tiles, interpreted


@triton.jit
def load(base, blocks, COUNT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """The words FIRST to LAST - 1 of blocks, from [word, block] of COUNT blocks."""
    result = ()
    for i in tl.static_range(FIRST, LAST):
        result = result + (tl.load(base + i * COUNT + blocks),)  # noqa: RUF005 (Triton has no other way)
    return result


@triton.jit
def key_kernel(
    W, Out, N: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, ALL: tl.constexpr, T: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    base = W.to(tl.pointer_type(tl.uint32))
    s, g, lane = tl.arange(0, N)[:, None, None], tl.arange(0, 8)[None, :, None], tl.arange(0, 4)[None, None, :]
    blocks = (s * 8 + g) * 4 + lane
    own, before = load(base, blocks, N * 32, 0, BITS), load(base, blocks, N * 32, BITS, ALL)
    tile = key_tile(own, before, N, KIND, BITS, T, PTX)
    tl.store(Out + tl.arange(0, 64)[:, None] * (16 * N) + tl.arange(0, 16 * N)[None, :], tile)


@triton.jit
def value_kernel(
    W, Out, N: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, ALL: tl.constexpr, T: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    base = W.to(tl.pointer_type(tl.uint32))
    CS: tl.constexpr = 1 if N == 1 else N // 2
    GS: tl.constexpr = 4 if N == 1 else 8
    c, gl, pair = tl.arange(0, CS)[:, None, None], tl.arange(0, GS)[None, :, None], tl.arange(0, 4)[None, None, :]
    first = (c * GS + gl) * 8 + 2 * pair  # blocks are [c, gl, octet]
    own0, before0 = load(base, first, N * 32, 0, BITS), load(base, first, N * 32, BITS, ALL)
    own1, before1 = load(base, first + 1, N * 32, 0, BITS), load(base, first + 1, N * 32, BITS, ALL)
    tile = value_tile(own0, before0, own1, before1, N, KIND, BITS, T, PTX)
    tl.store(Out + tl.arange(0, 16 * N)[:, None] * 64 + tl.arange(0, 64)[None, :], tile)


def tile(kind: int, bits: int, tables: Bytes, words: Words, values: bool, ptx: bool) -> Sums:
    """Bit patterns of a tile of blocks [word, N * 32]: of keys [64, 16 N], of values [16 N, 64]."""
    n = words.shape[1] // 32
    out = torch.full((16 * n, 64) if values else (64, 16 * n), torch.nan, dtype=torch.float16)
    kernel = value_kernel if values else key_kernel
    packed = torch.from_numpy(words.view(np.int32))
    kernel[(1,)](packed, out, n, kind, bits, len(words), as_words(tables), ptx)
    return out.numpy().view(np.uint16).astype(np.int64)


def arranged(sums: Sums, values: bool) -> Sums:
    """Sums [dimension, slot, N * 32] of blocks in the rows and columns that the tiles' docstrings name."""
    n = sums.shape[2] // 32
    if not values:  # [h, e, slot, s, octet, l] to rows (slot, octet), columns (s, h, l, e)
        return sums.reshape(2, 2, 8, n, 8, 4).transpose(2, 4, 3, 0, 5, 1).reshape(64, 16 * n)
    if n == 1:  # [d high, d low, j, e, gl, l, i // 4] to rows (d high, gl, d low), columns (i, l, e), i % 4 being j
        return sums.reshape(2, 2, 4, 2, 4, 4, 2).transpose(0, 4, 1, 6, 2, 5, 3).reshape(16, 64)
    # [d, j, e, c, gl, l, i // 4] to rows (c, d, gl), columns (i, l, e)
    return sums.reshape(4, 4, 2, n // 2, 8, 4, 2).transpose(3, 0, 4, 6, 1, 5, 2).reshape(16 * n, 64)


def assemble(
    text: str, constraints: str, args: Sequence[tl.tensor], dtype: Sequence[tl.dtype], is_pure: bool, pack: int
) -> tuple[tl.tensor, ...]:
    """What stands in for tl.inline_asm_elementwise, which the interpreter lacks: the emulator."""
    assert (tuple(dtype), is_pure, pack) == ((tl.float16,) * 32, True, 1)
    found = run(text, constraints, [x.handle.data.view(np.uint32) for x in args])
    return tuple(
        tl.tensor(TensorHandle(x.view(np.float16), tl.float16), tl.block_type(tl.float16, list(x.shape))) for x in found
    )


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize(
        ("n", "values"), [(2, False), (1, True), (4, True)], ids=["keys", "values of one block", "values"]
    )
    @EACH
    def test_tiles(self, kind: int, bits: int, n: int, values: bool, monkeypatch: pytest.MonkeyPatch):
        """The twin and the PTX make the same tile, which is the one that its docstring says, of 32 N blocks."""
        monkeypatch.setattr(tl, "inline_asm_elementwise", assemble)
        generator = np.random.default_rng(10 * bits + n)
        tables = random_tables(kind, bits, generator)
        words = random_words(kind, bits, generator, 32 * n)
        good = arranged(expected(kind, bits, tables, words), values)
        assert np.array_equal(tile(kind, bits, tables, words, values, ptx=False), good)
        assert np.array_equal(tile(kind, bits, tables, words, values, ptx=True), good)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{Path(__file__)}::TestInterpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
