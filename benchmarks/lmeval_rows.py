"""The rows of `python -m benchmarks lmeval`: one a task and cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.caches import Contender


@dataclass(frozen=True)
class Row:
    """What lm-eval found; None where nothing was measured. status: "ok", else why there is no more, with a `reason`.

    metrics: by the names of the task's parts (itself, where it has none) and lm-eval's names, standard errors among
    them. questions: by the parts' names. tokens: of the longest text that was read. bits_per_element: of the coded
    part, overheads included, None where nothing was coded; coded: its share of all elements of all texts.
    """

    task: str
    seed: int
    cache: str
    side: str
    family: str
    library: str
    spec: dict[str, Any] | None = None
    status: str = "ok"
    reason: str | None = None
    metrics: dict[str, dict[str, float]] | None = None
    questions: dict[str, int] | None = None
    tokens: int | None = None
    bits_per_element: float | None = None
    coded: float | None = None

    @property
    def key(self) -> tuple[str, int, str]:
        return self.task, self.seed, self.cache


def empty_row(task: str, seed: int, contender: Contender) -> Row:
    """The row of a cache that is not measured yet."""
    return Row(task, seed, **contender.labels)
