"""`python -m benchmarks latency`: a whole small run, what breaks, resuming, quartiles and peaks of memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from benchmarks import device, latency, latency_tables
from benchmarks.__main__ import app
from benchmarks.caches import UNCOMPRESSED, Contender
from benchmarks.latency import Case, Settings, Turns, with_times
from benchmarks.latency_rows import empty_row
from benchmarks.timing import Quartiles

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def small(**changes: Any) -> Settings:
    return replace(
        Settings(contexts=(200,), batches=(2,), specs=("lloyd3",), baselines=False, repetitions=2, chunk=64, steps=3),
        **changes,
    )


def test_a_run_writes_lines_table_and_picture_and_goes_on_where_it_stopped(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency.subjects, "load", lambda *_: (model, None))
    command = ["latency", "--contexts", "200 300", "--batches", "2", "--specs", "lloyd3,window=16", "--no-baselines"]
    command += ["--repetitions", "2", "--chunk", "64", "--steps", "3", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "results.jsonl").read_text()
    rows = {(row["context"], row["batch"], row["cache"]): row for row in map(json.loads, text.splitlines())}
    assert len(rows) == 2 * 2
    for (context, batch, cache), row in rows.items():
        assert row["status"] == "ok", row["reason"]
        assert {"versions", "platform", "commit", "seed", "settings"} <= row.keys()
        first, step = row["time_to_first_token_seconds"], row["milliseconds_per_token"]
        assert row["prefill_tokens_per_second"] == pytest.approx(batch * context / first)
        assert row["decode_tokens_per_second"] == pytest.approx(1000 * batch / step)
        assert row["milliseconds_per_token_q1"] <= step <= row["milliseconds_per_token_q3"]
        base = rows[context, batch, "uncompressed"]
        assert row["step_ratio"] == pytest.approx(step / base["milliseconds_per_token"])
        # the dense cache in float32: 2 sides x 2 layers x 32 dimensions of every token, the steps' own included
        dense = batch * (context + 3) * 2 * 2 * 32 * 4
        assert base["cache_bytes"] == dense
        if cache != "uncompressed":
            assert row["cache_bytes"] < dense
            assert (row["attention"], row["backend"]) == ("kvcompress", "torch")
            assert row["stats"]["fused"] == 2 * (-(-context // 64) + 3)  # layers x (chunks + steps)
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert "## 2 x 300 tokens" in (tmp_path / "table.md").read_text()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (tmp_path / "results.jsonl").read_text() == text  # all was measured: nothing was measured anew


def test_what_is_missing_or_breaks_is_a_row_and_the_others_go_on(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter(range(100))

    def second_time(config: LlamaConfig) -> DynamicCache:
        if next(turns):
            raise torch.OutOfMemoryError("CUDA out of memory.\nand much more")
        return DynamicCache(config=config)

    chosen = [
        UNCOMPRESSED,
        Contender("greedy", "tests", second_time),
        replace(UNCOMPRESSED, name="absent", missing="absent is not installed"),
    ]
    monkeypatch.setattr(latency, "contenders", lambda *_: chosen)
    monkeypatch.setattr(latency.subjects, "load", lambda *_: (model, None))
    found = latency.run(small(), tmp_path, Console(quiet=True))
    rows = {row.cache: row for row in found}
    assert rows["uncompressed"].status == "ok"
    assert (rows["greedy"].status, rows["greedy"].reason) == (
        "out of memory",
        "OutOfMemoryError: CUDA out of memory.",
    )
    assert rows["greedy"].milliseconds_per_token is None
    assert next(turns) == 2  # the round that warms up, the one that broke, and no other after that
    assert (rows["absent"].status, rows["absent"].reason) == ("not installed", "absent is not installed")
    assert "* absent: not installed: absent is not installed (2 x 200)" in latency_tables.remarks(found)
    before = rows["uncompressed"].milliseconds_per_token
    again = {row.cache: row for row in latency.run(small(), tmp_path, Console(quiet=True))}
    assert again["greedy"].status == "out of memory"  # tried anew, beside the uncompressed cache
    assert again["uncompressed"].milliseconds_per_token == before  # whose row stays


def test_without_the_uncompressed_cache_there_are_times_but_no_ratios() -> None:
    broken = replace(empty_row(UNCOMPRESSED, 100, 4, 0), status="out of memory")
    other = empty_row(replace(UNCOMPRESSED, name="other"), 100, 4, 0)
    rows = with_times([broken, other], {"uncompressed": Turns(), "other": Turns([2.0, 4.0, 3.0], [0.1, 0.2, 0.3])})
    assert rows[0] == broken
    assert (rows[1].time_to_first_token_seconds, rows[1].first_token_ratio, rows[1].step_ratio) == (3.0, None, None)
    assert rows[1].prefill_tokens_per_second == pytest.approx(4 * 100 / 3)
    assert rows[1].milliseconds_per_token == pytest.approx(200)
    assert rows[1].decode_tokens_per_second == pytest.approx(20)


def test_the_caches_take_turns_on_the_same_prompt(model: LlamaForCausalLM) -> None:
    order: list[str] = []

    def named(name: str) -> Contender:
        def make(config: LlamaConfig) -> DynamicCache:
            order.append(name)
            return DynamicCache(config=config)

        return replace(UNCOMPRESSED, name=name, make=make)

    case = Case.of(model, 50, 2, small())
    assert torch.equal(case.ids, Case.of(model, 50, 2, small()).ids)
    case.measured([(named(name), empty_row(named(name), 50, 2, 0)) for name in "ab"], lambda: None)
    assert "".join(order) == "ab" * 3  # a round that warms up and two that are timed


def test_quartiles() -> None:
    assert Quartiles.of([5.0]) == Quartiles(5.0, 5.0, 5.0)
    found = Quartiles.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found == Quartiles(2.0, 3.0, 4.0)
    assert found.errors == (1.0, 1.0)
    row = replace(empty_row(UNCOMPRESSED, 100, 4, 0), **found.fields("milliseconds_per_token", 1000))
    assert Quartiles.held(row, "milliseconds_per_token", 0.001) == found
    assert Quartiles.held(row, "time_to_first_token_seconds") is None
    assert Quartiles(0.01234, 99.96, 1234.5).told() == "100 (0.0123 to 1,234)"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak")
def test_the_peak_of_a_piece_of_work_is_seen_again_and_again() -> None:
    def work() -> int:
        return len(torch.ones(2**26, dtype=torch.uint8))  # 64 MiB that are gone afterwards

    for _ in range(2):  # the second time the heap's free pages must not hide it
        found, peak = device.with_peak(work, CPU)
        assert found == 2**26
        assert peak is not None
        assert 0.9 * 2**26 < peak < 1.5 * 2**26  # the system counts pages late; nothing else here is that large


def test_a_cpu_out_of_memory_is_known_by_its_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert device.out_of_memory(caught.value)
    assert not device.out_of_memory(RuntimeError("no such kernel"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--specs", "trelis3"], "trellis"),
        (["--contexts", "0"], "contexts must be one or more numbers of at least 1"),
        (["--batches", ""], "batches must be one or more numbers of at least 1"),
        (["--contexts", "1k"], "contexts must be whole numbers"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--load-in-4bit"], "--load-in-4bit is for a --model"),
    ],
)
def test_bad_options_are_told_without_a_traceback(tmp_path: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["latency", "--output", str(tmp_path), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
