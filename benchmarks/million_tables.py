"""table.md of `python -m benchmarks million`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.million_rows import MillionRow
from benchmarks.tables import markdown

NOTES = """*bits/elem*: of what is coded, with all overheads. *cache*: all that the cache holds at the end, the sliding
layers' exact windows included, measured; *bf16 / cache*: how many times that goes into what the same tokens would take
in bfloat16. *largest rise*: of perplexity over the uncompressed cache's in the bucket of positions where it is largest,
on the same tokens, with its standard error. *recall*: facts whose answer, asked for at the end, is right word for word.
*peak*: how far the process (on a GPU: its memory) grew beside the model; "-": not measured. *N tokens at a time*: the
uncompressed cache was emptied after every N tokens, so that no token saw more than N before it: what it loses is what
the longer context is worth to this model, what it gains is what that costs. It is no compressed cache; its size and
recall mean nothing and are left out."""


DEPTHS = "Facts recalled at the end of the document, by the part of it where they stand"


def ordered(rows: Iterable[MillionRow]) -> list[MillionRow]:
    """Uncompressed caches first, then the others from the most bits to the fewest."""
    return sorted(rows, key=lambda row: -math.inf if row.bits_per_element is None else -row.bits_per_element)


def document(rows: Sequence[MillionRow]) -> str:
    """For every length: sizes and recall, perplexity by position, recall by depth."""
    parts = []
    for tokens in sorted({row.tokens for row in rows}, reverse=True):
        own = ordered(row for row in rows if row.tokens == tokens)
        parts += [
            f"## {tokens:,} tokens\n\n",
            sizes(own),
            f"\n{NOTES}\n\nPerplexity by position, and by how many per cent it lies ",
            "above the uncompressed cache's on the same tokens (± standard error):\n\n",
            positions(own),
            "\n",
        ]
        if any(row.recall_by_depth for row in own):
            parts += [f"{DEPTHS}:\n\n", depths(own), "\n"]
    return "".join(parts)


def sizes(rows: Sequence[MillionRow]) -> str:
    headings = [
        "cache", "bits/elem", "cache MB", "bf16 / cache", "perplexity", "largest rise", "recall", "peak MB", "minutes"
    ]  # fmt: skip
    return markdown(headings, len(headings) - 1, [_size(row) for row in rows])


def _size(row: MillionRow) -> list[str]:
    if row.status != "ok":
        return [f"{row.name} ({row.status}: {row.reason})", *["-"] * 8]
    whole = row.restart is None
    return [
        row.name,
        *size(row),
        f"{row.perplexity:.3f}",
        rise(row),
        recalled(row),
        f"{row.peak_bytes / 1e6:,.0f}" if whole and row.peak_bytes else "-",
        f"{(row.seconds or 0) / 60:.1f}",
    ]


def size(row: MillionRow) -> list[str]:
    """Bits an element, MB, and how many times smaller than bfloat16; dashes where a cache was emptied on the way."""
    if row.restart is not None or row.cache_bytes is None or row.smaller is None:
        return ["-"] * 3
    bits = f"{row.bits_per_element:.2f}" if row.bits_per_element is not None else "-"
    return [bits, f"{row.cache_bytes / 1e6:,.1f}", f"{row.smaller:.2f}"]


def rise(row: MillionRow) -> str:
    """The largest increase of perplexity in a bucket."""
    if row.worst is None:
        return "-"
    _, mean, error = row.worst
    return f"{mean:+.2f}% ± {error:.2f}"


def recalled(row: MillionRow) -> str:
    return f"{row.recall:.1%}" if row.recall is not None and row.restart is None else "-"


def emptied(rows: Sequence[MillionRow]) -> str:
    """What the longer context is worth, or costs, in the last bucket; "" where no cache was emptied on the way."""
    own = next((row for row in rows if row.restart is not None and row.increase_by_bucket), None)
    if own is None or own.increase_by_bucket is None:
        return ""
    name = max(own.increase_by_bucket, key=int)
    mean, error = own.increase_by_bucket[name]
    return (
        f"Emptied after every {own.restart:,} tokens, so that no token sees more than these, the uncompressed cache's "
        f"perplexity in the last bucket (up to {int(name):,}) is {mean:+.2f}% ± {error:.2f} from that of the whole "
        f"context: so much {'is the longer context worth to' if mean > 0 else 'does the longer context cost'} this "
        "model there."
    )


def depths(rows: Sequence[MillionRow]) -> str:
    """Recall by the part of the document where the facts stand, from its begin to its end."""
    known = [row for row in rows if row.recall_by_depth and row.restart is None]
    parts = len(known[0].recall_by_depth or []) if known else 0
    headings = ["cache", *(f"{100 * part / parts:.0f} to {100 * (part + 1) / parts:.0f}%" for part in range(parts))]
    lines = [[row.name, *(f"{each:.0%}" for each in row.recall_by_depth or [])] for row in known]
    return markdown(headings, parts, lines)


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
