"""million.png: what compression costs by position, perplexity by position, and recall by depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.million_rows import MillionRow


def plot(path: Path, rows: Sequence[MillionRow]) -> None:
    """Write the PNG for the longest document; three panels, a line for each cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    longest = max(row.tokens for row in rows)
    shown = [row for row in rows if row.tokens == longest and row.status == "ok"]
    figure, (first, second, third) = pyplot.subplots(1, 3, figsize=(17, 5.5), layout="constrained")
    for index, row in enumerate(shown):
        style: dict[str, Any] = {"color": f"C{index}", "marker": "o", "markersize": 4, "label": label(row)}
        if row.spec is None:
            style |= {"color": "black" if row.restart is None else "grey", "linestyle": "--"}
        ends = [int(name) for name in row.perplexity_by_bucket or {}]
        first.plot(ends, list((row.perplexity_by_bucket or {}).values()), **style)
        if row.increase_by_bucket is not None and row.restart is None:
            pairs = list(row.increase_by_bucket.values())
            style |= {"yerr": [error for _, error in pairs], "capsize": 2}
            second.errorbar(ends, [mean for mean, _ in pairs], **style)
        if row.recall_by_depth is not None and row.restart is None:
            style.pop("yerr", None), style.pop("capsize", None)
            parts = len(row.recall_by_depth)
            depths = [longest * (part + 0.5) / parts for part in range(parts)]
            third.plot(depths, [100 * share for share in row.recall_by_depth], **style)
    for axes in (first, second):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("position in the document, tokens (end of the bucket)")
    first.set(ylabel="perplexity", title="Perplexity by position")
    second.set(ylabel="per cent", title="Perplexity above the uncompressed cache's, same tokens (± standard error)")
    second.axhline(0, color="black", linewidth=0.8)
    third.set(xlabel="where the fact stands, tokens", ylabel="per cent", title="Facts recalled at the end")
    third.set_ylim(-3, 103)
    for axes in (first, second, third):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"One document of {longest:,} tokens, read through each cache")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def label(row: MillionRow) -> str:
    bits = "" if row.bits_per_element is None else f" ({row.bits_per_element:.2f} bits)"
    return row.name + bits
