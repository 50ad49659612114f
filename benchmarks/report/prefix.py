"""Time to first token where a prompt's beginning is stored, from `python -m benchmarks prefix`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks import prefix_plot, prefix_rows
from benchmarks.prefix_rows import WAYS, Row
from benchmarks.report import svg
from benchmarks.report.parts import Figure, Panel, Part, Table
from benchmarks.report.sources import Source, preferred

ABOUT = """Many prompts begin alike: with the same instructions, or the same document. Here one prompt has been read and
its compressed cache put into a store; others, which begin as it did and then ask something of their own, go on from
what is stored. Measured is the time from handing over such a prompt until its first token is known, in three ways that
take turns: the whole prompt is read anew; its beginning comes from the store's memory; it comes from disk, where the
file is loaded and verified. Less is better. The ways take turns, so their ratios hold even where seconds depend on what
else the machine does; the caches come one after another, and are less well told apart."""


def part(source: Source) -> Part:
    rows = source.rows(Row)
    contexts = sorted({row.context for row in rows})
    timed = {context: [row for row in rows if (row.context, row.status) == (context, "ok")] for context in contexts}
    panels = tuple(
        Panel(
            f"{context:,} tokens in common",
            svg.panel(partial(prefix_plot.draw, own, ink=svg.INK), f"Seconds to the first token, {context} in common"),
        )
        for context, own in timed.items()
        if own
    )
    legend = tuple(
        (name, svg.swatch({"color": prefix_plot.COLOURS[way], "lw": 6})) for way, name in prefix_plot.NAMES.items()
    )
    caption = (
        "Seconds to the first token of a prompt that begins as an earlier one did (lower is better): medians, bars "
        "from quartile to quartile. The uncompressed cache is always read anew."
    )
    tables = tuple(
        Table(
            f"Time to first token with {context:,} tokens in common",
            prefix_rows.table([row for row in rows if row.context == context]),
            note=prefix_rows.NOTES,
        )
        for context in contexts
    )
    headline, *found = [_said(own) for own in reversed(timed.values()) if any(map(_reused, own))] or [""]
    remarks = [f"{row.cache}, {row.context:,} tokens: {row.status}: {row.reason}" for row in rows if row.reason]
    if any(row.disk_cold is False for row in rows):
        remarks.append("Files could not be dropped from the system's memory: *from disk* is from there in part.")
    figures = (Figure(caption, panels, legend),) if panels else ()
    return Part(headline, (*found, *_alike(rows)), figures, tables, tuple(remarks), source.subject)


def _reused(row: Row) -> bool:
    return all(row.seconds(way) is not None for way in WAYS)


def _said(rows: Sequence[Row]) -> str:
    """What the store saves the default spec, or else the first that was measured."""
    own = preferred([row for row in rows if _reused(row)])
    anew, memory, disk = (seconds.median for way in WAYS if (seconds := own.seconds(way)) is not None)
    said = (
        f"Of a prompt whose first {own.context:,} tokens were read before, {own.cache} knows the first token "
        f"{anew / memory:.1f} times sooner with the store's memory than without it, and {anew / disk:.1f} times sooner "
        f"from disk"
    )
    if own.disk_bytes and own.uncompressed_bytes:
        share = own.disk_bytes / own.uncompressed_bytes
        said += f"; the stored prompt takes {share:.0%} of its uncompressed cache's bytes on disk"
    return said + "."


def _alike(rows: Sequence[Row]) -> list[str]:
    """Whether what is stored gives the tokens that reading anew gives."""
    shares = [row.same_first_token for row in rows if row.same_first_token is not None]
    if not shares:
        return []
    where = "all prompts" if min(shares) == 1 else f"{min(shares):.0%} of the prompts of each cache, or more"
    return [f"The first token was that of reading anew in {where}."]
