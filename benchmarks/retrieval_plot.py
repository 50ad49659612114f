"""heatmaps.png of `python -m benchmarks retrieval`: where in how long a text the needle was found, a panel a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.haystack import TASKS
from benchmarks.retrieval_rows import Row
from benchmarks.retrieval_tables import cell, ordered

#: Panels in a line.
COLUMNS = 4


def plot(path: Path, rows: Sequence[Row], title: str) -> bool:
    """Write the PNG; False, and nothing, where no task with depths was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    own = [row for row in rows if TASKS[row.task].deep and row.status == "ok"]
    if not own:
        return False
    names = ordered(own)
    columns = min(len(names), COLUMNS)
    lines = math.ceil(len(names) / columns)
    lengths, depths = sorted({row.tokens for row in own}), sorted({row.depth or 0.0 for row in own})
    size = (1.2 + columns * (1.2 + 0.6 * len(lengths)), 1.4 + lines * (0.9 + 0.4 * len(depths)))
    figure, grid = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    panels = list(zip(grid.flat, names, strict=False))
    images = [draw(axes, [row for row in own if row.cache == name], lengths, depths) for axes, name in panels]
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    figure.suptitle(f"One fact in a long text, asked for at its end: share of answers right word for word\n{title}")
    figure.supxlabel("length of the text, tokens")
    figure.supylabel("where the fact stands: 0% the beginning, 100% the end")
    figure.colorbar(images[0], ax=grid, label="right answers", format=PercentFormatter(1), aspect=40)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def draw(axes: Any, rows: Sequence[Row], lengths: Sequence[int], depths: Sequence[float]) -> Any:
    """One panel: lengths to the right, depths downwards; what was not measured stays grey. Returns the image."""
    found = np.full((len(depths), len(lengths)), np.nan)
    for i, depth in enumerate(depths):
        for j, length in enumerate(lengths):
            each = cell([row for row in rows if (row.depth, row.tokens) == (depth, length)])
            if each is not None:
                found[i, j] = each.recall
                axes.text(j, i, f"{each.recall:.0%}", ha="center", va="center", fontsize=8, color=ink(each.recall))
    axes.set_facecolor("0.85")
    image = axes.imshow(found, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
    axes.set_xticks([j - 0.5 for j in range(1, len(lengths))], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, len(depths))], minor=True)
    axes.grid(which="minor", color="white")
    axes.tick_params(which="minor", length=0)
    bits = cell([row for row in rows if row.tokens == max(lengths)])
    said = f"\n{bits.bits:.2f} bits/elem" if bits is not None and bits.bits else "\n"
    axes.set_title(f"{rows[0].cache}{said}", fontsize=9)
    return image


def ink(recall: float) -> str:
    """The colour of letters that can be read on a cell's: the ends of the scale are dark."""
    return "black" if 0.15 < recall < 0.85 else "white"
