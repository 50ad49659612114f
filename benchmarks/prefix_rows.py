"""The rows of `python -m benchmarks prefix`, one a context and cache, and its table.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.caches import Contender
from benchmarks.tables import markdown
from benchmarks.timing import Quartiles

Key = tuple[int, str]
#: Where the prefix comes from: read by the model, kept in memory, kept on disk.
WAYS = ("without", "memory", "disk")


@dataclass(frozen=True)
class Row:
    """What was measured; None where it was not. status: "ok", else why there is no more, with a `reason`.

    context: tokens that prompts begin with alike; tokens_reused: of them, those that were not read again. Seconds to
    the first token, medians with quartiles (_q1, _q3): without a store, and with the prefix in memory or on disk.
    disk_cold: whether the file had been dropped from the system's memory each time. memory_bytes, disk_bytes: of the
    entry; uncompressed_bytes: of the same tokens in the model's dtype. same_first_token: shares of the prompts whose
    likeliest next token is that without a store.
    """

    cache: str
    context: int
    seed: int
    side: str
    library: str
    spec: dict[str, Any] | None = None
    status: str = "ok"
    reason: str | None = None
    tokens_reused: int | None = None
    seconds_without: float | None = None
    seconds_without_q1: float | None = None
    seconds_without_q3: float | None = None
    seconds_memory: float | None = None
    seconds_memory_q1: float | None = None
    seconds_memory_q3: float | None = None
    seconds_disk: float | None = None
    seconds_disk_q1: float | None = None
    seconds_disk_q3: float | None = None
    disk_cold: bool | None = None
    same_first_token: float | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    uncompressed_bytes: int | None = None

    @property
    def key(self) -> Key:
        return self.context, self.cache

    def timed(self, seconds: dict[str, list[float]]) -> Row:
        """The row with the times of each way that was measured."""
        found: dict[str, Any] = {}
        for way, times in seconds.items():
            found |= Quartiles.of(times).fields(f"seconds_{way}")
        return replace(self, **found)

    def seconds(self, way: str) -> Quartiles | None:
        """To the first token, in one of WAYS; None where that was not measured."""
        return Quartiles.held(self, f"seconds_{way}")


def empty_row(contender: Contender, context: int, seed: int) -> Row:
    """The row of a cache that is not measured yet."""
    return Row(contender.name, context, seed, contender.side, contender.library, contender.content)


NOTES = """Seconds until the first token of a prompt is known: medians, with quartiles in brackets, the three ways
taking turns. A prompt is text that an earlier one began with too, and a question of its own; *reused* are the tokens
that were not read again. *from memory*, *from disk*: the time to look the prefix up, to load and verify it, and to read
the rest of the prompt. *in memory*, *uncompressed*: bytes, as *on disk*."""


def document(rows: Sequence[Row], title: str) -> str:
    """The whole of table.md."""
    parts = ["# Time to first token with stored prefixes", title + ".", NOTES]
    for context in sorted({row.context for row in rows}):
        own = [row for row in rows if row.context == context]
        parts += [f"## {context:,} tokens in common", table(own)]
    warm = [row.cache for row in rows if row.disk_cold is False]
    if warm:
        parts.append("* Files could not be dropped from the system's memory: *from disk* is from there in part.")
    parts += [f"* {row.cache}, {row.context:,} tokens: {row.status}: {row.reason}" for row in rows if row.reason]
    return "\n\n".join(parts) + "\n"


HEADINGS = (
    "cache",
    "read anew, s",
    "from memory, s",
    "from disk, s",
    "reused",
    "bytes on disk",
    "in memory",
    "uncompressed",
)


def table(rows: Sequence[Row]) -> str:
    return markdown(list(HEADINGS), len(HEADINGS) - 1, [cells(row) for row in rows])


def cells(row: Row) -> list[str]:
    """A row as text: a dash for what is missing."""
    sizes = (row.tokens_reused, row.disk_bytes, row.memory_bytes, row.uncompressed_bytes)
    return [
        row.cache if row.status == "ok" else f"{row.cache} ({row.status})",
        *("-" if (found := row.seconds(way)) is None else found.told() for way in WAYS),
        *("-" if size is None else f"{size:,}" for size in sizes),
    ]
