"""The rows of `python -m benchmarks retrieval`: one a document and cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.caches import Contender

Key = tuple[str, int, float | None, int, str]


@dataclass(frozen=True)
class Row:
    """What was measured; None where it was not. status: "ok", else why there is no more, with a `reason`.

    tokens: of the document. depth: of the needle, 0 to 1; None for a task without depths. recall: share of the
    document's `questions` answered word for word. bits_per_element: of the coded part, overheads included, None where
    nothing was coded; effective: of all that is held; bytes: of the cache after the document.
    """

    task: str
    tokens: int
    depth: float | None
    seed: int
    cache: str
    side: str
    family: str
    library: str
    spec: dict[str, Any] | None = None
    status: str = "ok"
    reason: str | None = None
    recall: float | None = None
    questions: int | None = None
    bits_per_element: float | None = None
    effective_bits_per_element: float | None = None
    bytes: int | None = None
    uncompressed_bytes: int | None = None

    @property
    def key(self) -> Key:
        return self.task, self.tokens, self.depth, self.seed, self.cache


def empty_row(task: str, tokens: int, depth: float | None, seed: int, contender: Contender) -> Row:
    """The row of a cache that is not measured yet."""
    return Row(task, tokens, depth, seed, **contender.labels)
