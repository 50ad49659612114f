"""Decode steps whose pages lie beside the device's memory, from `python -m benchmarks offload`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks import offload_plot, offload_rows
from benchmarks.offload_rows import RESIDENT, Row
from benchmarks.report import styles, svg
from benchmarks.report.parts import Figure, Panel, Part, Table
from benchmarks.report.sources import Source, preferred
from kvcompress.memory import format_bytes

ABOUT = """A context can be larger than the device's memory: coded pages beyond a budget then wait in the host's memory
or in a file, and every decode step reads them back, one group of pages at a time. Measured is a decode step's time over
that of the same cache with all pages on the device, for budgets from all pages to none; the caches take turns step by
step, so that all see the same machine. 1 would be free of charge; lower is better. What comes out should be the same
bit for bit."""


def part(source: Source) -> Part:
    rows = source.rows(Row)
    contexts = sorted({row.context for row in rows})
    timed = {
        context: own
        for context in contexts
        if (own := [row for row in rows if row.context == context and row.step_ratio is not None])
    }
    looks = styles.cache_styles(row.cache for own in timed.values() for row in own)
    panels = tuple(
        Panel(f"{context:,} tokens", svg.panel(partial(offload_plot.draw, own, looks), f"Step by budget, {context}"))
        for context, own in timed.items()
    )
    caption = (
        f"A decode step's time by the share of coded pages that may be on the device, over that of a cache which "
        f"offloads nothing ({RESIDENT}): lower is better. Medians, bars from quartile to quartile."
    )
    legend = tuple((name, svg.swatch(look)) for name, look in looks.items())
    tables = tuple(
        Table(
            f"Decode steps with offloaded pages, {context:,} tokens",
            offload_rows.table([row for row in rows if row.context == context]),
            note=offload_rows.NOTES,
        )
        for context in contexts
    )
    headline, *found = [_said(own) for own in reversed(timed.values()) if any(map(_offloads, own))] or [""]
    remarks = [f"{row.cache}, {row.context:,}, {row.budget}: {row.status}: {row.reason}" for row in rows if row.reason]
    if any(line.get("device") == "cpu" for line in source.lines):
        remarks.append("On a CPU pages go to a file, which the system may keep in its own memory: what is timed there "
                       "is the reading, not the disk.")  # fmt: skip
    figures = (Figure(caption, panels, legend),) if panels else ()
    return Part(headline, (*found, *_alike(rows)), figures, tables, tuple(remarks), source.subject)


def _offloads(row: Row) -> bool:
    return bool((row.host_bytes or 0) + (row.disk_bytes or 0)) and row.step_ratio is not None


def _said(rows: Sequence[Row]) -> str:
    """What the smallest budget costs the default spec, or else the first that was measured."""
    cache = preferred([row for row in rows if _offloads(row)]).cache
    own = min((row for row in rows if row.cache == cache and _offloads(row)), key=lambda row: row.device_bytes or 0)
    away = (own.host_bytes or 0) + (own.disk_bytes or 0)
    return (
        f"With {own.context:,} tokens of {own.cache} and room for {own.budget} of the pages, {format_bytes(away)} of "
        f"{format_bytes(away + (own.device_bytes or 0))} lie outside the device, and a decode step takes "
        f"{own.step_ratio:.2f} times as long as with all of them there."
    )


def _alike(rows: Sequence[Row]) -> list[str]:
    known = [row.same_logits for row in rows if row.same_logits is not None]
    if not known:
        return []
    return [f"The logits were those of the cache that offloads nothing, bit for bit, in {sum(known)} of {len(known)}."]
