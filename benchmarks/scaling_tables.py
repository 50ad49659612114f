"""table.md of `python -m benchmarks scaling`: the fitted lines, and the families that have none, with the reason."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.scaling_rows import Ends, ScalingRow
from benchmarks.tables import markdown
from kvcompress.fits import Fits

NOTES = """KL (nats a token to the uncompressed model's prediction) falls by *base* with each bit, or each kept
direction: ln KL = constant + doublings of context + slope x bits. *bits*: codes with their scales, without what is
learned once. *4?*: whether theory's 4 (errors of uniform or Lloyd-Max codes fall as 4^-bits) lies inside the interval.
*bent*: whether a term in bits squared has an interval without 0, so that the line hides a curve. *a doubling of
context*: by what KL grows with it, the exact window's smaller share included. Brackets: 95% intervals, Student's t over
the seeds' own fits and the points' distance from the line together. *off by*: standard deviation of the points (means
over seeds) from the line."""


def document(rows: Sequence[ScalingRow], fits: Fits) -> str:
    """The whole of table.md."""
    parts = [
        "# Scaling laws, fitted",
        NOTES,
        f"Measured on {fits.model} ({fits.shape.parameters:,} parameters), text {fits.text}, sinks {fits.sinks}, "
        f"window {fits.window}; commits {', '.join(fits.commits)}.",
    ]
    for subject in dict.fromkeys(row.subject for row in rows if row.kind != "position"):
        own = [row for row in rows if row.subject == subject]
        parts += [f"## {subject}: KL", losses(rows, subject).rstrip(), "Perplexity rises with KL (both as ln):"]
        parts += [perplexities(own).rstrip(), *not_fitted(own)]
    along = [row for row in rows if row.kind == "position"]
    if along:
        parts += [f"## By position, {fits.trends_model or 'no line'}", by_position(along).rstrip(), *not_fitted(along)]
    return "\n\n".join(parts) + "\n"


def losses(rows: Sequence[ScalingRow], subject: str) -> str:
    """KL against bits or rank: the fitted families of a subject."""
    lines = [
        [
            row.family,
            row.kind,
            f"{row.x[0]:.2f} to {row.x[1]:.2f}" if row.kind == "bits" else f"{row.x[0]:.0f} to {row.x[1]:.0f}",
            " ".join(f"{context:,}" for context in row.contexts or ()),
            spread(row.base, 2 if row.kind == "bits" else 3),
            "-" if row.four_inside is None else "inside" if row.four_inside else "outside",
            bent(row.curvature),
            spread(row.per_doubling, 2),
            f"{row.r_squared:.3f}",
            f"{row.residual - 1:.0%}",
        ]
        for row in rows
        if row.subject == subject and row.base is not None and row.x and row.residual and row.r_squared is not None
    ]
    headings = ["family", "x", "from, to", "contexts", "base", "4?", "bent", "a doubling of context", "R²", "off by"]
    return markdown(headings, 7, lines)


def bent(ends: Ends | None) -> str:
    return "-" if ends is None else "no" if ends[1] <= 0 <= ends[2] else "flattens" if ends[0] > 0 else "steepens"


def perplexities(rows: Sequence[ScalingRow]) -> str:
    """ln(perplexity ratio) over KL."""
    lines = [
        [row.family, f"{row.x[0]:.1e} to {row.x[1]:.1e}", spread(row.coefficients["kl"], 2), f"{row.residual:.2%}"]
        for row in rows
        if row.kind == "perplexity" and row.coefficients and row.x and row.residual is not None
    ]
    return markdown(["family", "KL", "ln perplexity ratio over KL", "off by"], 3, lines)


def by_position(rows: Sequence[ScalingRow]) -> str:
    """Increase of perplexity in per cent: at the last position, and with each doubling."""
    lines = [
        [
            row.family,
            f"{row.x[0]:,.0f} to {row.x[1]:,.0f}",
            *(spread(row.coefficients[name], 3) for name in ("at_end", "doublings")),
        ]
        for row in rows
        if row.coefficients and row.x
    ]
    return markdown(["cache", "positions", "increase at the last, %", "with each doubling, %"], 3, lines)


def spread(ends: Ends | None, digits: int) -> str:
    """Value and interval."""
    return "-" if ends is None else "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*ends, d=digits)


def not_fitted(rows: Sequence[ScalingRow]) -> list[str]:
    """One paragraph for each reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.status != "ok":
            reasons.setdefault(row.reason or "", []).append(row.family)
    return [f"{', '.join(names)}: not fitted: {reason}." for reason, names in reasons.items()]
