"""`python -m benchmarks million`: its buckets, its document, a killed run that goes on, a whole small run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import SmolLM3ForCausalLM
from typer.testing import CliRunner

from benchmarks import million
from benchmarks.__main__ import app
from benchmarks.marathon.model import TRAINING, geometry
from benchmarks.million import Settings, buckets, contenders
from benchmarks.million_reading import Checkpoint, Reading, read
from kvcompress import models

PROSE = " ".join(
    f"The {word} went over hill number {index} and came back." for index, word in enumerate("abcdef" * 200)
)


@pytest.fixture(scope="module")
def model() -> SmolLM3ForCausalLM:
    torch.manual_seed(1)
    config = geometry()
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[2:4]
    config.no_rope_layers = config.no_rope_layers[2:4]
    return SmolLM3ForCausalLM(config).eval()


def test_buckets_are_powers_of_two() -> None:
    parts = buckets(5000)
    assert [(part.start, part.stop) for part in parts] == [(1, 1024), (1024, 2048), (2048, 4096), (4096, 5000)]
    assert [part.stop for part in buckets(1 << 20)] == [1024 << n for n in range(11)]


def test_training_attention_is_the_models(model: SmolLM3ForCausalLM) -> None:
    ids = torch.randint(1, 4096, (2, 700), generator=torch.Generator().manual_seed(0))
    logits = {}
    with torch.inference_mode():
        for attention in ("sdpa", TRAINING):
            model.set_attn_implementation(attention)
            logits[attention] = model(ids).logits
    torch.testing.assert_close(logits[TRAINING], logits["sdpa"], rtol=0, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("index", [0, 1])
def test_a_killed_run_goes_on(index: int, model: SmolLM3ForCausalLM, tmp_path: Path) -> None:
    contender = contenders(["trellis3"])[index]
    ids = torch.randint(1, 4096, (1, 2000), generator=torch.Generator().manual_seed(2))

    class KilledError(Exception):
        pass

    def kill(tokens: int) -> None:
        kill.fed += tokens  # type: ignore[attr-defined]
        if kill.fed > 1024:  # type: ignore[attr-defined]
            raise KilledError

    kill.fed = 0  # type: ignore[attr-defined]
    checkpoint = Checkpoint(tmp_path, contender.name, every=0.0)
    with contender.attending(model):
        whole = read(model, contender, ids, 512, None, lambda _: None)
        with pytest.raises(KilledError):
            read(model, contender, ids, 512, checkpoint, kill)
        held = checkpoint.read(model, contender, ids)
        assert held is not None
        assert held.done == 1024
        again = read(model, contender, ids, 512, checkpoint, lambda _: None)
        assert checkpoint.read(model, contender, ids.flip(1)) is None  # another document's
    np.testing.assert_array_equal(again.loss, whole.loss)
    np.testing.assert_array_equal(again.right, whole.right)


def test_restarts_forget(model: SmolLM3ForCausalLM) -> None:
    contender = contenders([])[0]
    ids = torch.randint(1, 4096, (1, 300), generator=torch.Generator().manual_seed(3)).repeat(1, 2)
    with contender.attending(model):
        found = read(model, contender, ids, 512, None, lambda _: None, restart=300)
    assert isinstance(found, Reading)
    # the second half is read as the first was; the token at the border is predicted from the first half
    np.testing.assert_allclose(found.loss[300:], found.loss[:299], atol=1e-6)


def test_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(million.marathon, "load", models.embedded)
    text = tmp_path / "text.txt"
    text.write_text(PROSE)
    settings = Settings(specs=("trellis3", "exact"), tokens=2048, chunk=512, facts=8, text=text)
    rows = million.run(settings, tmp_path / "out", Console(quiet=True))
    assert [row.cache for row in rows] == ["uncompressed", "trellis3", "exact"]
    assert all(row.status == "ok" for row in rows), [row.reason for row in rows]
    base, coded, exact = rows
    for row in rows:  # what an earlier cache held does not hide what a later one takes
        assert row.peak_bytes is not None
        assert row.cache_bytes is not None
        assert row.peak_bytes > row.cache_bytes
    assert base.increase_by_bucket is None
    assert coded.bits_per_element == pytest.approx(3.3, abs=0.15)  # 3 + 16/64 a gain, tables and means
    assert coded.cache_bytes is not None
    assert coded.bfloat16_bytes == base.bfloat16_bytes
    assert 2 * coded.cache_bytes < coded.bfloat16_bytes  # 191 of 2048 tokens are exact and float32
    assert exact.increase_by_bucket is not None
    assert all(abs(mean) < 1e-3 for mean, _ in exact.increase_by_bucket.values())
    assert exact.recall == base.recall
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {line["benchmark"] for line in lines} == {"million"}
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.index("| uncompressed") < table.index("| exact") < table.index("| trellis3")  # from the most bits on
    assert (tmp_path / "out" / "million.png").stat().st_size > 10_000
    stamp = (tmp_path / "out" / "results.jsonl").read_text()
    million.run(settings, tmp_path / "out", Console(quiet=True))  # nothing is left to measure
    assert (tmp_path / "out" / "results.jsonl").read_text() == stamp


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "100"], "tokens must be at least 2048, got 100"),
        (["--tokens", "20000"], "tokens must be a multiple of 16,384"),
        (["--specs", "trelis3"], "trelis3"),
    ],
)
def test_wrong_options(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["million", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr
