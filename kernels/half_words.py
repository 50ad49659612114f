"""Words of two fp16 numbers: read, multiplied and taken apart in the lanes in which a matrix instruction wants them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(word):
    """The two fp16 numbers of words, the lower one first."""
    low = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return low, (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def word(low, high):
    """Words of two fp16 numbers."""
    upper = high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    return low.to(tl.uint16, bitcast=True).to(tl.uint32) | upper


@triton.jit
def product(a, b, PTX: tl.constexpr):
    """The two fp16 numbers of words, times those of others."""
    if PTX:
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 t; mul.rn.f16x2 t, $2, $3; mov.b32 {$0, $1}, t; }", "=h,=h,r,r", [a, b],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        a0, a1 = halves(a)
        b0, b1 = halves(b)
        result = (a0 * b0, a1 * b1)
    return result


@triton.jit
def repeated(words, M: tl.constexpr):
    """[a, 8, b] to [a, M, b]."""
    A: tl.constexpr = words.shape[0]
    B: tl.constexpr = words.shape[2]
    return tl.reshape(tl.broadcast_to(words[:, None, :, :], [A, M // 8, 8, B]), [A, M, B])
