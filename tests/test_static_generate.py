"""generate() of models wrapped with `static=True` against the same models wrapped without.

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
from transformers.generation.streamers import BaseStreamer

pytest.importorskip("triton", reason="the kernels need Triton")

from kvcompress import CacheSpec, unwrap, wrap
from kvcompress.store import PAGE
from tests.families import build, left_padded, prompt

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, with TRITON_INTERPRET=1")
CUDA = torch.cuda.is_available() and not INTERPRETED

WINDOW = 64
SPEC = CacheSpec("trellis3", "trellis3", window=WINDOW)
TOKENS = 4 + 2 * WINDOW + PAGE - 2  # a page is closed, the next is due after two tokens


class Streamed(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build("llama", "sdpa", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)


def generate(model: LlamaForCausalLM, static: bool, ids: Tensor, new: int, spec: CacheSpec = SPEC, **options: Any):
    """What generate returns, with one seed."""
    wrap(model, spec, static=static)
    torch.manual_seed(7)
    options = {"do_sample": False, "return_dict_in_generate": True} | options
    return model.generate(ids, max_new_tokens=new, **options)


@interpreted
def test_greedy_search_in_two_turns(model: LlamaForCausalLM) -> None:
    """The same tokens as by the torch reference, over a page's closing; the cache that is returned goes on."""
    ids = prompt(1, TOKENS)
    ordinary, static = (generate(model, kind, ids, 6) for kind in (False, True))
    assert torch.equal(static.sequences, ordinary.sequences)
    caches = ordinary.past_key_values, static.past_key_values
    assert caches[1].stats() == {"fused": 6, "materialised": 0, "static": 5}  # the last token is not fed
    assert caches[0].layers[0].history.lengths == caches[1].layers[0].history.lengths == [TOKENS + 5]
    assert caches[0].layers[0].history.coded == caches[1].layers[0].history.coded == [2 * PAGE]
    more = torch.cat([static.sequences, prompt(1, 5, seed=1)], dim=1)
    again = [generate(model, bool(i), more, 3, past_key_values=cache).sequences for i, cache in enumerate(caches)]
    assert torch.equal(*again)
    assert caches[1].stats()["static"] == 7
    assert caches[1].borrower is None


@interpreted
def test_sampling_stops_and_streams(model: LlamaForCausalLM) -> None:
    """With a seed; an end of sequence stops it, and tokens are streamed and scored as ever."""
    ids = prompt(1, TOKENS)
    drawn = generate(model, False, ids, 6, do_sample=True, top_k=5).sequences[0, TOKENS:].tolist()
    options = {"do_sample": True, "top_k": 5, "eos_token_id": drawn[2], "pad_token_id": 0, "output_scores": True}
    last = drawn.index(drawn[2]) + 1
    streamer = Streamed()
    found = generate(model, True, ids, 6, streamer=streamer, **options)
    assert found.sequences[0, TOKENS:].tolist() == drawn[:last] == streamer.tokens[TOKENS:]
    assert len(found.scores) == last
    assert streamer.ended
    assert found.past_key_values.stats()["static"] == last - 1


@interpreted
def test_rows_with_left_padding(model: LlamaForCausalLM) -> None:
    """Padding is not stored; a row's page closes when it would without its mate."""
    long, short = prompt(2, TOKENS)
    ids, mask = left_padded([long, short[: TOKENS - PAGE + 1]])
    ordinary, static = (generate(model, kind, ids, 5, attention_mask=mask) for kind in (False, True))
    assert torch.equal(static.sequences, ordinary.sequences)
    history = static.past_key_values.layers[0].history
    assert history.lengths == [TOKENS + 4, TOKENS - PAGE + 5]
    assert history.coded == ordinary.past_key_values.layers[0].history.coded == [2 * PAGE, PAGE]
    assert static.past_key_values.stats()["static"] == 3  # the second row had no page before the first step


@interpreted
def test_short_prompts_decode_as_usual_until_a_page_is_closed(model: LlamaForCausalLM) -> None:
    ids = prompt(1, 4 + WINDOW + PAGE - 2)  # two tokens before codecs are fitted and a page is closed
    ordinary, static = (generate(model, kind, ids, 6) for kind in (False, True))
    assert torch.equal(static.sequences, ordinary.sequences)
    assert static.past_key_values.stats() == {"fused": 6, "materialised": 0, "static": 3}


@interpreted
def test_keys_without_their_rotary_embedding(model: LlamaForCausalLM) -> None:
    spec = CacheSpec("prerope+trellis3", "trellis3", window=WINDOW)
    ordinary, static = (generate(model, kind, prompt(1, TOKENS), 4, spec) for kind in (False, True))
    assert torch.equal(static.sequences, ordinary.sequences)
    assert static.past_key_values.stats()["static"] == 3


@interpreted
def test_a_mask_of_its_own_is_refused(model: LlamaForCausalLM) -> None:
    mask = torch.ones(1, TOKENS, dtype=torch.int64)
    mask[0, 50] = 0
    ordinary, static = (generate(model, kind, prompt(1, TOKENS), 2, attention_mask=mask) for kind in (False, True))
    assert torch.equal(static.sequences, ordinary.sequences)
    assert refused(static) == ["static decoding takes no mask but that of left padding"]


def refused(result: Any) -> list[str]:
    prefix = "refused: static decoding: "
    return [name.removeprefix(prefix) for name in result.past_key_values.stats() if name.startswith(prefix)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "generation by beam_search"),
        ({"prompt_lookup_num_tokens": 2}, "generation by assisted_generation"),
        ({"output_hidden_states": True}, "attentions or hidden states to be returned"),
    ],
)
def test_other_ways_to_generate_are_counted(model: LlamaForCausalLM, options: dict[str, Any], reason: str) -> None:
    """They work as without `static`, on any machine."""
    ids = prompt(1, TOKENS)
    ordinary, static = (generate(model, kind, ids, 3, **options) for kind in (False, True))
    assert torch.equal(static.sequences, ordinary.sequences)
    assert refused(static) == [reason]


@pytest.mark.skipif(INTERPRETED or CUDA, reason="needs a machine on which kernels cannot run")
def test_without_kernels_it_is_refused(model: LlamaForCausalLM) -> None:
    """Once in a call, and not at every step; the log says it once."""
    found = generate(model, True, prompt(1, TOKENS), 4)
    assert torch.equal(found.sequences, generate(model, False, prompt(1, TOKENS), 4).sequences)
    stats = found.past_key_values.stats()
    assert [count for name, count in stats.items() if name.startswith("refused")] == [1], stats
    assert "Triton does not run on cpu" in refused(found)[0]


def test_wrapping_is_undone(model: LlamaForCausalLM) -> None:
    before = set(vars(model))
    wrap(model, SPEC, static=True)
    assert set(vars(model)) > before
    assert set(vars(unwrap(model))) == before


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("codec", ["trellis3", "prerope+spectral3"])
def test_a_graph_generates_the_same_tokens(codec: str) -> None:
    """As static decoding would without one: twelve greedy steps of two rows, one of them padded, over a closing."""
    model = build("llama", "sdpa", num_hidden_layers=2, head_dim=64).to("cuda", torch.float16)
    tokens = 4 + 512 + WINDOW
    ids, mask = (x.cuda() for x in left_padded([prompt(1, tokens)[0], prompt(1, tokens - 7, seed=1)[0]]))
    spec = CacheSpec(codec, codec, window=WINDOW)
    ordinary, static = (generate(model, kind, ids, 70, spec, attention_mask=mask) for kind in (False, True))
    assert static.past_key_values.stats()["static"] >= 69 - PAGE
    assert not refused(static)
    # kernels round in another order than in ordinary decoding: a near tie may fall otherwise, after which all differs
    agreed = (static.sequences == ordinary.sequences)[:, tokens:].long().cumprod(dim=1).sum(dim=1)
    assert int(agreed.min()) >= 5


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
@pytest.mark.slow  # the interpreter
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
