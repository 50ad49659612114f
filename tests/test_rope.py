"""The rotation of keys, undone with every family's own code."""

import logging

import pytest
import torch
import transformers
from families import COMMON, FAMILIES, build

from kvcompress.rope import Rope

#: Families whose keys are rotated as a whole or in part; gpt2 has learned positions.
ROTATED = sorted(set(FAMILIES) - {"gpt2", "deepseek_v3"})


@pytest.mark.parametrize("family", ROTATED)
def test_what_a_model_rotates_is_undone(family):
    """The keys that a model's own forward pass caches, turned back, are those of the same tokens at position 0."""
    fields = FAMILIES[family][1]
    alternates = "layer_types" in fields and family != "falcon_h1"  # then the first layer slides: let it attend to all
    changes = {"layer_types": ["full_attention"] * len(fields["layer_types"])} if alternates else {}
    model = build(family, "eager", **changes)
    config = model.config.get_text_config()
    tokens = torch.full((1, 6), 7)  # one token again and again: before RoPE all its keys in the first layer are alike
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    keys = cache.layers[0].keys.float()
    rope = Rope.of(config, keys.shape[-1])
    assert rope is not None
    undone = rope.undo(keys, torch.arange(6).unsqueeze(0))
    assert (undone - undone[:, :, :1]).abs().max() < 1e-4 * undone.abs().max()
    assert torch.allclose(rope.apply(undone, torch.arange(6).unsqueeze(0)), keys, atol=1e-5)


def test_rows_have_positions_of_their_own():
    rope = Rope.of(build("llama_rope").config, 16)
    assert rope is not None
    key = torch.randn(2, 1, 3, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2], [70, 71, 72]])
    both = rope.apply(key, positions)
    for row in (0, 1):
        assert torch.allclose(both[row], rope.apply(key[row : row + 1], positions[row : row + 1])[0], atol=1e-6)


def test_a_model_without_rope_has_none():
    assert Rope.of(build("gpt2").config, 16) is None


def test_keys_that_cannot_be_turned_back_are_left_and_it_is_said(caplog):
    config = build("deepseek_v3").config
    with caplog.at_level(logging.WARNING):
        assert Rope.of(config, 48) is None  # keys of a latent, only a part of which is rotated
    assert "the RoPE of deepseek_v3 cannot be taken out of its keys" in caplog.text


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_kinds_that_grow_or_scale(kind):
    """Frequencies that change with the length are held, so that what was undone at one length is redone at another."""
    scaling = {
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
        "longrope": {
            "factor": 4.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64,
        },
    }[kind]
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **scaling}
    config = build("llama", rope_parameters=parameters, max_position_embeddings=256, head_dim=16).config
    rope = Rope.of(config, 16)
    assert rope is not None
    key = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(1))
    short, long = torch.arange(5).unsqueeze(0), torch.arange(2000, 2005).unsqueeze(0)
    undone = rope.undo(key, short)
    rope.apply(key, long)  # a dynamic embedding would change its frequencies here
    assert torch.allclose(rope.apply(undone, short), key, atol=1e-5)


@pytest.mark.parametrize("name", ["SmolLM3", "Cohere2", "Exaone4"])
def test_layers_without_rope_are_left_as_they_are(name):
    """One token again and again: the fourth layer's keys are alike as they come, and are not to be turned."""
    model_class = getattr(transformers, f"{name}ForCausalLM")
    extra = {} if name == "SmolLM3" else {"sliding_window": 48}
    model = model_class(model_class.config_class(**{**COMMON, "num_hidden_layers": 4, **extra})).eval()
    with torch.no_grad():
        keys = model(torch.full((1, 6), 7), use_cache=True).past_key_values.layers[3].keys
    assert (keys - keys[:, :, :1]).abs().max() < 1e-4
    assert Rope.of(model.config, 16, 3) is None
    assert Rope.of(model.config, 16, 0) is not None


def test_a_config_from_elsewhere_and_another_default_dtype():
    config = transformers.LlamaConfig(**COMMON)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert Rope.of(config, 16) is not None
    finally:
        torch.set_default_dtype(torch.float32)
    elsewhere = type("Elsewhere", (transformers.LlamaConfig,), {"__module__": "nowhere.configuration_own"})
    assert Rope.of(elsewhere(**COMMON), 16) is None
