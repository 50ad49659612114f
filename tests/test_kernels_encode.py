"""The encode kernels against the torch codecs, interpreted; and what they compile to, without the interpreter.

A function that Triton interprets cannot be compiled, so what is interpreted runs in a process of its own: this file
again, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources

import pytest
import torch
from kvcompress.kernels.encode_side import encode_side, parts
from kvcompress.kernels.layout import PAGE, BandLayout, GainKind, Kind, LevelTable, TrellisTable
from torch import Tensor

from kvcompress import packing
from kvcompress.codecs import Coded, Quantiser, kivi, lloyd, trellis
from kvcompress.codecs.scale import HALF, LOG
from kvcompress.kernels import encode_trellis

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, with TRITON_INTERPRET=1")

FILL = 0xAB  # of bytes that no part covers
GAINS = {"half": HALF, "log": LOG}


def table(kind: Kind, bits: int) -> TrellisTable | LevelTable | None:
    if kind == "trellis":
        content = resources.files("kvcompress.codecs").joinpath("trellis_tables.json").read_text()
        own = json.loads(content)[str(bits)]
        return TrellisTable(tuple(map(tuple, own["tables"])), own["offset"], own["step"])
    if kind == "lloyd":
        levels, borders = lloyd.codebook(bits, torch.device("cpu"))
        return LevelTable(tuple(levels.tolist()), tuple(borders.tolist()))
    return None


def quantiser(band: BandLayout) -> Quantiser:
    if band.kind == "trellis":
        return trellis.Trellis(band.bits, GAINS[band.gain])
    if band.kind == "lloyd":
        return lloyd.LloydMax(band.bits, GAINS[band.gain])
    return (kivi.PerToken if band.kind == "affine_token" else kivi.PerChannel)(band.bits)


def lay_out(heads: int, *bands: tuple[Kind, int, int, GainKind]) -> tuple[BandLayout, ...]:
    """Bands of (kind, width, bits, gain) one after another, their parts too, 16 bytes of nothing between them."""
    made: list[BandLayout] = []
    start, end = 0, 16
    for kind, width, bits, gain in bands:
        places = {}
        sizes = parts(BandLayout(start, width, kind, bits, gain, table=table(kind, bits)), heads)
        for name, (_, size) in sizes.items():
            places[name] = end
            end += -(-size // 16) * 16 + 16
        made.append(BandLayout(start, width, kind, bits, gain, table=table(kind, bits), **places))
        start += width
    return tuple(made)


def record_bytes(bands: tuple[BandLayout, ...], heads: int) -> int:
    return max(offset + size for band in bands for offset, size in parts(band, heads).values()) // 16 * 16 + 32


def encoded(x: Tensor, mean: Tensor | None, analysis: Tensor | None, bands: tuple[BandLayout, ...]) -> Tensor:
    """Records, every other row of a slab, whose other bytes must be left alone."""
    slab = torch.full((2 * len(x), record_bytes(bands, x.shape[1])), FILL, dtype=torch.uint8)
    encode_side(x, mean, analysis, slab[::2], bands)
    assert bool((slab[1::2] == FILL).all())
    return slab[::2]


def expected(x: Tensor, mean: Tensor | None, analysis: Tensor | None, band: BandLayout) -> tuple[Tensor, Coded]:
    """(y, the reference's parts)."""
    y = x.float() if mean is None else x.float() - mean.unsqueeze(2)
    y = y if analysis is None else y @ analysis.mT
    y = y[..., band.start : band.start + band.width]
    return y, quantiser(band).encode(y)


def read(records: Tensor, band: BandLayout, like: Coded) -> Coded:
    """The parts that the kernel wrote, in the reference's shapes and names."""
    names = {"codes": "codes", "gain": "scale", "scale": "scale", "zero": "zero"}
    found = {}
    for name, part in like.items():
        offset = getattr(band, names[name])
        raw = records[:, offset : offset + part[0].numel() * part.element_size()].contiguous()
        found[name] = raw.view(part.dtype).view(part.shape)
    return found


def check(x: Tensor, mean: Tensor | None, analysis: Tensor | None, bands: tuple[BandLayout, ...]) -> None:
    records = encoded(x, mean, analysis, bands)
    for band in bands:
        y, want = expected(x, mean, analysis, band)
        got = read(records, band, want)
        codes = [packing.unpack(c["codes"], band.bits, PAGE, band.width) for c in (got, want)]
        differing = (codes[0] != codes[1]).any(dim=-1)
        # Sums in another order move a target by a part in 10^6: of 50 vectors at most one has one so near to a border.
        assert float(differing.float().mean()) <= 0.02, f"{band}: {int(differing.sum())} of {differing.numel()} vectors"
        errors = [(quantiser(band).decode(c, band.width) - y).square().sum() for c in (got, want)]
        assert abs(errors[0] / errors[1] - 1) < 1e-3
        if band.kind in ("trellis", "lloyd"):  # one code of float16 is a part in 1024 at most, of LOG 2^(1/16)
            same = ~differing
            decoded = [GAINS[band.gain].decode(c["gain"])[same] for c in (got, want)]
            apart = 2**-10 if band.gain == "half" else 2 ** (1 / 16) - 1
            assert bool(((decoded[0] - decoded[1]).abs() <= decoded[1].abs() * (apart + 1e-6)).all())
            # one code away is rare: only where sums in another order meet a border between codes
            assert float((got["gain"][same] != want["gain"][same]).float().mean()) < 0.02
    free = torch.ones(records.shape[1], dtype=torch.bool)
    for band in bands:
        for offset, size in parts(band, x.shape[1]).values():
            free[offset : offset + size] = False
    assert bool((records[:, free] == FILL).all())


def inputs(pages: int, heads: int, D: int, R: int, shared: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(D + R)
    rows = 1 if shared else pages
    x = torch.randn(pages, heads, PAGE, D, generator=generator) * 3 + 1
    mean = torch.randn(rows, heads, D, generator=generator)
    return x, mean, torch.randn(rows, heads, R, D, generator=generator) / D**0.5


@interpreted
@pytest.mark.parametrize(("bits", "width"), [(1, 16), (2, 16), (3, 32), (4, 16)])
def test_trellis(bits: int, width: int) -> None:
    check(*inputs(1, 1, 64, width), lay_out(1, ("trellis", width, bits, "log")))


@interpreted
def test_trellis_of_whole_vectors() -> None:
    """One page, cut out of [B, H, N, D] as the layer does, with one matrix for all."""
    x, mean, analysis = inputs(1, 1, 64, 64)
    page = torch.cat([x.flip(2), x, x.flip(2)], dim=2)[:, :, PAGE : 2 * PAGE]
    check(page, mean, analysis[0, 0], lay_out(1, ("trellis", 64, 3, "half")))


@interpreted
def test_bands_of_odd_widths_of_fewer_dimensions() -> None:
    bands = lay_out(1, ("trellis", 24, 4, "log"), ("lloyd", 16, 5, "log"), ("trellis", 8, 2, "log"))
    check(*inputs(1, 1, 80, 48), bands)


@interpreted
def test_a_program_takes_one_tile_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace for a single program, which has to code both halves of a page."""
    monkeypatch.setattr(encode_trellis, "WORKSPACE", 4 * encode_trellis.workspace_words(16, 3, 32))
    check(*inputs(1, 1, 64, 16), lay_out(1, ("trellis", 16, 3, "half")))


@interpreted
@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd(bits: int) -> None:
    check(*inputs(2, 2, 64, 64, shared=bits % 2 == 0), lay_out(2, ("lloyd", 64, bits, "log" if bits > 4 else "half")))


@interpreted
@pytest.mark.parametrize(("D", "R"), [(64, 16), (80, 80), (96, 96), (128, 96), (192, 192), (256, 208), (256, 256)])
def test_head_dims_and_ranks(D: int, R: int) -> None:
    check(*inputs(1, 1, D, R), lay_out(1, ("lloyd", R, 3, "half")))


@interpreted
@pytest.mark.parametrize("kind", ["affine_token", "affine_channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_affine(kind: Kind, bits: int) -> None:
    """Half-precision vectors as they come: no sums, hence the same bytes, ties included."""
    x = inputs(2, 2, 80, 80)[0].half()
    bands = lay_out(2, (kind, 80, bits, "half"))
    records = encoded(x, None, None, bands)
    want = expected(x, None, None, bands[0])[1]
    got = read(records, bands[0], want)
    assert all(torch.equal(got[name], part) for name, part in want.items())


@interpreted
def test_affine_of_transformed_vectors() -> None:
    bands = lay_out(1, ("affine_token", 48, 4, "half"), ("affine_channel", 16, 2, "half"))
    check(*inputs(1, 1, 96, 64), bands)


@interpreted
def test_what_is_not_a_number_spoils_its_own_scale_only() -> None:
    x = inputs(1, 1, 64, 64)[0]
    x[0, 0, 3], x[0, 0, 5, 7], x[0, 0, 9, 1], x[0, 0, 11] = 0.0, torch.nan, torch.inf, x[0, 0, 11] * 1e-3
    kinds: list[tuple[Kind, int, GainKind]] = [("trellis", 4, "log"), ("lloyd", 3, "half"), ("lloyd", 3, "log")]
    for kind, bits, gain in [*kinds, ("affine_token", 2, "half"), ("affine_channel", 2, "half")]:
        bands = lay_out(1, (kind, 16, bits, gain))
        want = expected(x, None, None, bands[0])[1]
        got = read(encoded(x, None, None, bands), bands[0], want)
        decoded = [quantiser(bands[0]).decode(c, 16) for c in (got, want)]
        torch.testing.assert_close(*decoded, equal_nan=True, rtol=2**-10, atol=0)  # one code of float16
        assert torch.equal(got["codes"], want["codes"])


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts that process")
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]


COMPILE = """
import json
from benchmarks.compiling import compile_variant
from kvcompress.kernels import encode_scalar, encode_trellis
wanted = {"trellis3/128", "trellis3/64", "trellis4/32", "trellis2/32", "lloyd3", "affine_token2", "affine_channel2"}
made = [v for m in (encode_trellis, encode_scalar) for v in m.variants() if v.codec in wanted and "sm_90" in v.archs]
assert len(made) == len(wanted)
print(json.dumps({v.codec: compile_variant(v, "sm_90").spills for v in made}))
"""


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="interpreted functions cannot be compiled")
def test_registers_suffice_on_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(json.loads(done.stdout.splitlines()[-1]).values()) == {0}


def test_the_search_is_the_codecs() -> None:
    ours = (encode_trellis.MEMORY, encode_trellis.FRACTION, encode_trellis.SEAM)
    assert ours == (trellis.MEMORY, trellis.FRACTION, trellis.SEAM)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_trellis_values_are_the_codecs(bits: int) -> None:
    device = torch.device("cpu")
    own = table("trellis", bits)
    assert isinstance(own, TrellisTable)
    assert torch.equal(encode_trellis.trellis_values(own, bits, device), trellis.shipped_table(bits, device).values)


def test_the_workspace_is_bounded() -> None:
    """A lane a token of whole vectors: 40 bytes an element, so that a multiprocessor's programs share 640 KiB."""
    assert encode_trellis.workspace_words(128, 3, 32) * 4 == 40 * 128 * 32
    largest = max(encode_trellis.workspace_words(256, bits, 64) * 4 for bits in (1, 2, 3, 4))
    assert largest * 128 <= encode_trellis.WORKSPACE  # room for many programs of the largest kind


def lloyd_band(start: int = 0, width: int = 32, bits: int = 3, codes: int = 16, scale: int = 1024) -> BandLayout:
    return BandLayout(start, width, "lloyd", bits, codes=codes, scale=scale, table=table("lloyd", 3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"width": 36}, "multiple of 8"), ({"width": 264}, "8..256"), ({"bits": 9}, "1..8"), ({"codes": 8}, "of 16")],
)
def test_layouts_that_no_kernel_writes(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lloyd_band(**changed)


def test_a_table_must_fit() -> None:
    with pytest.raises(ValueError, match="trellis needs a table of type TrellisTable"):
        BandLayout(0, 32, "trellis", 3, table=table("lloyd", 3))
    with pytest.raises(ValueError, match="4 bits need 16 levels, got 8"):
        BandLayout(0, 32, "lloyd", 4, table=table("lloyd", 3))


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    x, mean, analysis = inputs(2, 1, 64, 64)
    records = torch.zeros(2, 2048, dtype=torch.uint8)
    for bad, message in (
        ((x[:, :, :32], mean, analysis, records), r"x must be \[n, H, 64, D\]"),
        ((x, mean[:, :, :32], analysis, records), r"mean must be float32 of shape \(2, 1, 64\) or \(1, 1, 64\)"),
        ((x, mean, analysis.half(), records), "analysis must be float32"),
        ((x, mean, analysis, records[:1]), r"records must be uint8 \[2, page_bytes\]"),
        ((x, mean, analysis, records[:, 8:-8]), "16-byte aligned"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_side(*bad, (lloyd_band(),))
    with pytest.raises(ValueError, match="the band ends at dimension 72, there are 64"):
        encode_side(x, mean, analysis, records, (lloyd_band(start=40),))
    with pytest.raises(ValueError, match="scale ends at byte 2160 of a record of 2048"):
        encode_side(x, mean, analysis, records, (lloyd_band(scale=2032),))
