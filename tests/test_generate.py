"""generate() in all its ways on a compressed cache, and wrap()."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedModel, StaticCache

import kvcompress
from kvcompress import CacheSpec, CompressedCache
from kvcompress.generation import unwrap, wrap
from tests.families import build, coded_pages, left_padded, prompt

EXACT = CacheSpec(key="exact", value="exact", sinks=4, window=32)
TRELLIS = CacheSpec("trellis4", "trellis2", window=32)
SPECS = {"exact": EXACT, "trellis3": TRELLIS}
LONG, SHORT, NEW = 180, 140, 24  # tokens: both rows have pages with either codec (trellis3 waits for 4 + 128)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return build("llama")


@pytest.fixture
def fresh() -> LlamaForCausalLM:
    """A model that the test may change, with transformers' own attention."""
    return build("llama", "sdpa")


def inputs(padded: bool = False, rows: int = 2) -> dict[str, Tensor]:
    ids = prompt(rows, LONG)
    if not padded:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ids, mask = left_padded([ids[0], ids[1, :SHORT]])
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, cache: object, given: dict[str, Tensor], new: int = NEW, **options) -> Tensor:
    torch.manual_seed(7)
    options = {"do_sample": False} | options
    return model.generate(**given, past_key_values=cache, max_new_tokens=new, **options)


def new_cache(model: PreTrainedModel, codec: str) -> CompressedCache:
    return CompressedCache(model.config, SPECS[codec])


def dynamic(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


@torch.no_grad()
def feed(model: PreTrainedModel, cache: object, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The logits of one forward pass, with the positions that generate() would give."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits


def assert_same_codes(first: CompressedCache, second: CompressedCache, rows: tuple[int, int] = (0, 0), layer: int = 0):
    """The same full pages, codes bit by bit, as many as both have and at least one.

    Only layer 0's keys and values depend on tokens and positions alone; deeper ones follow from what attention made of
    codes. The model's own matrix products round otherwise for another number of rows: what is stored as floating-point
    numbers may differ in the last place of a float16 (gains), or of a float32 (exact).
    """
    mine, yours = (coded_pages(cache, layer, row) for cache, row in zip((first, second), rows, strict=True))
    assert mine.keys() == yours.keys()
    assert mine
    for name in mine:
        count = min(len(mine[name]), len(yours[name]))
        tolerance = 0.0 if not mine[name].is_floating_point() else 2e-3 if name.endswith("gain") else TOLERANCE
        torch.testing.assert_close(mine[name][:count], yours[name][:count], rtol=tolerance, atol=tolerance, msg=name)


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "beams-sampling": {"num_beams": 3, "do_sample": True},
    "returns": {"do_sample": True, "num_return_sequences": 2},
    "beams-returns": {"num_beams": 3, "num_return_sequences": 3},
    "chunked": {"prefill_chunk_size": 37},
}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("mode", MODES)
def test_exact_gives_the_same_tokens(llama: LlamaForCausalLM, mode: str, padded: bool):
    """The same seed, the same tokens as with transformers' cache."""
    cache = new_cache(llama, "exact")
    found = generate(llama, cache, inputs(padded), **MODES[mode])
    assert torch.equal(found, generate(llama, dynamic(llama), inputs(padded), **MODES[mode]))
    assert cache.memory().coded_elements > 0
    assert cache.stats()["materialised"] == 0


@pytest.mark.parametrize("mode", ["lookup", "assistant"])
@pytest.mark.parametrize("codec", SPECS)
def test_speculative_decoding(llama: LlamaForCausalLM, codec: str, mode: str):
    """Tokens that are taken back were never coded: what is stored is what the kept ones alone would give."""
    ids = prompt(1, 60).repeat(1, 3)  # repetitions, so that some guesses hold
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"lookup": {"prompt_lookup_num_tokens": 3}, "assistant": {"assistant_model": build("llama", seed=1)}}[
        mode
    ]
    cache = new_cache(llama, codec)
    # 80 tokens: more than a page closes while guesses come and go
    found = generate(llama, cache, given, new=80, **options)
    assert found.shape == (1, ids.shape[1] + 80)
    if codec == "exact":
        assert torch.equal(found, generate(llama, dynamic(llama), given, new=80))
    at_once = new_cache(llama, codec)
    feed(llama, at_once, found)
    assert_same_codes(cache, at_once)
    assert len(coded_pages(cache, 0, 0)["key.0.codes"]) >= 3  # (260 - 1 - 4 - 32) / 64 = 3.5 at the end


def test_trellis3_sampling_repeats(llama: LlamaForCausalLM):
    first, second = (generate(llama, new_cache(llama, "trellis3"), inputs(True), do_sample=True) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("mode", ["greedy", "beams", "chunked"])
@pytest.mark.parametrize("codec", SPECS)
def test_padded_row_is_the_row_alone(llama: LlamaForCausalLM, codec: str, mode: str):
    both = new_cache(llama, codec)
    found = generate(llama, both, inputs(padded=True), **MODES[mode])
    for row, length in enumerate((LONG, SHORT)):
        ids = prompt(2, LONG)[row : row + 1, :length]
        alone = new_cache(llama, codec)
        own = generate(llama, alone, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **MODES[mode])
        assert torch.equal(found[row, LONG:], own[0, length:])
        at = row * (3 if mode == "beams" else 1)
        assert_same_codes(both, alone, (at, 0))
        assert both.layers[0].history.lengths[at] == alone.layers[0].history.lengths[0]


@pytest.mark.parametrize("size", [37, 1])
def test_chunks_do_not_change_codes(llama: LlamaForCausalLM, size: int):
    at_once, chunked = new_cache(llama, "trellis3"), new_cache(llama, "trellis3")
    given = inputs(padded=True)
    feed(llama, at_once, given["input_ids"], given["attention_mask"])
    for stop in range(size, LONG + size, size):
        part = slice(stop - size, min(stop, LONG))
        feed(llama, chunked, given["input_ids"][:, part], given["attention_mask"][:, : part.stop])
    for row in (0, 1):
        assert_same_codes(at_once, chunked, (row, row))
        assert at_once.layers[0].history.coded == chunked.layers[0].history.coded


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("codec", SPECS)
def test_second_turn(llama: LlamaForCausalLM, codec: str, padded: bool):
    """The same cache with a longer input: the first turn's, its answer and a second question."""
    cache, plain = new_cache(llama, codec), dynamic(llama)
    given = inputs(padded)
    answers = [generate(llama, c, given) for c in (cache, plain)]
    longer = torch.cat([answers[0], prompt(2, 90, seed=1)], dim=1)
    mask = torch.nn.functional.pad(given["attention_mask"], (0, longer.shape[1] - LONG), value=1)
    second = {"input_ids": longer, "attention_mask": mask}
    found = generate(llama, cache, second)
    assert cache.get_seq_length() == longer.shape[1] + NEW - 1
    if codec == "exact":
        assert torch.equal(found, generate(llama, plain, second))
    at_once = new_cache(llama, codec)
    feed(llama, at_once, longer, mask)
    assert_same_codes(cache, at_once, (1, 1))


@pytest.mark.parametrize("codec", SPECS)
def test_reset(llama: LlamaForCausalLM, codec: str):
    used, unused = new_cache(llama, codec), new_cache(llama, codec)
    other = prompt(3, 200, seed=5)  # another batch size too
    feed(llama, used, other)
    used.reset()
    assert used.get_seq_length() == 0
    assert used.memory().total == 0
    assert torch.equal(generate(llama, used, inputs(True)), generate(llama, unused, inputs(True)))
    assert used.memory() == unused.memory()
    assert_same_codes(used, unused, (1, 1), layer=1)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_repeat_and_select_rows(llama: LlamaForCausalLM, padded: bool):
    given, more = inputs(padded), prompt(4, 70, seed=1)
    mask = given["attention_mask"].repeat_interleave(2, dim=0)
    cache, plain = new_cache(llama, "exact"), dynamic(llama)
    results = []
    for c in (cache, plain):
        feed(llama, c, given["input_ids"], given["attention_mask"])
        codes = cache.memory().codes
        c.batch_repeat_interleave(2)
        assert cache.memory().codes == codes  # rows share their pages
        wide = torch.nn.functional.pad(mask, (0, 70), value=1)
        first = feed(llama, c, more, wide)
        order = torch.tensor([3, 0, 3])
        c.batch_select_indices(order)
        wide = torch.nn.functional.pad(wide[order], (0, 70), value=1)
        results.append((first, feed(llama, c, more[:3], wide)))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() <= TOLERANCE


def test_trellis3_repeated_rows_agree(llama: LlamaForCausalLM):
    """Rows that share pages and then part give what rows give that never shared any."""
    given, more = inputs(padded=True), prompt(4, 70, seed=1)
    mask = torch.nn.functional.pad(given["attention_mask"].repeat_interleave(2, dim=0), (0, 70), value=1)
    shared, apart = new_cache(llama, "trellis3"), new_cache(llama, "trellis3")
    feed(llama, shared, given["input_ids"], given["attention_mask"])
    shared.batch_repeat_interleave(2)
    feed(llama, apart, given["input_ids"].repeat_interleave(2, dim=0), mask[:, :LONG])
    # The same codes; matrix products of another batch size round otherwise.
    assert (feed(llama, shared, more, mask) - feed(llama, apart, more, mask)).abs().max() <= TOLERANCE
    for row in range(4):
        assert_same_codes(shared, apart, (row, row))


# 10: within the window. 60: into a row's last page. 100: more pages than one. 150: the shorter row is gone altogether.
@pytest.mark.parametrize("removed", [10, 60, 100, 150])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_crop(llama: LlamaForCausalLM, padded: bool, removed: int):
    given, more = inputs(padded), prompt(2, 200, seed=1)
    kept = LONG - removed
    used, unused = new_cache(llama, "exact"), new_cache(llama, "exact")
    feed(llama, used, given["input_ids"], given["attention_mask"])
    used.crop(0)
    used.crop(-removed)
    assert used.get_seq_length() == kept
    feed(llama, unused, given["input_ids"][:, :kept], given["attention_mask"][:, :kept])
    for part in (slice(0, 1), slice(1, 200)):
        mask = torch.nn.functional.pad(given["attention_mask"][:, :kept], (0, part.stop), value=1)
        found, expected = (feed(llama, c, more[:, part], mask) for c in (used, unused))
        assert (found - expected).abs().max() <= TOLERANCE
    assert used.layers[0].history.lengths == unused.layers[0].history.lengths


@pytest.mark.parametrize("codec", SPECS)
def test_deepcopy_of_a_cache(llama: LlamaForCausalLM, codec: str):
    """A prompt's cache is copied and continued in two ways; neither sees the other."""
    given = inputs(padded=True)
    cache = new_cache(llama, codec)
    feed(llama, cache, given["input_ids"][:, :-1], given["attention_mask"][:, :-1])
    twin = copy.deepcopy(cache)
    feed(llama, cache, prompt(2, 150, seed=3))
    fresh = new_cache(llama, codec)
    feed(llama, fresh, given["input_ids"][:, :-1], given["attention_mask"][:, :-1])
    assert torch.equal(generate(llama, twin, given), generate(llama, fresh, given))
    assert twin.memory() == fresh.memory()


# wrap


def ask(model: PreTrainedModel, **options):
    return generate(model, None, inputs(padded=True), return_dict_in_generate=True, **options)


def test_wrap_and_unwrap(fresh: LlamaForCausalLM):
    expected = ask(fresh).sequences
    methods = fresh._prepare_cache_for_generation.__func__, fresh._prefill.__func__
    assert wrap(fresh, EXACT) is fresh
    found = ask(fresh)
    assert isinstance(found.past_key_values, CompressedCache)
    assert found.past_key_values.spec == EXACT
    assert found.past_key_values.stats()["fused"] > 0
    assert found.past_key_values.stats()["materialised"] == 0
    assert found.past_key_values.memory().coded_elements > 0
    assert torch.equal(found.sequences, expected)
    assert unwrap(fresh) is fresh
    assert fresh.config._attn_implementation == "sdpa"
    assert (fresh._prepare_cache_for_generation.__func__, fresh._prefill.__func__) == methods
    assert not [name for name in vars(fresh) if "kvcompress" in name]
    again = ask(fresh)
    assert type(again.past_key_values) is DynamicCache
    assert torch.equal(again.sequences, expected)
    assert unwrap(fresh) is fresh  # not wrapped: nothing to do


def test_wrapping_again_changes_the_settings(fresh: LlamaForCausalLM):
    wrap(fresh, "trellis3")
    wrap(fresh, "lloyd4,window=32")
    assert ask(fresh).past_key_values.spec == CacheSpec.parse("lloyd4,window=32")
    unwrap(fresh)
    assert fresh.config._attn_implementation == "sdpa"
    assert type(ask(fresh).past_key_values) is DynamicCache


def test_models_that_share_a_config(fresh: LlamaForCausalLM):
    torch.manual_seed(1)
    other = LlamaForCausalLM(fresh.config).eval()
    assert other.config is fresh.config
    expected, logits = ask(other).sequences, feed(other, None, inputs()["input_ids"])
    wrap(fresh, EXACT)
    found = ask(other)
    assert type(found.past_key_values) is DynamicCache
    assert torch.equal(found.sequences, expected)
    assert (feed(other, None, inputs()["input_ids"]) - logits).abs().max() <= TOLERANCE
    wrap(other, EXACT)
    unwrap(fresh)
    found = ask(other)
    assert isinstance(found.past_key_values, CompressedCache)
    assert found.past_key_values.stats()["fused"] > 0
    assert torch.equal(found.sequences, expected)
    assert type(ask(fresh).past_key_values) is DynamicCache
    unwrap(other)
    assert fresh.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("chunk", [64, 7])
def test_prefill_chunk(fresh: LlamaForCausalLM, chunk: int):
    expected = ask(fresh).sequences
    lengths = []
    fresh.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = ask(wrap(fresh, EXACT, prefill_chunk=chunk))
    assert torch.equal(found.sequences, expected)
    assert max(lengths) == chunk
    assert sum(lengths) == LONG + NEW - 1


@pytest.mark.parametrize("what", [None, torch.nn.Linear(2, 2), "llama"], ids=["None", "module", "str"])
def test_wrap_takes_models_alone(what):
    with pytest.raises(TypeError, match=type(what).__name__):
        wrap(what)


@pytest.mark.parametrize(
    ("spec", "chunk"), [("treliss3", 64), (EXACT, 0), (EXACT, -1), (EXACT, 1.5), ("trellis3,layer9=exact", 64)]
)
def test_bad_settings_leave_the_model_alone(fresh: LlamaForCausalLM, spec, chunk):
    with pytest.raises(ValueError):  # noqa: PT011  (the messages are those of the spec's own tests)
        wrap(fresh, spec, prefill_chunk=chunk)
    assert fresh.config._attn_implementation == "sdpa"
    assert type(ask(fresh).past_key_values) is DynamicCache


def test_a_call_without_a_cache(fresh: LlamaForCausalLM):
    expected = ask(fresh, new=4).sequences
    found = ask(wrap(fresh, EXACT, prefill_chunk=64), new=4, use_cache=False)
    assert found.past_key_values is None
    assert torch.equal(found.sequences, expected)


def test_a_call_that_brings_its_own_cache(fresh: LlamaForCausalLM):
    expected = ask(fresh).sequences
    wrap(fresh, EXACT)
    for cache in (DynamicCache(config=fresh.config), CompressedCache(fresh.config, "exact,window=8")):
        found = generate(fresh, cache, inputs(padded=True), return_dict_in_generate=True)
        assert found.past_key_values is cache
        assert torch.equal(found.sequences, expected)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_call_that_asks_for_another_cache(family: str, padded: bool):
    """Our attention is right with a static cache, longer than what it holds, and with gemma3's sliding ones."""
    model = build(family, "sdpa")
    expected = generate(model, None, inputs(padded))
    options = {"cache_implementation": "static", "return_dict_in_generate": True}
    assert torch.equal(generate(model, None, inputs(padded), **options).sequences, expected)
    found = generate(wrap(model, EXACT), None, inputs(padded), **options)
    assert isinstance(found.past_key_values, StaticCache)
    assert torch.equal(found.sequences, expected)


def test_progress_bar(fresh: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    wrap(fresh, EXACT, prefill_chunk=64)
    ask(fresh, new=2)
    assert "prefill" not in capfd.readouterr().err
    monkeypatch.setattr(kvcompress.generation, "PROGRESS_TOKENS", LONG)
    ask(fresh, new=2)
    error = capfd.readouterr().err
    assert "prefill: 100%" in error
    assert f"{LONG}/{LONG}" in error
    assert not fresh._forward_hooks


def test_saving_a_wrapped_model(fresh: LlamaForCausalLM, tmp_path):
    expected = ask(fresh).sequences
    wrap(fresh, EXACT).save_pretrained(tmp_path)
    assert "kvcompress" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    found = ask(loaded)
    assert type(found.past_key_values) is DynamicCache
    assert torch.equal(found.sequences, expected)


def test_deepcopy_of_a_wrapped_model(fresh: LlamaForCausalLM):
    expected = ask(fresh).sequences
    twin = copy.deepcopy(wrap(fresh, EXACT))
    with torch.no_grad():
        fresh.lm_head.weight.zero_()  # a copy that still called the original would show it
    found = ask(twin)
    assert isinstance(found.past_key_values, CompressedCache)
    assert torch.equal(found.sequences, expected)
    unwrap(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert type(ask(twin).past_key_values) is DynamicCache
    assert isinstance(ask(fresh).past_key_values, CompressedCache)
    unwrap(fresh)
    assert fresh.config._attn_implementation == "sdpa"
