"""table.md of `python -m benchmarks latency`: a table for every batch and context, then what was not measured."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.frontier_tables import markdown
from benchmarks.latency_rows import Row

#: Columns: heading, field, format, whether the quartiles stand behind the median.
COLUMNS = (
    ("first token, s", "time_to_first_token_seconds", "{:.3g}", True),
    ("over uncompressed", "first_token_ratio", "{:.2f}x", False),
    ("prefill tok/s", "prefill_tokens_per_second", "{:,.0f}", False),
    ("step, ms", "milliseconds_per_token", "{:.3g}", True),
    ("over uncompressed", "step_ratio", "{:.2f}x", False),
    ("decode tok/s", "decode_tokens_per_second", "{:,.1f}", False),
    ("cache bytes", "cache_bytes", "{:,}", False),
    ("peak bytes", "peak_memory_bytes", "{:,}", False),
    ("attention", "attention", "{}", False),
    ("backend", "backend", "{}", False),
)

#: The fields that the console has room for.
SHORT = ("time_to_first_token_seconds", "first_token_ratio", "decode_tokens_per_second", "step_ratio", "cache_bytes")

NOTES = """Medians, with quartiles in brackets. *first token*: from an empty cache to the prompt's first answer; *step*:
one decode step of the whole batch; tokens per second count all its rows. *over uncompressed*: times the uncompressed
cache's in the same rounds, in which all caches take turns. *cache bytes*: after prompt and steps. *peak bytes*: how far
memory (the device's on a GPU, else the process's) rose meanwhile above what was held before. *backend*: who attends on
codes. What a cache does only once in many steps (a QuantizedCache quantises all anew, a page of ours closes), medians
leave out."""


def document(rows: Sequence[Row], title: str) -> str:
    """The whole of table.md."""
    parts = ["# Latency", title + ".", NOTES]
    for (batch, context), own in cases(rows).items():
        parts += [f"## {batch} x {context:,} tokens", table(own)]
    return "\n\n".join([*parts, *remarks(rows)]) + "\n"


def cases(rows: Sequence[Row]) -> dict[tuple[int, int], list[Row]]:
    """The rows of each batch and context."""
    return {
        case: [row for row in rows if (row.batch, row.context) == case]
        for case in sorted({(row.batch, row.context) for row in rows})
    }


def table(rows: Sequence[Row]) -> str:
    return markdown(["cache", *(heading for heading, *_ in COLUMNS)], [cells(row) for row in rows])


def short(rows: Sequence[Row]) -> list[Table]:
    """What matters most, for the console: medians alone, a table for every batch and context."""
    columns = [column for column in COLUMNS if column[1] in SHORT]
    tables = []
    for (batch, context), own in cases(rows).items():
        table = Table(title=f"{batch} x {context:,} tokens", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("cache", no_wrap=True)
        for heading, *_ in columns:
            table.add_column(heading, justify="right")
        for row in own:
            table.add_row(named(row), *(cell(row, field, form, False) for _, field, form, _ in columns))
        tables.append(table)
    return tables


def named(row: Row) -> str:
    """The cache, or why there is no more to say of it."""
    return row.cache if row.status == "ok" else f"{row.cache} ({row.status})"


def cells(row: Row) -> list[str]:
    """A row as text: a dash for what is missing."""
    return [named(row), *(cell(row, field, form, spread) for _, field, form, spread in COLUMNS)]


def cell(row: Row, field: str, form: str, spread: bool) -> str:
    value = getattr(row, field)
    if value is None:
        return "-"
    quartiles = [form.format(getattr(row, f"{field}_{name}")) for name in ("q1", "q3")] if spread else []
    return form.format(value) + (f" ({' to '.join(quartiles)})" if quartiles else "")


def remarks(rows: Sequence[Row]) -> list[str]:
    """A line for every reason for which a cache was not measured, or its kernels stepped aside."""
    found: dict[str, list[str]] = {}
    for row in rows:
        said = [f"{row.cache}: {row.status}: {row.reason}"] if row.reason is not None else []
        for text in [*said, *(f"{row.cache}: the kernels refuse: {reason}" for reason in row.refusals)]:
            found.setdefault(text, []).append(f"{row.batch} x {row.context}")
    return [f"* {text} ({', '.join(where)})" for text, where in found.items()]
