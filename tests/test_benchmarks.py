"""The benchmarks measure what they say: storage, KL, recall, and a whole small run of `python -m benchmarks quick`."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    QuantizedCache,
)
from transformers.utils import is_optimum_quanto_available
from typer.testing import CliRunner

from benchmarks import caches, needles, quality, quick, results, storage, texts
from benchmarks.__main__ import app
from benchmarks.caches import UNCOMPRESSED, Contender
from benchmarks.embedded import report
from benchmarks.embedded.corpus import END, HELD_OUT_MODULES, standard_library, train_tokenizer
from benchmarks.recall import draw_facts
from kvcompress import CompressedCache

PROSE = " ".join(f"{word} number {index} went over the hill and came back." for index, word in enumerate("abcdef" * 60))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    facts = draw_facts(random.Random(0), 60)
    trained = train_tokenizer([PROSE] + [fact.statement + fact.question for fact in facts])
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token=END, eos_token=END, pad_token=END)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(PROSE)
    return tmp_path


def ignore(tokens: int) -> None:
    """Nobody watches the progress here."""


class Stub:
    """A model by rule: `follow(ids so far) -> next id`, None: every id alike. What it saw is in the cache."""

    def __init__(self, follow: Any, vocabulary: int):
        self.follow, self.vocabulary = follow, vocabulary
        self.config, self.device = SimpleNamespace(_attn_implementation="none"), torch.device("cpu")

    def __call__(self, ids: Tensor, past_key_values: list[int], use_cache: bool, logits_to_keep: Tensor) -> Any:
        before = len(past_key_values)
        past_key_values += ids[0].tolist()
        logits = torch.zeros(1, len(logits_to_keep), self.vocabulary)
        for row, place in enumerate(logits_to_keep.tolist() if self.follow else []):
            logits[0, row, self.follow(past_key_values[: before + place + 1])] = 9.0
        return SimpleNamespace(logits=logits)

    def set_attn_implementation(self, name: str) -> None:
        """There is nothing to set."""


STUB = Contender("stub", "tests", lambda config: [])  # type: ignore[arg-type, return-value]


def copying(ids: list[int], reach: int | None = None) -> int:
    """What followed the longest earlier match of the last tokens (at least two), as an induction head would say."""
    seen = ids if reach is None else ids[-reach:]
    best, answer = 1, 0
    for stop in range(2, len(seen)):
        length = 0
        while length < stop and seen[stop - 1 - length] == seen[-1 - length]:
            length += 1
        if length > best:
            best, answer = length, seen[stop]
    return answer


def test_training_never_saw_the_held_out_modules() -> None:
    held_out, trained = standard_library(held_out=True), set(standard_library(held_out=False))
    assert len(held_out) == len(HELD_OUT_MODULES)
    assert not trained & set(held_out)


def test_storage_counts_a_known_tensor_exactly_and_once() -> None:
    whole = torch.zeros(3, 5, dtype=torch.float32)  # 60 bytes
    held = {"a": whole, "view": whole[1], "more": ([torch.zeros(7, dtype=torch.int8)], "no tensor", None)}
    assert storage.nbytes(held) == 60 + 7
    assert storage.count(held) == 15 + 5 + 7


def test_footprint_of_an_uncompressed_cache() -> None:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 10, 8), torch.zeros(1, 2, 10, 8), layer)
    size = storage.footprint(cache, cache)
    assert size.total == size.uncompressed == 2 * 2 * (2 * 10 * 8) * 4  # layers x sides x elements x bytes
    assert (size.bits_per_element, size.effective_bits_per_element, size.compression) == (None, 32.0, 1.0)


@pytest.mark.skipif(not is_optimum_quanto_available(), reason="optimum-quanto is not installed")
def test_footprint_of_a_quantised_cache_is_its_codes_scales_and_exact_tokens(model: LlamaForCausalLM) -> None:
    cache, reference = caches.quantized("quanto", 4).make(model.config), DynamicCache(config=model.config)
    assert isinstance(cache, QuantizedCache)
    for tokens in (256, 10):  # 256 are quantised, 10 stay exact
        for layer in range(2):
            key, value = torch.randn(2, 1, 1, tokens, 64)
            cache.update(key, value, layer)
            reference.update(key, value, layer)
    size = storage.footprint(cache, reference)
    assert size.bits_per_element == 4 + 2 * 32 / 64  # a float32 scale and shift for every group of 64
    assert size.effective_bits_per_element == pytest.approx((256 * 5 + 10 * 32) / 266)


def test_footprint_of_ours_is_the_memory_report(model: LlamaForCausalLM) -> None:
    cache = CompressedCache(model.config, "trellis3")
    reference = DynamicCache(config=model.config)
    with torch.inference_mode(), caches.compressed("trellis3").attending(model):
        for held in (cache, reference):
            model(torch.ones(1, 400, dtype=torch.long), past_key_values=held)
    size = storage.footprint(cache, reference)
    assert size.total == cache.memory().total
    assert size.uncompressed == storage.footprint(reference, reference).total
    assert model.config._attn_implementation != "kvcompress"  # restored


def test_divergence_of_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    assert quality.divergence(p.log(), q.log()).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    score = quality.compare([p.log()], [q.log()], [torch.tensor([0])])
    assert score.perplexity == pytest.approx(4.0)
    assert score.positions == 1


def test_positions_skip_the_start_and_thin_out_for_a_large_vocabulary() -> None:
    assert quality.scored_positions(4096, 4096).tolist() == list(range(512, 4095))
    assert quality.scored_positions(100, 4096).tolist() == list(range(25, 99))
    few = quality.scored_positions(4096, 150_000)
    assert len(few) == quality.MOST_LOGITS // 150_000
    assert (few[0], few[-1]) == (512, 4094)
    assert few.diff().min() > 0


def test_predictions_do_not_depend_on_the_chunk(model: LlamaForCausalLM) -> None:
    ids = torch.randint(0, model.config.vocab_size, (1, 90), generator=torch.Generator().manual_seed(0))
    positions = quality.scored_positions(90, model.config.vocab_size)
    whole, cut = (quality.predict(model, UNCOMPRESSED, ids, positions, n, ignore).log_probs for n in (90, 7))
    torch.testing.assert_close(whole, cut, atol=1e-4, rtol=0)  # float32 sums in another order


@pytest.mark.parametrize("facts", [1, 5, 12])
def test_a_document_has_its_length_and_its_facts_lie_before_the_gap(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, facts: int
) -> None:
    (tmp_path / "text.txt").write_text(PROSE)
    text = texts.load(tokenizer, tmp_path / "text.txt", seed=0)
    (document,) = needles.documents(tokenizer, text, 1, 700, facts, gap=100, seed=3)
    assert document.ids.shape == (1, 700)
    assert document.ids[0, 0] == tokenizer.bos_token_id
    assert len(document.answers) == facts
    ids = document.ids[0].tolist()
    stated = {fact.name: fact.value for fact in draw_facts(random.Random(3), facts)}
    answers = {tokenizer.decode(ids[a.start : a.stop]).strip() for a in document.answers}
    assert answers == set(stated.values())
    first_question = min(answer.start for answer in document.answers) - 20  # a question takes fewer than 20 tokens
    assert "Note:" not in tokenizer.decode(ids[first_question - 60 :])
    assert tokenizer.decode(ids).count("Note:") == facts


def test_no_room_for_the_facts_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    facts = draw_facts(random.Random(0), 20)
    with pytest.raises(ValueError, match="leave no room for text in 200"):
        needles.build(tokenizer, torch.zeros(1, 200, dtype=torch.long), facts, facts, gap=50)


def test_recall_is_full_for_a_model_that_copies_and_none_for_one_that_forgets(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(PROSE)
    text = texts.load(tokenizer, tmp_path / "text.txt", seed=0)
    (document,) = needles.documents(tokenizer, text, 1, 600, 6, gap=100, seed=1)
    memory, short = Stub(copying, len(tokenizer)), Stub(lambda ids: copying(ids, reach=60), len(tokenizer))
    assert needles.answered(memory, STUB, document, 64, ignore) == [True] * 6  # type: ignore[arg-type]
    assert needles.answered(short, STUB, document, 64, ignore) == [False] * 6  # type: ignore[arg-type]


def test_bits_per_byte_of_a_model_that_knows_nothing(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(PROSE)
    text = texts.load(tokenizer, tmp_path / "text.txt", seed=0)
    windows = text.windows(2, 600)
    scored = [tokenizer.decode(window[0, -report.SCORED :]) for window in windows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "UNCOMPRESSED", STUB)
        bits = report.bits_per_byte(Stub(None, 2**12), tokenizer, windows, 400)  # type: ignore[arg-type]
    assert bits == pytest.approx(12 * 2 * report.SCORED / sum(len(text.encode()) for text in scored))


def test_quick_writes_lines_table_and_plot(folder: Path) -> None:
    command = ["quick", "--model", str(folder / "model"), "--text", str(folder / "text.txt"), "--context", "500"]
    command += ["--chunk", "64", "--documents", "1", "--facts", "3", "--step-context", "300", "--steps", "2"]
    command += ["--specs", "exact lloyd3 lloyd3,window=16", "--output", str(folder / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = {row["cache"]: row for row in map(json.loads, (folder / "out" / "results.jsonl").read_text().splitlines())}
    assert set(rows) == {contender.name for contender in caches.contenders(("exact", "lloyd3", "lloyd3,window=16"))}
    for row in rows.values():
        assert row["status"] in ("ok", "not installed"), row["reason"]
        assert row["settings"]["chunk"] == 64
        assert {"versions", "platform", "commit", "cores", "threads"} <= row.keys()
        assert {"kvcompress", "torch", "transformers", "python"} <= row["versions"].keys()
        if row["status"] == "ok":
            assert row["questions"] == 3
            assert row["scored_positions"] == 500 - 1 - 125
            assert min(row[name] for name in ("bytes", "perplexity", "step_ratio", "prefill_tokens_per_second")) > 0
    assert rows["uncompressed"]["kl_mean"] == 0.0
    assert rows["uncompressed"]["step_ratio"] == 1.0
    assert rows["exact"]["kl_mean"] < 1e-6  # float32 rounding only
    assert rows["exact"]["top1_agreement"] == 1.0
    assert rows["lloyd3"]["kl_mean"] > 1e-4  # three bits lose something that can be seen
    assert rows["lloyd3"]["spec"]["key"] == {"name": "lloyd", "bits": 3}
    assert rows["lloyd3,window=16"]["bytes"] < rows["lloyd3"]["bytes"] < rows["uncompressed"]["bytes"]
    assert "| lloyd3 |" in (folder / "out" / "table.md").read_text()
    assert (folder / "out" / "bits-kl.png").read_bytes().startswith(b"\x89PNG")
    assert "results.jsonl" in done.output


def test_what_is_missing_or_fails_is_said_with_its_reason(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: LlamaConfig) -> DynamicCache:
        raise RuntimeError("no such kernel\nand much more")

    chosen = [
        UNCOMPRESSED,
        Contender("broken", "tests", broken),
        replace(UNCOMPRESSED, name="absent", missing="absent is not installed"),
    ]
    monkeypatch.setattr(quick, "contenders", lambda *_: chosen)
    (tmp_path / "text.txt").write_text(PROSE)
    settings = quick.Settings(text=tmp_path / "text.txt", context=300, documents=0, chunk=100, step_context=0)
    text = texts.load(tokenizer, settings.text, seed=0)
    with quick.Progress(disable=True) as progress:
        rows = {row.cache: row for row in quick.measure(model, tokenizer, text, settings, progress)}
    assert rows["uncompressed"].status == "ok"
    assert (rows["broken"].status, rows["broken"].reason) == ("failed", "RuntimeError: no such kernel")
    assert (rows["absent"].status, rows["absent"].reason) == ("not installed", "absent is not installed")
    assert results.remarks(list(rows.values())) == [
        "broken: failed: RuntimeError: no such kernel",
        "absent: not installed: absent is not installed",
    ]


def test_a_wide_table_is_cut_to_the_width_and_loses_no_column() -> None:
    rows = [results.Result("QuantizedCache quanto4", "transformers", None, bytes=123_456_789, kl_mean=1e-3)]
    for width in (60, 80, 200):
        tables = results.rich_tables(rows, "title", width)
        headings = [column.header for table in tables for column in table.columns if column.header != "cache"]
        assert headings == [heading for heading, _, _ in results.COLUMNS]
        console = Console(width=width)
        assert all(console.measure(table).minimum <= width for table in tables)


def test_settings_shrink_to_what_the_text_holds(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(PROSE)
    text = texts.load(tokenizer, tmp_path / "text.txt", seed=0)
    held = len(text.ids) + 1  # with the opening token
    settings = quick.fitted(quick.Settings(context=10**6, passages=3), text)
    assert (settings.context, settings.passages) == (held, 1)
    assert text.windows(1, held)[0].shape == (1, held)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--specs", "trelis3"], "trellis"),
        (["--chunk", "0"], "chunk must be at least 1"),
        (["--step-context", "5"], "step_context"),
        (["--text", "/nowhere/text.txt"], "/nowhere/text.txt"),
    ],
)
def test_bad_options_are_told_without_a_traceback(folder: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["quick", "--model", str(folder / "model"), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
