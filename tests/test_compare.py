"""`python -m benchmarks compare` and `guard`: what counts as worse, what as noise, and what cannot be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import guard, measurements, metrics
from benchmarks.__main__ import app
from benchmarks.comparison import Comparison, compare
from benchmarks.latency_rows import Row as LatencyRow
from benchmarks.memory_rows import Row as MemoryRow
from benchmarks.million_rows import MillionRow
from benchmarks.offload_rows import Row as OffloadRow
from benchmarks.parallel_rows import Row as ParallelRow
from benchmarks.prefix_rows import Row as PrefixRow
from benchmarks.results import Result
from benchmarks.retrieval_rows import Row as RetrievalRow
from benchmarks.rows import Row as QualityRow
from benchmarks.soak_rows import Row as SoakRow
from benchmarks.vllm_check import ServerRow

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

QUALITY = {
    "benchmark": "quality", "subject": "embedded", "context": 1024, "seed": 0, "cache": "trellis3", "status": "ok",
    "spec": {"version": 1}, "bits_per_element": 3.3, "bytes": 1000, "kl_mean": 1e-3, "needle_recall": 1.0,
    "device": "cpu", "threads": 1, "cores": 2, "platform": "Linux", "settings": {"chunk": 512, "text": "/a/book.txt"},
}  # fmt: skip
LATENCY = {
    **QUALITY, "benchmark": "latency", "batch": 1, "milliseconds_per_token": 100.0, "milliseconds_per_token_q1": 95.0,
    "milliseconds_per_token_q3": 105.0, "step_ratio": 2.0,
}  # fmt: skip

Line = Mapping[str, Any]


@pytest.fixture
def compared(tmp_path: Path) -> Any:
    """Compares lines with lines, through files."""

    def run(old: list[Line], new: list[Line], tolerance: float = 1.0) -> Comparison:
        paths = [tmp_path / name for name in ("old.jsonl", "new.jsonl")]
        for path, lines in zip(paths, (old, new), strict=True):
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return compare(*map(measurements.read, paths), tolerance)

    return run


def moved(found: Comparison) -> tuple[list[str], list[str]]:
    return [change.metric for change in found.worse], [change.metric for change in found.better]


@pytest.mark.parametrize(
    ("changes", "worse", "better"),
    [
        ({}, [], []),
        ({"bytes": 1001}, ["bytes"], []),  # bytes are exact
        ({"bytes": 999, "bits_per_element": 3.3 * (1 + 1e-12)}, [], ["bytes"]),  # bits but for the sum's rounding
        ({"kl_mean": 1.04e-3}, [], []),  # within the 5% that the metric says
        ({"kl_mean": 1.06e-3, "needle_recall": 0.9}, ["kl_mean", "needle_recall"], []),
        ({"kl_mean": 0.9e-3, "needle_recall": 0.96}, [], ["kl_mean"]),  # less loss is better, 4% of recall is noise
        ({"kl_mean": float("nan")}, ["kl_mean"], []),
        ({"status": "failed", "reason": "RuntimeError: no"}, ["status, seed 0"], []),
    ],
)
def test_what_moved_beyond_its_noise_is_told_by_its_direction(
    compared: Any, changes: Line, worse: list[str], better: list[str]
) -> None:
    found = compared([QUALITY], [{**QUALITY, **changes}])
    assert moved(found) == (worse, better)
    if not changes:
        assert (found.rows, found.values, found.remarks) == (1, 4, [])


def test_a_tolerance_widens_all_bounds(compared: Any) -> None:
    assert moved(compared([QUALITY], [{**QUALITY, "kl_mean": 1.1e-3}], 3.0)) == ([], [])
    assert moved(compared([QUALITY], [{**QUALITY, "kl_mean": 1.2e-3}], 3.0)) == (["kl_mean"], [])
    with pytest.raises(ValueError, match="tolerance"):
        compared([QUALITY], [QUALITY], 0.0)


def test_a_speed_can_fall_out_of_the_widest_bounds(compared: Any) -> None:
    def speed(value: float) -> list[Line]:
        return [{**QUALITY, "prefill_tokens_per_second": value}]

    # 30% eightfold is a factor of 3.4 either way, where 240% of the old value would allow any fall
    assert moved(compared(speed(100), speed(30), 8.0)) == ([], [])
    assert moved(compared(speed(100), speed(29), 8.0)) == (["prefill_tokens_per_second"], [])
    assert moved(compared(speed(100), speed(339), 8.0)) == ([], [])
    assert moved(compared(speed(100), speed(341), 8.0)) == ([], ["prefill_tokens_per_second"])


def test_three_seeds_say_themselves_how_much_noise_there_is(compared: Any) -> None:
    def lines(*kl: float) -> list[Line]:
        return [{**QUALITY, "seed": seed, "kl_mean": value} for seed, value in enumerate(kl)]

    old = lines(1e-3, 2e-3, 3e-3)
    # +2% everywhere, where the seeds agree: beyond a fifth of 5%, though a single row's 2% would be noise
    assert moved(compared(old, lines(1.02e-3, 2.04e-3, 3.06e-3))) == (["kl_mean"], [])
    assert moved(compared(old[:1], lines(1.02e-3))) == ([], [])
    # +7% in the mean, but the seeds differ by more: +30%, -10% and +11% of the old mean
    assert moved(compared(old, lines(1.6e-3, 1.8e-3, 3.02e-3))) == ([], [])
    # only seeds that both have are held against each other: the third one's old loss is not in the mean
    assert moved(compared(old, lines(1e-3, 2e-3))) == ([], [])


def test_quartiles_widen_a_time_and_another_machine_forbids_it(compared: Any) -> None:
    slower = {**LATENCY, "milliseconds_per_token": 140.0, "milliseconds_per_token_q1": 135.0}
    tight, wide = slower | {"milliseconds_per_token_q3": 145.0}, slower | {"milliseconds_per_token_q3": 215.0}
    assert moved(compared([LATENCY], [tight])) == (["milliseconds_per_token"], [])  # 40% up; 30% are noise
    assert moved(compared([LATENCY], [wide])) == ([], [])  # half ranges of 5 and 40 make 45
    elsewhere = compared([LATENCY], [tight | {"platform": "other", "step_ratio": 3.0}])
    assert moved(elsewhere) == (["step_ratio"], [])  # what was measured side by side still counts
    assert "milliseconds_per_token: not compared, for the platform differ (1 times)" in elsewhere.remarks


def test_rows_are_matched_by_what_they_measure(compared: Any) -> None:
    other = {**QUALITY, "context": 4096}
    found = compared([QUALITY, other], [QUALITY, {**QUALITY, "cache": "lloyd3"}])
    assert found.vanished == ["quality subject=embedded context=4096 cache=trellis3"]
    assert found.appeared == ["quality subject=embedded context=1024 cache=lloyd3"]
    assert moved(found) == ([], [])
    same_book = {**QUALITY, "settings": {"chunk": 512, "text": "/elsewhere/book.txt"}}
    assert compared([QUALITY], [same_book]).rows == 1
    with pytest.raises(ValueError, match="chunk 512 and 256"):
        compared([QUALITY], [{**QUALITY, "settings": {"chunk": 256, "text": "/a/book.txt"}}])
    with pytest.raises(ValueError, match="results of quality and of latency"):
        compared([QUALITY], [LATENCY])
    with pytest.raises(ValueError, match="second row"):
        compared([QUALITY, QUALITY], [QUALITY])
    failed = {**QUALITY, "status": "failed"}
    assert compared([failed, QUALITY], [QUALITY]).worse == []  # taken anew after a failure: the later one counts


def test_what_is_not_installed_vanished_and_got_no_worse(compared: Any) -> None:
    absent = {**QUALITY, "status": "not installed", "reason": "hqq is not installed", "kl_mean": None}
    found = compared([QUALITY], [absent])
    assert moved(found) == ([], [])
    assert [entry.rpartition("seed 0: ")[2] for entry in found.vanished] == ["not installed: hqq is not installed"]
    gone = compared([QUALITY], [{**QUALITY, "kl_mean": None}])
    assert [entry.rpartition(": ")[2] for entry in gone.vanished] == ["kl_mean"]


def test_buckets_are_compared_one_by_one_and_unknown_numbers_are_named(compared: Any) -> None:
    old = {**QUALITY, "perplexity_by_bucket": {"1024": 20.0, "2048": 19.0}, "glow": 3.0}
    found = compared([old], [{**old, "perplexity_by_bucket": {"1024": 20.0, "2048": 19.2}, "glow": 1.0}])
    assert moved(found) == (["perplexity_by_bucket[2048]"], [])
    assert found.remarks == ["not compared, for no one said which way is better: glow"]


def test_a_slope_is_held_against_its_interval(compared: Any) -> None:
    soak = {"benchmark": "soak", "spec": "trellis3", "lost": 0, "rss_slope": 0.0, "rss_low": -3e6, "rss_high": 3e6}
    grown = {**soak, "rss_slope": 5e6, "rss_low": 2e6, "rss_high": 8e6}  # half ranges of 3 MB each: they meet
    assert moved(compared([soak], [grown])) == ([], [])
    sure = {**grown, "rss_low": 4.5e6, "rss_high": 5.5e6, "lost": 1}
    assert moved(compared([soak], [sure])) == (["lost", "rss_slope"], [])


def test_rows_are_told_apart_by_budget_and_ranks(compared: Any) -> None:
    offload = {"benchmark": "offload", "cache": "trellis3", "context": 4096, "budget": "0%", "step_ratio": 1.5}
    parallel = {"benchmark": "parallel", "cache": "trellis3", "ranks": 1, "page_bytes": [100], "difference": 0.0}
    old = [offload, {**offload, "budget": "50%"}, parallel, {**parallel, "ranks": 2, "page_bytes": [50, 50]}]
    new = [*old[:1], {**old[1], "step_ratio": 1.9}, *old[2:3], {**old[3], "page_bytes": [51, 50], "difference": 5e-7}]
    assert moved(compared(old, new)) == (["step_ratio", "page_bytes[0]"], [])


def test_static_rows_are_told_apart_by_their_variant(compared: Any) -> None:
    kernel = {"benchmark": "static", "kernel": "decode", "codec": "lloyd3", "arch": "sm_90", "head_dim": 128}
    first = {**kernel, "variant": 1, "registers": 128, "spills": 0, "over_budget": []}
    second = {**first, "variant": 2, "registers": 200}
    found = compared([first, second], [first, {**second, "registers": 207, "spills": 4, "over_budget": ["spills"]}])
    assert [(change.metric, change.new) for change in found.worse] == [("status, seed 0", "over budget spills")]
    assert str(found.worse[0]).startswith("static kernel=decode codec=lloyd3 arch=sm_90 head_dim=128 variant=2:")
    assert moved(compared([first], [{**first, "registers": 136}])) == (["registers"], [])  # a whole eight more


@pytest.mark.parametrize(
    "kind",
    [
        Result, QualityRow, LatencyRow, MemoryRow, MillionRow, RetrievalRow, PrefixRow, OffloadRow, ParallelRow,
        SoakRow, ServerRow,
    ],
)  # fmt: skip
def test_every_number_of_a_row_is_a_metric_or_known_not_to_be_one(kind: Any) -> None:
    named = {*measurements.IDENTITY, "cache", "spec", "seed"}
    plain = re.compile(r"(list\[)?(int|float)\b")
    numbers = [each.name for each in fields(kind) if plain.match(str(each.type)) and each.name not in named]
    assert numbers
    assert [name for name in numbers if not metrics.known(name)] == []
    assert [name for name in numbers if metrics.find(name) and metrics.NEUTRAL.fullmatch(name)] == []


def test_the_committed_results_can_be_read_and_do_not_differ_from_themselves() -> None:
    """Identities that do not tell rows apart would be an error here."""
    found = measurements.read(RESULTS)
    same = compare(found, found)
    assert same.rows == sum(len(each.by_seed) for each in found.values())
    assert (same.worse, same.better, same.appeared, same.vanished, same.remarks) == ([], [], [], [], [])
    assert same.values > 1000  # 6,828 of the first such files: a metric or file that is no longer known shows


def test_the_command_prints_and_exits_by_what_got_worse(tmp_path: Path) -> None:
    old, new, empty, other = (tmp_path / f"{name}.jsonl" for name in ("old", "new", "empty", "other"))
    old.write_text(json.dumps(QUALITY))
    new.write_text(json.dumps({**QUALITY, "bytes": 2000}))
    fit = json.dumps({"benchmark": "scaling", "subject": "embedded"})  # follows from measurements, and is none
    empty.write_text(f"no json\n{fit}\n")
    other.write_text("[1]\n")
    run = CliRunner().invoke
    worse = run(app, ["compare", str(old), str(new)])
    assert worse.exit_code == 1
    assert "cache=trellis3: bytes: 1000 -> 2000, +100.00% (noise: 0)" in worse.output
    better = run(app, ["compare", str(new), str(old), "--json"])
    assert better.exit_code == 0
    assert [change["metric"] for change in json.loads(better.output)["better"]] == ["bytes"]
    for path, message in (
        (tmp_path / "none", "no such file"),
        (empty, "holds no measurements"),
        (other, "not a result of any benchmark here: [1]"),
    ):
        done = run(app, ["compare", str(old), str(path)])
        assert done.exit_code == 2
        assert message in done.output


def test_the_guard_holds_a_small_run_against_the_last_one(tmp_path: Path) -> None:
    """The same code gives the same bytes and, on one machine, quality; what differs in the file that is known shows."""
    text = tmp_path / "text.txt"
    text.write_text((RESULTS / "guard" / "text.txt").read_text())
    settings = replace(guard.SETTINGS, text=text, specs=("lloyd3",), context=300, documents=0, step_context=0)
    quiet = Console(quiet=True)
    with pytest.raises(FileNotFoundError):
        guard.run(1.0, False, quiet, settings)
    assert guard.run(1.0, True, quiet, settings) is None
    known = tmp_path / "results.jsonl"
    lines = [json.loads(line) for line in known.read_text().splitlines()]
    same = guard.run(1.0, False, quiet, settings)
    assert same is not None
    assert (same.rows, same.worse, same.vanished) == (2, [], [])
    assert [remark.partition(":")[0] for remark in same.remarks] == ["prefill_tokens_per_second"]
    known.write_text("".join(json.dumps({**line, "bytes": line["bytes"] - 1}) + "\n" for line in lines))
    found = guard.run(4.0, False, quiet, settings)
    assert found is not None
    assert [change.metric for change in found.worse] == ["bytes", "bytes"]


def test_the_guard_compares_all_that_it_measures() -> None:
    """The committed file fits the settings: ten specs beside the uncompressed cache, all of which worked."""
    found = measurements.read(RESULTS / "guard" / "results.jsonl")
    caches = {dict(name.fields)["cache"] for name in found}
    assert caches == {"uncompressed", *guard.SETTINGS.specs}
    assert all(measurements.state(line)[0] == "ok" for each in found.values() for line in each.by_seed.values())
    for name in found:
        settings = dict(name.settings)
        assert (settings["context"], settings["facts"]) == (str(guard.SETTINGS.context), str(guard.SETTINGS.facts))
