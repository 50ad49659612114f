"""`MemoryReport` against storage counted by hand; `plan` against arithmetic and against real caches."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, DeepseekV3Config, DynamicCache, Gemma2Config, LlamaConfig, LlamaForCausalLM

import kvcompress
from kvcompress import CacheSpec
from kvcompress.codecs import Geometry
from kvcompress.memory import storage_bytes
from kvcompress.planning import PlanRow, load_config, parse_count, parse_size, plan
from kvcompress.store import PAGE

GIB = 2**30


def llama_8b(**changes: object) -> LlamaConfig:
    """The shape of Llama-3.1-8B."""
    shape = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    return LlamaConfig(**{**shape, **changes})


def tiny_llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )


@pytest.fixture(scope="module")
def big_plan() -> kvcompress.Plan:
    return plan(llama_8b(), context="1M", spec="trellis3")


def row(of: kvcompress.Plan, context: int) -> PlanRow:
    return next(row for row in of.rows if row.context == context)


class TestReport:
    report = kvcompress.MemoryReport(
        codes=3000, scales=100, means=20, bases=0, tables=5, exact=875, tokens=64, coded_elements=8000, elements=9000,
        uncompressed=18000,
    )  # fmt: skip

    def test_derived_numbers(self) -> None:
        assert self.report.total == 4000
        assert self.report.bits_per_element == 8 * 3125 / 8000
        assert self.report.effective_bits_per_element == 8 * 4000 / 9000
        assert self.report.compression == 4.5

    def test_layers_add_and_share_their_tokens(self) -> None:
        double = self.report + replace(self.report, tokens=32)
        assert (double.total, double.elements, double.tokens) == (8000, 18000, 64)
        assert sum([self.report, self.report], kvcompress.MemoryReport.nothing()).total == 8000
        with pytest.raises(TypeError):
            self.report + 1  # type: ignore[operator]

    def test_nothing_has_no_ratios(self) -> None:
        nothing = kvcompress.MemoryReport.nothing()
        assert math.isnan(nothing.bits_per_element)
        assert math.isnan(nothing.effective_bits_per_element)
        assert math.isnan(nothing.compression)
        assert str(nothing) == "cache: empty"

    def test_text_names_what_there_is(self) -> None:
        text = str(self.report)
        assert "64 tokens" in text
        assert "4.50x" in text
        assert "3.12 bits per coded element" in text
        assert "bases" not in text  # 0 bytes

    def test_storage_is_counted_once_and_whole(self) -> None:
        x = torch.zeros(100, dtype=torch.float32)
        assert storage_bytes([x, x[:10], x.view(10, 10)]) == 400
        assert storage_bytes([x[:10]]) == 400  # a view keeps all of it alive
        assert storage_bytes([x, torch.zeros(3, dtype=torch.uint8)]) == 403
        assert storage_bytes([]) == 0


class TestLlama:
    """32 layers, 8 KV heads of 128: 2 x 32 x 8 x 128 x 2 bytes = 128 KiB a token in bfloat16."""

    def test_uncompressed_sizes(self, big_plan: kvcompress.Plan) -> None:
        assert row(big_plan, 131072).uncompressed == 16 * GIB
        assert row(big_plan, 2**20).uncompressed == 128 * GIB

    def test_weights_are_the_published_parameter_count(self, big_plan: kvcompress.Plan) -> None:
        assert big_plan.parameters == 8_030_261_248
        assert big_plan.weights == 2 * 8_030_261_248

    def test_compressed_size_by_hand(self, big_plan: kvcompress.Plan) -> None:
        """trellis3 at head_dim 128: 3 bits and a scale of 16 bits a vector; exact: 4 sinks, 128 recent, one page."""
        context = 2**20
        pages = (context - 4 - 128) // 64
        codes = pages * 64 * 2 * 32 * 8 * (3 * 128 + 16) / 8
        exact = (4 + 128 + 64) * 128 * 1024
        means = 2 * 32 * 8 * 128 * 4
        assert row(big_plan, context).compressed == codes + exact + means

    def test_contexts_are_powers_of_two_up_to_what_was_asked(self, big_plan: kvcompress.Plan) -> None:
        assert [r.context for r in big_plan.rows] == [2**i for i in range(12, 21)]
        assert [r.context for r in plan(tiny_llama(), context=10_000).rows] == [4096, 8192, 10_000]
        assert [r.context for r in plan(tiny_llama(), context=100).rows] == [100]

    def test_what_fits_and_the_largest_context_agree(self, big_plan: kvcompress.Plan) -> None:
        assert big_plan.activations is not None
        available = 80 * 10**9 - big_plan.weights - 2 * GIB - big_plan.activations
        assert big_plan.largest_context_uncompressed == available // (128 * 1024)
        largest = big_plan.largest_context_compressed
        assert largest is not None
        assert row(plan(llama_8b(), context=largest, spec="trellis3"), largest).fits_compressed
        assert not row(plan(llama_8b(), context=largest + PAGE, spec="trellis3"), largest + PAGE).fits_compressed
        assert [(r.context <= 2**18, True) for r in big_plan.rows] == [
            (r.fits_uncompressed, r.fits_compressed) for r in big_plan.rows
        ]

    def test_batch_multiplies(self) -> None:
        one, three = plan(tiny_llama()), plan(tiny_llama(), batch=3)
        assert three.rows[-1].uncompressed == 3 * one.rows[-1].uncompressed
        assert three.rows[-1].compressed == 3 * one.rows[-1].compressed
        assert three.weights == one.weights

    def test_weight_bits_and_dtype(self) -> None:
        full, small = plan(tiny_llama()), plan(tiny_llama(), weight_bits=4, dtype=torch.float32)
        assert small.weights * 4 == full.weights
        assert small.rows[0].uncompressed == 2 * full.rows[0].uncompressed

    def test_layers_of_their_own(self) -> None:
        plain, mixed = plan(tiny_llama(), spec="trellis3"), plan(tiny_llama(), spec="trellis3,layer0=exact")
        exact = plan(tiny_llama(), spec="exact")
        middle = (plain.rows[-1].compressed + exact.rows[-1].compressed) / 2
        assert mixed.rows[-1].compressed == middle
        with pytest.raises(ValueError, match="layer 2, but the model has 2 layers"):
            plan(tiny_llama(), spec="trellis3,layer2=exact")

    def test_too_small_a_gpu(self) -> None:
        small = plan(llama_8b(num_hidden_layers=2), gpu_memory="1GB")
        assert (small.largest_context_uncompressed, small.largest_context_compressed) == (0, 0)
        assert not small.rows[0].fits_compressed
        assert any("do not fit" in note for note in small.notes)

    def test_text(self, big_plan: kvcompress.Plan) -> None:
        text = str(big_plan)
        assert "Computed from the config, not measured." in text
        assert "1,048,576" in text
        assert "128.00 GiB" in text
        assert "the config states 131,072 positions" in text


@pytest.mark.parametrize(
    "spec",
    [
        "trellis3",
        "trellis:k4v2,sinks=0,window=0",
        "fp8",
        "exact",
        "lloyd2,window=33",
        "spectral3",
        "key=kivi2,value=jointrank32",
        "trellis4/trellis2",
    ],
)
@pytest.mark.parametrize("tokens", [5, 130, 500, 777])
def test_a_plan_bounds_what_a_real_cache_holds(spec: str, tokens: int) -> None:
    """From above, to within a page of exact tokens, or those that a codec learns from beyond the window."""
    config = tiny_llama()
    cache = kvcompress.CompressedCache(config, spec)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model(torch.zeros(2, tokens, dtype=torch.int64), past_key_values=cache)
    held = cache.memory()
    in_memory = held.total - held.tables  # page tables live on the CPU
    planned = row(plan(config, tokens, spec, batch=2, dtype=torch.float32), tokens)
    token = 2 * 2 * 2 * 2 * 32 * 4  # rows, layers, sides, heads, numbers, bytes
    assert planned.uncompressed == held.uncompressed
    assert in_memory <= planned.compressed
    parsed = CacheSpec.parse(spec)
    learned = max(
        codec.build(Geometry(32, side, 2)).fit_tokens for side, codec in enumerate((parsed.key, parsed.value))
    )
    assert planned.compressed <= in_memory + token * max(PAGE, learned - parsed.window)


def test_sliding_layers_stop_growing() -> None:
    """Every other layer of gemma2 slides: 4 KV heads of 256, window 4096."""
    config = Gemma2Config()
    window, full = (13 * 4 * (256 + 256) * 2 * tokens for tokens in (4096, 32768))
    made = plan(config, context=32768)
    assert made.compressed_layers == 13
    assert made.rows[-1].uncompressed == window + full
    assert row(made, 4096).uncompressed == 2 * window
    assert made.rows[-1].compressed > window
    assert any("13 of 26 layers hold at most 4,096 tokens" in note for note in made.notes)


def test_only_sliding_layers_fit_at_any_length() -> None:
    shape = {name: value for name, value in tiny_llama().to_dict().items() if name != "model_type"}
    config = AutoConfig.for_model("mistral", **{**shape, "sliding_window": 128})
    made = plan(config, context="1M")
    assert (made.compressed_layers, made.largest_context_uncompressed) == (0, None)
    assert made.rows[0].uncompressed == made.rows[-1].compressed == 2 * 2 * 2 * 32 * 2 * 128
    assert "any" in str(made)


def test_mla_latents_are_held_as_they_are() -> None:
    """deepseek_v3 stores 512 latents and 64 rotated numbers a token and layer."""
    made = plan(DeepseekV3Config(), context=4096, gpu_memory="2TB")
    assert made.parameters == 671_026_404_352
    assert made.rows[0].uncompressed == made.rows[0].compressed == 61 * 4096 * (512 + 64) * 2
    assert made.largest_context_uncompressed == made.largest_context_compressed
    assert any("576 numbers a token" in note for note in made.notes)


def test_per_layer_head_sizes_and_shared_layers() -> None:
    """gemma4's full layers have their own head size: what a plan counts is what the model really caches."""
    config = AutoConfig.for_model(
        "gemma4_text", vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=32, sliding_window=8, vocab_size_per_layer_input=64,
        layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=0,
    )  # fmt: skip
    made = plan(config, context=1000)
    cache = DynamicCache(config=config)
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        AutoModelForCausalLM.from_config(config).eval()(torch.zeros(1, 20, dtype=torch.int64), past_key_values=cache)
    per_token = [2 * layer.keys.shape[1] * layer.keys.shape[3] * 2 for layer in cache.layers]
    assert made.rows[0].uncompressed == sum(b * n for b, n in zip(per_token, [8, 1000] * 2, strict=True))


def test_states_of_linear_layers_are_counted() -> None:
    config = AutoConfig.for_model("falcon_h1", num_hidden_layers=2, vocab_size=64)
    made = plan(config, context=4096)
    grown = plan(config, context=8192).rows[-1].uncompressed - made.rows[0].uncompressed
    assert made.compressed_layers == 2
    assert made.rows[0].uncompressed > grown  # 4096 tokens more take what the first took, without the states


class TestConfigs:
    def test_folder_and_file(self, tmp_path: Path) -> None:
        tiny_llama().save_pretrained(tmp_path)
        expected = plan(tiny_llama()).rows
        for source in (tmp_path, str(tmp_path), tmp_path / "config.json"):
            assert plan(source).rows == expected
            assert plan(source).model == str(source)

    def test_missing_folder(self) -> None:
        with pytest.raises(OSError, match=r"no folder or config.json at 'nothing/here'"):
            load_config("./nothing/here")

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(name: str) -> None:
            raise OSError("We couldn't connect to 'https://huggingface.co'\nCheck your connection.")

        monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
        with pytest.raises(OSError, match=r"'org/model'.*no folder or config.json here.*couldn't connect"):
            load_config("org/model")

    def test_the_users_config_is_left_alone(self) -> None:
        config = tiny_llama()
        config._attn_implementation = "sdpa"
        before = json.dumps(config.to_dict(), default=str)
        plan(config)
        assert json.dumps(config.to_dict(), default=str) == before
        assert config._attn_implementation == "sdpa"

    @pytest.mark.parametrize(
        ("model_type", "message"),
        [("t5", "encoder-decoder"), ("vit", "no causal language model"), ("rwkv", "keeps no cache")],
    )
    def test_other_models(self, model_type: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            plan(AutoConfig.for_model(model_type, num_hidden_layers=1))

    def test_wrong_type(self) -> None:
        with pytest.raises(TypeError, match="got int"):
            plan(7)  # type: ignore[arg-type]

    def test_head_size_that_the_codec_does_not_take(self) -> None:
        config = LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=6)
        with pytest.raises(ValueError, match="head_dim"):
            plan(config)

    @pytest.mark.parametrize(
        "bad",
        [{"batch": 0}, {"weight_bits": 0}, {"context": 0}, {"gpu_memory": -1}, {"reserve": "much"}, {"spec": "x"}],
    )
    def test_arguments_out_of_range(self, bad: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
            plan(tiny_llama(), **bad)  # type: ignore[arg-type]


class TestParsing:
    @pytest.mark.parametrize(
        ("text", "size"),
        [("80GB", 80 * 10**9), ("80 GiB", 80 * GIB), ("1.5gib", 3 * 2**29), ("512MB", 512 * 10**6), ("7 B", 7), (9, 9)],
    )
    def test_sizes(self, text: str | int, size: int) -> None:
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["80", "GB", "-1GB", "80G", "80 apples", "", "1e3GB", -1, True, 2.5, None])
    def test_bad_sizes(self, text: object) -> None:
        with pytest.raises(ValueError, match=r"as a size: expected a number and a unit \(B, KB, .*GiB"):
            parse_size(text)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("text", "count"), [("128k", 131072), ("1M", 2**20), ("0.5m", 2**19), ("1.5K", 1536), (" 10 ", 10), (3, 3)]
    )
    def test_counts(self, text: str | int, count: int) -> None:
        assert parse_count(text) == count

    @pytest.mark.parametrize("text", ["", "k", "1.3k", "0", "-5", "1G", 0, -1, True, 2.0, None])
    def test_bad_counts(self, text: object) -> None:
        with pytest.raises(ValueError, match="as a number of tokens: expected 1 or more"):
            parse_count(text)  # type: ignore[arg-type]
