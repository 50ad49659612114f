"""first-token.png of `python -m benchmarks prefix`: bars of seconds by cache and way, a panel a context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.prefix_rows import WAYS, Row

NAMES = {"without": "read anew", "memory": "prefix from memory", "disk": "prefix from disk"}
COLOURS = {"without": "0.6", "memory": "tab:blue", "disk": "tab:orange"}


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
        own = [row for row in rows if row.context == context and row.status == "ok"]
        for place, way in enumerate(WAYS):
            bars = [(at, row) for at, row in enumerate(own) if getattr(row, f"seconds_{way}") is not None]
            medians = [getattr(row, f"seconds_{way}") for _, row in bars]
            ends = [
                [
                    abs(getattr(row, f"seconds_{way}{end}") - median)
                    for (_, row), median in zip(bars, medians, strict=True)
                ]
                for end in ("_q1", "_q3")
            ]
            where = [at + 0.27 * (place - 1) for at, _ in bars]
            axes.bar(where, medians, 0.25, yerr=ends, label=NAMES[way], color=COLOURS[way], capsize=2)
        axes.set_xticks(range(len(own)), [row.cache for row in own], rotation=20, ha="right", fontsize=8)
        axes.set_title(f"{context:,} tokens in common with an earlier prompt", fontsize=10)
        axes.grid(alpha=0.3, axis="y")
    grid[0, 0].set_ylabel("seconds to the first token")
    grid[0, 0].legend(fontsize=8)
    figure.suptitle(f"Prompts that begin as an earlier one did (lower is better)\n{title}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
