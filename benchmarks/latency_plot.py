"""decode.png of `python -m benchmarks latency`: decode speed against context, a line a cache, a panel a batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.caches import OUR_SIDE, REFERENCE
from benchmarks.latency_rows import Row

MARKERS = "oPDv^<>*sXdph8H"


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write the PNG: medians, with bars from quartile to quartile; the uncompressed cache black, ours drawn through."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = sorted({row.batch for row in rows})
    figure, grid = pyplot.subplots(
        1,
        len(batches),
        figsize=(2 + 5.5 * len(batches), 5.2),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    styles = looks(rows)
    for axes, batch in zip(grid.flat, batches, strict=True):
        draw(axes, [row for row in rows if row.batch == batch], styles)
        axes.set_title(f"{batch} row{'s' if batch > 1 else ''} in the batch", fontsize=10)
    grid[0, 0].set_ylabel("decode tokens per second, all rows of the batch")
    lines = {name: line for axes in grid.flat for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    if lines:
        figure.legend(list(lines.values()), list(lines), loc="outside right upper", fontsize=8)
    figure.suptitle(
        f"Decode speed against context (higher is better): medians, bars from quartile to quartile\n{title}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def looks(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of every cache."""
    from matplotlib import colormaps

    colours = [*colormaps["tab10"].colors, *colormaps["Dark2"].colors]  # type: ignore[attr-defined]
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.cache not in found:
            count = len(found)
            line = "-" if row.side == OUR_SIDE else "--"
            found[row.cache] = {"ls": line, "color": colours[count % len(colours)], "lw": 1.2}
            found[row.cache]["marker"] = MARKERS[count % len(MARKERS)]
            if row.side == REFERENCE:
                found[row.cache] |= {"ls": "-", "color": "black", "lw": 2.2}
    return found


def draw(axes: Any, rows: Sequence[Row], styles: dict[str, dict[str, Any]]) -> None:
    """One panel; caches that were not timed have no line."""
    from matplotlib.ticker import LogLocator

    for name, style in styles.items():
        own = sorted((row for row in rows if row.cache == name and row.status == "ok"), key=lambda row: row.context)
        if own:
            speed = [row.decode_tokens_per_second or 0.0 for row in own]
            # speed falls as time rises: the upper quartile of time is the lower one of speed
            slow = [row.batch * 1000 / (row.milliseconds_per_token_q3 or 1.0) for row in own]
            fast = [row.batch * 1000 / (row.milliseconds_per_token_q1 or 1.0) for row in own]
            errors = [
                [at - low for at, low in zip(speed, slow, strict=True)],
                [high - at for at, high in zip(speed, fast, strict=True)],
            ]
            axes.errorbar([row.context for row in own], speed, errors, label=name, ms=5, capsize=2, **style)
    contexts = sorted({row.context for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache (context)")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3, which="both")
