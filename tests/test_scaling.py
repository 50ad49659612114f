"""`python -m benchmarks scaling`: lines through rows of known laws, what is refused, and the files that it writes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.caches import compressed
from benchmarks.million_rows import MillionRow
from benchmarks.rows import Row, empty_row
from benchmarks.scaling import Settings, family_fit, fit_all, fit_positions, run
from benchmarks.scaling_fit import fit_line, fit_trend
from benchmarks.scaling_points import Measured, Points, points
from kvcompress.fits import SHIPPED, CacheSpec, Fits, family_of, quantile, x_of

ROOT = Path(__file__).parents[1]
FITS = Fits.read(SHIPPED)
QUALITY = ROOT / Settings.quality
BITS = {1: 1.25, 2: 2.25, 3: 3.25, 4: 4.25}  # trellis with heads of 64: a 16-bit gain a vector
BASE, DOUBLING, PER_KL = 3.0, 1.3, 0.5


def rows(seeds: int = 3, rates: tuple[int, ...] = (1, 2, 3, 4), noise: float = 0.03) -> list[Row]:
    """KL = 0.05 BASE^-(bits - 1.25) DOUBLING^log2(context / 4096), perplexity ratio exp(PER_KL KL), seeded noise."""
    rng = np.random.default_rng(7)
    found = []
    for context in (1024, 4096):
        for seed in range(seeds):
            plain = Row("embedded", context, seed, "uncompressed", "reference", "uncompressed", "transformers")
            found.append(replace(plain, perplexity=60.0 + seed, kl_mean=0.0))
            for rate in rates:
                kl = 0.05 * BASE ** (1.25 - BITS[rate]) * DOUBLING ** math.log2(context / 4096)
                kl *= math.exp(rng.normal(0, noise))
                ratio = math.exp(PER_KL * kl + rng.normal(0, 1e-4))
                row = empty_row("embedded", context, seed, compressed(f"trellis{rate}"))
                measured = {"kl_mean": kl, "perplexity": (60.0 + seed) * ratio, "bits_per_element": BITS[rate]}
                found.append(replace(row, **measured))
    return found


def written(folder: Path, own: list[Row]) -> Settings:
    """The rows as a file of `quality`; no rows of `million`."""
    shared = {"benchmark": "quality", "commit": "c0ffee", "settings": {"model": None, "text": "a book"}}
    path = folder / "quality.jsonl"
    path.write_text("".join(json.dumps({**asdict(row), **shared}) + "\n" for row in own))
    return Settings(path, folder / "million.jsonl", ("embedded",))


def test_known_law_is_recovered(tmp_path: Path) -> None:
    """Noise of 3% a point over 3 bits: the base to 3% (0.03 sqrt(2) over 3 bits, 24 points); intervals hold it."""
    fitted, _, fits = fit_all(written(tmp_path, rows()))
    loss, perplexity = fitted[0].rows
    assert (loss.kind, loss.family, loss.status) == ("bits", "trellis", "ok")
    assert loss.base
    assert loss.base[0] == pytest.approx(BASE, rel=0.03)
    assert loss.base[1] < BASE < loss.base[2] < 4
    assert loss.four_inside is False
    assert loss.per_doubling
    assert loss.per_doubling[1] < DOUBLING < loss.per_doubling[2]
    assert loss.curvature
    assert loss.curvature[1] < 0 < loss.curvature[2]
    assert loss.r_squared
    assert loss.r_squared > 0.99
    assert perplexity.coefficients
    assert perplexity.coefficients["kl"][0] == pytest.approx(PER_KL, rel=0.05)
    assert perplexity.coefficients["kl"][1] < PER_KL < perplexity.coefficients["kl"][2]
    assert loss.x == (1.25, 4.25)
    assert loss.contexts == (1024, 4096)
    assert [(x, context) for x, context, _ in loss.measured] == sorted(
        (x, c) for x in BITS.values() for c in (1024, 4096)
    )
    own = [row.kl_mean for row in rows() if (row.cache, row.context) == ("trellis2", 1024)]
    assert loss.measured[2][2] == pytest.approx(np.exp(np.log(own).mean()))
    assert fits.commits == ("c0ffee",)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    """300 experiments of 3 documents with their own level and slope, and rates off the line: 95% with a sampling error
    of 1.3%; the seeds' noise is counted twice in part, so more is right and less than 93% is not."""
    rng, covered = np.random.default_rng(0), 0
    bits = np.arange(1.0, 6.0)
    design = np.stack([np.stack([np.ones(5), bits], 1)] * 3)
    for _ in range(300):
        level, slope = rng.normal(0, 0.2, (3, 1)), -1.2 + rng.normal(0, 0.05, (3, 1))
        response = level + slope * bits + rng.normal(0, 0.05, 5) + rng.normal(0, 0.05, (3, 5))
        covered += fit_line(("constant", "bits"), design, response).coefficient("bits").holds(-1.2)
    assert covered / 300 >= 0.93


def test_students_quantiles() -> None:
    """Against the printed tables, to their three digits."""
    for freedom, value in ((1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (30, 2.042)):
        assert quantile(freedom) == pytest.approx(value, abs=1e-3)


def family(own: list[Row], seeds: int = 3) -> Points:
    base = {(context, seed): 60.0 + seed for context in (1024, 4096) for seed in range(seeds)}
    return points([row for row in own if row.spec is not None], base, FITS.shape)


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="2 values of bits in every seed: 3 or more"):
        family(rows(rates=(2, 3)))
    with pytest.raises(ValueError, match="1 seed: 2 or more"):
        family_fit("trellis", family(rows(seeds=1), seeds=1))
    with pytest.raises(ValueError, match="3 points for 3 coefficients: 4 or more"):
        family_fit("trellis", family(few()))
    with pytest.raises(ValueError, match="no logarithm"):
        family([replace(row, kl_mean=0.0) for row in rows()])
    with pytest.raises(ValueError, match="different sinks, windows"):
        family([*rows(), replace(rows()[1], cache="other", spec=compressed("trellis1,window=16").content)])
    mixed = [replace(row, spec=compressed("trellis:k4v2").content) for row in rows() if row.spec is not None]
    with pytest.raises(ValueError, match="one number does not say"):
        family(mixed)


def few() -> list[Row]:
    """Three rates, of which one at the shorter context: no more points than coefficients."""
    return [row for row in rows(rates=(1, 2, 3)) if row.context == (1024 if row.cache == "trellis1" else 4096)]


def test_a_rate_that_a_seed_lacks_is_left_out() -> None:
    assert family([row for row in rows() if (row.cache, row.seed) != ("trellis4", 1)]).x.max() == 3.25


def test_families_without_a_line_have_rows_that_say_why(tmp_path: Path) -> None:
    lonely = replace(rows()[1], cache="fp8", spec=compressed("fp8").content)
    fitted, _, fits = fit_all(written(tmp_path, [*rows(), lonely]))
    (refused,) = fitted[1].rows
    assert (refused.family, refused.status) == ("fp8", "not fitted")
    assert "1 values of bits" in str(refused.reason)
    assert [each.family for each in fits.families] == ["trellis"]
    with pytest.raises(ValueError, match="no family of 'embedded'"):
        fit_all(written(tmp_path, rows(rates=(1, 2))))


def test_positions() -> None:
    """1% at the end and 0.1 more with every doubling, exactly: points on the line leave the standard errors' width."""
    increases = {str(2**i): (1 + 0.1 * (i - 20), 0.05) for i in range(12, 21)}
    row = MillionRow("spectral3", compressed("spectral3").content, 2**20, 0, increase_by_bucket=increases)
    found, trend = fit_positions(row, "million")
    assert trend is not None
    assert trend.at_end.mean == pytest.approx(1)
    assert trend.doubling.mean == pytest.approx(0.1)
    assert trend.doubling.low < 0.1 < trend.doubling.high
    assert (trend.spec, trend.positions, found.points) == ("spectral3", (4096, 2**20), 9)
    refused, none = fit_positions(replace(row, increase_by_bucket={"4096": (0.0, 0.0)}), "million")
    assert (refused.status, none) == ("not fitted", None)
    with pytest.raises(ValueError, match="3 or more"):
        fit_trend(np.zeros(2), np.zeros(2), np.ones(2))


def test_run_writes_everything(tmp_path: Path) -> None:
    settings = written(tmp_path, rows())
    made = run(settings, tmp_path / "out", Console(quiet=True))
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(line["benchmark"], line["kind"]) for line in lines] == [("scaling", "bits"), ("scaling", "perplexity")]
    assert "commit" in lines[0]
    assert lines[0]["specs"][0]["key"]["name"] == "trellis"
    assert "| trellis | bits | 1.25 to 4.25 | 1,024 4,096 | 2.99 (" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    assert Fits.read(tmp_path / "out" / "fits.json") == made


def test_command_says_what_is_missing(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["scaling", "--quality", str(tmp_path / "none.jsonl"), "--output", str(tmp_path)])
    assert done.exit_code == 2
    assert "Error:" in done.output


def test_shipped_coefficients_are_those_of_the_committed_results() -> None:
    """To the digits that another machine's linear algebra keeps."""
    settings = replace(Settings(), quality=QUALITY, million=ROOT / Settings.million)
    made, shipped = fit_all(settings)[2], Fits.read(SHIPPED)
    assert replace(made, families=(), trends=()) == replace(shipped, families=(), trends=())
    assert [t.spec for t in made.trends] == [t.spec for t in shipped.trends]
    for one, other in zip(made.families, shipped.families, strict=True):
        assert one.specs == other.specs
        assert one.loss.coefficients == pytest.approx(other.loss.coefficients, rel=1e-6)
        assert one.perplexity.coefficients == pytest.approx(other.perplexity.coefficients, rel=1e-6)


def test_bits_are_the_measured_ones_without_what_is_learned_once() -> None:
    """trellis learns a mean only: 64 numbers of 32 bits on 3968 tokens of 64 are below 0.02; never below the codes."""
    measured = Measured.read(QUALITY)
    shape = measured.shape()
    own = [row for row in measured.rows if (row.subject, row.context) == ("embedded", 4096)]
    for row in own:
        if row.cache in ("trellis2", "trellis4", "turboquant3", "lloyd3"):
            codes = x_of(CacheSpec.parse(row.cache), "bits", shape)
            assert 0 <= (row.bits_per_element or 0) - codes < 0.02


@pytest.mark.parametrize(
    ("spec", "family"),
    [
        ("trellis3", ("trellis", "bits")),
        ("balanced", ("prerope+spectral", "bits")),
        ("prerope+spectral2.5", ("prerope+spectral", "bits")),
        ("lowrank32", ("lowrank", "rank")),
        ("lowrank48+trellis4", ("lowrank48+trellis", "bits")),
        ("fp8", ("fp8", "bits")),
        ("trellis:k4v2", None),
        ("trellis3,layer0=exact", None),
        ("trellis4/trellis2", None),
    ],
)
def test_families(spec: str, family: tuple[str, str] | None) -> None:
    assert family_of(CacheSpec.parse(spec)) == family
