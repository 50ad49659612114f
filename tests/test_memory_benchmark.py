"""`python -m benchmarks memory` counts what a model's own cache holds, and says how each number is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, Cache, LlamaConfig
from transformers.utils import is_optimum_quanto_available
from typer.testing import CliRunner

from benchmarks import memory, memory_fill, memory_geometries, memory_rows
from benchmarks.__main__ import app
from benchmarks.caches import UNCOMPRESSED, Contender, compressed
from benchmarks.memory import Settings
from benchmarks.memory_fill import Fill, Level, Stop, chosen
from benchmarks.memory_geometries import Kind, layer_kinds, load
from benchmarks.memory_rows import LAYERWISE, SLOPE, WHOLE, Fit, Row, fits, part_of
from benchmarks.storage import cache_bytes
from kvcompress.spec import DEFAULT_SPEC

#: Published counts of parameters; gemma's is that of its 4,300,079,472 less the vision tower and its projector.
PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-8B": 8_190_735_360,
    "gemma-3-4b-text": 3_880_263_168,
    "gpt-oss-20b": 20_914_757_184,
}


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A geometry of 2 layers with 2 KV heads of 64, as a config.json: 1 KiB a token, half of it a layer."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        dtype=torch.bfloat16,
    )
    path = tmp_path / "small" / "config.json"
    path.parent.mkdir()
    config.to_json_file(path)
    return str(path)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills run in this process: what they count is the same, and nothing has to be started."""

    def run(work: Callable[..., Iterator[dict[str, Any]]], healthy: Any, jobs: Any, *rest: Any) -> Iterator[Any]:
        yield from ((jobs[0].name, row) for row in work(jobs[0].name, {}))

    monkeypatch.setattr(memory_fill, "in_children", run)


def levels(geometry: str, cache: str, layers: tuple[int, ...], contexts: tuple[int, ...], **more: Any) -> list[Any]:
    settings: dict[str, Any] = {"chunk": 200, "seconds": 100.0, "seed": 0, "figures": None} | more
    fill = Fill(geometry, cache, layers, contexts, **settings)
    return [found for found in memory_fill.measured(fill) if not isinstance(found, int)]


def model_cache(geometry: str, contender: Contender, tokens: int) -> Cache:
    """The cache of a real model that has read so many tokens, the last of them alone."""
    torch.manual_seed(0)
    config = memory_geometries.load_config(geometry)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = contender.make(model.config)
    with torch.inference_mode(), contender.attending(model):
        for part in torch.randint(64, (1, tokens)).split([tokens - 1, 1], dim=1):
            model(part, past_key_values=cache)
    return cache


@pytest.mark.slow
def test_shipped_geometries_have_the_sizes_of_the_published_models() -> None:
    """Every size of a config but those of the cache enters into the count of parameters, which is published."""
    assert {name: load(name).parameters for name in memory_geometries.names()} == PARAMETERS
    sizes = {name: (g.layers, g.heads, g.width) for name in PARAMETERS if (g := load(name))}
    assert sizes["Llama-3.1-8B"] == sizes["Mistral-7B-v0.3"] == (32, 8, 128)
    assert sizes["Qwen3-30B-A3B"] == (48, 4, 128)
    assert load("Llama-3.1-8B").uncompressed(32, 2**20) == 128 * 2**30  # 128 KiB a token
    assert [len(kind.layers) for kind in layer_kinds(load("gemma-3-4b-text"), UNCOMPRESSED)] == [29, 5]


def test_sliding_layers_are_a_kind_and_layers_with_codecs_of_their_own() -> None:
    kinds = layer_kinds(load("gpt-oss-20b"), compressed("fp8"))
    found = [(kind.label, len(kind.layers)) for kind in kinds]
    assert found == [("8 x 64, sliding window of 128", 12), ("8 x 64, fp8", 12)]
    kinds = layer_kinds(load("Llama-3.2-1B"), compressed("fp8,layer0=trellis4"))
    assert {kind.label: kind.layers[0] for kind in kinds} == {"8 x 64, fp8": 1, "8 x 64, trellis4": 0}


@pytest.mark.parametrize(
    "cache",
    [
        "uncompressed",
        "fp8",
        DEFAULT_SPEC,
        pytest.param(
            "QuantizedCache quanto4",
            marks=pytest.mark.skipif(not is_optimum_quanto_available(), reason="optimum-quanto is not installed"),
        ),
    ],
)
def test_a_fill_holds_what_a_models_cache_holds(small: str, inline: None, cache: str) -> None:
    """To the byte: storage depends on tokens and sizes, not on numbers; and layers add up. 1000 tokens: more than the
    512 that spectral codecs learn from."""
    truth = cache_bytes(model_cache(small, chosen(cache), 1000))
    (whole,) = levels(small, cache, (0, 1), (1000,))
    (layer,) = levels(small, cache, (1,), (1000,))
    assert whole.bytes == 2 * layer.bytes == truth
    assert layer.elements == 1000 * 2 * 2 * 64
    assert whole.bits_per_element == layer.bits_per_element


def test_a_fill_does_not_depend_on_chunks_or_spectra(small: str, inline: None, tmp_path: Path) -> None:
    """The numbers differ, the bytes do not: the eigenvalues of the file are none of the law's."""
    heads = {f"h0_{side}": [100.0 / (rank + 1) ** 2 for rank in range(32)] for side in ("keys", "values")}
    figures = tmp_path / "kv_spectra.json"
    figures.write_text(json.dumps({"model": {"head_dim": 64, "uncentred_top32_eigenvalues": heads}}))
    plain = levels(small, "spectral3", (0,), (900,))
    other = levels(small, "spectral3", (0,), (900,), figures=figures, chunk=333, seed=5)
    assert plain[0].bytes == other[0].bytes


def test_a_process_tells_its_peak(small: str) -> None:
    """4096 tokens of one layer are 2 MiB, which growing by concatenation holds twice at least once."""
    first, last = levels(small, "uncompressed", (0,), (1024, 4096), chunk=1024)
    assert last.bytes == 4096 * 512
    assert last.peak_bytes > max(last.bytes, first.peak_bytes)


def test_llama_8b_holds_a_million_tokens_in_28_gib(tmp_path: Path, inline: None) -> None:
    """By the slope of one KV head, 256 of which are Llama-3.1-8B's; tables and means, which heads share, are counted
    for each. The bar is of the task; benchmarks/results/memory has it measured."""
    one = LlamaConfig(
        hidden_size=128, num_attention_heads=1, num_key_value_heads=1, head_dim=128, num_hidden_layers=1, vocab_size=8
    )
    one.to_json_file(tmp_path / "config.json")
    contexts = (2048, 4096)
    known = {level.tokens: level for level in levels(str(tmp_path / "config.json"), DEFAULT_SPEC, (0,), contexts)}
    part = part_of(Kind("", (0,), False), known, 2**20)
    assert part is not None
    assert part.slope
    assert 20 * 2**30 < 8 * 32 * part.level.bytes <= 28 * 2**30


def run(small: str, output: Path, **more: Any) -> dict[memory_rows.Key, Row]:
    options: dict[str, Any] = {"specs": ("fp8",), "baselines": False, "contexts": (256, 512, 1024, 2048)} | more
    settings = Settings((small,), chunk=256, budget=512 * 1024, **options)
    rows = memory.run(settings, output, Console(quiet=True))
    return {row.key: row for row in rows}


def test_rows_say_how_they_are_known(small: str, inline: None, tmp_path: Path) -> None:
    """512 KiB hold 512 tokens of the whole uncompressed cache, 1024 of one layer, and any of a compressed one."""
    rows = run(small, tmp_path)
    basis = {(cache, tokens): row.basis for (_, cache, tokens), row in rows.items()}
    by_context = {"uncompressed": (WHOLE, WHOLE, LAYERWISE, SLOPE), "fp8": (WHOLE, WHOLE, LAYERWISE, LAYERWISE)}
    for cache, expected in by_context.items():
        assert tuple(basis[cache, tokens] for tokens in (256, 512, 1024, 2048)) == expected
    assert rows[small, "uncompressed", 2048].cache_bytes == 2048 * 1024
    fp8 = rows[small, "fp8", 2048]
    assert fp8.bits_per_element == pytest.approx(8, abs=0.05)  # 8 bits, and tables
    assert fp8.peak_bytes is not None
    assert fp8.cache_bytes is not None
    (part,) = fp8.layers
    assert part["count"] == 2
    assert 2 * part["level"]["bytes"] == fp8.cache_bytes
    assert fp8.peak_bytes - fp8.cache_bytes == part["level"]["peak_bytes"] - part["level"]["bytes"]
    line = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert line["benchmark"] == "memory"
    assert line["spec"]["key"] == {"name": "fp8", "bits": None}
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    table = (tmp_path / "table.md").read_text()
    assert "2.00 MiB (S)" in table
    assert json.loads((tmp_path / "fits.json").read_text())["gpu"] == 80_000_000_000


def test_a_run_goes_on_where_it_was_and_with_more_minutes_goes_further(
    small: str, inline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(small, tmp_path, contexts=(256, 512, 1024))
    asked: list[Fill] = []
    honest = memory.measured

    def limited(fill: Fill) -> Iterator[Level | int | Stop]:
        """As where 2048 tokens would take more than two minutes."""
        asked.append(fill)
        for found in honest(fill):
            if isinstance(found, Level) and found.tokens > 1024 and fill.seconds <= 120:
                yield Stop("stopped", "2 minutes were over")
                return
            yield found

    monkeypatch.setattr(memory, "measured", limited)
    row = run(small, tmp_path)[small, "fp8", 2048]
    assert (row.basis, row.reason, row.minutes) == (SLOPE, "2 minutes were over", 2.0)
    assert [fill.cache for fill in asked] == ["uncompressed", "fp8"]  # one level does not make a line
    run(small, tmp_path)
    assert len(asked) == 2
    again = run(small, tmp_path, minutes=3.0)[small, "fp8", 2048]
    assert (again.basis, again.reason) == (LAYERWISE, None)
    assert again.cache_bytes == pytest.approx(row.cache_bytes, rel=0.01)  # tables grow in steps of pages
    with pytest.raises(ValueError, match="holds rows with seed 0, not 1"):
        run(small, tmp_path, seed=1)


def test_a_cache_that_breaks_is_a_row(
    small: str, inline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> Contender:
        def make(config: Any) -> Cache:
            raise RuntimeError("no memory left")

        return replace(UNCOMPRESSED, make=make) if name == "fp8" else chosen(name)

    monkeypatch.setattr(memory_fill, "chosen", broken)
    rows = run(small, tmp_path)
    for tokens in (256, 2048):  # as a whole, layer by layer
        row = rows[small, "fp8", tokens]
        assert (row.status, row.reason, row.cache_bytes) == ("failed", "RuntimeError: no memory left", None)
        assert rows[small, "uncompressed", tokens].status == "ok"
    assert "failed: RuntimeError: no memory left" in (tmp_path / "table.md").read_text()


def test_quantised_caches_do_not_take_sliding_layers(inline: None, tmp_path: Path) -> None:
    settings = Settings(("gpt-oss-20b",), (), contexts=(2, 4), budget=0)
    rows = memory.run(settings, tmp_path, Console(quiet=True))
    refused = "not supported" if is_optimum_quanto_available() else "not installed"
    said = {row.cache.removeprefix("QuantizedCache "): row.status for row in rows}
    assert said == {"uncompressed": "not measured", "quanto4": refused, "quanto2": refused}


def level(tokens: int, held: int) -> Level:
    return Level(tokens, held, 2 * tokens, 4.0, held + 50, 1.0)


def test_a_slope_goes_on_from_the_last_two_levels() -> None:
    kind = Kind("k", (3, 4), False)
    known = {100: level(100, 900), 200: level(200, 1000), 400: level(400, 1300)}
    part = part_of(kind, known, 1000)
    assert part is not None
    assert (part.slope, part.count, part.level.bytes, part.level.peak_bytes) == (True, 2, 2200, 2250)
    assert part_of(kind, {100: level(100, 900)}, 1000) is None
    measured = part_of(kind, known, 200)
    assert measured is not None
    assert not measured.slope


def test_what_fits_is_read_off_the_rows() -> None:
    """Weights 500 bytes at 8 bits a parameter and a reserve of 100."""

    def series(cache: str, *points: tuple[int, int, str]) -> list[Row]:
        return [Row("g", cache, "l", n, parameters=500, basis=basis, cache_bytes=held) for n, held, basis in points]

    rows = [
        *series("between", (100, 100, WHOLE), (200, 300, LAYERWISE), (400, 700, SLOPE)),
        *series("guessed", (100, 100, WHOLE), (200, 150, LAYERWISE), (400, 700, SLOPE)),
        *series("beyond", (100, 100, WHOLE), (200, 150, LAYERWISE)),
        *series("never", (100, 300, WHOLE), (200, 600, WHOLE)),
        *series("flat", (100, 100, WHOLE), (200, 100, WHOLE)),
        *series("alone", (100, 100, WHOLE)),
    ]
    found = {fit.cache: fit for fit in fits(rows, 800, 100, 8)}
    assert found["between"] == Fit("g", "between", 200, 150, "measured")
    assert found["guessed"] == Fit("g", "guessed", 200, 218, "slope")
    assert found["beyond"] == Fit("g", "beyond", 200, 300, "slope")
    assert found["never"] == Fit("g", "never", 200, 0, "measured")
    assert found["flat"].tokens is None
    assert "alone" not in found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--geometries", "Llama-3"], "unknown geometry 'Llama-3'; known: Llama-3.1-8B, Llama-3.2-1B"),
        (["--specs", "treliss3"], "unknown codec 'treliss3'"),
        (["--contexts", "2k 1k"], "ascending, got (2048, 1024)"),
        (["--budget", "much"], "cannot read 'much' as a size"),
        (["--minutes", "0"], "minutes must be above 0, got 0.0"),
        (["--geometries", ""], "no geometry is named"),
    ],
)
def test_wrong_options_are_told(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["memory", *arguments, "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert said in result.output
    assert not list(tmp_path.iterdir())
