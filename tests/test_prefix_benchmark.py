"""`python -m benchmarks prefix` on a tiny random model: what it measures, and what it says where nothing is reused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from benchmarks import prefix, texts
from benchmarks.log import read
from benchmarks.prefix import Settings
from benchmarks.prefix_rows import Row
from kvcompress import CompressedCache
from tests.families import build, prompt

QUESTION = 64  # tokens, so that the stored prompt has a page more than what prompts share
SETTINGS = Settings(contexts=(400, 500), specs=("trellis3", "spectral3"), question=QUESTION, repetitions=2, chunk=128)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    own = build("llama", head_dim=64)
    text = texts.Text(prompt(1, 3000)[0], torch.tensor([1]), "random tokens")
    monkeypatch.setattr(prefix.subjects, "load", lambda *_: (own, None))
    monkeypatch.setattr(prefix.texts, "load", lambda *_: text)
    return own


def run(folder: Path, settings: Settings = SETTINGS) -> list[Row]:
    with open(folder / "said", "w") as said:
        return prefix.run(settings, folder, Console(file=said, width=200))


def test_rows(model: PreTrainedModel, tmp_path: Path):
    rows = {row.key: row for row in run(tmp_path)}
    assert len(rows) == 6
    for context in SETTINGS.contexts:
        plain, trellis, spectral = (rows[context, name] for name in ("uncompressed", "trellis3", "spectral3"))
        assert plain.status == trellis.status == "ok"
        assert plain.seconds_without > 0
        assert plain.seconds_memory is None
        # 4 sinks, whole pages, and at most the window of 128 and what is left of a page are read again
        assert trellis.tokens_reused == 4 + (context - 4 - 128) // 64 * 64
        assert min(trellis.seconds_without, trellis.seconds_memory, trellis.seconds_disk) > 0
        cache = CompressedCache(model.config, "trellis3")
        with torch.no_grad():
            model(prompt(1, context + QUESTION), past_key_values=cache, use_cache=True)
        assert trellis.memory_bytes == pytest.approx(cache.memory().total, rel=0.02)  # tables of other lengths
        assert trellis.disk_bytes == pytest.approx(trellis.memory_bytes, rel=0.1, abs=8192)
        assert trellis.uncompressed_bytes == plain.uncompressed_bytes == 2 * 2 * 2 * 64 * 4 * (context + QUESTION)
        if context == 400:  # and the stored prompt has fewer tokens than it learns from too: all of it is exact
            assert (spectral.status, spectral.tokens_reused) == ("ok", 400)
        else:
            assert (spectral.status, spectral.tokens_reused) == ("not reusable", None)
            assert spectral.reason == "what its codecs learn takes more than the 500 tokens that the prompts share"
    assert {file.name for file in tmp_path.iterdir()} == {"results.jsonl", "table.md", "first-token.png", "said"}
    table = (tmp_path / "table.md").read_text()
    assert "## 400 tokens in common" in table
    assert "| spectral3 (not reusable) |" in table
    assert (tmp_path / "said").read_text().count("| trellis3 |") == 2
    lines = (tmp_path / "results.jsonl").read_text()
    run(tmp_path)  # nothing is measured again but what had failed
    kept = {row.key: row for row in read(tmp_path / "results.jsonl", Row)}
    assert kept[400, "trellis3"] == rows[400, "trellis3"]
    assert '"commit"' in lines


def test_dropped_files(tmp_path: Path):
    file = tmp_path / "a.kvprefix"
    file.write_bytes(b"x" * 100_000)
    assert prefix.resident_pages(file) == 25
    assert prefix.dropped(tmp_path) == (prefix.resident_pages(file) == 0)


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="contexts must be one or more numbers of at least 64"):
        Settings(contexts=(10,))
    with pytest.raises(ValueError, match="question must be at least 2, got 1"):
        Settings(question=1)
