"""first-token.png of `python -m benchmarks prefix`: bars of seconds by cache and way, a panel a context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.prefix_rows import WAYS, Row

#: What the ways are called, and their colours.
NAMES = {"without": "read anew", "memory": "prefix from memory", "disk": "prefix from disk"}
COLOURS = {"without": "#7d8797", "memory": "#2f6fdf", "disk": "#e0662b"}


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write the PNG: medians, with bars from quartile to quartile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = sorted({row.context for row in rows})
    figure, grid = pyplot.subplots(
        1, len(contexts), figsize=(2 + 4.5 * len(contexts), 4.5), layout="constrained", squeeze=False
    )
    for axes, context in zip(grid.flat, contexts, strict=True):
        draw([row for row in rows if row.context == context], axes)
        axes.set_title(f"{context:,} tokens in common with an earlier prompt", fontsize=10)
        axes.grid(alpha=0.3, axis="y")
    grid[0, 0].legend(fontsize=8)
    figure.suptitle(f"Prompts that begin as an earlier one did (lower is better)\n{title}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw(rows: Sequence[Row], axes: Any, ink: str = "black") -> None:
    """A group of bars for each cache, one for each way that was measured; ink: the colour of quartiles."""
    own = [row for row in rows if row.status == "ok"]
    for place, way in enumerate(WAYS):
        bars = [(at, seconds) for at, row in enumerate(own) if (seconds := row.seconds(way)) is not None]
        errors = list(zip(*(seconds.errors for _, seconds in bars), strict=True)) or None
        where, medians = [at + 0.27 * (place - 1) for at, _ in bars], [seconds.median for _, seconds in bars]
        axes.bar(where, medians, 0.25, yerr=errors, label=NAMES[way], color=COLOURS[way], capsize=2, ecolor=ink)
    axes.set_xticks(range(len(own)), [row.cache for row in own], rotation=20, ha="right", fontsize=8)
    axes.set_ylabel("seconds to the first token")
