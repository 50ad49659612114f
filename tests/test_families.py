"""Every family of models on a compressed cache: what `exact` gives is what transformers' own DynamicCache gives."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Mamba2Config, MambaConfig, MistralConfig, PreTrainedModel

from kvcompress import CacheSpec, CompressedCache
from tests.families import FAMILIES, build, left_padded, prompt

EXACT = CacheSpec(key="exact", value="exact", sinks=4, window=32)
TRELLIS = CacheSpec(key="trellis3", value="trellis3", sinks=4, window=32)
LONG, SHORT, NEW = 180, 130, 24  # tokens: two pages (4 + 32 + 2 x 64 = 164) and one, and what is generated
TOLERANCE = 1e-5  # float32 logits of order one, added up in another order

#: sdpa has no soft-capping and no sink logits.
PLAIN = [(f, a) for f in FAMILIES for a in ("eager", "sdpa") if (f, a) not in (("gemma2", "sdpa"), ("gpt_oss", "sdpa"))]
CHUNKS = {
    "whole": [LONG, 1, 1, 1],
    "chunks": [37] * 4 + [LONG - 4 * 37, 5, 1, 1],
}  # the first chunk of 37 is all padding

model = lru_cache(None)(build)  # tests only read them


def inputs(padded: bool, length: int = LONG) -> tuple[Tensor, Tensor | None]:
    """Two rows of ids, and a mask where one of them is padded on the left."""
    if not padded:
        return prompt(2, length), None
    rows = prompt(2, length)
    return left_padded([rows[0], rows[1, : length - (LONG - SHORT)]])


@torch.no_grad()
def logits(model: PreTrainedModel, cache: object, padded: bool, chunks: list[int]) -> Tensor:
    """Logits of a text fed in chunks, at the positions that are no padding: [positions, vocabulary]."""
    ids, mask = inputs(padded, sum(chunks))
    outputs, seen = [], 0
    for chunk in ids.split(chunks, dim=1):
        seen += chunk.shape[1]
        own = None if mask is None else mask[:, :seen]
        outputs.append(model(chunk, attention_mask=own, past_key_values=cache, use_cache=True).logits)
    real = torch.ones_like(ids) if mask is None else mask
    return torch.cat(outputs, dim=1)[real.bool()]


@lru_cache(None)
def reference(family: str, padded: bool, chunks: str) -> Tensor:
    """The same by the model's own eager attention and DynamicCache."""
    own = model(family, "eager")
    return logits(own, DynamicCache(config=own.config), padded, CHUNKS[chunks])


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_logits(family: str, padded: bool, chunks: str):
    ours = model(family)
    cache = CompressedCache(ours.config, EXACT)
    found = logits(ours, cache, padded, CHUNKS[chunks])
    assert (found - reference(family, padded, chunks)).abs().max() <= TOLERANCE
    assert cache.memory().coded_elements > 0
    if family == "deepseek_v3":  # its attention multiplies the cached latents before anything else can
        assert cache.stats()["materialised"] > 0
    else:
        assert cache.stats()["materialised"] == 0
        assert cache.stats()["fused"] > 0


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("family", "attention"), PLAIN)
def test_exact_logits_with_plain_attention(family: str, attention: str, padded: bool, chunks: str):
    """A model whose attention knows nothing of codes works on decoded copies."""
    plain = model(family, attention)
    cache = CompressedCache(plain.config, EXACT)
    found = logits(plain, cache, padded, CHUNKS[chunks])
    assert (found - reference(family, padded, chunks)).abs().max() <= TOLERANCE
    assert cache.memory().coded_elements > 0
    assert cache.stats()["materialised"] > 0
    assert cache.stats()["fused"] == 0


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_greedy_tokens(family: str, padded: bool):
    ids, mask = inputs(padded)
    options = {
        "attention_mask": torch.ones_like(ids) if mask is None else mask,
        "max_new_tokens": NEW,
        "do_sample": False,
    }
    own, ours = model(family, "eager"), model(family)
    cache = CompressedCache(ours.config, EXACT)
    expected = own.generate(ids, past_key_values=DynamicCache(config=own.config), **options)
    assert torch.equal(ours.generate(ids, past_key_values=cache, **options), expected)
    assert expected.shape == (2, LONG + NEW)
    assert cache.memory().coded_elements > 0


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trellis3_logits(family: str, padded: bool):
    """Three bits are no disaster, and are really read: the error is beyond rounding and below a quarter of
    the logits' spread.

    Random models of head_dim 8 and 16 err more than real ones: the measured errors are 0.01 to 0.12 of the spread.
    """
    ours = model(family)
    found = logits(ours, CompressedCache(ours.config, TRELLIS), padded, CHUNKS["chunks"])
    expected = reference(family, padded, "chunks")
    assert bool(torch.isfinite(found).all())
    error = float((found - expected).square().mean().sqrt() / expected.std())
    assert 1e-4 < error < 0.25


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_spec(family: str):
    """Bases are learned and codes are read in every family: below a tenth of the logits' spread on random models, and
    the same, but for rounding, however the prompt is cut.
    """
    ours, ids = model(family), prompt(1, 700, seed=3)
    found = {}
    for chunk in (310, 100):  # both end with tokens that attend to codes
        cache = CompressedCache(ours.config)
        with torch.no_grad():
            pieces = [ours(part, past_key_values=cache).logits for part in ids.split(chunk, dim=1)]
        found[chunk] = torch.cat(pieces, dim=1)[:, -50:]
        assert cache.memory().coded_elements > 0
    with torch.no_grad():
        expected = ours(ids, past_key_values=DynamicCache(config=ours.config)).logits[:, -50:]
    error = float((found[310] - expected).square().mean().sqrt() / expected.std())
    assert 1e-4 < error < 0.25
    assert float((found[310] - found[100]).square().mean().sqrt() / expected.std()) < 0.25


@pytest.mark.parametrize(
    "config",
    [MambaConfig(num_hidden_layers=2), Mamba2Config(num_hidden_layers=2), MistralConfig(sliding_window=16)],
    ids=["mamba", "mamba2", "mistral-sliding"],
)
def test_no_full_attention(config):
    with pytest.raises(ValueError, match="no full-attention layer"):
        CompressedCache(config)
