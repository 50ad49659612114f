"""Rows of `python -m benchmarks million`: what one cache made of one long document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MillionRow:
    """status: "ok", else why there is no more to say, with a `reason`.

    tokens: of the document. restart: the cache was emptied after every so many tokens (None: never). cache_bytes: of
    all layers, measured at the end; bfloat16_bytes: of the uncompressed keys and values of the same tokens and layers
    in two bytes a number (computed from the measured ones). peak_bytes: the most that the process grew by (on a GPU:
    allocated) beside the model. perplexity: of all tokens scored; by bucket: of those at positions from half the
    bucket's name up to it, and increase: by how many per cent it lies above the uncompressed cache's on the same
    tokens, with the standard error of that. recall: the share of facts whose answer is the model's first choice word
    for word, by_depth: by the part of the document where they stand, from its begin to its end. seconds: fed, codes and
    attention included.
    """

    cache: str
    spec: dict[str, Any] | None
    tokens: int
    seed: int
    restart: int | None = None
    status: str = "ok"
    reason: str | None = None
    bits_per_element: float | None = None
    effective_bits_per_element: float | None = None
    cache_bytes: int | None = None
    bfloat16_bytes: int | None = None
    peak_bytes: int | None = None
    scored: int | None = None
    perplexity: float | None = None
    perplexity_by_bucket: dict[str, float] | None = None
    increase_by_bucket: dict[str, tuple[float, float]] | None = None
    recall: float | None = None
    recall_by_depth: list[float] | None = None
    questions: int | None = None
    seconds: float | None = None

    @property
    def key(self) -> tuple[str, int, int, int | None]:
        return self.cache, self.tokens, self.seed, self.restart

    @property
    def name(self) -> str:
        return self.cache if self.restart is None else f"{self.cache}, {self.restart:,} tokens at a time"

    @property
    def smaller(self) -> float | None:
        """How many times the cache goes into bfloat16's bytes."""
        return self.bfloat16_bytes / self.cache_bytes if self.bfloat16_bytes and self.cache_bytes else None

    @property
    def worst(self) -> tuple[str, float, float] | None:
        """The bucket with the largest increase of perplexity: its name, per cent, standard error."""
        found = self.increase_by_bucket or {}
        name = max(found, key=lambda each: found[each][0], default=None)
        return None if name is None else (name, *found[name])
