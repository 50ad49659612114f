"""Matplotlib's pictures as SVG that stands in a page: text stays text, and ink, grid and paper follow the page.

INK, GRID, PAPER are colours to draw with; in the SVG they become what the page's style sheet says, light or dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from html import escape
from typing import Any

INK, GRID, PAPER = "#010203", "#040506", "#070809"
_INHERITED = {INK: "currentColor", GRID: "var(--grid)", PAPER: "var(--paper)"}

#: Inches of a panel; the page shows two in a line, about half as large again.
SIZE = (4.9, 3.7)

_RC: Any = {  # matplotlib types every name of its settings
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
}


def drawn(draw: Callable[[Any], None], label: str, size: tuple[float, float] = SIZE) -> str:
    """The SVG of what `draw` draws on a matplotlib figure; label: what it shows, for those who do not see it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_RC, "svg.hashsalt": label}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inlined(file.getvalue(), label)


def _inlined(text: str, label: str) -> str:
    """An SVG file's text as an element of a page: no addresses, no names that another picture may have too."""
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", body)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1), count=1
    )
    for sentinel, value in _INHERITED.items():
        body = body.replace(sentinel, value)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", body)
    body = re.sub(r"\n\s*", "\n", body)
    return body.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1).strip()


def panel(draw: Callable[[Any], None], label: str, size: tuple[float, float] = SIZE) -> str:
    """`drawn` for a single pair of axes with a grid, on which `draw` draws."""

    def figure(found: Any) -> None:
        axes = found.subplots()
        axes.grid(True)
        axes.set_axisbelow(True)
        draw(axes)

    return drawn(figure, label, size)


def swatch(style: dict[str, Any]) -> str:
    """A short line with its marker, for a legend."""
    return _swatch(tuple(sorted(style.items())))


@cache
def _swatch(style: tuple[tuple[str, Any], ...]) -> str:
    def draw(figure: Any) -> None:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.plot([0.1, 0.5, 0.9], [0.5, 0.5, 0.5], **dict(style))
        axes.set(xlim=(0, 1), ylim=(0, 1))

    return drawn(draw, "", (0.36, 0.16)).replace('role="img" aria-label=""', 'aria-hidden="true"')


#: Where a name may stand beside its point, in points: the first place that is free.
_PLACES = ((-6, -9), (-6, -19), (-14, -2), (-30, -14))


def name_points(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write names left of and below (x, y) points, the first ones first; a name that has no free place is left out."""
    axes.figure.draw_without_rendering()  # so that extents are known
    taken: list[Any] = []
    for x, y, name in points:
        for place in _PLACES:
            text = axes.annotate(name, (x, y), place, textcoords="offset points", ha="right", fontsize=7.8)
            box = text.get_window_extent()
            if box.x0 > axes.bbox.x0 and box.y0 > axes.bbox.y0 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def tokens(value: float) -> str:
    """A number of tokens, short: 512, 4k, 128k, 1M (of 1024 and 1024 x 1024)."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.0f}"


def token_axis(axes: Any, values: list[int]) -> None:
    """A logarithmic axis of tokens with a tick at powers of two, no more than eight of them."""
    from matplotlib.ticker import NullLocator

    low, high = (round(math.log2(each)) for each in (min(values), max(values)))
    step = max(1, math.ceil((high - low) / 7))
    axes.set_xscale("log", base=2)
    axes.set_xticks([2**power for power in range(low, high + 1, step)])
    axes.set_xticklabels([tokens(2**power) for power in range(low, high + 1, step)])
    axes.xaxis.set_minor_locator(NullLocator())


def number_axis(axes: Any) -> None:
    """A logarithmic axis upwards with plain numbers at 1, 2 and 5 of each power of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:,g}")
