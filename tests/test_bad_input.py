"""What must not be: each a clear error, after which the cache is as it was before the call, or a defined result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvcompress import CacheSpec, CompressedCache
from kvcompress.layer import CompressedLayer
from tests.families import build, coded_pages, left_padded, prompt

EXACT = CacheSpec(key="exact", value="exact", sinks=4, window=32)
TRELLIS = CacheSpec("trellis4", "trellis2", window=32)
LONG = 180  # tokens: pages with either codec
LAYERS = 4


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build("llama", num_hidden_layers=LAYERS)


@torch.no_grad()
def feed(model: PreTrainedModel, cache: object, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits


def state(cache: CompressedCache) -> list[dict[str, Any]]:
    """All that a layer holds, by layer; sliding layers have their own tensors."""
    layers = []
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CompressedLayer):
            layer.settle()  # the last layer's chunk waits for the next pass where another attention read it (MLA)
        held: dict[str, Any] = {"length": layer.get_seq_length(), "initialized": layer.is_initialized}
        history = getattr(layer, "history", None)
        if history is not None and history.lengths:
            rows = len(history.lengths)
            held |= {"lengths": history.lengths, "pads": history.pads, "coded": history.coded}
            pages = [coded_pages(cache, index, row) for row in range(rows)]
            held["tensors"] = [*history.sink, *history.recent, *(part for row in pages for part in row.values())]
            held["tensors"] += [part for fit in history.fits for part in fit.values()]
        elif isinstance(getattr(layer, "keys", None), Tensor):
            held["tensors"] = [layer.keys, layer.values]
        held["tensors"] = [tensor.clone() for tensor in held.get("tensors", [])]
        layers.append(held)
    return layers


def assert_same_state(found: list[dict[str, Any]], expected: list[dict[str, Any]]):
    for index, (mine, yours) in enumerate(zip(found, expected, strict=True)):
        assert mine.keys() == yours.keys(), index
        tensors = zip(mine.pop("tensors"), yours.pop("tensors"), strict=True)
        assert mine == yours, index
        assert all(torch.equal(a, b) for a, b in tensors), index


def check_refusal(
    model: PreTrainedModel,
    spec: CacheSpec,
    bad: Callable[[CompressedCache], Any],
    match: str,
    held: int,
    error: type[Exception] = ValueError,
) -> None:
    """A cache that holds `held` tokens refuses, is as before, and goes on as one that never saw the bad call."""
    ids, more = prompt(2, held + 1), prompt(2, 200, seed=1)
    cache, untouched = CompressedCache(model.config, spec), CompressedCache(model.config, spec)
    if held:
        for c in (cache, untouched):
            feed(model, c, ids[:, :held])
    before = state(cache)
    with pytest.raises(error, match=match):
        bad(cache)
    assert_same_state(state(cache), before)
    for part in more.split([150, 1, 49], dim=1):
        assert torch.equal(feed(model, cache, part), feed(model, untouched, part))
    assert_same_state(state(cache), state(untouched))
    assert cache.memory().coded_elements > 0


# specs


@pytest.mark.parametrize(
    "make", [CacheSpec.parse, lambda s: CompressedCache(build("llama").config, s), lambda s: CacheSpec(key=s)]
)
def test_unknown_codec(make):
    with pytest.raises(ValueError, match=r"'treliss3'; did you mean 'trellis'\?.*exact.*lloyd.*trellis"):
        make("treliss3")


@pytest.mark.parametrize("make", [lambda: CacheSpec(window=-1), lambda: CacheSpec.parse("trellis3,window=-1")])
def test_negative_window(make):
    with pytest.raises(ValueError, match=r"window must be a number of tokens, 0 or more, got -1"):
        make()


def test_spec_of_a_deeper_model():
    with pytest.raises(ValueError, match=r"layer 7, but the model has 2 layers"):
        CompressedCache(build("llama").config, "trellis3,layer7=exact")


# head sizes


SIZES = {
    "odd": ("gpt2", {"n_embd": 60}, "15"),  # 60 / 4
    "small": ("llama", {"head_dim": 4}, "4"),
    "large": ("llama", {"head_dim": 264}, "264"),
    "values": ("deepseek_v3", {"qk_rope_head_dim": 4}, "4"),  # the latent keys fit, what is cached as values does not
}


@pytest.mark.parametrize("attention", ["kvcompress", "eager"])
@pytest.mark.parametrize("case", SIZES)
def test_unsupported_head_size(case: str, attention: str):
    family, changes, size = SIZES[case]
    model = build(family, attention, **changes)
    cache = CompressedCache(model.config, TRELLIS)
    before = state(cache)
    with pytest.raises(ValueError, match=rf"head_dim must be even and in 8\.\.256 for this codec, got {size}\b"):
        feed(model, cache, prompt(1, LONG))
    assert_same_state(state(cache), before)
    assert cache.get_seq_length() == 0
    assert cache.memory().total == 0
    fitting = build("llama", attention)  # of as many layers: the cache is as good as new
    again = CompressedCache(fitting.config, TRELLIS)
    if attention == "kvcompress":
        assert torch.equal(feed(fitting, cache, prompt(1, LONG)), feed(fitting, again, prompt(1, LONG)))


def test_exact_takes_any_head_size():
    model = build("gpt2", n_embd=60)
    found = feed(model, CompressedCache(model.config, EXACT), prompt(1, LONG))
    assert (found - feed(model, None, prompt(1, LONG))).abs().max() <= 1e-5


# another model, another batch

OTHERS = {
    "heads": ({"num_key_value_heads": 4, "num_hidden_layers": LAYERS}, r"layer 0 holds keys .*\(2, 2, 8\).*one model"),
    "head_dim": ({"head_dim": 16, "num_hidden_layers": LAYERS}, r"layer 0 holds keys .*\(2, 2, 8\).*one model"),
    "layers": ({"num_hidden_layers": LAYERS + 2}, r"made for 4 layers, the model has 6"),
}


# An empty cache takes any head sizes.
@pytest.mark.parametrize(("case", "held"), [("heads", LONG), ("head_dim", LONG), ("layers", 0), ("layers", LONG)])
def test_cache_of_another_model(llama: PreTrainedModel, case: str, held: int):
    changes, match = OTHERS[case]
    other = build("llama", **changes)
    check_refusal(llama, EXACT, lambda cache: feed(other, cache, prompt(2, 150)), match, held)


def test_cache_in_another_dtype(llama: PreTrainedModel):
    other = build("llama", num_hidden_layers=LAYERS).bfloat16()
    match = "float32, got .*bfloat16"
    check_refusal(llama, EXACT, lambda cache: feed(other, cache, prompt(2, 150)), match, LONG)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attention", ["kvcompress", "sdpa"])
def test_another_batch_size(attention: str, rows: int):
    model = build("llama", attention)
    match = rf"\(2, 2, 8\).*got \({rows}, 2, 1, 8\)"
    check_refusal(model, TRELLIS, lambda cache: feed(model, cache, prompt(rows, 1)), match, LONG)


# masks


def square(mask: Tensor, queries: slice) -> Tensor:
    """The 4D bool mask [B, 1, Q, KV] of a padding mask [B, KV] and the causal order."""
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (causal[None, None] & mask[:, None, None].bool())[:, :, queries]


@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min], ids=["inf", "min"])
@pytest.mark.parametrize("spec", [EXACT, TRELLIS], ids=["exact", "trellis3"])
def test_float_mask_is_the_bool_mask(llama: PreTrainedModel, spec: CacheSpec, hidden: float):
    """A 4D mask is taken as it comes: 2D, 4D bool and 4D added to the scores say the same, padding included."""
    rows = prompt(2, LONG + 20)
    ids, mask = left_padded([rows[0], rows[1, :150]])
    found, histories = [], []
    for kind in ("2D", "bool", "float"):
        cache = CompressedCache(llama.config, spec)
        outputs = []
        for start, stop in ((0, LONG), (LONG, LONG + 19), (LONG + 19, LONG + 20)):
            own = mask[:, :stop]
            if kind != "2D":
                own = square(own, slice(start, stop))
            if kind == "float":
                own = torch.zeros(own.shape).masked_fill(~own, hidden)
            outputs.append(feed(llama, cache, ids[:, start:stop], own))
        found.append(torch.cat(outputs, dim=1)[mask.bool()])
        histories.append(cache.layers[0].history)
    # Scores are masked by the same numbers in another order of operations, or none.
    assert (found[1] - found[0]).abs().max() <= 1e-5
    assert (found[2] - found[0]).abs().max() <= 1e-5
    assert [h.pads for h in histories] == [[0, 50]] * 3
    assert [h.coded for h in histories] == [histories[0].coded] * 3
    assert min(histories[0].coded) > 0


@pytest.mark.parametrize("width", [100, LONG, LONG + 3])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_mask_of_the_wrong_width(llama: PreTrainedModel, width: int, dtype: torch.dtype):
    mask = torch.ones(2, 1, 2, width, dtype=torch.bool).to(dtype)
    match = f"mask covers {width} tokens, the cache holds {LONG + 2}"
    check_refusal(llama, TRELLIS, lambda cache: feed(llama, cache, prompt(2, 2), mask), match, LONG)


# numbers that are none


class StopError(Exception):
    """Not of ours."""


@contextmanager
def spoiled(module: nn.Module, value: float, token: int) -> Iterator[None]:
    """One number in a module's output replaced, in one row."""

    def spoil(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1, token, 3] = value
        return output

    hook = module.register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


def spoiled_call(model: PreTrainedModel, name: str, value: float, tokens: int) -> Callable[[CompressedCache], Any]:
    def call(cache: CompressedCache) -> Any:
        with spoiled(model.get_submodule(name), value, tokens // 2):
            return feed(model, cache, prompt(2, tokens, seed=2))

    return call


@pytest.mark.parametrize("tokens", [1, 150], ids=["step", "chunk"])
@pytest.mark.parametrize("held", [0, LONG])
@pytest.mark.parametrize("spec", [EXACT, TRELLIS], ids=["exact", "trellis3"])
@pytest.mark.parametrize("attention", ["kvcompress", "sdpa"])
def test_nan_in_keys(attention: str, spec: CacheSpec, held: int, tokens: int):
    """In layer 2: layers 0 and 1 have taken the chunk in, and coded some of it, when it is found."""
    model = build("llama", attention, num_hidden_layers=LAYERS)
    bad = spoiled_call(model, "model.layers.2.self_attn.k_proj", float("nan"), tokens)
    check_refusal(model, spec, bad, "keys of layer 2 hold NaN or infinite numbers", held)


def test_infinity_in_values(llama: PreTrainedModel):
    bad = spoiled_call(llama, "model.layers.2.self_attn.v_proj", float("inf"), 150)
    check_refusal(llama, TRELLIS, bad, "values of layer 2 hold NaN or infinite numbers", LONG)


@pytest.mark.parametrize("held", [0, LONG])
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "deepseek_v3"])
def test_nan_in_other_families(family: str, held: int):
    """Sliding layers (0 and 2 of gemma3 and gpt_oss) are put back too, and so are those that were decoded."""
    model = build(family)
    last = len(model.model.layers) - 1
    bad = spoiled_call(model, f"model.layers.{last - 1}.mlp", float("nan"), 70)
    if family == "gpt_oss":  # its mlp returns more than a tensor
        bad = spoiled_call(model, f"model.layers.{last - 1}.self_attn.v_proj", float("nan"), 70)
    check_refusal(model, TRELLIS, bad, f"of layer {last} hold NaN or infinite numbers", held)


@pytest.mark.parametrize("attention", ["kvcompress", "sdpa"])
def test_rollback(attention: str):
    """An error outside the cache is not seen by it: `rollback` undoes the pass."""
    model = build("llama", attention, num_hidden_layers=LAYERS)

    def stop(*_: Any) -> None:
        raise StopError("no more")

    def bad(cache: CompressedCache) -> None:
        hook = model.model.layers[2].mlp.register_forward_hook(stop)
        try:
            feed(model, cache, prompt(2, 150, seed=2))
        except StopError:
            cache.rollback()
            raise
        finally:
            hook.remove()

    check_refusal(model, TRELLIS, bad, "no more", LONG, StopError)


# crop


@pytest.mark.parametrize("amount", [1, LONG])
def test_positive_crop(llama: PreTrainedModel, amount: int):
    match = f"crop takes minus the number of tokens to remove, got {amount}"
    check_refusal(llama, TRELLIS, lambda cache: cache.crop(amount), match, LONG)


def test_crop_of_more_than_is_held(llama: PreTrainedModel):
    match = f"cannot remove {LONG + 1} tokens from a cache of {LONG}"
    check_refusal(llama, TRELLIS, lambda cache: cache.crop(-LONG - 1), match, LONG)


def test_crop_of_all(llama: PreTrainedModel):
    cache, unused = CompressedCache(llama.config, TRELLIS), CompressedCache(llama.config, TRELLIS)
    feed(llama, cache, prompt(2, LONG))
    cache.crop(-LONG)
    assert cache.get_seq_length() == 0
    for c in (cache, unused):
        feed(llama, c, prompt(2, LONG, seed=1))
    assert_same_state(state(cache), state(unused))


@pytest.mark.parametrize("rows", [[2], [0, -3]])
def test_selecting_rows_that_are_not_there(llama: PreTrainedModel, rows: list[int]):
    match = rf"row {rows[-1]} is not in a batch of 2"
    check_refusal(llama, TRELLIS, lambda cache: cache.batch_select_indices(torch.tensor(rows)), match, LONG)


# training


@pytest.mark.parametrize("held", [0, LONG])
def test_dropout(held: int):
    model = build("llama", attention_dropout=0.25)

    def bad(cache: CompressedCache) -> None:
        try:
            feed(model.train(), cache, prompt(2, 3))
        finally:
            model.eval()

    check_refusal(model, TRELLIS, bad, r"dropout must be 0 .*model\.eval\(\).* got 0\.25", held)


def test_training_without_dropout(llama: PreTrainedModel):
    """train() alone forbids nothing, and without a cache our attention has gradients like any other."""
    model = build("llama").train()
    ids = prompt(2, 40)
    model(ids, labels=ids, use_cache=False).loss.backward()
    found = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    own = build("llama", "sdpa").train()
    own(ids, labels=ids, use_cache=False).loss.backward()
    assert (found - own.model.layers[0].self_attn.k_proj.weight.grad).abs().max() <= 1e-5
    cache = CompressedCache(model.config, EXACT)
    assert (feed(model, cache, ids) - feed(own, DynamicCache(config=own.config), ids)).abs().max() <= 1e-5
