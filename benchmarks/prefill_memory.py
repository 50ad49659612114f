"""Peak memory of a chunked prefill on the CPU: ``python -m benchmarks.prefill_memory --spec trellis3``.

A Llama of random weights (8 layers, 4 KV heads of 64, float32) reads TOKENS random tokens. Measured, in bytes: how far
the process's resident set rose above what it was before the prefill at its highest (Linux only), what the cache holds
afterwards, and what an uncompressed cache of these tokens would take.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import Cache, LlamaConfig, LlamaForCausalLM

from benchmarks.caches import UNCOMPRESSED, Contender, compressed
from benchmarks.device import with_peak
from benchmarks.log import open_log
from benchmarks.storage import cache_bytes
from kvcompress.spec import DEFAULT_SPEC


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


@dataclass(frozen=True)
class PrefillRow:
    """One prefill; bytes as the module says."""

    cache: str
    spec: dict[str, Any] | None
    tokens: int
    chunk: int
    peak_bytes: int
    cache_bytes: int
    uncompressed_bytes: int
    status: str = "ok"

    @property
    def key(self) -> tuple[str, int, int]:
        return self.cache, self.tokens, self.chunk


def measure(contender: Contender, tokens: int, chunk: int) -> PrefillRow:
    llama = model()
    config: Any = llama.config  # its sizes are optional to the type checker, but a built model has them all
    cache = contender.make(config)
    with contender.attending(llama):
        prefill(llama, contender.make(config), 2 * chunk, chunk)  # what is loaded and allocated once
        _, peak = with_peak(lambda: prefill(llama, cache, tokens, chunk), llama.device)
    if peak is None:
        raise ValueError("how far memory rises can be told on Linux only: /proc/self/clear_refs is not there")
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    uncompressed = tokens * width * llama.dtype.itemsize
    return PrefillRow(contender.name, contender.content, tokens, chunk, peak, cache_bytes(cache), uncompressed)


def main(
    spec: Annotated[str, typer.Option(help="a spec, or 'uncompressed' for transformers' DynamicCache")] = DEFAULT_SPEC,
    tokens: int = 16_384,
    chunk: int = 512,
    output: Annotated[Path, typer.Option(help="folder whose results.jsonl the row is added to")] = Path(
        "benchmarks/results/prefill_memory"
    ),
) -> None:
    """Add a row to the results, and print what it says."""
    row = measure(UNCOMPRESSED if spec == UNCOMPRESSED.name else compressed(spec), tokens, chunk)
    log = open_log(output, "prefill_memory", PrefillRow, {})
    log.add(row)
    log.rewrite()
    print(
        f"{row.cache}: {tokens:,} tokens raised the process's memory by {row.peak_bytes / 1e6:,.0f} MB at most; the "
        f"cache holds {row.cache_bytes / 1e6:,.0f} MB, an uncompressed one would {row.uncompressed_bytes / 1e6:,.0f} MB"
    )


if __name__ == "__main__":
    typer.run(main)
