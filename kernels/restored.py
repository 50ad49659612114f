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

import triton
import triton.language as tl

from .pages import gains, key_numbers, means, scaled, softcapped, store_sums, value_numbers, value_scales, zero_sums
from .spread import parts, spread_keys, spread_values

PAGE = 64
LARGEST = tl.constexpr(1024.0)  # what a tile's largest query coordinate is brought to, so that fp16 loses little

#: What a frame is called by the kernel, and how far from a page's first token its angle is taken.
FRAMES = {"page": (1, PAGE // 2), "token": (2, 0)}


@triton.jit
def coded_keys(base, head, token, live, known, KS: tl.constexpr, KB: tl.constexpr, PTX: tl.constexpr,
               LANES: tl.constexpr):  # fmt: skip
    """What the codes of a page's keys stand for, fp16: a tile [64, 16 N] for every segment; zero where not live."""
    factors = ()
    for b in tl.static_range(len(KB)):
        factors = factors + (gains(base, KB[b][0], head, token, live, known, KB[b][1]) * KB[b][2],)
    result = ()
    for i in tl.static_range(len(KS)):
        if parts(32 * KS[i][3], LANES) == 1:
            numbers = key_numbers(
                base, head, KS[i][1], KS[i][2], KS[i][3], KS[i][4], KS[i][5], KS[i][6], KS[i][7], PTX
            )  # fmt: skip
        else:
            numbers = spread_keys(
                base, head, KS[i][1], KS[i][2], KS[i][3], KS[i][4], KS[i][5], KS[i][6], KS[i][7], PTX,
                parts(32 * KS[i][3], LANES),
            )  # fmt: skip
        factor = factors[KS[i][0]]
        y = numbers.to(tl.float32) * factor[:, None] - (factor * KB[KS[i][0]][3])[:, None]
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
        total = tl.dot(y[i], synthesis_part(W, KS[i][8], 16 * KS[i][3], CHUNK * C, C, HALF), total)
    return total


@triton.jit
def angles_kernel(
    Starts, Counts, starts_row, Frequencies, Amplitudes, Angles, angles_row, middle, HALF: tl.constexpr,
    HP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """[B, pages, 2, HALF]: cosines and sines of where pages stand, times the planes' amplitudes; P pages a program.

    By a kernel of its own, since a sine costs a lane some 40 instructions, and in the layout of a matrix product every
    lane would need those of a quarter of the planes.
    """
    row = tl.program_id(1)
    page = tl.program_id(0) * P + tl.arange(0, P)
    plane = tl.arange(0, HP)
    held = page < tl.load(Counts + row)
    position = tl.load(Starts + row.to(tl.int64) * starts_row + page, held, 0) + middle
    frequency = tl.load(Frequencies + plane, plane < HALF, 0.0)
    amplitude = tl.load(Amplitudes + plane, plane < HALF, 0.0)[None, :]
    angle = position.to(tl.float32)[:, None] * frequency[None, :]
    place = Angles + row.to(tl.int64) * angles_row + page[:, None] * (2 * HALF) + plane[None, :]
    known = held[:, None] & (plane < HALF)[None, :]
    tl.store(place, tl.cos(angle) * amplitude, known)
    tl.store(place + HALF, tl.sin(angle) * amplitude, known)


@triton.jit
def angles_of(angles, CHUNK: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr):
    """(cosines, sines) [C] of a page's position, times the planes' amplitudes."""
    plane = CHUNK * C + tl.arange(0, C)
    return tl.load(angles + plane, plane < HALF, 0.0), tl.load(angles + HALF + plane, plane < HALF, 0.0)


@triton.jit
def steps_of(Table, token, CHUNK: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr):
    """float32 [64, C] of a table [64, HALF]."""
    plane = CHUNK * C + tl.arange(0, C)
    return tl.load(Table + token[:, None] * HALF + plane[None, :], (plane < HALF)[None, :], 0.0)


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
def counted(weights, counts, shrink, M: tl.constexpr):
    """Sums of weights fp16 [64, M] joined to those before, which shrink: all 16 columns, or rows, are the same.

    In the second form every warp holds all weights, in the first one none does: they are read from shared memory.
    """
    if M >= 64:
        result = tl.dot(tl.trans(weights), tl.full([64, 16], 1.0, tl.float16), counts * shrink[:, None])
    else:
        result = tl.dot(tl.full([16, 64], 1.0, tl.float16), weights, counts * shrink[None, :])
    return result


@triton.jit
def added_up(counts, M: tl.constexpr):
    """[16, M] of what `counted` keeps."""
    if M >= 64:
        result = tl.trans(counts)
    else:
        result = counts
    return result


@triton.jit
def add_values(sums, counts, weights, shrink, value_scale, base, head, slot, live, known, M: tl.constexpr,
               VS: tl.constexpr, VB: tl.constexpr, PTX: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """As `pages.add_values`, for programs of LANES lanes."""
    halves = ()
    gathered = ()
    for b in tl.static_range(len(VB)):
        gain = gains(base, VB[b][0], head, slot, live, known, VB[b][1])
        if VB[b][1] == 0:
            gain = gain / value_scale[b]
        half = scaled(weights, gain, PTX)
        halves = halves + (half,)
        gathered = gathered + (counted(half, counts[b], shrink, M),)
    result = ()
    for i in tl.static_range(len(VS)):
        if 16 * VS[i][3] >= LANES:
            numbers = value_numbers(
                base, head, VS[i][1], VS[i][2], VS[i][3], VS[i][4], VS[i][5], VS[i][6], VS[i][7], PTX
            )  # fmt: skip
        else:
            numbers = spread_values(
                base, head, VS[i][1], VS[i][2], VS[i][3], VS[i][4], VS[i][5], VS[i][6], VS[i][7], PTX,
                parts(32 * VS[i][3], LANES),
            )  # fmt: skip
        result = result + (tl.dot(numbers, halves[VS[i][0]], sums[i] * shrink[None, :]),)
    return result, gathered


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
    for i in tl.static_range(2 * CHUNKS if CENTRED else 0):
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
    HELD: tl.constexpr, PTX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    split, head, at = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(rows, M)
    row, tile = at // tiles, at % tiles
    m = tile * M + tl.arange(0, M)
    n = tl.arange(0, 64)
    token = n % 8 * 8 + n // 8
    slot = n % 8 // 2 * 16 + n // 8 * 2 + n % 2
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
    top, total, sums = tl.full([M], -1.0e30, tl.float32), zero_counts(M), zero_sums(M, VS)
    counts = ()
    for _ in tl.static_range(len(VB)):
        counts = counts + (zero_counts(M),)
    value_scale = value_scales(tl.load(table + tl.minimum(first, tl.maximum(count - 1, 0))), head, slot, gain_of, VB)
    for page in tl.range(first, last):
        base = tl.load(table + page)
        live = token < tl.load(fills + page)
        if MASKED:
            live = live & (tl.load(mask + pad + tl.load(starts + page) + token, live, 0) != 0)
        # zero, which no compiler can know: or else it would keep the tables in registers, more than there are
        nothing = 0 if HELD else page >> 31
        y = coded_keys(base, head, token, live, gain_of, KS, KB, PTX, LANES)
        scores = scores_of(
            y, q, mean, Wx + w, Wy + w, angles + page * (2 * HALF), Cosines + nothing, Sines + nothing, token, M,
            CHUNKS, C, HALF, KS, FRAME, CENTRED,
        ) * scale  # fmt: skip
        if SOFTCAP:
            scores = softcapped(scores, softcap) * 1.4426950408889634
        scores = tl.where(live[:, None], scores, float("-inf"))
        known = tl.maximum(top, tl.max(scores, 0))
        half = tl.exp2(scores - known[None, :]).to(tl.float16)
        shrink = tl.exp2(top - known)
        top = known
        total = counted(half, total, shrink, M)
        sums, counts = add_values(
            sums, counts, half, shrink, value_scale, base, head, slot, live, gain_of, M, VS, VB, PTX, LANES
        )  # fmt: skip
    total = tl.max(added_up(total, M), 0)
    seen = total > 0
    to = (row.to(tl.int64) * heads + head) * splits + split
    for i in tl.static_range(len(VS)):
        result = means(
            sums[i], added_up(counts[VS[i][0]], M), value_scale[VS[i][0]], tl.where(seen, total, 1.0), VB[VS[i][0]]
        )
        store_sums(Out + to * rows * RV, result, m, rows, RV, VS[i][8], 16 * VS[i][3])
    lse = tl.where(seen, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(Lse + to * rows + m, lse, m < rows)
