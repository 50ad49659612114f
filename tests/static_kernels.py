"""Small kernels with known numbers of instructions, for tests/test_static.py; compiled, never run."""

import triton
import triton.language as tl
from kvcompress.kernels.variant import Variant


@triton.jit
def products(Left, Right, Out, Count, K: tl.constexpr, N: tl.constexpr):
    """Out[16, N] = the sum of Left[16, K] @ Right[i][K, N] over i < Count."""
    k, n, m = tl.arange(0, K), tl.arange(0, N), tl.arange(0, 16)
    left = tl.load(Left + m[:, None] * K + k[None, :])
    total = tl.zeros([16, N], tl.float32)
    for i in tl.range(0, Count, num_stages=1):
        total = tl.dot(left, tl.load(Right + i * K * N + k[:, None] * N + n[None, :]), total)
    tl.store(Out + m[:, None] * N + n[None, :], total)


@triton.jit
def integers(Codes, Out, Count, N: tl.constexpr):
    """Out[N] = the sum of N codes, made floats one by one, over Count rows."""
    n = tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for i in tl.range(0, Count, num_stages=1):
        total += tl.load(Codes + i * N + n).to(tl.float32) * 0.5
    tl.store(Out + n, total)


@triton.jit
def crowd(In, Out, Count, N: tl.constexpr):
    """A loop that holds N floats a program: with one warp and large N, more than its registers."""
    n = tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for i in tl.range(0, Count, num_stages=1):
        row = tl.load(In + i * N + n)
        total = total * row + tl.sum(total * row)
    tl.store(Out + n, total)


def variants() -> list[Variant]:
    """products: K * N elements an iteration; integers, called decode so that its budgets are held against it."""
    return [
        Variant(
            "products",
            "-",
            64,
            products,
            {"Left": "*fp16", "Right": "*fp16", "Out": "*fp32", "Count": "i32", "K": "constexpr", "N": "constexpr"},
            {"K": 64, "N": 64},
            ("Left", "Right", "Out"),
            num_warps=2,
            elements=64 * 64,
        ),
        Variant(
            "decode",
            "lloyd3",
            128,
            integers,
            {"Codes": "*u8", "Out": "*fp32", "Count": "i32", "N": "constexpr"},
            {"N": 32},
            ("Codes", "Out"),
            num_warps=1,
            elements=32,
        ),
        Variant(
            "crowd",
            "-",
            64,
            crowd,
            {"In": "*fp32", "Out": "*fp32", "Count": "i32", "N": "constexpr"},
            {"N": 8192},
            ("In", "Out"),
            num_warps=1,
            archs=("sm_80", "sm_90"),
        ),
    ]
