"""Decode attention over exact keys and values that lie side by side: split over tokens, queries of a KV head together.

One program takes up to 64 of the G*Q query rows of one KV head (row g*Q + i: query token i of query head g) through
its share of the row's tokens [first, last), tile by tile, and writes a partial result: the softmax mean over what it
saw and the log-sum-exp to merge it by (kernels/merge.py). The share is reckoned on the device from first and last, so
that a cache of fixed capacity spreads what it holds over all programs. Bound by the traffic of keys and values.

Must agree with `Partial` in kvcompress/reference.py. Shapes: query [B, H*G, Q, D], key [B, H, T, D], value
[B, H, T, Dv]; partial means [B, H, splits, G*Q, Dv] and log-sum-exps [B, H, splits, G*Q], both float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check, check_attention, outputs
from .device import CHIPS, Device, describe
from .softmax import LOWEST, capped, finish, units, weigh
from .specialise import specialised
from .variant import ARCHS, Variant

#: Fewest tokens that are worth a program of their own, and most programs that share a row's tokens.
TOKENS_A_SPLIT, MAX_SPLITS = 256, 256


# these change from call to call: no code of their own for multiples of 16
@triton.jit(do_not_specialize=["tokens", "columns", "splits", "mask_b", "lse_b", "lse_h", "lse_s"])
def dense_kernel(
    Query: tl.tensor, Key: tl.tensor, Value: tl.tensor, First: tl.tensor, Last: tl.tensor, Mask: tl.tensor,
    Column: tl.tensor, Out: tl.tensor, Lse: tl.tensor, query_b: tl.tensor, query_h: tl.tensor, query_q: tl.tensor,
    query_d: tl.tensor, key_b: tl.tensor, key_h: tl.tensor, key_t: tl.tensor, key_d: tl.tensor, value_b: tl.tensor,
    value_h: tl.tensor, value_t: tl.tensor, value_d: tl.tensor, mask_b: tl.tensor, mask_t: tl.tensor, out_b: tl.tensor,
    out_h: tl.tensor, out_s: tl.tensor, out_m: tl.tensor, lse_b: tl.tensor, lse_h: tl.tensor, lse_s: tl.tensor,
    heads: tl.tensor, groups: tl.tensor, queries: tl.tensor, tokens: tl.tensor, columns: tl.tensor, splits: tl.tensor,
    inner: tl.tensor, unit: tl.tensor, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
) -> None:  # fmt: skip
    """Program (split and tile of rows, B*H). Last dimensions of Out, and of Lse, are contiguous."""
    row_tiles = tl.cdiv(groups * queries, BLOCK_M)
    split = tl.program_id(0) // row_tiles  # tiles of one split are neighbours: they share its tokens through the L2
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    m = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    t = tl.arange(0, BLOCK_T)
    real = m < groups * queries

    start = 0
    if First is not None:
        start = tl.maximum(tl.load(First + b), 0)
    end = tokens
    if Last is not None:
        end = tl.minimum(tl.load(Last + b), tokens)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), BLOCK_T), splits) * BLOCK_T
    lo = start + split * share
    hi = tl.minimum(lo + share, end)
    newest = end - queries + m % queries  # the last token that a query sees where order is causal

    q_at = Query + b * query_b + (h * groups + m // queries)[:, None] * query_h + (m % queries)[:, None] * query_q
    q = tl.load(q_at + d[None, :] * query_d, mask=real[:, None] & (d < D)[None, :], other=0.0)
    key_at = t[:, None] * key_t + d[None, :] * key_d
    value_at = t[:, None] * value_t + dv[None, :] * value_d
    # a million tokens times a token's stride need 64 bits; within a tile 32 do
    Key += b * key_b + h * key_h + lo.to(tl.int64) * key_t
    Value += b * value_b + h * value_h + lo.to(tl.int64) * value_t
    if Mask is not None:
        Mask += b * mask_b
        column = 0
        if Column is not None:
            column = tl.load(Column + b)

    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for n in range(lo, hi, BLOCK_T):
        held = n + t < hi
        k = tl.load(Key + key_at, mask=held[:, None] & (d < D)[None, :], other=0.0)
        s = capped(tl.dot(q, tl.trans(k), input_precision="ieee"), inner, SOFTCAP)
        allowed = held[None, :]
        if CAUSAL:
            allowed = allowed & ((n + t)[None, :] <= newest[:, None])
        if Mask is not None:
            c = column + n + t
            shown = tl.load(Mask + c * mask_t, mask=held & (c >= 0) & (c < columns), other=0)
            allowed = allowed & (shown != 0)[None, :]
        p, shrink, top, total = weigh(tl.where(allowed, s, float("-inf")), unit, top, total)
        v = tl.load(Value + value_at, mask=held[:, None] & (dv < DV)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        Key += BLOCK_T * key_t
        Value += BLOCK_T * value_t

    mean, lse = finish(acc, unit, top, total)
    Out += b * out_b + h * out_h + split * out_s
    tl.store(Out + m[:, None] * out_m + dv[None, :], mean, mask=real[:, None] & (dv < DV)[None, :])
    tl.store(Lse + b * lse_b + h * lse_h + split * lse_s + m, lse, mask=real)


@dataclass(frozen=True)
class DenseConfig:
    """How one launch is cut: rows and tokens a tile, padded widths, and what Triton is told."""

    block_m: int
    block_t: int
    block_d: int
    block_dv: int
    num_warps: int
    num_stages: int


def dense_config(rows: int, width: int, value_width: int, itemsize: int, device: Device) -> DenseConfig:
    """Tiles of about 32 KiB of keys and values, and as many in flight as let two programs share a multiprocessor."""
    block_m = max(16, min(64, triton.next_power_of_2(rows)))
    block_d, block_dv = (max(16, triton.next_power_of_2(w)) for w in (width, value_width))
    token_bytes = triton.next_power_of_2(block_d + block_dv) * itemsize
    block_t = max(16, min(128, (32 << 10) // token_bytes))
    tiles = (device.shared_bytes // 2 - (8 << 10)) // (block_t * token_bytes)  # 8 KiB: queries and weights
    return DenseConfig(block_m, block_t, block_d, block_dv, 4, 2 if device.hip else max(1, min(3, tiles)) + 1)


def split_count(programs: int, tokens: int, multiprocessors: int) -> int:
    """How many programs share a row's tokens: the fewest that fill the device nearly as well as any number does.

    programs: those of one split (B * H * tiles of query rows); two are taken to run on a multiprocessor at once.
    """
    return _fewest(programs, max(1, min(MAX_SPLITS, tokens // TOKENS_A_SPLIT)), 2 * multiprocessors)


@lru_cache(maxsize=1024)
def _fewest(programs: int, most: int, slots: int) -> int:
    """The smallest n <= most whose waves of `slots` programs are 95% as full as those of the best one."""
    filled = [programs * n / (triton.cdiv(programs * n, slots) * slots) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(filled, start=1) if share >= 0.95 * max(filled))


def attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    mask: Tensor | None = None,
    column: Tensor | None = None,
    causal: bool = False,
    splits: int | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Partial attention of query [B, H*G, Q, D] over key [B, H, T, D] and value [B, H, T, Dv], of any strides.

    first, last: int32 [B] on the device; a row's tokens are those in [first, last), all T where None. Memory outside is
    not read. mask: bool [B, columns], the tokens that may be seen; token t stands in column t + column[b] (int32 [B], 0
    where None), and one that stands outside the mask is not seen. What the mask hides must be finite: it weighs zero.
    causal: query i of Q sees the tokens up to last - Q + i, so the last query sees them all.
    splits: programs that share a row's tokens; None chooses by shape and device.
    into: (means [B, H, splits, G*Q, Dv], log-sum-exps [B, H, splits, G*Q]) to write to, parts of larger ones perhaps.

    Returns (means, natural log-sum-exps), float32; 0 and -inf where a query saw nothing. Raises ValueError for shapes,
    dtypes and devices that do not belong together.
    """
    B, H, G, Q, T = check_attention(query, key, value)
    D, DV = query.shape[3], value.shape[3]
    inner, unit = units(scaling, softcap)
    for name, tensor in (("first", first), ("last", last), ("column", column)):
        if tensor is not None:
            check(name, tensor, (B,), (torch.int32,), query.device)
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got stride {tensor.stride()}")
    if column is not None and mask is None:
        raise ValueError("column says where tokens stand in a mask, but no mask was given")
    if mask is not None:
        if mask.ndim != 2:
            raise ValueError(f"mask must be [B, columns], got shape {tuple(mask.shape)}")
        check("mask", mask, (B, mask.shape[1]), (torch.bool,), query.device)
    device = describe(query.device)
    config = dense_config(G * Q, D, DV, query.element_size(), device)
    row_tiles = triton.cdiv(G * Q, config.block_m)
    if splits is None:
        splits = split_count(max(B * H * row_tiles, 1), T, device.multiprocessors)
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    out, lse = outputs(into, (B, H, splits, G * Q, DV), torch.float32, query)
    if not out.numel():
        return out, lse
    dense_kernel[(splits * row_tiles, B * H)](
        query, key, value, first, last, None if mask is None else mask.view(torch.uint8), column, out, lse,
        *query.stride(), *key.stride(), *value.stride(),
        *((0, 0) if mask is None else mask.stride()), *out.stride()[:4], *lse.stride()[:3],
        H, G, Q, T, 0 if mask is None else mask.shape[1], splits, inner, unit,
        CAUSAL=causal, SOFTCAP=softcap is not None, D=D, DV=DV,
        BLOCK_M=config.block_m, BLOCK_T=config.block_t, BLOCK_D=config.block_d, BLOCK_DV=config.block_dv,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


def variants() -> list[Variant]:
    """Decoding in bfloat16 with 4 query heads a KV head; at 128 dimensions also with 64 rows, a mask and all else."""
    plain = [_variant(width, width, 4, False, arch) for width in (64, 128, 256) for arch in ARCHS]
    return plain + [_variant(128, 128, 64, True, arch) for arch in ("sm_80", "sm_90")]


def _variant(width: int, value_width: int, rows: int, full: bool, arch: str) -> Variant:
    config = dense_config(rows, width, value_width, 2, CHIPS[arch])
    constants: dict[str, Any] = {"query_d": 1, "key_d": 1, "value_d": 1, "CAUSAL": full, "SOFTCAP": full}
    constants |= {"D": width, "DV": value_width, "BLOCK_M": config.block_m, "BLOCK_T": config.block_t}
    constants |= {"BLOCK_D": config.block_d, "BLOCK_DV": config.block_dv}
    absent: dict[str, Any] = {"First": None, "Last": None, "Column": None, "Mask": None}
    constants |= {"mask_t": 1} if full else absent | {"mask_b": 0, "mask_t": 0, "columns": 0}
    pointers = {"Query": "*bf16", "Key": "*bf16", "Value": "*bf16", "Mask": "*u8", "Out": "*fp32", "Lse": "*fp32"}
    pointers |= {"First": "*i32", "Last": "*i32", "Column": "*i32"}
    signature, aligned = specialised(dense_kernel.arg_names, pointers, constants)
    elements = config.block_t * (width + value_width)
    return Variant(
        "dense", "-", width, dense_kernel, signature, constants, aligned,
        config.num_warps, config.num_stages, elements, (arch,),
    )  # fmt: skip
