"""The job `python -m benchmarks offload` in the small: rows, what they say of each other, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import offload
from benchmarks.offload import Settings
from benchmarks.offload_rows import RESIDENT, document


def test_small_job(tmp_path: Path) -> None:
    settings = Settings(contexts=(300,), specs=("exact", "lloyd3"), budgets=(100, 0), steps=2, folder=tmp_path)
    rows = offload.run(settings, tmp_path / "out", Console(quiet=True))
    assert [(row.cache, row.budget) for row in rows] == [
        (cache, budget) for cache in ("exact", "lloyd3") for budget in (RESIDENT, "100%", "0%")
    ]
    for row in rows:
        assert (row.status, row.reason) == ("ok", None)
        assert row.step_seconds_q1 <= row.step_seconds <= row.step_seconds_q3
        assert (row.disk_bytes > 0) == (row.budget == "0%")
        assert row.host_bytes == 0
    for each in (rows[:3], rows[3:]):
        # on a CPU pages are attended in the same groups wherever they lie; room for all of them is enough for all
        assert [row.same_logits for row in each] == [None, True, True]
        assert len({row.device_bytes + row.disk_bytes for row in each}) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.jsonl", "steps.png", "table.md"]
    assert (tmp_path / "out" / "table.md").read_text() == document(rows, "embedded model, float32, on CPU")
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {line["benchmark"] for line in lines} == {"offload"}
    with pytest.raises(ValueError, match="other"):
        offload.run(Settings(steps=3, folder=tmp_path), tmp_path / "out", Console(quiet=True))


def test_settings() -> None:
    with pytest.raises(ValueError, match="from 0 to 100"):
        Settings(budgets=(101,))
    with pytest.raises(ValueError, match="above 16"):
        Settings(contexts=(16,))
