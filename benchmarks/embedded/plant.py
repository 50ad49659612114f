"""Write a previous-token head into a Llama, so that it learns to look back within minutes of training.

Models recall from their context by composing two attention heads (Olsson et al., 2022, "In-context learning and
induction heads"): one copies each position's previous token beside it, a later one looks for the place whose previous
token is the current one and copies what stands there. A small model needs very many tokens to find the first one, which
is of no use without the second; given the first, gradient descent finds the second by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

SHARP = 20.0  # logits between the previous token and its neighbours, about
FAST_PAIRS = 6  # rotary pairs that tell neighbours apart
STRENGTH = 0.7  # of the head's output matrix, in that of its neighbours about half


def orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Orthonormal rows [rows, columns]."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0].mT


def one_before(width: int, theta: float, sharp: float) -> tuple[Tensor, Tensor]:
    """Constant (query, key) [width], whose product under RoPE is largest one token apart, by about `sharp` logits."""
    angles = theta ** (-torch.arange(0, 2 * FAST_PAIRS, 2) / width)
    strength = (sharp * width**0.5 / (1 - torch.cos(angles)).sum()).sqrt()
    key, query = torch.zeros(width), torch.zeros(width)
    key[:FAST_PAIRS] = strength
    query[:FAST_PAIRS] = strength * torch.cos(angles)
    query[width // 2 : width // 2 + FAST_PAIRS] = -strength * torch.sin(angles)
    return query, key


@torch.no_grad()
def plant_previous_token_head(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Overwrite the last KV head of the first layer, and its query heads.

    Keys and queries read what all embeddings have in common, and so hold a constant each; turned by one position
    against each other, RoPE makes their product largest for the token before. Values copy the token into fresh
    directions.
    """
    config: Any = model.config  # its sizes are optional to the type checker, but a built model has them all
    width, hidden = config.head_dim, config.hidden_size
    groups = config.num_attention_heads // config.num_key_value_heads
    head = slice((config.num_key_value_heads - 1) * width, None)
    queries = slice((config.num_attention_heads - groups) * width, None)

    embedding, layer = model.model.embed_tokens.weight, model.model.layers[0]
    rows = embedding / embedding.square().mean(dim=1, keepdim=True).sqrt()
    # read . row is about 1 for all tokens
    read = torch.linalg.lstsq(rows, torch.ones(len(rows), 1)).solution.squeeze(1)
    read = read / layer.input_layernorm.weight
    query, key = one_before(width, config.rope_parameters["rope_theta"], SHARP)

    attention = layer.self_attn
    attention.k_proj.weight[head] = torch.outer(key, read)
    attention.q_proj.weight[queries] = torch.outer(query.repeat(groups), read)
    attention.v_proj.weight[head] = orthogonal(width, hidden, generator)
    attention.o_proj.weight[:, queries] = orthogonal(width, hidden, generator).mT.repeat(1, groups) * STRENGTH
