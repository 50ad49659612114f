"""`python -m benchmarks parallel`: what it measures, with a single rank in this process, and what it calculates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from rich.console import Console

from benchmarks import parallel, parallel_worker
from benchmarks.parallel import Settings
from benchmarks.parallel_estimate import Machine, estimate
from benchmarks.parallel_rows import Row
from benchmarks.parallel_worker import Work

LLAMA, TOKENS = "Llama-3.1-8B", 10_000_000


def test_an_estimate_by_hand() -> None:
    """Llama 3.1 8B: 32 layers, 8 KV heads and 32 query heads of 128; `trellis3` takes 3 bits and 16 for 128 of them."""
    found = estimate(LLAMA, "trellis3", TOKENS, 4096, Machine(gpus=8))
    pages = -(-((TOKENS - 132) // 64) // 8)  # of a layer, on the GPU that has most
    assert found.pages == 32 * pages * 64 * 2 * 8 * (128 * 3 // 8 + 2)
    assert found.exact == 32 * (132 + 64) * 2 * 8 * 128 * 2
    assert found.weights == 2 * 8_030_261_248  # as published
    assert found.step_payload == 32 * 32 * (128 + 1) * 8
    assert found.step_sent == 2 * 7 * found.step_payload // 8 + 7 * 40
    assert found.step_link_seconds == pytest.approx(65 * 7 * 2e-6 + found.step_sent / 450e9)
    assert found.chunk_payload == 4096 * found.step_payload
    alone = estimate(LLAMA, "trellis3", TOKENS, 4096, Machine(gpus=1))
    assert alone.step_sent == alone.step_link_seconds == 0
    assert alone.pages == pytest.approx(8 * found.pages, rel=1e-4)
    assert alone.total > 80e9 > found.total


def test_a_single_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages are the whole; its all-reduces, of D + 1 float64 a query head, are counted; files are written."""

    def here(work: Work) -> Iterator[Row]:
        parallel_worker.run(0, work)
        assert not dist.is_initialized()
        yield from (Row(**json.loads(line)) for line in work.rows.read_text().splitlines())

    monkeypatch.setattr(parallel, "measured", here)
    settings = Settings(specs=("trellis3", "trellis3,window=512"), ranks=(1,), context=400, chunk=200, steps=2)
    row, late = parallel.run(settings, tmp_path, Console(quiet=True))
    assert (row.status, row.tokens, row.difference, row.backend) == ("ok", 402, 0.0, "gloo")
    pages = (402 - 4 - 128) // 64
    assert row.page_bytes == [5 * pages * 64 * 2 * 2 * (64 * 3 // 8 + 2)]  # five layers of two KV heads of 64
    assert row.step_collectives == 1 + 5
    assert row.step_payload == 5 * 8 + 5 * 4 * (64 + 1) * 8
    assert row.prefill_payload == 2 * 5 * 8 + 5 * 200 * 4 * (64 + 1) * 8  # the first chunk found no pages
    assert (late.page_bytes, late.step_payload) == ([0], 5 * 8)  # nothing to attend together yet
    assert "| trellis3 | 1 |" in (tmp_path / "table.md").read_text()
    assert [each["machine"]["gpus"] for each in json.loads((tmp_path / "estimate.json").read_text())] == [1, 2, 4, 8]
    assert (tmp_path / "parallel.png").stat().st_size > 10_000
    monkeypatch.setattr(parallel, "measured", lambda work: pytest.fail("all rows are there"))
    assert len(parallel.run(settings, tmp_path, Console(quiet=True))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": (2, 1)}, "ranks must be numbers"),
        ({"ranks": ()}, "ranks must be numbers"),
        ({"specs": ()}, "at least one spec"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)  # type: ignore[arg-type]


def test_a_machine_is_checked() -> None:
    with pytest.raises(ValueError, match="gpus must be at least 1, got 0"):
        Machine(gpus=0)
    with pytest.raises(ValueError, match="link must be above 0, got 0"):
        Machine(link=0)
