"""`generate` with a prefix store: tokens are those without it, and what it is not used for is counted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import CompressedCache, unwrap, wrap
from kvcompress.prefixes import PrefixStore
from tests.families import build, left_padded, prompt
from tests.prefix_stores import EXACT, LENGTH, NEW, TRELLIS, memory_only


@pytest.fixture
def wrapped() -> tuple[PreTrainedModel, PrefixStore]:
    store = memory_only()
    return wrap(build("llama"), TRELLIS, prefix_store=store), store


def generate(own: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    torch.manual_seed(3)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False} | options
    return own.generate(ids, **given)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20}, {"prefill_chunk_size": 33}], ids=str)
def test_generate_goes_on_from_what_is_stored(wrapped: tuple[PreTrainedModel, PrefixStore], options: dict[str, object]):
    """The tokens of a second turn are those of the first turn's cache, and again when they are all asked for anew."""
    own, store = wrapped
    ids = prompt(1, LENGTH)
    cache = CompressedCache(own.config, TRELLIS)
    generate(own, ids, past_key_values=cache)
    generate(own, ids)
    cache.crop(-(NEW - 1))  # as after the prompt: pages are of the prompt alone
    turn = torch.cat([ids, prompt(1, 150, seed=1)], dim=1)
    expected = generate(own, turn, past_key_values=cache, **options)
    assert torch.equal(generate(own, turn, **options), expected)
    stats = store.stats()
    assert (stats["hits"], stats["misses"], stats["tokens reused"]) == (1, 1, LENGTH)
    assert stats["entries: memory"] == 2  # the second adds 150 tokens
    assert stats["passed over: a cache of the call's own, or none"] == 2
    for _ in range(2):
        generate(own, turn, **options)
    assert store.stats()["hits"] == 3
    assert store.stats()["entries: memory"] == 2


def test_the_same_prompt_again(wrapped: tuple[PreTrainedModel, PrefixStore]):
    """With exact codes the tokens are the same, whatever is read again."""
    own, store = wrapped
    wrap(own, EXACT, prefix_store=store)
    ids = prompt(1, LENGTH)
    first = generate(own, ids)
    assert torch.equal(generate(own, ids), first)
    assert store.stats()["tokens reused"] == 484 + 15  # 499 tokens keep 7 pages: only the last token is read


PASSED = {
    "padding": ({"pad": True}, "padding, or a mask that hides tokens"),
    "rows": ({"rows": 2}, "several rows"),
    "beams": ({"num_beams": 2}, "generation by beam_search"),
    "returns": ({"num_return_sequences": 2, "do_sample": True}, "several rows"),
    "lookup": ({"prompt_lookup_num_tokens": 2}, "generation by assisted_generation"),
    "no cache": ({"use_cache": False}, "a cache of the call's own, or none"),
    "positions": ({"position_ids": True}, "positions of the call's own"),
}


@pytest.mark.parametrize("case", PASSED)
def test_what_generate_passes_over(wrapped: tuple[PreTrainedModel, PrefixStore], case: str):
    """The tokens are those without a store, which counts why."""
    own, store = wrapped
    options, reason = PASSED[case]
    rows = options.pop("rows", 1)
    ids = prompt(rows, LENGTH)
    if options.pop("pad", False):
        ids, options["attention_mask"] = (x[:1] for x in left_padded([ids[0, :480], ids[0]]))
    if options.pop("position_ids", False):
        options["position_ids"] = torch.arange(LENGTH).unsqueeze(0) + 5
    for _ in range(2):
        found = generate(own, ids, **options)
    stats = store.stats()
    assert stats[f"passed over: {reason}"] == 2
    assert (stats["hits"], stats["misses"], stats["entries: memory"]) == (0, 0, 0)
    wrap(own, TRELLIS)
    assert torch.equal(generate(own, ids, **options), found)


def test_a_model_on_several_devices_is_passed_over(wrapped: tuple[PreTrainedModel, PrefixStore]):
    own, store = wrapped
    own.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "meta"}
    generate(own, prompt(1, LENGTH))
    assert store.stats()["passed over: a model whose layers lie on several devices"] == 1
    assert store.stats()["entries: memory"] == 0


def test_a_model_whose_weights_are_shared_out_is_passed_over(wrapped: tuple[PreTrainedModel, PrefixStore]):
    """Its ranks would look up by themselves, and where one has what another has not, wait for each other for ever."""
    own, store = wrapped
    own._tp_size = 2  # as transformers says it
    generate(own, prompt(1, LENGTH))
    assert store.stats()["passed over: a model whose weights are shared out to ranks"] == 1
    assert store.stats()["entries: memory"] == 0


def test_a_group_and_a_store_exclude_each_other():
    with pytest.raises(ValueError, match="those of a group are dealt out to ranks: give one"):
        wrap(build("llama"), TRELLIS, group=object(), prefix_store=memory_only())


def test_a_wrapped_models_copy_uses_the_same_store(wrapped: tuple[PreTrainedModel, PrefixStore]):
    own, store = wrapped
    generate(own, prompt(1, LENGTH))
    twin = wrap(unwrap(copy.deepcopy(own)), TRELLIS, prefix_store=store)
    generate(twin, torch.cat([prompt(1, LENGTH), prompt(1, 5)], dim=1))
    assert store.stats()["hits"] == 1
    assert copy.deepcopy(store) is store
