"""The rows of `python -m benchmarks latency`: one a context, batch and cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from benchmarks.caches import Contender
from benchmarks.timing import Quartiles
from kvcompress.backends import choose

Key = tuple[int, int, str]


@dataclass(frozen=True)
class Row:
    """What was measured; None where it was not. status: "ok", else why there is no more, with a `reason`.

    attention: the model's implementation; backend: who computes it on codes, and stats: what `CompressedCache.stats`
    counted in one turn, refusals among it; None for caches that are not ours. Medians with their quartiles (_q1, _q3):
    of the time to first token over the repetitions, of milliseconds_per_token (a decode step of the whole batch) over
    all their steps. Tokens per second count all rows of the batch. Ratios: times over the uncompressed cache's of
    the same rounds. cache_bytes: after prefill and steps; peak_memory_bytes: the rise during both above what was held.
    """

    cache: str
    context: int
    batch: int
    seed: int
    side: str
    library: str
    spec: dict[str, Any] | None = None
    status: str = "ok"
    reason: str | None = None
    attention: str | None = None
    backend: str | None = None
    stats: dict[str, int] | None = None
    time_to_first_token_seconds: float | None = None
    time_to_first_token_seconds_q1: float | None = None
    time_to_first_token_seconds_q3: float | None = None
    first_token_ratio: float | None = None
    prefill_tokens_per_second: float | None = None
    milliseconds_per_token: float | None = None
    milliseconds_per_token_q1: float | None = None
    milliseconds_per_token_q3: float | None = None
    step_ratio: float | None = None
    decode_tokens_per_second: float | None = None
    cache_bytes: int | None = None
    peak_memory_bytes: int | None = None

    @property
    def key(self) -> Key:
        return self.context, self.batch, self.cache

    @property
    def refusals(self) -> list[str]:
        """What the kernels, where they were due, left to the torch reference, and why."""
        return [name.removeprefix("refused: ") for name in self.stats or {} if name.startswith("refused: ")]

    def timed(self, first: Quartiles, step: Quartiles, base: tuple[Quartiles, Quartiles] | None) -> Row:
        """The row with its times, quartiles in seconds; base: the uncompressed cache's, None where it has none."""
        return replace(
            self,
            **first.fields("time_to_first_token_seconds"),
            **step.fields("milliseconds_per_token", 1000),
            first_token_ratio=base and first.median / base[0].median,
            prefill_tokens_per_second=self.batch * self.context / first.median,
            step_ratio=base and step.median / base[1].median,
            decode_tokens_per_second=self.batch / step.median,
        )


def empty_row(contender: Contender, context: int, batch: int, seed: int) -> Row:
    """The row of a cache that is not measured yet."""
    return Row(contender.name, context, batch, seed, contender.side, contender.library, contender.content)


def watched(
    row: Row, contender: Contender, model: PreTrainedModel, size: int, stats: dict[str, int] | None, peak: int | None
) -> Row:
    """The row with what a turn that nobody timed showed; size and peak in bytes."""
    backend = None if stats is None else choose(model.device)[0].name
    attention = contender.attention or model.config._attn_implementation
    return replace(row, attention=attention, backend=backend, stats=stats, cache_bytes=size, peak_memory_bytes=peak)
