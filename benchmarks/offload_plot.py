"""steps.png of `python -m benchmarks offload`: seconds of a decode step by budget, a panel a context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.offload_rows import Row


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write the PNG: medians, with bars from quartile to quartile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = sorted({row.context for row in rows})
    figure, grid = pyplot.subplots(
        1, len(contexts), figsize=(2 + 4 * len(contexts), 4.5), layout="constrained", squeeze=False
    )
    for axes, context in zip(grid.flat, contexts, strict=True):
        own = [row for row in rows if row.context == context and row.seconds is not None]
        budgets = list(dict.fromkeys(row.budget for row in own))
        for cache in dict.fromkeys(row.cache for row in own):
            points = [(budgets.index(row.budget), row) for row in own if row.cache == cache]
            medians = [1000 * (row.seconds or 0) for _, row in points]
            low = [median - 1000 * (row.seconds_q1 or 0) for median, (_, row) in zip(medians, points, strict=True)]
            high = [1000 * (row.seconds_q3 or 0) - median for median, (_, row) in zip(medians, points, strict=True)]
            axes.errorbar([place for place, _ in points], medians, yerr=[low, high], marker="o", capsize=2, label=cache)
        axes.set_xticks(range(len(budgets)), budgets, fontsize=8)
        axes.set_xlabel("share of the pages that may be on the device")
        axes.set_title(f"{context:,} tokens", fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3, axis="y")
    grid[0, 0].set_ylabel("milliseconds of a decode step")
    grid[0, 0].legend(fontsize=8)
    figure.suptitle(f"Decode steps with offloaded pages (lower is better)\n{title}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
