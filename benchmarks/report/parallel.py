"""One context on several processes, from `python -m benchmarks parallel`: as measured here, as calculated for GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks import parallel_estimate, parallel_tables
from benchmarks.parallel_estimate import Estimate
from benchmarks.parallel_rows import Row
from benchmarks.report import svg
from benchmarks.report.parts import Figure, Panel, Part, Table
from benchmarks.report.sources import Source, preferred
from benchmarks.tables import markdown
from kvcompress.memory import format_bytes

ABOUT = """One context can lie on several devices: every process (a *rank*) runs the model on the same tokens and keeps
its share of the coded pages, and in every layer one exchange of sums (an all-reduce) merges what each attends to.
Measured are the bytes that a rank holds, the bytes that it hands to others for a decoded token, and how far the last
logits are from a single rank's: less is better in all of them. Bytes and traffic are the same on any machine. What
published GPUs would take is calculated from the same formats, and says so."""


def part(source: Source) -> Part:
    rows = source.rows(Row)
    done = [row for row in rows if row.page_bytes and row.held_bytes]
    beside = source.path.with_name("estimate.json")
    found = parallel_estimate.read(beside) if beside.exists() else []
    panels = []
    if done:
        panels.append(Panel("Measured", svg.panel(partial(parallel_tables.measured, done), "Bytes by rank")))
    if found:
        panels.append(Panel("Calculated", svg.panel(partial(parallel_tables.calculated_bars, found), "Bytes by GPU")))
    tables = [Table("Measured: what ranks hold and hand over", parallel_tables.table(rows), note=parallel_tables.NOTES)]
    if found:
        tables.append(_calculated(found))
    said = [_fits(found)] if found else []
    remarks = tuple(f"{row.cache}, {row.ranks} ranks: {row.status}: {row.reason}" for row in rows if row.reason)
    figures = (Figure(_caption(done, found), tuple(panels), _legend(found)),) if panels else ()
    return Part(_said(done), tuple(said), figures, tuple(tables), remarks, source.subject)


def _said(rows: Sequence[Row]) -> str:
    """What most ranks hold of the default spec's pages, or else of the first that was measured."""
    shared = [row for row in rows if row.ranks > 1]
    if not shared:
        return ""
    cache = preferred(shared).cache
    most = max((row for row in shared if row.cache == cache), key=lambda row: row.ranks)
    pages = most.page_bytes or [0]
    return (
        f"On {most.ranks} ranks {most.cache} of {most.tokens:,} tokens leaves the fullest one "
        f"{max(pages) / max(sum(pages), 1):.0%} of the pages' bytes; a rank hands {most.step_payload or 0:,} bytes to "
        f"the others for a decoded token, and the logits are within {most.difference or 0:.1e} of a single rank's."
    )


def _fits(found: Sequence[Estimate]) -> str:
    most = found[-1]
    fits = "fit" if most.total <= most.machine.memory else "do not fit"
    return (
        f"Calculated, not measured: {most.tokens:,} tokens of {most.geometry} with {most.spec} {fits} on "
        f"{most.machine.gpus} GPUs of {format_bytes(most.machine.memory)}; each holds {format_bytes(most.total)}, the "
        f"weights included."
    )


def _caption(rows: Sequence[Row], found: Sequence[Estimate]) -> str:
    said = []
    if rows:
        said.append("Measured: bytes of the rank that holds most, by cache and number of ranks.")
    if found:
        first = found[0]
        said.append(
            f"Calculated: bytes of a GPU for {first.tokens:,} tokens of {first.geometry} with {first.spec}, by number "
            "of GPUs; the red line is what a GPU has."
        )
    return " ".join([*said, "Lower is better."])


def _legend(found: Sequence[Estimate]) -> tuple[tuple[str, str], ...]:
    names = {**parallel_tables.MEASURED, **(parallel_tables.CALCULATED if found else {})}
    return tuple((name, svg.swatch({"color": colour, "lw": 6})) for name, colour in names.items())


def _calculated(found: Sequence[Estimate]) -> Table:
    headings = ["GPUs", "a GPU holds", "weights", "its pages", "fits", "sent by a GPU, a token", "link, ms", "read, ms"]
    lines = [
        [
            str(each.machine.gpus),
            *map(format_bytes, (each.total, each.weights, each.pages)),
            "yes" if each.total <= each.machine.memory else "no",
            format_bytes(each.step_sent),
            f"{1000 * each.step_link_seconds:.2f}",
            f"{1000 * each.step_read_seconds:.1f}",
        ]
        for each in found
    ]
    note = "*link*, *read*: the time of a decoded token's all-reduces, and of reading weights and pages, at least. It "
    note += "rests on this:\n\n" + "\n".join(f"* {line}" for line in found[-1].assumptions)
    first = found[0]
    caption = f"Calculated, not measured: {first.tokens:,} tokens of {first.geometry} with {first.spec}"
    return Table(caption, markdown(headings, len(headings), lines), note=note)
