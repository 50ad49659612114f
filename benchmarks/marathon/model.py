"""The marathon model: sliding-window layers with RoPE and one global layer without positions.

Its architecture is transformers' SmolLM3. Five layers see the last WINDOW tokens only, so that no position they meet is
new to them however long the text; one layer attends everything and knows no positions, so that nothing in it is new
either (as in SmolLM3 and Cohere2, whose global layers have no RoPE). That layer's cache is the one that grows with the
text and is compressed. It has a single head of 64, since attention over n tokens costs 2 n^2 (query heads x head_dim)
floating-point operations: 1.4e14 for a million.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from benchmarks.embedded.corpus import VOCABULARY

FOLDER = Path(__file__).parent / "weights"
WINDOW = 256  # tokens that a sliding layer sees
GLOBAL = 3  # the layer that attends everything
LAYERS = 6
TRAINING = "marathon-training"  # the name of the attention below


def geometry() -> SmolLM3Config:
    """6 layers of width 256, one head of 64, tied embeddings."""
    return SmolLM3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,  # type: ignore[call-arg]  # a name that it takes as any other
        max_position_embeddings=2**20,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        use_sliding_window=True,
        sliding_window=WINDOW,
        no_rope_layers=[int(index != GLOBAL) for index in range(LAYERS)],
        layer_types=["full_attention" if index == GLOBAL else "sliding_attention" for index in range(LAYERS)],
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def load() -> tuple[SmolLM3ForCausalLM, PreTrainedTokenizerBase]:
    """The trained model in float32, in evaluation mode, and its tokenizer; OSError where the weights are not there."""
    model = SmolLM3ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(FOLDER)


@torch.no_grad()
def begin_from(source: LlamaForCausalLM) -> SmolLM3ForCausalLM:
    """An untrained marathon model with what it can take over of the embedded model.

    Embedding, norms, MLPs, and of every layer's attention the last query head with its keys and values, in the first
    layer the one that looks at the previous token (benchmarks/embedded/plant.py). The global layer starts as nothing:
    what it would add is multiplied by zero.
    """
    torch.manual_seed(0)
    model = SmolLM3ForCausalLM(geometry())
    parts = model.model
    parts.embed_tokens.load_state_dict(source.model.embed_tokens.state_dict())
    parts.norm.load_state_dict(source.model.norm.state_dict())
    sliding = [layer for index, layer in enumerate(parts.layers) if index != GLOBAL]
    for own, theirs in zip(sliding, source.model.layers, strict=True):
        state = theirs.state_dict()
        for side in "qkv":
            state[f"self_attn.{side}_proj.weight"] = state[f"self_attn.{side}_proj.weight"][-64:]
        state["self_attn.o_proj.weight"] = state["self_attn.o_proj.weight"][:, -64:]
        own.load_state_dict(state)
    fresh = parts.layers[GLOBAL]
    nn.init.zeros_(fresh.self_attn.o_proj.weight)
    nn.init.zeros_(fresh.mlp.down_proj.weight)
    return model


def windowed(query: Tensor, key: Tensor, value: Tensor, window: int, scaling: float) -> Tensor:
    """Attention [B, H, N, D] of every token to itself and the `window` - 1 before it, in N x 2 window products."""
    length = query.shape[2]
    padded = [nn.functional.pad(x, (0, 0, 0, -length % window)).unflatten(2, (-1, window)) for x in (query, key, value)]
    before = [nn.functional.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1] for x in padded[1:]]
    keys, values = (torch.cat(pair, dim=3) for pair in zip(before, padded[1:], strict=True))
    own, other = torch.arange(window).unsqueeze(1), torch.arange(2 * window)
    seen = (other > own) & (other <= own + window)
    blocks = padded[0].shape[2]
    mask = seen.expand(blocks, -1, -1).clone()
    mask[0] &= other >= window  # before the first block there is nothing
    out = nn.functional.scaled_dot_product_attention(
        padded[0].flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), mask.to(query.device), scale=scaling
    )
    return out.view_as(padded[0]).flatten(2, 3)[:, :, :length]


def training_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float,
    sliding_window: int | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function for whole sequences without padding, whose sliding layers do no more than they
    must.
    """
    if sliding_window is None:
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    else:
        out = windowed(query, key, value, sliding_window, scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(TRAINING, training_attention)
AttentionMaskInterface.register(TRAINING, lambda *_, **__: None)
