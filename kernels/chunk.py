"""Prefill attention of a chunk over its own exact keys and values, in causal order, tile by tile (flash attention,
arXiv 2307.08691).

One program takes BLOCK_M query rows of one KV head, all its query heads side by side (row i*G + g: query token i of
query head g, so that a tile spans few tokens and its triangle at the diagonal is small), through the tokens that they
see: first tiles that all rows see whole, then those at the diagonal. Programs with the most tokens start first.

Must agree with `_chunk` in kvcompress/reference.py. Shapes: query [B, H*G, Q, D], key [B, H, T, D], value [B, H, T, Dv]
to out float32 [B, H*G, Q, Dv] and natural log-sum-exp float32 [B, H*G, Q]; the queries are the last Q of the T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@triton.jit
def _attend(
    q: tl.tensor, acc: tl.tensor, top: tl.tensor, total: tl.tensor, Key: tl.tensor, Value: tl.tensor, Mask: tl.tensor,
    key_at: tl.tensor, value_at: tl.tensor, key_t: tl.tensor, value_t: tl.tensor, mask_t: tl.tensor, lo: tl.tensor,
    hi: tl.tensor, tokens: tl.tensor, newest: tl.tensor, inner: tl.tensor, unit: tl.tensor, DIAGONAL: tl.constexpr,
    SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Take tokens [lo, hi) into (acc [M, Dv], top [M], total [M]). Key and Value point to token lo."""
    t = tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for n in range(lo, hi, BLOCK_T):
        held = n + t < tokens
        key_held = (d < D)[None, :]
        value_held = (dv < DV)[None, :]
        if DIAGONAL:
            key_held = key_held & held[:, None]
            value_held = value_held & held[:, None]
        k = tl.load(Key + key_at, mask=key_held, other=0.0)
        s = capped(tl.dot(q, tl.trans(k), input_precision="ieee"), inner, SOFTCAP)
        if DIAGONAL:
            s = tl.where((n + t)[None, :] <= newest[:, None], s, float("-inf"))
        if Mask is not None:
            if DIAGONAL:
                shown = tl.load(Mask + (n + t) * mask_t, mask=held, other=0)
            else:
                shown = tl.load(Mask + (n + t) * mask_t)
            s = tl.where((shown != 0)[None, :], s, float("-inf"))
        p, shrink, top, total = weigh(s, unit, top, total)
        v = tl.load(Value + value_at, mask=value_held, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        Key += BLOCK_T * key_t
        Value += BLOCK_T * value_t
    return acc, top, total


# these change from call to call: no code of their own for multiples of 16
@triton.jit(do_not_specialize=["tokens", "queries", "mask_b", "lse_b", "lse_h"])
def chunk_kernel(
    Query: tl.tensor, Key: tl.tensor, Value: tl.tensor, Mask: tl.tensor, Out: tl.tensor, Lse: tl.tensor,
    query_b: tl.tensor, query_h: tl.tensor, query_q: tl.tensor, query_d: tl.tensor, key_b: tl.tensor, key_h: tl.tensor,
    key_t: tl.tensor, key_d: tl.tensor, value_b: tl.tensor, value_h: tl.tensor, value_t: tl.tensor, value_d: tl.tensor,
    mask_b: tl.tensor, mask_t: tl.tensor, out_b: tl.tensor, out_h: tl.tensor, out_q: tl.tensor, lse_b: tl.tensor,
    lse_h: tl.tensor, heads: tl.tensor, groups: tl.tensor, queries: tl.tensor, tokens: tl.tensor, inner: tl.tensor,
    unit: tl.tensor, SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
) -> None:  # fmt: skip
    """Program (B*H, tile of rows counted from the end). Last dimensions of Out and Lse are contiguous."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    real = m < groups * queries
    i = (m // groups).to(tl.int64)
    head = h * groups + m % groups
    newest = tokens - queries + m // groups  # the last token that a row sees; beyond T for rows that are none
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    t = tl.arange(0, BLOCK_T)

    q_at = Query + b * query_b + head[:, None] * query_h + i[:, None] * query_q
    q = tl.load(q_at + d[None, :] * query_d, mask=real[:, None] & (d < D)[None, :], other=0.0)
    key_at = t[:, None] * key_t + d[None, :] * key_d
    value_at = t[:, None] * value_t + dv[None, :] * value_d
    Key += b * key_b + h * key_h
    Value += b * value_b + h * value_h
    if Mask is not None:
        Mask += b * mask_b

    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    whole = (tokens - queries + first // groups + 1) // BLOCK_T * BLOCK_T
    end = tl.minimum(tokens - queries + (first + BLOCK_M - 1) // groups + 1, tokens)
    acc, top, total = _attend(
        q, acc, top, total, Key, Value, Mask, key_at, value_at, key_t, value_t, mask_t,
        0, whole, tokens, newest, inner, unit,
        False, SOFTCAP, D, DV, BLOCK_T, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    acc, top, total = _attend(
        q, acc, top, total, Key + whole.to(tl.int64) * key_t, Value + whole.to(tl.int64) * value_t, Mask,
        key_at, value_at, key_t, value_t, mask_t,
        whole, end, tokens, newest, inner, unit,
        True, SOFTCAP, D, DV, BLOCK_T, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    mean, lse = finish(acc, unit, top, total)
    out_at = Out + b * out_b + head[:, None] * out_h + i[:, None] * out_q
    tl.store(out_at + dv[None, :], mean, mask=real[:, None] & (dv < DV)[None, :])
    tl.store(Lse + b * lse_b + head * lse_h + i, lse, mask=real)


@dataclass(frozen=True)
class ChunkConfig:
    """How one launch is cut: rows and tokens a tile, padded widths, and what Triton is told."""

    block_m: int
    block_t: int
    block_d: int
    block_dv: int
    num_warps: int
    num_stages: int


def chunk_config(rows: int, width: int, value_width: int, itemsize: int, device: Device) -> ChunkConfig:
    """Tiles that keep scores and sums in registers: no spills at any width up to 256 (tests/test_kernels_dense.py)."""
    block_d, block_dv = (max(16, triton.next_power_of_2(w)) for w in (width, value_width))
    wide = max(block_d, block_dv)
    small = rows <= 64 and wide <= 128
    if itemsize > 2:  # exact products take no tensor cores
        tile = (32, 32, 8, 2)
    elif device.hip:
        tile = (128, 64, 4, 2) if wide <= 128 else (64, 32, 4, 2)
    elif device.shared_bytes > 200 << 10 and not small:  # Hopper and data-centre Blackwell
        tile = (128, 128, 8, 2) if wide <= 128 else (128, 64, 8, 2) if block_dv <= 128 else (64, 64, 8, 2)
    elif wide <= 64:
        tile = (128, 64, 4, 3)
    else:
        tile = (64, 64, 4, 2) if wide <= 128 else (64, 32, 8, 2)
    most, block_t, warps, stages = tile
    block_m = min(most, max(64, triton.next_power_of_2(rows)))
    return ChunkConfig(block_m, block_t, block_d, block_dv, warps, stages)


def attend_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of query [B, H*G, Q, D] over key [B, H, T, D] and value [B, H, T, Dv], T >= Q, any strides.

    Query i sees the tokens up to T - Q + i. mask: bool [B, T], the tokens that may be seen; what it hides must be
    finite, since it weighs zero.
    into: (out [B, H*G, Q, Dv], log-sum-exp [B, H*G, Q]) to write to, float32.

    Returns (out, natural log-sum-exp), float32; 0 and -inf where a query sees nothing. For kernels/merge.py they are
    one part, out.view(B, H, 1, G*Q, Dv) and lse.view(B, H, 1, G*Q). Raises ValueError for shapes, dtypes and devices
    that do not belong together.
    """
    B, H, G, Q, T = check_attention(query, key, value)
    if T < Q:
        raise ValueError(f"the queries must be among the tokens (T >= Q), got T = {T} and Q = {Q}")
    if mask is not None:
        check("mask", mask, (B, T), (torch.bool,), query.device)
    D, DV = query.shape[3], value.shape[3]
    inner, unit = units(scaling, softcap)
    out, lse = outputs(into, (B, H * G, Q, DV), torch.float32, query)
    if not out.numel():
        return out, lse
    config = chunk_config(G * Q, D, DV, query.element_size(), describe(query.device))
    chunk_kernel[(B * H, triton.cdiv(G * Q, config.block_m))](
        query, key, value, None if mask is None else mask.view(torch.uint8), out, lse,
        *query.stride(), *key.stride(), *value.stride(), *((0, 0) if mask is None else mask.stride()),
        *out.stride()[:3], *lse.stride()[:2],
        H, G, Q, T, inner, unit,
        SOFTCAP=softcap is not None, D=D, DV=DV,
        BLOCK_M=config.block_m, BLOCK_T=config.block_t, BLOCK_D=config.block_d, BLOCK_DV=config.block_dv,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


def variants() -> list[Variant]:
    """Launches in bfloat16 of many rows, of few, and with a mask and soft-capped scores.

    Not for sm_100: benchmarks/machine_code.py cannot read what Triton waits with for its matrix products.
    """
    archs = tuple(arch for arch in ARCHS if arch != "sm_100")
    found = [_variant(*shape, 4096, False, arch) for shape in ((128, 128), (256, 256)) for arch in archs]
    found += [_variant(128, 128, 4096, True, arch) for arch in ("sm_80", "sm_90")]
    return found + [_variant(128, 128, 32, False, arch) for arch in archs]


def _variant(width: int, value_width: int, rows: int, full: bool, arch: str) -> Variant:
    config = chunk_config(rows, width, value_width, 2, CHIPS[arch])
    constants: dict[str, Any] = {"query_d": 1, "key_d": 1, "value_d": 1, "SOFTCAP": full, "D": width, "DV": value_width}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_T": config.block_t}
    constants |= {"BLOCK_D": config.block_d, "BLOCK_DV": config.block_dv}
    constants |= {"mask_t": 1} if full else {"Mask": None, "mask_b": 0, "mask_t": 0}
    pointers = {"Query": "*bf16", "Key": "*bf16", "Value": "*bf16", "Mask": "*u8", "Out": "*fp32", "Lse": "*fp32"}
    signature, aligned = specialised(chunk_kernel.arg_names, pointers, constants)
    elements = config.block_t * (width + value_width)
    return Variant(
        "chunk", "-", width, chunk_kernel, signature, constants, aligned,
        config.num_warps, config.num_stages, elements, (arch,),
    )  # fmt: skip
