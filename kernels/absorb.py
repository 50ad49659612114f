"""Queries made ready for attention on codes: turned back by a page's rotary embedding, times the keys' synthesis.

For every KV head the rows m = g Q + t of its G query heads and Q query tokens::

    absorbed = (R(position)^T query) W unit / scale      fp16, columns in the order of `pages`' key tiles
    bias     = (R(position)^T query) . mean unit         fp32
    offsets  = - offset_b sum over band b of absorbed    two fp16 numbers that add up, in rows 2b and 2b + 1 of 16

unit = scaling, times log2(e) where no soft-cap follows; scale brings the largest of a tile's numbers to LARGEST, so
that fp16 loses nothing but what is 2^-24 of it, and holds the offsets. W [D, R] and mean [D] are the codec's, W's
columns permuted by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import Device, describe
from .unpack import entry
from .variant import Variant

GROUP = 16  # pages whose queries one program absorbs, so that it loads the synthesis once
LARGEST = tl.constexpr(1.0)  # times an affine scale, or 256 dimensions of a band and an offset: within fp16's 65504


@triton.jit
def turned(x, y, cos, sin):
    """Plane coordinates after the inverse rotation."""
    return x * cos + y * sin, y * cos - x * sin


@triton.jit
def absorb_kernel(
    Q, q_row, q_head, W, w_row, w_head, Mean, m_row, Planes, Frequencies, Amplitudes, Starts, starts_row, Counts,
    Out, Scale, Bias, Offsets,
    pages, rows, heads, unit, middle,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, M: tl.constexpr, BANDS: tl.constexpr,
    TURNED: tl.constexpr, CENTRED: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (group of GROUP pages, head, row and tile of queries); the group has one member where nothing turns."""
    group, head, at = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(rows, M)
    row, tile = at // tiles, at % tiles
    m = tile * M + tl.arange(0, M)
    j = tl.arange(0, DP // 2)
    r = tl.arange(0, RP)
    k = tl.arange(0, 16)
    live = (j < D // 2)[:, None] & (m < rows)[None, :]
    source = Q + row.to(tl.int64) * q_row + (head.to(tl.int64) * rows + m)[None, :] * q_head
    first, second = tl.load(Planes + j, j < D // 2, 0), tl.load(Planes + D // 2 + j, j < D // 2, 0)
    x0 = tl.load(source + first[:, None], live, 0.0).to(tl.float32)
    y0 = tl.load(source + second[:, None], live, 0.0).to(tl.float32)
    weights = W + row.to(tl.int64) * w_row + head.to(tl.int64) * w_head
    inside = (r < R)[:, None] & (j < D // 2)[None, :]
    upper = tl.load(weights + first[None, :] * R + r[:, None], inside, 0.0)
    lower = tl.load(weights + second[None, :] * R + r[:, None], inside, 0.0)
    last = pages
    if TURNED:
        frequency = tl.load(Frequencies + j, j < D // 2, 0.0)
        amplitude = tl.load(Amplitudes + j, j < D // 2, 1.0)
        last = tl.minimum(tl.load(Counts + row), pages)
    for page in tl.range(group * GROUP, tl.minimum((group + 1) * GROUP, last)):
        x, y = x0, y0
        if TURNED:
            position = tl.load(Starts + row * starts_row + page) + middle
            angle = position.to(tl.float32) * frequency
            x, y = turned(x0, y0, (tl.cos(angle) * amplitude)[:, None], (tl.sin(angle) * amplitude)[:, None])
        # as precise as its result will be, which is rounded to fp16
        result = tl.dot(upper, x, input_precision=PRECISION)
        result = tl.dot(lower, y, result, input_precision=PRECISION) * unit
        place = (row.to(tl.int64) * heads + head) * pages + page
        largest = tl.max(tl.max(tl.abs(result), 1), 0)
        scale = tl.where(largest > 0, largest / LARGEST, 1.0)
        tl.store(Scale + place * tiles + tile, scale)
        half = (result / scale).to(tl.float16)
        tl.store(Out + (place * rows + m)[None, :] * R + r[:, None], half, (r < R)[:, None] & (m < rows)[None, :])
        parts = tl.zeros([16, M], tl.float32)
        for b in tl.static_range(len(BANDS)):
            band = (r >= entry(BANDS, b, 0)) & (r < entry(BANDS, b, 1))
            total = tl.sum(tl.where(band[:, None], half.to(tl.float32), 0.0), 0) * (-entry(BANDS, b, 2))
            high = total.to(tl.float16).to(tl.float32)
            parts += tl.where(k[:, None] == 2 * b, high[None, :], 0.0)
            parts += tl.where(k[:, None] == 2 * b + 1, (total - high)[None, :], 0.0)
        tl.store(Offsets + (place * rows + m)[None, :] * 16 + k[:, None], parts.to(tl.float16), (m < rows)[None, :])
        if CENTRED:
            centre = Mean + row.to(tl.int64) * m_row + head * D
            mean_x, mean_y = tl.load(centre + first, j < D // 2, 0.0), tl.load(centre + second, j < D // 2, 0.0)
            bias = tl.sum(x * mean_x[:, None], 0) + tl.sum(y * mean_y[:, None], 0)
            tl.store(Bias + place * rows + m, bias * unit, m < rows)


def tile_rows(rows: int, device: Device) -> int:
    """Rows of a tile for `rows` query rows of a KV head: at least what matrix instructions take, at most 64."""
    sizes = (16, 32, 64) if device.hip else (8, 16, 32, 64)
    return next(size for size in sizes if rows <= size or size == 64)


@dataclass(frozen=True)
class Absorbed:
    """What `absorb` makes; P is 1, or the pages of the longest row where queries are turned back page by page.

    queries: fp16 [B, H, P, rows, R]. scale: float32 [B, H, P, tiles]. bias: float32 [B, H, P, rows], empty where keys
    are not centred. offsets: fp16 [B, H, P, rows, 16].
    """

    queries: Tensor
    scale: Tensor
    bias: Tensor
    offsets: Tensor
    per_page: bool


@dataclass(frozen=True)
class Frames:
    """Where and how queries are turned back: starts int32 [B, capacity] and counts int32 [B] of an address table, the
    most pages of a row, what is added to a page's start, and the planes (kvcompress/planes.py).
    """

    starts: Tensor
    counts: Tensor
    pages: int
    middle: int
    order: Tensor
    frequencies: Tensor
    amplitudes: Tensor


def absorb(
    query: Tensor,
    synthesis: Tensor,
    mean: Tensor | None,
    bands: tuple[tuple[int, int, float], ...],
    unit: float,
    frames: Frames | None = None,
) -> Absorbed:
    """Queries [B, H*G, Q, D] absorbed into [B, H, P, G*Q, R].

    synthesis: float32 [B or 1, H or 1, D, R]. mean: float32 [B or 1, H, D]. bands: (first column, end, offset) of each.
    """
    rows_of, heads = query.shape[0], synthesis.shape[1] if mean is None else mean.shape[1]
    width, rank = synthesis.shape[2:]
    query = query.contiguous()
    rows = query.shape[1] // heads * query.shape[2]
    pages = 1 if frames is None else frames.pages
    tile = tile_rows(rows, describe(query.device))
    tiles = triton.cdiv(rows, tile)
    shape = (rows_of, heads, pages)
    new = partial(torch.empty, dtype=torch.float32, device=query.device)
    result = Absorbed(
        torch.empty(*shape, rows, rank, dtype=torch.float16, device=query.device),
        new(*shape, tiles),
        new(*shape, rows if mean is not None else 0),
        torch.empty(*shape, rows, 16, dtype=torch.float16, device=query.device),
        frames is not None,
    )
    if frames is None:
        nothing = new(0)
        frames = Frames(nothing, nothing, 1, 0, _identity(width, query.device), nothing, nothing)
        turned = False
    else:
        turned = True
    centre = result.bias if mean is None else mean
    absorb_kernel[(triton.cdiv(pages, GROUP), heads, rows_of * tiles)](
        query, query.stride(0), width, synthesis, *_strides(synthesis, rows_of, heads), centre,
        0 if mean is None or len(mean) == 1 else mean.stride(0), frames.order, frames.frequencies, frames.amplitudes,
        frames.starts, frames.starts.stride(0) if turned else 0, frames.counts,
        result.queries, result.scale, result.bias, result.offsets, pages, rows, heads, unit, frames.middle,
        D=width, DP=max(triton.next_power_of_2(width), 32), R=rank, RP=triton.next_power_of_2(rank), M=tile,
        BANDS=bands, TURNED=turned, CENTRED=mean is not None, GROUP=GROUP, PRECISION="tf32" if turned else "ieee",
        num_warps=4 if rank <= 128 else 8,
    )  # fmt: skip
    return result


def _strides(matrix: Tensor, rows: int, heads: int) -> tuple[int, int]:
    """(row stride, head stride) of [rows or 1, heads or 1, ...]."""
    return (0 if len(matrix) == 1 else matrix.stride(0)), (0 if matrix.shape[1] == 1 else matrix.stride(1))


@lru_cache
def _identity(width: int, device: torch.device) -> Tensor:
    return torch.arange(width, dtype=torch.int32, device=device)


def variants() -> list[Variant]:
    """Decoding with 4 query heads a KV head at head_dim 128: once a row, and once a page."""
    found = []
    for turned in (False, True):
        pointers = dict.fromkeys(("W", "Mean", "Frequencies", "Amplitudes", "Scale", "Bias"), "*fp32")
        pointers |= {"Q": "*bf16", "Out": "*fp16", "Offsets": "*fp16"}
        pointers |= dict.fromkeys(("Planes", "Starts", "Counts"), "*i32")
        constants: dict[str, Any] = {
            "D": 128, "DP": 128, "R": 128, "RP": 128, "M": 8, "BANDS": ((0, 128, 10.0),), "TURNED": turned,
            "CENTRED": True, "GROUP": GROUP, "PRECISION": "tf32" if turned else "ieee",
        }  # fmt: skip
        types = {**dict.fromkeys(constants, "constexpr"), **pointers, "unit": "fp32"}
        signature = {name: types.get(name, "i32") for name in absorb_kernel.arg_names}
        aligned = (*pointers, "q_row", "q_head", "w_row", "w_head", "m_row")
        codec = "page by page" if turned else "-"
        found.append(Variant("absorb", codec, 128, absorb_kernel, signature, constants, aligned, 4, 1))
    return found
