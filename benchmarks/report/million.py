"""One long document: perplexity by position and recall by depth, from `python -m benchmarks million`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks import million_tables
from benchmarks.million_rows import MillionRow
from benchmarks.report import styles, svg
from benchmarks.report.parts import Figure, Panel, Part, Table
from benchmarks.report.sources import Source

ABOUT = """One document is read from its first token to its last through each cache, and every token is scored.
Perplexity is told by position, in buckets that double; what compression costs is the per cent by which it lies above
the uncompressed cache's on the same tokens. Facts that stand at even depths are asked for at the document's end. Lower
perplexity, more facts recalled and fewer bytes are better. Where no model is named it is a small one made for this:
most of its layers see the last few hundred tokens only, and what is compressed is the layer that sees everything."""

#: Per cent of perplexity that a cache may lose before the picture says so.
TOLERANCE = 1.0

Draw = Any


def part(source: Source) -> Part:
    rows = source.rows(MillionRow)
    longest = max(row.tokens for row in rows)
    own = million_tables.ordered(row for row in rows if row.tokens == longest and row.status == "ok")
    tables = [
        table
        for tokens in sorted({row.tokens for row in rows}, reverse=True)
        for table in _tables(million_tables.ordered(row for row in rows if row.tokens == tokens), tokens)
    ]
    return Part(
        headline=_headline(own, longest),
        found=tuple(
            sentence for sentence in (_uncompressed(own), million_tables.emptied(own), _recalled(own)) if sentence
        ),
        figures=(_figure(own, longest),) if own else (),
        tables=tuple(tables),
        remarks=tuple(f"{row.name}, {row.tokens:,} tokens: {row.status}: {row.reason}" for row in rows if row.reason),
        subject=source.subject,
    )


def _coded(rows: Sequence[MillionRow]) -> list[tuple[MillionRow, str, float]]:
    return [(row, row.worst[0], row.worst[1]) for row in rows if row.spec is not None and row.worst is not None]


def _headline(rows: Sequence[MillionRow], tokens: int) -> str:
    """The smallest cache that keeps to TOLERANCE at every position, or the one that comes nearest."""
    coded = _coded(rows)
    if not coded:
        return f"No compressed cache was measured against the uncompressed one on {tokens:,} tokens."
    sound = [each for each in coded if each[2] <= TOLERANCE]
    row, bucket, most = max(sound, key=lambda e: e[0].smaller or 0.0) if sound else min(coded, key=lambda e: e[2])
    side = "above" if most > 0 else "below"
    said = (
        f"{row.cache} takes {(row.cache_bytes or 0) / 1e6:,.1f} MB, {row.smaller or 0.0:.2f} times smaller than "
        f"bfloat16's {(row.bfloat16_bytes or 0) / 1e6:,.1f} MB; its perplexity is at worst {abs(most):.2f}% {side} the "
        f"uncompressed cache's (positions up to {int(bucket):,})"
    )
    if sound:
        others = len(sound) - 1
        more = f", as {others} larger ones do" if others > 1 else ", as one larger one does" if others else ""
        return f"In {tokens:,} tokens the smallest cache within {TOLERANCE:g}% at every position{more}: {said}."
    return f"In {tokens:,} tokens no cache stays within {TOLERANCE:g}% at every position. The nearest: {said}."


def _uncompressed(rows: Sequence[MillionRow]) -> str:
    base = next((row for row in rows if row.spec is None and row.restart is None), None)
    if base is None or not base.perplexity_by_bucket or len(base.perplexity_by_bucket) < 2:
        return ""
    names = sorted(base.perplexity_by_bucket, key=int)
    low = min(names, key=lambda name: (base.perplexity_by_bucket or {})[name])
    return (
        f"Uncompressed, the model's perplexity is {base.perplexity_by_bucket[low]:.2f} at its best (positions up to "
        f"{int(low):,}) and {base.perplexity_by_bucket[names[-1]]:.2f} in the last bucket (up to {int(names[-1]):,}). "
        "The text differs from bucket to bucket too, so a cache is best held against others in the same one."
    )


def _recalled(rows: Sequence[MillionRow]) -> str:
    told = [f"{row.name} {row.recall:.0%}" for row in rows if row.recall is not None and row.restart is None]
    questions = max((row.questions or 0 for row in rows), default=0)
    return f"Facts recalled at the end, of {questions}: {', '.join(told)}." if told else ""


def _figure(rows: Sequence[MillionRow], tokens: int) -> Figure:
    styled = styles.cache_styles(row.cache for row in rows)
    looks = {
        row.name: {**styled[row.cache], **({"ls": ":", "lw": 1.4} if row.restart is not None else {})} for row in rows
    }
    draws: list[tuple[str, Draw]] = [("Perplexity by position", _perplexity)]
    if any(row.increase_by_bucket for row in rows):
        draws.append(("Per cent above the uncompressed cache, same tokens", _increase))
    if any(row.recall_by_depth for row in rows):
        draws.append(("Facts recalled at the end, by where they stand", partial(_recall, tokens)))
    panels = [Panel(title, svg.panel(partial(draw, rows, looks), f"{title}, {tokens} tokens")) for title, draw in draws]
    legend = tuple((million_label(row), svg.swatch(looks[row.name])) for row in rows)
    caption = (
        f"One document of {tokens:,} tokens, read through each cache. A mark stands at the end of its bucket, which "
        f"begins at half that position; bars are standard errors; the shaded band is {TOLERANCE:g}% on both sides of "
        "the uncompressed cache. Dotted: the uncompressed cache, emptied at intervals, which shows what the longer "
        "context is worth or costs."
    )
    return Figure(caption, tuple(panels), legend)


def million_label(row: MillionRow) -> str:
    return row.name + (f" ({row.bits_per_element:.2f} bits)" if row.bits_per_element is not None else "")


Looks = dict[str, dict[str, Any]]


def _perplexity(rows: Sequence[MillionRow], looks: Looks, axes: Any) -> None:
    for row in rows:
        found = row.perplexity_by_bucket or {}
        axes.plot([int(name) for name in found], list(found.values()), **looks[row.name])
    _positions(rows, axes)
    axes.set(ylabel="perplexity")


def _increase(rows: Sequence[MillionRow], looks: Looks, axes: Any) -> None:
    axes.axhspan(-TOLERANCE, TOLERANCE, color=svg.INK, alpha=0.06, lw=0)
    axes.axhline(0, color=svg.INK, lw=1.2)
    for row in rows:
        if row.increase_by_bucket and row.restart is None:
            means, errors = zip(*row.increase_by_bucket.values(), strict=True)
            axes.errorbar([int(name) for name in row.increase_by_bucket], means, errors, capsize=2, **looks[row.name])
    _positions(rows, axes)
    axes.set(ylabel="per cent")


def _recall(tokens: int, rows: Sequence[MillionRow], looks: Looks, axes: Any) -> None:
    for row in rows:
        if row.recall_by_depth and row.restart is None:
            count = len(row.recall_by_depth)
            places = [100 * (index + 0.5) / count for index in range(count)]
            axes.plot(places, [100 * share for share in row.recall_by_depth], **looks[row.name])
    axes.set(xlabel="where the fact stands, per cent of the document", ylabel="per cent recalled", ylim=(-4, 104))
    axes.set(xlim=(0, 100))


def _positions(rows: Sequence[MillionRow], axes: Any) -> None:
    svg.token_axis(axes, [int(name) for row in rows for name in row.perplexity_by_bucket or {}])
    axes.set_xlabel("position in the document, tokens")


def _tables(rows: Sequence[MillionRow], tokens: int) -> list[Table]:
    where = f"one document of {tokens:,} tokens"
    tables = [
        Table(f"Size, perplexity, recall and time: {where}", million_tables.sizes(rows), note=million_tables.NOTES),
        Table(
            f"Perplexity by position, and per cent above the uncompressed cache (± standard error): {where}",
            million_tables.positions(rows),
        ),
    ]
    if any(row.recall_by_depth for row in rows):
        tables.append(Table(f"{million_tables.DEPTHS}: {where}", million_tables.depths(rows)))
    return tables
