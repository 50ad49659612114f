"""Scaling laws as fitted, with their intervals, from `python -m benchmarks scaling`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks import scaling_tables
from benchmarks.report import styles, svg
from benchmarks.report.parts import Figure, Panel, Part, Table
from benchmarks.report.sources import Source
from benchmarks.scaling_rows import ScalingRow

ABOUT = """Lines fitted through the measured losses: by what the KL divergence falls with every bit (or, for low rank,
with every direction kept), and how it grows with context. Theory expects errors to fall as 4 to the power of minus
the bits. Nothing is fitted where there are too few points, and no line says anything beyond the range it was fitted
on."""

#: What KL falls by with a bit, as theory has it.
THEORY = 4.0
#: What the picture has room for; intervals may run out of it.
SHOWN = (1.0, 16.0)


def part(source: Source) -> Part:
    rows = source.rows(ScalingRow)
    subjects = [subject for subject in dict.fromkeys(row.subject for row in rows) if _fitted(rows, subject)]
    panels = [panel for subject in subjects for panel in _panels(_fitted(rows, subject), subject)]
    styled = {row.family: _style(row) for subject in subjects for row in _fitted(rows, subject)}
    caption = (
        f"By what KL falls with every bit, with 95% intervals (the broken line is theory's {THEORY:g}; what runs out "
        "of the picture is in the tables); and the fitted lines with the means that were measured, each over its own "
        "bits and at its longest context."
    )
    legend = tuple((name, svg.swatch(style)) for name, style in styled.items())
    return Part(
        headline=_headline(_fitted(rows, subjects[0]), subjects[0]) if subjects else "No family could be fitted.",
        found=tuple(_said(_fitted(rows, subject), subject) for subject in subjects),
        figures=(Figure(caption, tuple(panels), legend),) if panels else (),
        tables=tuple(_tables(rows)),
        remarks=tuple(dict.fromkeys(text for own in _by_subject(rows) for text in scaling_tables.not_fitted(own))),
        subject=source.subject,
    )


def _fitted(rows: Sequence[ScalingRow], subject: str) -> list[ScalingRow]:
    """The families of a subject whose KL has a line against bits."""
    return [row for row in rows if (row.subject, row.kind) == (subject, "bits") and row.base is not None and row.x]


def _by_subject(rows: Sequence[ScalingRow]) -> list[list[ScalingRow]]:
    return [[row for row in rows if row.subject == subject] for subject in dict.fromkeys(row.subject for row in rows)]


def _headline(rows: Sequence[ScalingRow], subject: str) -> str:
    bases = [row.base[0] for row in rows if row.base is not None]
    inside = sum(bool(row.four_inside) for row in rows)
    return (
        f"On {subject}, one bit more divides KL by {min(bases):.2f} to {max(bases):.2f}, depending on the codec; "
        f"theory's {THEORY:g} lies inside {inside} of {len(rows)} intervals of 95%."
    )


def _said(rows: Sequence[ScalingRow], subject: str) -> str:
    told = [f"{row.family} {scaling_tables.spread(row.base, 2)}" for row in rows]
    return f"On {subject}, KL falls with every bit by {', '.join(told)}, 95% intervals in brackets."


def _style(row: ScalingRow) -> dict[str, Any]:
    return styles.family_style(*styles.place(row.caches[0]))


def _panels(rows: Sequence[ScalingRow], subject: str) -> list[Panel]:
    context = max(row.reference or 0 for row in rows)
    draws = (("What a bit is worth", _intervals), (f"KL against bits, as fitted, {context:,} tokens", _lines))
    return [
        Panel(f"{subject}: {title}", svg.panel(partial(draw, rows), f"{title}, {subject}")) for title, draw in draws
    ]


def _intervals(rows: Sequence[ScalingRow], axes: Any) -> None:
    for index, row in enumerate(rows):
        mean, low, high = row.base or (0.0, 0.0, 0.0)
        axes.errorbar([mean], [index], xerr=[[mean - low], [high - mean]], capsize=3, **_style(row))
    axes.axvline(THEORY, color=svg.INK, lw=1.0, ls=(0, (6, 3)))
    axes.set_yticks(range(len(rows)), [row.family for row in rows])
    axes.set(xscale="log", xlabel="KL with one bit less, over KL", ylim=(len(rows) - 0.5, -0.5), xlim=SHOWN)
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.minorticks_off()


def _lines(rows: Sequence[ScalingRow], axes: Any) -> None:
    for row in rows:
        terms = row.coefficients or {}
        low, high = row.x or (0.0, 0.0)
        bits = [low + (high - low) * step / 20 for step in range(21)]
        losses = [math.exp(terms["constant"][0] + terms["bits"][0] * each) for each in bits]
        axes.plot(bits, losses, **{**_style(row), "marker": ""})
        here = [(x, kl) for x, context, kl in row.measured if context == row.reference]
        axes.plot(*zip(*here, strict=True), **{**_style(row), "ls": "none"})
    axes.set(yscale="log", xlabel="bits per element (codes with their scales)", ylabel="KL, nats per token")


def _tables(rows: Sequence[ScalingRow]) -> list[Table]:
    found = []
    for subject in dict.fromkeys(row.subject for row in rows if row.kind != "position"):
        own = [row for row in rows if row.subject == subject]
        note = scaling_tables.NOTES
        found.append(Table(f"{subject}: KL, fitted", scaling_tables.losses(rows, subject), folded=True, note=note))
        if any(row.kind == "perplexity" and row.coefficients for row in own):
            caption = f"{subject}: how perplexity rises with KL, both as logarithms"
            found.append(Table(caption, scaling_tables.perplexities(own), folded=True))
    along = [row for row in rows if row.kind == "position"]
    if any(row.coefficients for row in along):
        found.append(Table("Increase of perplexity along one document", scaling_tables.by_position(along)))
    return found
