"""`python -m benchmarks quality`: its list of caches, comparison at equal bits, log, texts, and a whole small run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import caches, frontier, frontier_reading, frontier_tables, pareto
from benchmarks.__main__ import app
from benchmarks.caches import UNCOMPRESSED
from benchmarks.frontier import Settings
from benchmarks.log import Log
from benchmarks.pareto import AtBits, best_at, interpolated, optimal, ratio, summarise
from benchmarks.rows import Row, empty_row

PROSE = " ".join(f"The {word} went over hill number {index} and came back." for index, word in enumerate("abcdef" * 80))
BASE = empty_row("embedded", 4096, 0, UNCOMPRESSED)


def row(cache: str, bits: float, kl: float, side: str = "ours", seed: int = 0, subject: str = "embedded") -> Row:
    """A measured row; the family is the name without its digits."""
    family = cache.rstrip("0123456789.")
    named = replace(BASE, subject=subject, seed=seed, cache=cache, side=side, family=family)
    return replace(named, bits_per_element=bits, kl_mean=kl, perplexity=20.0)


#: Two families of ours and one peer, over two seeds; the second seed loses twice as much.
FIELD = [
    each
    for seed, factor in ((0, 1.0), (1, 2.0))
    for each in (
        row("spectral2", 2.0, 4e-3 * factor, seed=seed),
        row("spectral4", 4.0, 4e-5 * factor, seed=seed),
        row("lloyd2", 2.2, 1e-2 * factor, seed=seed),
        row("lloyd4", 4.2, 1e-4 * factor, seed=seed),
        row("kivi2", 3.0, 4e-3 * factor, "peer", seed),
        row("kivi4", 5.0, 4e-4 * factor, "peer", seed),
        replace(BASE, seed=seed, kl_mean=0.0, perplexity=19.0),
    )
]


def test_the_lists_name_each_cache_once_and_tell_sides_apart() -> None:
    chosen = {each.name: each for each in caches.field(None, peers=True)}
    listed = [spec for specs in (caches.OURS | caches.PEERS).values() for spec in specs.split()]
    assert len(listed) == len(set(listed))
    assert set(listed) <= chosen.keys()
    assert chosen["uncompressed"].side == caches.REFERENCE
    assert (chosen["trellis3"].side, chosen["trellis3"].family) == ("ours", "trellis")
    assert (chosen["turboquant3"].side, chosen["turboquant3"].family) == ("peer", "TurboQuant")
    assert (chosen["QuantizedCache hqq3"].side, chosen["QuantizedCache hqq3"].family) == ("peer", "QuantizedCache hqq")
    assert {each.side for each in caches.field(None, peers=False)} == {caches.REFERENCE, "ours"}


def test_an_unknown_name_of_the_lists_is_missing_but_one_of_the_user_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caches, "OURS", {"no such": "nosuch3 lloyd2"})
    absent, present = caches.field(None, peers=False)[1:]
    assert (absent.name, absent.side, absent.family, absent.lack) == ("nosuch3", "ours", "no such", "not known")
    assert absent.missing == "no codec of this name is registered"
    assert present.missing is None
    with pytest.raises(ValueError, match="nosuch3"):
        caches.field(["nosuch3"], peers=False)


@pytest.mark.parametrize(
    ("spec", "side", "family"),
    [
        ("lloyd7", "ours", "lloyd"),
        ("lloyd:k3v2", "ours", "lloyd k>v"),
        ("lloyd3,sinks=8", "ours", "lloyd,sinks=8"),
        ("fp8", "peer", "fp8"),
    ],
)
def test_a_spec_of_the_user_has_a_side_and_a_family(spec: str, side: str, family: str) -> None:
    contender = caches.field([spec], peers=False)[-1]
    assert (contender.side, contender.family) == (side, family)


def test_the_window_of_a_subject_does_not_overrule_the_spec() -> None:
    plain, own = caches.field(["lloyd3", "lloyd3,window=16"], peers=False, window=32)[1:]
    assert plain.spec is not None
    assert own.spec is not None
    assert (plain.name, plain.spec.window, own.spec.window) == ("lloyd3", 32, 16)


def test_loss_between_points_runs_straight_in_its_logarithm_and_ends_with_them() -> None:
    points = [(4.0, 1e-4), (2.0, 1e-2), (4.0, 3e-4)]
    assert interpolated(points, 3.0) == pytest.approx(1e-3)
    assert interpolated(points, 2.5) == pytest.approx(10**-2.5)
    assert (interpolated(points, 2.0), interpolated(points, 4.0)) == (1e-2, 1e-4)  # the lower one of two
    assert interpolated(points, 1.99) is None
    assert interpolated(points, 4.01) is None
    assert interpolated([(3.0, 1e-3)], 3.0) == 1e-3
    assert interpolated([(2.0, 0.0), (4.0, 1e-3)], 3.0) == pytest.approx(math.sqrt(pareto.FLOOR * 1e-3))


def test_the_best_of_a_side_is_found_at_equal_bits() -> None:
    ours, peer = best_at(FIELD, "ours", 3.0), best_at(FIELD, "peer", 3.0)
    assert ours is not None
    assert peer is not None
    assert ours.family == "spectral"
    assert ours.by_seed == pytest.approx({0: 4e-4, 1: 8e-4})
    assert (ours.spread.mean, ours.spread.deviation) == pytest.approx((6e-4, 4e-4 / math.sqrt(2)))
    assert peer.by_seed == pytest.approx({0: 4e-3, 1: 8e-3})
    found = ratio(ours, peer)
    assert found is not None
    assert (found.mean, found.lowest, found.highest) == pytest.approx((0.1, 0.1, 0.1))
    assert best_at(FIELD, "peer", 2.5) is None  # nothing is extrapolated
    assert ratio(AtBits("a", {0: 1.0}), AtBits("b", {1: 1.0})) is None


def test_the_frontier_holds_what_nothing_beats() -> None:
    assert optimal(summarise(FIELD)) == {"spectral2", "spectral4"}
    assert optimal(summarise([*FIELD, row("fp8", 8.0, 1e-6, "peer")])) == {"spectral2", "spectral4", "fp8"}
    same = [row("a2", 2.0, 1e-3), row("b2", 2.0, 1e-3), row("c2", 2.0, 2e-3)]
    assert optimal(summarise(same)) == {"a2", "b2"}


def test_a_summary_has_mean_and_deviation_over_seeds() -> None:
    first = summarise(FIELD)[0]
    assert (first.cache, first.bits) == ("uncompressed", None)
    spectral = next(each for each in summarise(FIELD) if each.cache == "spectral2")
    assert (spectral.seeds, spectral.bits) == (2, 2.0)
    spread = spectral.values["kl_mean"]
    assert (spread.mean, spread.deviation) == pytest.approx((6e-3, 4e-3 / math.sqrt(2)))


def test_the_tables_say_what_was_measured_and_what_was_not() -> None:
    absent = [replace(BASE, cache=name, status="not known", reason="no codec") for name in ("x1", "x2")]
    said = frontier_tables.document([*FIELD, *absent], ["a remark"])
    assert "## embedded, 4096 tokens, 2 seeds" in said
    assert "| **spectral2** | ours | 2.00 | 6.00e-03 ± 3e-03 |" in said
    assert "| lloyd2 | ours | 2.20 |" in said
    assert "x1, x2: not known: no codec" in said
    assert "| 3 | spectral | 6.00e-04 ± 3e-04 | kivi | 6.00e-03 ± 3e-03 | 0.1 (0.1 to 0.1) |" in said
    assert "| 2 | spectral | 6.00e-03 ± 3e-03 | - | - | - |" in said
    assert "| kivi2 | 3.00 | 6.00e-03 ± 3e-03 | spectral | 6.00e-04 ± 3e-04 | 0.1 (0.1 to 0.1) |" in said
    assert "| kivi4 | 5.00 | 6.00e-04 ± 3e-04 | - | - | - |" in said
    assert "output error |" not in said  # a column that nothing has
    assert said.endswith("* a remark\n")


def test_the_reading_follows_the_numbers() -> None:
    hard = [replace(each, subject="embedded-hard", kl_mean=3 * each.kl_mean) for each in FIELD if each.kl_mean]
    rivals = [row(f"turboquant{n}", n + 0.2, 9.0, "peer", s, "embedded-hard") for n in (2, 4) for s in (0, 1)]
    hard += [replace(each, family="TurboQuant") for each in rivals]
    said = frontier_reading.paragraph([*FIELD, *hard])
    assert "means over 2 seeds" in said
    best = "On embedded at 4096 tokens and 3 bits the best of ours is spectral with 6.00e-04 nats of KL per token, "
    assert best + "0.1 (0.1 to 0.1) times the best peer's (kivi, 6.00e-03)." in said
    assert "Pareto-optimal there up to 6 bits: spectral2, spectral4, 2 of 2 ours." in said
    assert (
        "The least loss up to 3.5 bits there has spectral2 (2.00 bits), perplexity 20.000 (uncompressed 19.000)."
        in said
    )
    own = "This KL of spectral on the hard variant is 3 (3 to 3) times its own on the plain model, and "
    assert own + "0.0002 (0.00013 to 0.00027) times that of TurboQuant." in said
    assert "loses more than the best peer in 0, and more than half as much in 0 others." in said


def test_the_reading_hides_no_failure() -> None:
    better = [replace(each, kl_mean=each.kl_mean / 100) for each in FIELD if each.side == "peer" and each.kl_mean]
    said = frontier_reading.paragraph([each for each in FIELD if each.side != "peer"] + better)
    assert "10 (10 to 10) times the best peer's" in said
    assert "loses more than the best peer in 2 (embedded 4096 at 3 bits (10); embedded 4096 at 4 bits (3.2))" in said


def test_the_reading_says_where_low_rank_alone_stands() -> None:
    alone = replace(row("lowrank32", 16.5, 3e-3), family="low rank")
    said = frontier_reading.paragraph([each for each in FIELD if each.seed == 0] + [alone])
    assert (
        "Low rank alone loses least as lowrank32, 3.00e-03 at 16.50 bits; spectral4 loses 4.00e-05 at 4.00 bits."
        in said
    )
    assert "one seed, so no spread is known" in said
    assert "0.1 times the best peer's" in said  # no range over seeds where there is one


def test_a_log_is_gone_on_with_where_the_settings_agree(tmp_path: Path) -> None:
    path, settings = tmp_path / "results.jsonl", {"chunk": 512}
    log = Log(path, Row, settings, {"commit": "a"})
    for each in FIELD[:3]:
        log.add(each)
    log.add(replace(FIELD[3], status="failed", reason="it broke"))
    with path.open("a") as file:
        file.write('{"subject": "embedded", "context"')  # a run that was killed while it wrote
    again = Log(path, Row, settings, {"commit": "b"})
    assert again.rows[:3] == FIELD[:3]
    assert [again.done(each.key) for each in FIELD[:5]] == [True, True, True, False, False]
    again.add(FIELD[3])
    again.rewrite()
    assert again.commits == ["a", "b"]
    assert [json.loads(line)["commit"] for line in path.read_text().splitlines()] == ["a", "a", "a", "b"]
    with pytest.raises(ValueError, match="chunk 512, not 256"):
        Log(path, Row, {"chunk": 256}, {})
    assert Log(path, Row, {"chunk": 256}, {}, fresh=True).rows == []


def test_a_whole_small_run_is_written_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "PEERS", {"no such": "nosuch2"})
    monkeypatch.setattr(caches, "BACKENDS", {})
    (tmp_path / "text.txt").write_text(PROSE)
    out = tmp_path / "out"
    command = ["quality", "--text", str(tmp_path / "text.txt"), "--subjects", "embedded embedded-hard"]
    command += ["--contexts", "400 1024", "--greedy", "3", "--output", str(out), "--specs"]
    done = CliRunner().invoke(app, [*command, "exact lloyd3", "--seeds", "1"])
    assert done.exit_code == 0, done.output
    assert "reading.md" in done.output
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    measured = {(each["subject"], each["context"], each["cache"]): each for each in rows}
    panels = [("embedded", 400), ("embedded", 1024), ("embedded-hard", 1024)]
    assert set(measured) == {(*p, c) for p in panels for c in ("uncompressed", "exact", "lloyd3", "nosuch2")}
    for (_, _, cache), each in measured.items():
        assert each["status"] == ("not known" if cache == "nosuch2" else "ok"), each["reason"]
        assert each["settings"] == {"model": None, "text": str(tmp_path / "text.txt"), "chunk": 512, "greedy": 3}
        assert {"versions", "platform", "commit", "cores", "threads", "options"} <= each.keys()
    for panel in panels:
        assert measured[(*panel, "exact")]["kl_mean"] < 1e-6  # float32 rounding
    plain, hard = (measured[subject, 1024, "lloyd3"]["kl_mean"] for subject in ("embedded", "embedded-hard"))
    assert hard > 3 * plain > 0  # a rotation alone spreads the error of outlier channels over all others
    assert measured["embedded", 1024, "lloyd3"]["key_questions"] == 8
    assert "## embedded-hard, 1024 tokens, 1 seed" in (out / "pareto.md").read_text()
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "On embedded-hard at 1024 tokens" in (out / "reading.md").read_text()

    before = {(each["subject"], each["context"], each["cache"]): each["seconds"] for each in rows}
    done = CliRunner().invoke(app, [*command, "exact lloyd3 lloyd2", "--seeds", "1", "--contexts", "400"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    after = {(each["subject"], each["context"], each["cache"]): each["seconds"] for each in rows}
    assert {key: after[key] for key in before} == before  # nothing was measured again
    fresh = {("embedded", 400, "lloyd2")} | {("embedded-hard", 400, c) for c in ("uncompressed", "exact", "lloyd3")}
    assert after.keys() - before.keys() >= fresh


def test_what_cannot_be_measured_is_left_out_with_a_remark(tmp_path: Path) -> None:
    settings = Settings(subjects=("stories260k", "spectra"), contexts=(100,), seeds=1)
    with pytest.raises(ValueError, match=r"nothing was measured: stories260k: left out, .* is not there; spectra"):
        frontier.run(settings, tmp_path / "out", Console(quiet=True), data=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--specs", "trelis3"], "trellis"),
        (["--subjects", "embeded"], "known: embedded, embedded-hard, stories260k, spectra"),
        (["--contexts", "10"], "contexts must be at least 64"),
        (["--contexts", "1024 many"], "whole numbers with spaces between, got '1024 many'"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--greedy", "-1"], "greedy must be at least 0"),
        (["--subjects", "embedded", "--text", "/nowhere/text.txt"], "/nowhere/text.txt"),
    ],
)
def test_bad_options_are_told_without_a_traceback(tmp_path: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["quality", "--output", str(tmp_path), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
