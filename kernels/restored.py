"""Attention over pages of keys that have to be rebuilt: those coded without their rotary embedding, and long prefill.

As `pages`, but the keys of a page are made again, 64 tokens at a time, and turned to where they stand::

    key_t = R(position_t) (W y_t + mean)         score_t = key_t . query

so that queries are taken as they are. y, the keys and the queries are rounded to fp16 for the matrix unit, sums are
fp32. A rotation acts on planes of two coordinates: W comes as its rows of first and of second coordinates, a chunk of
planes is rebuilt at a time, turned in registers and multiplied by the queries. With frame "page" all tokens of a page
turn by the angle of its middle, with "token" each by its own: the angle of the page's first token, by cosine and sine,
and a table of those of the 64 steps from there, put together by the addition theorems.

Shapes and results as in `pages`; the token order of rows, 8 g + i in row 8 i + g, is that of its key tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .absorb import tile_rows
from .checks import DTYPES, check, check_rows
from .device import CHIPS, describe
from .layout import PAGE, BandLayout, Kind, LevelTable, TrellisTable
from .pages import Table
from .ptx import DIGEST
from .ptx import version as ptx_version
from .rebuilding import FRAMES, Rebuilding, angles_of, steps_of
from .segments import Plan, plan
from .softmax import LN_2, LOG2E, capped
from .spread import key_segment, value_segment
from .unpack import entry
from .variant import ARCHS, Variant
from .weighting import gains, means, order_of_page, store_sums, value_scales, weights_of_band, zero_sums

LARGEST = tl.constexpr(1024.0)  # what a tile's largest query coordinate is brought to, so that fp16 loses little
PLANES = 32  # of a chunk
GROUPS = 4  # query heads a KV head of what is compiled without a device
WARPS = 4  # what Hopper's matrix instructions are done by together; each takes 16 of a page's tokens


@triton.jit
def coded_keys(base, head, token, live, known, KS: tl.constexpr, KB: tl.constexpr, PTX: tl.constexpr,
               LANES: tl.constexpr):  # fmt: skip
    """What the codes of a page's keys stand for, fp16: a tile [64, 16 N] for every segment; zero where not live."""
    factors = ()
    for b in tl.static_range(len(KB)):
        factors = factors + (gains(base, head, token, live, known, KB, b) * entry(KB, b, 2),)
    result = ()
    for i in tl.static_range(len(KS)):
        numbers = key_segment(base, head, KS, i, PTX, LANES)
        shift = factors[entry(KS, i, 0)] * entry(KB, entry(KS, i, 0), 3)
        y = numbers.to(tl.float32) * factors[entry(KS, i, 0)][:, None] - shift[:, None]
        result = result + (y.to(tl.float16),)
    return result


@triton.jit
def synthesis_part(W, AT: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr):
    """fp16 [WIDTH, C]: rows from AT, planes from FIRST; zero beyond the last plane."""
    plane = FIRST + tl.arange(0, C)
    return tl.load(W + (AT + tl.arange(0, WIDTH))[:, None] * HALF + plane[None, :], (plane < HALF)[None, :], 0.0)


@triton.jit
def coordinates(y, W, mean, CHUNK: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, KS: tl.constexpr,
                CENTRED: tl.constexpr):  # fmt: skip
    """float32 [64, C]: the first, or the second, coordinates of a chunk of planes of a page's keys."""
    total = tl.zeros([64, C], tl.float32)
    if CENTRED:
        total = tl.dot(tl.full([64, 16], 1.0, tl.float16), mean, total)
    for i in tl.static_range(len(KS)):
        total = tl.dot(y[i], synthesis_part(W, entry(KS, i, 8), 16 * entry(KS, i, 3), CHUNK * C, C, HALF), total)
    return total


@triton.jit
def scores_of(
    y, q, mean, Wx, Wy, angles, Cosines, Sines, token, M: tl.constexpr,
    CHUNKS: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, KS: tl.constexpr, FRAME: tl.constexpr,
    CENTRED: tl.constexpr,
):  # fmt: skip
    """float32 [64, M]: the products of a page's keys and the queries, in the order of `token`."""
    scores = tl.zeros([64, M], tl.float32)
    for c in tl.static_range(CHUNKS):
        x = coordinates(y, Wx, mean[2 * c], c, C, HALF, KS, CENTRED)
        z = coordinates(y, Wy, mean[2 * c + 1], c, C, HALF, KS, CENTRED)
        cos, sin = angles_of(angles, c, C, HALF)
        cos, sin = cos[None, :], sin[None, :]
        if FRAME == 2:
            step_cos, step_sin = steps_of(Cosines, token, c, C, HALF), steps_of(Sines, token, c, C, HALF)
            cos, sin = cos * step_cos - sin * step_sin, sin * step_cos + cos * step_sin
        scores = tl.dot((x * cos - z * sin).to(tl.float16), q[2 * c], scores)
        scores = tl.dot((z * cos + x * sin).to(tl.float16), q[2 * c + 1], scores)
    return scores


@triton.jit
def zero_counts(M: tl.constexpr):
    if M >= 64:
        result = tl.zeros([M, 16], tl.float32)
    else:
        result = tl.zeros([16, M], tl.float32)
    return result


@triton.jit
def shrunk(counts, shrink, M: tl.constexpr):
    return counts * (shrink[:, None] if M >= 64 else shrink[None, :])


@triton.jit
def counted(weights, counts, AT: tl.constexpr, M: tl.constexpr):
    """Sums of weights fp16 [64, M] added to line AT of the counts.

    The counts' lines are rows, or columns where there are many queries: as a second operand every warp would hold all
    weights, as a first one they are read from shared memory.
    """
    one = tl.where(tl.arange(0, 16) == AT, 1.0, 0.0).to(tl.float16)
    if M >= 64:
        result = tl.dot(tl.trans(weights), tl.broadcast_to(one[None, :], [64, 16]), counts)
    else:
        result = tl.dot(tl.broadcast_to(one[:, None], [16, 64]), weights, counts)
    return result


@triton.jit
def count_of(counts, AT: tl.constexpr, M: tl.constexpr):
    """[M] of line AT."""
    if M >= 64:
        result = tl.sum(tl.where(tl.arange(0, 16)[None, :] == AT, counts, 0.0), 1)
    else:
        result = tl.sum(tl.where(tl.arange(0, 16)[:, None] == AT, counts, 0.0), 0)
    return result


@triton.jit
def add_values(sums, counts, weights, shrink, value_scale, base, head, slot, live, known, M: tl.constexpr,
               VS: tl.constexpr, VB: tl.constexpr, PTX: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """As `pages.add_values`, by LANES lanes. counts: a line for each band, then that of the weights themselves."""
    counts = counted(weights, shrunk(counts, shrink, M), len(VB), M)
    halves = ()
    for b in tl.static_range(len(VB)):
        half = weights_of_band(weights, value_scale[b], base, head, slot, live, known, b, VB, PTX)
        halves = halves + (half,)
        counts = counted(half, counts, b, M)
    result = ()
    for i in tl.static_range(len(VS)):
        numbers = value_segment(base, head, VS, i, PTX, LANES)
        result = result + (tl.dot(numbers, halves[entry(VS, i, 0)], sums[i] * shrink[None, :]),)
    return result, counts


@triton.jit
def query_chunks(source, m, rows, Planes, CHUNKS: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr):
    """float32 [C, M]: for every chunk of planes the queries' first coordinates, then the second ones."""
    result = ()
    for i in tl.static_range(2 * CHUNKS):
        plane = i // 2 * C + tl.arange(0, C)
        column = tl.load(Planes + i % 2 * HALF + plane, plane < HALF, 0)
        live = (plane < HALF)[:, None] & (m < rows)[None, :]
        result = result + (tl.load(source[None, :] + column[:, None], live, 0.0).to(tl.float32),)
    return result


@triton.jit
def halved(q):
    """(the queries as fp16 with their largest at LARGEST, what that divided them by)."""
    largest = 0.0
    for i in tl.static_range(len(q)):
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(q[i]), 1), 0))
    scale = tl.where(largest > 0, largest / LARGEST, 1.0)
    result = ()
    for i in tl.static_range(len(q)):
        result = result + ((q[i] / scale).to(tl.float16),)
    return result, scale


@triton.jit
def mean_chunks(
    Mean, Planes, CHUNKS: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, CENTRED: tl.constexpr
):  # fmt: skip
    """fp16 [16, C]: for every chunk of planes the mean's first coordinates, then the second ones.

    Each as two rows that add up to them, so that a product with ones adds them to what is being summed: a mean that
    was added afterwards would take a register for every plane that a lane holds.
    """
    result = ()
    for i in tl.static_range(2 * CHUNKS):
        if not CENTRED:
            result = result + (tl.zeros([16, C], tl.float16),)
        else:
            plane = i // 2 * C + tl.arange(0, C)
            column = tl.load(Planes + i % 2 * HALF + plane, plane < HALF, 0)
            mean = tl.load(Mean + column, plane < HALF, 0.0)
            upper = mean.to(tl.float16)
            lower = (mean - upper.to(tl.float32)).to(tl.float16)
            r = tl.arange(0, 16)[:, None]
            rows = tl.where(r == 0, upper[None, :], tl.where(r == 1, lower[None, :], tl.zeros([16, C], tl.float16)))
            result = result + (rows,)
    return result


# these change from call to call: no code of their own for multiples of 16
@triton.jit(do_not_specialize=["rows", "queries", "splits", "mask_row", "table_row", "angles_row"])
def restored_kernel(
    Q, q_row, q_head, q_token, Wx, Wy, w_row, Mean, m_row, Planes, Angles, angles_row, Cosines, Sines,
    Table, Fills, Starts, Counts, table_row, Mask, mask_row, Pads, gain_of,
    Out, Lse,
    rows, queries, heads, splits, unit, softcap,
    R: tl.constexpr, RV: tl.constexpr, D: tl.constexpr, M: tl.constexpr, CHUNKS: tl.constexpr, C: tl.constexpr,
    KS: tl.constexpr, KB: tl.constexpr, VS: tl.constexpr, VB: tl.constexpr,
    FRAME: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, CENTRED: tl.constexpr,
    PTX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    split, head, at = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(rows, M)
    row, tile = at // tiles, at % tiles
    m = tile * M + tl.arange(0, M)
    token, slot = order_of_page()
    count = tl.load(Counts + row)
    share = tl.cdiv(count, splits)
    first = split * share
    last = tl.minimum(first + share, count)
    one = head * (rows // queries) + m // queries  # the query head
    source = Q + row.to(tl.int64) * q_row + one.to(tl.int64) * q_head + (m % queries).to(tl.int64) * q_token
    q, scale = halved(query_chunks(source, m, rows, Planes, CHUNKS, C, HALF))
    scale = scale * unit
    mean = mean_chunks(Mean + row.to(tl.int64) * m_row + head * D, Planes, CHUNKS, C, HALF, CENTRED)
    w = row.to(tl.int64) * w_row + head * (R * HALF)
    table = Table + row.to(tl.int64) * table_row
    fills = Fills + row.to(tl.int64) * table_row
    starts = Starts + row.to(tl.int64) * table_row
    angles = Angles + row.to(tl.int64) * angles_row
    mask = Mask + row.to(tl.int64) * mask_row
    pad = tl.load(Pads + row) if MASKED else 0
    top, counts, sums = tl.full([M], -1.0e30, tl.float32), zero_counts(M), zero_sums(M, VS)
    own = tl.minimum(first, tl.maximum(count - 1, 0))
    held = token < tl.where(first < last, tl.load(fills + own), 0)
    value_scale = value_scales(tl.load(table + own), head, slot, held, gain_of, VB)
    for page in tl.range(first, last):
        base = tl.load(table + page)
        live = token < tl.load(fills + page)
        if MASKED:
            live = live & (tl.load(mask + pad + tl.load(starts + page) + token, live, 0) != 0)
        # zero, which no compiler knows: or else it would keep the tables in registers, more than there are
        nothing = page >> 31
        y = coded_keys(base, head, token, live, gain_of, KS, KB, PTX, LANES)
        scores = scores_of(
            y, q, mean, Wx + w, Wy + w, angles + page * (2 * HALF), Cosines + nothing, Sines + nothing, token, M,
            CHUNKS, C, HALF, KS, FRAME, CENTRED,
        ) * scale  # fmt: skip
        if SOFTCAP:
            scores = capped(scores, 1.0 / softcap, True) * (softcap * LOG2E)
        scores = tl.where(live[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        half = tl.exp2(scores - higher[None, :]).to(tl.float16)
        shrink = tl.exp2(top - higher)
        top = higher
        sums, counts = add_values(
            sums, counts, half, shrink, value_scale, base, head, slot, live, gain_of, M, VS, VB, PTX, LANES
        )  # fmt: skip
    total = count_of(counts, len(VB), M)
    seen = total > 0
    to = (row.to(tl.int64) * heads + head) * splits + split
    for i in tl.static_range(len(VS)):
        weight = count_of(counts, entry(VS, i, 0), M)
        safe = tl.where(seen, total, 1.0)
        result = means(sums[i], weight, value_scale[entry(VS, i, 0)], safe, VB, entry(VS, i, 0))
        store_sums(Out + to * rows * RV, result, m, rows, RV, entry(VS, i, 8), 16 * entry(VS, i, 3))
    lse = tl.where(seen, (top + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(Lse + to * rows + m, lse, m < rows)


def attend_restored(
    query: Tensor, rebuilding: Rebuilding, angles: Tensor, steps: tuple[Tensor, Tensor], table: Table, keys: Plan,
    values: Plan, gains_of_bytes: Tensor, scaling: float, softcap: float | None = None,
    mask: tuple[Tensor, Tensor] | None = None, splits: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Partial attention of query [B, H*G, Q, D], any strides but the last, over pages of keys that are rebuilt.

    angles: those of `page_angles`. steps: those of `Rebuilding.steps`; both are the same for all layers of a model.
    gains_of_bytes, mask, splits: as `pages.attend_pages` takes them. Returns as that one does: (means of what the
    values' codes stand for float32 [B, H, splits, rows, rank], log-sum-exps float32 [B, H, splits, rows]).

    Raises ValueError for shapes, dtypes and devices that do not belong together.
    """
    if query.ndim != 4 or query.dtype not in DTYPES:
        raise ValueError(f"query must be [B, H*G, Q, D] of {', '.join(map(str, DTYPES))}, got {tuple(query.shape)}")
    check_rows("query", query)
    rows_of, width, device = query.shape[0], query.shape[3], query.device
    heads = rebuilding.first.shape[1]
    if query.shape[1] % heads:
        raise ValueError(f"query heads must be a multiple of the KV heads, got {query.shape[1]} and {heads}")
    rebuilding.check(rows_of, heads, width, keys.rank)
    half = width // 2
    check("angles", angles, (rows_of, table.most, 2, half), (torch.float32,), device)
    for own in steps:
        check("steps", own, (PAGE, half), (torch.float32,), device)
    check("counts", table.counts, (rows_of,), (torch.int32,), device)
    check("gains_of_bytes", gains_of_bytes, (256,), (torch.float32,), device)
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    rows = query.shape[1] // heads * query.shape[2]
    out = torch.empty(rows_of, heads, splits, rows, values.rank, dtype=torch.float32, device=device)
    lse = torch.empty(rows_of, heads, splits, rows, dtype=torch.float32, device=device)
    if not lse.numel():
        return out, lse
    seen, pads = mask if mask is not None else (table.fills, table.counts)
    ptx = ptx_version(device)
    tile, planes = tile_rows(rows, describe(device)), chunk_planes(half)
    mean = rebuilding.mean
    restored_kernel[(splits, heads, rows_of * triton.cdiv(rows, tile))](
        query, *query.stride()[:3], rebuilding.first, rebuilding.second, _row_stride(rebuilding.first),
        rebuilding.frequencies if mean is None else mean, 0 if mean is None else _row_stride(mean), rebuilding.order,
        angles, angles.stride(0), *steps, table.addresses, table.fills, table.starts, table.counts,
        table.addresses.stride(0), seen.view(torch.int8) if mask is not None else seen, seen.stride(0), pads,
        gains_of_bytes, out, lse, rows, query.shape[2], heads, splits,
        scaling * (1.0 if softcap else LOG2E.value), softcap or 0.0,
        R=keys.rank, RV=values.rank, D=width, M=tile, CHUNKS=triton.cdiv(half, planes), C=planes,
        KS=keys.segments, KB=keys.bands, VS=values.segments, VB=values.bands, FRAME=FRAMES[rebuilding.frame][0],
        MASKED=mask is not None, SOFTCAP=softcap is not None, CENTRED=mean is not None, PTX=ptx,
        LANES=lanes(ptx), num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return out, lse


def chunk_planes(half: int) -> int:
    """Planes of a chunk: those that leave the fewest empty ones."""
    return min((PLANES, 16), key=lambda planes: -(-half // planes) * planes)


def _row_stride(tensor: Tensor) -> int:
    return 0 if len(tensor) == 1 else tensor.stride(0)


def lanes(ptx: int) -> int:
    """Among how many lanes blocks are shared out: a program's, but for AMD's, whose tiles are not made by PTX."""
    return 32 * WARPS if ptx else 1


def variants() -> list[Variant]:
    """Decoding with 4 query heads a KV head and prefill, for `prerope` codecs, and prefill in the frames of pages.

    The tables' entries are examples: no instruction depends on them.
    """
    table = TrellisTable(tuple(tuple(range(first, first + 8)) for first in (0, 8, 16)), 10.0, 0.1)
    grid = *range(100, 116), *range(140, 156)
    levels = LevelTable(grid, grid[1:], grid, 1.0, 127.5)

    def spectral(unit: int, profile: tuple[int, int, int]) -> Plan:
        bands, codes = [], 0
        for start, width, bits in zip((0, unit, 3 * unit), (unit, 2 * unit, unit), profile, strict=True):
            kind: Kind = "trellis" if bits < 5 else "lloyd"
            own = table if bits < 5 else levels
            bands.append(BandLayout(start, width, kind, bits, "log", codes, codes, table=own))
            codes += 8 * PAGE * width * bits // 8
        return plan(tuple(bands), 0)

    whole = plan((BandLayout(0, 128, "trellis", 3, table=table),), 0)
    three, four = spectral(32, (4, 3, 2)), spectral(32, (5, 4, 3))
    made = []
    for arch in ARCHS:
        made.append(_variant("spectral3", 64, spectral(16, (4, 3, 2)), "token", GROUPS, arch))
        made += [
            _variant(codec, 128, own, "token", GROUPS, arch)
            for codec, own in (("trellis3", whole), ("spectral3", three), ("spectral4", four))
        ]
        made += [_variant("spectral3", 128, three, frame, 64, arch) for frame in FRAMES]
    return made


def _variant(codec: str, width: int, own: Plan, frame: str, rows: int, arch: str) -> Variant:
    """For so many query rows of a KV head."""
    ptx = 0 if arch.startswith("gfx") else DIGEST
    pointers = {"Q": "*bf16", "Wx": "*fp16", "Wy": "*fp16", "Planes": "*i32", "Table": "*i64", "Fills": "*i32"}
    pointers |= {"Starts": "*i32", "Counts": "*i32", "Mask": "*i8", "Pads": "*i32"}
    pointers |= dict.fromkeys(("Mean", "Angles", "Cosines", "Sines", "gain_of", "Out", "Lse"), "*fp32")
    planes = chunk_planes(width // 2)
    constants: dict[str, Any] = {
        "R": own.rank, "RV": own.rank, "D": width, "M": tile_rows(rows, CHIPS[arch]),
        "CHUNKS": triton.cdiv(width // 2, planes), "C": planes,
        "KS": own.segments, "KB": own.bands, "VS": own.segments, "VB": own.bands, "FRAME": FRAMES[frame][0],
        "MASKED": False, "SOFTCAP": False, "CENTRED": True, "PTX": ptx, "LANES": lanes(ptx),
    }  # fmt: skip
    types = {**dict.fromkeys(constants, "constexpr"), **pointers, "unit": "fp32", "softcap": "fp32"}
    signature = {name: types.get(name, "i32") for name in restored_kernel.arg_names}
    aligned = (*pointers, "q_row", "q_head", "q_token", "w_row", "m_row")
    name = f"restored {frame}" if rows == GROUPS else f"restored {frame} prefill"
    return Variant(
        name, codec, width, restored_kernel, signature, constants, aligned, WARPS, 1, 2 * PAGE * own.rank, (arch,)
    )
