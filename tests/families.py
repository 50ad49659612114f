"""Tiny random models of many families: `build(name)` gives one, seeded, in float32 and eval mode.

Weights are drawn wider than transformers' own initialisation does, so that attention is far from uniform and a wrong
mask, order or scale shows in the logits, which stay of order one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress import CompressedCache
from kvcompress.store import PAGE

VOCAB = 128
SPREAD = 0.15  # standard deviation of matrices

#: What all configs of Llama's kind take: two query heads to a KV head, head_dim 16.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2

#: Family: (model class, its config's fields).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**COMMON, "head_dim": 8}),
    "llama_rope": ("LlamaForCausalLM", {**COMMON, "rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2ForCausalLM", COMMON),
    "qwen3": ("Qwen3ForCausalLM", COMMON),
    "mistral": ("MistralForCausalLM", {**COMMON, "sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", {**COMMON, "num_local_experts": 4, "sliding_window": None}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            **COMMON,
            "num_hidden_layers": 4,
            "layer_types": ALTERNATING,
            "sliding_window": 48,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": False,  # scaled up and tied, they make the model repeat its input
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            **COMMON,
            "num_hidden_layers": 4,
            "layer_types": ALTERNATING,
            "sliding_window": 48,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": ("Phi3ForCausalLM", {**COMMON, "sliding_window": None}),
    "gpt_neox": ("GPTNeoXForCausalLM", {k: COMMON[k] for k in COMMON.keys() - {"num_key_value_heads", "head_dim"}}),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_positions": 1024,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            **COMMON,
            "num_hidden_layers": 4,
            "layer_types": ALTERNATING,
            "sliding_window": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},  # its own YaRN does not fit 1024 tokens
        },
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        {
            **COMMON,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_chunk_size": 16,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **{k: v for k, v in COMMON.items() if k != "head_dim"},
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
        },
    ),
}


def build(family: str, attention: str = "kvcompress", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of a family, with fields of its config changed; the same seed gives the same weights."""
    name, fields = FAMILIES[family]
    model_class: Callable[..., PreTrainedModel] = getattr(transformers, name)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**(fields | changes))).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=SPREAD)
    model.set_attn_implementation(attention)
    return model


def prompt(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids [rows, length], none of them padding."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def coded_pages(cache: CompressedCache, layer: int, row: int) -> dict[str, Tensor]:
    """The stored parts of a row's full pages, by name, [pages, H, 64, ...]; empty where it has none."""
    history = cache.layers[layer].history
    ids = history.table.ids[row][history.table.fill[row] == PAGE]
    return history.pool.read(ids) if len(ids) else {}


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, attention mask) of prompts [n] of several lengths, zeros on the left."""
    length = max(map(len, rows))
    ids = torch.stack([nn.functional.pad(row, (length - len(row), 0)) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])
    return ids, mask
