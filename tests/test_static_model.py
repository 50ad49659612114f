"""A model's static decode step (kvcompress/static_model.py) against ordinary forward passes on the same cache.

What launches kernels runs in a process of its own, this file again with TRITON_INTERPRET=1: a step of one layer with a
page takes about half a second, so there are few.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

pytest.importorskip("triton", reason="the kernels need Triton")

from kvcompress import CacheSpec, CompressedCache
from kvcompress.attention import NAME
from kvcompress.static import StaticRefusalError
from kvcompress.static_model import StaticModel
from kvcompress.store import PAGE
from tests.families import build, prompt

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, with TRITON_INTERPRET=1")
CUDA = torch.cuda.is_available() and not INTERPRETED

WINDOW = 64
SPEC = CacheSpec("trellis3", "trellis3", window=WINDOW)
TOKENS = 4 + 2 * WINDOW + PAGE - 2  # a page is closed, the next is due after two tokens
#: Kernels round queries, keys, what codes stand for and softmax weights to float16, each 2^-11 of numbers of size 1:
#: as many of these errors as reach logits, with room.
CLOSE = 2**-8


def model_of(name: str = "llama", **options: Any) -> LlamaForCausalLM:
    """One layer, heads of 16 dimensions, two query heads a KV head."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return build(name, NAME, **({**small, **options} if name == "llama" else options))


@torch.no_grad()
def prefilled(model: LlamaForCausalLM, spec: CacheSpec = SPEC, tokens: int = TOKENS, rows: int = 1) -> CompressedCache:
    cache = CompressedCache(model.config, spec)
    model(prompt(rows, tokens).to(model.device), past_key_values=cache)
    return cache


@torch.no_grad()
def ordinary(model: LlamaForCausalLM, cache: CompressedCache, token: Tensor) -> Tensor:
    return model(token, past_key_values=cache).logits


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= CLOSE * float(wanted.abs().max())


def token(number: int, rows: int = 1) -> Tensor:
    return torch.full((rows, 1), 5 + number)


@interpreted
def test_steps_are_those_of_an_ordinary_cache() -> None:
    """A page closes after the second; in between the cache is whole for whoever asks, and counts what is held."""
    model = model_of()
    cache, static_cache = prefilled(model), prefilled(model)
    static = StaticModel(model, static_cache, TOKENS + 2 * PAGE)
    for number in range(4):
        assert_close(static.step(token(number)), ordinary(model, cache, token(number)))
        if number == 2:
            assert static_cache.get_seq_length() == TOKENS + 3
            assert static_cache.layers[0].history.coded == cache.layers[0].history.coded == [2 * PAGE]
    assert static_cache.stats() == {"fused": 5, "materialised": 0, "static": 4}
    token_bytes = 2 * 16 * 4  # both sides, one head of 16 dimensions in float32
    during = static_cache.memory().exact
    held = 4 + static_cache.layers[0].history.held[0]
    assert during == token_bytes * (held + 4 + WINDOW + 2 * PAGE)
    static.close()
    held = 4 + static_cache.layers[0].history.held[0]
    assert static_cache.memory().exact == token_bytes * held
    assert not static.graphed
    assert_close(ordinary(model, static_cache, token(9)), ordinary(model, cache, token(9)))
    with pytest.raises(ValueError, match="has ended"):
        static.step(token(0))


@interpreted
def test_keys_without_their_rotary_embedding() -> None:
    """They are rebuilt page by page, by the angles of where the table on the device says that pages stand."""
    model, spec = model_of(), CacheSpec("prerope+trellis3", "trellis3", window=WINDOW)
    cache, static_cache = prefilled(model, spec), prefilled(model, spec)
    static = StaticModel(model, static_cache, TOKENS + PAGE)
    for number in range(3):
        assert_close(static.step(token(number)), ordinary(model, cache, token(number)))
    assert static_cache.layers[0].history.codecs[0].frame == "token"
    assert static_cache.layers[0].history.coded == [2 * PAGE]


@interpreted
def test_steps_are_undone() -> None:
    """By `undo` as far as the cache has not been settled, and by themselves where the model raises."""
    model = model_of()
    cache = prefilled(model, tokens=TOKENS - PAGE // 2)
    static = StaticModel(model, cache, TOKENS + PAGE)
    first, second = static.step(token(0)), static.step(token(1))
    static.undo(2)
    assert torch.equal(static.step(token(0)), first)

    def fail(*args: Any) -> None:
        raise RuntimeError("no")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        static.step(token(1))
    hook.remove()
    assert torch.equal(static.step(token(1)), second)
    with pytest.raises(ValueError, match="0 to 2 steps can be undone since the cache was settled, got 3"):
        static.undo(3)
    static.settle()
    with pytest.raises(ValueError, match="0 to 0 steps"):
        static.undo(1)
    cache.crop(-1)
    assert cache.get_seq_length() == TOKENS - PAGE // 2 + 1
    assert cache.borrower is None


@interpreted
def test_what_it_does_not_take() -> None:
    model = model_of()
    cache = prefilled(model)
    with pytest.raises(ValueError, match=f"capacity must be at least the {TOKENS} tokens held, got 5"):
        StaticModel(model, cache, 5)
    static = StaticModel(model, cache, TOKENS)
    with pytest.raises(ValueError, match=r"takes token ids \(1, 1\), got \(1, 2\)"):
        static.step(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(StaticRefusalError, match=f"the capacity of {TOKENS} tokens is reached"):
        static.step(token(0))
    with pytest.raises(StaticRefusalError, match="static decoding starts once codecs are fitted"):
        StaticModel(model, prefilled(model, tokens=20), 100)
    with pytest.raises(StaticRefusalError, match="got a cache without tokens"):
        StaticModel(model, CompressedCache(model.config, SPEC), 100)


@interpreted
def test_room_for_pages_is_used_again() -> None:
    """What one static decode reserved and did not fill serves the next one."""
    model = model_of()
    cache = prefilled(model)
    StaticModel(model, cache, TOKENS + 4 * PAGE).close()
    slabs = cache.layers[0].history.pool.stored_bytes()
    StaticModel(model, cache, TOKENS + 4 * PAGE).close()
    assert cache.layers[0].history.pool.stored_bytes() == slabs


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("gemma2", {}, "layers of other kinds than full attention: DynamicSlidingWindowLayer"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "a rotary position embedding that depends on the length",
        ),
    ],
)
def test_models_that_it_does_not_take(name: str, options: dict[str, Any], reason: str) -> None:
    """Told before anything is made: on any machine."""
    model = model_of(name, **options)
    with pytest.raises(StaticRefusalError, match=reason):
        StaticModel(model, prefilled(model), 300)


def test_another_attention_is_not_taken() -> None:
    model = model_of()
    model.set_attn_implementation("sdpa")
    with pytest.raises(StaticRefusalError, match="'sdpa' attention, which decodes whole layers"):
        StaticModel(model, prefilled(model), 300)


@pytest.mark.skipif(INTERPRETED or CUDA, reason="needs a machine on which kernels cannot run")
def test_it_needs_kernels() -> None:
    model = model_of()
    with pytest.raises(StaticRefusalError, match="on a CPU only with TRITON_INTERPRET=1"):
        StaticModel(model, prefilled(model), 300)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("codec", ["trellis3", "spectral3", "prerope+spectral3"])
@torch.no_grad()
def test_a_cuda_graph_replays_the_step(codec: str) -> None:
    """The same kernels on the same numbers: equal to the last bit, in two rows, over a page's closing."""
    model = model_of(head_dim=64).to("cuda", torch.float16)
    spec, tokens = CacheSpec(codec, codec, window=WINDOW), 4 + 512 + WINDOW
    replayed, eager = (StaticModel(model, prefilled(model, spec, tokens, rows=2), tokens + 4 * PAGE) for _ in range(2))
    for number in range(PAGE + 10):
        own = token(number % 50, rows=2).cuda()
        wanted = eager.step(own) if not eager.graphed else None
        eager._replayed._warm = False  # it warms up for ever, and so captures nothing
        found = replayed.step(own)
        assert wanted is not None
        assert torch.equal(found, wanted)
    assert replayed.graphed
    assert not eager.graphed
    assert replayed.cache.layers[0].history.coded == eager.cache.layers[0].history.coded
    assert replayed.cache.stats()["static"] == PAGE + 10
    replayed.undo(1)
    assert torch.equal(replayed.step(own), found)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@torch.no_grad()
def test_a_model_that_reads_the_device_goes_on_without_a_graph() -> None:
    """It cannot be captured: that is counted, and its steps are what they were."""
    model = model_of(head_dim=64).to("cuda", torch.float16)
    caches = [prefilled(model) for _ in range(2)]
    static = StaticModel(model, caches[0], TOKENS + PAGE)
    model.lm_head.register_forward_pre_hook(lambda module, args: print(float(args[0].sum()), end="\r"))
    for number in range(4):
        assert_close(
            static.step(token(number).cuda()).float(), ordinary(model, caches[1], token(number).cuda()).float()
        )
    assert not static.graphed
    assert [count for name, count in caches[0].stats().items() if "no CUDA graph" in name] == [1]


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
@pytest.mark.slow  # the interpreter
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
