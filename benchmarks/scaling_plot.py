"""scaling.png: measured KL with the fitted lines and their intervals, one panel for each context, and one for ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scaling_points import Points
from kvcompress.fits import FamilyFit, Fits

Pair = tuple[Points, FamilyFit]


def plot(path: Path, pairs: Sequence[Pair], fits: Fits) -> None:
    """Write the PNG; pairs: the fitted families of one subject."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        (kind, context)
        for kind in ("bits", "rank")
        for context in sorted({c for found, fit in pairs if fit.kind == kind for c in found.contexts.tolist()})
    ]
    columns = min(len(panels), 2)
    lines = math.ceil(len(panels) / columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(7.5 * columns, 5 * lines + 1), layout="constrained", squeeze=False
    )
    colours = {fit.family: f"C{index}" for index, (_, fit) in enumerate(pairs)}
    for axes, (kind, context) in zip(grid.flat, panels, strict=False):
        for found, fit in pairs:
            if fit.kind == kind and context in found.contexts:
                draw(axes, found, fit, context, colours[fit.family])
        axes.set(
            yscale="log",
            xlabel="bits an element (codes and scales)" if kind == "bits" else "directions kept of each head",
            ylabel="KL to the uncompressed model, nats per token",
            title=f"{context:,} tokens of context",
        )
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(
        f"What compression costs, measured (points: documents) and fitted (lines; shaded: 95% interval of one more "
        f"document)\n{fits.model}, {fits.shape.parameters:,} parameters, {fits.text}"
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw(axes: Any, found: Points, fit: FamilyFit, context: int, colour: str) -> None:
    """A family at one context: its documents, its line, the interval."""
    here = found.contexts == context
    for losses in found.losses:
        axes.plot(found.x[here], losses[here], "o", ms=4, color=colour)
    xs = np.linspace(*fit.x, 60)
    kls = [fit.expected(float(x), context)[0] for x in xs]
    slope = fit.loss.coefficient(fit.kind).map(lambda value: math.exp(-value))
    step = f"a bit less: x {slope.mean:.2f}" if fit.kind == "bits" else f"a direction less: x {slope.mean:.3f}"
    axes.plot(xs, [kl.mean for kl in kls], color=colour, label=f"{fit.family} ({step})")
    axes.fill_between(xs, [kl.low for kl in kls], [kl.high for kl in kls], color=colour, alpha=0.12, lw=0)
