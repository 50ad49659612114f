"""Peak memory of a chunked prefill on the CPU: ``python -m benchmarks.prefill_memory --spec trellis3``.

A Llama of random weights (8 layers, 4 KV heads of 64, float32) reads TOKENS random tokens. Reported, in bytes: how far
the process's resident set rose above what it was before the prefill at its highest (VmHWM, reset by
/proc/self/clear_refs, so Linux only), what the compressed cache holds afterwards, and what an uncompressed cache of
these tokens would take.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

import kvcompress
from benchmarks.device import resident


def model() -> LlamaForCausalLM:
    """Small in everything but its cache: 16 KiB a token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1 << 20,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def prefill(llama: LlamaForCausalLM, cache: Cache, tokens: int, chunk: int) -> None:
    for start in range(0, tokens, chunk):
        ids = torch.randint(0, 64, (1, min(chunk, tokens - start)))
        llama(ids, past_key_values=cache, logits_to_keep=1)


def main(
    spec: Annotated[str, typer.Option(help="a spec, or 'dynamic' for transformers' DynamicCache")] = "trellis3",
    tokens: int = 16_384,
    chunk: int = 512,
) -> None:
    """Print one JSON object."""
    llama = model()
    llama.set_attn_implementation("sdpa" if spec == "dynamic" else "kvcompress")
    config: Any = llama.config  # its sizes are optional to the type checker, but a built model has them all

    def make() -> Cache:
        return DynamicCache(config=config) if spec == "dynamic" else kvcompress.CompressedCache(config, spec)

    prefill(llama, make(), 2 * chunk, chunk)  # what is loaded and allocated once
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    cache = make()
    prefill(llama, cache, tokens, chunk)
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    held = cache.memory().total if isinstance(cache, kvcompress.CompressedCache) else tokens * width * 4
    result = {"spec": spec, "tokens": tokens, "chunk": chunk, "peak": resident("VmHWM") - before}
    print(json.dumps(result | {"cache": held, "uncompressed": tokens * width * 4}))


if __name__ == "__main__":
    typer.run(main)
