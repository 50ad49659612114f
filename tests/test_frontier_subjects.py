"""What `python -m benchmarks quality` measures on: hard variants, documents with facts, tensors, greedy paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks import spectra
from benchmarks.caches import UNCOMPRESSED, Contender, compressed
from benchmarks.cases import ModelCase, filled
from benchmarks.frontier_subjects import DATA, STORY_BEGINS, chunk_of, story_documents
from benchmarks.greedy import agreed, trajectory
from benchmarks.hard import harden
from benchmarks.passages import MOST_FACTS, SPACING, first_scored, plain_text, with_facts
from benchmarks.rows import empty_row
from benchmarks.spectra import TensorCase
from benchmarks.texts import Text, encode
from kvcompress import models
from tests.families import build

PROSE = " ".join(f"The {word} went over hill number {index} and came back." for index, word in enumerate("abcdef" * 80))
ROW = empty_row("subject", 0, 0, UNCOMPRESSED)


@pytest.fixture(scope="module")
def embedded() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return models.embedded()


@pytest.fixture(scope="module")
def text(embedded: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> Text:
    tokenizer = embedded[1]
    return Text(encode(tokenizer, PROSE), torch.tensor(tokenizer("").input_ids[:1]), "prose")


def cached(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, H, N, D] of every layer."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr, misc]


def test_a_hard_variant_is_the_same_function_with_outlier_channels(
    embedded: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    model, _ = embedded
    hard = harden(model, seed=3)
    ids = torch.randint(0, 4096, (1, 80), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, after = model(ids).logits, hard(ids).logits
    assert (before - after).abs().max() < 1e-4 * before.abs().max()  # float32 rounding
    for plain, changed in zip(cached(model, ids), cached(hard, ids), strict=True):
        for was, now in zip(plain, changed, strict=True):
            scales = (now / was).nanmedian(dim=2).values  # [1, H, D]: a channel is scaled as a whole
            torch.testing.assert_close(was * scales.unsqueeze(2), now, rtol=2e-2, atol=1e-3)
            assert scales.min() > 0.99
            assert scales.max() < 30.3
            assert scales.amax(dim=-1).min() > 15  # the largest of 32 log-uniform draws to 30 is above 15 nearly always
        scales = (changed[0] / plain[0]).nanmedian(dim=2).values
        torch.testing.assert_close(scales[..., :32], scales[..., 32:], rtol=2e-2, atol=0)  # pairs (i, i + D/2)


def test_hard_variants_are_drawn_by_their_seed(embedded: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    weights = [harden(embedded[0], seed).model.layers[0].self_attn.k_proj.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_biases_are_scaled_with_their_rows() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            torch.nn.init.normal_(getattr(layer.self_attn, name).bias)
    hard = harden(model, seed=0)
    ids = torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, hard(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "reason"), [("qwen3", "q_norm"), ("gpt2", "no list of layers")])
def test_a_model_that_cannot_be_hardened_is_refused(family: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        harden(build(family), seed=0)


def test_other_rotary_pairs_are_noticed() -> None:
    config = CohereConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="does not stay the same function"):
        harden(CohereForCausalLM(config).eval(), seed=0)  # its pairs are neighbours


@pytest.mark.parametrize("length", [1024, 2048])
def test_a_document_asks_for_a_single_needle_and_then_for_many_keys(
    embedded: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], text: Text, length: int
) -> None:
    _, tokenizer = embedded
    gap = chunk_of(512, length) + 128 + 64
    for seed in range(3):
        passage = with_facts(tokenizer, text, length, gap, seed)
        assert passage.ids.shape == (1, length)
        assert passage.length == length
        assert (len(passage.needle), len(passage.keys)) == (1, min(length // SPACING, MOST_FACTS))
        ids = passage.ids[0].tolist()
        (needle,) = passage.needle
        before = tokenizer.decode(ids[: needle.start])
        assert before.count("Note: the password") == 1  # no other fact before the single needle is asked for
        for answer in passage.needle + passage.keys:
            name = tokenizer.decode(ids[: answer.start]).rpartition(" of ")[2].removesuffix(" is")
            value = tokenizer.decode(ids[answer.start : answer.stop])
            stated = tokenizer.decode(ids).partition(f"the password of {name} is")[0]
            assert f"the password of {name} is{value}." in tokenizer.decode(ids)
            assert answer.start - len(encode(tokenizer, stated)) > gap
        scored = passage.scored(4096)
        assert scored[0] >= first_scored(length)
        assert bool((passage.text[scored] & passage.text[scored + 1]).all())
        assert "password" not in tokenizer.decode(passage.ids[0][passage.text])


def test_documents_are_drawn_by_their_seed(
    embedded: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], text: Text
) -> None:
    documents = [with_facts(embedded[1], text, 1024, 320, seed).ids for seed in (1, 1, 2)]
    assert torch.equal(documents[0], documents[1])
    assert not torch.equal(documents[0], documents[2])


def test_a_short_document_has_fewer_facts_or_none(
    embedded: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], text: Text
) -> None:
    few, none = with_facts(embedded[1], text, 1024, 400, 0), with_facts(embedded[1], text, 300, 200, 0)
    assert 0 < len(few.keys) < 1024 // SPACING
    assert (none.needle, none.keys, none.ids.shape) == ((), (), (1, 300))
    with pytest.raises(ValueError, match="too few for a document of 1000000"):
        with_facts(embedded[1], text, 10**6, 320, 0)


def test_scoring_starts_late_and_thins_out_for_a_large_vocabulary() -> None:
    assert [first_scored(n) for n in (100, 448, 1024, 4096)] == [50, 224, 512, 1024]
    passage = plain_text(torch.zeros(1, 4096, dtype=torch.int64))
    assert passage.scored(4096).tolist() == list(range(1024, 4095))
    few = passage.scored(150_000)
    assert (len(few), few[0], few[-1]) == (2**26 // 150_000, 1024, 4094)


def test_a_greedy_path_is_followed_to_its_first_difference() -> None:
    assert agreed([1, 2, 3], [1, 2, 3]) == 3
    assert agreed([1, 2, 9], [1, 2, 3]) == 2
    assert agreed([9], [1, 2, 3]) == 0
    model = build("llama")
    ids = torch.arange(1, 40).unsqueeze(0)
    own = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 39:].tolist()

    def path(expected: list[int] | None) -> list[int]:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            first = int(model(ids, past_key_values=cache).logits[0, -1].argmax())
        return trajectory(model, UNCOMPRESSED, cache, first, 12, expected)

    assert path(None) == own
    assert path(own) == own
    other = [*own[:5], -1, *own[6:]]
    assert path(other) == own[:6]  # it stops once it has left the expected path


def test_a_model_case_measures_a_cache_and_says_what_is_wrong_with_another(
    embedded: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], text: Text
) -> None:
    model, tokenizer = embedded
    case = ModelCase(model, [with_facts(tokenizer, text, 1024, 320, 0)], 128, greedy=4)
    rows = {name: filled(case, compressed(name), ROW) for name in ("exact", "lloyd2")}
    assert rows["exact"].status == "ok"
    assert rows["exact"].kl_mean is not None
    assert rows["exact"].kl_mean < 1e-6  # float32 rounding
    assert rows["exact"].top1_agreement == 1.0
    assert rows["exact"].greedy_tokens == 4
    assert (rows["exact"].needle_questions, rows["exact"].key_questions) == (1, 8)
    base = filled(case, UNCOMPRESSED, ROW)
    assert (base.kl_mean, base.greedy_tokens, base.bits_per_element) == (0.0, 4, None)
    assert base.bytes == base.uncompressed_bytes == 1024 * 2 * 5 * 2 * 64 * 4  # tokens, sides, layers, heads, D, bytes
    assert rows["exact"].key_recall == base.key_recall
    assert rows["lloyd2"].kl_mean is not None
    assert rows["lloyd2"].kl_mean > 1e-3  # two bits lose something that can be seen
    assert 2 < (rows["lloyd2"].bits_per_element or 0) < 2.5  # a 16-bit gain for 64 elements, means and tables

    def refused(config: object) -> DynamicCache:
        raise ValueError("heads of 64 are not supported\nand more")

    def broken(config: object) -> DynamicCache:
        raise RuntimeError("no such kernel")

    rows = {str(make): filled(case, Contender("x", "tests", make), ROW) for make in (refused, broken)}  # type: ignore[arg-type]
    reasons = [(row.status, row.reason) for row in rows.values()]
    assert reasons == [
        ("not supported", "heads of 64 are not supported"),
        ("failed", "RuntimeError: no such kernel"),
    ]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like kv_spectra.json, of two heads whose eigenvalues are 100 and then 10 / rank."""
    top = [100.0, *(10.0 / rank for rank in range(2, 33))]
    heads = {f"layer_{n}_head_0_{side}": top for n in (1, 2) for side in ("keys", "values")}
    path = tmp_path_factory.mktemp("spectra") / "kv_spectra.json"
    path.write_text(json.dumps({"model": {"head_dim": 64, "uncentred_top32_eigenvalues": heads}}))
    return path


def test_spectra_are_extended_by_their_power_law(figures: Path) -> None:
    width, heads = spectra.spectra(figures)
    assert (width, len(heads)) == (64, 2)
    full = spectra.extended(heads[0][0], width)
    torch.testing.assert_close(full[1:], 10 / torch.arange(2, 65))


def test_synthetic_tensors_have_the_second_moment_that_they_are_made_from(figures: Path) -> None:
    made = spectra.synthesise(figures, 20_000, seed=0)
    assert made.key.shape == made.value.shape == (1, 2, 20_000, 64)
    assert made.query.shape == (1, 2 * spectra.QUERY_HEADS, 20_000, 64)
    wanted = spectra.extended(spectra.spectra(figures)[1][0][0], 64)
    for x, share in ((made.key, 0.95), (made.value, 0.5)):
        tokens = x[0, 0, spectra.SINKS :]
        moment = tokens.mT @ tokens / len(tokens)
        found = torch.linalg.eigvalsh(moment).flip(0)
        torch.testing.assert_close(found, wanted, rtol=0.15, atol=0.02)  # heavy-tailed samples of 20,000
        assert tokens.mean(dim=0).square().sum().item() == pytest.approx(share * 100, rel=0.05)
    sinks, others = (part.norm(dim=-1) for part in made.value[0].split([spectra.SINKS, 19_996], dim=1))
    assert sinks.mean() < 0.1 * others.mean()
    keys = made.key[0].repeat_interleave(spectra.QUERY_HEADS, dim=0)
    scores = made.query[0, :, -200:] @ keys.mT / 8  # the square root of 64
    share_of_sink = (scores.softmax(dim=-1)[..., 0]).mean()
    assert 0.1 < share_of_sink < 0.7  # about a third is aimed at, for scores that are not heavy-tailed


def test_attention_over_tensors_tells_caches_apart(figures: Path) -> None:
    case = TensorCase(spectra.synthesise(figures, 768, seed=0), chunk=96)
    rows = {name: filled(case, compressed(name), ROW) for name in ("exact", "lloyd2", "lloyd4")}
    assert [row.status for row in rows.values()] == ["ok"] * 3
    errors = {name: row.output_error or 0.0 for name, row in rows.items()}
    assert errors["exact"] < 1e-8  # float32 rounding
    assert 4 < errors["lloyd2"] / errors["lloyd4"] < 40  # two bits more: 12 dB, a factor of 16, of linear error
    assert rows["lloyd4"].scored_positions == 768 - 384
    assert 4 < (rows["lloyd4"].bits_per_element or 0) < 4.6
    refused = filled(case, compressed("lloyd2,layer7=lloyd4"), ROW)
    assert refused.status == "not supported"


def test_chunks_are_an_eighth_of_a_short_context() -> None:
    assert [chunk_of(512, n) for n in (64, 448, 1024, 4096, 8192)] == [8, 56, 128, 512, 512]


@pytest.mark.skipif(not (DATA / "stories260k").exists(), reason="the stories260k model is not beside the repository")
def test_story_documents_begin_with_a_story() -> None:
    documents = story_documents(DATA / "stories260k" / "tinystories_ids.npy", 448, seed=1)
    assert [document.ids.shape for document in documents] == [(1, 448)] * 4
    assert {int(document.ids[0, 0]) for document in documents} == {STORY_BEGINS}


@pytest.mark.skipif(not (DATA / "spectra").exists(), reason="the spectra are not beside the repository")
def test_the_spectra_beside_the_repository_can_be_read() -> None:
    width, heads = spectra.spectra(DATA / "spectra" / "kv_spectra.json")
    assert (width, len(heads)) == (128, 6)
    full = spectra.extended(heads[0][0], width)
    assert bool((full.diff() <= 0).all())
