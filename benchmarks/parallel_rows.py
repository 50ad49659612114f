"""The rows of `python -m benchmarks parallel`: one a spec and number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.caches import Contender

Key = tuple[str, int]


@dataclass(frozen=True)
class Row:
    """What ranks held together, and what went between them; None where it was not measured.

    status: "ok", else why there is no more, with a `reason`. backend: of the collectives. tokens: held at the end.
    page_bytes, held_bytes: of every rank's coded pages, and of all it holds, in its order. Payload: bytes that a rank
    hands to its collectives, over the prefill and for each decode step. difference: of the last logits to a single
    rank's, at most, as a share of the largest.
    """

    cache: str
    ranks: int
    spec: dict[str, Any] | None
    status: str = "ok"
    reason: str | None = None
    backend: str | None = None
    tokens: int | None = None
    page_bytes: list[int] | None = None
    held_bytes: list[int] | None = None
    prefill_payload: int | None = None
    step_payload: int | None = None
    step_collectives: int | None = None
    difference: float | None = None

    @property
    def key(self) -> Key:
        return self.cache, self.ranks


def empty_row(contender: Contender, ranks: int) -> Row:
    """The row of what is not measured yet."""
    return Row(contender.name, ranks, contender.content)
