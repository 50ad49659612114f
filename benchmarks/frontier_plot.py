"""frontier.png: bits against loss, one panel for every subject and context, ours and the peers' methods apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.caches import OUR_SIDE, PEER_SIDE
from benchmarks.frontier_tables import title
from benchmarks.pareto import Summary, optimal, panels, summarise
from benchmarks.rows import Row

#: Left out: more bits, and what loses nothing that a log scale could show.
MOST_BITS, LEAST_LOSS = 9.5, 1e-7

#: Line and marker by side.
STYLES = {OUR_SIDE: {"ls": "-", "marker": "o", "lw": 1.4}, PEER_SIDE: {"ls": "--", "marker": "s", "lw": 1.0}}
#: Colour maps by side: distinct hues for ours, greyer ones for the peers.
COLOURS = {OUR_SIDE: "tab10", PEER_SIDE: "Dark2"}
MARKERS = {OUR_SIDE: "oPDv^<>*", PEER_SIDE: "sXdph8H"}


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Write the PNG: a family is a line, the grey line is the Pareto frontier, its caches have their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = panels(rows)
    columns = min(len(found), 2)
    lines = math.ceil(len(found) / columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(7.5 * columns, 5 * lines + 1), layout="constrained", squeeze=False
    )
    styles = families(rows)
    for axes, (panel, own) in zip(grid.flat, found.items(), strict=False):
        draw(axes, shown(summarise(own)), styles)
        is_kl = any(row.kl_mean is not None for row in own)
        axes.set_ylabel("KL to the uncompressed model, nats per token" if is_kl else "error of attention's output")
        axes.set_title(title(panel, own), fontsize=10)
    for axes in list(grid.flat)[len(found) :]:
        axes.set_visible(False)
    lines_by_label = {
        label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels = sorted(lines_by_label, key=lambda label: (f"({PEER_SIDE})" in label, f"({OUR_SIDE})" not in label))
    if labels:
        handles = [lines_by_label[label] for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def shown(summaries: Sequence[Summary]) -> list[Summary]:
    """Those that the axes have room for."""
    return [
        each
        for each in summaries
        if each.bits is not None and each.bits <= MOST_BITS and each.loss is not None and each.loss > LEAST_LOSS
    ]


def families(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Any]]:
    """How each (side, family) is drawn, the same in all panels."""
    from matplotlib import colormaps

    styles: dict[tuple[str, str], dict[str, Any]] = {}
    for side, base in STYLES.items():
        names = list(dict.fromkeys(row.family for row in rows if row.side == side))
        colours = colormaps[COLOURS[side]].colors  # type: ignore[attr-defined]
        for index, name in enumerate(names):
            colour, marker = colours[index % len(colours)], MARKERS[side][index % len(MARKERS[side])]
            styles[side, name] = {**base, "color": colour, "marker": marker}
    return styles


def draw(axes: Any, summaries: Sequence[Summary], styles: dict[tuple[str, str], dict[str, Any]]) -> None:
    """One panel."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for each in summaries:
        points.setdefault((each.side, each.family), []).append((each.bits or 0.0, each.loss or 0.0))
    for (side, family), own in points.items():
        filled = {} if side == OUR_SIDE else {"mfc": "white"}
        axes.plot(*zip(*sorted(own), strict=True), label=f"{family} ({side})", ms=5, **styles[side, family], **filled)
    best = optimal(summaries)
    edge = sorted((each.bits or 0.0, each.loss or 0.0, each.cache) for each in summaries if each.cache in best)
    if edge:
        axes.plot(*list(zip(*edge, strict=True))[:2], color="0.6", lw=6, alpha=0.45, zorder=0, label="Pareto frontier")
    for bits, lost, name in edge:
        axes.annotate(name, (bits, lost), textcoords="offset points", xytext=(-3, -12), fontsize=7, ha="right")
    axes.set(yscale="log", xlabel="bits per element, measured, with overheads")
    axes.margins(x=0.12, y=0.08)  # room for the names
    axes.grid(alpha=0.3, which="both")
