"""table.md of `python -m benchmarks memory`: bytes by context for every geometry, and how many tokens fit a device."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.frontier_tables import markdown
from benchmarks.memory_rows import LAYERWISE, SLOPE, WHOLE, Fit, Row, weight_bytes
from kvcompress.memory import format_bytes

#: What marks a number that is known in this way.
MARKS = {WHOLE: "", LAYERWISE: " (L)", SLOPE: " (S)"}

NOTES = """Bytes of caches, for models' geometries in bfloat16, as counted over the storage that they hold; the tokens
are drawn like those of real heads, no model was run. Unmarked: all layers were filled at once. **(L)**: layer by layer;
one layer of each kind was filled with all tokens and counted as often as the model has it. **(S)**: not filled that
far; a straight line through the last two contexts that were. *bits/elem*: bits of coded storage, scales, bases and
tables included, for each coded element, at the longest context that was filled. *peak*: the most that was held on the
way at the last column's context, the chunk that is fed and its workspace included. Sliding layers stay as transformers
holds them; QuantizedCache does not take models that have some."""


def document(rows: Sequence[Row], fits: Sequence[Fit], gpu: int, reserve: int, weight_bits: float) -> str:
    """The whole of table.md."""
    parts = ["# Memory against context", NOTES]
    for geometry in dict.fromkeys(row.geometry for row in rows):
        parts += [f"## {geometry}", table([row for row in rows if row.geometry == geometry])]
    known = next((row for row in rows if row.parameters), None)
    if fits and known is not None:
        parts += [f"## Tokens that fit in {format_bytes(gpu)}", _said(reserve, weight_bits), fitting(fits)]
        parts.append(_weights(rows, weight_bits))
    return "\n\n".join([*parts, *_remarks(rows)]) + "\n"


def table(rows: Sequence[Row]) -> str:
    """One geometry: a line a cache, a column for every second context up to the longest."""
    contexts = sorted({row.tokens for row in rows})[::-1][::2][::-1]
    lines = []
    for cache in dict.fromkeys(row.cache for row in rows):
        own = {row.tokens: row for row in rows if row.cache == cache}
        filled = [row for row in own.values() if row.bits_per_element is not None and row.basis != SLOPE]
        bits = f"{max(filled, key=lambda row: row.tokens).bits_per_element:.2f}" if filled else "-"
        lines.append([cache, bits, *(_cell(own.get(tokens)) for tokens in contexts), _peak(own.get(contexts[-1]))])
    return markdown(["cache", "bits/elem", *(f"{tokens:,}" for tokens in contexts), "peak"], lines)


def _cell(row: Row | None) -> str:
    if row is None or row.cache_bytes is None or row.basis is None:
        return "-" if row is None else row.status
    return format_bytes(row.cache_bytes) + MARKS[row.basis]


def _peak(row: Row | None) -> str:
    known = row is not None and row.peak_bytes is not None and row.basis is not None
    return format_bytes(row.peak_bytes) + MARKS[row.basis] if known else "-"  # type: ignore[union-attr, arg-type, index]


def fitting(fits: Sequence[Fit]) -> str:
    """A line a cache, a column a geometry."""
    geometries = list(dict.fromkeys(fit.geometry for fit in fits))
    by_place = {(fit.cache, fit.geometry): fit for fit in fits}
    lines = []
    for cache in dict.fromkeys(fit.cache for fit in fits):
        own = [by_place.get((cache, geometry)) for geometry in geometries]
        lines.append([cache, *("-" if fit is None else tokens_of(fit) for fit in own)])
    return markdown(["cache", *geometries], lines)


def tokens_of(fit: Fit) -> str:
    """The tokens with the mark of how they are known."""
    if fit.tokens is None:
        return "any"
    return f"{fit.tokens:,}{MARKS[SLOPE] if fit.basis == 'slope' else ''}"


def _said(reserve: int, weight_bits: float) -> str:
    return (
        f"Beside the weights at {weight_bits:g} bits a parameter (computed from the config, not measured) and "
        f"{format_bytes(reserve)} set aside for activations; one row, whatever length the model was trained for. "
        "Unmarked: between two contexts that were filled, as a whole or layer by layer."
    )


def _weights(rows: Sequence[Row], weight_bits: float) -> str:
    first = {row.geometry: row for row in reversed(rows)}
    said = (f"{name} {format_bytes(weight_bytes(row, weight_bits))}" for name, row in reversed(first.items()))
    return f"Weights: {', '.join(said)}."


def _remarks(rows: Sequence[Row]) -> list[str]:
    """A line for each reason why rows are not, or not wholly, measured, with the contexts that it holds for."""
    found: dict[tuple[str, str, str, str], list[int]] = {}
    for row in rows:
        if row.reason is not None:
            status = "on the slope" if row.status == "ok" else row.status
            found.setdefault((row.geometry, row.cache, status, row.reason), []).append(row.tokens)
    return [
        f"* {geometry}, {cache}, {min(tokens):,} to {max(tokens):,} tokens: {status}: {reason}"
        for (geometry, cache, status, reason), tokens in found.items()
    ]
