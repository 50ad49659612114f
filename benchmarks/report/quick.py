"""The quick look: one table of size, quality and speed, from `python -m benchmarks quick`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import results
from benchmarks.frontier_plot import LEAST_LOSS, MOST_BITS
from benchmarks.report import styles, svg
from benchmarks.report.parts import Figure, Panel, Part, Table
from benchmarks.report.sources import Source
from benchmarks.results import Result
from benchmarks.tables import markdown
from kvcompress.spec import DEFAULT_SPEC

ABOUT = """Size, quality and the time of a decode step of a few caches, on one text and in a few minutes. It is a
first look: one seed, one context."""


@dataclass(frozen=True)
class QuickRow(Result):
    """A result as a log's row: the cache tells it from the others."""

    @property
    def key(self) -> str:
        return self.cache


def part(source: Source) -> Part:
    rows = source.rows(QuickRow)
    drawn = [row for row in rows if 0 < (row.bits_per_element or 0) <= MOST_BITS and (row.kl_mean or 0) > LEAST_LOSS]
    styled = styles.cache_styles(row.cache for row in drawn)
    draw = partial(_draw, drawn, styled)
    legend = tuple((name, svg.swatch(style)) for name, style in styled.items())
    caption = "KL divergence to the uncompressed model's prediction against measured bits: lower left is better."
    table = markdown(
        ["cache", *(heading for heading, *_ in results.COLUMNS)], len(results.COLUMNS), list(map(results.cells, rows))
    )
    step = source.settings("step_context")
    note = "*bits/elem*: of what is coded, overheads included; *all held*: of everything held."
    note += f" *step*: a decode step at {step:,} tokens, over the uncompressed cache's." if step else ""
    return Part(
        headline=_said(rows, step),
        figures=(Figure(caption, (Panel("", svg.panel(draw, "KL against bits per element")),), legend),)
        if drawn
        else (),
        tables=(Table(f"All caches, on {source.subject}", table, note=note),),
        remarks=tuple(results.remarks(rows)),
        subject=source.subject,
    )


def _said(rows: Sequence[Result], step: int | None) -> str:
    """The default spec beside the uncompressed cache; "" where it was not measured."""
    own = next((row for row in rows if row.cache == DEFAULT_SPEC and row.kl_mean is not None), None)
    if own is None or own.bits_per_element is None or own.compression is None:
        return ""
    speed = (
        f" and takes {own.step_ratio:.1f} times as long for a decode step at {step:,} tokens" if own.step_ratio else ""
    )
    return (
        f"The default, {DEFAULT_SPEC}, codes in {own.bits_per_element:.2f} bits, is {own.compression:.1f} times "
        f"smaller in all than the uncompressed cache in its own dtype, loses {own.kl_mean:.2e} nats of KL a "
        f"token{speed}."
    )


def _draw(rows: Sequence[Result], styled: dict[str, dict[str, Any]], axes: Any) -> None:
    for row in rows:
        axes.plot([row.bits_per_element], [row.kl_mean], **{**styled[row.cache], "ls": ""})
    axes.set(yscale="log", xlabel="bits per element, measured, with overheads", ylabel="KL, nats per token")
