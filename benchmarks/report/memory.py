"""Bytes against context for models' geometries, and what fits on a device, from `python -m benchmarks memory`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks import memory_tables
from benchmarks.memory import Settings
from benchmarks.memory_rows import SLOPE, Fit, Row, fits, weight_bytes
from benchmarks.report import styles, svg
from benchmarks.report.parts import Figure, Panel, Part, Table
from benchmarks.report.sources import Source
from kvcompress.planning import GIB

ABOUT = """Caches of published models' sizes are filled with keys and values like real ones, and the storage behind
all that they hold is counted; where a whole model's cache is too large for the machine, layer by layer, a layer of
each kind counted as often as the model has it. Beyond the longest fill the line goes on at its measured slope. Both
scales are logarithmic, so parallel lines are a constant factor apart."""

#: What stays free beside weights and cache, and the bits of a parameter, where limits are told.
RESERVE, WEIGHT_BITS = Settings.reserve, Settings.weight_bits


def part(source: Source, gpu: int) -> Part:
    """gpu: bytes of the device whose limit is drawn."""
    rows = source.rows(Row)
    geometries = list(dict.fromkeys(row.geometry for row in rows))
    found = fits(rows, gpu, RESERVE, WEIGHT_BITS)
    known = [row for row in rows if row.status == "ok"]
    styled = styles.cache_styles(row.cache for row in known)
    panels = tuple(
        Panel(
            name, svg.panel(partial(_draw, own, limit(own, gpu), styled), f"Bytes of the cache against context: {name}")
        )
        for name in geometries
        if (own := [row for row in known if row.geometry == name])
    )
    caption = (
        "Bytes of the whole cache against tokens of context. Marks: measured; dotted lines: the measured slope. The "
        f"broken line is the device's limit: what a device of {gpu / 1e9:g} GB has left beside weights of "
        f"{WEIGHT_BITS:g} bits a parameter and {RESERVE / GIB:g} GiB for all else."
    )
    legend = tuple((name, svg.swatch(style)) for name, style in styled.items())
    longest = [_longest(own) for name in geometries if (own := [row for row in known if row.geometry == name])]
    return Part(
        headline=_headline(found, gpu),
        found=tuple(sentence for sentence in longest if sentence),
        figures=(Figure(caption, panels, legend),) if panels else (),
        tables=(*_fits(found, gpu), *(_bytes([row for row in rows if row.geometry == name]) for name in geometries)),
        remarks=_not_known(rows),
    )


def limit(rows: Sequence[Row], gpu: int) -> float:
    """Bytes that a model's weights leave for its cache."""
    return gpu - weight_bytes(rows[0], WEIGHT_BITS) - RESERVE


def _headline(found: Sequence[Fit], gpu: int) -> str:
    """For the first model: how far the smallest of ours reaches beside the uncompressed cache."""
    if not found:
        return ""
    own = [fit for fit in found if fit.geometry == found[0].geometry and fit.tokens is not None]
    base = next((fit for fit in own if styles.place(fit.cache)[0] == styles.REFERENCE), None)
    ours = [fit for fit in own if styles.place(fit.cache)[0] == styles.OUR_SIDE]
    if base is None or not ours or not base.tokens:
        return ""
    best = max(ours, key=lambda fit: fit.tokens or 0)
    return (
        f"On a device of {gpu / 1e9:g} GB, {base.geometry} in {WEIGHT_BITS:g}-bit weights has room for "
        f"{_tokens(base)} tokens uncompressed and for {_tokens(best)} with {best.cache}, "
        f"{(best.tokens or 0) / base.tokens:.1f} times as many."
    )


def _tokens(fit: Fit) -> str:
    if fit.tokens is None:
        return "any number"
    return f"{fit.tokens:,} ({'measured' if fit.basis == 'measured' else 'by the measured slope'})"


def _longest(rows: Sequence[Row]) -> str:
    """What the caches of a model take at the longest context that is known of all."""
    tokens = max(row.tokens for row in rows)
    own = sorted((row for row in rows if row.tokens == tokens), key=lambda row: -(row.cache_bytes or 0))
    told = ", ".join(f"{row.cache} {(row.cache_bytes or 0) / GIB:.1f} GiB ({row.basis})" for row in own)
    return f"{rows[0].geometry} at {tokens:,} tokens: {told}."


def _draw(rows: Sequence[Row], most: float, styled: dict[str, dict[str, Any]], axes: Any) -> None:
    for name, style in styled.items():
        own = sorted((row for row in rows if row.cache == name), key=lambda row: row.tokens)
        filled = [row for row in own if row.basis != SLOPE]
        beyond = [*filled[-1:], *(row for row in own if row.basis == SLOPE)]
        axes.plot([row.tokens for row in filled], [(row.cache_bytes or 0) / GIB for row in filled], **style)
        if len(beyond) > len(filled[-1:]):
            dotted = {**style, "ls": ":", "marker": ""}
            axes.plot([row.tokens for row in beyond], [(row.cache_bytes or 0) / GIB for row in beyond], **dotted)
    if most > 0:
        axes.axhline(most / GIB, color=svg.INK, lw=1.1, ls=(0, (6, 3)))
        place: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}
        axes.annotate(f"limit: {most / GIB:.1f} GiB", (min(row.tokens for row in rows), most / GIB), (2, 3), **place)
    axes.set(xlabel="tokens of context", ylabel="cache, GiB")
    svg.token_axis(axes, [row.tokens for row in rows])
    svg.number_axis(axes)


def _fits(found: Sequence[Fit], gpu: int) -> tuple[Table, ...]:
    note = (
        f"Tokens of one sequence beside weights of {WEIGHT_BITS:g} bits a parameter and {RESERVE / GIB:g} GiB for all "
        "else. (S): beyond what was filled, by the measured slope."
    )
    caption = f"How many tokens fit on a device of {gpu / 1e9:g} GB"
    return (Table(caption, memory_tables.fitting(found), note=note),) if found else ()


def _bytes(rows: Sequence[Row]) -> Table:
    caption = f"Bytes of the cache by tokens of context: {rows[0].geometry}"
    return Table(caption, memory_tables.table(rows), folded=True, note=memory_tables.NOTES)


def _not_known(rows: Sequence[Row]) -> tuple[str, ...]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.status != "ok":
            reasons.setdefault(f"{row.geometry}, {row.cache}: {row.status}: {row.reason}", []).append(f"{row.tokens:,}")
    return tuple(f"{text} (at {', '.join(where)} tokens)" for text, where in reasons.items())
