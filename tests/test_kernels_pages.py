"""Attention on codes (kernels/absorb.py, pages.py, unpack.py, kvcompress/fused.py) against the torch reference.

Run without TRITON_INTERPRET, this file runs itself under the interpreter in a process of its own, as
tests/test_kernels_dense.py does.

The bound on errors is in tests/coded_histories.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

import triton
import triton.language as tl
from coded_histories import (
    SINKS,
    WINDOW,
    Chunk,
    check,
    codecs,
    empty,
    expected,
    filled,
    grow,
    padding,
    poison,
    random,
    vectors,
)
from kvcompress.kernels.absorb import tile_rows
from kvcompress.kernels.device import CHIPS
from kvcompress.kernels.layout import PAGE, BandLayout, Kind
from kvcompress.kernels.segments import plan
from kvcompress.kernels.unpack import entry

from kvcompress import backends, bandlayout, packing, reference
from kvcompress.codecs import SIDES, Codec, Coded, within
from kvcompress.codecs.trellis import additive_sums, windows
from kvcompress.fused import Triton
from kvcompress.kernels import pages as kernel
from kvcompress.kernels import tiles
from kvcompress.reference import Mask, Scores
from kvcompress.store import SLOT_OF

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

SPECS = [
    *(f"trellis{bits}" for bits in (1, 2, 3, 4)),
    *(f"lloyd{bits}" for bits in (1, 2, 3, 4, 5)),
    *(f"spectral{bits}" for bits in (1.5, 2, 2.5, 3, 3.5, 4)),
    *(f"kivi{bits}" for bits in (2, 3, 4, 8)),
    "lowrank32+trellis4",
    "lowrank48+lloyd2",
    "key=trellis2,value=spectral2.5",
    "key=kivi3,value=spectral2",
]


@triton.jit
def tiles_kernel(
    Base: tl.tensor, Keys: tl.tensor, Values: tl.tensor, head: tl.tensor, R: tl.constexpr, SEGMENTS: tl.constexpr,
    PART: tl.constexpr,
) -> None:  # fmt: skip
    """One segment's tiles, into Keys [64, R] and Values [R, 64]."""
    base = tl.load(Base)
    n, r = tl.arange(0, 64), entry(SEGMENTS, PART, 8) + tl.arange(0, 16 * entry(SEGMENTS, PART, 3))
    key = tiles.key_numbers(base, head, SEGMENTS, PART, False)
    value = tiles.value_numbers(base, head, SEGMENTS, PART, False)
    tl.store(Keys + n[:, None] * R + r[None, :], key.to(tl.float32))
    tl.store(Values + r[:, None] * 64 + n[None, :], value.to(tl.float32))


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize(
        ("kind", "bits"),
        [
            *(("trellis", n) for n in (1, 2, 3, 4)),
            *(("lloyd", n) for n in (1, 2, 3, 4, 5)),
            *((kind, n) for kind in ("affine_channel", "affine_token") for n in (2, 3, 4, 8)),
        ],
    )
    # one segment of one group; segments of four, two and one, of affine values by groups three of two and one of one
    @pytest.mark.parametrize("width", [16, 112])
    def test_tiles(self, kind: Kind, bits: int, width: int) -> None:
        """Both tiles hold what the codes stand for, in the plan's order: sums of bytes, in units of 2^-24, exactly."""
        codes = torch.randint(2**bits, (2, PAGE, width), generator=torch.Generator().manual_seed(bits))
        if kind == "trellis":
            own = bandlayout._trellis(bits)
            sums = additive_sums(torch.tensor(own.tables), bits)[windows(codes, bits).long()]
            band = BandLayout(0, width, kind, bits, codes=32, table=own)
        elif kind == "lloyd":
            levels = bandlayout._levels(bits)
            sums = torch.tensor(levels.grid)[codes]
            band = BandLayout(0, width, kind, bits, codes=32, table=levels)
        else:
            sums, band = codes, BandLayout(0, width, kind, bits, codes=32)
        made = plan((band,), int(kind == "affine_token"))
        record = torch.cat([torch.full((32,), 255, dtype=torch.uint8), packing.pack(codes, bits).flatten()])
        address = torch.tensor([record.data_ptr()])
        keys, values = torch.full((64, width), -1.0), torch.full((width, 64), -1.0)
        for part in range(len(made.segments)):
            tiles_kernel[(1,)](address, keys, values, 1, R=width, SEGMENTS=made.segments, PART=part)
        order = torch.arange(64) % 8 * 8 + torch.arange(64) // 8  # row 8 i + g of keys is token 8 g + i
        slots = torch.tensor([SLOT_OF[token] for token in order.tolist()])  # column n of values: the same token's slot
        assert torch.equal(keys * 2**24, sums[1][order][:, list(made.keys)].float())
        assert torch.equal(values * 2**24, sums[1][slots][:, list(made.values)].mT.float())

    @pytest.mark.parametrize("spec", SPECS)
    def test_codecs(self, spec: str) -> None:
        history = filled(spec, 80)
        assert history.coded == [64]
        check(history, Chunk.of(history))

    @pytest.mark.parametrize(
        ("D", "G", "Q", "spec"),
        [
            (64, 16, 1, "trellis3"),
            (64, 1, 16, "lloyd3"),
            (80, 3, 1, "trellis4"),
            (96, 7, 2, "trellis2"),
            (96, 5, 13, "lloyd4"),  # 65 rows: a second tile for one of them
            (48, 3, 1, "kivi4"),  # groups of 32 and 16 dimensions
            (96, 1, 5, "kivi3"),
            (128, 20, 1, "kivi2"),
            (256, 2, 1, "kivi8"),
            (128, 4, 1, "spectral3"),
            (192, 1, 5, "trellis3"),
            (256, 2, 1, "trellis3"),
        ],
    )
    def test_geometries(self, D: int, G: int, Q: int, spec: str) -> None:
        history = filled(spec, 80, D)
        check(history, Chunk.of(history, G, Q))

    def test_heads_of_their_own(self) -> None:
        """Two rows of two heads, each with its own means, bases and scales; heads' values differ 30 times."""
        history = filled("lowrank32+lloyd3", 80, H=2, B=2)
        assert history.fit_of == [0, 1]
        check(history, Chunk.of(history))

    def test_prefill(self) -> None:
        """More query tokens than are attended as in decoding: four tiles of rows, and the chunk by its own kernel."""
        history = filled("trellis3", 80)
        check(history, Chunk.of(history, G=8, Q=30))

    @pytest.mark.parametrize("tokens", [1, 63, 111])
    def test_lengths(self, tokens: int) -> None:
        """Histories of so many tokens, and ones of which so many are coded, the last page cut short."""
        history = filled("lloyd3", tokens)
        check(history, Chunk.of(history))
        for spec in ("trellis2", "kivi3"):
            history = empty(spec, window=0)
            grow(history, 1, 1, 64 * 2 + SINKS, 64)
            history.crop(128 - tokens)
            assert history.coded == [tokens]
            good = expected(history, chunk := Chunk.of(history), Mask(None, True), Scores(0.125))
            poison(history)
            check(history, chunk, before=good)

    def test_many_pages(self) -> None:
        history = filled("trellis3", 500)
        assert history.coded == [448]
        check(history, Chunk.of(history))

    @pytest.mark.parametrize("spec", ["trellis3", "spectral3", "kivi2"])
    def test_pages_cut_short_in_the_middle(self, spec: str) -> None:
        """Three pages, cropped into the second and grown again: what lies beyond its 21 tokens is never seen, nor is
        the third one's record, nor what the table of addresses holds beyond its end.
        """
        history = filled(spec, 64 * 3 + SINKS + WINDOW)
        history.crop(64 + 43 + WINDOW)
        assert history.coded == [64 + 21]
        grow(history, 1, 1, 64 + WINDOW, 64, seed=20)
        history.crop(10)
        assert history.table.fill.tolist() == [[64, 21, 62]]
        chunk = Chunk.of(history, Q=3)
        good = expected(history, chunk, Mask(None, True), Scores(0.125))
        poison(history)
        check(history, chunk, before=good)

    def test_free_pages(self) -> None:
        """A crop leaves pages that no row has."""
        history = filled("lloyd4", 64 * 2 + SINKS + WINDOW)
        history.crop(64 + WINDOW)
        good = expected(history, chunk := Chunk.of(history), Mask(None, True), Scores(0.125))
        poison(history)
        assert history.pool.slabs[0][1].eq(255).all()
        check(history, chunk, before=good)

    def test_pages_out_of_order(self) -> None:
        """Rows repeated and swapped share pages, which are then cut short; new ones take the places of free ones."""
        history = filled("trellis3", 64 * 2 + SINKS + WINDOW, B=2)
        history.select(torch.tensor([1, 0, 1]))
        history.addresses()
        history.crop(WINDOW + 64 + 10)
        grow(history, 3, 1, 100, 64, seed=30)
        history.select(torch.tensor([2, 1, 0]))
        assert history.table.ids.tolist() == [[2, 4], [0, 3], [2, 1]]
        assert history.table.fill.tolist() == [[54, 64]] * 3
        chunk = Chunk.of(history)
        good = expected(history, chunk, Mask(None, True), Scores(0.125))
        poison(history)
        check(history, chunk, before=good)

    def test_rows_alike_share_pages(self) -> None:
        history = filled("lloyd3", 80)
        history.select(torch.tensor([0, 0, 0]))
        assert len(set(history.addresses().addresses[:, 0].tolist())) == 1
        check(history, Chunk.of(history))

    @pytest.mark.parametrize("spec", ["trellis3", "spectral3"])
    def test_left_padding(self, spec: str) -> None:
        """Rows of two pages, one and none, in columns of their own."""
        pads = (0, 60, 130)
        history = filled(spec, 150, B=3, pads=pads)
        assert history.coded == [128, 64, 0]
        check(history, Chunk.of(history), padding(pads, 151))

    def test_a_mask_with_holes(self) -> None:
        """Any token may be hidden: coded ones, sinks, recent ones."""
        history = filled("lloyd4", 90, B=2, pads=(0, 7))
        mask = padding((0, 7), 92) & (random(2, 92, seed=40) < 0.8)
        mask[:, -2:] = True
        mask[0, SINKS : SINKS + 64] = False  # all that is coded
        check(history, Chunk.of(history, Q=2), mask)

    @pytest.mark.parametrize("spec", ["trellis3", "spectral3", "kivi4"])
    def test_softcap_and_sinks(self, spec: str) -> None:
        """Scores reach far beyond the cap; one sink takes most of its head's weight, one is none."""
        history = filled(spec, 80)
        sinks = torch.tensor([3.0, -1.0, -torch.inf, 0.5])
        check(history, Chunk.of(history, G=4, Q=2), softcap=2.0, sinks=sinks)
        check(history, Chunk.of(history, G=4, Q=1), softcap=50.0)

    def test_sinks(self) -> None:
        history = filled("trellis4", 80)
        check(history, Chunk.of(history), sinks=torch.tensor([2.0, 0.0]))

    @pytest.mark.parametrize("spec", ["trellis3", "lowrank32+lloyd3"])
    def test_splits(self, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A program for every page of the longest row; of the other row, all but one have nothing to do."""
        monkeypatch.setattr(kernel, "FEWEST", 1)
        pads = (0, 128)
        history = filled(spec, 64 * 3 + SINKS + WINDOW, B=2, pads=pads)
        assert (history.coded, kernel.split_count(2, 3, 4)) == ([192, 64], 3)
        check(history, Chunk.of(history), padding(pads, 205))

    @pytest.mark.parametrize("spec", ["trellis3", "spectral3", "kivi4"])
    def test_half_precision(self, spec: str) -> None:
        history = empty(spec)
        key, value = vectors(1, 1, 80, 64, 1)
        history.append(key.half(), value.half(), [80], random(1, 2, 80, 64).half())
        history.code()
        check(history, Chunk.of(history, Q=2, dtype=torch.float16))

    def test_values_of_very_different_size(self) -> None:
        """Gains are divided by the first page's largest, weights lifted where scales are small: the second page's are
        1000 times those, or a 1000th.
        """
        for spec, factor in product(("lloyd3", "kivi2"), (1e3, 1e-3)):
            history = empty(spec)
            key, value = vectors(1, 1, 140, 64, 1)
            value[:, :, SINKS + 64 :] *= factor
            history.append(key, value * 1e-2, [140])
            history.code()
            assert history.coded == [128]
            check(history, Chunk.of(history))

    def test_what_cannot_be_read_is_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The reference steps in, exactly."""
        monkeypatch.setenv(backends.VARIABLE, "triton")
        reasons = {
            "turboquant3": "codes of ",
            "lloyd6": "lloyd codes of 6 bits, which have no table of bytes",
            "prerope+kivi2": "affine codes where keys are rebuilt and turned",
            "key=spectral2,value=kivi2": "affine codes where keys are rebuilt and turned",
            "key=trellis3,value=nf4": "codes of ",
            "trellis3/trellis4": "Heads codes heads together",
        }
        for spec, reason in reasons.items():
            counts: Counter[str] = Counter()
            history = filled(spec, 80, H=2)
            chunk, asked = Chunk.of(history), (Mask(None, True), Scores(0.125))
            out = backends.attend(chunk.query, history, chunk.key, chunk.value, *asked, counts)
            assert torch.equal(out, reference.attend(chunk.query, history, chunk.key, chunk.value, *asked))
            ((name, count),) = counts.items()
            assert name.startswith(f"refused: {reason}"), name
            assert count == 1

    @pytest.mark.parametrize(
        ("spec", "side", "rows"), [("lloyd4", 1, 2), ("kivi2", 0, 2), ("kivi2", 1, 2), ("lowrank16+trellis3", 0, 1)]
    )
    def test_encode(self, spec: str, side: int, rows: int) -> None:
        """Rows of a fit each: the codec's own codes but where another order of sums meets ties.

        Trellis codes take the interpreter 8 s for 64 dimensions; tests/test_kernels_encode.py has more of them.
        """
        codec = codecs(spec, 64, 1)[side]
        fit = codec.fit(vectors(rows, 1, 300, 64, 3)[side])
        x = vectors(rows, 1, PAGE, 64, 8)[side]
        coded = Triton().encode(codec, side, x, fit)
        assert isinstance(coded, dict)
        same_codes(codec, coded, codec.encode(x, fit))

    def test_encode_refuses(self) -> None:
        codec = codecs("nf4", 64, 1)[1]
        x = random(1, 1, PAGE, 64)
        assert str(Triton().encode(codec, 1, x, codec.fit(x))).startswith("codes of ")

    def test_a_history_of_its_own_codes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Coded by the backend and read by it, in a frame that turns."""
        monkeypatch.setenv(backends.VARIABLE, "triton")
        spec = "key=spectral2,value=lloyd3"
        history, other = empty(spec, 32, encode=partial(backends.encode, Counter())), empty(spec, 32)
        for own in (history, other):
            grow(own, 1, 1, 80, 32)
        for side, codec in enumerate(history.codecs):
            parts = [within(own.pool.read(torch.tensor([0])), f"{SIDES[side]}.") for own in (history, other)]
            same_codes(codec, *parts)
        check(history, Chunk.of(history))


def same_codes(codec: Codec, found: Coded, wanted: Coded) -> None:
    """Of 50 vectors at most one has a sum so near to a border that another order of its terms crosses it; where codes
    are alike, gains are next to each other, of LOG nearly all the same.
    """
    assert found.keys() == wanted.keys()
    for index, band in enumerate(codec.bands):
        if band.quantiser is None:
            continue
        own, good = within(found, f"{index}."), within(wanted, f"{index}.")
        assert {name: (x.shape, x.dtype) for name, x in own.items()} == {n: (x.shape, x.dtype) for n, x in good.items()}
        bits = band.quantiser.bits  # type: ignore[attr-defined]  # of all kinds that kernels know
        codes = [packing.unpack(coded["codes"], bits, PAGE, band.width) for coded in (own, good)]
        alike = (codes[0] == codes[1]).all(dim=-1)
        assert float(alike.float().mean()) >= 0.98
        values = [band.quantiser.decode(coded, band.width)[alike] for coded in (own, good)]
        log = own.get("gain", codes[0]).dtype == torch.uint8 and "gain" in own
        apart = 2 ** (1 / 16) - 1 if log else 2**-10
        assert bool(((values[0] - values[1]).abs() <= values[1].abs() * (apart + 1e-6)).all())
        if log:
            assert float((own["gain"] != good["gain"])[alike].float().mean()) < 0.02


@pytest.mark.parametrize(("rows", "tile"), [(1, 8), (8, 8), (9, 16), (24, 32), (40, 64), (1000, 64)])
def test_rows_of_tiles(rows: int, tile: int) -> None:
    """AMD's matrix instructions take 16 columns."""
    assert [tile_rows(rows, CHIPS[chip]) for chip in ("sm_90", "gfx942")] == [tile, max(tile, 16)]


def interpreted(selection: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, f"{Path(__file__)}::TestInterpreted"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


QUICK = "test_codecs and (trellis3 or lloyd4 or kivi3)"


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_some_codecs_under_the_interpreter() -> None:
    interpreted(QUICK)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_others_under_the_interpreter() -> None:
    interpreted(f"not ({QUICK})")
