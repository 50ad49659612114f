"""`python -m benchmarks gpu`: all of it in Triton's interpreter, the processes that measure, and its arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gpu_fake_jobs
import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_attention import SkippedError, sets_of
from benchmarks.gpu_histories import coded, fill, lengthened, poison, shuffle
from benchmarks.gpu_jobs import table
from benchmarks.gpu_rows import DRY, GPU, attempt
from benchmarks.gpu_timer import Timing, asking_time, device_time
from benchmarks.gpu_worker import Job, in_children
from kvcompress import reference
from kvcompress.reference import Mask, Scores
from kvcompress.store import PAGE

ROOT = Path(__file__).resolve().parents[1]

#: What rows of a section that are "ok" say beside what all rows do.
KEYS = {
    "check": {"error", "allowed", "coded_tokens", "first_seconds", "spec", "dtype", "head_dim", "queries", "pads"},
    "encode check": {"identical", "distortion", "distortion_ratio"},
    "device": {"device_us"},
    "decode": {"device_us", "kernel_us", "host_us", "bytes", "bytes_per_second", "share_of_copy", "sets"},
    "tune": {"kernel_us", "programs", "options", "grid"},
    "encode": {"tokens_per_second", "share_of_prefill", "keys", "values", "kernel_us"},
    "prefill": {"device_us", "tflops"},
    "model": set(),
}


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    """Every section does its work on the smallest shapes; only a codec that the kernels do not read is refused."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", "--dry", "--commit", "abc", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "dry.jsonl").read_text().splitlines()]
    assert {row["section"] for row in rows} == set(KEYS)
    refused = [row for row in rows if row["status"] != "ok"]
    assert [row["reason"] for row in refused] == ["lloyd codes of 8 bits, which have no table of bytes"] * 2, refused
    for row in rows:
        assert {"job", "section", "name", "seconds", "versions", "device", "commit"} <= set(row)
        assert row["commit"] == "abc"
        if row["status"] == "ok":
            assert KEYS[row["section"]] <= set(row), row["name"]
    by_name = {(row["section"], row["name"]): row for row in rows}
    decoded = by_name["decode", "trellis3"]
    assert "pages_kernel" in decoded["pieces_us"]
    assert decoded["baseline"] in ("split-KV", "math")
    # 64 tokens of one head of 32 dimensions, both sides at 3 bits, and 64 gains of two bytes each
    assert decoded["bytes"] == 2 * (64 * 32 * 3 // 8 + 2 * 64)
    step = by_name["model", "trellis2"]
    assert {"step_us", "host_us", "tokens_per_second", "slowest_us"} <= set(step)
    assert step["stats"]["fused"] >= 2  # one layer; a step to look at, one to time
    assert not [name for name in step["stats"] if name.startswith("refused")]
    assert step["profile"]["status"] == "ok"
    static = by_name["model", "trellis2 static"]
    assert static["stats"]["static"] >= 2  # a step to look at, one to time
    assert not static["graphed"]  # on a CPU
    assert static["cache_bytes"] > step["cache_bytes"]  # room for what may come
    assert by_name["model", "ratios"]["ratios"].keys() == {
        f"{name} to {other}" for name in ("trellis2", "trellis2 static") for other in ("DynamicCache", "in place")
    }


@pytest.mark.slow
def test_processes_that_die_hang_or_lose_the_device() -> None:
    """Each takes only its own job with it; what one learns the next ones know."""
    jobs = [Job(name, 0) for name in ("first", "dies", "hangs", "last")]
    known: dict[str, int] = {}
    rows = list(in_children(gpu_fake_jobs.run, gpu_fake_jobs.healthy, jobs, 1, known, time.monotonic() + 120, 6.0))
    assert [(job, row["status"]) for job, row in rows] == [
        ("first", "ok"), ("dies", "ok"), ("dies", "failed"), ("hangs", "ok"), ("hangs", "failed"), ("last", "ok"),
    ]  # fmt: skip
    assert [row["reason"] for _, row in rows if row["status"] == "failed"] == [
        "the process ended with status 7",
        "no answer for 6 seconds",
    ]
    assert rows[-1][1]["seen"] == {"first": 1}
    assert known == {"first": 1, "last": 1}

    lost = [Job("loses the device", 0), Job("last", 0), Job("too long", 1000)]
    rows = list(in_children(gpu_fake_jobs.run, gpu_fake_jobs.unhealthy, lost, 1, {}, time.monotonic() + 60, 30))
    assert [row["status"] for _, row in rows] == ["ok", "failed", "failed", "ok", "skipped"]
    assert rows[2][1]["reason"] == "the process ended with status 3"
    assert rows[0][1]["process"] != rows[3][1]["process"]


def test_made_up_history_is_one_that_the_reference_reads() -> None:
    source = coded(DRY, "trellis3")
    history = lengthened(source, rows=2, pages=3, seed=1)
    assert history.coded == [3 * PAGE] * 2
    assert history.held == source.held * 2
    assert history.lengths == [source.sinks + 3 * PAGE + source.held[0]] * 2
    query = torch.randn(2, 2, 1, DRY.head_dim, dtype=torch.float16)
    key = torch.randn(2, 1, 1, DRY.head_dim, dtype=torch.float16)
    arguments = Mask(None, True), Scores(DRY.scaling)
    out = reference.attend(query, history, key, key, *arguments)
    assert bool(torch.isfinite(out).all())
    shuffle(history, seed=3)
    assert history.table.ids.flatten().tolist() != list(range(6))
    assert torch.equal(reference.attend(query, history, key, key, *arguments), out)
    assert source.coded == [2 * PAGE]  # left as it was
    assert fill(history, source, 1, 5, 0).coded == [5 * PAGE]


def test_poison_reaches_only_what_lies_beyond_the_end() -> None:
    history = coded(DRY, "spectral3")
    history.crop(history.held[0] + 10)
    before = history.dense(0), history.dense(1)
    poison(history)
    assert all(torch.equal(history.dense(side), before[side]) for side in (0, 1))
    last = history.pool.read(history.table.ids[0, -1:])
    gains = [part for name, part in last.items() if name.endswith("gain")]
    assert [int((part == 255).sum()) for part in gains] == [10] * len(gains)


def test_jobs() -> None:
    """What is worth most comes first, and nothing but checks comes side by side with others."""
    names = list(table(dry=False))
    assert len(names) == len(set(names))
    rest = [name for name in names if not name.startswith("check")]
    assert rest[:2] == ["device", "decode 1 x 131072"]
    assert names[len(names) - len(rest) :] == rest
    assert {"prefill", "model", "tune trellis3", "decode 8 x 1048576", "encode prerope+spectral3"} <= set(rest)
    assert gpu.Settings(only=("tune",)).chosen()[0].name == "tune trellis3"
    with pytest.raises(ValueError, match="no job's name holds any of"):
        gpu.Settings(only=("nothing",)).chosen()


def test_rows_of_other_jobs_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "x" / "gpu.jsonl"
    gpu._save(path, [{"job": "a", "n": 1}, {"job": "b", "n": 2}])
    assert gpu._kept(path, {"a"}) == [{"job": "b", "n": 2}]
    assert gpu._kept(tmp_path / "none.jsonl", {"a"}) == []


def test_verdicts() -> None:
    row = {"section": "decode", "name": "trellis3", "rows": 1, "tokens": 1 << 17, "status": "ok", "ratio": 2.6}
    short = {**row, "tokens": 4096, "ratio": 1.0}
    batch = {**row, "rows": 8, "ratio": 1.0}
    encode = {"section": "encode", "name": "trellis3 64 pages", "status": "ok", "share_of_prefill": 0.06}
    assert list(gpu.verdicts([row, short, batch, encode])) == [
        "met: decode trellis3 over 131072 tokens: ratio 2.6, wanted at least 2.5",
        "MISSED: encode trellis3 64 pages: share_of_prefill 0.06, wanted at most 0.05",
        "rows: 4 ok",
    ]


def test_failures_are_rows() -> None:
    def breaks() -> dict[str, object]:
        raise RuntimeError("no\nway " + "x" * 1000)

    row = attempt({"section": "s", "name": "n"}, breaks)
    assert row["status"] == "failed"
    assert row["reason"].startswith("RuntimeError: no way x")
    assert len(row["reason"]) < 330
    assert "breaks" in " ".join(row["traceback"])
    line = gpu.line(row)
    assert "FAILED" in line
    assert "\n" not in line


def test_timing() -> None:
    timing = Timing.of([float(n) for n in range(1, 22)])
    assert (timing.median, timing.low, timing.high, timing.samples) == (11.0, 3.0, 19.0, 21)
    assert timing.row("x") == {"x_us": 11e6, "x_spread_us": [3e6, 19e6]}


def test_what_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that take turns hold four times an L2 of 60 MB, and no more than the memory that is free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 << 30, 139 << 30))
    properties = type("Properties", (), {"L2_cache_size": 60_000_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert sets_of(1 << 30, GPU) == 1
    assert sets_of(100_000_000, GPU) == 3
    assert sets_of(1000, GPU) == 80
    with pytest.raises(SkippedError, match=r"needs 95.0 GiB, 100.0 GiB are free"):
        sets_of(95 << 30, GPU)


def test_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="there is no GPU here"):
        gpu._shared(gpu.Settings())


def test_device_time_queues_work_behind_a_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: events that read a clock which only calls and sleeps advance, in seconds."""
    clock, asked, turns = [0.0], [0], []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    def call(index: int) -> None:
        asked[0] += 1
        turns.append(index)
        clock[0] += 2e-5

    def sleep(cycles: int) -> None:
        clock[0] += cycles / 2e9

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    timing = device_time([partial(call, 0), partial(call, 1), partial(call, 2)], GPU.device, seconds=1e-9)
    assert timing.median == pytest.approx(2e-5)
    assert timing.samples == 16  # the fewest, in two batches, after two rounds that nobody times
    assert asked[0] == 2 * 3 + 16
    assert turns[6:12] == [0, 1, 2, 0, 1, 2]
    assert asking_time([partial(call, 0)], GPU.device, samples=5).samples == 5
