"""Merges partial attention results by their log-sum-exps: splits of one kernel, or the parts of a cache, or both.

    lse = log sum_p exp(lse_p)      out = sum_p exp(lse_p - lse) out_p      a sink logit is a part whose mean is zero

Must agree with `merge` in kvcompress/reference.py. Shapes: means [B, H, P, M, Dv] and log-sum-exps [B, H, P, M] of P
parts to out [B, H, M, Dv] and lse [B, H, M]; M = G*Q query rows of a KV head, row g*Q + i. One program takes a block of
rows and of dimensions through all parts: first the largest log-sum-exp and the sum, then the means, which do not wait
for each other, so that their loads overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import DTYPES, check, check_rows, outputs
from .device import describe
from .softmax import LOWEST
from .specialise import specialised
from .variant import Variant

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))


# these change from call to call: no code of their own for multiples of 16
@triton.jit(do_not_specialize=["parts", "rows", "log_b", "log_h", "log_p", "lse_b", "lse_h"])
def merge_kernel(
    Mean: tl.tensor, Log: tl.tensor, Sink: tl.tensor, Out: tl.tensor, Lse: tl.tensor, mean_b: tl.tensor,
    mean_h: tl.tensor, mean_p: tl.tensor, mean_m: tl.tensor, log_b: tl.tensor, log_h: tl.tensor, log_p: tl.tensor,
    out_b: tl.tensor, out_h: tl.tensor, out_m: tl.tensor, lse_b: tl.tensor, lse_h: tl.tensor, heads: tl.tensor,
    parts: tl.tensor, rows: tl.tensor, groups: tl.tensor, queries: tl.tensor, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_DV: tl.constexpr,
) -> None:  # fmt: skip
    """Program (tile of rows, tile of dimensions, B*H). Last dimensions are contiguous."""
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = (tl.program_id(2) % heads).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    p = tl.arange(0, BLOCK_P)
    real = m < rows
    Mean += b * mean_b + h * mean_h
    Log += b * log_b + h * log_h

    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if Sink is not None:
        top = tl.load(Sink + h * groups + m // queries, mask=real, other=0.0).to(tl.float32) * _LOG2_E
        top = tl.maximum(top, LOWEST)  # a sink of minus infinity is none
        total = tl.where(top > LOWEST, 1.0, 0.0)
    for first in range(0, parts, BLOCK_P):
        q = first + p
        held = real[:, None] & (q < parts)[None, :]
        log = tl.load(Log + q[None, :] * log_p + m[:, None], mask=held, other=float("-inf")) * _LOG2_E
        raised = tl.maximum(top, tl.max(log, 1))
        total = total * tl.exp2(top - raised) + tl.sum(tl.exp2(log - raised[:, None]), 1)
        top = raised
    seen = total > 0
    lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), 0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    at = Mean + p[None, :, None] * mean_p + m[:, None, None].to(tl.int64) * mean_m + d[None, None, :]
    for first in range(0, parts, BLOCK_P):
        q = first + p
        held = real[:, None] & (q < parts)[None, :]
        log = tl.load(Log + q[None, :] * log_p + m[:, None], mask=held, other=float("-inf")) * _LOG2_E
        weight = tl.exp2(log - lse[:, None])
        mean = tl.load(at, mask=held[:, :, None] & (d < DV)[None, None, :], other=0.0)
        # a part that saw nothing may hold anything
        acc += tl.sum(tl.where(weight[:, :, None] > 0, mean * weight[:, :, None], 0.0), 1)
        at += BLOCK_P * mean_p

    Out += b * out_b + h * out_h
    whole = real[:, None] & (d < DV)[None, :]
    tl.store(Out + m[:, None].to(tl.int64) * out_m + d[None, :], acc.to(Out.dtype.element_ty), mask=whole)
    if tl.program_id(1) == 0:
        tl.store(Lse + b * lse_b + h * lse_h + m, tl.where(seen, lse * _LN_2, float("-inf")), mask=real)


def merge_blocks(parts: int, rows: int, width: int) -> tuple[int, int, int]:
    """(rows, parts, dimensions) of a tile of about 4096 numbers: many parts of few rows in decoding, or the reverse."""
    block_d = min(64, triton.next_power_of_2(width))
    block_p = min(32, triton.next_power_of_2(parts))
    return min(4096 // (block_d * block_p), triton.next_power_of_2(rows)), block_p, block_d


def merge(
    partials: Sequence[tuple[Tensor, Tensor]],
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge partial results (means float32 [B, H, P, M, Dv], natural log-sum-exps float32 [B, H, P, M]).

    partials: of one source or several, each with its own P; several are concatenated, so let them write to parts of
    one pair of tensors (`into` of attend_dense) where a copy is too much. A part with log-sum-exp -inf weighs nothing,
    whatever its mean holds.
    sinks: logits [H*G], float, that take part in the softmax with a value of zero; M must be a multiple of G.
    into: (out, lse) to write to, of that dtype and float32, of any strides but a contiguous last dimension.

    Returns (out [B, H, M, Dv] of `dtype`, lse float32 [B, H, M], sinks included); 0 and -inf
    where no part saw anything. Raises ValueError for shapes and dtypes that do not belong together.
    """
    means, logs = _joined(partials)
    B, H, P, M, DV = means.shape
    groups = _groups(sinks, H, M, means.device)
    out, lse = outputs(into, (B, H, M, DV), dtype, means)
    if not out.numel():
        return out, lse
    block_m, block_p, block_d = merge_blocks(P, M, DV)
    merge_kernel[(triton.cdiv(M, block_m), triton.cdiv(DV, block_d), B * H)](
        means, logs, sinks, out, lse,
        *means.stride()[:4], *logs.stride()[:3], *out.stride()[:3], *lse.stride()[:2],
        H, P, M, groups, M // groups,
        DV=DV, BLOCK_M=block_m, BLOCK_P=block_p, BLOCK_DV=block_d, num_warps=4,
    )  # fmt: skip
    return out, lse


def _joined(partials: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All parts in one pair of tensors, checked."""
    if not partials:
        raise ValueError("there must be at least one partial result to merge, got none")
    describe(partials[0][0].device)
    for mean, log in partials:
        if mean.ndim != 5 or mean.shape[:2] != partials[0][0].shape[:2] or mean.shape[3:] != partials[0][0].shape[3:]:
            raise ValueError(
                "partial means must be [B, H, P, M, Dv] and differ in P alone, got shapes "
                f"{', '.join(str(tuple(m.shape)) for m, _ in partials)}"
            )
        check("the partial means", mean, tuple(mean.shape), (torch.float32,), partials[0][0].device)
        check("their log-sum-exps", log, tuple(mean.shape[:4]), (torch.float32,), mean.device)
        if not mean.shape[2]:
            raise ValueError(f"each source must have at least one part, got one of shape {tuple(mean.shape)}")
        check_rows("the partial means", mean)
        check_rows("their log-sum-exps", log)
    if len(partials) == 1:
        return partials[0]
    return torch.cat([mean for mean, _ in partials], dim=2), torch.cat([log for _, log in partials], dim=2)


def _groups(sinks: Tensor | None, heads: int, rows: int, device: torch.device) -> int:
    """Query heads of a KV head by the number of sinks (1 where there are none: they are not asked for)."""
    if sinks is None:
        return 1
    groups = len(sinks) // heads if sinks.ndim == 1 else 0
    if not groups or len(sinks) % heads or rows % groups:
        raise ValueError(
            f"sinks must be one logit a query head [H*G] for {heads} KV heads and {rows} = G*Q rows, "
            f"got shape {tuple(sinks.shape)}"
        )
    check("sinks", sinks, (heads * groups,), DTYPES, device)
    if not sinks.is_contiguous():
        raise ValueError(f"sinks must be contiguous, got stride {sinks.stride()}")
    return groups


def variants() -> list[Variant]:
    """Decoding (4 rows, 33 splits, and sinks) and prefill (16,384 rows, two parts); out in bfloat16."""
    found = []
    for parts, rows, sinks in ((33, 4, True), (2, 16384, False)):
        block_m, block_p, block_d = merge_blocks(parts, rows, 128)
        constants: dict[str, Any] = {"DV": 128, "BLOCK_M": block_m, "BLOCK_P": block_p, "BLOCK_DV": block_d}
        constants |= {} if sinks else {"Sink": None}
        pointers = {"Mean": "*fp32", "Log": "*fp32", "Sink": "*bf16", "Out": "*bf16", "Lse": "*fp32"}
        signature, aligned = specialised(merge_kernel.arg_names, pointers, constants)
        found.append(Variant("merge", "-", 128, merge_kernel, signature, constants, aligned, 4))
    return found
