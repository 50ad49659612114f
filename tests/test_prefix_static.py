"""Static decoding that goes on from a stored prefix.

What launches kernels runs in a process of its own, this file again with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from kvcompress import CacheSpec, wrap
from kvcompress.prefixes import PrefixStore
from kvcompress.store import PAGE
from tests.families import build, prompt

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WINDOW, NEW = 64, 4
SPEC = CacheSpec("trellis3", "trellis3", window=WINDOW)
PREFIX = 4 + 2 * WINDOW + PAGE - 2  # tokens: a page is closed, the next is due after two more


@pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, with TRITON_INTERPRET=1")
def test_static_steps_after_a_stored_prefix():
    """The tokens of ordinary decoding, in a hit's cache and over a page's closing; the entry stays as it was."""
    own = build("llama", "sdpa", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    ids = torch.cat([prompt(1, PREFIX), prompt(1, 1, seed=1)], dim=1)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    stores = [PrefixStore(min_tokens=32) for _ in range(2)]
    found = []
    for static, store in zip((False, True, True), (stores[0], stores[1], stores[1]), strict=True):
        wrap(own, SPEC, static=static, prefix_store=store)
        if not store.stats()["entries: memory"]:
            own.generate(ids[:, :PREFIX], **options | {"max_new_tokens": 1})
        found.append(own.generate(ids, **options))
    assert [store.stats()["hits"] for store in stores] == [1, 2]
    assert [store.stats()["tokens reused"] for store in stores] == [PREFIX, 2 * PREFIX]
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert torch.equal(found[0].sequences, found[2].sequences)
    assert [each.past_key_values.stats().get("static", 0) for each in found] == [0, NEW - 1, NEW - 1]
    coded = [each.past_key_values.layers[0].history.coded for each in found]
    assert coded == [[2 * PAGE]] * 3


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
@pytest.mark.slow  # the interpreter
def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
