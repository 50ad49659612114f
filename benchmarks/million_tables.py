"""table.md of `python -m benchmarks million`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.million_rows import MillionRow
from benchmarks.tables import markdown


def document(rows: Sequence[MillionRow]) -> str:
    """For every length: sizes and recall, then perplexity by position."""
    parts = []
    for tokens in sorted({row.tokens for row in rows}, reverse=True):
        own = [row for row in rows if row.tokens == tokens]
        parts += [
            f"## {tokens:,} tokens\n\n",
            sizes(own),
            "\nPerplexity by position, and by how many per cent it lies ",
            "above the uncompressed cache's on the same tokens (± standard error):\n\n",
            positions(own),
            "\n",
        ]
    return "".join(parts)


def sizes(rows: Sequence[MillionRow]) -> str:
    headings = ["cache", "bits/elem", "cache MB", "bf16 / cache", "perplexity", "recall", "peak MB", "minutes"]
    return markdown(headings, len(headings) - 1, [_size(row) for row in rows])


def _size(row: MillionRow) -> list[str]:
    if row.status != "ok":
        return [f"{row.name} ({row.status}: {row.reason})", *["-"] * 7]
    assert row.cache_bytes is not None
    assert row.bfloat16_bytes is not None
    whole = row.restart is None
    return [
        row.name,
        f"{row.bits_per_element:.2f}" if row.bits_per_element is not None else "-",
        f"{row.cache_bytes / 1e6:,.1f}" if whole else "-",
        f"{row.bfloat16_bytes / row.cache_bytes:.2f}" if whole else "-",
        f"{row.perplexity:.3f}",
        f"{row.recall:.1%}" if row.recall is not None and whole else "-",
        f"{(row.peak_bytes or 0) / 1e6:,.0f}",
        f"{(row.seconds or 0) / 60:.1f}",
    ]


def positions(rows: Sequence[MillionRow]) -> str:
    measured = [row for row in rows if row.perplexity_by_bucket]
    names = list(measured[0].perplexity_by_bucket or {}) if measured else []
    headings = ["cache", *(f"to {int(name):,}" for name in names)]
    return markdown(headings, len(names), [[row.name, *(_cell(row, name) for name in names)] for row in measured])


def _cell(row: MillionRow, name: str) -> str:
    assert row.perplexity_by_bucket is not None
    value = f"{row.perplexity_by_bucket[name]:.2f}"
    if row.increase_by_bucket is None:
        return value
    mean, error = row.increase_by_bucket[name]
    return f"{value} ({mean:+.2f}% ± {error:.2f})"
