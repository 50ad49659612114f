"""Time to first token and decode speed, from `python -m benchmarks latency`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks import latency_tables
from benchmarks.caches import OUR_SIDE, PEER_SIDE, REFERENCE
from benchmarks.latency_rows import Row
from benchmarks.report import styles, svg
from benchmarks.report.parts import Figure, Panel, Part, Table
from benchmarks.report.sources import Source

ABOUT = """In each round every cache takes its turn: it reads the same prompt from empty, then takes its decode steps.
So all see the same machine, and the ratios hold even where the times depend on what else it does. Marks are medians,
bars go from quartile to quartile."""


def part(source: Source) -> Part:
    rows = source.rows(Row)
    timed = [row for row in rows if row.status == "ok"]
    styled = styles.cache_styles(row.cache for row in timed)
    batches = sorted({row.batch for row in timed})
    panels = tuple(
        Panel(
            f"{title}, {batch} row{'s' if batch > 1 else ''} in the batch",
            svg.panel(
                partial(draw, [row for row in timed if row.batch == batch], styled), f"{title}, batch of {batch}"
            ),
        )
        for batch in batches
        for title, draw in (("Decode speed", _decode), ("Time to first token", _first))
    )
    device = sorted({str(line.get("device")) for line in source.lines})
    caption = (
        f"Speed against context on {' and '.join(device)}: tokens decoded a second, all rows of the batch together "
        "(higher is better), and seconds from an empty cache to the prompt's first answer (lower is better). Both "
        "scales are logarithmic."
    )
    legend = tuple((name, svg.swatch(style)) for name, style in styled.items())
    tables = tuple(
        Table(f"Speed with {batch} x {context:,} tokens", latency_tables.table(own), True, latency_tables.NOTES)
        for (batch, context), own in latency_tables.cases(rows).items()
    )
    headline, *found = [_said(own) for own in _longest(timed)] or [""]
    remarks = tuple(text.removeprefix("* ") for text in latency_tables.remarks(rows))
    figures = (Figure(caption, panels, legend),) if panels else ()
    return Part(headline, tuple(found), figures, tables, remarks, source.subject)


def _longest(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each batch at its longest context."""
    cases = latency_tables.cases(rows)
    return [own for (batch, context), own in cases.items() if context == max(n for b, n in cases if b == batch)]


def _said(rows: Sequence[Row]) -> str:
    """The uncompressed cache's speed, and the fastest of both sides beside it."""
    said = [
        f"the fastest {whose} is {best.cache} with {best.decode_tokens_per_second:,.1f} a second"
        + (f", a step taking {best.step_ratio:.2f} times as long" if best.step_ratio is not None else "")
        for side, whose in ((OUR_SIDE, "of ours"), (PEER_SIDE, "peer"))
        if (best := _fastest(rows, side)) is not None
    ]
    base = _fastest(rows, REFERENCE)
    begin = f"{rows[0].batch} row{'s' * (rows[0].batch > 1)} of {rows[0].context:,} tokens: "
    if base is not None:
        begin += f"the uncompressed cache decodes {base.decode_tokens_per_second:,.1f} tokens a second; "
    return begin + "; ".join(said) + "."


def _fastest(rows: Sequence[Row], side: str) -> Row | None:
    own = [row for row in rows if row.side == side and row.decode_tokens_per_second is not None]
    return max(own, key=lambda row: row.decode_tokens_per_second or 0.0, default=None)


Looks = dict[str, dict[str, Any]]


def _decode(rows: Sequence[Row], looks: Looks, axes: Any) -> None:
    def speed(row: Row) -> tuple[float | None, ...]:
        times = row.milliseconds_per_token, row.milliseconds_per_token_q3, row.milliseconds_per_token_q1
        return tuple(time and row.batch * 1000 / time for time in times)

    _lines(rows, looks, axes, speed)
    axes.set_ylabel("tokens per second")


def _first(rows: Sequence[Row], looks: Looks, axes: Any) -> None:
    def seconds(row: Row) -> tuple[float | None, ...]:
        first = row.time_to_first_token_seconds
        return first, row.time_to_first_token_seconds_q1, row.time_to_first_token_seconds_q3

    _lines(rows, looks, axes, seconds)
    axes.set_ylabel("seconds")


def _lines(rows: Sequence[Row], looks: Looks, axes: Any, of: Callable[[Row], tuple[float | None, ...]]) -> None:
    """of: a row's median with its lower and its upper quartile."""
    for name, style in looks.items():
        own = sorted((row for row in rows if row.cache == name), key=lambda row: row.context)
        points = [(row.context, *values) for row in own if None not in (values := of(row))]
        if points:
            contexts, middle, low, high = zip(*points, strict=True)
            below = [m - v for m, v in zip(middle, low, strict=True)]
            above = [v - m for m, v in zip(middle, high, strict=True)]
            axes.errorbar(contexts, middle, [below, above], capsize=2, **style)
    axes.set(xlabel="tokens in the cache (context)")
    svg.token_axis(axes, [row.context for row in rows])
    svg.number_axis(axes)
