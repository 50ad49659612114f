"""memory.png: bytes of every cache against the context, a panel a geometry, with the limit of the device drawn in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory_rows import LAYERWISE, SLOPE, WHOLE, Fit, Row
from kvcompress.memory import format_bytes

#: Markers by how a point is known: filled as a whole, layer by layer, and hollow where nothing was filled.
MARKERS: dict[str, dict[str, Any]] = {
    WHOLE: {"marker": "o"},
    LAYERWISE: {"marker": "s"},
    SLOPE: {"marker": "s", "mfc": "white"},
}
COLUMNS = 3


def plot(path: Path, rows: Sequence[Row], fits: Sequence[Fit]) -> None:
    """Write the PNG. The red line is what the device has beside weights and reserve, as `fits` has it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps, pyplot
    from matplotlib.lines import Line2D

    geometries = list(dict.fromkeys(row.geometry for row in rows))
    caches = list(dict.fromkeys(row.cache for row in rows if row.cache_bytes is not None))
    colours = {cache: colormaps["tab10"](index % 10) for index, cache in enumerate(caches)}
    columns = min(len(geometries), COLUMNS)
    lines = math.ceil(len(geometries) / columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(5.2 * columns + 1.5, 4.4 * lines + 1.2), layout="constrained", squeeze=False
    )
    for axes, geometry in zip(grid.flat, geometries, strict=False):
        for cache in caches:
            own = [row for row in rows if (row.geometry, row.cache) == (geometry, cache)]
            _line(axes, [row for row in own if row.cache_bytes is not None], colours[cache])
        memory = next((fit.cache_memory for fit in fits if fit.geometry == geometry), None)
        if memory is not None and memory > 0:
            axes.axhline(memory, color="red", lw=1.2)
            said = f"{format_bytes(memory)} beside the weights"
            axes.annotate(
                said, (0.02, memory), xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="red"
            )
        _dress(axes, geometry)
    for axes in list(grid.flat)[len(geometries) :]:
        axes.set_visible(False)
    handles = [Line2D([], [], color=colours[cache], label=cache) for cache in caches]
    styles = {WHOLE: "all layers filled", LAYERWISE: "layer by layer", SLOPE: "on the slope, not filled"}
    handles += [Line2D([], [], color="0.3", ls="", label=styles[basis], **style) for basis, style in MARKERS.items()]
    handles.append(Line2D([], [], color="red", label="what the device has for the cache"))
    figure.suptitle("Bytes of the cache against the context (bfloat16 models, one row)")
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _line(axes: Any, rows: Sequence[Row], colour: Any) -> None:
    """One cache: a line through its contexts, and a marker at each that says how it is known."""
    ordered = sorted(rows, key=lambda row: row.tokens)
    points = [(row.tokens, row.cache_bytes) for row in ordered]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, lw=1.1)
    for row in ordered:
        axes.plot(row.tokens, row.cache_bytes, color=colour, ms=4, **MARKERS[row.basis or SLOPE])


def _dress(axes: Any, title: str) -> None:
    """Scales in powers of two, and what they are of."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(
        lambda tokens, _: f"{tokens / 1024:g}k" if tokens < 2**20 else f"{tokens / 2**20:g}M"
    )
    axes.yaxis.set_major_formatter(lambda held, _: format_bytes(held).replace(".00", ""))
    axes.set(xlabel="tokens", ylabel="cache")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3, which="both")
