"""How bands are cut into the tiles that kernels work on, and in which order their dimensions come in these.

A tile's side is a power of two, so a band of width 16 S becomes segments of S0 .. S0 + N - 1 of the S blocks of each of
four lanes, N a power of two; `unpack` says how blocks make a key tile's columns and a value tile's rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from .layout import GROUP as AFFINE_GROUP
from .layout import BandLayout, LevelTable, TrellisTable
from .ptx import AFFINE, LEVELS, TRELLIS, wide

LANES = 4  # that share out a band's blocks (kvcompress/packing.py)
GROUP = 16  # dimensions: a band must be made of so many
MOST_BANDS = 8  # whose offsets go into the rows of one tile of 16
UNIT = 2.0**24  # of the numbers that codes become


#: How the numbers of a band are scaled: by a gain a token (float16, or a logarithmic byte), or as affine codes are.
HALF, LOG, BY_TOKEN, BY_CHANNEL = range(4)
SCALINGS = {"half": HALF, "log": LOG, "affine_token": BY_TOKEN, "affine_channel": BY_CHANNEL}


@dataclass(frozen=True)
class Plan:
    """What `pages_kernel` is told of one side, plain tuples throughout.

    segments: (band, S, S0, N, kind, bits, tables, codes, at, apart), `at` the first of its columns among all, `apart`
    how many blocks after a lane's own the next lane's are. bands: (scale's offset in the record, scaling, step, offset,
    first column, end of its columns, zero's offset, groups, group): of affine codes by token every group of dimensions
    is a band of its own. keys, values: for every column of key tiles, row of value tiles, its dimension among all
    bands'.
    """

    segments: tuple[tuple[int, int, int, int, int, int, tuple[int, ...], int, int, int], ...]
    bands: tuple[tuple[int, int, float, float, int, int, int, int, int], ...]
    keys: tuple[int, ...]
    values: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Dimensions of what the codes stand for, those that are dropped left out."""
        return len(self.keys)


def refuses(bands: tuple[BandLayout, ...], side: int) -> str | None:
    """Why the attention kernels cannot read these bands, of keys (side 0) or values (1); None where they can."""
    if len(bands) > MOST_BANDS:
        return f"{len(bands)} bands, at most {MOST_BANDS} are read"
    for band in bands:
        if band.width % GROUP:
            return f"a band of {band.width} dimensions, which is no multiple of {GROUP}"
        if isinstance(band.table, LevelTable) and not band.table.grid:
            return f"{band.kind} codes of {band.bits} bits, which have no table of bytes"
        if band.kind in SCALINGS and SCALINGS[band.kind] != (BY_CHANNEL, BY_TOKEN)[side]:
            return (
                f"{band.kind} codes of {('keys', 'values')[side]}, which are read by {('channel', 'token')[side]} only"
            )
    return None


def plan(bands: tuple[BandLayout, ...], side: int) -> Plan:
    """The plan of bands of keys (side 0) or values (1); raises ValueError where `refuses` says why."""
    if reason := refuses(bands, side):
        raise ValueError(f"the attention kernels cannot read {reason}")
    segments: list[tuple[int, int, int, int, int, int, tuple[int, ...], int, int, int]] = []
    described: list[tuple[int, int, float, float, int, int, int, int, int]] = []
    keys: list[int] = []
    values: list[int] = []
    for band in bands:
        kind, tables, step, offset = _table(band)
        groups = band.width // GROUP
        scaling = SCALINGS[band.gain if band.table else band.kind]
        parts = band.groups if scaling == BY_TOKEN else 1
        for part in range(parts):
            first = len(keys)
            for begin, count, apart in _cut(groups, part if scaling == BY_TOKEN else None):
                place = len(described), groups, begin, count
                segments.append((*place, kind, band.bits, tables, band.codes, len(keys), apart))
                keys += [band.start + d for d in _key_columns(begin, count, apart)]
                values += [band.start + d for d in _value_rows(begin, count, apart)]
            numbers = band.scale, scaling, step * UNIT, offset / UNIT
            described.append((*numbers, first, len(keys), band.zero, parts, part))
    return Plan(tuple(segments), tuple(described), tuple(keys), tuple(values))


def _cut(groups: int, part: int | None) -> list[tuple[int, int, int]]:
    """(first block, N, apart) of segments: of a band of `groups` groups of 16, or of one group of 32 dimensions of it.

    In the latter a lane's blocks lie beside the next one's, so that a segment has no other dimensions.
    """
    if part is not None:
        of = AFFINE_GROUP // GROUP
        count = min(of, groups - of * part)
        return [(of * part * LANES, count, count)]
    found, done = [], 0
    while done < groups:
        count = 1 << ((groups - done).bit_length() - 1)
        found.append((done, count, groups))
        done += count
    return found


def _key_columns(first: int, count: int, apart: int) -> list[int]:
    """Dimensions of columns (s, h, l, e): 2h + e of lane l's block s."""
    return [
        4 * (lane * apart + first + s) + 2 * h + e
        for s in range(count)
        for h in (0, 1)
        for lane in range(LANES)
        for e in (0, 1)
    ]


def _value_rows(first: int, count: int, apart: int) -> list[int]:
    """Dimensions of rows (c, d, gl): d of lane gl // 2's block gl % 2 (count / 2) + c; see `value_tile` for 1."""
    if count == 1:
        return [
            4 * (lane * apart + first) + 2 * high + low for high in (0, 1) for lane in range(LANES) for low in (0, 1)
        ]
    half = count // 2
    return [
        4 * (gl // 2 * apart + first + gl % 2 * half + c) + d for c in range(half) for d in range(4) for gl in range(8)
    ]


def _table(band: BandLayout) -> tuple[int, tuple[int, ...], float, float]:
    """(kind, tables in words of four bytes, step, offset)."""
    table = band.table
    if table is None:
        return AFFINE, (), 1.0, 0.0
    if isinstance(table, TrellisTable):
        kind, rows, largest = TRELLIS, table.tables, sum(max(row) for row in table.tables)
    else:
        kind, rows, largest = LEVELS, _rows(table.grid), max(table.grid)
    most = 255 if wide(kind, band.bits) else 127  # the next bit is a sign, which would fill what lies above a byte
    if largest > most:
        raise ValueError(f"sums of a table's bytes must be at most {most}, got {largest}")
    words = tuple(sum(row[i + n] << 8 * n for n in range(4)) for row in rows for i in (0, 4))
    return kind, words, table.step, table.offset


def _rows(grid: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Eights of a grid's bytes, of five bits those of its lower half, which the upper half mirrors."""
    if len(grid) == 32:
        if any(low + high != 255 for low, high in zip(grid, reversed(grid), strict=True)) or max(grid[:16]) > 127:
            raise ValueError(
                f"bytes of five-bit levels must add up to 255 from both ends, the lower half below 128, got {grid}"
            )
        grid = grid[:16]
    padded = (*grid, *[0] * (-len(grid) % 8))
    return tuple(padded[i : i + 8] for i in range(0, len(padded), 8))
