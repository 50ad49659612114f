"""How bands become the tiles of the attention kernels: no dimension is lost, and what cannot be read is refused.

That tiles hold what the plan says they do is shown in tests/test_kernels_pages.py.
"""

from __future__ import annotations

import pytest
from kvcompress.kernels.layout import BandLayout, Kind, LevelTable, TrellisTable
from kvcompress.kernels.segments import BY_CHANNEL, BY_TOKEN, MOST_BANDS, Plan, plan, refuses

from kvcompress import packing

A, B, C = (0, 1, 2, 3, 4, 5, 6, 7), (0, 10, 20, 30, 40, 50, 60, 70), (0, 7, 14, 21, 28, 35, 42, 49)
TRELLIS = TrellisTable((A, B, C), 60.0, 0.05)
WIDTHS = [*range(16, 257, 16)]


def levels(count: int, grid: tuple[int, ...] | None = None) -> LevelTable:
    grid = tuple(range(count)) if grid is None else grid
    return LevelTable(tuple(map(float, range(count))), tuple(n + 0.5 for n in range(count - 1)), grid, 0.5, 3.0)


def band(start: int, width: int, kind: Kind = "trellis", bits: int = 3, **at: int) -> BandLayout:
    tables = {"trellis": TRELLIS, "lloyd": levels(2**bits)}
    return BandLayout(start, width, kind, bits, table=tables.get(kind), **at)


def blocks_of(width: int) -> dict[tuple[int, int], list[int]]:
    """The dimensions of every block (s, l), as kvcompress/packing.py lays them out."""
    groups = width // 4 // packing.lanes(width)
    return {
        (s, lane): list(range(4 * (lane * groups + s), 4 * (lane * groups + s) + 4))
        for s in range(groups)
        for lane in range(packing.lanes(width))
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_every_dimension_once(width: int) -> None:
    made = plan((band(0, width),), 0)
    assert sorted(made.keys) == sorted(made.values) == list(range(width))
    assert made.rank == width


@pytest.mark.parametrize("width", WIDTHS)
def test_segments_are_powers_of_two_and_cover_a_band(width: int) -> None:
    made = plan((band(0, width, codes=32),), 0)
    groups, done = width // 16, 0
    for of, all_groups, first, count, kind, bits, tables, codes, at, apart in made.segments:
        assert (of, all_groups, first, kind, bits, codes, apart) == (0, groups, done, 0, 3, 32, groups)
        assert count & (count - 1) == 0
        assert at == 16 * done
        assert len(tables) == 6  # three tables of two words
        done += count
    assert done == groups
    assert len(made.segments) == groups.bit_count()  # no more than it takes


@pytest.mark.parametrize("width", WIDTHS)
def test_columns_of_keys(width: int) -> None:
    """(s, h, l, e): two neighbours of each of four lanes' blocks, then the other two."""
    made, blocks = plan((band(0, width),), 0), blocks_of(width)
    column = 0
    for _, _, first, count, *_ in made.segments:
        for s in range(first, first + count):
            for h in (0, 1):
                for lane in range(4):
                    assert list(made.keys[column : column + 2]) == blocks[s, lane][2 * h : 2 * h + 2]
                    column += 2
    assert column == width


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_values(width: int) -> None:
    """Row gl of eight belongs to lane gl // 2; a lane's rows are whole blocks of its own."""
    made, blocks = plan((band(0, width),), 1), blocks_of(width)
    for _, _, first, count, *_, at, _ in made.segments:
        rows = made.values[at : at + 16 * count]
        if count == 1:  # (d high, gl, d low) with gl the lane
            for lane in range(4):
                own = [rows[2 * lane], rows[2 * lane + 1], rows[8 + 2 * lane], rows[9 + 2 * lane]]
                assert own == blocks[first, lane]
            continue
        for c in range(count // 2):  # (c, d, gl)
            for gl in range(8):
                own = [rows[32 * c + 8 * d + gl] for d in range(4)]
                assert own == blocks[first + gl % 2 * (count // 2) + c, gl // 2]


@pytest.mark.parametrize("width", WIDTHS)
def test_affine_values_have_a_band_for_every_group(width: int) -> None:
    """Of 32 dimensions, the last one of what is left: two blocks of a lane, or one, beside those of the next lane."""
    made = plan((BandLayout(64, width, "affine_token", 3, codes=32, scale=16, zero=48),), 1)
    groups, unit = -(-width // 32), 2.0**24
    assert len(made.segments) == len(made.bands) == groups
    for group, (segment, own) in enumerate(zip(made.segments, made.bands, strict=True)):
        end = min(32 * group + 32, width)
        assert own == (16, BY_TOKEN, unit, 0.0, 32 * group, end, 48, groups, group)
        count = (end - 32 * group) // 16
        assert segment == (group, width // 16, 8 * group, count, 2, 3, (), 32, 32 * group, count)
        for order in (made.keys, made.values):
            assert sorted(order[32 * group : end]) == list(range(64 + 32 * group, 64 + end))


def test_affine_keys_are_one_band() -> None:
    made = plan((BandLayout(0, 48, "affine_channel", 2, codes=32, scale=16, zero=48),), 0)
    assert made.bands == ((16, BY_CHANNEL, 2.0**24, 0.0, 0, 48, 48, 1, 0),)
    assert [segment[:7] for segment in made.segments] == [(0, 3, 0, 2, 2, 2, ()), (0, 3, 2, 1, 2, 2, ())]


def test_bands_one_after_another() -> None:
    """Those that are dropped between them are left out; columns count on, dimensions are those of all bands."""
    bands = (
        band(0, 48, bits=4, codes=64, scale=16),
        BandLayout(64, 16, "lloyd", 2, "log", codes=1024, scale=48, table=levels(4)),
    )
    made = plan(bands, 0)
    assert sorted(made.keys) == sorted(made.values) == [*range(48), *range(64, 80)]
    assert [(s[0], s[3], s[7], s[8]) for s in made.segments] == [(0, 2, 64, 0), (0, 1, 64, 32), (1, 1, 1024, 48)]
    unit = 2.0**24  # of the subnormal numbers that codes become
    gains = 16, 0, 0.05 * unit, 60.0 / unit, 0, 48, 0, 1, 0
    assert made.bands == (gains, (48, 1, 0.5 * unit, 3.0 / unit, 48, 64, 0, 1, 0))


def test_tables_are_words_of_four_bytes() -> None:
    (segment,) = plan((band(0, 16),), 0).segments
    assert segment[6] == tuple(int.from_bytes(bytes(table[i : i + 4]), "little") for table in (A, B, C) for i in (0, 4))
    for bits, words in ((1, 2), (2, 2), (3, 2), (4, 4)):
        (segment,) = plan((band(0, 16, "lloyd", bits),), 0).segments
        assert (segment[4], segment[5], len(segment[6])) == (1, bits, words)
        padded = bytes(range(2**bits)) + bytes(max(8 - 2**bits, 0))
        assert b"".join(word.to_bytes(4, "little") for word in segment[6]) == padded


REFUSED = [
    ((band(0, 24),), "a band of 24 dimensions, which is no multiple of 16"),
    ((band(0, 32, "affine_token"),), "affine_token codes of keys, which are read by channel only"),
    (
        (BandLayout(0, 16, "lloyd", 6, table=levels(64, ())),),
        "lloyd codes of 6 bits, which have no table of bytes",
    ),
    (tuple(band(16 * i, 16) for i in range(MOST_BANDS + 1)), "9 bands, at most 8 are read"),
]


@pytest.mark.parametrize(("bands", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_refused(bands: tuple[BandLayout, ...], reason: str) -> None:
    assert refuses(bands, 0) == reason
    with pytest.raises(ValueError, match=f"the attention kernels cannot read {reason}"):
        plan(bands, 0)


def test_affine_codes_are_of_one_side() -> None:
    own = (band(0, 32, "affine_channel", 2),)
    assert refuses(own, 0) is None
    assert refuses(own, 1) == "affine_channel codes of values, which are read by token only"
    assert refuses((band(0, 32, "affine_token", 2),), 1) is None


def test_what_is_taken() -> None:
    assert refuses(tuple(band(16 * i, 16) for i in range(MOST_BANDS)), 0) is None
    assert refuses((band(0, 32, "lloyd", 4), band(32, 16, bits=1)), 0) is None
    assert isinstance(plan((band(0, 256),), 0), Plan)


@pytest.mark.parametrize(
    "table",
    [TrellisTable((A, B, tuple(n + 2 for n in C)), 60.0, 0.05), levels(4, (0, 1, 2, 128))],
    ids=["trellis", "lloyd"],
)
def test_sums_must_leave_the_sign_alone(table: TrellisTable | LevelTable) -> None:
    """7 + 70 + 51 are 128, whose highest bit a byte permute would take for a sign."""
    kind: Kind = "trellis" if isinstance(table, TrellisTable) else "lloyd"
    with pytest.raises(ValueError, match="must be at most 127, got 128"):
        plan((BandLayout(0, 16, kind, 2 if kind == "lloyd" else 3, table=table),), 0)


@pytest.mark.parametrize("grid", [tuple(range(32)), (*range(110, 126), *range(129, 145)), tuple(range(255, 223, -1))])
def test_five_bits_must_be_mirrored(grid: tuple[int, ...]) -> None:
    """The table holds the lower half, which an exclusive or makes the upper one."""
    with pytest.raises(ValueError, match="must add up to 255 from both ends"):
        plan((BandLayout(0, 16, "lloyd", 5, table=levels(32, grid)),), 0)


def test_shipped_tables_fit() -> None:
    """Those of every codec that the kernels are to read, trellis of 1 to 4 bits and levels on grids of 1 to 5."""
    from kvcompress import bandlayout  # its tables

    kinds: list[tuple[Kind, int]] = [("lloyd", 5), *((kind, n) for n in range(1, 5) for kind in ("trellis", "lloyd"))]
    for kind, bits in kinds:
        table = bandlayout._trellis(bits) if kind == "trellis" else bandlayout._levels(bits)
        made = plan((BandLayout(0, 16, kind, bits, table=table),), 0)
        assert made.bands[0][2:4] == (table.step * 2**24, table.offset / 2**24)
