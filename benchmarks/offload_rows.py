"""The rows of `python -m benchmarks offload`, one a context, spec and budget, and its table.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.tables import markdown
from benchmarks.timing import Quartiles
from kvcompress.memory import format_bytes

Key = tuple[int, str, str]
#: The row that the others are compared with: a cache that offloads nothing.
RESIDENT = "resident"


@dataclass(frozen=True)
class Row:
    """What was measured; None where it was not. status: "ok", else why there is no more, with a `reason`.

    budget: the share of the coded pages' bytes that may be on the device, such as "50%"; RESIDENT: no offload.
    step_seconds: of a decode step, the median with quartiles (_q1, _q3); step_ratio: the median over RESIDENT's.
    device_bytes, host_bytes, disk_bytes: where pages and all else that the cache holds lay. peak_bytes: by how much, on
    CUDA, a step raised the device's memory at its highest. same_logits: whether the last step's are those of the cache
    that offloads nothing, bit for bit.
    """

    cache: str
    context: int
    budget: str
    seed: int
    library: str
    spec: dict[str, Any] | None = None
    status: str = "ok"
    reason: str | None = None
    step_seconds: float | None = None
    step_seconds_q1: float | None = None
    step_seconds_q3: float | None = None
    step_ratio: float | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    disk_bytes: int | None = None
    peak_bytes: int | None = None
    same_logits: bool | None = None

    @property
    def key(self) -> Key:
        return self.context, self.cache, self.budget

    def timed(self, seconds: Sequence[float], resident: Sequence[float]) -> Row:
        """The row with the times of its steps; resident: those of the cache that offloads nothing."""
        found = Quartiles.of(seconds)
        ratio = found.median / Quartiles.of(resident).median
        return replace(self, **found.fields("step_seconds"), step_ratio=ratio)


NOTES = """Milliseconds of a decode step: medians, with quartiles in brackets, the budgets taking turns step by step.
*budget*: the share of the bytes of coded pages that may be on the device; the others are read back at every step.
*times*: of the step with all pages on the device. Bytes are those of the whole cache, by where they lie."""

HEADINGS = ("cache", "budget", "step, ms", "times", "on the device", "host memory", "disk", "same logits")


def document(rows: Sequence[Row], title: str) -> str:
    """The whole of table.md."""
    parts = ["# Decode steps with offloaded pages", title + ".", NOTES]
    for context in sorted({row.context for row in rows}):
        own = [row for row in rows if row.context == context]
        parts += [
            f"## {context:,} tokens",
            table(own),
        ]
    parts += [f"* {row.cache}, {row.context:,}, {row.budget}: {row.status}: {row.reason}" for row in rows if row.reason]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Row]) -> str:
    return markdown(list(HEADINGS), len(HEADINGS) - 2, [cells(row) for row in rows])


def cells(row: Row) -> list[str]:
    """A row as text, a dash for what is missing."""
    step = Quartiles.held(row, "step_seconds", 1000)
    sizes = (row.device_bytes, row.host_bytes, row.disk_bytes)
    return [
        row.cache if row.status == "ok" else f"{row.cache} ({row.status})",
        row.budget,
        "-" if step is None else step.told(),
        "-" if row.step_ratio is None else f"{row.step_ratio:.2f}",
        *("-" if size is None else format_bytes(size) for size in sizes),
        "-" if row.same_logits is None else "yes" if row.same_logits else "no",
    ]
