"""Which weights a model has: the same in every process, others where any layer was changed."""

from __future__ import annotations

import copy
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from kvcompress import unwrap, wrap
from kvcompress.fingerprint import SAMPLED, fingerprint
from tests.families import LLAMA3_ROPE, build


def test_the_same_weights():
    """In a copy, under any attention, wrapped or not, after a call, in another process."""
    own = build("llama", "sdpa")
    found = fingerprint(own)
    assert len(found) == 64
    assert fingerprint(copy.deepcopy(own)) == found
    assert fingerprint(wrap(own)) == found
    own.generate(torch.ones(1, 5, dtype=torch.int64), max_new_tokens=2)
    assert fingerprint(unwrap(own)) == found
    lines = ["from tests.families import build", "from kvcompress.fingerprint import fingerprint"]
    code = "\n".join([*lines, "print(fingerprint(build('llama')))"])
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == found


CHANGES = {
    "a layer fine-tuned": lambda own: own.model.layers[1].mlp.up_proj.weight.data.mul_(1.001),
    "a norm fine-tuned": lambda own: own.model.norm.weight.data.add_(1e-3),
    "the last element of a matrix": lambda own: own.lm_head.weight.data[-1, -1].add_(1),
    "another dtype": lambda own: own.bfloat16(),
    "a buffer": lambda own: own.model.register_buffer("extra", torch.ones(3)),
    "RoPE": lambda own: setattr(own.config, "rope_parameters", LLAMA3_ROPE),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights(change: str):
    own = build("llama")
    before = fingerprint(own)
    CHANGES[change](own)
    assert fingerprint(own) != before
    assert fingerprint(build("llama", seed=1)) != before


def test_weights_of_four_bits():
    """bitsandbytes': packed in uint8, with scales beside them, which count too."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantised() -> LlamaForCausalLM:
        own = build("llama")
        for layer in own.model.layers:
            full = layer.mlp.up_proj
            layer.mlp.up_proj = bitsandbytes.nn.Linear4bit(
                full.in_features, full.out_features, bias=False, quant_type="nf4"
            )
            layer.mlp.up_proj.load_state_dict({"weight": full.weight.data})
        return own.to("cpu")

    own = quantised()
    weight = own.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.uint8
    before = fingerprint(own)
    assert fingerprint(quantised()) == before
    weight.quant_state.absmax[0] ^= 1  # scales are quantised themselves
    scaled = fingerprint(own)
    assert scaled != before
    weight.data[0, 0] ^= 1
    assert fingerprint(own) not in (before, scaled)


def test_large_weights_are_sampled():
    """Both ends of a matrix, and no more elements than that of any: 2^26 take less than a second."""
    own = build("llama")
    own.lm_head.weight = nn.Parameter(torch.zeros(2**18, 2**8))
    begun = time.perf_counter()
    before = fingerprint(own)
    assert time.perf_counter() - begun < 1  # reading all would take 256 MiB of hashing beside the copies
    for place in (0, -1, (2**26 - 1) // (SAMPLED - 1)):
        own.lm_head.weight.data.view(-1)[place] = 1
        after = fingerprint(own)
        assert after != before
        before = after


def test_no_weights_at_hand():
    with torch.device("meta"):
        own = LlamaForCausalLM(build("llama").config)
    with pytest.raises(ValueError, match="is on the meta device"):
        fingerprint(own)
