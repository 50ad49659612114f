"""How bands are cut into the tiles that kernels work on, and in which order their dimensions come in these.

A tile's side is a power of two, so a band of width 16 S becomes segments of S0 .. S0 + N - 1 of its S groups, N a power
of two; `unpack` says how blocks make a key tile's columns and a value tile's rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from .layout import BandLayout, LevelTable, TrellisTable

GROUP = 16  # dimensions: a band must be made of so many
MOST_BANDS = 8  # whose offsets go into the rows of one tile of 16
LARGEST = 127  # sum of a table's bytes: the next bit is a sign, which would fill what lies above a byte
UNIT = 2.0**24  # of the numbers that codes become


@dataclass(frozen=True)
class Plan:
    """What `pages_kernel` is told of one side, plain tuples throughout.

    segments: (band, S, S0, N, kind, bits, tables, codes, at), `at` the first of its columns among all. bands: (scale's
    offset in the record, gain kind, step, offset, first column, end of its columns). keys, values: for every column of
    key tiles, row of value tiles, its dimension among all bands'.
    """

    segments: tuple[tuple[int, int, int, int, int, int, tuple[int, ...], int, int], ...]
    bands: tuple[tuple[int, int, float, float, int, int], ...]
    keys: tuple[int, ...]
    values: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Dimensions of what the codes stand for, those that are dropped left out."""
        return len(self.keys)


def refuses(bands: tuple[BandLayout, ...]) -> str | None:
    """Why the attention kernels cannot read these bands; None where they can."""
    if len(bands) > MOST_BANDS:
        return f"{len(bands)} bands, at most {MOST_BANDS} are read"
    for band in bands:
        if band.width % GROUP:
            return f"a band of {band.width} dimensions, which is no multiple of {GROUP}"
        if not isinstance(band.table, TrellisTable) and not (isinstance(band.table, LevelTable) and band.table.grid):
            return f"{band.kind} codes of {band.bits} bits, which have no table of bytes"
    return None


def plan(bands: tuple[BandLayout, ...]) -> Plan:
    """The plan of bands; raises ValueError where `refuses` says why."""
    if reason := refuses(bands):
        raise ValueError(f"the attention kernels cannot read {reason}")
    segments: list[tuple[int, int, int, int, int, int, tuple[int, ...], int, int]] = []
    described: list[tuple[int, int, float, float, int, int]] = []
    keys: list[int] = []
    values: list[int] = []
    for index, band in enumerate(bands):
        assert band.table is not None
        kind, tables, step, offset = _table(band.table)
        first, groups, done = len(keys), band.width // GROUP, 0
        while done < groups:
            count = 1 << ((groups - done).bit_length() - 1)
            segments.append((index, groups, done, count, kind, band.bits, tables, band.codes, len(keys)))
            keys += [band.start + d for d in _key_columns(groups, done, count)]
            values += [band.start + d for d in _value_rows(groups, done, count)]
            done += count
        gain = 0 if band.gain == "half" else 1
        described.append((band.scale, gain, step * UNIT, offset / UNIT, first, len(keys)))
    return Plan(tuple(segments), tuple(described), tuple(keys), tuple(values))


def _key_columns(groups: int, first: int, count: int) -> list[int]:
    """Dimensions of columns (s, h, l, e): 2h + e of block (s, l)."""
    return [
        4 * (lane * groups + first + s) + 2 * h + e
        for s in range(count)
        for h in (0, 1)
        for lane in range(4)
        for e in (0, 1)
    ]


def _value_rows(groups: int, first: int, count: int) -> list[int]:
    """Dimensions of rows (c, d, gl): d of block (gl // 2, first + gl % 2 (count / 2) + c); see `value_tile` for 1."""
    if count == 1:
        return [4 * (lane * groups + first) + 2 * high + low for high in (0, 1) for lane in range(4) for low in (0, 1)]
    half = count // 2
    return [
        4 * (gl // 2 * groups + first + gl % 2 * half + c) + d for c in range(half) for d in range(4) for gl in range(8)
    ]


def _table(table: TrellisTable | LevelTable) -> tuple[int, tuple[int, ...], float, float]:
    """(kind, tables in words of four bytes, step, offset)."""
    if isinstance(table, TrellisTable):
        kind, rows, step, offset = 0, table.tables, table.step, table.offset
    else:
        padded = (*table.grid, *[0] * (-len(table.grid) % 8))
        kind, rows, step, offset = 1, (padded[:8], padded[8:]) if padded[8:] else (padded,), table.step, table.offset
    largest = sum(max(row) for row in rows) if kind == 0 else max(max(row) for row in rows)
    if largest > LARGEST:
        raise ValueError(f"sums of a table's bytes must be at most {LARGEST}, got {largest}")
    words = tuple(sum(row[i + n] << 8 * n for n in range(4)) for row in rows for i in (0, 4))
    return kind, words, step, offset
