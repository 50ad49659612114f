"""The rows of `python -m benchmarks quality`: one a subject, context, seed and cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.caches import Contender

Key = tuple[str, int, int, str]


@dataclass(frozen=True)
class Row:
    """What was measured; None where it was not. status: "ok", else why there is no more, with a `reason`.

    bits_per_element: of the coded part, overheads included, None where nothing was coded; effective: of all that is
    held. bytes: of the cache after one document. KL in nats a token. Recall: shares of questions answered word for
    word. greedy_tokens: before the first that differs from the uncompressed model's, mean over documents.
    output_error: squared error of attention's output over its squared size. seconds: of the whole measurement.
    """

    subject: str
    context: int
    seed: int
    cache: str
    side: str
    family: str
    library: str
    spec: dict[str, Any] | None = None
    status: str = "ok"
    reason: str | None = None
    bits_per_element: float | None = None
    effective_bits_per_element: float | None = None
    bytes: int | None = None
    uncompressed_bytes: int | None = None
    perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    scored_positions: int | None = None
    needle_recall: float | None = None
    needle_questions: int | None = None
    key_recall: float | None = None
    key_questions: int | None = None
    greedy_tokens: float | None = None
    output_error: float | None = None
    seconds: float | None = None

    @property
    def key(self) -> Key:
        return self.subject, self.context, self.seed, self.cache


def empty_row(subject: str, context: int, seed: int, contender: Contender) -> Row:
    """The row of a cache that is not measured yet."""
    return Row(subject, context, seed, **contender.labels)
