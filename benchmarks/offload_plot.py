"""steps.png of `python -m benchmarks offload`: a decode step's time by budget, a panel a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.offload_rows import RESIDENT, Row
from benchmarks.timing import Quartiles


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write the PNG: medians, with bars from quartile to quartile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = sorted({row.context for row in rows})
    figure, grid = pyplot.subplots(
        1, len(contexts), figsize=(2 + 4 * len(contexts), 4.5), layout="constrained", squeeze=False
    )
    looks = {row.cache: {"marker": "o", "label": row.cache} for row in rows}
    for axes, context in zip(grid.flat, contexts, strict=True):
        draw([row for row in rows if row.context == context], looks, axes)
        axes.set_title(f"{context:,} tokens", fontsize=10)
        axes.grid(alpha=0.3, axis="y")
    grid[0, 0].legend(fontsize=8)
    figure.suptitle(f"Decode steps with offloaded pages (lower is better)\n{title}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw(rows: Sequence[Row], looks: Mapping[str, Mapping[str, Any]], axes: Any) -> None:
    """A line for each cache of `looks`: its steps' times by budget, over that with all pages on the device."""
    budgets = list(dict.fromkeys(row.budget for row in rows))
    for cache, look in looks.items():
        own = {row.budget: row for row in rows if row.cache == cache and row.step_seconds is not None}
        if RESIDENT in own:
            unit = 1 / (own[RESIDENT].step_seconds or 1.0)
            steps = [step for row in own.values() if (step := Quartiles.held(row, "step_seconds", unit)) is not None]
            errors = list(zip(*(step.errors for step in steps), strict=True))
            places = [budgets.index(budget) for budget in own]
            axes.errorbar(places, [step.median for step in steps], errors, capsize=2, **look)
    axes.set_xticks(range(len(budgets)), budgets)
    axes.set(xlabel="share of the pages that may be on the device", ylabel="times a step with all pages there")
    axes.set_ylim(bottom=0)
