"""What `kvcompress serve` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvcompress.spec import DEFAULT_SPEC, CacheSpec
from kvcompress.units import parse_count, parse_size


@dataclass(frozen=True)
class Settings:
    """See `kvcompress serve --help`.

    model: None serves any that a request names. max_context: tokens of prompt and answer together, such as "128k".
    cache_budget: bytes that one request's cache may come to, such as "2GiB". min_tokens: of a prefix that is stored.
    continuous_batching: requests of `model` are generated together, and `cache_budget` is what all of them share.
    Raises ValueError for what cannot be.
    """

    model: str | None = None
    spec: str = DEFAULT_SPEC
    host: str = "localhost"
    port: int = 8000
    prefix_store: Path | None = None
    min_tokens: int = 1024
    max_context: str | None = None
    cache_budget: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    prefill_chunk: int = 4096
    continuous_batching: bool = False

    def __post_init__(self) -> None:
        CacheSpec.parse(self.spec)
        if self.continuous_batching and self.model is None:
            raise ValueError("continuous batching lays a pool out for one model: name it, as in kvcompress serve MODEL")
        if self.continuous_batching and self.prefix_store is not None:
            raise ValueError("continuous batching shares beginnings of prompts by itself: leave out --prefix-store")
        if not 0 < self.port < 65536:
            raise ValueError(f"port must be a number from 1 to 65535, got {self.port}")
        if self.max_context is not None:
            parse_count(self.max_context)
        if self.cache_budget is not None:
            parse_size(self.cache_budget)
