"""What is still found in a long text, from `python -m benchmarks retrieval`: heat maps, and a table for each task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.caches import OUR_SIDE, UNCOMPRESSED
from benchmarks.haystack import TASKS
from benchmarks.report import svg
from benchmarks.report.parts import Figure, Panel, Part, Table
from benchmarks.report.sources import Source
from benchmarks.retrieval_rows import Row
from benchmarks.retrieval_tables import NOTES, cell, cells, not_measured, ordered, passed, table

ABOUT = """Facts are put into a long text that goes through the cache, and are asked for at its end. An answer counts
when it is right word for word. What the uncompressed model itself does not find says nothing about a cache."""

#: Colours of no, half and all answers right; black text can be read on each.
SCALE = ("#e0714a", "#f3d99a", "#8cc0e0")


def part(source: Source) -> Part:
    rows = source.rows(Row)
    tables = []
    for task in TASKS:
        own = [row for row in rows if row.task == task]
        if own:
            body, *notes = table(own)
            tables.append(Table(f"{task}: {TASKS[task].say}", body, note="\n\n".join([NOTES, *notes])))
    headline, *found = [sentence for task in TASKS if (sentence := _said(rows, task))] or [""]
    return Part(headline, tuple(found), _figures(rows), tuple(tables), tuple(not_measured(rows)), source.subject)


def _said(rows: Sequence[Row], task: str) -> str:
    """At the longest text that the uncompressed model masters: what it finds, and what the least of ours in bits do."""
    found = {key[1:]: each for key, each in cells(rows).items() if key[0] == task}
    lengths = [tokens for name, tokens in found if name == UNCOMPRESSED.name and passed(found[name, tokens])]
    if not lengths:
        asked = any(row.task == task for row in rows)
        return f"The uncompressed model does not master {task} at any length measured." if asked else ""
    longest = max(lengths)
    base = found[UNCOMPRESSED.name, longest]
    ours = {row.cache for row in rows if row.side == OUR_SIDE}
    known = sorted(
        (each.bits, name, each) for (name, tokens), each in found.items()
        if tokens == longest and name in ours and each.bits is not None
    )  # fmt: skip
    told = ", ".join(f"{name} ({bits:.2f} bits) {each.recall:.0%}" for bits, name, each in known)
    others = f"ours: {told}" if told else "nothing of ours was coded there"
    said = f"the uncompressed cache answers {base.recall:.0%} of {base.questions} questions right"
    return f"{task}, {longest:,} tokens: {said}; {others}."


def _figures(rows: Sequence[Row]) -> tuple[Figure, ...]:
    own = [row for row in rows if row.task in TASKS and TASKS[row.task].deep and row.status == "ok"]
    if not own:
        return ()
    panels = tuple(_panel(name, [row for row in own if row.cache == name], own) for name in ordered(own))
    caption = (
        "One fact in a long text: the share of answers that are right word for word, by the text's length and by "
        "where the fact stands (0% is the beginning). The uncompressed cache comes first, then the others, most bits "
        "first; empty cells were not measured."
    )
    return (Figure(caption, panels, small=True),)


def _panel(name: str, rows: Sequence[Row], all_rows: Sequence[Row]) -> Panel:
    lengths = sorted({row.tokens for row in all_rows})
    depths = sorted({row.depth or 0.0 for row in all_rows})
    found = cell([row for row in rows if row.tokens == max(lengths)])
    bits = f", {found.bits:.2f} bits" if found is not None and found.bits else ""
    size = (1.0 + 0.62 * len(lengths), 0.75 + 0.3 * len(depths))
    return Panel(name + bits, svg.drawn(partial(_draw, rows, lengths, depths), f"Share of needles found: {name}", size))


def _draw(rows: Sequence[Row], lengths: Sequence[int], depths: Sequence[float], figure: Any) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    axes, scale = figure.subplots(), LinearSegmentedColormap.from_list("recall", SCALE)
    for i, depth in enumerate(depths):
        for j, tokens in enumerate(lengths):
            each = cell([row for row in rows if (row.depth or 0.0, row.tokens) == (depth, tokens)])
            colour = svg.GRID if each is None else scale(each.recall)
            axes.add_patch(Rectangle((j + 0.02, i + 0.03), 0.96, 0.94, facecolor=colour, linewidth=0))
            if each is not None:
                text = {"ha": "center", "va": "center", "fontsize": 8, "color": "#10151a"}
                axes.text(j + 0.5, i + 0.5, f"{each.recall:.0%}", **text)
    axes.set(xlim=(0, len(lengths)), ylim=(len(depths), 0), xlabel="length, tokens", ylabel="depth")
    axes.set_xticks([j + 0.5 for j in range(len(lengths))], [svg.tokens(each) for each in lengths])
    axes.set_yticks([i + 0.5 for i in range(len(depths))], [f"{each:.0%}" for each in depths])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
