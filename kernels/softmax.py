"""Softmax over tokens that come tile by tile, in powers of two, as the attention kernels of this folder share it.

A score is `unit * s` in powers of two: s is the raw product q.k, or tanh(q.k * inner) where scores are soft-capped, so
that the largest s is found before anything is multiplied and unit * s - unit * top is one fused operation.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

#: Stands for minus infinity in a running maximum: finite, so that a query that sees nothing gives no inf - inf.
LOWEST = tl.constexpr(-1e30)

LN_2, LOG2E = tl.constexpr(math.log(2.0)), tl.constexpr(math.log2(math.e))


def units(scaling: float, softcap: float | None) -> tuple[float, float]:
    """(inner, unit) of scores q.k * scaling, or softcap * tanh(q.k * scaling / softcap); ValueError unless positive."""
    if not 0 < scaling < math.inf:
        raise ValueError(f"scaling must be positive and finite, got {scaling}")
    if softcap is None:
        return 0.0, scaling * math.log2(math.e)
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None, or positive and finite, got {softcap}")
    return scaling / softcap, softcap * math.log2(math.e)


@triton.jit
def capped(raw: tl.tensor, inner: tl.tensor, SOFTCAP: tl.constexpr) -> tl.tensor:
    """Raw products as they are, or tanh(raw * inner) by exp2: 1 - 2 / (1 + e^2x), right at both infinities."""
    if SOFTCAP:
        raw = 1.0 - 2.0 / (1.0 + tl.exp2(raw * (inner * (2.0 / LN_2))))
    return raw


@triton.jit
def weigh(
    scores: tl.tensor,
    unit: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Take scores [M, T] (-inf: not seen) into the running top [M] and total [M].

    Returns (weights [M, T], shrink [M] of what was summed before, top, total).
    """
    raised = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores * unit - (raised * unit)[:, None])
    shrink = tl.exp2((top - raised) * unit)
    return weights, shrink, raised, total * shrink + tl.sum(weights, 1)


@triton.jit
def finish(acc: tl.tensor, unit: tl.tensor, top: tl.tensor, total: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(mean [M, width], natural log-sum-exp [M]); zero and -inf for queries that saw nothing."""
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    return acc / safe[:, None], tl.where(seen, (top * unit + tl.log2(safe)) * LN_2, float("-inf"))
